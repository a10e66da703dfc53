"""Stage 3, on-policy self-distillation (OPSD): the method of the paper, whole.

The student samples responses; the verifier sorts them into correct, incorrect and truncated; the
filter keeps some; the same model, frozen and shown a privileged context c, scores the very same
tokens; the student moves towards it by a masked per-token KL (eq. 1):

    L = mean over kept y of 1/|y| sum_t KL( student(. | x, y_<t) || teacher(. | x, c, y_<t) )

Where this code departs from the paper, or fills in what it left open:
1. Truncated rollouts are a third group beside correct and incorrect: only the filters `all`,
   `not-correct` and `truncated` keep them.
2. --group N samples N responses a problem, each other's siblings (1: the paper). --resample N
   draws up to N times more until --batch x --group rollouts are kept, so that filters are compared
   at equal update size; 0 is the paper's single draw.
3. Sampling is at temperature 1, the student's own distribution (the paper: 0.7).
4. No clipping of the loss, no top-k, no loss temperature: the full distribution in float32.
5. The default context is the worked solution; the defaults are the embedded task's. The paper's:
   --lr 1e-6 --batch 32 --steps 100 --temperature 0.7 --max-new-tokens 8192 --context reflection.

Divergences, per token over the whole vocabulary v (S student, T teacher):
    reverse_kl   sum_v S log(S/T)           the paper's
    forward_kl   sum_v T log(T/S)
    jsd          beta KL(T||M) + (1-beta) KL(S||M), M = beta T + (1-beta) S
    split        reverse_kl on correct rollouts, forward_kl on the others
    rft          -log S(y_t): rejection-sampling fine-tuning on the same rollouts, a baseline

    python opsd.py --filter correct
    python opsd.py --filter correct --model MODEL --data train.jsonl --lr 1e-6 --batch 32 \\
        --max-new-tokens 8192 --out runs/mine
"""

import math
import os
import time
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

if __name__ == "__main__":
    from launch import start  # before torch: from now on Ctrl-C is one line

import torch

