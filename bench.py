"""Speed and memory, each measured variant in a process of its own; medians over rounds, ratios within a run.

    python bench.py loss            # the divergence, forward and backward, at a real vocabulary: ours, naive, TRL's (pip install trl==1.16.0)
    python bench.py step            # a whole update on fixed rollouts: ours, TRL's closest trainer, the matrix-product floor
    python bench.py sampling        # rollout.py with transformers, and with vLLM where it is installed, against bare generate
    python bench.py growth          # time and memory against response tokens, vocabulary and rows: fitted exponents
    python bench.py job             # where the time of `python opsd.py --filter correct` goes

Memory is the peak of the process during one pass, above what it held before (weights and inputs); time is that of the next pass. All variants of one
question get the same numbers and must give the same gradient, which is checked.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from statistics import median

from common import HERE

QWEN = dict(vocabulary=151_936, width=1024)  # Qwen3-0.6B's head; the 1.7B's is twice as wide
SMOL = dict(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


def time_and_peak(work):
    """(seconds, peak MB above what the process held before) of work(): memory of a first pass, time of a second, for which the first has warmed up."""
    status = lambda key: (
        int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
        / 1024
    )
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak back to the present size
    held = status("VmRSS")
    work()
    peak, start = status("VmHWM"), time.perf_counter()
    work()
    return time.perf_counter() - start, peak - held


# ---------------------------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary. A model without layers: its body is an embedding and a norm.


def head_only_model(vocabulary, width, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    model.model.embed_tokens = torch.nn.Embedding(1000, width).requires_grad_(
        False
    )  # small: the prompts use the first 1,000 ids only
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 2 / width**0.5)
    return model.to(dtype).eval()


def loss_variants(chunk):
    """name -> function (student, teacher, rollouts, teacher rows): adds the gradient of the mean reverse KL over all tokens to the student's."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    from common import response_hidden, token_chunks
    from opsd import kl, opsd_loss, read_rows, token_weights

    def hidden(student, teacher, rollouts, rows):
        with torch.no_grad():
            frozen = response_hidden(teacher, rows)
        return response_hidden(student, [(r.prompt_ids, r.response_ids) for r in rollouts]), frozen

    def ours(student, teacher, rollouts, rows, divergence="reverse_kl"):
        opsd_loss(
            student,
            teacher,
            rollouts,
            read_rows(teacher, rows, 1)[0],
            token_weights(rollouts, "token"),
            divergence,
            chunk=chunk,
        )

    def naive(student, teacher, rollouts, rows):
        s, t = hidden(student, teacher, rollouts, rows)
        with torch.no_grad():
            t = F.log_softmax(teacher.lm_head(t).float(), -1)
        s = F.log_softmax(student.lm_head(s).float(), -1)
        (s.exp() * (s - t)).sum(-1).mean().backward()

    def checkpointed(student, teacher, rollouts, rows):
        def part(s, t):
            with torch.no_grad():
                t = F.log_softmax(teacher.lm_head(t).float(), -1)
            return kl(F.log_softmax(student.lm_head(s).float(), -1), t).sum()

        s, t = hidden(student, teacher, rollouts, rows)
        (
            sum(
                checkpoint(part, s[c], t[c], use_reentrant=False)
                for c in token_chunks(len(s), student, chunk)
            )
            / len(s)
        ).backward()

    def compiled(student, teacher, rollouts, rows):
        import opsd

        opsd.DIVERGENCES["compiled"] = opsd.DIVERGENCES.get("compiled") or torch.compile(
            opsd.reverse_kl, dynamic=True
        )
        ours(student, teacher, rollouts, rows, "compiled")

    def trl_logits(student, teacher, rollouts, rows):
        from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

        s, t = hidden(student, teacher, rollouts, rows)
        with torch.no_grad():
            t = teacher.lm_head(t)
        compute_full_logit_self_distillation_loss(
            student.lm_head(s), t, distillation_alpha=1.0
        ).mean().backward()

    def trl_chunked(student, teacher, rollouts, rows):
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        s, t = hidden(student, teacher, rollouts, rows)
        _chunked_divergence_loss(
            s[None],
            t[None],
            student.lm_head.weight,
            teacher.lm_head.weight,
            torch.ones(1, len(s)),
            beta=1.0,
        )[0].backward()

    def trl_jsd(student, teacher, rollouts, rows):
        from trl.experimental.gkd import GKDTrainer

        s, t = hidden(student, teacher, rollouts, rows)
        with torch.no_grad():
            t = teacher.lm_head(t)
        (
            GKDTrainer.generalized_jsd_loss(student.lm_head(s), t, beta=1, reduction="sum") / len(s)
        ).backward()

    return dict(
        ours=ours,
        naive=naive,
        checkpointed=checkpointed,
        compiled=compiled,
        trl_logits=trl_logits,
        trl_chunked=trl_chunked,
        trl_jsd=trl_jsd,
    )


