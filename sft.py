"""Stage 1, supervised fine-tuning: cross-entropy on reference traces, the prompt masked out.

1. Without --model it builds the embedded tiny model (Llama, under a million parameters) and its tokenizer (byte-level BPE,
   Qwen-style chat template) from scratch and trains both on the embedded task: this makes tiny/sft.
2. The embedded traces also teach what a pretrained model brings along: how to read a reference in the prompt. With one, the traces
   check easy steps little; with or without, every trace ends right.
3. With --model and --data a real model is fine-tuned on "<think> solution </think> \\boxed{answer}".
4. The loss is the mean over all response tokens of the step, computed from hidden states at response positions only.

    python sft.py --out tiny/sft                                                    # the embedded model, about six minutes
    python sft.py --model MODEL --data train.jsonl --lr 1e-5 --steps 50 --out runs/sft
"""

import math
import time

from common import (
    Run,
    add_run_flags,
    check_out,
    deal,
    fail,
    load_model,
    load_tokenizer,
    make_parser,
    optimizer_step,
    peak_memory,
    positive,
    response_hidden,
    response_targets,
    save_model,
    set_up,
    stop_ids,
)
from data import (
    CONTEXTS,
    EMBEDDED_CONTEXTS,
    add_data_flags,
    load_problems,
    reference_trace,
    render_prompt,
)
from ranks import gather, load_device, open_head, prepare
from rollout import Rollout, opened_think


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model",
        help="Hugging Face directory or id; without it the embedded tiny model is built from scratch",
    )
    add_run_flags(parser, resume_every=100)
    add_data_flags(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    group.add_argument("--batch", type=int, default=32, help="responses a step")
    group.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="peak learning rate of AdamW; warm-up, then cosine to a tenth",
    )
    group.add_argument("--warmup", type=int, default=100, help="steps")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    group.add_argument(
        "--give-up",
        type=int,
        default=10,
        help="stop after this many steps in a row whose loss or gradient is not finite",
    )
    group.add_argument(
        "--micro-tokens",
        type=int,
        default=2048,
        help="padded tokens of a micro-batch; changes memory and speed, not the gradient",
    )
    args = parser.parse_args(argv)
    positive(parser, args, "steps", "batch", "lr", "clip", "micro_tokens", "give_up")
    return args


# The embedded mixture: (share, context in the prompt, thinking).
MIXTURE = [
    (0.56, "none", True),
    (0.24, "solution", True),
    (0.06, "answer", True),
    (0.06, "instruction", True),
    (0.05, "none", False),
    (0.03, "solution", False),
]


def embedded_row(tokenizer, problem, rng):
    """(prompt ids, response ids) of one draw from the mixture."""
    import numpy as np

    _, context, thinking = MIXTURE[
        rng.choice(len(MIXTURE), p=np.array([share for share, _, _ in MIXTURE]))
    ]
    prompt = render_prompt(
        tokenizer, problem, CONTEXTS[context]([Rollout(problem, [])], None)[0], thinking
    )
    return prompt, tokenizer(
        reference_trace(problem, rng, context, thinking) + tokenizer.eos_token,
        add_special_tokens=False,
    ).input_ids


def real_row(tokenizer, problem, end):
    """The same of a real problem; `end` is the id that ends a response."""
    prompt = render_prompt(tokenizer, problem)
    text = f"<think>\n{problem.solution}\n</think>\n\n\\boxed{{{problem.answer}}}".removeprefix(
        opened_think(tokenizer, prompt)
    )
    return prompt, tokenizer(text, add_special_tokens=False).input_ids + [end]


def sft_loss(model, rows, tokens):
    """The loss of one micro-batch over the step's `tokens`, its gradient added to the model's: sum of the cross-entropies (nats) of the response tokens of `rows`."""
    import torch.nn.functional as F

    hidden = response_hidden(model, rows)  # (R, D)
    head, hand_back = open_head(model)
    loss = (
        F.cross_entropy(head(hidden).float(), response_targets(model, rows), reduction="sum")
        / tokens
    )  # logits (R, V)
    loss.backward()
    hand_back()
    return loss.item()


