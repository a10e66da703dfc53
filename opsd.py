"""Stage 3, on-policy self-distillation (OPSD): the method of the paper.

The student samples responses; the verifier sorts them into correct, incorrect and truncated; the filter keeps some; the same model,
frozen and shown a privileged context, scores the very same tokens; the student moves towards it by a masked per-token KL (eq. 1):

    L = mean over kept responses y of 1/|y| sum_t KL( student(. | x, y_<t) || teacher(. | x, c, y_<t) )

Divergences, per token over the whole vocabulary v (S student, T teacher):
    reverse_kl   sum_v S log(S/T)           the paper's
    forward_kl   sum_v T log(T/S)
    jsd          beta KL(T||M) + (1-beta) KL(S||M), M = beta T + (1-beta) S
    split        reverse_kl on correct rollouts, forward_kl on the others
    rft          -log S(y_t): rejection-sampling fine-tuning on the same rollouts, the baseline that the paper argues against

Where this code departs from the paper, or fills in what it left open:
1. Truncated rollouts are a third group beside correct and incorrect: only the filter `all` keeps them, unless --truncated incorrect.
2. --resample N draws again until --batch rollouts are kept, so that filters are compared at equal update size; 0 is the paper's single draw.
3. Sampling is at temperature 1, the student's own distribution (the paper: 0.7).
4. No clipping, no top-k, no loss temperature: the full distribution in float32.
5. The default context is the worked solution; the defaults are the embedded task's. The paper's: --lr 1e-6 --batch 32 --steps 100
   --temperature 0.7 --max-new-tokens 8192.

    python opsd.py --filter correct                                                 # the embedded model and task
    python opsd.py --model MODEL --data train.jsonl --filter correct --lr 1e-6 --batch 32 --max-new-tokens 8192 --out runs/mine
"""

import copy
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
    CONTEXTS,
    add_data_flags,
    add_held_out_flags,
    load_held_out,
    load_problems,
    plain,
    problem_batch,
    render_prompt,
    require_thinking_switch,
)
from ranks import full_state, gather, load_device, load_full_state, open_head, prepare
from rollout import (
    Rollout,
    add_context_flags,
    add_sampling_flags,
    choose_backend,
    drop_long,
    grade_rollouts,
    logprob_gap,
    make_rollouts,
    make_sampler,
    make_writer,
)
from verify import Verifier


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="Hugging Face directory or id; without it tiny/rlvr")
    add_run_flags(parser, resume_every=10)
    add_data_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--filter", default="correct", choices=list(FILTERS), help="rollouts that reach the loss"
    )
    group.add_argument(
        "--truncated",
        default="apart",
        choices=["apart", "incorrect"],
        help="what a response that hit the token cap counts as",
    )
    group.add_argument(
        "--context",
        default="solution",
        choices=list(CONTEXTS),
        help="what the teacher reads besides the problem (table 4)",
    )
    add_context_flags(group)
    group.add_argument(
        "--reinject",
        type=int,
        default=0,
        help="put the context again into the teacher's copy of the response every this many tokens (table 5: 2048); 0 = off",
    )
    group.add_argument(
        "--divergence", default="reverse_kl", choices=list(DIVERGENCES), help="formulas above"
    )
    group.add_argument(
        "--beta",
        type=float,
        default=0.5,
        help="of jsd, between 0 and 1: weight of the teacher in the mixture",
    )
    group.add_argument(
        "--mean",
        default="response",
        choices=["response", "token"],
        help="response: mean over responses of their token means (eq. 1); token: mean over all tokens of the step",
    )
    group.add_argument(
        "--teacher",
        default="frozen",
        choices=list(TEACHERS),
        help="frozen at the initial weights; ema of the student; every --refresh updates; current",
    )
    group.add_argument(
        "--ema",
        type=float,
        default=0.99,
        help="share of the old teacher kept at each step, with --teacher ema",
    )
    group.add_argument(
        "--refresh", type=int, default=10, help="updates between copies, with --teacher every"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=40, help="optimizer steps")
    group.add_argument(
        "--batch",
        type=int,
        default=96,
        help="rollouts drawn at once, one a problem; with --resample: rollouts kept",
    )
    group.add_argument(
        "--resample",
        type=int,
        default=0,
        help="draw again, up to this many times a step, until --batch rollouts are kept; 0 = a single draw",
    )
    group.add_argument("--lr", type=float, default=1e-4, help="constant learning rate of AdamW")
    group.add_argument("--weight-decay", type=float, default=0.0)
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    group.add_argument(
        "--micro-tokens",
        type=int,
        default=2048,
        help="padded tokens of a micro-batch; changes memory and speed, not the gradient",
    )
    group.add_argument(
        "--teacher-tokens",
        type=int,
        default=0,
        help="padded tokens of a batch of the teacher's pass, which keeps nothing for a backward pass; 0 = as --micro-tokens",
    )
    group.add_argument(
        "--chunk",
        type=float,
        default=64,
        help="millions of logits (tokens x vocabulary) of each model that exist at once; changes memory and speed, not the gradient",
    )
    group.add_argument(
        "--kl-by-position",
        type=int,
        default=0,
        help="write kl_by_position.jsonl in bins of this many tokens (figure 2); 0 = off",
    )
    group.add_argument(
        "--give-up",
        type=int,
        default=10,
        help="stop after this many steps in a row of which the filter keeps nothing",
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
        "refresh",
    )
    if not 0 < args.beta < 1:
        parser.error(
            f"--beta {args.beta}: strictly between 0 and 1 (jsd tends to 0 at both ends; use forward_kl or reverse_kl)"
        )
    if not 0 <= args.ema < 1:
        parser.error(f"--ema {args.ema}: at least 0 and below 1")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Filters: correctness gates states (whole rollouts), not token targets. A new one is a function and an entry.

