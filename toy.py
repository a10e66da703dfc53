"""The embedded world, small enough for a laptop: chains of sums, some with a digit hard to read.

    53 +4 -74? +2, result?

Easy problems add and subtract digits. In a hard one, one digit is smudged: the question shows two
scans of it, a quick one, right with probability QUICK_RIGHT, and a careful one, right with
CAREFUL_RIGHT. A first look takes the quick scan; a check looks at both and settles on a digit.
So checks are redundant on easy steps, pay on hard ones, and some failures are nobody's slip:
only a reference could tell.

A leaf: it imports no other file of the project. A problem here is anything with `question` and
`solution`; data.py makes a Problem of each row, as it does of a line of JSONL.
"""

import re
import zlib

import numpy as np

# ------------------------------------------------------------------------------------------------
# Problems

HARD_SHARE = 0.7
QUICK_RIGHT = 0.3
CAREFUL_RIGHT = 0.7


def problem_rows(count, seed, held_out=False):
    """`count` rows (question, answer, solution, difficulty) from a seed.

    A hash of the question decides the side, so no seed can put one question on both.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    rows = []
    while len(rows) < count:
        row = problem_row(rng, "hard" if rng.random() < HARD_SHARE else "easy")
        if (zlib.crc32(row["question"].encode()) % 8 == 0) == held_out:
            rows.append(row)
    return rows


def problem_row(rng, difficulty):
    start = value = int(rng.integers(10, 90))
    count = int(rng.integers(2, 5))
    smudged = int(rng.integers(count)) if difficulty == "hard" else None
    asked, worked = [], []
    for i in range(count):
        # Every digit keeps the value within two digits.
        op = "+" if value < 10 or (value < 90 and rng.random() < 0.5) else "-"
        digit = int(rng.integers(2, 10))
        asked.append(op + (two_scans(rng, digit) + "?" if i == smudged else str(digit)))
        worked.append(f"{value:02d}{op}{digit}={compute(value, op, digit):02d}")
        value = compute(value, op, digit)
    return dict(
        question=f"{start:02d} {' '.join(asked)}, result?",
        answer=f"{value:02d}",
        solution=", ".join(worked),
        difficulty=difficulty,
    )


def two_scans(rng, digit):
    others = [d for d in range(2, 10) if d != digit]
    scans = [
        digit if rng.random() < p else rng.choice(others) for p in (QUICK_RIGHT, CAREFUL_RIGHT)
    ]
    return "".join(map(str, scans))


def compute(value, op, digit):
    return value + digit if op == "+" else value - digit


def read_steps(problem):
    """[(value before, op, true digit, scans or "", value after), ...] of a problem."""
    asked = problem.question.split(",")[0].split()[1:]
    scans = [step[1:-1] if step.endswith("?") else "" for step in asked]
    return [
        (int(step[:2]), step[2], int(step[3]), smudge, int(step[5:]))
        for step, smudge in zip(problem.solution.split(", "), scans, strict=True)
    ]


def worked(trace):
    """The steps that a trace settled on, the last of each line, written as solutions are: the model
    cannot read them otherwise.
    """
    return ", ".join(re.findall(r"\S+$", trace, re.MULTILINE))


def wrong_reference(problem):
    """(solution, answer) with one digit read wrong, and every sum of it right; None where no digit
    keeps the values within two digits.

    The smudged digit is what a wrong scan says, the careful one first; where both are right, and at
    the first digit of an easy problem, the next other digit that fits.
    """
    steps = read_steps(problem)
    at = next((i for i, step in enumerate(steps) if step[3]), 0)
    _, _, digit, scans, _ = steps[at]
    others = sorted(set(range(2, 10)) - {digit}, key=lambda other: abs(other - digit))
    for other in [*map(int, reversed(scans)), *others]:
        value, worked = steps[0][0], []
        for i, (_, op, right, _, _) in enumerate(steps):
            before, read = value, other if i == at else right
            value = compute(before, op, read)
            worked.append(f"{before:02d}{op}{read}={value:02d}")
        if other != digit and all(re.fullmatch(r"\d\d.\d=\d\d", step) for step in worked):
            return ", ".join(worked), f"{value:02d}"
    return None
