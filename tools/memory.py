"""How much memory training takes on each GPU: an estimate by counting tensors.

1. `estimate` counts what opsd.py keeps (weights, gradients, AdamW's two moments, teacher) and the
   tensors that a step adds: activations of a Llama-shaped block (Llama, Qwen2, Qwen3, Mistral,
   ...), blocks gathered from the ranks, the head, the loss's chunk of logits.
2. Not counted: the CUDA context and NCCL (one or two GB), fragmentation, the attention kernel's
   workspace, and vLLM, which takes --vllm-memory of the card.
3. With --gpus and the flags of opsd.py: the first problem as the teacher will read it, and the
   estimate for that run. No weights are loaded and nothing is written.

    python -m tools.memory --gpus 8 --model Qwen/Qwen3-8B --data math.jsonl    # flags of opsd.py
    python -m tools.memory    # the documents' table
"""

from importlib.util import find_spec
from itertools import product

if __name__ == "__main__":
    from launch import start

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

import data
import opsd
import ranks
from data import CONTEXTS, WRITTEN
from model import CHUNK, PIECE, load_tokenizer
from rollout import Rollout
from run import Parser, fail
from tools import markdown


def qwen3_config(width, mlp, layers, heads, key_heads, tied, vocabulary=151_936, head_dim=128):
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


