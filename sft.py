"""Stage 1, supervised fine-tuning: cross-entropy on reference traces, the prompt masked out.

1. Without --model it builds the embedded tiny model (Llama, under a million parameters) and its
   tokenizer (byte-level BPE, Qwen-style chat template) from scratch and trains both on the embedded
   task: this makes tiny/sft.
2. The embedded traces also teach what a pretrained model brings along: how to read a reference in
   the prompt. With one, the traces check easy steps little; every trace ends right.
3. With --model and --data a real model learns "<think> solution </think> \\boxed{answer}"; rows
   come in the file's order.
4. The loss is the mean over all response tokens of the step; the prompt has none.

    python sft.py --out tiny/sft
    python sft.py --model MODEL --data train.jsonl --lr 1e-5 --steps 50 --out runs/sft
"""

import math
import time
from typing import NamedTuple

if __name__ == "__main__":
    from launch import start  # before torch: from now on Ctrl-C is one line

import numpy as np
import torch

import data
import ranks
import toy_model
from data import CONTEXTS
from model import (
    backward_in_chunks,
    context_limit,
    load_model,
    my_micro_batches,
    optimizer_step,
    save_model,
    stop_ids,
)
from rollout import Rollout, opened_think
from run import (
    Parser,
    Run,
    add_training_flags,
    check_run_directory,
    fail,
    fingerprint,
    peak_memory,
    set_up,
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", help="Hugging Face directory or id; without it a new tiny one")
    data.add_data_flags(parser)
    add = add_training_flags(parser, steps=1500, batch=32, lr=3e-3, state_every=100)
    up = "steps up to --lr, then cosine to a tenth (else a tenth of --steps, at most 100)"
    add("--warmup", type=int, help=up)
    args = parser.parse_args(argv)
    if args.warmup is None:
        args.warmup = min(100, args.steps // 10)
    if args.data and not args.model:
        fail("--data without --model: the embedded model has a task of its own; name a model")
    return args


# ------------------------------------------------------------------------------------------------
# Rows: (prompt ids, response ids)


def context_of(problem, name):
    return CONTEXTS[name]([Rollout(problem, [])], None, None)[0]


def embedded_row(tokenizer, problem, rng):
    """One draw from the mixture of toy_model.py."""
    shares = [share for share, _, _ in toy_model.MIXTURE]
    _, context, thinking = toy_model.MIXTURE[rng.choice(len(shares), p=shares)]
    prompt = data.render_prompt(tokenizer, problem, context_of(problem, context), thinking)
    text = toy_model.reference_trace(problem, rng, context, thinking) + tokenizer.eos_token
    return prompt, tokenizer(text, add_special_tokens=False).input_ids


def real_row(tokenizer, problem, end):
    """The row of a real problem; `end` is the id that ends a response."""
    prompt = data.render_prompt(tokenizer, problem)
    # Of a whole response, as eval.py --out has them, what is inside its think block.
    inside = Rollout(problem, [], text=problem.solution).reasoning
    solution, answer = (data.plain(tokenizer, t) for t in (inside, problem.answer))
    text = f"<think>\n{solution}\n</think>\n\n\\boxed{{{answer}}}"
    text = text.removeprefix(opened_think(tokenizer, prompt))
    return prompt, tokenizer(text, add_special_tokens=False).input_ids + [end]


def drop_long(problems, tokenizer, end, limit):
    """The problems whose rows the model's context of `limit` tokens holds; says how many do not."""
    kept = [p for p in problems if sum(map(len, real_row(tokenizer, p, end))) <= limit]
    if dropped := len(problems) - len(kept):
        print(f"dropped {dropped} of {len(problems)} rows: beyond the model's context of {limit}")
    if not kept:
        fail(f"--data: no row fits in the model's context of {limit} tokens")
    return kept


def build_tiny(seed):
    """(model, tokenizer): the embedded ones, untrained."""
    rng = np.random.default_rng(seed)
    corpus = []
    for problem in data.embedded_problems(400, seed):
        for name in toy_model.CONTEXTS:
            corpus += ["user\n", "assistant\n", problem.question, data.INSTRUCTION]
            corpus += [context_of(problem, name), toy_model.reference_trace(problem, rng, name)]
    tokenizer = toy_model.build_tokenizer(corpus)
    return toy_model.build_model(tokenizer, seed), tokenizer


# ------------------------------------------------------------------------------------------------
# The loss


class Tokens(NamedTuple):
    """What is known of each response token, (P,) each."""

    ids: torch.Tensor
    weight: torch.Tensor  # in the step's loss


def token_loss(logps, _, tokens, args):
    """(each token's share of the step's loss (P,), no measures): its cross-entropy in nats."""
    return -logps.gather(-1, tokens.ids[:, None])[:, 0] * tokens.weight, {}


def sft_loss(model, rows, weight, args=None):
    """The loss of one micro-batch, its gradient added to the model's: the cross-entropies (nats) of
    the response tokens of `rows`, each times `weight`.
    """
    ids = [token for _, response in rows for token in response]
    ids = torch.tensor(ids, device=ranks.device_of(model))  # (R,)
    tokens = Tokens(ids, torch.full(ids.shape, weight, device=ids.device))
    return backward_in_chunks(model, rows, token_loss, tokens, args)[0].item()


def learning_rate(args, step):
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    state = check_run_directory(args)
    problems = data.load_problems(args, args.steps * args.batch)
    if args.data and not all(p.solution for p in problems):
        fail(f"--data {args.data}: sft.py needs a solution in every row (see --fields)")
    if args.model:
        model, tokenizer = load_model(args.model, ranks.load_device(device))  # in float32
    else:
        model, tokenizer = build_tiny(args.seed)
        model.to(ranks.load_device(device)).eval()
    identity = fingerprint(problems, model)
    ranks.prepare(model, args, device)
    end = tokenizer.eos_token_id
    if end is None:
        end = stop_ids(model, tokenizer)[0]
    if args.data and (limit := context_limit(model.config)[0]):
        problems = drop_long(problems, tokenizer, end, limit)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    with Run(args, "sft", identity, state) as run:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {len(problems):,} problems, device {device}, {run.path}")
        for step in range(run.resume(model, optimizer), args.steps):
            begun = time.time()
            # 1. rows of the step
            rng = np.random.default_rng([args.seed, 1, step])
            epoch, position = divmod(step * args.batch, len(problems))
            batch = [problems[(position + i) % len(problems)] for i in range(args.batch)]
            if args.data:
                rows = [real_row(tokenizer, problem, end) for problem in batch]
            else:
                rows = [embedded_row(tokenizer, problem, rng) for problem in batch]
            # 2. loss: one denominator for the whole step
            tokens, loss = sum(len(response) for _, response in rows), 0.0
            lengths = [len(prompt) + len(response) for prompt, response in rows]
            for group, counts in my_micro_batches(lengths, args.micro_tokens):
                part = [rows[i] for i in group]
                loss += sft_loss(model, part, 1 / tokens if counts else 0.0)
            loss = sum(ranks.gather([loss]))
            # 3. step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            norm, updated = optimizer_step(model, optimizer)
            seconds = time.time() - begun
            record = dict(step=step + 1, loss=loss, grad_norm=norm, lr=group["lr"], epoch=epoch)
            record.update(loss_tokens=tokens, tokens_per_second=tokens / seconds, seconds=seconds)
            log_step(run, dict(record, peak_memory_mb=peak_memory(device)), args, rows)
            run.count_update(updated)
            if args.save_every and (step + 1) % args.save_every == 0:
                save_model(f"{run.path}/step-{step + 1}", model, tokenizer)
            run.save_state(step + 1, model, optimizer)
        if not run.updates:
            fail("no step was taken, the model is unchanged")
        save_model(run.path, model, tokenizer)
        run.finish()


def log_step(run, record, args, rows):
    """One line of metrics.jsonl; docs/runs.md explains each key. Some of them on the screen."""
    run.log("metrics", record)
    step, loss, norm = record["step"], record["loss"], record["grad_norm"]
    if not math.isfinite(norm):
        ids = [dict(prompt_ids=prompt, response_ids=response) for prompt, response in rows]
        run.log("not_finite", dict(step=step, loss=loss, grad_norm=norm, rows=ids))
    if step % max(1, args.steps // 40) == 0:
        rate = f"{record['tokens_per_second']:,.0f} tokens/s"
        losses = f"loss {loss:.4f}  gradient norm {norm:.2f}"
        print(f"step {step}/{args.steps}  {losses}  {rate}", flush=True)


if __name__ == "__main__":
    start(main)
