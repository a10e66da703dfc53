"""What tools/bench.py measures: `MEASURES`, one function a question, each run in a process of its
own with the settings of one case, and returning seconds, memory (MB) and what else its table shows.
"""

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import losses
import model as model_module
import opsd
import rollout
import samplers
from cli import HERE, peak_memory
from model import chunks_of, load_model, optimizer_step, response_hidden, save_model
from rollout import Rollout
from tools.bench_trl import trl_batches

CPU = torch.device("cpu")
SMOL = dict(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


def time_and_peak(work):
    """(seconds, peak MB above what the process held before) of work(): memory of a first pass, time
    of a second, for which the first has warmed up.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # sets the peak back to the present size
    held = process_memory("VmRSS")
    work()
    peak, begun = process_memory("VmHWM"), time.perf_counter()
    work()
    return time.perf_counter() - begun, peak - held


def process_memory(key):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(key)) / 1024


def process_age():
    """Seconds since this process began, imports included."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        begun = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - begun


# ------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary. A model without layers: its body is an
# embedding and a norm. A variant is a function (student, teacher, rollouts) that adds the gradient
# of the mean reverse KL over all tokens to the student's.


def head_only_model(vocabulary, width, dtype):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=0,
            num_attention_heads=1,
            tie_word_embeddings=False,
        )
    )
    # Small: the rows use the first 1,000 ids only.
    model.model.embed_tokens = torch.nn.Embedding(1000, width).requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 2 / width**0.5)
    return model.to(dtype).eval()


def hidden_states(student, teacher, rollouts):
    """(R, D) of student and teacher."""
    with torch.no_grad():
        frozen = response_hidden(teacher, [r.teacher_row for r in rollouts])
    return response_hidden(student, [r.row for r in rollouts]), frozen


def ours(student, teacher, rollouts, divergence="reverse_kl"):
    args = opsd.parse_args([])
    args.divergence = divergence
    for r, weights in zip(rollouts, opsd.token_weights(rollouts, "token"), strict=True):
        r.weights = weights
    opsd.read_by_teacher(teacher, rollouts, args)
    opsd.opsd_loss(student, teacher, rollouts, args)


def naive(student, teacher, rollouts):
    s, t = hidden_states(student, teacher, rollouts)
    with torch.no_grad():
        t = F.log_softmax(teacher.lm_head(t).float(), -1)
    s = F.log_softmax(student.lm_head(s).float(), -1)
    (s.exp() * (s - t)).sum(-1).mean().backward()


def checkpointed(student, teacher, rollouts):
    def part(s, t):
        with torch.no_grad():
            t = F.log_softmax(teacher.lm_head(t).float(), -1)
        return losses.kl(F.log_softmax(student.lm_head(s).float(), -1), t).sum()

    s, t = hidden_states(student, teacher, rollouts)
    parts = [checkpoint(part, s[c], t[c], use_reentrant=False) for c in chunks_of(s, student)]
    (sum(parts) / len(s)).backward()


@functools.cache
def compiled_kl():
    return torch.compile(losses.kl, dynamic=True)


def compiled(student, teacher, rollouts):
    def divergence(student_logps, teacher_logps, tokens, args):
        return compiled_kl()(student_logps, teacher_logps)

    opsd.DIVERGENCES["compiled"] = divergence
    ours(student, teacher, rollouts, "compiled")


def trl_logits(student, teacher, rollouts):
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    s, t = hidden_states(student, teacher, rollouts)
    with torch.no_grad():
        t = teacher.lm_head(t)
    loss = compute_full_logit_self_distillation_loss(student.lm_head(s), t, distillation_alpha=1.0)
    loss.mean().backward()


def trl_chunked(student, teacher, rollouts):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    s, t = hidden_states(student, teacher, rollouts)
    heads, mask = (student.lm_head.weight, teacher.lm_head.weight), torch.ones(1, len(s))
    _chunked_divergence_loss(s[None], t[None], *heads, mask, beta=1.0)[0].backward()


def trl_jsd(student, teacher, rollouts):
    from trl.experimental.gkd import GKDTrainer

    s, t = hidden_states(student, teacher, rollouts)
    with torch.no_grad():
        t = teacher.lm_head(t)
    loss = GKDTrainer.generalized_jsd_loss(student.lm_head(s), t, beta=1, reduction="sum")
    (loss / len(s)).backward()


