"""How much memory training takes on each GPU: an estimate by counting tensors, and a check of it
against what torch allocates on a CPU.

1. `estimate` counts what the scripts keep (weights, gradients, AdamW's two moments, teacher) and
   the tensors that a step adds: activations of a Llama-shaped block (Llama, Qwen2, Qwen3, Mistral,
   ...), blocks gathered from the ranks, the head, the loss's chunk of logits.
2. Not counted: the CUDA context and NCCL (one or two GB), fragmentation, the attention kernel's
   workspace, and vLLM, which takes --vllm-memory of the card.
3. A script and its flags: the prompts as the models will read them and the estimate for that run.
   No weights are loaded and nothing is written.

    python -m tools.memory opsd.py --model Qwen/Qwen3-8B --data math.jsonl --gpus 8
    python -m tools.memory                # the documents' table
    python -m tools.memory --check        # the estimate beside torch's own count, small model
    torchrun --nproc-per-node 2 -m tools.memory --check
"""

import types
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import data
import opsd
import ranks
import rlvr
import sft
from cli import Parser, fail, set_up, start
from data import CONTEXTS, Problem, render_prompt
from model import CHUNK, PIECE, load_tokenizer, optimizer_step
from rollout import Rollout
from tools import markdown

# From the public config.json files of Qwen/Qwen3-1.7B, -4B and -8B: width, of the MLP, blocks,
# heads, heads of keys and values, head tied to the embedding.
QWEN3 = {
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False),
}