FILTERS = {
    "all": lambda outcome: True,
    "correct": lambda outcome: outcome == "correct",
    "incorrect": lambda outcome: outcome == "incorrect",
}

# ---------------------------------------------------------------------------------------------------------------------
# Divergences. Axes: R response tokens of the chunk, V vocabulary. Each takes the log-probabilities of student and teacher (R, V), the
# sampled ids (R,), whether each token's rollout is correct (R,), and beta; each returns nats per token (R,).
#
# The KLs are written with the extra terms -P + Q, which sum to zero: where both distributions are equal
# the value and the gradient are then exactly 0, not a rounding error.


def kl(p, q):
    """KL(P || Q) = sum_v P log(P/Q) of log-probabilities p and q."""
    return (p.exp() * (p - q - 1) + q.exp()).sum(-1)  # (R,)


def reverse_kl(student, teacher, ids, correct, beta):
    return kl(student, teacher)


def forward_kl(student, teacher, ids, correct, beta):
    return kl(teacher, student)


def jsd(student, teacher, ids, correct, beta):
    import torch

    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))  # (R, V)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def split(student, teacher, ids, correct, beta):
    import torch

    return torch.where(correct, kl(student, teacher), kl(teacher, student))


def rft(student, teacher, ids, correct, beta):
    return -student.gather(-1, ids[:, None])[:, 0]


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "split": split,
    "rft": rft,
}


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def token_weights(rollouts, mean):
    """Weight of each response token in the step's loss, one list a rollout. They sum to 1 over the step, however it is cut up.

    response: 1 / (responses x tokens of this response), eq. 1. token: 1 / (tokens of all responses).
    """
    total = sum(len(r.response_ids) for r in rollouts)
    return [
        [1 / (len(rollouts) * len(r.response_ids)) if mean == "response" else 1 / total]
        * len(r.response_ids)
        for r in rollouts
    ]


def measure(s, t, ids):
    """Reverse KL, forward KL, student entropy, teacher entropy, log-probability of the sampled id, of log-probabilities (P, V): (5, P), in nats, for the log."""
    import torch

    p, q, dot = s.exp(), t.exp(), torch.linalg.vecdot
    ps, pt, qs, qt = dot(p, s), dot(p, t), dot(q, s), dot(q, t)
    return torch.stack([ps - pt, qt - qs, -ps, -qt, s.gather(-1, ids[:, None])[:, 0]])


PIECE = 1  # million logits


