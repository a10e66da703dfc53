"""Speed and memory: the loss beside the naive form, TRL's and Liger's; a whole update.

    python -m tools.bench loss    # the divergence, forward and backward, at a real vocabulary;
                                  # pip install trl==1.16.0 liger-kernel (Liger's is for CUDA only)
    python -m tools.bench step    # an update on fixed rollouts, beside tools/memory.py's estimate
    python -m tools.bench loss --device cuda    # bfloat16, up to 65,536 tokens
    python -m tools.bench step --device cuda    # Qwen3-1.7B's shape, 8,192 tokens a micro-batch

Each variant runs in a process of its own; medians over rounds. Memory is the peak during one pass
(of the process; of a card's allocator) above what was held before (weights and inputs). Time is
that of the next pass, on a card the median of five. All variants get the same numbers and must give
the same gradient, which is checked. Ratios are to the table's first row.
"""

import argparse
import json
import subprocess
import sys
from statistics import median

if __name__ == "__main__":
    from launch import start

import torch
from transformers import AutoModelForCausalLM

import opsd
import ranks
from model import make_optimizer, optimizer_step
from run import HERE, Parser, fail, set_up
from tools import bench_loss, markdown, memory
from tools.bench_loss import LOSSES, begin_peak

WIDTH = 1024  # of the loss's hidden states: Qwen3-0.6B's; the 1.7B's are twice as wide
SHAPES = {
    "smollm2-135m": memory.qwen3_config(576, 1536, 30, 9, 3, True, 49_152, 64),
    "qwen3-1.7b": memory.QWEN3["Qwen3-1.7B"],
    "tiny": memory.qwen3_config(256, 768, 6, 4, 2, True, 8192, 64),
}


