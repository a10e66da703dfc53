"""Reading the traces of the embedded world (toy.py): the class of each token, and what a response
did step by step.
"""

import itertools
import re

from toy import compute, read_steps

# Class of the token that comes next: name, in a smudged step or not, the step's line so far.
TOKEN_CLASSES = [
    ("hard: first look", True, r"\d\d[+-]"),
    ("hard: check or go on", True, r"\d\d[+-]\d=\d\d"),
    ("hard: the digit settled on", True, r".* so \d\d[+-]"),
    ("easy: check or go on", False, r".*=\d\d"),
    ("easy: inside a check", False, r".* check.*"),
]
CLASS_NAMES = [name for name, *_ in TOKEN_CLASSES] + ["other"]


def token_class(problem, text):
    """The class of the token that comes next after `text`, the response so far, or "other"."""
    lines = text.removeprefix("<think>\n").split("\n")
    steps = read_steps(problem)
    if "</think>" in text or len(lines) > len(steps):
        return "other"
    smudged = bool(steps[len(lines) - 1][3])
    for name, hard, pattern in TOKEN_CLASSES:
        if hard == smudged and re.fullmatch(pattern, lines[-1]):
            return name
    return "other"


def token_classes(problem, texts):
    """The number in CLASS_NAMES of each token of a response, from the tokens' texts: a list."""
    ends = itertools.accumulate(texts, initial="")  # one more than there are tokens
    return [
        CLASS_NAMES.index(token_class(problem, end)) for end, _ in zip(ends, texts, strict=False)
    ]


def add_tags(rollouts, tokenizer):
    """Writes each response token's class, its number in CLASS_NAMES, into the rollouts' tags."""
    for r in rollouts:
        if r.tags is None:
            texts = [tokenizer.decode([token]) for token in r.response_ids]
            r.tags = token_classes(r.problem, texts)


def read_trace(problem, text):
    """What a response did, step by step: a list of dicts, one a step line that can be read.

    hard: a smudged digit. first_right: the first look. checked: whether a check came. conflict:
    the two scans differ. careful: the step was settled on the careful scan. right: the digit
    carried on, and its sum. Each step is judged from the value that it started from itself, so
    that one slip is counted once.
    """
    rows = []
    lines = text.removeprefix("<think>\n").split("</think>")[0].split("\n")
    for (_, op, digit, scans, _), line in zip(read_steps(problem), lines, strict=False):
        match = re.match(r"(\d\d)([+-])(\d)=(\d\d)(.*)$", line)
        if not match or match[2] != op:
            continue
        before, _, first, after, rest = match.groups()
        settled = re.search(r" so \d\d[+-](\d)=(\d\d)$", rest)
        last, after = settled.groups() if settled else (first, after)
        rows.append(
            dict(
                hard=bool(scans),
                first_right=int(first) == digit,
                checked=" check " in rest or " wait " in rest,
                conflict=bool(scans) and scans[0] != scans[1],
                careful=bool(scans) and last == scans[1],
                right=int(last) == digit and int(after) == compute(int(before), op, digit),
            )
        )
    return rows


def trace_table(responses):
    """What traces do on easy and on hard steps, in percent of such steps (see read_trace), from
    pairs (problem, text).
    """

    def share(rows, key):
        return 100 * sum(row[key] for row in rows) / max(1, len(rows))

    rows = [row for problem, text in responses for row in read_trace(problem, text)]
    table = {}
    for name, hard in (("easy", False), ("hard", True)):
        steps = [row for row in rows if row["hard"] == hard]
        checked = [row for row in steps if row["checked"]]
        conflicts = [row for row in checked if row["conflict"]]
        table[name] = dict(
            steps=len(steps),
            first_right=share(steps, "first_right"),
            checked=share(steps, "checked"),
            right_if_checked=share(checked, "right"),
            conflict=share(checked, "conflict"),
            careful_in_conflict=share(conflicts, "careful"),
            right=share(steps, "right"),
        )
    return table
