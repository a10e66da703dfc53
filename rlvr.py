"""Stage 2, reinforcement learning with verifiable rewards (RLVR): GRPO with the reward of verify.py.

1. Reward 1 for a correct response, else 0; truncated responses get 0. --length-penalty P makes it 1 - P x length / cap for correct ones:
   the length-penalised baseline.
2. Advantage: reward minus the mean of its group (the responses to one problem), over the group's standard deviation.
   Groups with equal rewards carry no signal: they are skipped and counted.
3. Loss: mean over all response tokens of the step (one denominator, as in DAPO), so long responses are not discounted.
4. One update a batch is exactly on-policy: the ratio is 1 and nothing is clipped. With --updates above 1 the ratio is taken against the
   trainer's own log-probabilities before the first update, and clipped to [1 - clip-low, 1 + clip-high].
5. --kl adds KL(student || start), estimated per token by exp(d) - d - 1 with d = log start - log student. Off by default.

    python rlvr.py --out tiny/rlvr                                                  # the embedded model, about two minutes
    python rlvr.py --model MODEL --data train.jsonl --lr 1e-6 --max-new-tokens 8192 --out runs/rlvr
"""

import math
import os
import time

from common import (
    HERE,
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
    token_chunks,
)
from data import (
    add_data_flags,
    add_held_out_flags,
    load_held_out,
    load_problems,
    problem_batch,
    render_prompt,
    require_thinking_switch,
)
from ranks import gather, load_device, open_head, prepare
from rollout import (
    add_sampling_flags,
    choose_backend,
    drop_long,
    grade_rollouts,
    logprob_gap,
    make_rollouts,
    make_sampler,
)
from verify import Verifier


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="Hugging Face directory or id; without it tiny/sft")
    add_run_flags(parser, resume_every=10)
    add_data_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("method")
    group.add_argument("--group", type=int, default=8, help="responses a problem")
    group.add_argument(
        "--length-penalty",
        type=float,
        default=0.0,
        help="share of a correct response's reward lost at the token cap; 0 = none",
    )
    group.add_argument("--updates", type=int, default=1, help="optimizer steps a batch of rollouts")
    group.add_argument(
        "--clip-low",
        type=float,
        default=0.2,
        help="with --updates above 1: the ratio is clipped below 1 - this",
    )
    group.add_argument(
        "--clip-high",
        type=float,
        default=0.28,
        help="with --updates above 1: the ratio is clipped above 1 + this",
    )
    group.add_argument(
        "--kl",
        type=float,
        default=0.0,
        help="weight of the KL to the start; 0 = off, and no second model in memory",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=40, help="batches of rollouts")
    group.add_argument(
        "--batch", type=int, default=32, help="problems a step, each with --group responses"
    )
    group.add_argument("--lr", type=float, default=7e-5, help="constant learning rate of AdamW")
    group.add_argument("--weight-decay", type=float, default=0.0)
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    group.add_argument(
        "--micro-tokens",
        type=int,
        default=2048,
        help="padded tokens of a micro-batch; changes memory and speed, not the gradient",
    )
    group.add_argument(
        "--chunk",
        type=float,
        default=32,
        help="millions of logits (tokens x vocabulary) that exist at once; changes memory and speed, not the gradient",
    )
    group.add_argument(
        "--give-up",
        type=int,
        default=10,
        help="stop after this many steps in a row in which every group has equal rewards",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=0,
        help="also save the model after every so many steps, as step-N in the run directory; 0 = only at the end",
    )
    add_held_out_flags(parser)
    args = parser.parse_args(argv)
    positive(
        parser,
        args,
        "steps",
        "batch",
        "lr",
        "clip",
        "micro_tokens",
        "chunk",
        "give_up",
        "max_new_tokens",
        "sample_batch",
        "updates",
        "clip_low",
        "clip_high",
    )
    if args.group < 2:
        parser.error(
            f"--group {args.group}: at least 2, since the advantage is relative to the group"
        )
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Reward and advantage


def reward(rollout, length_penalty, cap):
    return (rollout.outcome == "correct") * (1 - length_penalty * len(rollout.response_ids) / cap)


