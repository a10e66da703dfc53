"""Stage 3, on-policy self-distillation (OPSD): the method of the paper.

The student samples responses; the verifier sorts them into correct, incorrect and truncated; the
filter keeps some; the same model, frozen and shown a privileged context c, scores the very same
tokens; the student moves towards it by a masked per-token KL (eq. 1):

    L = mean over kept y of 1/|y| sum_t KL( student(. | x, y_<t) || teacher(. | x, c, y_<t) )

Divergences, per token over the whole vocabulary v (S student, T teacher):
    reverse_kl   sum_v S log(S/T)           the paper's
    forward_kl   sum_v T log(T/S)
    jsd          beta KL(T||M) + (1-beta) KL(S||M), M = beta T + (1-beta) S
    split        reverse_kl on correct rollouts, forward_kl on the others
    rft          -log S(y_t): rejection-sampling fine-tuning on the same rollouts, a baseline
losses.py has them, and the gates: a factor in [0, 1] on each token's divergence.

Where this code departs from the paper, or fills in what it left open:
1. Truncated rollouts are a third group beside correct and incorrect: the filters `all` and
   `not-correct` keep them.
2. --resample N draws again until --batch rollouts are kept, so that filters are compared at equal
   update size; 0 is the paper's single draw.
3. Sampling is at temperature 1, the student's own distribution (the paper: 0.7).
4. No clipping, no top-k, no loss temperature: the full distribution in float32.
5. The default context is the worked solution; the defaults are the embedded task's. The paper's:
   --lr 1e-6 --batch 32 --steps 100 --temperature 0.7 --max-new-tokens 8192 --context reflection.

    python opsd.py --filter correct
    python opsd.py --filter correct --model MODEL --data train.jsonl --lr 1e-6 --batch 32 \\
        --max-new-tokens 8192 --out runs/mine
"""

import copy
import math
import os
import time

import torch

import data
import losses
import ranks
import rollout
import samplers
import toy
from cli import Parser, add_training_flags, fail, progress, set_up, start, tiny
from data import CONTEXTS
from eval import HeldOut
from losses import DIVERGENCES, GATES, MEASURES, WEIGHTS, Tokens, gate_metrics, measure
from model import (
    backward_in_chunks,
    load_model,
    make_optimizer,
    my_micro_batches,
    optimizer_step,
    response_hidden,
    response_targets,
    sampled_logps,
    save_model,
)
from rollout import rollout_metrics
from run import Run, check_run_directory
from verify import Verifier


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default=tiny("rlvr"), help="Hugging Face directory or id")
    add = parser.add_argument_group("method").add_argument
    add("--filter", default="correct", choices=list(FILTERS), help="rollouts that reach the loss")
    add("--resample", type=int, default=0, help="further draws until --batch are kept; 0 = none")
    add("--context", default="solution", choices=list(CONTEXTS), help="what the teacher reads too")
    rollout.add_context_flags(add)
    add("--reinject", type=int, default=0, help="tokens between recalls (table 5: 2048); 0 = off")
    add("--divergence", default="reverse_kl", choices=list(DIVERGENCES), help="formulas above")
    add("--beta", type=float, default=0.5, help="of jsd: weight of the teacher in the mixture")
    losses.add_gate_flags(add)
    add("--weights", default="equal", choices=list(WEIGHTS), help="factor on each outcome's loss")
    add(
        "--mean",
        default="response",
        choices=["response", "token"],
        help="over responses of their token means (eq. 1), or over all tokens of the step",
    )
    add("--teacher-thinking", choices=["on", "off"], help="of its prompt (else as --thinking)")
    add("--teacher", default="frozen", choices=list(TEACHERS), help="how it follows the student")
    add("--ema", type=float, default=0.99, help="of --teacher ema: share of the old one kept")
    add("--refresh", type=int, default=10, help="of --teacher every: updates between copies")
    add("--kl-by-position", type=int, default=0, help="tokens a bin of figure 2's log; 0 = off")
    add_training_flags(parser, steps=40, batch=96, lr=1e-4, state_every=10)
    data.add_data_flags(parser)
    samplers.add_sampling_flags(parser)
    data.add_held_out_flags(parser)
    args = parser.parse_args(argv)
    if not 0 < args.beta < 1:
        fail(f"--beta {args.beta}: strictly between 0 and 1 (jsd tends to 0 at both ends)")
    if args.ema >= 1:
        fail(f"--ema {args.ema}: below 1")
    one = f"--filter {args.filter} keeps one outcome only; use --filter all"
    several = args.filter in ("all", "not-correct")
    if args.divergence == "split" and not several:
        fail(f"--divergence split: {one}")
    if args.weights != "equal" and not several:
        fail(f"--weights {args.weights}: {one}")
    losses.settle_gates(args)
    args.teacher_thinking = args.teacher_thinking or args.thinking
    return args