LOSS_NAMES = dict(
    ours="ours: backward chunk by chunk",
    naive="naive: full logits",
    checkpointed="chunks, recomputed in backward",
    compiled="ours, divergence by torch.compile",
    trl_logits="TRL experimental.sdft, full_logits",
    trl_chunked="TRL DistillationTrainer, chunked",
    trl_jsd="TRL experimental.gkd, as the trainer of OPSD's authors",
)


def measure_loss(variant, tokens, vocabulary, width, dtype, chunk=64):
    import torch
    from rollout import Rollout

    torch.manual_seed(0)
    student, teacher = (
        head_only_model(vocabulary, width, getattr(torch, dtype)),
        head_only_model(vocabulary, width, getattr(torch, dtype)).requires_grad_(False),
    )
    student.lm_head.weight.requires_grad_()

    def inputs(count):
        torch.manual_seed(count)
        ids = torch.randint(1000, (count + 1,)).tolist()
        rollouts = [Rollout(None, ids[:1], ids[1:])]
        return rollouts, [(ids[:1], ids[1:])]

    run = loss_variants(chunk)[variant]
    run(student, teacher, *inputs(64))
    if variant == "compiled":
        run(student, teacher, *inputs(tokens))  # each new shape may be compiled anew
    work = inputs(tokens)
    seconds, memory = time_and_peak(
        lambda: (student.zero_grad(set_to_none=False), run(student, teacher, *work))
    )
    return dict(
        seconds=seconds, memory=memory, gradient=student.lm_head.weight.grad.float().norm().item()
    )


# ---------------------------------------------------------------------------------------------------------------------
# A whole update: student forward and backward, teacher forward, clipping, AdamW.


def saved_model(name):
    """(model, tokenizer) with a directory of their own, as trainers and engines want: the embedded one, or random weights of the SmolLM2 shape."""
    import tempfile
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from common import load_model, save_model

    path, cpu = os.path.join(HERE, "tiny", "rlvr"), torch.device("cpu")
    if name == "smollm2":
        torch.manual_seed(0)
        tokenizer, path = load_model(path, cpu)[1], tempfile.mkdtemp()
        save_model(
            path,
            LlamaForCausalLM(
                LlamaConfig(**SMOL, tie_word_embeddings=True, max_position_embeddings=8192)
            ),
            tokenizer,
        )
    return load_model(path, cpu)


def step_rollouts(name, model, tokenizer, count):
    """(rollouts, teacher rows) of mixed lengths. embedded: what the main job trains on, `count` responses of its model to its problems, and their worked solutions.
    smollm2: 8 of random ids, prompts of 80 tokens, the teacher's of 280, responses of 40 to 640."""
    import numpy as np
    import opsd
    from data import CONTEXTS, load_problems
    from rollout import Rollout, make_rollouts, make_sampler

    if name == "embedded":
        args = opsd.parse_args([])
        rollouts = make_rollouts(
            make_sampler(model, tokenizer, args),
            tokenizer,
            load_problems(args, count),
            args,
            args.seed,
        )
        return opsd.teacher_rows(
            tokenizer, rollouts, CONTEXTS[args.context](rollouts, None), args, None
        )[:2]
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(5, model.config.vocab_size, n).tolist()
    rollouts = [Rollout(None, ids(80), ids(round(40 * 16 ** (i / 7)))) for i in rng.permutation(8)]
    return rollouts, [(ids(200) + r.prompt_ids, r.response_ids) for r in rollouts]