LOSSES = {
    "ours": (ours, "ours: backward chunk by chunk"),
    "naive": (naive, "naive: full logits"),
    "checkpointed": (checkpointed, "chunks, recomputed in backward"),
    "compiled": (compiled, "ours, divergence by torch.compile"),
    "trl_logits": (trl_logits, "TRL experimental.sdft, full_logits"),
    "trl_chunked": (trl_chunked, "TRL DistillationTrainer, chunked"),
    "trl_jsd": (trl_jsd, "TRL experimental.gkd, as the trainer of OPSD's authors"),
}


def measure_loss(variant, *, tokens, vocabulary, width, dtype, chunk=None):
    """`chunk`: logits, instead of model.CHUNK."""
    torch.manual_seed(0)
    student = head_only_model(vocabulary, width, getattr(torch, dtype))
    teacher = head_only_model(vocabulary, width, getattr(torch, dtype)).requires_grad_(False)
    model_module.CHUNK["cpu"] = chunk or model_module.CHUNK["cpu"]
    run, _ = LOSSES[variant]

    def inputs(count):
        torch.manual_seed(count)
        ids = torch.randint(1000, (count + 1,)).tolist()
        return [Rollout(None, ids[:1], ids[1:], teacher_row=[ids[:1], ids[1:]])]

    run(student, teacher, inputs(64))
    if variant == "compiled":
        run(student, teacher, inputs(tokens))  # each new shape may be compiled anew
    rollouts = inputs(tokens)

    def work():
        student.zero_grad(set_to_none=False)
        run(student, teacher, rollouts)

    seconds, memory = time_and_peak(work)
    gradient = student.lm_head.weight.grad.float().norm().item()
    return dict(seconds=seconds, memory=memory, gradient=gradient)


# ------------------------------------------------------------------------------------------------
# A whole update: student forward and backward, teacher forward, clipping, AdamW.


def saved_model(name):
    """(model, tokenizer) with a directory of their own, as trainers and engines want: the embedded
    one, or random weights of the SmolLM2 shape.
    """
    path = os.path.join(HERE, "tiny", "rlvr")
    if name == "smollm2":
        torch.manual_seed(0)
        tokenizer, path = load_model(path, CPU)[1], tempfile.mkdtemp()
        config = LlamaConfig(**SMOL, tie_word_embeddings=True, max_position_embeddings=8192)
        save_model(path, LlamaForCausalLM(config), tokenizer)
    return load_model(path, CPU)


def step_rollouts(name, model, tokenizer, count):
    """Rollouts of mixed lengths. embedded: what the main job trains on, `count` responses of its
    model to its problems, and their worked solutions. smollm2: 8 of random ids, prompts of 80
    tokens, the teacher's of 280, responses of 40 to 640.
    """
    if name == "embedded":
        args = opsd.parse_args(["--backend", "transformers", "--dtype", "float32"])
        sampler = samplers.make_sampler(model, tokenizer, args)
        problems = data.load_problems(args, count)
        rollouts = rollout.make_rollouts(sampler, tokenizer, problems, args, args.seed)
        contexts = data.CONTEXTS[args.context](rollouts, None, args)
        return opsd.add_teacher_rows(rollouts, contexts, tokenizer, args, None)[0]
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(5, model.config.vocab_size, count).tolist()

    rollouts = [Rollout(None, ids(80), ids(round(40 * 16 ** (i / 7)))) for i in rng.permutation(8)]
    for r in rollouts:
        r.teacher_row = [ids(200) + r.prompt_ids, r.response_ids]
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


def matrix_rate(d, wide):
    """Multiply-adds x 2 a second of a float32 product of the model's own shape, (2048, d) by
    (d, wide): median of the last eight of ten.
    """
    a, b, times = torch.randn(2048, d), torch.randn(d, wide), []
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - begun)
    return 2 * 2048 * d * wide / median(times[2:])