def learning_rate(args, step):
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_tiny(seed):
    """The embedded model and tokenizer from nothing: standard Llama, float32, 0.4 million parameters."""
    import numpy as np
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from data import INSTRUCTION, embedded_problems

    rng = np.random.default_rng(seed)
    corpus = []
    for problem in embedded_problems(400, seed):
        for name in EMBEDDED_CONTEXTS:
            corpus += [
                "user\n",
                "assistant\n",
                problem.question,
                INSTRUCTION,
                CONTEXTS[name]([Rollout(problem, [])], None)[0],
            ]
            corpus.append(reference_trace(problem, rng, name))
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"  # digits and signs are single tokens
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [text.replace("<think>", "").replace("</think>", "") for text in corpus],
        trainers.BpeTrainer(
            vocab_size=510,
            special_tokens=control,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            intermediate_size=256,
            max_position_embeddings=2048,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


# The shape of Qwen3's: with thinking off the prompt ends in an empty think block; with thinking on the model opens it itself.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def main(argv=None):
    args = parse_args(argv)
    check_out(args)
    if args.data and not args.model:
        fail(
            "--data without --model: the embedded model is trained on the embedded task; name a model"
        )
    device = set_up(args)
    import numpy as np
    import torch

    problems = load_problems(args, args.steps * args.batch)
    if args.data and not all(p.solution for p in problems):
        fail(
            f"--data {args.data}: sft.py needs a worked solution in every row (see --solution-field)"
        )
    if args.dry_run:
        from memory import dry_run

        config, tokenizer = (
            load_tokenizer(args.model)
            if args.model
            else (lambda model, tokenizer: (model.config, tokenizer))(*build_tiny(args.seed))
        )
        rows = [
            real_row(tokenizer, p, tokenizer.eos_token_id)
            if args.data
            else embedded_row(tokenizer, p, np.random.default_rng(0))
            for p in problems[:1000]
        ]
        return dry_run(
            args,
            config,
            device,
            tokenizer,
            dict(prompt=rows[0][0]),
            max(len(p) + len(r) for p, r in rows),
            "",
        )
    model, tokenizer = (
        load_model(args.model, load_device(device)) if args.model else build_tiny(args.seed)
    )  # in float32
    model.to(load_device(device)).eval()
    prepare(model, args, device)
    end = (
        tokenizer.eos_token_id
        if tokenizer.eos_token_id is not None
        else stop_ids(model, tokenizer)[0]
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    run = Run(args, "sft")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(problems):,} problems, device {device}, run directory {run.path}"
    )
    state = run.resume(problems, model, optimizer)
    skipped, updates = state.get("skipped", 0), state.get("updates", 0)
    for step in range(state.get("step", 0), args.steps):
        start = time.time()
        rng = np.random.default_rng([args.seed, 1, step])
        epoch, position = divmod(step * args.batch, len(problems))
        batch = [problems[(position + i) % len(problems)] for i in range(args.batch)]
        rows = [
            real_row(tokenizer, p, end) if args.data else embedded_row(tokenizer, p, rng)
            for p in batch
        ]
        tokens = sum(len(response) for _, response in rows)  # the denominator of the whole step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        total = 0.0
        for group, counts in deal([len(p) + len(r) for p, r in rows], args.micro_tokens):
            total += sft_loss(model, [rows[i] for i in group], tokens if counts else math.inf)
        total = sum(gather([total]))
        norm, updated = optimizer_step(model, optimizer, args.clip)
        updates, skipped = updates + updated, 0 if updated else skipped + 1
        if not updated:
            run.log(
                "not_finite",
                dict(
                    step=step + 1,
                    loss=total,
                    grad_norm=norm,
                    rows=[dict(prompt_ids=p, response_ids=r) for p, r in rows],
                ),
            )
        seconds = time.time() - start
        run.log(
            "metrics",
            dict(
                step=step + 1,
                loss=total,
                grad_norm=norm,
                lr=learning_rate(args, step),
                epoch=epoch,
                loss_tokens=tokens,
                tokens_per_second=tokens / seconds,
                seconds=seconds,
                peak_memory_mb=peak_memory(device),
            ),
        )
        if (step + 1) % max(1, args.steps // 40) == 0:
            print(
                f"step {step + 1}/{args.steps}  loss {total:.4f}  gradient norm {norm:.2f}  {tokens / seconds:,.0f} tokens/s",
                flush=True,
            )
        if skipped == args.give_up:
            fail(
                f"loss or gradient not finite in {skipped} steps in a row (--give-up): see {run.path}/not_finite.jsonl"
            )
        run.save_state(step + 1, problems, model, optimizer, skipped=skipped, updates=updates)
    if not updates:
        fail("no step was taken, the model is unchanged")
    save_model(run.path, model, tokenizer)
    run.finish()
    print(f"saved {run.path}")


if __name__ == "__main__":
    main()
