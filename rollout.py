"""Rollouts: sampling, grading, contexts that the teacher writes, and what is logged of a step."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

import data
from data import CONTEXTS, WRITTEN, Problem
from ranks import gather, rank_and_world, share
from run import fail, peak_memory
from verify import grade_responses

OUTCOMES = ("correct", "incorrect", "truncated")


@dataclass
class Rollout:
    """One response to one problem, and all that the stages find out about it."""

    problem: Problem
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    finished: bool = False  # the model ended the response, not the cap
    text: str = ""
    sampler_logps: list | None = None  # its log-probabilities, unless the model itself samples
    # The verifier's.
    outcome: str = ""  # one of OUTCOMES
    reason: str = ""  # correct, wrong, no_answer, timeout or truncated
    # The other responses to its problem in the same draw.
    siblings: list = field(default_factory=list, repr=False, compare=False)
    # The losses'.
    advantage: float = 0.0  # GRPO's, the same for every token
    weight: float = 0.0  # of each response token in the step's loss
    tags: list | None = None  # a number a token, for gates and divergences of your own
    measures: dict | None = None  # {name: (tokens,)}, what the loss's script logs
    teacher_row: list | None = None  # the teacher's (opsd.py), see model.response_hidden

    @property
    def row(self):
        return self.prompt_ids, self.response_ids

    @property
    def reasoning(self):
        """The text of its think block; all of its text where there is none."""
        return self.text.partition("</think>")[0].replace("<think>", "").strip()


# ------------------------------------------------------------------------------------------------
# Sampling and grading


def make_rollouts(sampler, tokenizer, problems, args, seed, contexts=None, logps=False):
    """Samples one response a problem. `contexts` (a text a problem, or None) makes the prompts the
    teacher's; logps: with the engine's log-probabilities. On several ranks each samples its share,
    and all get the whole list. A problem that is there several times makes siblings.
    """
    thinking, context_first = args.thinking == "on", bool(contexts) and args.context_first
    contexts = contexts or [""] * len(problems)
    rollouts = []
    for problem, context in share(list(zip(problems, contexts, strict=True))):
        prompt = data.render_prompt(tokenizer, problem, context or "", thinking, context_first)
        rollouts.append(Rollout(problem, prompt))
    prompts = [r.prompt_ids for r in rollouts]
    longest = max(map(len, prompts), default=0)
    if sampler.limit and longest + args.max_new_tokens > sampler.limit:  # nothing is cut silently
        room = f"the longest prompt has {longest} tokens and the model's context is {sampler.limit}"
        fail(f"--max-new-tokens {args.max_new_tokens}: {room}")
    settings = args.max_new_tokens, args.temperature, args.top_p, rank_seed(seed)
    samples = sampler.sample(prompts, *settings, logps)
    for rollout, (ids, finished) in zip(rollouts, samples, strict=True):
        rollout.response_ids, rollout.finished = ids, finished
        text = tokenizer.decode(ids[:-1] if finished else ids)
        rollout.text = opened_think(tokenizer, rollout.prompt_ids) + text
    for rollout, logps in zip(rollouts, sampler.logps or (), strict=False):
        rollout.sampler_logps = logps
    rollouts, groups = gather(rollouts), defaultdict(list)
    for rollout in rollouts:
        groups[rollout.problem].append(rollout)
    for rollout in rollouts:
        rollout.siblings = [r for r in groups[rollout.problem] if r is not rollout]
    return rollouts


def opened_think(tokenizer, prompt):
    """The "<think>" that some chat templates write into the prompt: the verifier must see it, or an
    unfinished block would pass as an answer.
    """
    return "<think>\n" if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>") else ""


def rank_seed(seed):
    """Rank 0 has the seed of a run on one rank; the others are far from it, since a run's seeds go
    up by --batch a draw.
    """
    return seed + 1_000_000_007 * rank_and_world()[0]


def grade_rollouts(verifier, rollouts):
    """Writes outcome and reason into each rollout."""
    mine = share(rollouts)
    texts, finished = [r.text for r in mine], [r.finished for r in mine]
    graded = grade_responses(verifier, texts, finished, [r.problem.answer for r in mine])
    for rollout, verdict in zip(rollouts, gather(graded), strict=True):
        rollout.outcome, rollout.reason = verdict


def hand_out(rollouts, parts):
    """The loss of all ranks together; every rank's rollouts get their measures, {name: (tokens,)}.

    parts: this rank's [(numbers of rollouts, their loss, their measures {name: (R,)}), ...].
    """
    on_cpu = [
        (group, loss.item(), {name: values.cpu() for name, values in measures.items()})
        for group, loss, measures in parts
    ]
    total = 0.0
    for group, loss, measures in gather(on_cpu):
        total += loss
        lengths = [len(rollouts[i].response_ids) for i in group]
        columns = {name: values.split(lengths) for name, values in measures.items()}
        for place, i in enumerate(group):
            rollouts[i].measures = {name: column[place] for name, column in columns.items()}
    return total


def drop_long(problems, tokenizer, args, limit, context="none"):
    """The problems whose prompts, student's and teacher's, leave room for the response.

    Says how many it drops; ends the program if none is left. Embedded problems differ by a few
    tokens only: just the first is looked at.
    """
    if context in WRITTEN:
        room_to_write(limit, args)
    look_at = problems if args.data else problems[:1]
    # Of contexts that are written, and of a sibling, only the frame is known.
    empty = [Rollout(p, [], siblings=[Rollout(p, [], outcome="correct")]) for p in look_at]
    contexts = CONTEXTS[context](empty, lambda prompts: [""] * len(prompts), args)
    teacher_thinking = getattr(args, "teacher_thinking", args.thinking) == "on"
    long = set()
    for i, (problem, text) in enumerate(zip(look_at, contexts, strict=True)):
        student = data.render_prompt(tokenizer, problem, "", args.thinking == "on")
        teacher = data.render_prompt(tokenizer, problem, text, teacher_thinking)
        if limit and max(len(student), len(teacher)) + args.max_new_tokens > limit:
            long.add(i)
    room = f"--max-new-tokens {args.max_new_tokens}"
    if len(long) == len(look_at):
        fail(f"{room}: no prompt leaves room for it in the model's context of {limit} tokens")
    if long:
        which = f"{len(long)} of {len(problems)} problems, the first being number {min(long) + 1}"
        print(f"dropped {which}: prompt and {room} exceed the model's context of {limit}")
    return [problem for i, problem in enumerate(problems) if i not in long]


# ------------------------------------------------------------------------------------------------
# Contexts that the teacher writes


def add_context_flags(add):
    add("--context-first", action="store_true", help="of --context: it stands before the question")
    cap = f"of --context {', '.join(WRITTEN)}: its cap; one that hits it has failed"
    add("--context-tokens", type=int, default=512, help=cap)


def room_to_write(limit, args):
    """Tokens of the teacher's prompt that leave room for the context that it writes."""
    if limit and args.context_tokens >= limit:
        fail(f"--context-tokens {args.context_tokens}: the model's context is {limit} tokens")
    return (limit or float("inf")) - args.context_tokens