def make_update(config, args, device):
    """A function that makes an update of random models of this shape and returns its gradient
    norm: four responses, in two micro-batches of --micro-tokens.
    """
    with torch.device(ranks.load_device(device)):
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    teacher = None if args.lora else opsd.frozen_copy(student)  # random: not to be loaded anew
    ranks.prepare(student, args, device)
    if args.lora:
        teacher = opsd.frozen_copy(student, args, device)
    else:
        ranks.prepare(teacher, args, device, low=True)
    optimizer = make_optimizer(student, args)
    rollouts = bench_loss.random_rollouts(4, 8, args.micro_tokens // 2 - 16, config.vocab_size)

    def update():
        opsd.accumulate_gradients(student, teacher, rollouts, args)
        return optimizer_step(student, optimizer)[0]

    return update


def measure_step(*, model, tokens, dtype, device, flags=()):
    """Of an update. memory: the peak above what is held between updates; whole: above what was held
    before the models were made, as `estimate` has it.
    """
    flags = ["--device", device, "--dtype", dtype, "--micro-tokens", str(tokens), *flags]
    args, config = opsd.parse_args(flags), SHAPES[model]
    device = set_up(args)
    before = begin_peak(device)
    update = make_update(config, args, device)
    norm = update()  # makes the optimizer's state
    held = begin_peak(device)
    update()
    peak, seconds = bench_loss.peak_since(device), bench_loss.seconds_of(update, device)
    args.device, args.backend = device.type, "vllm"  # nothing is sampled here
    estimate = sum(memory.estimate(config, args, 1, tokens, ranks.distributed()).values())
    ranks.leave()
    return dict(
        seconds=seconds,
        memory=peak - held,
        gradient=norm,
        speed=4 * (tokens // 2 - 16) / seconds,
        whole=peak - before,
        estimate=estimate / 2**20,
    )


# ------------------------------------------------------------------------------------------------
# Cases: {name: arguments of the measuring function}, and their tables


def loss_cases(tokens, args):
    case = dict(tokens=tokens, dtype=args.dtype, width=WIDTH, vocabulary=args.vocabulary)
    return {name: dict(case, variant=name) for name in args.variants}


def step_cases(tokens, args):
    """As opsd.py prepares it, on one rank, with adapters, and under torchrun."""
    case = dict(model=args.model, tokens=tokens, dtype=args.dtype)
    names = [
        name + flag
        for name in ("python", "python --lora 16", "torchrun")
        for flag in ("", " --checkpointing")
    ]
    return {name: dict(case, flags=name.split()[1:]) for name in names}


CASES = dict(loss=loss_cases, step=step_cases)
MEASURES = dict(loss=bench_loss.measure_loss, step=measure_step)


def measured(cases, args):
    """{name: {key: median over rounds}}: a process each, all cases once a round, so that noise
    falls on all alike. One whose name begins with torchrun is started by it, as one rank.
    """
    results = {name: [] for name in cases}
    for number in range(1, args.rounds + 1):
        for name in list(results):
            call = [sys.executable, "-m"]
            if name.startswith("torchrun"):
                call += ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
            call += ["tools.bench", args.what, "--threads", str(args.threads)]
            case = json.dumps(dict(cases[name], device=args.device))
            call += ["--device", args.device, "--case", case]
            done = subprocess.run(call, capture_output=True, text=True, cwd=HERE)
            if done.returncode:
                del results[name]
                print(f"{name}: not measured ({last_error(done.stderr)})", flush=True)
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            results[name].append(r)
            line = f"  round {number}  {name}  {r['seconds']:.2f} s  {r['memory']:,.0f} MB"
            print(line, flush=True)
    return {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in results.items()
    }


def last_error(text):
    """The last line that names an exception, torchrun's report aside; else the last line."""
    lines = text.strip().splitlines() or ["killed, most likely out of memory"]
    named = [line for line in lines if "rror: " in line and "ChildFailedError" not in line]
    return (named or lines)[-1][-200:]


COLUMNS = {  # of what was measured: title, format
    "seconds": ("time", "{:.3f} s"),
    "memory": ("peak memory", "{:,.0f} MB"),
    "speed": ("response tokens/s", "{:,.0f}"),
    "whole": ("peak with the models", "{:,.0f} MB"),
    "estimate": ("estimate of that", "{:,.0f} MB"),
}


def table(results):
    """Markdown, the ratios to the first row in it."""
    first = next(iter(results.values()))
    keys = [key for key in COLUMNS if key in first]
    header = ["variant", *(COLUMNS[key][0] for key in keys), "time / first", "memory / first"]
    rows = []
    for name, r in results.items():
        ratios = [f"{r[key] / first[key]:.3f}" for key in ("seconds", "memory")]
        rows.append([name, *(COLUMNS[key][1].format(r[key]) for key in keys), *ratios])
    return markdown(header, rows)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=list(CASES))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--rounds", type=int, default=3, help="measurements of each variant, shown by their median")
    add("--tokens", type=int, nargs="+", help="loss: of responses; step: of a micro-batch")
    add("--dtype", choices=["float32", "bfloat16"], help="of the computation")
    add("--variants", nargs="+", choices=list(LOSSES), help="loss: only these")
    add("--vocabulary", type=int, help="loss: V (else 151,936)")
    add("--model", choices=list(SHAPES), help="step: whose shape")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if args.what == "loss" and args.model:
        fail("--model: of step, not of loss")
    if args.what == "step" and (args.variants or args.vocabulary):
        fail("--variants, --vocabulary: of loss, not of step")
    args.vocabulary = args.vocabulary or 151_936
    if args.what == "step":
        sizes = [8192] if cuda else [2048]
    else:
        sizes = [4096, 16384, 65536] if cuda else [512, 1024, 2048, 4096]
    args.tokens = args.tokens or sizes
    if args.what == "step" and min(args.tokens) < 200:
        fail(f"--tokens {min(args.tokens)}: at least 200 for step")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.variants = args.variants or [name for name in LOSSES if cuda or name != "liger"]
    args.model = args.model or ("qwen3-1.7b" if cuda else "smollm2-135m")
    return args


def main(argv=None):
    args = parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        fail("--device cuda: there is none here")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.case:
        print(json.dumps(MEASURES[args.what](**json.loads(args.case))))
        return
    machine = torch.cuda.get_device_name() if cuda else f"{args.threads} threads"
    shape = args.model if args.what == "step" else f"V = {args.vocabulary:,}, D = {WIDTH:,}"
    for tokens in args.tokens:
        results = measured(CASES[args.what](tokens, args), args)
        norms = [r["gradient"] for name, r in results.items() if "--lora" not in name]
        if norms and max(norms) > min(norms) * (1.001 if args.dtype == "float32" else 1.05):
            print(f"the gradients differ: norms {norms}")
        title = f"{args.what} of {tokens:,} tokens, {shape}, {args.dtype}, {machine}"
        print(f"\n{title}, median of {args.rounds}\n")
        print((table(results) if results else "nothing was measured") + "\n", flush=True)


if __name__ == "__main__":
    start(main)