# From the models' public config.json files; tiny: for a trial on a CPU.
SHAPES = {
    "tiny": qwen3_config(256, 768, 6, 4, 2, True, 8192, 64),
    "SmolLM2-135M": qwen3_config(576, 1536, 30, 9, 3, True, 49_152, 64),
    "Qwen3-0.6B": qwen3_config(1024, 3072, 28, 16, 8, True),
    "Qwen3-1.7B": qwen3_config(2048, 6144, 28, 16, 8, True),
    "Qwen3-4B": qwen3_config(2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": qwen3_config(4096, 12288, 36, 32, 8, False),
}


def sizes(config):
    """Parameters: (all, of the largest block, of the rest of the body, of the head)."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    blocks = [count(block) for block in ranks.blocks_of(model)]
    rest = count(model.base_model) - sum(blocks)
    return count(model), max(blocks), rest, count(model.get_output_embeddings())


def estimate(config, args, gpus, tokens, sharded):
    """{part: bytes} on each GPU at the peak of a training step, which is their sum.

    args: of opsd.py, --device, --dtype and --backend settled. tokens: of the longest micro-batch,
    padding included. sharded: under torchrun, also with one GPU.
    """
    whole, block, rest, head = sizes(config)
    layers, width, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    low = args.dtype == "bfloat16"
    b = 2 if low else 4  # bytes of a computed number
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    on_card = 0 if args.offload else 1 / gpus

    # Kept from step to step. Not sharded, a frozen teacher's embedding, norms and head are float32.
    blocks = block * layers
    frozen = b * whole if sharded else b * blocks + 4 * (whole - blocks)
    # With --lora A (rank, in) and B (out, rank) of seven layers a block, and no other teacher.
    trained = args.lora * layers * (2 * (2 * width + queries + keys) + 3 * (width + mlp)) or whole
    copied = args.backend == "transformers" and (sharded or args.lora or low)
    parts = {
        "weights": (4 * trained + (b * whole if args.lora else 0)) * on_card,
        "gradients": 4 * trained * on_card,
        "optimizer": 8 * trained * on_card,
        "teacher": 0 if args.lora else (4 * whole if args.teacher == "ema" else frozen) * on_card,
        "sampler": b * whole if copied else 0,
    }

    # What a block keeps for its backward pass, in bytes a token. A norm keeps its input and its
    # quotient in float32 and its output; with autocast the residual stream is float32, but for a
    # frozen embedding in bfloat16.
    stream = b if sharded or args.lora else 4

    def norm(width):
        if args.lora:  # its weight is frozen: no quotient
            return width * (4 + b)
        return width * (4 + stream + b) if low else width * 12

    kept = 2 * norm(width) + b * (2 * queries + 2 * keys + queries + keys) + b * 4 * mlp
    if "qwen3" in config.model_type:  # norms of queries and keys
        kept += norm(queries + keys)
    # Gradients of one block's activations on their way.
    inside = 2 * b * mlp + 8 * width
    between = stream * width if args.checkpointing else kept
    parts["teacher's states"] = tokens * width * stream
    parts["activations"] = tokens * layers * between + tokens * width * 4 * b

    # Then either the loss of a chunk or the backward pass of a block is at its peak, whichever is
    # larger. The loss: a chunk's logits of each model, and of a piece's float32 tensors some eight:
    # log-probabilities, the divergence's terms, their gradients.
    chunk, piece = (min(n[args.device], tokens * config.vocab_size) for n in (CHUNK, PIECE))
    logits = chunk * b * 2 + piece * 32
    if sharded and args.lora:
        heads, gathered = b * head, b * (2 * block + rest)
    elif sharded:
        heads = (8 + 3 * b if low else 8 + b) * head
        # Two blocks whole, one's gradient, and the same once more to be summed.
        gathered = (3 * b + 4) * block + (2 * b + 4) * rest
    else:
        heads, gathered = 2 * b * head if low and not args.lora else 0, 0
        rounds = low and not args.checkpointing and not args.lora
        parts["rounded weights"] = 2 * blocks if rounds else 0
    recomputed = kept if args.checkpointing else 0
    parts["loss or block"] = max(logits + heads, gathered + tokens * (inside + recomputed))
    return parts


def print_plan(args, gpus):
    """The first problem as the teacher reads it, and the estimate for opsd.py's flags."""
    tokenizer = load_tokenizer(args.model)
    config = AutoConfig.from_pretrained(args.model)
    rollout = Rollout(data.load_problems(args, 1)[0], [])
    written = ["(what the teacher will have written)"]
    sibling = Rollout(rollout.problem, [], text="(a sibling's reasoning)", outcome="correct")
    rollout.siblings = [sibling]
    context = CONTEXTS[args.context]([rollout], lambda prompts: written, args)[0]
    opsd.add_teacher_rows([rollout], [context], tokenizer, args, None)
    prompt, _ = rollout.teacher_row
    print(f"the teacher's prompt, {len(prompt)} tokens:\n{tokenizer.decode(prompt)}\n")
    args.device = "cpu" if args.device == "cpu" else "cuda"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.backend == "auto":
        args.backend = "vllm" if args.device == "cuda" and find_spec("vllm") else "transformers"
    # A micro-batch has at least one row; the teacher's is the longer one, longest with a written
    # context or a sibling at its cap.
    longest = {"sibling": args.max_new_tokens, **dict.fromkeys(WRITTEN, args.context_tokens)}
    row = len(prompt) + longest.get(args.context, 0) + args.max_new_tokens
    tokens = max(row, args.micro_tokens)
    sharded = gpus > 1 or args.offload
    parts = estimate(config, args, gpus, tokens, sharded)
    terms = [f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value]
    how = "sharded (torchrun)" if sharded else "not sharded"
    print(f"peak of training on each of {gpus} GPUs ({args.device}), {how}, {args.dtype},")
    print(f"micro-batches of {tokens} tokens; GB by part:")
    print(f"{' + '.join(terms)} = {sum(parts.values()) / 1e9:.3g}")


# ------------------------------------------------------------------------------------------------

MODELS = ["Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"]
CARDS = [(24, 1), (48, 1), (80, 1), (80, 2), (80, 4), (80, 8)]  # GB, how many
VLLM, CACHE, SPARE = 0.5, 2e9, 2e9  # its share while it samples, bytes of it for keys and values
CUDA = "--device cuda --dtype bfloat16 --backend vllm".split()
LORA = ["--lora 16", "--lora 16 --checkpointing"]
FLAGS = ["", "--checkpointing", *LORA, "--checkpointing --offload"]
ERROR = 1.22  # the largest measured / estimate, of a small model on two CPUs


def table():
    """For each card and model the first flags that fit: 32 responses of 8,192 tokens, a micro-batch
    each. A peak is that of training, or of sampling with what is kept beside it.
    """
    header = ["card", "model", "flags", "kept, GB", "training, GB", "sampling, GB"]
    rows = []
    for (card, gpus), name in product(CARDS, MODELS):
        for flags in FLAGS:
            args = opsd.parse_args([*CUDA, *flags.split()])
            parts = estimate(SHAPES[name], args, gpus, 8192, gpus > 1 or args.offload)
            engine = VLLM * card * 1e9
            kept = sum(parts[part] for part in ("weights", "optimizer", "teacher"))
            training, sampling = ERROR * sum(parts.values()) + SPARE, kept + engine + SPARE
            holds = 2 * sizes(SHAPES[name])[0] + CACHE <= engine
            if fits := holds and max(training, sampling) <= card * 1e9:
                break
        numbers = [f"{value / 1e9:.1f}" for value in (kept, training, sampling)]
        flags = f"`{flags}`" if flags else "none"
        if not fits:
            flags, numbers = "none fits", ["", "", ""]
        rows.append([f"{gpus} x {card} GB", name, flags, *numbers])
    return markdown(header, rows)


def parse_args(argv=None):
    """(--gpus, 0 for the table, and opsd.py's arguments)."""
    parser = Parser(__doc__)
    help = "of a planned run, whose flags of opsd.py follow; 0 = the table"
    parser.add_argument("--gpus", type=int, default=0, help=help)
    args, flags = parser.parse_known_args(argv)
    if flags and not args.gpus:
        fail(f"--gpus {args.gpus}: at least 1, with the flags of opsd.py")
    return args.gpus, opsd.parse_args(flags)


def main(argv=None):
    gpus, args = parse_args(argv)
    if gpus:
        print_plan(args, gpus)
    else:
        print(table())


if __name__ == "__main__":
    start(main)
