"""Stage 2, reinforcement learning with verifiable rewards (RLVR): GRPO with verify.py's reward.

1. Reward 1 for a correct response, else 0; truncated responses get 0. --length-penalty P makes it
   1 - P x length / cap for correct ones: the length-penalised baseline.
2. Advantage: reward minus the mean of its group (the responses to one problem), over the group's
   standard deviation. Groups with equal rewards carry no signal: they are skipped and counted.
3. Loss: mean over all response tokens of the step (one denominator, as in DAPO), so long responses
   are not discounted.
4. One update a batch: it is exactly on-policy, the ratio is 1 and there is nothing to clip.
5. --kl adds KL(policy || start), estimated per token by exp(d) - d - 1, d = log start - log policy.

    python rlvr.py --out tiny/rlvr
    python rlvr.py --model MODEL --data train.jsonl --lr 1e-6 --max-new-tokens 8192 --out runs/rlvr
"""

import math
import os
import time
from dataclasses import replace
from typing import NamedTuple

if __name__ == "__main__":
    from launch import start  # before torch: from now on Ctrl-C is one line

import torch

import data
import ranks
import rollout
import samplers
from metrics import HeldOut
from model import (
    backward_in_chunks,
    frozen_copy,
    load_model,
    make_optimizer,
    my_micro_batches,
    optimizer_step,
    sampled_logps,
    save_model,
)
from run import (
    Parser,
    Run,
    add_training_flags,
    check_run_directory,
    fail,
    fingerprint,
    progress,
    set_up,
    tiny,
)
from verify import Verifier


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default=tiny("sft"), help="Hugging Face directory or id")
    data.add_data_flags(parser)
    add = parser.add_argument_group("method", "how a group is rewarded").add_argument
    add("--group", type=int, default=8, help="responses a problem")
    add("--length-penalty", type=float, default=0.0, help="share of a reward lost at the cap")
    add("--kl", type=float, default=0.0, help="weight of the KL to the start; 0 = no such model")
    samplers.add_sampling_flags(parser)
    data.add_held_out_flags(parser)
    add_training_flags(parser, steps=40, batch=32, lr=7e-5, state_every=10)
    args = parser.parse_args(argv)
    if args.group < 2:
        fail(f"--group {args.group}: at least 2, since the advantage is relative to the group")
    return args


# ------------------------------------------------------------------------------------------------
# Reward and advantage


def reward(rollout, length_penalty, cap):
    if rollout.outcome != "correct":
        return 0.0
    return 1 - length_penalty * len(rollout.response_ids) / cap


def group_advantages(rewards, group):
    """Advantages of groups of `group` consecutive rewards; None in a group with equal rewards."""
    advantages = []
    for first in range(0, len(rewards), group):
        values = rewards[first : first + group]
        mean = sum(values) / group
        deviation = (sum((v - mean) ** 2 for v in values) / group) ** 0.5
        advantages += [(v - mean) / deviation if deviation > 1e-6 else None for v in values]
    return advantages


# ------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, V vocabulary, P tokens of a piece.


class Tokens(NamedTuple):
    """What is known of each response token, (P,) each."""

    ids: torch.Tensor  # the sampled ids
    advantage: torch.Tensor  # its rollout's
    weight: torch.Tensor  # in the step's loss
    start_logps: torch.Tensor | None  # the initial model's; None without --kl


def token_loss(student_logps, _, tokens, args):
    """(each token's share of the step's loss (P,), its measures {name: (P,)} in nats)."""
    logps = student_logps.gather(-1, tokens.ids[:, None])[:, 0]  # (P,)
    ratio = torch.exp(logps - logps.detach())  # 1, with the gradient of the log-probability
    loss = -ratio * tokens.advantage  # (P,)
    if tokens.start_logps is not None:
        difference = tokens.start_logps - logps
        loss = loss + args.kl * (difference.exp() - difference - 1)
    with torch.no_grad():
        entropy = -(student_logps.exp() * student_logps).sum(-1)  # (P,)
    return loss * tokens.weight, dict(student_entropy=entropy, logp=logps.detach())


def rlvr_loss(model, start_model, rollouts, args):
    """The loss of one micro-batch, its gradient added to the model's: (loss, {name: (R,)}).

    Each rollout carries its advantage and weight.
    """
    rows = [r.row for r in rollouts]
    known = [(token, r.advantage, r.weight) for r in rollouts for token in r.response_ids]
    device = ranks.device_of(model)
    columns = [torch.tensor(column, device=device) for column in zip(*known, strict=True)]  # (R,)
    start_logps = sampled_logps(start_model, rows) if start_model else None  # (R,)
    return backward_in_chunks(model, rows, token_loss, Tokens(*columns, start_logps), args)


