"""Speed and memory, each measured variant in a process of its own; medians over rounds.

    python -m tools.bench loss        # the divergence, forward and backward, at a real vocabulary:
                                      # ours, naive, TRL's (pip install trl==1.16.0)
    python -m tools.bench step        # a whole update on fixed rollouts: ours, TRL's closest
                                      # trainer, the matrix-product floor
    python -m tools.bench loss --device cuda    # bfloat16, up to 65,536 tokens, Liger's too, beside
                                                # what bandwidth and products allow
    python -m tools.bench step --device cuda    # Qwen3-1.7B's shape, 8,192 tokens a micro-batch,
                                                # beside the estimate of tools/memory.py

Memory is the peak during one pass (of the process; of a card's allocator), above what was held
before (weights and inputs). Time is that of the next pass, on a card
the median of five. All variants of one question get the same numbers and must give the same
gradient, which is checked. Ratios are within a run.
"""

import argparse
import json
import subprocess
import sys
from statistics import median

if __name__ == "__main__":
    from launch import start

import torch

from run import HERE, Parser, fail
from tools import markdown
from tools.bench_loss import LOSSES, measure_loss
from tools.bench_step import SHAPES, measure_step

WIDTH, VOCABULARY = 1024, 151_936  # Qwen3-0.6B's head; the 1.7B's is twice as wide


def measured(cases, args):
    """{name: {key: median over rounds}} of cases {name: arguments}: a process each, all cases once
    a round, so that noise falls on all alike. A case with `torchrun` is started by it, as one rank.
    """
    results = {name: [] for name in cases}
    for number in range(1, args.rounds + 1):
        for name in list(results):
            case = dict(cases[name], device=args.device)
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
            launcher = launcher if case.pop("torchrun", False) else []
            call = [sys.executable, "-m", *launcher, "tools.bench", args.what]
            call += ["--threads", str(args.threads), "--device", args.device]
            call += ["--case", json.dumps(case)]
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


def show(title, args, header, rows):
    cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{args.threads} threads"
    print(f"\n{title}, {machine}, median of {args.rounds}\n")
    print(markdown(header, rows) + "\n", flush=True)


def same_gradient(results, tolerance):
    norms = [r["gradient"] for r in results.values()]
    if norms and max(norms) > min(norms) * (1 + tolerance):
        print(f"the gradients differ: norms {norms}")


def loss(args):
    header = ["response tokens", "variant", "time", "peak memory", "time / naive", "memory / naive"]
    if args.bounds:
        header += ["products alone", "its traffic alone", "time / both", "least traffic"]
        header += ["bytes moved a logit", "kernels"]
    digits = 3 if args.device == "cuda" else 1
    for dtype in args.dtypes:
        rows, rates = [], ""
        for tokens in args.tokens:
            settings = dict(tokens=tokens, dtype=dtype, width=WIDTH, vocabulary=args.vocabulary)
            settings["bounds"] = args.bounds
            results = measured({n: dict(settings, variant=n) for n in args.variants}, args)
            same_gradient(results, 1e-3 if dtype == "float32" else 0.05)
            base = results.get("naive")
            for name, r in results.items():
                row = [f"{tokens:,}", LOSSES[name][1], f"{r['seconds']:.{digits}f} s"]
                row.append(f"{r['memory']:,.0f} MB")
                for key, places in (("seconds", 2), ("memory", 3)):
                    row.append(f"{r[key] / base[key]:.{places}f}" if base else "")
                if args.bounds:
                    row += [f"{r[key]:.{digits}f} s" for key in ("products", "traffic")]
                    row.append(f"{r['seconds'] / (r['products'] + r['traffic']):.2f}")
                    row.append(f"{r['least']:.{digits}f} s")
                    row += [f"{r['moved']:.0f}", f"{r['calls']:,.0f}"]
                    rates = f", {r['gflops']:,.0f} GFLOP/s and {r['bandwidth']:,.0f} GB/s measured"
                rows.append(row)
        shape = f"V = {args.vocabulary:,}, D = {WIDTH:,}"
        show(f"loss, forward and backward, {dtype}, {shape}{rates}", args, header, rows)