import data
import metrics
import ranks
import rollout
import samplers
from model import (
    backward_in_chunks,
    frozen_copy,
    load_model,
    make_optimizer,
    my_micro_batches,
    optimizer_step,
    response_hidden,
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
    parser.add_argument("--model", default=tiny("rlvr"), help="Hugging Face directory or id")
    data.add_data_flags(parser)
    first = "which rollouts train, what the teacher reads, which tokens count"
    add = parser.add_argument_group("method", first).add_argument
    add("--filter", default="correct", choices=list(FILTERS), help="rollouts that reach the loss")
    add("--group", type=int, default=1, help="responses a problem, which are siblings")
    add("--resample", type=int, default=0, help="further draws until a step is full; 0 = none")
    add("--context", default="solution", choices=list(data.CONTEXTS), help="what the teacher reads")
    rollout.add_context_flags(add)
    add("--reinject", type=int, default=0, help="of --context: tokens between recalls; 0 = off")
    add("--teacher-thinking", choices=["on", "off"], help="of its prompt (else as --thinking)")
    add("--divergence", default="reverse_kl", choices=list(DIVERGENCES), help="formulas above")
    add("--beta", type=float, default=0.5, help="of --divergence jsd: weight of the teacher")
    add("--gate", default="all", choices=list(GATES), help="tokens that count")
    unit = f"of --gate {', '.join(BOUNDED)}: in nats, or tokens from 0; FROM <= value < BELOW"
    add("--gate-range", type=float, nargs="+", metavar=("FROM", "BELOW"), help=unit)
    add("--teacher", default="frozen", choices=list(TEACHERS), help="how it follows the student")
    add("--ema", type=float, default=0.99, help="of --teacher ema: share of the old one kept")
    add("--refresh", type=int, default=10, help="of --teacher every: updates between copies")
    samplers.add_sampling_flags(parser)
    data.add_held_out_flags(parser)
    add_training_flags(parser, steps=40, batch=96, lr=1e-4, state_every=10)
    args = parser.parse_args(argv)
    if args.context == "sibling" and args.group == 1:
        fail("--context sibling: a response has siblings only with --group 2 or more")
    if args.divergence == "split" and args.filter in ("correct", "incorrect"):
        fail(f"--divergence split: --filter {args.filter} keeps one outcome only; use --filter all")
    if args.gate in BOUNDED and len(args.gate_range or ()) not in (1, 2):
        fail(f"--gate {args.gate}: needs --gate-range FROM or --gate-range FROM BELOW")
    if args.lora and args.teacher != "frozen":
        fail(f"--teacher {args.teacher}: with --lora it is the student, adapters off: frozen only")
    low, high = bounds(args)
    if low >= (min(high, args.max_new_tokens) if args.gate == "position" else high):
        fail(f"--gate-range {low} {high}: no token is in it")
    args.teacher_thinking = args.teacher_thinking or args.thinking
    return args


# ------------------------------------------------------------------------------------------------
# Filters: (rollouts of a draw, args) -> those that reach the loss, whole. A new one is an entry, as
# in each of the dicts below.


def shortest(rollouts, args):
    """Of each problem's correct responses the shortest, the first among equals."""
    best = {}
    for r in FILTERS["correct"](rollouts, args):
        best[r.problem] = min(best.get(r.problem, r), r, key=lambda r: len(r.response_ids))
    return list(best.values())


FILTERS = {
    "all": lambda rollouts, args: rollouts,
    "correct": lambda rollouts, args: [r for r in rollouts if r.outcome == "correct"],
    "incorrect": lambda rollouts, args: [r for r in rollouts if r.outcome == "incorrect"],
    "not-correct": lambda rollouts, args: [r for r in rollouts if r.outcome != "correct"],
    "truncated": lambda rollouts, args: [r for r in rollouts if r.outcome == "truncated"],
    "shortest": shortest,
}

# ------------------------------------------------------------------------------------------------
# The teacher: what it reads, and how it follows the student

RECALL = "\n\nActually, I recall:\n{context}\nContinuing from this.\n\n"


def teacher_row(prompt, response, recall=(), every=0):
    """The teacher's row (see model.response_hidden): its prompt and the student's response.

    With `every` the ids `recall` stand again before each further `every` response tokens
    (reinjection, table 5). They are read, not scored: no response token is moved or added.
    """
    if not every:
        return [prompt, response]
    row = [prompt, response[:every]]
    for first in range(every, len(response), every):
        row += [list(recall), response[first : first + every]]
    return row


def add_teacher_rows(rollouts, contexts, tokenizer, args, limit):
    """(the rollouts that now have a teacher row, the number of those that failed): a context that
    is None, or a row that exceeds the model's context of `limit` tokens; nothing is cut.
    """
    layout = args.teacher_thinking == "on", args.context_first
    kept = []
    for r, context in zip(rollouts, contexts, strict=True):
        if context is None:
            continue
        prompt = data.render_prompt(tokenizer, r.problem, context, *layout)
        recall = data.plain(tokenizer, RECALL.format(context=context)) if context else ""
        recall = tokenizer(recall, add_special_tokens=False).input_ids
        r.teacher_row = teacher_row(prompt, r.response_ids, recall, args.reinject)
        if not limit or sum(map(len, r.teacher_row)) <= limit:
            kept.append(r)
    return kept, len(rollouts) - len(kept)


def move_weights(teacher, student, keep=0.0):
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.to(old.dtype), 1 - keep)


# (teacher, student, step, args) -> None, after each update. The teacher is a copy (with --lora the
# student itself, adapters off); `step` is what the step's record has by then: see step_record.
TEACHERS = {
    "frozen": lambda teacher, student, step, args: None,
    "current": lambda teacher, student, step, args: move_weights(teacher, student),
    "ema": lambda teacher, student, step, args: move_weights(teacher, student, args.ema),
    "every": lambda teacher, student, step, args: (
        move_weights(teacher, student) if step["updates"] % args.refresh == 0 else None
    ),
}

