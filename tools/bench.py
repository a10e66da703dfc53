"""Speed and memory, each measured variant in a process of its own; medians over rounds.

    python -m tools.bench loss        # the divergence, forward and backward, at a real vocabulary:
                                      # ours, naive, TRL's (pip install trl==1.16.0)
    python -m tools.bench step        # a whole update on fixed rollouts: ours, TRL's closest
                                      # trainer, the matrix-product floor
    python -m tools.bench sampling    # samplers.py with transformers, and with vLLM where it is
                                      # installed, against bare generate
    python -m tools.bench growth      # time and memory against response tokens, vocabulary and
                                      # rows: fitted exponents
    python -m tools.bench job         # where the time of `python opsd.py --filter correct` goes

Memory is the peak of the process during one pass, above what it held before (weights and inputs);
time is that of the next pass. All variants of one question get the same numbers and must give the
same gradient, which is checked. Ratios are within a run.
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch

from cli import HERE, Parser, start
from tools import markdown
from tools.bench_cases import LOSSES, MEASURES

QWEN = dict(vocabulary=151_936, width=1024)  # Qwen3-0.6B's head; the 1.7B's is twice as wide


def measured(what, cases, args):
    """{name: {key: median over rounds}} of cases {name: arguments}: a process each, all cases once
    a round, so that noise falls on all alike.
    """
    command = [sys.executable, "-m", "tools.bench", what, "--threads", str(args.threads), "--case"]
    results = {name: [] for name in cases}
    for number in range(1, args.rounds + 1):
        for name in list(results):
            call = [*command, json.dumps(cases[name])]
            done = subprocess.run(call, capture_output=True, text=True, cwd=HERE)
            if done.returncode:
                del results[name]
                reason = done.stderr.strip() or "killed, most likely out of memory"
                print(f"{name}: not measured ({reason.splitlines()[-1][:150]})", flush=True)
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            results[name].append(r)
            line = f"  round {number}  {name}  {r['seconds']:.2f} s  {r['memory']:,.0f} MB"
            print(line, flush=True)
    return {name: medians(rows) for name, rows in results.items()}


def medians(rows):
    return {key: median(row[key] for row in rows) for key in rows[0]}


def show(title, args, header, rows):
    print(f"\n{title}, {args.threads} threads, median of {args.rounds}\n")
    print(markdown(header, rows) + "\n", flush=True)


def same_gradient(results, tolerance):
    norms = [r["gradient"] for r in results.values()]
    if norms and max(norms) > min(norms) * (1 + tolerance):
        print(f"the gradients differ: norms {norms}")


def exponent(xs, ys):
    """Slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1e-9)), 1)[0])


def loss(args):
    header = ["response tokens", "variant", "time", "peak memory", "time / naive", "memory / naive"]
    for dtype in args.dtypes:
        rows = []
        for tokens in args.tokens:
            settings = dict(tokens=tokens, dtype=dtype, **QWEN)
            names = args.variants or LOSSES
            cases = {name: dict(variant=name, **settings) for name in names}
            results = measured("loss", cases, args)
            same_gradient(results, 1e-3 if dtype == "float32" else 0.05)
            base = results.get("naive")
            for name, r in results.items():
                row = [f"{tokens:,}", LOSSES[name][1], f"{r['seconds']:.1f} s"]
                row.append(f"{r['memory']:,.0f} MB")
                for key, digits in (("seconds", 2), ("memory", 3)):
                    row.append(f"{r[key] / base[key]:.{digits}f}" if base else "")
                rows.append(row)
        shape = f"V = {QWEN['vocabulary']:,}, D = {QWEN['width']:,}"
        show(f"loss, forward and backward, {dtype}, {shape}", args, header, rows)