def group_advantages(rewards, group):
    """Advantages of groups of `group` consecutive rewards; None for every member of a group with equal rewards."""
    advantages = []
    for start in range(0, len(rewards), group):
        values = rewards[start : start + group]
        mean = sum(values) / group
        deviation = (sum((v - mean) ** 2 for v in values) / group) ** 0.5
        advantages += [(v - mean) / deviation if deviation > 1e-6 else None for v in values]
    return advantages


# ---------------------------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary.


def chunk_logprobs(head, hidden, ids):
    """(log-probabilities of the sampled ids, entropies), each (C,), of a chunk's hidden states (C, D). head: see ranks.open_head."""
    import torch

    logprobs = torch.log_softmax(head(hidden).float(), -1)  # (C, V)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)  # (C,)
    return logprobs.gather(-1, ids[:, None])[:, 0], entropy


def sampled_logprobs(model, rollouts, chunk):
    """Log-probabilities of the response tokens: (R,), without gradient. At most `chunk` million logits exist at a time."""
    import torch

    rows = [(r.prompt_ids, r.response_ids) for r in rollouts]
    with torch.no_grad():
        hidden, ids = response_hidden(model, rows), response_targets(model, rows)  # (R, D), (R,)
        head, _ = open_head(model)
        return torch.cat(
            [
                chunk_logprobs(head, hidden[part], ids[part])[0]
                for part in token_chunks(len(ids), model, chunk)
            ]
        )


def rlvr_loss(model, rollouts, advantages, old, start, tokens, args):
    """The loss of one micro-batch over the step's `tokens`, its gradient added to the model's: (loss, measures (2, R): entropy, log-probability of the sampled id).

    advantages: (R,). old, start: see grpo_loss; old = None where the model is still the sampled one. At most `args.chunk` million logits exist at
    a time: each chunk of tokens runs backward at once, into the head and into its hidden states, whose gradients then go through the body together.
    """
    import torch

    rows = [(r.prompt_ids, r.response_ids) for r in rollouts]
    hidden, ids = response_hidden(model, rows), response_targets(model, rows)  # (R, D), (R,)
    head, hand_back = open_head(model)
    total, gradients, measures = 0.0, [], []
    for part in token_chunks(len(ids), model, args.chunk):
        leaf = hidden[part].detach().requires_grad_()  # (C, D): C tokens of the chunk
        logprobs, entropy = chunk_logprobs(head, leaf, ids[part])  # (C,), (C,)
        reference = logprobs.detach() if old is None else old[part]
        loss = (
            grpo_loss(
                logprobs,
                reference,
                None if start is None else start[part],
                advantages[part],
                args.clip_low,
                args.clip_high,
                args.kl,
            ).sum()
            / tokens
        )
        loss.backward()
        total += loss.item()
        gradients.append(leaf.grad)
        measures.append(torch.stack([entropy, logprobs.detach()]))  # (2, C)
    hand_back()
    hidden.backward(torch.cat(gradients))
    return total, torch.cat(measures, 1)


def grpo_loss(logprobs, old, start, advantages, clip_low, clip_high, kl):
    """Per-token loss (R,). `old`: log-probabilities before the batch's first update; `start`: of the initial model, or None."""
    import torch

    ratio = torch.exp(logprobs - old)  # (R,)
    loss = -torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )  # (R,)
    if start is not None:
        difference = start - logprobs
        loss = loss + kl * (difference.exp() - difference - 1)
    return loss