# ------------------------------------------------------------------------------------------------
# What a token contributes. Axes: P tokens, V vocabulary. Divergences and gates are functions
# (student_logps (P, V), teacher_logps (P, V), tokens, args) -> (P,); s and t in the dicts.


class Tokens(NamedTuple):
    """What is known of each response token, (P,) each."""

    ids: torch.Tensor  # the sampled ids
    outcome: torch.Tensor  # its rollout's, as the index in rollout.OUTCOMES: 0 is correct
    advantage: torch.Tensor  # its rollout's, 0 unless you set it
    position: torch.Tensor  # in its response, from 0
    weight: torch.Tensor  # in the step's loss
    tag: torch.Tensor  # the number that somebody put into its rollout's `tags`; 0 without


def tokens_of(rollouts, device):
    """The Tokens of all responses, one after the other."""
    rows = [
        (token, rollout.OUTCOMES.index(r.outcome), r.advantage, position, r.weight, tag)
        for r in rollouts
        for position, (token, tag) in enumerate(
            zip(r.response_ids, r.tags or repeat(0), strict=False)
        )
    ]
    return Tokens(*(torch.tensor(column, device=device) for column in zip(*rows, strict=True)))


# Divergences, in nats. The KLs are written with the extra terms -P + Q, which sum to zero: where
# both distributions are equal the value and the gradient are then exactly 0, not a rounding error.


def kl(p, q):
    """KL(P || Q) = sum_v P log(P/Q) of log-probabilities p and q (P, V): (P,)."""
    return (p.exp() * (p - q - 1) + q.exp()).sum(-1)


def jsd(student_logps, teacher_logps, tokens, args):
    of_teacher, of_student = math.log(args.beta), math.log(1 - args.beta)
    mixture = torch.logaddexp(teacher_logps + of_teacher, student_logps + of_student)  # (P, V)
    return args.beta * kl(teacher_logps, mixture) + (1 - args.beta) * kl(student_logps, mixture)


def split(student_logps, teacher_logps, tokens, args):
    reverse, forward = kl(student_logps, teacher_logps), kl(teacher_logps, student_logps)
    return torch.where(tokens.outcome == 0, reverse, forward)


DIVERGENCES = {
    "reverse_kl": lambda s, t, tokens, args: kl(s, t),
    "forward_kl": lambda s, t, tokens, args: kl(t, s),
    "jsd": jsd,
    "split": split,
    "rft": lambda s, t, tokens, args: -sampled(s, tokens),
}


# Gates: a factor in [0, 1] on each token's divergence, without gradient. Weights and denominators
# stay as they are. AdamW does not see that less is left: its step has the usual length.


def sampled(logps, tokens):
    """Of log-probabilities (P, V) those of the sampled ids: (P,)."""
    return logps.gather(-1, tokens.ids[:, None])[:, 0]


def entropy(logps):
    """Of log-probabilities (P, V), in nats: (P,)."""
    return -torch.linalg.vecdot(logps.exp(), logps)


def bounds(args):
    """FROM and BELOW of --gate-range."""
    return [*(args.gate_range or [0]), math.inf][:2]


def within(values, args):
    """1 where --gate-range has the value. From 0 on is all of them: rounding may be below it."""
    low, high = bounds(args)
    return ((values >= (low or -math.inf)) & (values < high)).float()


GATES = {
    "all": lambda s, t, tokens, args: torch.ones_like(tokens.weight),
    "student-entropy": lambda s, t, tokens, args: within(entropy(s), args),
    "teacher-entropy": lambda s, t, tokens, args: within(entropy(t), args),
    "gap": lambda s, t, tokens, args: within(kl(s, t), args),
    "position": lambda s, t, tokens, args: within(tokens.position, args),
    # The teacher's best token is the one that the student wrote.
    "agreement": lambda s, t, tokens, args: (t.argmax(-1) == tokens.ids).float(),
}
BOUNDED = ("student-entropy", "teacher-entropy", "gap", "position")  # they call `within`