# ------------------------------------------------------------------------------------------------
# Filters: correctness gates states (whole rollouts), not token targets. A new one is an entry.

FILTERS = {
    "all": lambda r, args: True,
    "correct": lambda r, args: r.outcome == "correct",
    "incorrect": lambda r, args: r.outcome == "incorrect",
    "not-correct": lambda r, args: r.outcome != "correct",
}

# ------------------------------------------------------------------------------------------------
# The loss


def token_weights(rollouts, mean):
    """Weight of each response token in the step's loss, a list a rollout. They sum to 1.

    response: 1 / (responses x tokens of this response), eq. 1. token: 1 / (tokens of all).
    """
    lengths = [len(r.response_ids) for r in rollouts]
    if mean == "token":
        return [[1 / sum(lengths)] * length for length in lengths]
    return [[1 / (len(rollouts) * length)] * length for length in lengths]


def opsd_loss(student, teacher, rollouts, args):
    """The loss of one micro-batch, its gradient added to the student's: (loss, measures (M, R)).

    Each rollout carries its weights and what `read_by_teacher` gave it.
    """
    rows = [r.row for r in rollouts]
    ids = response_targets(student, rows)  # (R,)

    def of_tokens(values):
        return torch.tensor([v for row in values for v in row], device=ids.device)  # (R,)

    oracle = rollouts[0].token_classes is not None
    tokens = Tokens(
        ids=ids,
        correct=of_tokens([r.outcome == "correct"] * len(r.response_ids) for r in rollouts),
        advantage=of_tokens([r.advantage] * len(r.response_ids) for r in rollouts),
        position=of_tokens(range(len(r.response_ids)) for r in rollouts),
        weight=of_tokens(r.weights for r in rollouts),
        control=torch.cat([r.control_logps for r in rollouts]) if args.contrast else None,
        token_class=of_tokens(r.token_classes for r in rollouts) if oracle else None,
    )

    def token_loss(student_logps, teacher_logps, piece):
        part = Tokens(*(column if column is None else column[piece] for column in tokens))
        with torch.no_grad():
            gates = [GATES[name](student_logps, teacher_logps, part, args) for name in args.gate]
            gate = torch.stack(gates).amax(0)  # (P,)
            measures = measure(student_logps, teacher_logps, part.ids, gate)  # (M, P)
        divergence = DIVERGENCES[args.divergence](student_logps, teacher_logps, part, args)  # (P,)
        return divergence * gate * part.weight, measures

    teacher_hidden = torch.cat([r.teacher_hidden for r in rollouts])  # (R, D)
    return backward_in_chunks(student, rows, token_loss, teacher, teacher_hidden)


def accumulate_gradients(student, teacher, rollouts, args):
    """The whole step's loss; gradients add up over micro-batches and ranks.

    Each rollout gets its measures, (M, tokens).
    """
    factors = WEIGHTS[args.weights]
    for r, weights in zip(rollouts, token_weights(rollouts, args.mean), strict=True):
        factor = factors.get(r.outcome, 1.0)
        r.weights = [w * factor for w in weights]  # one denominator, before the loop
    loss, measures = 0.0, {}
    groups = my_micro_batches(teacher_lengths(rollouts), args.micro_tokens)
    for group, counts in progress(groups, "training"):
        micro = [rollouts[i] for i in group]
        if not counts:  # this rank runs along with the others
            micro = [copy.copy(r) for r in micro]
            for r in micro:
                r.weights = [0.0] * len(r.response_ids)
        micro_loss, micro_measures = opsd_loss(student, teacher, micro, args)
        if counts:
            loss += micro_loss
            lengths = [len(r.response_ids) for r in micro]
            measures.update(zip(group, micro_measures.cpu().split(lengths, 1), strict=True))
    for r in rollouts:
        r.teacher_hidden = None  # memory
    return rollout.hand_out(rollouts, loss, measures)


# ------------------------------------------------------------------------------------------------
# The teacher

RECALL = "\n\nActually, I recall:\n{context}\nContinuing from this.\n\n"


def teacher_row(prompt, response, recall=(), every=0):
    """The teacher's row (see response_hidden): its prompt and the response.

    With `every` the ids `recall` stand again before each further `every` response tokens
    (reinjection, table 5). They are read, not scored: no response token is moved or added.
    """
    if not every:
        return [prompt, response]
    row = [prompt, response[:every]]
    for first in range(every, len(response), every):
        row += [list(recall), response[first : first + every]]
    return row