def qwen3_config(shape, vocabulary, head_dim):
    width, mlp, layers, heads, key_heads, tied = shape
    return Qwen3Config(
        vocab_size=vocabulary,
        head_dim=head_dim,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


def qwen3(name):
    return qwen3_config(QWEN3[name], 151936, 128)


# ------------------------------------------------------------------------------------------------
# The estimate


class Sizes(NamedTuple):
    """Numbers of parameters."""

    all: int
    block: int  # the largest
    rest: int  # of the body: embedding and last norm
    head: int


def sizes(config):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    blocks = [count(block) for block in ranks.blocks_of(model)]
    rest = count(model.base_model) - sum(blocks)
    return Sizes(count(model), max(blocks), rest, count(model.get_output_embeddings()))


def estimate(
    config,
    *,
    gpus,
    tokens,
    read=0,
    device="cuda",
    dtype="bfloat16",
    teacher="frozen",
    checkpointing=False,
    offload=False,
    sampler=True,
    sharded=True,
):
    """Bytes on each GPU at the peak of a training step, by part; their sum is the peak.

    tokens: of the longest micro-batch, padding included. read: response tokens of the whole step,
    at which the teacher's states are kept. teacher: "" = none, "frozen" (any that is only copied),
    "ema". sampler: a whole copy for the transformers backend, which sharded models need. sharded:
    under torchrun (also with one GPU); else the plain model, and no copy for the sampler.
    """
    size = sizes(config)
    layers, width, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    low = dtype == "bfloat16"
    b = 2 if low else 4  # bytes of a computed number
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    on_card = 0 if offload else 1 / gpus

    # Kept from step to step. Not sharded, a frozen teacher's embedding, norms and head are float32.
    blocks = size.block * layers
    frozen = b * size.all if sharded else b * blocks + 4 * (size.all - blocks)
    parts = {
        "weights": 4 * size.all * on_card,
        "gradients": 4 * size.all * on_card,
        "optimizer": 8 * size.all * on_card,
        "teacher": {"": 0, "frozen": frozen, "ema": 4 * size.all}[teacher] * on_card,
        "sampler": b * size.all if sampler and sharded else 0,
    }

    # What a block keeps for its backward pass, in bytes a token. A norm keeps its input and its
    # quotient in float32 and its output; with autocast the residual stream is float32.
    stream = b if sharded else 4

    def norm(width):
        return width * (4 + stream + b) if low else width * 12

    kept = 2 * norm(width) + b * (2 * queries + 2 * keys + queries + keys) + b * 4 * mlp
    if "qwen3" in config.model_type:  # norms of queries and keys
        kept += norm(queries + keys)
    # Gradients of one block's activations on their way.
    inside = 2 * b * mlp + 8 * width
    between = stream * width if checkpointing else kept
    parts["teacher's states"] = read / gpus * width * stream if teacher else 0
    parts["activations"] = tokens * layers * between + tokens * width * 4 * b

    # Then either the loss of a chunk or the backward pass of a block is at its peak, whichever is
    # larger. The loss: a chunk's logits of each model, and of a piece's float32 tensors some eight:
    # log-probabilities, the divergence's terms, their gradients.
    chunk, piece = (min(n[device], tokens * config.vocab_size) for n in (CHUNK, PIECE))
    logits = chunk * b * (2 if read else 1) + piece * 32
    if sharded:
        head = (8 + 2 * b if low else 8) * size.head + (b * size.head if teacher else 0)
        # Two blocks whole, one's gradient, and the same once more to be summed.
        gathered = (3 * b + 4) * size.block + (2 * b + 4) * size.rest
    else:
        head, gathered = 2 * b * size.head if low else 0, 0
        parts["rounded weights"] = 2 * blocks if low and not checkpointing else 0
    recomputed = kept if checkpointing else 0
    parts["loss or block"] = max(logits + head, gathered + tokens * (inside + recomputed))
    return parts


def gigabytes(parts):
    terms = [f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value]
    return f"{' + '.join(terms)} = {sum(parts.values()) / 1e9:.3g}"


# ------------------------------------------------------------------------------------------------
# A run that is planned


class Plan(NamedTuple):
    """What a script's flags say of a run."""

    config: object
    tokenizer: object
    prompts: dict  # whose -> ids
    longest: int  # tokens of a row
    teacher: str  # see `estimate`
    read: int


def plan_opsd(args):
    config, tokenizer = load_tokenizer(args.model)
    rollout = Rollout(data.load_problems(args, 1)[0], [])
    written = ["(what the teacher will have written)"]
    context = CONTEXTS[args.context]([rollout], lambda prompts: written, args)[0]
    prompts = {
        f"{whose}'s prompt": render_prompt(tokenizer, rollout.problem, text, thinking == "on")
        for whose, text, thinking in (
            ("student", "", args.thinking),
            ("teacher", context, args.teacher_thinking),
        )
    }
    row = len(prompts["teacher's prompt"]) + args.max_new_tokens
    teacher = "ema" if args.teacher == "ema" else "frozen"
    return Plan(config, tokenizer, prompts, row, teacher, args.batch * args.max_new_tokens)


def plan_rlvr(args):
    config, tokenizer = load_tokenizer(args.model)
    problem = data.load_problems(args, 1)[0]
    prompt = render_prompt(tokenizer, problem, "", args.thinking == "on")
    row = len(prompt) + args.max_new_tokens
    return Plan(config, tokenizer, dict(prompt=prompt), row, "frozen" if args.kl else "", 0)


def plan_sft(args):
    problems = data.load_problems(args, 1000)[:1000]
    if args.model:
        config, tokenizer = load_tokenizer(args.model)
    else:
        model, tokenizer = sft.build_tiny(args.seed)
        config = model.config
    if args.data:
        rows = [sft.real_row(tokenizer, problem, tokenizer.eos_token_id) for problem in problems]
    else:
        rng = np.random.default_rng(0)
        rows = [sft.embedded_row(tokenizer, problem, rng) for problem in problems]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    return Plan(config, tokenizer, dict(prompt=rows[0][0]), longest, "", 0)


SCRIPTS = {"opsd.py": (opsd, plan_opsd), "rlvr.py": (rlvr, plan_rlvr), "sft.py": (sft, plan_sft)}


def print_plan(script, flags, gpus):
    """The prompts of the first problem, and the estimate for these flags on so many GPUs."""
    module, plan_of = SCRIPTS[script]
    args = module.parse_args(flags)
    plan = plan_of(args)
    for name, ids in plan.prompts.items():
        print(f"{name}, {len(ids)} tokens:\n{plan.tokenizer.decode(ids)}\n")
    device = "cpu" if args.device == "cpu" else "cuda"
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    backend = getattr(args, "backend", None)  # sft.py samples nothing
    if backend == "auto":
        backend = "vllm" if device == "cuda" and find_spec("vllm") else "transformers"
    sharded = gpus > 1 or args.offload
    tokens = max(plan.longest, args.micro_tokens)  # a micro-batch has at least one row
    parts = estimate(
        plan.config,
        gpus=gpus,
        tokens=tokens,
        read=plan.read,
        device=device,
        dtype=dtype,
        teacher=plan.teacher,
        checkpointing=args.checkpointing,
        offload=args.offload,
        sampler=backend == "transformers",
        sharded=sharded,
    )
    how = "sharded (torchrun)" if sharded else "not sharded"
    print(f"peak of training on each of {gpus} GPUs ({device}), {how}, {dtype}, micro-batches of")
    print(f"{tokens} tokens; GB by part:\n{gigabytes(parts)}")
    besides = {"vllm": "vLLM's share of the card (--vllm-memory)"}
    besides |= {"transformers": "keys and values while sampling"}
    if backend:
        print(f"and, sampling with {backend}: {besides[backend]}")
    print("no weights were loaded, nothing was written")


# ------------------------------------------------------------------------------------------------
# The check


def measure(config, args):
    """Peak of the bytes that torch allocates on this rank's CPU in two training steps of opsd.py,
    each of two micro-batches, the models' loading included.
    """
    torch.manual_seed(0)
    response = [7] * (args.micro_tokens // 2 - 16)
    rollouts = []
    for _ in range(4 * ranks.rank_and_world()[1]):
        r = Rollout(Problem("", ""), [5] * 16, response, finished=True, outcome="correct")
        r.teacher_row = [r.prompt_ids, r.response_ids]
        rollouts.append(r)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        teacher = opsd.frozen_copy(student)
        ranks.prepare(student, args, torch.device("cpu"))
        ranks.prepare(teacher, args, torch.device("cpu"), low=True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        for _ in range(2):
            opsd.read_by_teacher(teacher, rollouts, args)
            opsd.accumulate_gradients(student, teacher, rollouts, args)
            optimizer_step(student, optimizer)
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CHECKED = [
    (dtype, flags) for dtype in ("float32", "bfloat16") for flags in ((), ("--checkpointing",))
]


def check(runs=CHECKED):
    """Prints estimate and measurement of a small model, and returns the ratios."""
    config = qwen3_config((256, 768, 6, 4, 2, False), 8192, 64)
    tokens, world, ratios = 1024, ranks.rank_and_world()[1], []
    print(f"{sizes(config).all:,} parameters, {tokens} tokens, ranks {world}; MB")
    for dtype, flags in runs:
        args = opsd.parse_args(["--dtype", dtype, "--micro-tokens", str(tokens), *flags])
        parts = estimate(
            config,
            gpus=world,
            tokens=tokens,
            read=4 * world * (tokens // 2 - 16),
            device="cpu",
            dtype=dtype,
            checkpointing=args.checkpointing,
            sampler=False,
            sharded=ranks.distributed(),
        )
        estimated, counted = sum(parts.values()), measure(config, args)
        ratios.append(estimated / counted)
        print(
            f"  {' '.join([dtype, *flags]):26s} estimate {estimated / 1e6:6.0f}  "
            f"measured {counted / 1e6:6.0f}  ratio {ratios[-1]:.2f}"
        )
        by_part = [f"{name} {value / 1e6:.0f}" for name, value in parts.items() if value]
        print(f"    {'  '.join(by_part)}", flush=True)
    return ratios


# ------------------------------------------------------------------------------------------------

CARD, VLLM, SPARE = 80e9, 0.3, 2e9
ERROR = 1.22  # the check's largest: measured / estimate


def table():
    """For each model and number of GPUs the first flags that fit, of those that cost time in rising
    order: 32 responses of 8,192 tokens, a micro-batch each.
    """
    header = ["model", "GPUs", "flags", "kept", "activations", "peak, GB of 80"]
    rows = []
    for name in QWEN3:
        for gpus in (1, 2, 4, 8):
            for flags in ([], ["--checkpointing"], ["--checkpointing", "--offload"]):
                parts = estimate(
                    qwen3(name),
                    gpus=gpus,
                    tokens=8192,
                    read=32 * 8192,
                    checkpointing="--checkpointing" in flags,
                    offload="--offload" in flags,
                    sampler=False,
                    sharded=gpus > 1 or "--offload" in flags,
                )
                peak = ERROR * sum(parts.values()) + VLLM * CARD + SPARE
                if peak <= CARD:
                    break
            kept = sum(parts[part] for part in ("weights", "gradients", "optimizer", "teacher"))
            row = [name, str(gpus), " ".join(f"`{flag}`" for flag in flags) or "none"]
            row += [f"{kept / 1e9:.1f}", f"{parts['activations'] / 1e9:.1f}"]
            rows.append([*row, f"{peak / 1e9:.0f}" + ("" if peak <= CARD else ", too much")])
    return markdown(header, rows)


def parse_args(argv=None):
    """(own arguments, those of the script that is planned)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("script", nargs="?", choices=list(SCRIPTS), help="plan a run of it, with its own flags")
    add("--gpus", type=int, default=1, help="of that run")
    add("--check", action="store_true", help="compare with what torch allocates")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, flags = parse_args(argv)
    if args.script:
        if args.gpus < 1:
            fail(f"--gpus {args.gpus}: at least 1")
        return print_plan(args.script, flags, args.gpus)
    if flags:
        fail(f"unknown: {' '.join(flags)} (a script first: {', '.join(SCRIPTS)})")
    if not args.check:
        return print(table())
    set_up(types.SimpleNamespace(device="cpu", dtype="float32", threads=1, seed=0))
    check()
    ranks.leave()


if __name__ == "__main__":
    start(main)
