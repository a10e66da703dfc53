"""How much memory training takes on each GPU: an estimate by counting tensors, and a check of it against what torch allocates on a CPU.

1. `estimate` counts what the scripts keep (weights, gradients, AdamW's two moments, teacher) and the tensors that a step adds: activations of a
   Llama-shaped block (Llama, Qwen2, Qwen3, Mistral, ...), blocks gathered from the ranks, the head, the loss's chunk of logits.
2. Not counted: the CUDA context and NCCL (one or two GB), fragmentation, the attention kernel's workspace, and vLLM, which takes --vllm-memory of the card.
3. `python memory.py` prints the README's table, `--check` the formula beside torch's own count of a small model's peak, on one rank or under torchrun.

    python memory.py
    python memory.py --check
    torchrun --nproc-per-node 2 memory.py --check
"""

import argparse
import math
import sys
import types

import ranks
from opsd import PIECE

# Shapes as transformers' Qwen3Config arguments, from the public config.json files of Qwen/Qwen3-1.7B, -4B and -8B.
QWEN3 = {
    "Qwen3-1.7B": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen3-4B": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def qwen3(name):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936, head_dim=128, max_position_embeddings=40960, **QWEN3[name]
    )


def sizes(config):
    """Numbers of parameters: all, one block, the other ones of the body (embedding and last norm), the head."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = lambda module: sum(p.numel() for p in module.parameters())
    blocks = [
        module
        for module in model.base_model.modules()
        if type(module).__name__ in model._no_split_modules
    ]
    return (
        count(model),
        max(map(count, blocks)),
        count(model.base_model) - sum(map(count, blocks)),
        count(model.get_output_embeddings()),
    )


def estimate(
    config,
    gpus,
    tokens,
    read=0,
    chunk=64,
    dtype="bfloat16",
    teacher="frozen",
    checkpointing=False,
    offload=False,
    sampler=True,
    pieces=True,
):
    """Bytes on each GPU at the peak of a training step, by part; their sum is the peak.

    tokens: of the longest micro-batch, padding included. read: response tokens of the whole step, at which the teacher's states are kept. chunk: millions of logits.
    teacher: "" = none, "frozen" (any that is only copied), "ema". sampler: a whole copy for the transformers backend, which several ranks need. pieces: under torchrun
    (also with one GPU); else the plain model, and no copy for the sampler.
    """
    parameters, block, rest, head = sizes(config)
    layers, width, vocabulary, b = (
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        2 if dtype == "bfloat16" else 4,
    )
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    on_card = 0 if offload else 1 / gpus

    # Kept from step to step. Without pieces a frozen teacher's embedding, norms and head stay float32.
    low = b * parameters if pieces else b * block * layers + 4 * (parameters - block * layers)
    parts = dict(
        weights=4 * parameters * on_card,
        gradients=4 * parameters * on_card,
        optimizer=8 * parameters * on_card,
        teacher={"": 0, "frozen": low, "ema": 4 * parameters}[teacher] * on_card,
        sampler=b * parameters if sampler and pieces else 0,
    )

    # What a block keeps for its backward pass, in bytes a token. A norm: its input and its quotient in float32, its output; with autocast the residual stream is float32.
    stream = b if pieces else 4
    norm = lambda n: n * (4 + stream + b) if b == 2 else n * 12
    kept = (
        2 * norm(width)
        + b * (2 * queries + 2 * keys + queries + keys)
        + b * 4 * config.intermediate_size
    )
    if "qwen3" in config.model_type:  # norms of queries and keys
        kept += norm(queries + keys)
    inside = (
        2 * b * config.intermediate_size + 8 * width
    )  # gradients of one block's activations on their way
    parts["teacher's states"] = read / gpus * width * stream if teacher else 0
    parts["activations"] = (
        tokens * layers * (stream * width if checkpointing else kept) + tokens * width * 4 * b
    )

    # Then either the loss of a chunk or the backward pass of a block is at its peak, whichever is larger.
    logits = min(chunk * 1e6, tokens * vocabulary)
    # opsd.py: both models' logits, and float32 tensors of a piece's size: log-probabilities, the divergence's terms, their gradients. Else all of the chunk's size.
    logits = logits * 2 * b + min(logits, PIECE * 1e6) * 32 if read else logits * 16
    if pieces:
        full_head = (4 + 4 + (b if b == 2 else 0) * 2) * head + (b * head if teacher else 0)
        gathered = (
            2 * b * block + b * block + 4 * block + 2 * b * rest + 4 * rest
        )  # two blocks whole, one's gradient, and the same once more to be summed
    else:
        full_head, gathered = (2 * 2 * head if b == 2 else 0), 0
        parts["rounded weights"] = 2 * block * layers if b == 2 and not checkpointing else 0
    parts["loss or block"] = max(
        logits + full_head, gathered + tokens * (inside + kept * checkpointing)
    )
    return parts


def show(parts):
    return (
        " + ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value)
        + f" = {sum(parts.values()) / 1e9:.3g}"
    )


def dry_run(args, config, device, tokenizer, prompts, tokens, teacher, read=0):
    """What --dry-run prints: prompts, a name each with its ids; the estimate for these flags and ranks. `tokens`: of the longest row; a micro-batch has at least one.
    teacher, read: see `estimate`."""
    import torch

    for name, ids in prompts.items():
        print(f"{name}, {len(ids)} tokens:\n{tokenizer.decode(ids)}\n")
    tokens = max(tokens, args.micro_tokens)
    backend = getattr(args, "backend", None)  # sft.py samples nothing
    parts = estimate(
        config,
        ranks.rank_and_world()[1],
        tokens,
        read,
        getattr(args, "chunk", math.inf),
        args.dtype,
        teacher,
        args.checkpointing,
        args.offload,
        sampler=backend == "transformers",
        pieces=ranks.distributed(),
    )
    card = (
        f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB"
        if device.type == "cuda"
        else ""
    )
    print(
        f"peak of training, ranks {ranks.rank_and_world()[1]}, micro-batches of {tokens} tokens, each rank on {device}{card}; GB by part (memory.py):"
    )
    print(
        show(parts)
        + {
            "vllm": ", and vLLM's share of the card (--vllm-memory)",
            "transformers": ", and keys and values while sampling",
            None: "",
        }[backend]
    )
    print("dry run: no weights were loaded, nothing was written")
    ranks.stop()


# ---------------------------------------------------------------------------------------------------------------------
# The check


def measure(config, args):
    """Peak of the bytes that torch allocates on this rank's CPU in two training steps of opsd.py, each of two micro-batches, the models' loading included."""
    import torch
    from transformers import AutoModelForCausalLM
    import opsd
    from common import optimizer_step
    from data import Problem
    from rollout import Rollout

    torch.manual_seed(0)
    half = args.micro_tokens // 2
    rollouts = [
        Rollout(Problem("", "", "", ""), [5] * 16, [7] * (half - 16), True, outcome="correct")
        for _ in range(4 * ranks.rank_and_world()[1])
    ]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        other = opsd.frozen_copy(student)
        for model, low in ((student, False), (other, True)):
            ranks.prepare(model, args, torch.device("cpu"), low=low)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        for _ in range(2):
            opsd.accumulate_gradients(
                student, other, rollouts, [[r.prompt_ids, r.response_ids] for r in rollouts], args
            )
            optimizer_step(student, optimizer, 1.0)
    now = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def check(
    runs=tuple(
        (dtype, flags) for dtype in ("float32", "bfloat16") for flags in ((), ("--checkpointing",))
    ),
):
    """Prints estimate and measurement of a small model, and returns the ratios."""
    import torch
    from transformers import Qwen3Config
    import opsd

    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    tokens, chunk, world, ratios = 1024, 2, ranks.rank_and_world()[1], []
    print(
        f"{sizes(config)[0]:,} parameters, {tokens} tokens, chunks of {chunk} million logits, ranks {world}; MB"
    )
    for dtype, flags in runs:
        args = opsd.parse_args(
            ["--dtype", dtype, "--micro-tokens", str(tokens), "--chunk", str(chunk), *flags]
        )
        parts = estimate(
            config,
            world,
            tokens,
            4 * world * (tokens // 2 - 16),
            chunk,
            dtype,
            checkpointing=args.checkpointing,
            sampler=False,
            pieces=ranks.distributed(),
        )
        counted = measure(config, args)
        ratios.append(sum(parts.values()) / counted)
        print(
            f"  {' '.join(['--dtype', dtype, *flags]):36s} estimate {sum(parts.values()) / 1e6:6.0f}  measured {counted / 1e6:6.0f}  ratio {ratios[-1]:.2f}   "
            + "  ".join(f"{name} {value / 1e6:.0f}" for name, value in parts.items() if value),
            flush=True,
        )
    return ratios


def table():
    """The README's table: for each model and number of GPUs the first flags that fit, of those that cost time in rising order."""
    card, share, spare = 80e9, 0.3, 2e9
    print(
        "| model | GPUs | flags | kept | activations | peak, GB of 80 |\n|---|---|---|---|---|---|"
    )
    for name in QWEN3:
        for gpus in (1, 2, 4, 8):
            for flags in ([], ["--checkpointing"], ["--checkpointing", "--offload"]):
                pieces = gpus > 1 or "--offload" in flags
                parts = estimate(
                    qwen3(name),
                    gpus,
                    8192,
                    32 * 8192,
                    checkpointing="--checkpointing" in flags,
                    offload="--offload" in flags,
                    sampler=False,
                    pieces=pieces,
                )
                peak = (
                    1.22 * sum(parts.values()) + share * card + spare
                )  # the check's largest error
                if peak <= card:
                    break
            kept = sum(parts[part] for part in ("weights", "gradients", "optimizer", "teacher"))
            print(
                f"| {name} | {gpus} | {' '.join(f'`{flag}`' for flag in flags) or 'none'} | {kept / 1e9:.1f} | {parts['activations'] / 1e9:.1f} | {peak / 1e9:.0f}{'' if peak <= card else ', too much'} |"
            )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with what torch allocates")
    if not parser.parse_args(argv).check:
        return table()
    from common import set_up

    set_up(types.SimpleNamespace(device="cpu", dtype="float32", threads=1, seed=0))
    check()
    ranks.stop()


if __name__ == "__main__":
    sys.exit(main())