def add_teacher_rows(rollouts, contexts, tokenizer, args, limit, controls=None):
    """(the rollouts that now have a teacher row, the number of those that failed): a context that
    is None, or a row that exceeds the model's context of `limit` tokens; nothing is cut.

    controls: the contexts of the second teacher of --gate contrast, if any; likewise.
    """
    kept = []
    for r, context, control in zip(rollouts, contexts, controls or contexts, strict=True):
        if context is None or control is None:
            continue
        r.teacher_row = row_behind(context, r, tokenizer, args)
        r.control_row = row_behind(control, r, tokenizer, args) if controls else None
        if not limit or max(teacher_lengths([r])) <= limit:
            kept.append(r)
    return kept, len(rollouts) - len(kept)


def row_behind(context, r, tokenizer, args):
    """The teacher's row of a rollout, its prompt holding `context`."""
    layout = args.teacher_thinking == "on", args.context_first
    prompt = data.render_prompt(tokenizer, r.problem, context, *layout)
    recall = data.plain(tokenizer, RECALL.format(context=context)) if context else ""
    recall = tokenizer(recall, add_special_tokens=False).input_ids
    return teacher_row(prompt, r.response_ids, recall, args.reinject)


def teacher_lengths(rollouts):
    """Tokens of each teacher's row, or of the second teacher's where that is longer."""
    pairs = [(r.teacher_row, r.control_row or []) for r in rollouts]
    return [max(sum(map(len, row)) for row in pair) for pair in pairs]


def add_token_classes(rollouts, tokenizer, args):
    """What the oracle gates know of each token; nothing without such a gate."""
    if toy.ORACLES.keys() & set(args.gate):
        for r in rollouts:
            texts = [tokenizer.decode([token]) for token in r.response_ids]
            r.token_classes = toy.token_classes(r.problem, texts)


def read_by_teacher(teacher, rollouts, args):
    """Gives this rank's rollouts the teacher's hidden states at the response tokens, (tokens, D).

    With --contrast also its log-probabilities of them when it reads the control's row, (tokens,).
    All of the step's rows are read before any is trained on.
    """
    with torch.no_grad():  # inference mode fails under FSDP2 on one rank
        for group, _ in my_micro_batches(teacher_lengths(rollouts), args.micro_tokens):
            part = [rollouts[i] for i in group]
            lengths = [len(r.response_ids) for r in part]
            hidden = response_hidden(teacher, [r.teacher_row for r in part])  # (R, D)
            for r, states in zip(part, hidden.split(lengths), strict=True):
                r.teacher_hidden = states
            if args.contrast:
                logps = sampled_logps(teacher, [r.control_row for r in part])  # (R,)
                for r, values in zip(part, logps.split(lengths), strict=True):
                    r.control_logps = values


def frozen_copy(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


def move_weights(teacher, student, keep=0.0):
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.to(old.dtype), 1 - keep)


# Called after each update with the number of updates so far. The teacher is always its own copy.
TEACHERS = {
    "frozen": lambda teacher, student, updates, args: None,
    "current": lambda teacher, student, updates, args: move_weights(teacher, student),
    "ema": lambda teacher, student, updates, args: move_weights(teacher, student, args.ema),
    "every": lambda teacher, student, updates, args: (
        move_weights(teacher, student) if updates % args.refresh == 0 else None
    ),
}