def chunk_loss(logits, teacher_logits, ids, correct, weights, divergence, beta):
    """Sum over the C tokens of a chunk of weight x divergence: (loss, measures (5, C)). `logits` (C, V) then hold its gradient in themselves.

    Everything elementwise is done in pieces, P tokens each: a chunk's worth of logits exists twice, not ten times, and a piece fits a CPU's cache.
    """
    import torch

    size = max(1, int(PIECE * 1e6) // logits.shape[1])
    losses, measures = [], []
    for piece, teacher_piece, i, c, w in zip(
        *(tensor.split(size) for tensor in (logits.detach(), teacher_logits, ids, correct, weights))
    ):
        leaf = piece.detach().requires_grad_()  # (P, V)
        s = torch.log_softmax(leaf.float(), -1)  # (P, V)
        with torch.no_grad():
            t = torch.log_softmax(teacher_piece.float(), -1)  # (P, V)
            measures.append(measure(s, t, i))  # (5, P)
        loss = (DIVERGENCES[divergence](s, t, i, c, beta) * w).sum()
        piece.copy_(torch.autograd.grad(loss, leaf)[0])
        losses.append(loss.detach())
    return torch.stack(losses).sum().item(), torch.cat(measures, 1)


def opsd_loss(
    student, teacher, rollouts, teacher_hidden, weights, divergence="reverse_kl", beta=0.5, chunk=64
):
    """The loss of one micro-batch, its gradient added to the student's: (loss, measures (5, R), see `measure`).

    student, teacher: models. rollouts: the student's rows. teacher_hidden: (R, D), the teacher's states at the same response ids, see read_rows.
    weights: see token_weights. At most `chunk` million logits of each model exist at a time: every chunk of tokens runs backward at once, into the head and
    into its hidden states, whose gradients then go through the student's body together. Nothing is computed twice.
    """
    import torch

    rows = [(r.prompt_ids, r.response_ids) for r in rollouts]
    hidden, ids = response_hidden(student, rows), response_targets(student, rows)  # (R, D), (R,)
    correct = torch.tensor(
        [r.outcome == "correct" for r in rollouts for _ in r.response_ids], device=ids.device
    )  # (R,)
    flat = torch.tensor([w for row in weights for w in row], device=ids.device)  # (R,)
    (student_head, hand_back), (teacher_head, _) = open_head(student), open_head(teacher)
    total, gradients, measures = 0.0, [], []
    for part in token_chunks(len(ids), student, chunk):
        leaf = hidden[part].detach().requires_grad_()  # (C, D): C tokens of the chunk
        logits = student_head(leaf)  # (C, V)
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden[part])  # (C, V)
        loss, measured = chunk_loss(
            logits, teacher_logits, ids[part], correct[part], flat[part], divergence, beta
        )
        logits.backward(logits.detach())  # which are their gradient now
        total += loss
        gradients.append(leaf.grad)
        measures.append(measured)
    hand_back()
    hidden.backward(torch.cat(gradients))
    return total, torch.cat(measures, 1)


def read_rows(teacher, rows, budget):
    """The teacher's hidden states at the scored ids of this rank's `rows` (see teacher_row): {row number: (tokens, D)}, in batches of `budget` padded tokens.

    All of the step's rows are read before any is trained on. Nothing is kept for a backward pass, so the batches may be larger than the student's.
    """
    import torch

    states = {}
    with torch.inference_mode():
        for group, _ in deal([sum(map(len, row)) for row in rows], budget):
            hidden = response_hidden(teacher, [rows[i] for i in group])  # (R, D)
            states.update(zip(group, hidden.split([sum(map(len, rows[i][1::2])) for i in group])))
    return states


RECALL = "\n\nActually, I recall:\n{context}\nContinuing from this.\n\n"


def teacher_row(prompt, response, recall=(), every=0):
    """The teacher's row (see response_hidden): its prompt and the response; with `every` the ids `recall` stand again before each further
    `every` response tokens (reinjection, table 5). They are read, not scored: the response tokens are the same, none is moved or added."""
    row = [prompt, response[:every] if every else response]
    for start in range(every, len(response), every) if every else ():
        row += [list(recall), response[start : start + every]]
    return row