def make_writer(sampler, tokenizer, args, seed):
    """The `write` of data.CONTEXTS: what the sampler's model writes to each prompt, in one batch,
    thinking off; None where it is empty, truncated or the prompt too long.
    """

    def write(prompts):
        rows = [data.chat_ids(tokenizer, data.plain(tokenizer, p), False) for p in share(prompts)]
        room = room_to_write(sampler.limit, args)
        fits = [i for i, row in enumerate(rows) if len(row) <= room]
        texts = [None] * len(rows)
        settings = args.context_tokens, args.temperature, args.top_p, rank_seed(seed)
        some = gather(fits)  # an engine is not asked for nothing
        samples = sampler.sample([rows[i] for i in fits], *settings) if some else []
        for i, (response, finished) in zip(fits, samples, strict=True):
            text = tokenizer.decode(response[:-1]).rpartition("</think>")[2].strip()
            texts[i] = text if finished and text else None
        return gather(texts)

    return write


# ------------------------------------------------------------------------------------------------
# What rlvr.py and opsd.py log of a step's rollouts; docs/runs.md explains each key


def measure_metrics(kept):
    """Means over the tokens of the loss, {name: mean}; logprob_gap: mean absolute difference of the
    sampler's and the trainer's log-probabilities, None where the model itself samples.
    """
    gaps = [
        (torch.tensor(r.sampler_logps) - r.measures["logp"]).abs() for r in kept if r.sampler_logps
    ]
    names = kept[0].measures if kept else ()
    means = {
        name: torch.cat([r.measures[name] for r in kept]).float().mean().item() for name in names
    }
    return dict(means, logprob_gap=torch.cat(gaps).mean().item() if gaps else None)


