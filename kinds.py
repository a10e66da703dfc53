"""Where teacher and student disagree: reverse KL by kind of token, on correct and on incorrect responses to embedded problems.

python kinds.py                                         # tiny/rlvr against itself reading the worked solution: what the first step of opsd.py sees
python kinds.py --model runs/opsd-incorrect-001         # a trained student against the same teacher
"""

import os
import re

from common import (
    HERE,
    add_run_flags,
    check_out,
    load_model,
    make_parser,
    positive,
    set_up,
    write_json,
)
from data import CONTEXTS, EMBEDDED_CONTEXTS, HARD_SHARE, embedded_problems, read_steps
from opsd import opsd_loss, read_rows, teacher_rows
from rollout import add_sampling_flags, choose_backend, grade_rollouts, make_rollouts, make_sampler
from verify import Verifier

# Kind of the token that comes next, by the line so far and by whether the line's step has a smudged digit.
KINDS = [
    ("hard: first look", True, r"\d\d[+-]"),
    ("hard: check or go on", True, r"\d\d[+-]\d=\d\d"),
    ("hard: the digit settled on", True, r".* so \d\d[+-]"),
    ("easy: check or go on", False, r".*=\d\d"),
]


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", default=os.path.relpath(os.path.join(HERE, "tiny", "rlvr")), help="the student"
    )
    parser.add_argument(
        "--teacher",
        default=os.path.relpath(os.path.join(HERE, "tiny", "rlvr")),
        help="the model that reads the context",
    )
    add_run_flags(parser, out="JSON file for the table (else only the screen)")
    add_sampling_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--context", default="solution", choices=EMBEDDED_CONTEXTS)
    group.add_argument(
        "--problems", type=int, default=512, help="held-out problems, one response each"
    )
    group.add_argument("--hard", type=float, default=HARD_SHARE, help="share of hard problems")
    group.add_argument("--reinject", type=int, default=0, help="as in opsd.py")
    args = parser.parse_args(argv)
    positive(parser, args, "problems", "max_new_tokens", "sample_batch")
    return args


def kind_of(problem, text):
    """The kind of the token that comes next after `text`."""
    lines = text.removeprefix("<think>\n").split("\n")
    steps = read_steps(problem)
    if "</think>" in text or len(lines) > len(steps):
        return "other"
    smudged = bool(steps[len(lines) - 1][3])
    return next(
        (
            kind
            for kind, hard, pattern in KINDS
            if hard == smudged and re.fullmatch(pattern, lines[-1])
        ),
        "other",
    )


def by_kind(tokenizer, rollouts, measures):
    """{outcome: {kind: (sum of reverse KL in nats, tokens)}}; `measures` as opsd_loss returns them, one (5, tokens) a rollout."""
    table = {r.outcome: {} for r in rollouts}
    for rollout, (kl, *_) in zip(rollouts, measures):
        text = ""
        for token, value in zip(rollout.response_ids, kl.tolist()):
            row = table[rollout.outcome].setdefault(kind_of(rollout.problem, text), [0.0, 0])
            row[0] += value
            row[1] += 1
            text += tokenizer.decode([token])
    return table


def main(argv=None):
    args = parse_args(argv)
    check_out(args)
    device = set_up(args)
    choose_backend(args, device)
    import torch

    problems = embedded_problems(args.problems, args.seed, True, args.hard)
    student, tokenizer = load_model(args.model, device, args.dtype)
    teacher, _ = load_model(args.teacher, device, args.dtype)
    rollouts = make_rollouts(
        make_sampler(student, tokenizer, args), tokenizer, problems, args, args.seed
    )
    with Verifier() as verifier:
        grade_rollouts(verifier, rollouts)
    rollouts, rows, _ = teacher_rows(
        tokenizer, rollouts, CONTEXTS[args.context](rollouts, None), args, None
    )
    states, measures = read_rows(teacher, rows, 4096), []
    for i in range(
        0, len(rollouts), 32
    ):  # the loss itself is not wanted here, only what it measures
        part, weights = (
            rollouts[i : i + 32],
            [[1.0] * len(r.response_ids) for r in rollouts[i : i + 32]],
        )
        hidden = torch.cat([states[j] for j in range(i, i + len(part))])
        measures += opsd_loss(student, teacher, part, hidden, weights)[1].split(
            [len(r.response_ids) for r in part], 1
        )
    table = by_kind(tokenizer, rollouts, measures)
    count = {outcome: sum(r.outcome == outcome for r in rollouts) for outcome in table}
    print(f"{args.model} against {args.teacher} reading {args.context}; reverse KL in nats")
    print(f"{'':28s}" + "".join(f"{outcome + f' ({count[outcome]})':>38s}" for outcome in table))
    print(
        f"{'kind of token':28s}" + f"{'a token':>14s}{'a response':>14s}{'share':>10s}" * len(table)
    )
    for kind in [kind for kind, *_ in KINDS] + ["other"]:
        line = f"{kind:28s}"
        for outcome, kinds in table.items():
            value, tokens = kinds.get(kind, (0.0, 0))
            line += f"{value / max(1, tokens):14.3f}{value / count[outcome]:14.2f}{100 * value / sum(v for v, _ in kinds.values()):9.0f}%"
        print(line)
    if args.out:
        write_json(args.out, dict(args=vars(args), count=count, table=table))


if __name__ == "__main__":
    main()