def teacher_rows(tokenizer, rollouts, contexts, args, limit):
    """(rollouts, teacher rows, failed): without the rollouts whose context failed or whose teacher row exceeds the model's context; nothing is cut."""
    rows = []
    for rollout, context in zip(rollouts, contexts):
        if context is not None:
            recall = (
                plain(tokenizer, RECALL.format(context=context))
                if context and args.reinject
                else ""
            )
            rows.append(
                (
                    rollout,
                    teacher_row(
                        render_prompt(tokenizer, rollout.problem, context, args.thinking == "on"),
                        rollout.response_ids,
                        tokenizer(recall, add_special_tokens=False).input_ids,
                        args.reinject,
                    ),
                )
            )
    rows = [(rollout, row) for rollout, row in rows if not limit or sum(map(len, row)) <= limit]
    return [rollout for rollout, _ in rows], [row for _, row in rows], len(rollouts) - len(rows)


def show_prompts(run, tokenizer, rollout, row, step):
    """Prints and logs what student and teacher really read, once."""
    texts = dict(
        student_prompt=tokenizer.decode(rollout.prompt_ids), teacher_prompt=tokenizer.decode(row[0])
    )
    if len(row) > 2:
        texts["reinjected"] = tokenizer.decode(row[2])
    run.log("samples", dict(step=step + 1, **texts))
    for name, text in texts.items():
        print(f"\n{name.replace('_prompt', chr(39) + 's prompt')}:\n{text}", flush=True)
    print()


def accumulate_gradients(student, teacher, rollouts, teacher_rows, args):
    """The whole step's loss, with gradients added up over micro-batches and ranks: (loss, measures: one (5, tokens) a rollout, see `measure`)."""
    import torch

    weights = token_weights(rollouts, args.mean)  # one denominator, before the loop
    states = read_rows(teacher, teacher_rows, args.teacher_tokens or args.micro_tokens)
    loss, measures = 0.0, {}
    for group, counts in deal([sum(map(len, row)) for row in teacher_rows], args.micro_tokens):
        pick = lambda rows: [rows[i] for i in group]
        mine = [[w * counts for w in row] for row in pick(weights)]
        part, part_measures = opsd_loss(
            student,
            teacher,
            pick(rollouts),
            torch.cat(pick(states)),
            mine,
            args.divergence,
            args.beta,
            args.chunk,
        )
        loss += part
        for i, row in zip(
            group if counts else (),
            part_measures.cpu().split([len(rollouts[i].response_ids) for i in group], 1),
        ):
            measures[i] = row
    everyone = gather([(loss, measures)])  # one entry a rank
    measures = {i: row for _, rows in everyone for i, row in rows.items()}
    return sum(part for part, _ in everyone), [measures[i] for i in range(len(rollouts))]


# ---------------------------------------------------------------------------------------------------------------------
# Teachers: function (teacher, student, updates so far, args) called after each update. The teacher is always its own copy.


def copy_weights(teacher, student, keep=0.0):
    import torch

    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters()):
            old.lerp_(new.to(old.dtype), 1 - keep)


TEACHERS = {
    "frozen": lambda teacher, student, updates, args: None,
    "ema": lambda teacher, student, updates, args: copy_weights(teacher, student, args.ema),
    "every": lambda teacher, student, updates, args: (
        copy_weights(teacher, student) if updates % args.refresh == 0 else None
    ),
    "current": lambda teacher, student, updates, args: copy_weights(teacher, student),
}


def frozen_copy(model):
    teacher = copy.deepcopy(model).eval()
    teacher.requires_grad_(False)
    return teacher


def plan(args, device, problems):
    """--dry-run."""
    from memory import dry_run

    config, tokenizer = load_tokenizer(args.model)
    rollout = Rollout(problem_batch(problems, 0, 1, args.seed)[0], [])
    context = CONTEXTS[args.context](
        [rollout], lambda prompts: ["(what the teacher will have written)"] * len(prompts)
    )[0]
    prompts = {
        f"{who}'s prompt": render_prompt(tokenizer, rollout.problem, text, args.thinking == "on")
        for who, text in (("student", ""), ("teacher", context))
    }
    dry_run(
        args,
        config,
        device,
        tokenizer,
        prompts,
        len(prompts["teacher's prompt"]) + args.max_new_tokens,
        "ema" if args.teacher == "ema" else "frozen",
        args.batch * args.max_new_tokens,
    )