def measure_step(variant, *, model, count=96):
    student, tokenizer = saved_model(model)
    rollouts = step_rollouts(model, student, tokenizer, count)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    if variant == "ours":
        # On a CPU rows of SmolLM2's size gain nothing from company.
        args = opsd.parse_args(["--micro-tokens", "1"] if model == "smollm2" else [])
        teacher = opsd.frozen_copy(student)

        def update():
            opsd.read_by_teacher(teacher, rollouts, args)
            opsd.accumulate_gradients(student, teacher, rollouts, args)
            return optimizer_step(student, optimizer)[0]
    else:
        _, batch, *alone = variant.split()
        batches = trl_batches(student, tokenizer, rollouts, int(batch), bool(alone))

        def update():
            for compute_loss, inputs in batches:
                compute_loss(student, inputs).backward()
            return optimizer_step(student, optimizer)[0]

    norm = update()  # makes the optimizer's state
    repeats = 1 if model == "smollm2" else 20
    seconds, memory = time_and_peak(lambda: [update() for _ in range(repeats)])
    rate = matrix_rate(student.config.hidden_size, student.config.intermediate_size)
    return dict(
        seconds=seconds / repeats,
        memory=memory,
        gradient=norm,
        floor=matrix_flops(student.config, rollouts) / rate,
        tokens=rollout.tokens(rollouts),
        gflops=rate / 1e9,
    )


# ------------------------------------------------------------------------------------------------
# Sampling at temperature 1: the embedded model, 256 prompts, responses that end when they like; the
# SmolLM2 shape, 64 responses of 256 tokens.


def measure_sampling(variant, *, model):
    name, (model, tokenizer) = model, saved_model(model)
    if name == "embedded":
        problems, cap = data.embedded_problems(256, 0), 160
        prompts = [data.render_prompt(tokenizer, problem) for problem in problems]
    else:  # its random weights practically never end a response
        rng, cap = np.random.default_rng(0), 256
        prompts = rng.integers(5, SMOL["vocab_size"], (64, 80)).tolist()
    if variant == "bare":

        def run():
            return bare_generate(model, tokenizer, prompts, cap)
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
        args = opsd.parse_args(["--backend", variant, "--dtype", "float32"])
        sampler = samplers.make_sampler(model, tokenizer, args)

        def run():
            return sampler.sample(prompts, cap, seed=1)

    results = []
    seconds, memory = time_and_peak(lambda: results.append(run()))
    return dict(seconds=seconds, memory=memory, tokens=sum(len(ids) for ids, _ in results[-1]))


def bare_generate(model, tokenizer, prompts, cap):
    torch.manual_seed(1)
    width = max(map(len, prompts))
    config = GenerationConfig(
        max_new_tokens=cap,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    stop = [tokenizer.eos_token_id]
    return [samplers.until_stop(row, stop) for row in out[:, width:].tolist()]


# ------------------------------------------------------------------------------------------------
# The main job, from the first import to the closing table. Each part is a function, timed where it
# is called.

JOB = {
    "sampling": [(rollout, "make_rollouts")],
    "grading": [(rollout, "grade_rollouts")],
    "losses and gradients": [(opsd, "read_by_teacher"), (opsd, "accumulate_gradients")],
    "clipping and AdamW": [(opsd, "optimizer_step")],
    "loading": [(data, "load_problems"), (data, "load_held_out"), (opsd, "load_model")],
    "rendering of prompts": [(opsd, "add_teacher_rows"), (rollout, "drop_long")],
    "logs and the saved model": [
        (opsd, "log_step"),
        (opsd, "save_model"),
        (opsd.Run, "save_state"),
    ],
    "intervals and tables": [(evaluation, "compare")],
}


def measure_job(threads):
    parts = {"imports of torch and transformers": process_age()} | dict.fromkeys(JOB, 0.0)

    def timed(part, function):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[part] += time.perf_counter() - begun

        return call

    for part, functions in JOB.items():
        for owner, name in functions:
            setattr(owner, name, timed(part, getattr(owner, name)))
    flags = ["--threads", str(threads), "--overwrite", "--out", tempfile.mkdtemp()]
    with contextlib.redirect_stdout(sys.stderr):
        opsd.main(["--filter", "correct", *flags])
    seconds = process_age()
    rest = {"all else": seconds - sum(parts.values())}
    return dict(seconds=seconds, memory=peak_memory(CPU), **parts, **rest)


MEASURES = dict(loss=measure_loss, step=measure_step, sampling=measure_sampling, job=measure_job)