def step(args):
    header = ["how", "response tokens/s", "the first is faster by"]
    header += ["share of the matrix-product floor", "memory of the update"]
    header += ["peak with the models", "estimate", "peak / estimate"]
    for model in args.models:
        results = measured(ways(model, args), args)
        same_gradient(results, 1e-2 if model == "smollm2" else 0.05)
        if not results:
            continue
        first = next(iter(results.values()))
        # By the best rate that any of the processes saw.
        floor = min(r["floor"] for r in results.values())
        rate = max(r["gflops"] for r in results.values())
        rows = []
        for name, r in results.items():
            row = [name, f"{r['tokens'] / r['seconds']:,.0f}"]
            row += [f"{r['seconds'] / first['seconds']:.2f} x", f"{floor / r['seconds']:.0%}"]
            row += [f"{r[key]:,.0f} MB" for key in ("memory", "whole", "estimate")]
            row.append(f"{r['whole'] / r['estimate']:.2f}")
            rows.append(row[:-2] + ["", ""] if name.startswith("TRL") else row)
        title = f"a whole update, {model} shape, {first['tokens']:,.0f} response tokens"
        show(f"{title}, products alone {rate:,.0f} GFLOP/s", args, header, rows)


def ways(model, args):
    """smollm2: ours and TRL's in float32. Others: as opsd.py prepares it, on one rank and under
    torchrun.
    """
    if model == "smollm2":
        variants = {"ours": "ours"}
        for batch in ("8", "1", "1 alone"):  # its default is 8; alone: sampled by itself
            variants[f"TRL SDFTTrainer, batches of {batch}"] = f"trl {batch}"
        settings = dict(model=model, flags=["--dtype", "float32"])
        return {name: dict(settings, variant=variant) for name, variant in variants.items()}
    cases = {}
    for launcher in ("python", "torchrun --nproc-per-node 1"):
        for flags in ([], ["--checkpointing"]):
            case = dict(variant="ours", model=model, tokens=args.micro_tokens, flags=flags)
            cases[" ".join([launcher, *flags])] = dict(case, torchrun=launcher != "python")
    return cases


QUESTIONS = dict(loss=loss, step=step)
MEASURES = dict(loss=measure_loss, step=measure_step)

# Of the loss, by device: --tokens, --dtypes and --variants.
CPU = [512, 1024, 2048, 4096], ["float32", "bfloat16"], [name for name in LOSSES if name != "liger"]
CUDA = [4096, 16384, 65536], ["bfloat16"], list(LOSSES)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=list(QUESTIONS))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--rounds", type=int, default=3, help="measurements of each variant, shown by their median")
    add("--tokens", type=int, nargs="+", help="loss: of responses")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="loss: of weights and states")
    add("--variants", nargs="+", choices=list(LOSSES), help="loss: only these")
    add("--vocabulary", type=int, default=VOCABULARY, help="loss: V")
    add("--bounds", action="store_true", help="loss: what the machine allows; on with cuda")
    add("--models", nargs="+", choices=list(SHAPES), help="step: only these")
    add("--micro-tokens", type=int, default=8192, help="step of a Qwen3 shape: a micro-batch")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    tokens, dtypes, variants = CUDA if cuda else CPU
    args.tokens, args.dtypes = args.tokens or tokens, args.dtypes or dtypes
    args.variants, args.bounds = args.variants or variants, args.bounds or cuda
    args.models = args.models or (["qwen3-1.7b"] if cuda else ["smollm2"])
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none here")
    if not args.case:
        return QUESTIONS[args.what](args)
    torch.set_num_threads(args.threads)
    case = json.loads(args.case)
    print(json.dumps(MEASURES[args.what](**case)))


if __name__ == "__main__":
    start(main)