def matrix_flops(config, rollouts, rows):
    """Floating-point operations of an update's matrix products: 2 x weights x tokens forward, twice that backward; head at response tokens only.

    Attention's own products (2 x 2 x width x keys a token and layer, forward, over the causal half) are included.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d * config.num_key_value_heads // config.num_attention_heads
    block = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size  # weights of a block
    body = lambda lengths: sum(2 * layers * block * n + 2 * layers * d * n * n for n in lengths)
    head = 2 * config.vocab_size * d * sum(len(r.response_ids) for r in rollouts)
    student = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    teacher = [sum(map(len, row)) for row in rows]
    return 3 * (body(student) + head) + body(teacher) + head


def matrix_rate(d, wide):
    """Multiply-adds x 2 a second of a float32 product of the model's own shape, (2048, d) by (d, wide): median of ten."""
    import torch

    a, b = torch.randn(2048, d), torch.randn(d, wide)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048 * d * wide / median(times[2:])


def measure_step(variant, model, count=96):
    import torch
    from common import optimizer_step

    student, tokenizer = saved_model(model)
    rollouts, rows = step_rollouts(model, student, tokenizer, count)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    if variant == "ours":
        import opsd

        args = opsd.parse_args(
            ["--micro-tokens", "1"] if model == "smollm2" else []
        )  # on a CPU rows of this size gain nothing from company
        teacher = opsd.frozen_copy(student)

        def update():
            opsd.accumulate_gradients(student, teacher, rollouts, rows, args)
            return optimizer_step(student, optimizer, args.clip)[0]
    else:
        _, batch, *alone = variant.split()
        update = trl_update(student, tokenizer, optimizer, rollouts, rows, int(batch), bool(alone))
    norms, repeats = (
        [update()],
        1 if model == "smollm2" else 20,
    )  # the first makes the optimizer's state
    seconds, memory = time_and_peak(lambda: norms.extend(update() for _ in range(repeats)))
    rate = matrix_rate(student.config.hidden_size, student.config.intermediate_size)
    return dict(
        seconds=seconds / repeats,
        memory=memory,
        gradient=norms[0],
        floor=matrix_flops(student.config, rollouts, rows) / rate,
        tokens=sum(len(r.response_ids) for r in rollouts),
        gflops=rate / 1e9,
    )