def token_loss(student_logps, teacher_logps, tokens, args):
    """(each token's share of the step's loss (P,), its measures {name: (P,)}).

    The mean of each measure is logged under its name.
    """
    inputs = student_logps, teacher_logps, tokens, args
    with torch.no_grad():
        gate = GATES[args.gate](*inputs)  # (P,)
        measures = dict(measure(*inputs), gate=gate)
    return DIVERGENCES[args.divergence](*inputs) * gate * tokens.weight, measures


def measure(s, t, tokens, args):
    """What is logged of each token, in nats (P,); logp: the student's of the sampled id."""
    p, q, dot = s.exp(), t.exp(), torch.linalg.vecdot
    ps, pt, qs, qt = dot(p, s), dot(p, t), dot(q, s), dot(q, t)  # (P,)
    measures = dict(reverse_kl=ps - pt, forward_kl=qt - qs, student_entropy=-ps)
    return dict(measures, teacher_entropy=-qt, logp=sampled(s, tokens))


# ------------------------------------------------------------------------------------------------
# The loss of a step. Axes: R response tokens of a micro-batch, D width.


def opsd_loss(student, teacher, rollouts, args):
    """The loss of one micro-batch, its gradient added to the student's: (loss, {name: (R,)}).

    student's row: prompt x      | response y | padding     scored: the positions that predict y
    teacher's row: prompt x, c     | response y | padding   (the mask: model.response_hidden)
    """
    with torch.no_grad():  # inference mode fails under FSDP2 on one rank
        teacher_hidden = response_hidden(teacher, [r.teacher_row for r in rollouts])  # (R, D)
    tokens = tokens_of(rollouts, teacher_hidden.device)
    rows = [r.row for r in rollouts]
    return backward_in_chunks(student, rows, token_loss, tokens, args, teacher, teacher_hidden)


