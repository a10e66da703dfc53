"""What tools/bench.py measures: `MEASURES`, one function a question, each run in a process of its
own with the settings of one case, and returning seconds, memory (MB) and what else its table shows.
"""

import contextlib
import os
import sys
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import opsd
import ranks
import rollout
import samplers
from cli import HERE, peak_memory, set_up
from model import load_model, optimizer_step, save_model
from rollout import Rollout
from tools import memory
from tools.bench_loss import (
    begin_peak,
    matrix_rate,
    measure_loss,
    peak_since,
    seconds_of,
    time_and_peak,
)
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


def process_age():
    """Seconds since this process began, imports included."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        begun = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - begun


# ------------------------------------------------------------------------------------------------
# A whole update: student forward and backward, teacher forward, clipping, AdamW.


def saved_model(name, device):
    """(model, tokenizer) with a directory of their own, as trainers and engines want: the embedded
    one, or random weights of the SmolLM2 shape.
    """
    path = os.path.join(HERE, "tiny", "rlvr")
    if name == "smollm2":
        torch.manual_seed(0)
        tokenizer, path = load_model(path, CPU)[1], tempfile.mkdtemp()
        config = LlamaConfig(**SMOL, tie_word_embeddings=True, max_position_embeddings=8192)
        save_model(path, LlamaForCausalLM(config), tokenizer)
    return load_model(path, device)


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


def measure_step(variant, *, model, device, count=96):
    device = torch.device(device)
    student, tokenizer = saved_model(model, device)
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
    seconds, memory = time_and_peak(lambda: [update() for _ in range(repeats)], device)
    rate = matrix_rate(student.config.hidden_size, student.config.intermediate_size, device)
    return dict(
        seconds=seconds / repeats,
        memory=memory,
        gradient=norm,
        floor=matrix_flops(student.config, rollouts) / rate,
        tokens=rollout.tokens(rollouts),
        gflops=rate / 1e9,
    )


# Random weights of a Qwen3 shape, readied as opsd.py does; "qwen3-tiny" tries the command.
QWEN3 = {
    "qwen3-1.7b": lambda: memory.qwen3("Qwen3-1.7B"),
    "qwen3-tiny": lambda: memory.qwen3_config((256, 768, 6, 4, 2, True), 8192, 64),
}


def measure_training(model, *, tokens, device, flags):
    """A whole step of two micro-batches of `tokens` padded tokens: four responses of the same
    length, prompts of 80 tokens, the teacher's of 280. Memory: all that the step needs, models and
    optimizer included. Also under torchrun.
    """
    args = opsd.parse_args(["--device", device, "--micro-tokens", str(tokens), *flags])
    device = set_up(args)
    held, config = begin_peak(device), QWEN3[model]()
    with torch.device(ranks.load_device(device)):
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    teacher = opsd.frozen_copy(student)
    ranks.prepare(student, args, device)
    ranks.prepare(teacher, args, device, low=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    length, rng = tokens // 2 - 280, np.random.default_rng(0)
    rollouts = []
    for _ in range(4):
        ids = rng.integers(5, config.vocab_size, 280 + length).tolist()
        rollouts.append(Rollout(None, ids[200:280], ids[280:], outcome="correct"))
        rollouts[-1].teacher_row = [ids[:280], ids[280:]]

    def update():
        opsd.read_by_teacher(teacher, rollouts, args)
        opsd.accumulate_gradients(student, teacher, rollouts, args)
        return optimizer_step(student, optimizer)[0]

    norms = [update() for _ in range(2)]  # the first makes the optimizer's state
    peak, seconds = peak_since(device) - held, seconds_of(update, device)
    estimate = memory.estimate(
        config,
        gpus=1,
        tokens=tokens,
        read=4 * length,
        device=device.type,
        dtype=args.dtype,
        checkpointing=args.checkpointing,
        sampler=False,
        sharded=ranks.distributed(),
    )
    dtype = getattr(torch, args.dtype)
    rate = matrix_rate(config.hidden_size, config.intermediate_size, device, dtype)
    ranks.leave()
    return dict(
        seconds=seconds,
        memory=peak,
        estimate=sum(estimate.values()) / 2**20,
        gradient=norms[0],
        floor=matrix_flops(config, rollouts) / rate,
        tokens=4 * length,
        gflops=rate / 1e9,
    )


# ------------------------------------------------------------------------------------------------
# Sampling at temperature 1: the embedded model, 256 prompts, responses that end when they like; the
# SmolLM2 shape, 64 responses of 256 tokens.


def measure_sampling(variant, *, model, device):
    device = torch.device(device)
    name, (model, tokenizer) = model, saved_model(model, device)
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
    seconds, memory = time_and_peak(lambda: results.append(run()), device)
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
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    mask = torch.tensor(mask, device=model.device)
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


def measure_job(threads, device):
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
    flags = ["--threads", str(threads), "--device", device]
    flags += ["--overwrite", "--out", tempfile.mkdtemp()]
    with contextlib.redirect_stdout(sys.stderr):
        opsd.main(["--filter", "correct", *flags])
    seconds = process_age()
    rest = {"all else": seconds - sum(parts.values())}
    return dict(seconds=seconds, memory=peak_memory(torch.device(device)), **parts, **rest)


MEASURES = dict(
    loss=measure_loss,
    step=measure_step,
    training=measure_training,
    sampling=measure_sampling,
    job=measure_job,
)