def main(argv=None):
    args = parse_args(argv)
    check_out(args)
    device = set_up(args)
    choose_backend(args, device)
    import copy
    import torch
    from eval import evaluate, log_evaluation

    args.model = args.model or os.path.relpath(os.path.join(HERE, "tiny", "sft"))
    problems = load_problems(args, args.steps * args.batch)
    problems, held_out = load_held_out(args, problems)
    if args.dry_run:
        from memory import dry_run

        config, tokenizer = load_tokenizer(args.model)
        prompt = render_prompt(
            tokenizer, problem_batch(problems, 0, 1, args.seed)[0], "", args.thinking == "on"
        )
        return dry_run(
            args,
            config,
            device,
            tokenizer,
            dict(prompt=prompt),
            len(prompt) + args.max_new_tokens,
            "frozen" if args.kl else "",
        )
    model, tokenizer = load_model(args.model, load_device(device))  # in float32
    require_thinking_switch(tokenizer, args.thinking == "on")
    initial = copy.deepcopy(model).requires_grad_(False) if args.kl else None
    prepare(model, args, device)
    if args.kl:
        prepare(initial, args, device, low=True)
    sampler = make_sampler(model, tokenizer, args)
    problems = drop_long(problems, tokenizer, args, sampler.limit)
    held_out = held_out and drop_long(held_out, tokenizer, args, sampler.limit)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    student_prompt = render_prompt(
        tokenizer, problem_batch(problems, 0, 1, args.seed)[0], "", args.thinking == "on"
    )
    run = Run(args, "rlvr")
    print(f"prompt:\n{tokenizer.decode(student_prompt)}\n")
    if not args.resume:
        run.log("samples", dict(student_prompt=tokenizer.decode(student_prompt)))
    with Verifier() as verifier:
        before = evaluate(sampler, tokenizer, held_out, verifier, args) if held_out else None
        state = run.resume(problems, model, optimizer)
        drawn, skipped, updates = (state.get(name, 0) for name in ("drawn", "skipped", "updates"))
        if state:
            sampler.push(model)
        for step in range(state.get("step", 0), args.steps):
            # 1. sample, 2. verify: reward and advantage, 3. filter: groups with equal rewards say nothing
            start = time.time()
            batch = problem_batch(problems, drawn, args.batch, args.seed)
            seen = make_rollouts(
                sampler,
                tokenizer,
                [p for p in batch for _ in range(args.group)],
                args,
                seed=args.seed + drawn,
            )
            drawn += args.batch
            grade_rollouts(verifier, seen)
            rewards = [reward(r, args.length_penalty, args.max_new_tokens) for r in seen]
            kept = [
                (r, a) for r, a in zip(seen, group_advantages(rewards, args.group)) if a is not None
            ]
            sampled = time.time()

            # 4. loss: one denominator for the whole step, gradients added up over micro-batches and ranks
            tokens = sum(len(r.response_ids) for r, _ in kept)
            groups = [
                ([kept[i] for i in group], counts)
                for group, counts in deal(
                    [len(r.prompt_ids) + len(r.response_ids) for r, _ in kept], args.micro_tokens
                )
            ]
            old = [
                sampled_logprobs(model, [r for r, _ in g], args.chunk) if args.updates > 1 else None
                for g, _ in groups
            ]  # one update is on-policy: ratio 1
            for update in range(args.updates if kept else 0):
                loss, measures = 0.0, []
                for i, (group, counts) in enumerate(groups):
                    rollouts = [r for r, _ in group]
                    advantages = torch.tensor(
                        [a for r, a in group for _ in r.response_ids], device=device
                    )  # (R,)
                    first = (
                        sampled_logprobs(initial, rollouts, args.chunk) if args.kl else None
                    )  # (R,)
                    part, part_measures = rlvr_loss(
                        model,
                        rollouts,
                        advantages,
                        old[i],
                        first,
                        tokens if counts else math.inf,
                        args,
                    )
                    loss += part
                    measures += [part_measures.cpu()] if counts else []
                engine = [r.logprobs for g, counts in groups for r, _ in g if counts]
                everyone = gather([(loss, measures, engine)])  # one entry a rank
                loss, measures = (
                    sum(part for part, _, _ in everyone),
                    [m for _, rows, _ in everyone for m in rows],
                )
                if update == 0:  # the model is still the sampled one
                    gap = logprob_gap(
                        [row for _, _, rows in everyone for row in rows], torch.cat(measures, 1)[1]
                    )

                # 5. step
                norm, updated = optimizer_step(model, optimizer, args.clip)
                if not updated:
                    run.log(
                        "not_finite",
                        dict(
                            step=step + 1,
                            loss=loss,
                            grad_norm=norm,
                            rows=[
                                dict(
                                    question=r.problem.question,
                                    prompt_ids=r.prompt_ids,
                                    response_ids=r.response_ids,
                                )
                                for r, _ in kept
                            ],
                        ),
                    )
                    break
                updates += 1
            if kept:
                sampler.push(model)
            else:
                loss, norm, measures, gap, updated = 0.0, 0.0, [], None, False
            skipped = 0 if updated else skipped + 1
            log_step(
                run,
                step,
                args,
                loss,
                measures,
                gap,
                norm,
                seen,
                rewards,
                kept,
                sampled - start,
                time.time() - sampled,
                device,
            )
            if (
                held_out
                and args.eval_every
                and (step + 1) % args.eval_every == 0
                and step + 1 < args.steps
            ):
                log_evaluation(
                    run, step + 1, before, evaluate(sampler, tokenizer, held_out, verifier, args)
                )
            if args.save_every and (step + 1) % args.save_every == 0:
                save_model(os.path.join(run.path, f"step-{step + 1}"), model, tokenizer)
            if skipped == args.give_up:
                fail(
                    f"--group {args.group}: every group had equal rewards in {skipped} steps in a row (--give-up)"
                    if not kept
                    else f"loss or gradient not finite, or no group to learn from, in {skipped} steps in a row (--give-up): see {run.path}/not_finite.jsonl"
                )
            run.save_state(
                step + 1, problems, model, optimizer, drawn=drawn, skipped=skipped, updates=updates
            )
        if not updates:
            fail("no step was taken, the model is unchanged")
        save_model(run.path, model, tokenizer)
        if held_out:
            log_evaluation(
                run, args.steps, before, evaluate(sampler, tokenizer, held_out, verifier, args)
            )
    run.finish()
    print(
        f"\nrun directory {run.path}: the trained model, metrics.jsonl (a line a step), samples.jsonl (some rollouts)"
    )