def main(argv=None):
    args = parse_args(argv)
    check_out(args)
    device = set_up(args)
    choose_backend(args, device)
    import torch
    from eval import evaluate, log_evaluation

    args.model = args.model or os.path.relpath(os.path.join(HERE, "tiny", "rlvr"))
    problems = load_problems(args, args.steps * args.batch * (args.resample + 1))
    problems, held_out = load_held_out(args, problems)
    if args.dry_run:
        return plan(args, device, problems)
    model, tokenizer = load_model(args.model, load_device(device))  # in float32
    require_thinking_switch(tokenizer, args.thinking == "on")
    teacher = frozen_copy(model)
    prepare(model, args, device)
    prepare(
        teacher, args, device, low=args.teacher != "ema"
    )  # an average in bfloat16 would stand still
    sampler = make_sampler(model, tokenizer, args)
    teacher_sampler = make_sampler(teacher, tokenizer, args, sampler)
    problems = drop_long(problems, tokenizer, args, sampler.limit, args.context)
    held_out = held_out and drop_long(held_out, tokenizer, args, sampler.limit)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    run = Run(args, f"opsd-{args.filter}")
    print(f"{len(problems):,} problems, device {device}, run directory {run.path}")
    with Verifier() as verifier:
        before = evaluate(sampler, tokenizer, held_out, verifier, args) if held_out else None
        state = run.resume(problems, model, optimizer)
        drawn, skipped, updates = (state.get(name, 0) for name in ("drawn", "skipped", "updates"))
        if state.get("teacher"):
            load_full_state(teacher, state["teacher"])
        if state:
            sampler.push(model)
        for step in range(state.get("step", 0), args.steps):
            # 1. sample, 2. verify, 3. filter: until the batch is full or the draws are used up
            start, seen, kept = time.time(), [], []
            for _ in range(args.resample + 1):
                rollouts = make_rollouts(
                    sampler,
                    tokenizer,
                    problem_batch(problems, drawn, args.batch, args.seed),
                    args,
                    args.seed + drawn,
                )
                drawn += args.batch
                grade_rollouts(verifier, rollouts, args.truncated)
                seen += rollouts
                kept += [r for r in rollouts if FILTERS[args.filter](r.outcome)]
                if len(kept) >= args.batch:
                    break
            kept = kept[: args.batch]
            sampled = time.time()

            # 4. loss: the teacher scores the same tokens behind its own prompt
            contexts = CONTEXTS[args.context](
                kept, make_writer(teacher_sampler, tokenizer, args, args.seed + drawn)
            )
            kept, rows, failed = teacher_rows(tokenizer, kept, contexts, args, sampler.limit)
            if kept and not updates:
                show_prompts(run, tokenizer, kept[0], rows[0], step)
            loss, measures = accumulate_gradients(model, teacher, kept, rows, args)

            # 5. step
            norm, updated = optimizer_step(model, optimizer, args.clip) if kept else (0.0, False)
            if updated:
                updates, skipped = updates + 1, 0
                TEACHERS[args.teacher](teacher, model, updates, args)
                sampler.push(model)
            else:
                skipped += 1
            log_step(
                run,
                step,
                args,
                loss,
                measures,
                norm,
                seen,
                kept,
                failed,
                sampled - start,
                time.time() - sampled,
                device,
            )
            if kept and not updated:
                run.log(
                    "not_finite",
                    dict(step=step + 1, loss=loss, grad_norm=norm, rows=not_finite(kept, measures)),
                )
            if args.kl_by_position and updated:
                run.log(
                    "kl_by_position",
                    dict(
                        step=step + 1,
                        bin=args.kl_by_position,
                        **kl_by_position(kept, measures, args.kl_by_position),
                    ),
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
                    f"--filter {args.filter}: kept nothing in {skipped} steps in a row (--give-up)"
                    if not kept
                    else f"loss or gradient not finite, or nothing kept, in {skipped} steps in a row (--give-up): see {run.path}/not_finite.jsonl"
                )
            run.save_state(
                step + 1,
                problems,
                model,
                optimizer,
                drawn=drawn,
                skipped=skipped,
                updates=updates,
                teacher=None if args.teacher == "frozen" else full_state(teacher.state_dict()),
            )
        if not updates:
            fail(f"--filter {args.filter}: no step was taken, the model is unchanged")
        save_model(run.path, model, tokenizer)
        if held_out:
            log_evaluation(
                run, args.steps, before, evaluate(sampler, tokenizer, held_out, verifier, args)
            )
    run.finish()
    print(
        f"\nrun directory {run.path}: the trained model, metrics.jsonl (a line a step), samples.jsonl (some rollouts)"
    )