def trl_update(student, tokenizer, optimizer, rollouts, rows, batch, alone):
    """TRL's SDFTTrainer on the same rollouts, `batch` rows at a time: batches that its own code makes, its compute_loss, our optimizer step.

    It pads all that it samples at once to one length, the whole step as a rule; `alone`: each batch sampled by itself (steps_per_generation 1).
    Left out, in its favour: its sampling, the making of the batches, its Trainer loop.
    """
    import tempfile
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.trainer.utils import split_tensor_dict
    from common import optimizer_step

    count = len(rollouts) // batch
    settings = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=count,
        steps_per_generation=1 if alone else count,
        num_generations=1,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        num_loss_tokens_to_skip=0,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
        teacher_model_kind="base",
    )
    examples = [
        dict(prompt=f"prompt {i}", privileged_context=f"context {i}") for i in range(len(rollouts))
    ]
    trainer = SDFTTrainer(
        model=student,
        args=settings,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    ids = {f"prompt {i}": r.prompt_ids for i, r in enumerate(rollouts)} | {
        f"prompt {i}, context {i}": row[0] for i, row in enumerate(rows)
    }
    responses = {tuple(r.prompt_ids): r.response_ids for r in rollouts}
    trainer.teacher_context_builder._compose_teacher_prompt = lambda prompt, context: (
        f"{prompt}, {context}"
    )
    trainer._tokenize_prompts = lambda prompts: [ids[prompt] for prompt in prompts]
    trainer._generate = lambda prompts: (prompts, [responses[tuple(prompt)] for prompt in prompts])
    trainer.current_gradient_accumulation_steps = count  # its train() would set it
    student.train()
    sampled = batch if alone else len(rollouts)
    batches = [
        part
        for start in range(0, len(rollouts), sampled)
        for part in split_tensor_dict(
            trainer._prepare_training_batch(examples[start : start + sampled]), sampled // batch
        )
    ]

    def update():
        for inputs in batches:
            trainer.compute_loss(student, inputs).backward()
        return optimizer_step(student, optimizer, 1.0)[0]

    return update


# ---------------------------------------------------------------------------------------------------------------------
# Sampling at temperature 1: the embedded model, 256 prompts, responses that end when they like; the SmolLM2 shape, 64 responses of 256 tokens.


def measure_sampling(variant, model):
    import numpy as np
    import torch
    from transformers import GenerationConfig
    import opsd
    from data import embedded_problems, render_prompt
    from rollout import cut, make_sampler

    name, (model, tokenizer) = model, saved_model(model)
    if name == "embedded":
        prompts, cap = [render_prompt(tokenizer, p) for p in embedded_problems(256, 0)], 160
    else:  # its random weights practically never end a response
        prompts, cap = (
            np.random.default_rng(0).integers(5, SMOL["vocab_size"], (64, 80)).tolist(),
            256,
        )
    width = max(map(len, prompts))
    if variant == "bare":

        def run(cap):
            torch.manual_seed(1)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            config = GenerationConfig(
                max_new_tokens=cap,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
            with torch.no_grad():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            return [cut(row, [tokenizer.eos_token_id]) for row in out[:, width:].tolist()]
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
        sampler = make_sampler(
            model, tokenizer, opsd.parse_args(["--backend", variant, "--dtype", "float32"])
        )
        run = lambda cap: sampler.sample(prompts, cap, seed=1)
    results = []
    seconds, memory = time_and_peak(lambda: results.append(run(cap)))
    return dict(seconds=seconds, memory=memory, tokens=sum(len(ids) for ids, _ in results[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# The main job, from the first import to the closing table. Each part is a function, timed where it is called.

JOB = {
    "sampling": ("opsd.make_rollouts", "eval.make_rollouts"),
    "grading": ("opsd.grade_rollouts", "eval.grade_rollouts"),
    "losses and gradients": ("opsd.accumulate_gradients",),
    "clipping and AdamW": ("opsd.optimizer_step",),
    "loading": ("opsd.load_problems", "opsd.load_held_out", "opsd.load_model"),
    "rendering of prompts": ("opsd.teacher_rows", "opsd.drop_long"),
    "logs and the saved model": ("opsd.log_step", "opsd.save_model", "opsd.Run.save_state"),
    "intervals and tables": ("eval.compare",),
}


def measure_job(threads):
    import contextlib
    import importlib
    import tempfile

    start = time.perf_counter()
    import opsd
    import torch
    import transformers.models.llama.modeling_llama  # the scripts import it late, when they load

    parts = {"imports of torch and transformers": time.perf_counter() - start} | dict.fromkeys(
        JOB, 0.0
    )

    def timed(part, function):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[part] += time.perf_counter() - begun

        return call

    for part, names in JOB.items():
        for name in names:
            module, *owner, name = name.split(".")
            owner = (
                getattr(importlib.import_module(module), owner[0])
                if owner
                else importlib.import_module(module)
            )
            setattr(owner, name, timed(part, getattr(owner, name)))
    with contextlib.redirect_stdout(sys.stderr):
        opsd.main(
            [
                "--filter",
                "correct",
                "--threads",
                str(threads),
                "--overwrite",
                "--out",
                tempfile.mkdtemp(),
            ]
        )
    seconds = time.perf_counter() - start
    return dict(
        seconds=seconds,
        memory=opsd.peak_memory(torch.device("cpu")),
        **parts,
        **{"all else": seconds - sum(parts.values())},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables

MEASURES = dict(loss=measure_loss, step=measure_step, sampling=measure_sampling, job=measure_job)


def measured(what, cases, args):
    """{name: {key: median over rounds}} of cases {name: arguments}: a process each, all cases once a round, so that noise falls on all alike."""
    results = {name: [] for name in cases}
    for number in range(args.rounds):
        for name, case in cases.items():
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    what,
                    "--threads",
                    str(args.threads),
                    "--case",
                    json.dumps(case),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                results.pop(name, None)
                print(
                    f"{name}: not measured ({(done.stderr.strip().splitlines() or ['killed, most likely out of memory'])[-1][:150]})",
                    flush=True,
                )
                cases = {key: value for key, value in cases.items() if key != name}
                continue
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"  round {number + 1}  {name}  {results[name][-1]['seconds']:.2f} s  {results[name][-1]['memory']:,.0f} MB",
                flush=True,
            )
    return {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in results.items()
    }


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def same_gradient(results, tolerance):
    norms = [r["gradient"] for r in results.values()]
    if max(norms) > min(norms) * (1 + tolerance):
        print(f"the gradients differ: norms {norms}")


def exponent(xs, ys):
    """Slope of log y over log x, by least squares."""
    xs, ys = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def loss(args):
    for dtype in args.dtypes:
        rows = []
        for tokens in args.tokens:
            results = measured(
                "loss",
                {
                    name: dict(variant=name, tokens=tokens, dtype=dtype, **QWEN)
                    for name in args.variants or LOSS_NAMES
                },
                args,
            )
            same_gradient(results, 1e-3 if dtype == "float32" else 0.05)
            base = results.get("naive")
            for name, r in results.items():
                rows.append(
                    (
                        f"{tokens:,}",
                        LOSS_NAMES[name],
                        f"{r['seconds']:.1f} s",
                        f"{r['memory']:,.0f} MB",
                        *(
                            (
                                f"{r['seconds'] / base['seconds']:.2f}",
                                f"{r['memory'] / base['memory']:.3f}",
                            )
                            if base
                            else ("", "")
                        ),
                    )
                )
        print(
            f"\nloss, forward and backward, {dtype}, V = {QWEN['vocabulary']:,}, D = {QWEN['width']:,}, {args.threads} threads, median of {args.rounds}"
        )
        table(
            ["response tokens", "variant", "time", "peak memory", "time / naive", "memory / naive"],
            rows,
        )


def step(args):
    for model in args.models:
        cases = {"ours": dict(variant="ours", model=model)}
        for batch in dict(smollm2=(8, 1), embedded=(8, 32))[model]:  # its default is 8
            cases[f"TRL SDFTTrainer, batches of {batch}"] = dict(
                variant=f"trl {batch}", model=model
            )
        cases[f"TRL SDFTTrainer, batches of {batch}, sampled by themselves"] = dict(
            variant=f"trl {batch} alone", model=model
        )
        results = measured("step", cases, args)
        same_gradient(results, 1e-2)
        first, floor = (
            results["ours"],
            min(r["floor"] for r in results.values()),
        )  # by the best rate that any of the processes saw
        print(
            f"\na whole update, {model} shape, float32, {first['tokens']:,.0f} response tokens, {args.threads} threads, median of {args.rounds}; products alone: {max(r['gflops'] for r in results.values()):.0f} GFLOP/s"
        )
        table(
            [
                "variant",
                "response tokens/s",
                "ours is faster by",
                "share of the matrix-product floor",
                "peak memory",
            ],
            [
                (
                    name,
                    f"{r['tokens'] / r['seconds']:,.0f}",
                    f"{r['seconds'] / first['seconds']:.2f} x",
                    f"{floor / r['seconds']:.0%}",
                    f"{r['memory']:,.0f} MB",
                )
                for name, r in results.items()
            ],
        )


def sampling(args):
    from importlib.util import find_spec

    names = dict(bare="bare generate", transformers="rollout.py, transformers") | (
        dict(vllm="rollout.py, vLLM") if find_spec("vllm") else {}
    )
    for model in args.models:
        results = measured(
            "sampling",
            {name: dict(variant=variant, model=model) for variant, name in names.items()},
            args,
        )
        rate = {name: r["tokens"] / r["seconds"] for name, r in results.items()}
        print(
            f"\nsampling, {model} shape, float32, {args.threads} threads, median of {args.rounds}"
        )
        table(
            ["variant", "response tokens/s", "against bare generate"],
            [
                (name, f"{value:,.0f}", f"{value / rate[names['bare']]:.2f}")
                for name, value in rate.items()
            ],
        )


def growth(args):
    lines = []
    for what, key, values, fixed in (
        (
            "response tokens",
            "tokens",
            [1024, 2048, 4096, 8192],
            dict(vocabulary=32_768, width=512, chunk=16),
        ),
        (
            "vocabulary",
            "vocabulary",
            [32_768, 65_536, 131_072, 262_144],
            dict(tokens=2048, width=512, chunk=16),
        ),
    ):
        results = measured(
            "loss",
            {
                f"{key} {value}": dict(variant="ours", dtype="float32", **fixed, **{key: value})
                for value in values
            },
            args,
        )
        rows = list(results.values())
        lines.append(
            (
                what,
                ", ".join(f"{v:,}" for v in values),
                f"{exponent(values, [r['seconds'] for r in rows]):.2f}",
                ", ".join(f"{r['memory']:,.0f}" for r in rows),
                f"{exponent(values, [r['memory'] for r in rows]):.2f}",
            )
        )
    rows = [48, 96, 192, 384]
    results = list(
        measured(
            "step",
            {
                f"rows {count}": dict(variant="ours", model="embedded", count=count)
                for count in rows
            },
            args,
        ).values()
    )
    lines.append(
        (
            "rows of an update (embedded model)",
            ", ".join(map(str, rows)),
            f"{exponent(rows, [r['seconds'] for r in results]):.2f}",
            ", ".join(f"{r['memory']:,.0f}" for r in results),
            f"{exponent(rows, [r['memory'] for r in results]):.2f}",
        )
    )
    print(
        f"\nour loss in chunks of 16 million logits, and a whole update, float32, {args.threads} threads, median of {args.rounds}; in powers: time or memory ~ x^exponent"
    )
    table(
        ["what grows", "values", "exponent of time", "peak memory, MB", "exponent of memory"], lines
    )


def job(args):
    parts = measured("job", {"opsd.py --filter correct": dict(threads=args.threads)}, args)[
        "opsd.py --filter correct"
    ]
    whole = parts.pop("seconds")
    print(
        f"\nthe main job, {args.threads} threads, median of {args.rounds}: {whole:.0f} s, peak {parts.pop('memory'):,.0f} MB"
    )
    table(
        ["part", "seconds", "share"],
        [(name, f"{value:.1f}", f"{value / whole:.0%}") for name, value in parts.items()],
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loss", "step", "sampling", "growth", "job"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="measurements of each variant, of which the median is shown",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[512, 1024, 2048, 4096],
        help="loss: response tokens",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        help="loss: of weights and hidden states",
    )
    parser.add_argument("--variants", nargs="+", choices=list(LOSS_NAMES), help="loss: only these")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=["smollm2", "embedded"],
        default=["smollm2", "embedded"],
        help="step and sampling: only these",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.case:
        return globals()[args.what](args)
    case = json.loads(args.case)
    import torch

    torch.set_num_threads(args.threads)
    print(json.dumps(MEASURES[args.what](**case)))


if __name__ == "__main__":
    main()