def log_step(
    run,
    step,
    args,
    loss,
    measures,
    gap,
    norm,
    seen,
    rewards,
    kept,
    sampling_seconds,
    training_seconds,
    device,
):
    """One line of metrics.jsonl. Lengths in tokens; entropy and gap in nats, means over the tokens that reached the loss."""
    import torch

    count = {
        name: sum(r.outcome == name for r in seen) for name in ("correct", "incorrect", "truncated")
    }
    length = lambda rows: sum(len(r.response_ids) for r in rows) / len(rows) if rows else None
    record = dict(
        step=step + 1,
        loss=loss,
        reward=sum(rewards) / len(rewards),
        student_entropy=torch.cat(measures, 1)[0].mean().item() if kept else None,
        grad_norm=norm,
        logprob_gap=gap,
        sampled=len(seen),
        **count,
        no_answer=sum(r.reason == "no_answer" for r in seen),
        kept=len(kept),
        equal_groups=(len(seen) - len(kept)) // args.group,
        loss_tokens=sum(len(r.response_ids) for r, _ in kept),
        length=length(seen),
        length_correct=length([r for r in seen if r.outcome == "correct"]),
        sampling_seconds=sampling_seconds,
        sampled_tokens_per_second=sum(len(r.response_ids) for r in seen) / sampling_seconds,
        training_seconds=training_seconds,
        trained_tokens_per_second=sum(len(r.response_ids) for r, _ in kept) / training_seconds,
        peak_memory_mb=peak_memory(device),
    )
    run.log("metrics", record)
    for r in seen[:2]:
        run.log(
            "samples",
            dict(
                step=step + 1,
                question=r.problem.question,
                gold=r.problem.answer,
                response=r.text,
                outcome=r.outcome,
                reason=r.reason,
            ),
        )
    if not kept:
        print(f"step {step + 1}/{args.steps}  every group has equal rewards; no update", flush=True)
    elif not math.isfinite(norm):
        print(
            f"step {step + 1}/{args.steps}  loss {loss}, gradient norm {norm}: no update; the rollouts are in not_finite.jsonl",
            flush=True,
        )
    else:
        print(
            f"step {step + 1}/{args.steps}  reward {record['reward']:.3f}  correct {count['correct']}/{len(seen)}  truncated {count['truncated']}  "
            f"equal groups {record['equal_groups']}/{args.batch}  length {record['length']:.1f}  {sampling_seconds + training_seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