# ------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    samplers.choose_backend(args, device)
    state = check_run_directory(args)
    planned = state.get("planned", args.steps)  # a longer run goes on with the same problems
    problems = data.load_problems(args, planned * args.batch * (args.resample + 1))
    problems, held_out = data.load_held_out(args, problems)
    data.require_solutions(problems, args.context)
    data.require_solutions(problems, args.contrast, "--contrast")
    model, tokenizer = load_model(args.model, ranks.load_device(device))  # in float32
    data.require_thinking_switch(tokenizer, args.thinking == "on")
    data.require_thinking_switch(tokenizer, args.teacher_thinking == "on", "--teacher-thinking")
    teacher = frozen_copy(model)
    ranks.prepare(model, args, device)
    # EMA weights in bfloat16 would stand still: their changes are lost to rounding.
    ranks.prepare(teacher, args, device, low=args.teacher != "ema")
    sampler = samplers.make_sampler(model, tokenizer, args)
    teacher_sampler = samplers.make_sampler(teacher, tokenizer, args, sampler)
    problems = rollout.drop_long(problems, tokenizer, args, sampler.limit, args.context)
    optimizer = make_optimizer(model, args)
    verifier = Verifier()
    held_out = HeldOut(sampler, tokenizer, held_out, verifier, args)
    with verifier, Run(args, f"opsd-{args.filter}", problems, state) as run:
        print(f"{len(problems):,} problems, device {device}, run directory {run.path}")
        first, drawn = run.resume(model, optimizer), state.get("drawn", 0)
        if state.get("teacher"):
            ranks.load_full_state(teacher, state["teacher"])
        if state:
            sampler.push(model)
        for step in range(first, args.steps):
            begun, seen, kept = time.time(), [], []
            for _ in range(args.resample + 1):
                # 1. sample, 2. verify
                batch = data.problem_batch(problems, drawn, args.batch, args.seed)
                draw = sampler, tokenizer, batch, args, args.seed + drawn
                rollouts = rollout.make_rollouts(*draw, logps=True)
                rollout.grade_rollouts(verifier, rollouts)
                # 3. filter: correctness gates whole rollouts
                seen += rollouts
                kept += [r for r in rollouts if FILTERS[args.filter](r, args)]
                drawn += args.batch
                if len(kept) >= args.batch:
                    break
            kept, sampled = kept[: args.batch], time.time()
            # 4. the teacher reads the same tokens behind its own prompt
            write = rollout.make_writer(teacher_sampler, tokenizer, args, args.seed + drawn)
            contexts = CONTEXTS[args.context](kept, write, args)
            controls = args.contrast and CONTEXTS[args.contrast](kept, write, args)
            kept, failed = add_teacher_rows(
                kept, contexts, tokenizer, args, sampler.limit, controls
            )
            add_token_classes(kept, tokenizer, args)
            if kept and not run.updates:
                rollout.show_prompts(run, tokenizer, kept[0], step + 1)
            read_by_teacher(teacher, kept, args)
            # 5. loss: gradients add up over micro-batches and ranks
            loss = accumulate_gradients(model, teacher, kept, args)
            # 6. step
            norm, updated = optimizer_step(model, optimizer) if kept else (0.0, False)
            if updated:
                TEACHERS[args.teacher](teacher, model, run.updates + 1, args)
                sampler.push(model)
            seconds = sampled - begun, time.time() - sampled
            log_step(run, step + 1, args, loss, norm, seen, kept, failed, seconds, device)
            run.count_update(updated, "" if kept else f"--filter {args.filter} kept nothing")
            held_out.evaluate(run, step + 1)
            if args.save_every and (step + 1) % args.save_every == 0:
                save_model(os.path.join(run.path, f"step-{step + 1}"), model, tokenizer)
            follows = None if args.teacher == "frozen" else ranks.full_state(teacher.state_dict())
            run.save_state(step + 1, model, optimizer, drawn=drawn, teacher=follows)
        if not run.updates:
            fail(f"--filter {args.filter}: no step was taken, the model is unchanged")
        held_out.evaluate(run, args.steps, last=True)
        save_model(run.path, model, tokenizer)
        run.finish()
    print(f"\nrun directory {run.path}: the trained model, metrics.jsonl, samples.jsonl")


# ------------------------------------------------------------------------------------------------


def log_step(run, step, args, loss, norm, seen, kept, failed, seconds, device):
    """One line of metrics.jsonl, and one on the screen. Means are over the tokens of the loss."""
    measures = torch.cat([r.measures for r in kept], 1) if kept else None  # (M, R)
    weights = torch.tensor([w for r in kept for w in r.weights])  # (R,)
    means = measures.mean(1).tolist() if kept else [None] * len(MEASURES)
    gap = samplers.logp_gap([r.sampler_logps for r in kept], measures[4]) if kept else None
    lengths = [len(r.response_ids) for r in kept]
    record = dict(
        step=step,
        loss=loss,
        **dict(zip(MEASURES[:4], means, strict=False)),
        **(gate_metrics(measures, weights) if kept else {}),
        grad_norm=norm,
        logprob_gap=gap,
        context_failed=failed,
        length_kept=sum(lengths) / len(lengths) if kept else None,
        **rollout_metrics(seen, kept, *seconds, device),
    )
    run.log("metrics", record)
    for line in rollout.sample_lines(step, seen, kept):
        run.log("samples", line)
    begin = f"step {step}/{args.steps}  "
    if not kept:
        reasons = f"--filter {args.filter} left none of {len(seen)} rollouts"
        if failed:
            reasons += f", {failed} contexts failed or made a row longer than the model's context"
        print(f"{begin}nothing kept: {reasons}; no update", flush=True)
    elif not math.isfinite(norm):
        rollout.log_not_finite(run, begin, step, loss, norm, kept)
    else:
        print(
            f"{begin}loss {loss:.4f}  KL {means[0]:.4f}  correct {record['correct']}/{len(seen)}  "
            f"truncated {record['truncated']}  kept {len(kept)}  length {record['length']:.1f}  "
            f"{sum(seconds):.1f} s",
            flush=True,
        )
        if args.kl_by_position:
            bins = rollout.kl_by_position(kept, args.kl_by_position)
            run.log("kl_by_position", dict(step=step, bin=args.kl_by_position, **bins))


if __name__ == "__main__":
    start(main)