def accumulate_gradients(model, start_model, rollouts, args):
    """The whole step's loss; gradients add up over micro-batches and ranks.

    Each rollout gets its measures, {name: (tokens,)}.
    """
    tokens = rollout.tokens(rollouts)  # the one denominator: all tokens of the step
    for r in rollouts:
        r.weight = 1 / tokens
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    parts = []
    for group, counts in progress(my_micro_batches(lengths, args.micro_tokens), "training"):
        micro = [rollouts[i] for i in group]
        if not counts:  # this rank runs along with the others
            micro = [replace(r, weight=0.0) for r in micro]
        loss, measures = rlvr_loss(model, start_model, micro, args)
        if counts:
            parts.append((group, loss, measures))
    return rollout.hand_out(rollouts, parts)


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    samplers.choose_backend(args, device)
    state = check_run_directory(args)
    planned = state.get("planned", args.steps)  # a longer run goes on with the same problems
    problems = data.load_problems(args, planned * args.batch)
    problems, held_out = data.load_held_out(args, problems)
    model, tokenizer = load_model(args.model, ranks.load_device(device))  # in float32
    data.require_thinking_switch(tokenizer, args.thinking == "on")
    identity = fingerprint([*problems, *held_out], model)
    ranks.prepare(model, args, device)
    start_model = frozen_copy(model, args, device) if args.kl else None
    sampler = samplers.make_sampler(model, tokenizer, args)
    problems = rollout.drop_long(problems, tokenizer, args, sampler.limit)
    optimizer = make_optimizer(model, args)
    verifier = Verifier()
    held_out = HeldOut(sampler, tokenizer, held_out, verifier, args)
    with verifier, Run(args, "rlvr", identity, state) as run:
        print(f"{len(problems):,} problems, device {device}, run directory {run.path}")
        first, drawn = run.resume(model, optimizer), state.get("drawn", 0)
        if state:
            sampler.push(model)
        for step in range(first, args.steps):
            begun = time.time()
            # 1. sample, 2. verify
            batch = data.problem_batch(problems, drawn, args.batch, args.seed)
            batch = [problem for problem in batch for _ in range(args.group)]
            draw = sampler, tokenizer, batch, args, args.seed + drawn
            seen = rollout.make_rollouts(*draw, logps=True)
            rollout.grade_rollouts(verifier, seen)
            drawn += args.batch
            if not run.updates:
                rollout.show_prompts(run, tokenizer, seen[0], step + 1)
            # 3. filter: groups with equal rewards say nothing
            rewards = [reward(r, args.length_penalty, args.max_new_tokens) for r in seen]
            for r, advantage in zip(seen, group_advantages(rewards, args.group), strict=True):
                r.advantage = advantage
            kept, trained_from = [r for r in seen if r.advantage is not None], time.time()
            # 4. loss: gradients add up over micro-batches and ranks
            loss = accumulate_gradients(model, start_model, kept, args)
            # 5. step
            norm, updated = optimizer_step(model, optimizer) if kept else (0.0, False)
            if updated:
                sampler.push(model)
            seconds = trained_from - begun, time.time() - trained_from
            log_step(run, step + 1, args, loss, norm, seen, rewards, kept, seconds, device)
            equal = f"--group {args.group}: every group had equal rewards"
            run.count_update(updated, "" if kept else equal)
            held_out.evaluate(run, step + 1)
            if args.save_every and (step + 1) % args.save_every == 0:
                save_model(os.path.join(run.path, f"step-{step + 1}"), model, tokenizer)
            run.save_state(step + 1, model, optimizer, drawn=drawn)
        if not run.updates:
            fail("no step was taken, the model is unchanged")
        held_out.evaluate(run, args.steps, last=True)
        save_model(run.path, model, tokenizer)
        run.finish()


# ------------------------------------------------------------------------------------------------


def log_step(run, step, args, loss, norm, seen, rewards, kept, seconds, device):
    """One line of metrics.jsonl, and one on the screen; docs/runs.md explains each key."""
    equal = (len(seen) - len(kept)) // args.group
    record = dict(step=step, loss=loss, reward=sum(rewards) / len(rewards), grad_norm=norm)
    record.update(rollout.measure_metrics(kept), equal_groups=equal)
    record.update(rollout.rollout_metrics(seen, kept, *seconds, device))
    run.log("metrics", record)
    for line in rollout.sample_lines(step, seen, kept):
        run.log("samples", line)
    begin = f"step {step}/{args.steps}  "
    if not kept:
        print(f"{begin}every group has equal rewards; no update", flush=True)
    elif not math.isfinite(norm):
        rollout.log_not_finite(run, begin, record, kept)
    else:
        print(
            f"{begin}reward {record['reward']:.3f}  correct {record['correct']}/{len(seen)}  "
            f"truncated {record['truncated']}  equal groups {equal}/{args.batch}  "
            f"length {record['length']:.1f}  {sum(seconds):.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    start(main)