def accumulate_gradients(student, teacher, rollouts, args):
    """The whole step's loss; gradients add up over micro-batches and ranks.

    Each rollout gets its measures, {name: (tokens,)}.
    """
    for r in rollouts:  # the one denominator: eq. 1's, over the whole step
        r.weight = 1 / (len(rollouts) * len(r.response_ids))
    lengths = [sum(map(len, r.teacher_row)) for r in rollouts]  # at least the student's
    parts = []
    for group, counts in progress(my_micro_batches(lengths, args.micro_tokens), "training"):
        micro = [rollouts[i] for i in group]
        if not counts:  # this rank runs along with the others
            micro = [replace(r, weight=0.0) for r in micro]
        loss, measures = opsd_loss(student, teacher, micro, args)
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
    problems = data.load_problems(args, planned * args.batch * (args.resample + 1))
    problems, held_out = data.load_held_out(args, problems)
    data.require_parts(problems, args.context)
    model, tokenizer = load_model(args.model, ranks.load_device(device))  # in float32
    data.require_thinking_switch(tokenizer, args.thinking == "on")
    data.require_thinking_switch(tokenizer, args.teacher_thinking == "on", "--teacher-thinking")
    identity = fingerprint([*problems, *held_out], model)
    ranks.prepare(model, args, device)
    # An average in bfloat16 would stand still: its changes are lost to rounding.
    low = args.teacher in ("frozen", "current", "every")
    teacher = frozen_copy(model, args, device, low)
    sampler = samplers.make_sampler(model, tokenizer, args)
    teacher_sampler = samplers.make_sampler(teacher, tokenizer, args, sampler)
    problems = rollout.drop_long(problems, tokenizer, args, sampler.limit, args.context)
    optimizer = make_optimizer(model, args)
    verifier = Verifier()
    held_out = metrics.HeldOut(sampler, tokenizer, held_out, verifier, args)
    with verifier, Run(args, f"opsd-{args.filter}", identity, state) as run:
        print(f"{len(problems):,} problems, device {device}, run directory {run.path}")
        first = run.resume(model, optimizer)
        drawn, kls = state.get("drawn", 0), state.get("kls", [])
        if followed := state.pop("teacher", None):
            ranks.load_full_state(teacher, followed)
        if state:
            sampler.push(model)
        for step in range(first, args.steps):
            begun, seen, kept = time.time(), [], []
            for _ in range(args.resample + 1):
                # 1. sample, 2. verify
                batch = data.problem_batch(problems, drawn, args.batch, args.seed)
                batch = [problem for problem in batch for _ in range(args.group)]
                draw = sampler, tokenizer, batch, args, args.seed + drawn
                rollouts = rollout.make_rollouts(*draw, logps=True)
                rollout.grade_rollouts(verifier, rollouts)
                # 3. filter
                seen += rollouts
                kept += FILTERS[args.filter](rollouts, args)
                drawn += args.batch
                if len(kept) >= len(batch):
                    break
            kept, trained_from = kept[: len(batch)], time.time()
            # 4. loss: the teacher reads the same tokens behind its own prompt
            write = rollout.make_writer(teacher_sampler, tokenizer, args, args.seed + drawn)
            contexts = data.CONTEXTS[args.context](kept, write, args)
            kept, failed = add_teacher_rows(kept, contexts, tokenizer, args, sampler.limit)
            if kept and not run.updates:
                rollout.show_prompts(run, tokenizer, kept[0], step + 1)
            loss = accumulate_gradients(model, teacher, kept, args)
            # 5. step
            norm, updated = optimizer_step(model, optimizer) if kept else (0.0, False)
            record = step_record(step + 1, run.updates + updated, loss, norm, kept, failed)
            if updated:
                kls.append(record["reverse_kl"])
                record["kl_share"] = metrics.kl_share(kls)
                TEACHERS[args.teacher](teacher, model, record, args)
                sampler.push(model)
            seconds = trained_from - begun, time.time() - trained_from
            record.update(rollout.rollout_metrics(seen, kept, *seconds, device))
            log_step(run, record, args, seen, kept)
            run.count_update(updated, "" if kept else "--filter and --context left nothing")
            held_out.evaluate(run, step + 1)
            if args.save_every and (step + 1) % args.save_every == 0:
                save_model(os.path.join(run.path, f"step-{step + 1}"), model, tokenizer)
            follows = None if args.teacher == "frozen" else teacher
            run.save_state(step + 1, model, optimizer, follows, drawn=drawn, kls=kls)
        if not run.updates:
            fail("no step was taken, the model is unchanged")
        held_out.evaluate(run, args.steps, last=True)
        save_model(run.path, model, tokenizer)
        run.finish(metrics.settled(kls))


def step_record(step, updates, loss, norm, kept, failed):
    """What metrics.jsonl says of a step's loss; docs/runs.md explains each key."""
    record = dict(step=step, updates=updates, loss=loss, grad_norm=norm, context_failed=failed)
    return dict(record, **rollout.measure_metrics(kept), **rollout.gate_metrics(kept))


def log_step(run, record, args, seen, kept):
    """One line of metrics.jsonl, and one on the screen; two rollouts in samples.jsonl."""
    run.log("metrics", record)
    for line in rollout.sample_lines(record["step"], seen, kept):
        run.log("samples", line)
    begin = f"step {record['step']}/{args.steps}  "
    if not kept:
        failed = f"{record['context_failed']} contexts failed or were too long"
        print(f"{begin}--filter and --context left nothing ({failed}); no update", flush=True)
    elif not math.isfinite(record["grad_norm"]):
        rollout.log_not_finite(run, begin, record, kept)
    else:
        print(
            f"{begin}loss {record['loss']:.4f}  correct {record['correct']}/{len(seen)}  "
            f"truncated {record['truncated']}  kept {len(kept)}  length {record['length']:.1f}  "
            f"{record['sampling_seconds'] + record['training_seconds']:.1f} s",
            flush=True,
        )
        bins = rollout.kl_by_position(kept, args.max_new_tokens)
        run.log("kl_by_position", dict(step=record["step"], **bins))


if __name__ == "__main__":
    start(main)
