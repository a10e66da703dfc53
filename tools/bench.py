"""Speed and memory: the loss beside the naive form, TRL's and Liger's; a whole update.

    python -m tools.bench loss    # the divergence, forward and backward, at a real vocabulary;
                                  # pip install trl==1.16.0 liger-kernel (Liger's is for CUDA only)
    python -m tools.bench step    # an update on fixed rollouts, beside tools/memory.py's estimate
    python -m tools.bench loss --device cuda    # bfloat16, up to 65,536 tokens
    python -m tools.bench step --device cuda    # Qwen3-1.7B's shape, 8,192 tokens a micro-batch

Each variant runs in a process of its own; medians over rounds. Memory is the peak during one pass
(of the process; of a card's allocator) above what was held before (weights and inputs). Time is
that of the next pass, on a card the median of five. All variants get the same numbers and must give
the same gradient, which is checked (adapters aside). Ratios are to the table's first row.
"""

import ctypes
import json
import subprocess
import sys
import time
from statistics import median

if __name__ == "__main__":
    from launch import start

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import opsd
import ranks
from model import make_optimizer, optimizer_step, response_hidden
from rollout import Rollout
from run import HERE, Parser, fail, set_up
from tools import markdown
from tools.memory import SHAPES, estimate, qwen3_config


def random_rollouts(count, prompt, response, vocabulary):
    """Of random ids; the teacher's prompt is twice as long."""
    rollouts = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (2 * prompt + response,)).tolist()
        r = Rollout(None, ids[prompt : 2 * prompt], ids[2 * prompt :], outcome="correct")
        r.teacher_row = [ids[: 2 * prompt], r.response_ids]
        rollouts.append(r)
    return rollouts


# ------------------------------------------------------------------------------------------------
# Time and memory