def kl_by_position(rollouts, measures, width):
    """Figure 2: reverse KL (nats) by position in the response. Per outcome the sum over tokens, the tokens and the rollouts in each bin of `width` tokens."""
    bins = {
        name: dict(kl=[], tokens=[], rollouts=[]) for name in ("correct", "incorrect", "truncated")
    }
    for rollout, (kl, *_) in zip(rollouts, measures):
        row = bins[rollout.outcome]
        for t, value in enumerate(kl.tolist()):
            if t // width == len(row["kl"]):
                for column in row.values():
                    column.append(0)
            row["kl"][t // width] += value
            row["tokens"][t // width] += 1
            row["rollouts"][t // width] += t % width == 0
    return bins


def not_finite(rollouts, measures):
    """The rollouts whose KLs or entropies are not finite, or all of them if it was only the gradient."""
    import torch

    bad = [r for r, row in zip(rollouts, measures) if not torch.isfinite(row).all()]
    return [
        dict(question=r.problem.question, prompt_ids=r.prompt_ids, response_ids=r.response_ids)
        for r in bad or rollouts
    ]


def log_step(
    run,
    step,
    args,
    loss,
    measures,
    norm,
    seen,
    kept,
    failed,
    sampling_seconds,
    training_seconds,
    device,
):
    """One line of metrics.jsonl. Lengths in tokens; KLs and entropies in nats, means over the tokens that reached the loss."""
    import torch

    count = {
        name: sum(r.outcome == name for r in seen) for name in ("correct", "incorrect", "truncated")
    }
    length = lambda rows: sum(len(r.response_ids) for r in rows) / len(rows) if rows else None
    measures = torch.cat(measures, 1) if kept else None  # (5, R)
    means = measures.mean(1).tolist() if kept else [None] * 4
    record = dict(
        step=step + 1,
        loss=loss,
        reverse_kl=means[0],
        forward_kl=means[1],
        student_entropy=means[2],
        teacher_entropy=means[3],
        grad_norm=norm,
        logprob_gap=logprob_gap([r.logprobs for r in kept], measures[4]) if kept else None,
        sampled=len(seen),
        **count,
        no_answer=sum(r.reason == "no_answer" for r in seen),
        context_failed=failed,
        kept=len(kept),
        loss_tokens=sum(len(r.response_ids) for r in kept),
        length=length(seen),
        length_correct=length([r for r in seen if r.outcome == "correct"]),
        length_kept=length(kept),
        sampling_seconds=sampling_seconds,
        sampled_tokens_per_second=sum(len(r.response_ids) for r in seen) / sampling_seconds,
        training_seconds=training_seconds,
        trained_tokens_per_second=sum(len(r.response_ids) for r in kept) / training_seconds,
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
                kept=any(r is k for k in kept),
            ),
        )
    if not kept:
        print(
            f"step {step + 1}/{args.steps}  nothing kept: --filter {args.filter} left none of {len(seen)} rollouts"
            + f", {failed} contexts failed" * bool(failed)
            + "; no update",
            flush=True,
        )
    elif not math.isfinite(norm):
        print(
            f"step {step + 1}/{args.steps}  loss {loss}, gradient norm {norm}: no update; the rollouts are in not_finite.jsonl",
            flush=True,
        )
    else:
        print(
            f"step {step + 1}/{args.steps}  loss {loss:.4f}  KL {means[0]:.4f}  correct {count['correct']}/{len(seen)}  truncated {count['truncated']}  "
            f"kept {len(kept)}  length {record['length']:.1f}  {sampling_seconds + training_seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
