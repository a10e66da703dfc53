"""A whole update for tools/bench.py: student forward and backward, teacher forward, clipping,
AdamW; ours, and TRL's (pip install trl==1.16.0). Random weights and ids of a real model's shape.
"""

import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import opsd
import ranks
import rollout
from model import load_tokenizer, optimizer_step
from rollout import Rollout
from run import set_up, tiny
from tools import memory
from tools.bench_loss import begin_peak, matrix_rate, peak_since, seconds_of

SHAPES = {
    "smollm2": lambda: LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "qwen3-1.7b": lambda: memory.qwen3("Qwen3-1.7B"),
    "qwen3-tiny": lambda: memory.qwen3_config((256, 768, 6, 4, 2, True), 8192, 64),
}


def random_rollouts(lengths, vocabulary):
    """Responses of these lengths behind prompts of 80 tokens, the teacher's of 280."""
    rng, rollouts = np.random.default_rng(0), []
    for length in lengths:
        ids = rng.integers(5, vocabulary, 280 + length).tolist()
        r = Rollout(None, ids[200:280], ids[280:], outcome="correct")
        r.teacher_row = [ids[:280], ids[280:]]
        rollouts.append(r)
    return rollouts


def matrix_flops(config, rollouts):
    """Floating-point operations of an update's matrix products: 2 x weights x tokens forward, twice
    that backward; head at response tokens only. Attention's own products (2 x 2 x width x keys a
    token and layer, forward, over the causal half) are included.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d * config.num_key_value_heads // config.num_attention_heads
    block = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size  # weights of a block

    def body(rows):
        lengths = [sum(map(len, row)) for row in rows]
        return sum(2 * layers * block * n + 2 * layers * d * n * n for n in lengths)

    head = 2 * config.vocab_size * d * rollout.tokens(rollouts)
    student, teacher = body([r.row for r in rollouts]), body([r.teacher_row for r in rollouts])
    return 3 * (student + head) + teacher + head


def measure_step(variant, *, model, device, tokens=1, flags=()):
    """Seconds of an update and its floor, the matrix products at the rate of one product of the
    model's shape. memory: the peak above what is held between updates; whole: above what was held
    before the models were made. Also under torchrun, as one rank.

    smollm2: 8 responses of 40 to 640 tokens; on a CPU rows of its size gain nothing from company,
    hence micro-batches of a row. Others: two micro-batches of `tokens` padded tokens, four
    responses of one length. variant: ours, or "trl", its rows a batch and, if so, "alone".
    """
    args = opsd.parse_args(["--device", device, "--micro-tokens", str(tokens), *flags])
    device = set_up(args)
    before, config = begin_peak(device), SHAPES[model]()
    with torch.device(ranks.load_device(device)):
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    lengths = [tokens // 2 - 280] * 4
    if model == "smollm2":
        lengths = [round(40 * 16 ** (i / 7)) for i in np.random.default_rng(0).permutation(8)]
    rollouts = random_rollouts(lengths, config.vocab_size)
    if variant == "ours":
        teacher = opsd.frozen_copy(student)
        ranks.prepare(student, args, device)
        ranks.prepare(teacher, args, device, low=True)
    else:
        batches = trl_batches(student, rollouts, variant)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)

    def update():
        if variant == "ours":
            opsd.accumulate_gradients(student, teacher, rollouts, args)
        else:
            for compute_loss, inputs in batches:
                compute_loss(student, inputs).backward()
        return optimizer_step(student, optimizer)[0]

    norm = update()  # makes the optimizer's state
    held = begin_peak(device)
    update()
    peak, seconds = peak_since(device), seconds_of(update, device)
    dtype = getattr(torch, args.dtype)
    rate = matrix_rate(config.hidden_size, config.intermediate_size, device, dtype)
    args.device, args.backend = device.type, "vllm"  # nothing is sampled here
    longest = max(sum(map(len, r.teacher_row)) for r in rollouts)
    estimate = memory.estimate(config, args, 1, max(tokens, longest), ranks.distributed())
    ranks.leave()
    return dict(
        seconds=seconds,
        memory=peak - held,
        whole=peak - before,
        estimate=sum(estimate.values()) / 2**20,
        gradient=norm,
        floor=matrix_flops(config, rollouts) / rate,
        tokens=rollout.tokens(rollouts),
        gflops=rate / 1e9,
    )


def trl_batches(student, rollouts, variant):
    """The same rollouts for TRL's SDFTTrainer, some rows at a time: [(its compute_loss, what its
    own code makes of the rows), ...].

    It pads all that it samples at once to one length, the whole step as a rule; alone: each batch
    sampled by itself (steps_per_generation 1). Left out, in its favour: its sampling, the making of
    the batches, its Trainer loop.
    """
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.trainer.utils import split_tensor_dict

    batch, alone = int(variant.split()[1]), variant.endswith("alone")
    count, path = len(rollouts) // batch, tempfile.mkdtemp()
    student.save_pretrained(path)  # the trainer loads its teacher from there
    student.config._name_or_path = path
    settings = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=count,
        steps_per_generation=1 if alone else count,
        num_generations=1,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=student.device.type == "cpu",
    )
    numbers = range(len(rollouts))
    rows = [dict(prompt=f"prompt {i}", privileged_context=f"context {i}") for i in numbers]
    trainer = SDFTTrainer(
        model=student,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(tiny("rlvr")),
    )
    ids = {f"prompt {i}": r.prompt_ids for i, r in enumerate(rollouts)}
    ids |= {f"prompt {i}, context {i}": r.teacher_row[0] for i, r in enumerate(rollouts)}
    responses = {tuple(r.prompt_ids): r.response_ids for r in rollouts}
    trainer.teacher_context_builder._compose_teacher_prompt = "{}, {}".format
    trainer._tokenize_prompts = lambda prompts: [ids[prompt] for prompt in prompts]
    trainer._generate = lambda prompts: (prompts, [responses[tuple(prompt)] for prompt in prompts])
    trainer.current_gradient_accumulation_steps = count  # its train() would set it
    student.train()
    sampled = batch if alone else len(rollouts)
    batches = []
    for first in range(0, len(rollouts), sampled):
        together = trainer._prepare_training_batch(rows[first : first + sampled])
        batches += split_tensor_dict(together, sampled // batch)
    return [(trainer.compute_loss, inputs) for inputs in batches]