def begin_peak(device):
    """Sets the peak back to what is held now, and returns that, in MB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    return process_memory("VmRSS")


def peak_since(device):
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory("VmHWM")


def process_memory(key):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(key)) / 1024


def seconds_of(work, device):
    """CPU: of one pass; CUDA: the median of five, each waited for."""
    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(5 if device.type == "cuda" else 1):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return median(times)


# ------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary. A model without layers: its body is an
# embedding and a norm. A variant is a function (student, teacher, rollouts) that adds the gradient
# of the mean reverse KL over all tokens to the student's.


def head_only_model(vocabulary, width, dtype):
    config = qwen3_config(width, 8, 0, 1, 1, False, vocabulary, 8)
    model = AutoModelForCausalLM.from_config(config)
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


def full_logits(student, teacher, rollouts):
    """(R, V) of student and teacher."""
    s, t = hidden_states(student, teacher, rollouts)
    with torch.no_grad():
        t = teacher.lm_head(t)
    return student.lm_head(s), t


def ours(student, teacher, rollouts):
    for r in rollouts:
        r.weight = 1 / (len(rollouts) * len(r.response_ids))
    opsd.opsd_loss(student, teacher, rollouts, opsd.parse_args([]))


def naive(student, teacher, rollouts):
    s, t = full_logits(student, teacher, rollouts)
    t = F.log_softmax(t.float(), -1)
    s = F.log_softmax(s.float(), -1)
    (s.exp() * (s - t)).sum(-1).mean().backward()


def trl(student, teacher, rollouts):
    from trl.experimental.gkd import GKDTrainer  # whose steps the trainer of OPSD's authors takes

    s, t = full_logits(student, teacher, rollouts)
    (GKDTrainer.generalized_jsd_loss(s, t, beta=1, reduction="sum") / len(s)).backward()


def liger(student, teacher, rollouts):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    s, t = hidden_states(student, teacher, rollouts)
    fused = LigerFusedLinearJSD(jsd_beta=1.0)  # reverse KL
    fused(s, student.lm_head.weight, t, teacher.lm_head.weight, None).backward()


LOSSES = dict(naive=naive, ours=ours, trl=trl, liger=liger)


def measure_loss(args):
    """Of --variant: memory of one pass above what was held before, time of the next."""
    device, dtype, config = (
        torch.device(args.device),
        getattr(torch, args.dtype),
        SHAPES[args.model],
    )
    shape = config.vocab_size, config.hidden_size, dtype
    torch.manual_seed(0)
    student, teacher = (head_only_model(*shape).to(device) for _ in range(2))
    teacher.requires_grad_(False)

    def work(count=args.tokens[0]):
        torch.manual_seed(count)
        student.zero_grad(set_to_none=False)
        LOSSES[args.variant](student, teacher, random_rollouts(1, 1, count, 1000))

    work(64)
    held = begin_peak(device)
    work()
    peak, seconds = peak_since(device), seconds_of(work, device)
    gradient = student.lm_head.weight.grad.float().norm().item()
    return dict(seconds=seconds, memory=peak - held, gradient=gradient)


# ------------------------------------------------------------------------------------------------
# A whole update, as opsd.py prepares it, on one rank, with adapters, and under torchrun

STEPS = [
    name + flag
    for name in ("python", "python --lora 16", "torchrun")
    for flag in ("", " --checkpointing")
]


def make_update(config, args, device):
    """A function that makes an update of random models of this shape and returns its gradient
    norm: four responses, in two micro-batches of --micro-tokens. args: of opsd.py.
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
    rollouts = random_rollouts(4, 8, args.micro_tokens // 2 - 16, config.vocab_size)

    def update():
        opsd.accumulate_gradients(student, teacher, rollouts, args)
        return optimizer_step(student, optimizer)[0]

    return update


def measure_step(args):
    """Of --variant. memory: the peak above what is held between updates; whole: above what was held
    before the models were made, as `estimate` has it.
    """
    config, (tokens,), (_, *flags) = SHAPES[args.model], args.tokens, args.variant.split()
    flags += ["--device", args.device, "--dtype", args.dtype, "--micro-tokens", str(tokens)]
    args = opsd.parse_args(flags)
    device = set_up(args)
    before = begin_peak(device)
    update = make_update(config, args, device)
    norm = update()  # makes the optimizer's state
    held = begin_peak(device)
    update()
    peak, seconds = peak_since(device), seconds_of(update, device)
    args.backend = "vllm"  # nothing is sampled here
    estimated = sum(estimate(config, args, 1, tokens, ranks.distributed()).values())
    ranks.leave()
    return dict(
        seconds=seconds,
        memory=peak - held,
        gradient=norm,
        speed=4 * (tokens // 2 - 16) / seconds,
        whole=peak - before,
        estimate=estimated / 2**20,
    )


# ------------------------------------------------------------------------------------------------

MEASURES = dict(loss=measure_loss, step=measure_step)
DEFAULTS = {  # what, --device: --model, --tokens
    ("loss", "cpu"): ("Qwen3-0.6B", [512, 1024, 2048, 4096]),
    ("loss", "cuda"): ("Qwen3-0.6B", [4096, 16384, 65536]),
    ("step", "cpu"): ("SmolLM2-135M", [2048]),
    ("step", "cuda"): ("Qwen3-1.7B", [8192]),
}


def measured(variants, tokens, args):
    """{variant: {key: median over rounds}}: a process each, all variants once a round, so that
    noise falls on all alike. One whose name begins with torchrun is started by it, as one rank.
    """
    results = {name: [] for name in variants}
    for number in range(1, args.rounds + 1):
        for name in list(results):
            call = [sys.executable, "-m"]
            if name.startswith("torchrun"):
                call += ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
            call += ["tools.bench", args.what, "--device", args.device, "--dtype", args.dtype]
            call += ["--threads", str(args.threads), "--model", args.model]
            call += ["--tokens", str(tokens), "--variant", name]
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
    add("what", choices=list(MEASURES))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=2, help="CPU threads of torch")
    add("--rounds", type=int, default=3, help="measurements of each variant, shown by their median")
    add("--tokens", type=int, nargs="+", help="loss: of responses; step: of a micro-batch")
    add("--dtype", choices=["float32", "bfloat16"], help="of the computation")
    add("--model", choices=list(SHAPES), help="whose shape; loss: of its head")
    add("--variant", help="measures this one in this process, and prints a line of JSON")
    args = parser.parse_args(argv)
    model, tokens = DEFAULTS[args.what, args.device]
    args.model, args.tokens = args.model or model, args.tokens or tokens
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def main(argv=None):
    args = parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        fail("--device cuda: there is none here")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.variant:
        print(json.dumps(MEASURES[args.what](args)))
        return
    variants = [name for name in LOSSES if cuda or name != "liger"]
    variants = STEPS if args.what == "step" else variants
    machine = torch.cuda.get_device_name() if cuda else f"{args.threads} threads"
    for tokens in args.tokens:
        results = measured(variants, tokens, args)
        norms = [r["gradient"] for name, r in results.items() if "--lora" not in name]
        if norms and max(norms) > min(norms) * (1.001 if args.dtype == "float32" else 1.05):
            print(f"the gradients differ: norms {norms}")
        title = f"{args.what} of {tokens:,} tokens, {args.model}, {args.dtype}, {machine}"
        print(f"\n{title}, median of {args.rounds}\n")
        print((table(results) if results else "nothing was measured") + "\n", flush=True)


if __name__ == "__main__":
    start(main)