def gate_metrics(kept):
    """What the gate lets through of a step, and how long the kept rollouts are; opsd.py's."""
    if not kept:
        return {}
    gate, kl = (torch.cat([r.measures[name] for r in kept]) for name in ("gate", "reverse_kl"))
    weights = torch.cat([torch.full((len(r.response_ids),), r.weight) for r in kept])  # (R,)

    def mean(values, by):
        return (values * by).sum().item() / by.sum().item() if by.sum() > 0 else None

    return dict(
        gate_mass=mean(gate, weights),  # the share of the weight that the gate lets through
        reverse_kl_inside=mean(kl, gate),
        reverse_kl_outside=mean(kl, 1 - gate),
        length_kept=tokens(kept) / len(kept),
    )


def rollout_metrics(seen, kept, sampling_seconds, training_seconds, device):
    def length(rollouts):
        return tokens(rollouts) / len(rollouts) if rollouts else None

    return dict(
        sampled=len(seen),
        **{name: sum(r.outcome == name for r in seen) for name in OUTCOMES},
        no_answer=sum(r.reason == "no_answer" for r in seen),
        kept=len(kept),
        loss_tokens=tokens(kept),
        length=length(seen),
        length_correct=length([r for r in seen if r.outcome == "correct"]),
        sampling_seconds=sampling_seconds,
        sampled_tokens_per_second=tokens(seen) / sampling_seconds,
        training_seconds=training_seconds,
        trained_tokens_per_second=tokens(kept) / training_seconds,
        peak_memory_mb=peak_memory(device),
    )


def tokens(rollouts):
    return sum(len(r.response_ids) for r in rollouts)


def sample_lines(step, rollouts, kept):
    """samples.jsonl: the first two rollouts of a step."""
    lines = []
    for r in rollouts[:2]:
        line = dict(step=step, question=r.problem.question, gold=r.problem.answer, response=r.text)
        line.update(outcome=r.outcome, reason=r.reason, kept=any(r is k for k in kept))
        lines.append(line)
    return lines


def log_not_finite(run, begin, record, rollouts):
    """Says that a step is skipped; not_finite.jsonl: its rollouts. begin: of the line on screen."""
    loss, norm = record["loss"], record["grad_norm"]
    print(f"{begin}loss {loss}, gradient norm {norm}: no update, see not_finite.jsonl")
    rows = [
        dict(
            question=r.problem.question,
            prompt_ids=r.prompt_ids,
            response_ids=r.response_ids,
            finite=all(values.isfinite().all().item() for values in r.measures.values()),
        )
        for r in rollouts
    ]
    run.log("not_finite", dict(step=record["step"], loss=loss, grad_norm=norm, rows=rows))


def kl_by_position(rollouts, cap):
    """Figure 2: reverse KL (nats) by position in the response.

    Per outcome the sum over tokens, the tokens and the rollouts in bins of a twentieth of `cap`.
    """
    width = max(1, cap // 20)
    bins = dict(bin=width)
    for name in OUTCOMES:
        rows = [r.measures["reverse_kl"].split(width) for r in rollouts if r.outcome == name]
        columns = [[part for part in column if part is not None] for column in zip_longest(*rows)]
        bins[name] = dict(
            kl=[sum(part.sum().item() for part in column) for column in columns],
            tokens=[sum(map(len, column)) for column in columns],
            rollouts=[len(column) for column in columns],
        )
    return bins


def show_prompts(run, tokenizer, rollout, step):
    """Prints and logs what student and teacher really read."""
    texts = dict(student_prompt=tokenizer.decode(rollout.prompt_ids))
    if rollout.teacher_row:
        texts["teacher_prompt"] = tokenizer.decode(rollout.teacher_row[0])
        if len(rollout.teacher_row) > 2:
            texts["reinjected"] = tokenizer.decode(rollout.teacher_row[2])
    run.log("samples", dict(step=step, **texts))
    for name, text in texts.items():
        print(f"\n{name.replace('_', ' ')}:\n{text}", flush=True)
    print()
