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
    python -m tools.bench loss --device cuda    # bfloat16, up to 65,536 tokens, Liger's too, beside
                                                # what bandwidth and products allow
    python -m tools.bench step --device cuda    # Qwen3-1.7B's shape, 8,192 tokens a micro-batch,
                                                # beside the estimate of tools/memory.py

Memory is the peak during one pass (of the process; of a card's allocator), above what was held
before (weights and inputs); time is that of the next pass, on a card the median of five. All
variants of one question get the same numbers and must give the same gradient, which is checked.
Ratios are within a run.
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch

from cli import HERE, Parser, fail, start
from tools import markdown
from tools.bench_cases import MEASURES, QWEN3
from tools.bench_loss import LOSSES

QWEN = dict(vocabulary=151_936, width=1024)  # Qwen3-0.6B's head; the 1.7B's is twice as wide


def measured(what, cases, args):
    """{name: {key: median over rounds}} of cases {name: arguments}: a process each, all cases once
    a round, so that noise falls on all alike. A case with `torchrun` is started by it, as one rank.
    """
    results = {name: [] for name in cases}
    for number in range(1, args.rounds + 1):
        for name in list(results):
            case = dict(cases[name])
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
            launcher = launcher if case.pop("torchrun", False) else []
            call = [sys.executable, "-m", *launcher, "tools.bench", args.what]
            call += ["--threads", str(args.threads), "--device", args.device]
            call += ["--case", json.dumps(dict(case, measure=what))]
            done = subprocess.run(call, capture_output=True, text=True, cwd=HERE)
            if done.returncode:
                del results[name]
                print(f"{name}: not measured ({last_error(done.stderr)})", flush=True)
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            results[name].append(r)
            line = f"  round {number}  {name}  {r['seconds']:.2f} s  {r['memory']:,.0f} MB"
            print(line, flush=True)
    return {name: medians(rows) for name, rows in results.items()}


def last_error(text):
    """The last line that names an exception, torchrun's report aside; else the last line."""
    lines = text.strip().splitlines() or ["killed, most likely out of memory"]
    named = [line for line in lines if "rror: " in line and "ChildFailedError" not in line]
    return (named or lines)[-1][-200:]


def medians(rows):
    return {key: median(row[key] for row in rows) for key in rows[0]}


def machine(args):
    cuda = args.device == "cuda"
    return torch.cuda.get_device_name() if cuda else f"{args.threads} threads"


def show(title, args, header, rows):
    print(f"\n{title}, {machine(args)}, median of {args.rounds}\n")
    print(markdown(header, rows) + "\n", flush=True)


def same_gradient(results, tolerance):
    norms = [r["gradient"] for r in results.values()]
    if norms and max(norms) > min(norms) * (1 + tolerance):
        print(f"the gradients differ: norms {norms}")


def exponent(xs, ys):
    """Slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1e-9)), 1)[0])


def installed(names):
    """Those of the LOSSES that can run here; says which cannot."""
    for name in names:
        _, title, package = LOSSES[name]
        if package and not find_spec(package):
            print(f"{title}: not measured ({package} is not installed)")
    return [name for name in names if not LOSSES[name][2] or find_spec(LOSSES[name][2])]


def loss(args):
    header = ["response tokens", "variant", "time", "peak memory", "time / naive", "memory / naive"]
    if args.bounds:
        header += ["products alone", "its traffic alone", "time / both", "least traffic"]
        header += ["bytes moved a logit", "kernels"]
    digits, names = 3 if args.device == "cuda" else 1, installed(args.variants)
    for dtype in args.dtypes:
        rows, rates = [], ""
        for tokens in args.tokens:
            settings = dict(tokens=tokens, dtype=dtype, device=args.device, **QWEN)
            settings["vocabulary"] = args.vocabulary
            settings["bounds"] = args.bounds
            cases = {name: dict(variant=name, **settings) for name in names}
            results = measured("loss", cases, args)
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
        shape = f"V = {args.vocabulary:,}, D = {QWEN['width']:,}"
        show(f"loss, forward and backward, {dtype}, {shape}{rates}", args, header, rows)


def step(args):
    header = ["variant", "response tokens/s", "ours is faster by"]
    header += ["share of the matrix-product floor", "peak memory"]
    for model in args.models:
        if model in QWEN3:
            training(model, args)
            continue
        batches = dict(smollm2=(8, 1), embedded=(8, 32))[model]  # its default is 8
        variants = {"ours": "ours"}
        if find_spec("trl"):
            variants |= {
                f"TRL SDFTTrainer, batches of {batch}": f"trl {batch}" for batch in batches
            }
            last = f"TRL SDFTTrainer, batches of {batches[-1]}, sampled by themselves"
            variants[last] = f"trl {batches[-1]} alone"
        else:
            print("TRL SDFTTrainer: not measured (trl is not installed)")
        settings = dict(model=model, device=args.device)
        cases = {name: dict(variant=variant, **settings) for name, variant in variants.items()}
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


def training(model, args):
    """A whole step as opsd.py prepares it, on one rank and under torchrun, beside the estimate."""
    settings = dict(model=model, tokens=args.micro_tokens, device=args.device)
    cases = {}
    for launcher in ("python", "torchrun --nproc-per-node 1"):
        for flags in ([], ["--checkpointing"]):
            case = dict(settings, flags=flags, torchrun=launcher != "python")
            cases[" ".join([launcher, *flags])] = case
    results = measured("training", cases, args)
    same_gradient(results, 0.05)
    header = ["how", "seconds", "response tokens/s", "share of the matrix-product floor"]
    header += ["peak memory", "estimate", "peak / estimate"]
    rows = []
    for name, r in results.items():
        row = [f"`{name}`", f"{r['seconds']:.2f}", f"{r['tokens'] / r['seconds']:,.0f}"]
        row += [f"{r['floor'] / r['seconds']:.0%}", f"{r['memory']:,.0f} MB"]
        rows.append([*row, f"{r['estimate']:,.0f} MB", f"{r['memory'] / r['estimate']:.2f}"])
    gflops = max((r["gflops"] for r in results.values()), default=0)
    title = f"a whole step, {model} shape, micro-batches of {args.micro_tokens:,} tokens, "
    show(f"{title}products alone {gflops:,.0f} GFLOP/s", args, header, rows)


def sampling(args):
    names = {"bare": "bare generate", "transformers": "samplers.py, transformers"}
    if find_spec("vllm"):
        names["vllm"] = "samplers.py, vLLM"
    header = ["variant", "response tokens/s", "against bare generate"]
    for model in args.models:
        settings = dict(model=model, device=args.device)
        cases = {name: dict(variant=variant, **settings) for variant, name in names.items()}
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
        settings["device"] = args.device
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
    parts = measured("job", {name: dict(threads=args.threads, device=args.device)}, args)[name]
    whole, memory = parts.pop("seconds"), parts.pop("memory")
    rows = [[part, f"{value:.1f}", f"{value / whole:.0%}"] for part, value in parts.items()]
    title = f"the main job: {whole:.0f} s, peak {memory:,.0f} MB"
    show(title, args, ["part", "seconds", "share"], rows)


QUESTIONS = dict(loss=loss, step=step, sampling=sampling, growth=growth, job=job)

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
    add("--vocabulary", type=int, default=QWEN["vocabulary"], help="loss: V")
    add(
        "--bounds",
        action="store_true",
        help="loss: what bandwidth and products allow; on with cuda",
    )
    names = ["smollm2", "embedded", *QWEN3]
    add("--models", nargs="+", choices=names, help="step, sampling: only these")
    add("--micro-tokens", type=int, default=8192, help="step of a Qwen3 shape: a micro-batch")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    tokens, dtypes, variants = CUDA if cuda else CPU
    args.tokens, args.dtypes = args.tokens or tokens, args.dtypes or dtypes
    args.variants, args.bounds = args.variants or variants, args.bounds or cuda
    step_on_card = cuda and args.what == "step"
    args.models = args.models or (["qwen3-1.7b"] if step_on_card else ["smollm2", "embedded"])
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none here")
    if not args.case:
        return QUESTIONS[args.what](args)
    torch.set_num_threads(args.threads)
    case = json.loads(args.case)
    print(json.dumps(MEASURES[case.pop("measure")](**case)))


if __name__ == "__main__":
    start(main)