def step(args):
    header = ["variant", "response tokens/s", "ours is faster by"]
    header += ["share of the matrix-product floor", "peak memory"]
    for model in args.models:
        batches = dict(smollm2=(8, 1), embedded=(8, 32))[model]  # its default is 8
        variants = {"ours": "ours"}
        variants |= {f"TRL SDFTTrainer, batches of {batch}": f"trl {batch}" for batch in batches}
        last = f"TRL SDFTTrainer, batches of {batches[-1]}, sampled by themselves"
        variants[last] = f"trl {batches[-1]} alone"
        cases = {name: dict(variant=variant, model=model) for name, variant in variants.items()}
        results = measured("step", cases, args)
        same_gradient(results, 1e-2)
        # By the best rate that any of the processes saw.
        first, floor = results["ours"], min(r["floor"] for r in results.values())
        rows = []
        for name, r in results.items():
            row = [name, f"{r['tokens'] / r['seconds']:,.0f}"]
            row += [f"{r['seconds'] / first['seconds']:.2f} x", f"{floor / r['seconds']:.0%}"]
            rows.append([*row, f"{r['memory']:,.0f} MB"])
        gflops = max(r["gflops"] for r in results.values())
        title = f"a whole update, {model} shape, float32, {first['tokens']:,.0f} response tokens, "
        show(f"{title}products alone {gflops:.0f} GFLOP/s", args, header, rows)


def sampling(args):
    names = {"bare": "bare generate", "transformers": "samplers.py, transformers"}
    if find_spec("vllm"):
        names["vllm"] = "samplers.py, vLLM"
    header = ["variant", "response tokens/s", "against bare generate"]
    for model in args.models:
        cases = {name: dict(variant=variant, model=model) for variant, name in names.items()}
        results = measured("sampling", cases, args)
        rate = {name: r["tokens"] / r["seconds"] for name, r in results.items()}
        bare = rate[names["bare"]]
        rows = [[name, f"{value:,.0f}", f"{value / bare:.2f}"] for name, value in rate.items()]
        show(f"sampling, {model} shape, float32", args, header, rows)


def growth(args):
    fixed = dict(variant="ours", dtype="float32", width=512, chunk=16e6)
    tokens = [1024, 2048, 4096, 8192]
    vocabularies = [32_768, 65_536, 131_072, 262_144]
    counts = [48, 96, 192, 384]
    grown = {
        "response tokens": ("loss", "tokens", tokens, dict(fixed, vocabulary=32_768)),
        "vocabulary": ("loss", "vocabulary", vocabularies, dict(fixed, tokens=2048)),
        "rows of an update (embedded model)": (
            "step",
            "count",
            counts,
            dict(variant="ours", model="embedded"),
        ),
    }
    lines = []
    for name, (what, key, values, settings) in grown.items():
        cases = {f"{key} {value}": {**settings, key: value} for value in values}
        results = list(measured(what, cases, args).values())
        seconds, memory = ([r[key] for r in results] for key in ("seconds", "memory"))
        line = [name, ", ".join(f"{v:,}" for v in values), f"{exponent(values, seconds):.2f}"]
        line += [", ".join(f"{m:,.0f}" for m in memory), f"{exponent(values, memory):.2f}"]
        lines.append(line)
    header = ["what grows", "values", "exponent of time", "peak memory, MB", "exponent of memory"]
    title = "time or memory ~ x^exponent, float32, our loss in chunks of 16 million logits, and a"
    show(f"{title} whole update", args, header, lines)


def job(args):
    name = "opsd.py --filter correct"
    parts = measured("job", {name: dict(threads=args.threads)}, args)[name]
    whole, memory = parts.pop("seconds"), parts.pop("memory")
    rows = [[part, f"{value:.1f}", f"{value / whole:.0%}"] for part, value in parts.items()]
    title = f"the main job: {whole:.0f} s, peak {memory:,.0f} MB"
    show(title, args, ["part", "seconds", "share"], rows)


QUESTIONS = dict(loss=loss, step=step, sampling=sampling, growth=growth, job=job)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=list(QUESTIONS))
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--rounds", type=int, default=3, help="measurements of each variant, shown by their median")
    add("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="loss: of responses")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="loss: of weights and states")
    add("--variants", nargs="+", choices=list(LOSSES), help="loss: only these")
    models = ["smollm2", "embedded"]
    add("--models", nargs="+", choices=models, default=models, help="step, sampling: only these")
    add("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if not args.case:
        return QUESTIONS[args.what](args)
    torch.set_num_threads(args.threads)
    print(json.dumps(MEASURES[args.what](**json.loads(args.case))))


if __name__ == "__main__":
    start(main)
