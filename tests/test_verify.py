"""Tests of verify.py and answers.py. What is right and what is wrong stands in verdicts.tsv.

In this order: the verdicts of the file, mutants of its golds, whole responses against math-verify,
random answers, extraction, hostile answers, processes, the command line, golds in data files.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import answers
import verify
from verify import Verifier, extract, grade_responses

C, W = "correct", "wrong"
HERE = os.path.dirname(os.path.abspath(verify.__file__))
# `VERIFY_LONG=1 pytest tests/test_verify.py`: all of HANGS, ten times the random answers, 10,000
# gradings for leaks. It takes some minutes.
LONG = "VERIFY_LONG" in os.environ


def read_verdicts():
    """Rows of verdicts.tsv as (gold, response, verdict, why, what math-verify says or "").

    \\u00a0 or \\U0001d7d3 is that character. A text without a box is the content of one, unless the
    verdict is "no_answer". A user adds a line: gold, answer, verdict and why, between tabs.
    """
    with open(os.path.join(HERE, "tests", "verdicts.tsv"), encoding="utf-8") as file:
        lines = file.read().strip("\n").split("\n")[1:]
    rows = []
    for line in lines:
        cells = [
            re.sub(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})", lambda m: chr(int(m[1] or m[2], 16)), cell)
            for cell in line.split("\t")
        ]
        rows.append((cells + [""])[:5])
    return rows


VERDICTS = read_verdicts()


def whole(text, verdict):
    return verdict == "no_answer" or "\\boxed" in text or "think>" in text


def split(text):
    """Texts that stand two spaces or a line apart."""
    return re.split(r"\s\s+", text.strip())


def box(texts):
    """A response for each answer."""
    return ["so \\boxed{" + text + "}" for text in (split(texts) if type(texts) is str else texts)]


@pytest.fixture(scope="module")
def verifier():
    # 10 s: a loaded machine must not fail an ordinary answer.
    with Verifier(workers=2, seconds=10) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty():
    with Verifier(workers=1, seconds=0.5) as shared:
        yield shared


# --------------------------------------------------------------------------------------------------
# The verdicts of the file


def test_verdicts(verifier):
    problems = verifier.check_golds([gold for gold, *_ in VERDICTS])
    wrong = [
        (row, problem)
        for row, problem in zip(VERDICTS, problems, strict=True)
        if (problem is not None) != (row[2] == "unusable")
    ]
    rows = [row for row, problem in zip(VERDICTS, problems, strict=True) if not problem]
    pairs = [(extract(a) if whole(a, v) else a, gold) for gold, a, v, *_ in rows]
    for row, verdict in zip(rows, verifier.grade(pairs), strict=True):
        if verdict != row[2]:
            wrong.append((row, verdict))
    assert len(VERDICTS) > 1200 and not wrong


def test_what_math_verify_says_of_them(verifier):
    for gold, answer, verdict, why, plain in VERDICTS:
        if plain:
            response = answer if whole(answer, verdict) else box([answer])[0]
            same = (verifier._ask((response, gold, True)) == C) == (verdict == C)
            assert plain == ("agrees" if same else "differs"), (gold, answer, why)


# Mutants that pass: 7 with another bracket at infinity, 2 in a name (\det[A)=5), 5 of 2 is 5 of 3,
# the n of `3^n for all n>=1`, and 4 in words (a unit, the sentence around a box).
MUTANTS = {"order": 0, "bracket": 9, "letter": 4, "digit": 3, "sign": 0}
OTHER = dict(zip("0123456789+-()[]", "1234567890-+[](" + ")", strict=True))
KINDS = {
    "digit": "[0-9]",
    "sign": "[-+]",
    "bracket": r"[()\[\]]",
    "letter": "[A-Za-z]",
    "order": r"(?<=[(\[])[^,(){}\[\]]+,[^,(){}\[\]]+(?=[)\],])",  # a list or set has none
}


def mutants(gold):
    """(kind, gold, gold with one symbol changed): the first and the last of each kind."""
    for kind, pattern in KINDS.items():
        # Commands and words in braces stay.
        hits = re.finditer(
            rf"\\[A-Za-z]+|(?:(?<=text)|(?<=mathrm))\{{[^{{}}]*\}}|({pattern})", gold
        )
        hits = [hit for hit in hits if hit[1]]
        for hit in hits[:1] + hits[1:][-1:]:
            if kind == "order":
                new = ",".join(reversed(hit[1].split(",")))
            elif kind == "letter":
                new = "a" if hit[1] in "zZ" else chr(ord(hit[1]) + 1)
            else:
                new = OTHER[hit[1]]
            yield kind, gold, gold[: hit.start()] + new + gold[hit.end() :]


def test_mutants_of_golds(verifier):
    golds = dict.fromkeys(g for g, _, verdict, *_ in VERDICTS if verdict != "unusable")
    changed = [mutant for gold in golds if len(gold) < 100 for mutant in mutants(gold)]
    changed = [row for row in dict.fromkeys(changed) if row[1] != row[2]]
    verdicts = verifier.grade([(mutant, gold) for _, gold, mutant in changed])
    passed = [row for row, verdict in zip(changed, verdicts, strict=True) if verdict == C]
    counts = Counter(kind for kind, *_ in passed)
    assert len(changed) > 800 and all(counts[kind] <= MUTANTS[kind] for kind in KINDS), passed


# --------------------------------------------------------------------------------------------------
# Whole responses: only a box is an answer, and it is read as math-verify reads it

RESPONSES = [
    "<think>\nFirst, 2 + 2 = 4.\n</think>\n\nThe final answer is $\\boxed{ANSWER}$.",
    "So we get \\boxed{ANSWER}",
    "**Answer:** \\(\\boxed{ANSWER}\\)",
    "Therefore\n\\[\n\\boxed{ANSWER}\n\\]",
    "<think>maybe \\boxed{17}?</think>\nHence $$\\boxed{ANSWER}$$",
    "$\\boxed{ANSWER}$ is what we wanted, not 42.",
]
FRACTIONS = "5 -7 0 99 1234 -250 1000000 1/2 -3/4 7/3 22/7 5/8 -11/6 49/36 1/125 999/1000".split()


def test_disagreements_on_whole_responses(verifier):
    rows = []
    for value in map(Fraction, FRACTIONS):
        right, wrong = notations(value, 3), notations(value + 1, 3)
        dressed = [f"x={right[1]}", f"{right[1]}\\text{{ cm}}", f"\\left({right[1]}\\right)"]
        rows += [(right[0], answer) for answer in right + wrong + dressed + [f"\\text{{{value}}}"]]
    golds = [gold for gold, _ in rows]
    texts = [RESPONSES[i % 6].replace("ANSWER", answer) for i, (_, answer) in enumerate(rows)]
    graded = grade_responses(verifier, texts, [True] * len(rows), golds)
    rows = [
        {"question": "?", "gold": g, "response": t, "answer": extract(t), "verdict": reason}
        for g, t, (_, reason) in zip(golds, texts, graded, strict=True)
    ]
    found = verify.disagreements(verifier, {"model": {"responses": rows}})
    assert len(rows) > 250 and not found
    assert {reason for _, reason in graded} == {C, W}


# --------------------------------------------------------------------------------------------------
# Random answers


def notations(value, factor):
    """Plain texts of a Fraction: as a fraction expanded by `factor`, as a decimal, as an integer.

    Decimals are rounded where they have to be.
    """
    top, bottom = value.numerator * factor, value.denominator * factor
    texts = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
        *(f"{float(value):.{places}f}" for places in (3, 6, 9)),
    ]
    return texts + [
        str(value),
        f"{int(value):,}",
        f"{value}.0",
        f"0{value}".replace("0-", "-0"),
    ] * (value.denominator == 1)


def rational(text):
    """The exact value of a plain integer, decimal or fraction, by Python's own Fraction.

    None for any other text, and for decimals beyond 15 digits.
    """
    text = re.sub(r"^([+-]?)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    if "." in text and len(re.sub("[^0-9]", "", text)) > 15:
        return None
    return Fraction(text) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+|/0*[1-9][0-9]*)?", text) else None


FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
DECIMALS = st.fractions(-(10**6), 10**6).map(lambda value: round(value, 3))
VALUES = (
    st.fractions(-(10**6), 10**6, max_denominator=1000)
    | DECIMALS
    | st.integers(-(10**20), 10**20).map(Fraction)
)
NUDGES = st.sampled_from(
    [Fraction(0)] * 4
    + [
        Fraction(nudge)
        for nudge in ("1", "-1", "1/3", "1/10", "-1/1000", "1/100000", "-1/10000000")
    ]
)
# (place, to drop, to put)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 30), st.integers(0, 1), st.sampled_from([*"0123456789.,/-+ x%{}", ""])
    ),
    max_size=2,
)


def edited(text, edits):
    for place, drop, new in edits:
        text = text[:place] + new + text[place + drop :]
    return text


@settings(FUZZ, max_examples=3000 if LONG else 300)
@given(VALUES, NUDGES, st.integers(1, 60), st.integers(0, 59), st.integers(0, 59), EDITS)
def test_random_numbers_against_fractions(verifier, value, nudge, factor, one, other, edits):
    golds, answers = notations(value, factor), notations(value + nudge, 1)
    gold, answer = golds[one % len(golds)], edited(answers[other % len(answers)], edits)
    verdict = verifier.grade([(answer, gold)])[0]
    assert verdict in (C, W, "timeout"), (gold, answer)
    exact_gold, exact = rational(gold), rational(answer)
    if exact_gold is not None and exact is not None:
        # Rule 5: 15 digits and 6 decimals, where there are decimals.
        slack = abs(exact) / 10**14 + Fraction(1, 10**6) if "." in gold + answer else 0
        assert (
            verdict == C
            if exact == exact_gold
            else abs(exact - exact_gold) <= slack or verdict == W
        ), (gold, answer)


PIECES = split(r"""
    1  2  7  0.5  x  y  +  -  *  /  ^  _  !  ,  ;  :  =  <  \le  (  )  [  ]  {  }  \{  \}  |
    \  \\  &  $  %  \%  \text{a}  \text{  \frac  \frac12  \sqrt  \sqrt{  \pi  \infty  \sin
    \log  \cup  \in  \pm  \left(  \right)  \cdot  \begin{pmatrix}  \end{pmatrix}  \boxed{
    \binom  \sum_{i=1}^{9}  \int  dx  \lim_{x\to0}  \mathbb{R}  \emptyset  \overline  ^\circ
    \operatorname{  and  or  e  i  '  "
""") + ["\0", "\ud800", "\u202e", "\u0665", "\n"]
BOX_PIECES = split(r"""
    \boxed{  \boxed{  \boxed  \boxed {  {  }  }  }  \{  \}  \  \\  boxed{  5  6  \text{  <think>
    </think>
""") + [" "]


@settings(FUZZ, max_examples=1500 if LONG else 150)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_random_garbage_is_never_correct(hasty, answer):
    assert hasty.grade([(answer, "\\frac{271828}{314159}")])[0] in (W, "timeout")


@settings(FUZZ, max_examples=1500 if LONG else 150)
@given(st.sampled_from(VERDICTS), EDITS, st.integers(0, 99), st.sampled_from(PIECES))
def test_edited_answers(hasty, row, edits, place, piece):
    gold, answer, *_ = row
    if row[2] in ("unusable", "no_answer") or len(gold) > 100:
        return
    answer = edited(answer, edits)
    assert hasty.grade([(answer[:place] + piece + answer[place:], gold)])[0] in (C, W, "timeout")


@settings(FUZZ, max_examples=5000 if LONG else 500)
@given(st.lists(st.sampled_from(BOX_PIECES), max_size=14).map("".join))
def test_extract_against_a_second_reading(text):
    def read(text):  # rules 1 and 2 once more: box by box from the last one, character by character
        text = text.split("</think>")[-1]
        boxes = list(re.finditer(r"\\boxed\s*(?:\{|([0-9]+))", text))
        for opening in reversed([] if "<think>" in text else boxes):
            if opening[1]:
                return opening[1]
            depth, at = 1, opening.end()
            while depth and at < len(text):
                pair = text[at : at + 2]
                escaped = pair in ("\\{", "\\}") or (
                    pair == "\\\\" and not text.startswith("boxed", at + 2)
                )
                depth += 0 if escaped else (text[at] == "{") - (text[at] == "}")
                at += 2 if escaped else 1
            if not depth:
                return text[opening.end() : at - 1].strip() or None
        return None

    assert extract(text) == read(text)


EXACT = r"""
    0  -0  1  -1  +7  07  -07  100  213  1234  99999  0.5  1/2  \dfrac{3}{6}  -0.5  0.25  1.0  4/4
    -\frac{1}{2}  1/3  0.333333  0.333334  2/6  0.000001  0.000002  1/1000000  999999.999999
    123456789012/7  100000.1  1000001/10
"""
EXACT = [*split(EXACT), "9" * 18, "-" + "9" * 18, "9" * 17 + "8"]
SLOW = split(r"--5  5e3  1/0  1/-2  .5  1234567.5  0.1234567  50\%  3\frac{1}{2}  \frac12/2")


def test_exact_comparison_equals_math_verify(verifier):
    for gold in EXACT:
        for answer in EXACT:
            verdict = verify._quick_verdict(answer, gold)
            pair = answer, gold
            assert type(verdict) is tuple or verdict == verifier._ask(pair), pair
    for other in [*SLOW, "9" * 19, "\u0665"]:
        assert type(verify._quick_verdict(other, "7")) is tuple, other


NUMBERS = st.builds(
    lambda value, kind: notations(value, 3)[kind % len(notations(value, 3))],
    st.fractions(-1000, 1000, max_denominator=999) | DECIMALS,
    st.integers(0, 99),
)


@settings(FUZZ, max_examples=3000 if LONG else 300)
@given(NUMBERS, NUMBERS, st.integers(-3, 3), st.booleans())
def test_exact_comparison_of_random_numbers_equals_math_verify(verifier, gold, other, steps, near):
    exact = rational(gold)
    answer = f"{float(exact + Fraction(steps, 10**6)):.6f}" if near and exact is not None else other
    verdict = verify._quick_verdict(answer, gold)
    if isinstance(verdict, str):
        values = [answers.normal(text)[0] for text in (answer, gold)]
        assert verdict == verifier._ask(values), (gold, answer)


TEXT_PIECES = [
    *PIECES,
    " ",
    *split(r"""
    1\,000  \text{ cm}  cm  \textbf{  5 balls  \approx  _5  ^\circ  \fbox{  $  ~  or  .  \pm  k\in
    \text{ for all }  \mathbb{Z}  8:30  e5  √  ²  ½
"""),
]


@settings(FUZZ, max_examples=5000 if LONG else 500)
@given(st.lists(st.sampled_from(TEXT_PIECES), max_size=12).map("".join))
def test_normal_form_of_anything(text):
    normal = answers.normal(text)
    assert normal is None or len(normal) == 2 and all(isinstance(part, str) for part in normal)
    assert normal is None or answers.units_agree(normal[1], normal[1])  # a gold agrees with itself


LENGTHY = [left * 250 + right * 250 for left, right in ("{}", "()", "[]")]
LENGTHY += [" a" * 250, "5 " + "a " * 249, "5" + "\\text{a}" * 60, "1 000" * 100, "5/" * 250]
LENGTHY += ["$" * 500, "\\approx" * 70, "x<1 or " * 70, "." * 500, "k " * 250, "4k, " + "k " * 240]
LENGTHY += ["4k" + "(" * 240 + "k\\in", "\\frac" * 100, "1:" * 250, "x\\text{ " * 60, "for " * 120]
LENGTHY += ["x, for all n " * 38, "e" * 500, "1e" * 250, "\\pm" * 160, "x," * 250]


def test_normal_form_takes_no_time():
    for text in LENGTHY:
        start = time.perf_counter()
        answers.normal(text)
        assert time.perf_counter() - start < 1, text[:30]


# --------------------------------------------------------------------------------------------------
# Extraction


def test_extract():
    for answer in (
        "1 \\\\{2}",
        "\\{1,2\\}",
        "\\left\\{1\\right.",
        "\ud800",
        "\\frac{1}{\\sqrt{2}}",
    ):
        assert extract("<think></think>so \\boxed{" + answer + "} done") == answer


LINEAR = [
    ("\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}", 20_001),
    ("\\boxed{" * 100_000, None),
    ("\\boxed{1}" * 100_000, 1),
    ("\\boxed{1}," * 100_000, 1),
    ("\\boxed{" * 50_000 + "1" + "}" * 50_000, 1),
    ("\\boxed" + " " * 1_000_000, None),
    ("\\" * 1_000_001, None),
    ("<think>" * 100_000, None),
    ("</think>" * 100_000 + "\\boxed{1}", 1),
    ("}" * 1_000_000, None),
]


def test_extract_is_linear():
    for text, size in LINEAR:
        start = time.process_time()
        answer = extract(text)
        assert (answer and len(answer)) == size, text[:20]
        assert time.process_time() - start < 2, text[:20]


# --------------------------------------------------------------------------------------------------
# Hostile answers

HOSTILE = split(r"""
    9^{9^{9}}  ((9!)!)!  \binom{10^9}{10^8}  2^{10^{10}}  e^{e^{e^{e^{9}}}}  \frac{1}{0}  0/0
    \input{/etc/passwd}  \write18{ls}  \  %  {  }  $  \left(  ^  exit()
    __import__("os").system("touch pwned")  lambda: 5  True  None  nan  NaN  5 if 1 else 2
""") + [
    "(" * 40 + "1" + ")" * 40,
    "1" * 10_000,
    "{" * 10_000 + "1" + "}" * 10_000,
    "5\0",
    "\0",
    "\ud800",
]
HOSTILE += ["5\udfff", "\u202e5", "5\u200f", "5\n\n6", '5"]\n"correct"', "", " ", "5" + "\\" * 400]
HOSTILE += ["\\frac" * 80, "\\sqrt" * 80, "x" * 100]
# about 130, half of them decimal digits; full-width ones are ours
FIVES = [c for c in map(chr, range(128, 0x110000)) if unicodedata.numeric(c, 0) == 5 and c != "５"]
INVISIBLE = [c for c in map(chr, range(0x3000)) if unicodedata.category(c) == "Cf"] + list(
    "\u034f\u115f\u3164\ufe0f\ufeff\U000e0035"
)
SPACES = [char for char in map(chr, range(0x3001)) if char.isspace()]
CONTROLS = [*INVISIBLE[::3], *SPACES[::2], *map(chr, range(0, 32, 2)), "\x7f"]
BRACKETS = split(r"( )  { }  [ ]  \left( \right)  \sqrt{ }  \frac{1}{1+ }  | |  -( )  \text{ }")
BRACKETS = [pair.split(" ") for pair in BRACKETS]
LONG_ANSWERS = ["-" * 449 + "5", "5" + "!" * 400, "1" + "^1" * 200, "1/" * 249 + "1"]
LONG_ANSWERS += ["1," * 249 + "1", "5=" * 200 + "6", "1<" * 200 + "2", "5\\pm" * 90 + "5"]
LONG_ANSWERS += ["0" * 400 + "/" + "0" * 50, "=" * 400, "_" * 400, "&" * 400, "\\\\" * 200]
LONG_ANSWERS += ["\\pm" * 150, "\\cup" * 90, "\\%" * 200, "\\infty" * 80, "\\sum" * 100]
DIGITS = ["5" * 100_000, "0" * 100_000 + "5", "5." + "0" * 100_000, "5" + "\u0660" * 100_000]
DIGITS += ["10" * 50_000 + "/" + "2" * 50_000, "5" * 501, "5" + "\0" * 100_000]
ONES = ["1" * 399, "1" * 399 + "2", "1" * 401, "-" + "1" * 400, "1" * 200 + "." + "1" * 200]
THOUSAND = [f"\\boxed{{{i}}}" for i in range(1000)]
# (name, gold, verdict on every response, responses): what is too long or odd for verdicts.tsv
FAMILIES = [
    ("500 characters", "5", W, box(LONG_ANSWERS)),
    ("nested", "5", W, box([a * n + "1" + b * n for n in (3, 5) for a, b in BRACKETS])),
    ("nested deeply", "5", W, box([a * 60 + "1" + b * 60 for a, b in BRACKETS])),
    ("too many signs", "5", W, box(["x_" * 200, "|x" * 200, "||1||" * 70])),
    ("a tower", "5", W, box(["1" + "^1" * n for n in (41, 99, 249)])),
    ("100,000 digits", "5", W, box(DIGITS)),
    (
        "spaces",
        "5",
        C,
        box([" " * 100_000 + "5", "5" + "\n" * 100_000, "\u3000" * 100_000 + "5\t"]),
    ),
    ("spaces after it", "5", C, ["\\boxed{5}" + " " * 100_000]),
    ("400 digits, wrong", "1" * 400, W, box([*ONES, "1" * 399 + "\u0661"])),
    ("400 digits", "1" * 400, C, box([a + "1" * 400 for a in ("", "0" * 90, "+")])),
    ("400 digits over 1", "1" * 400, C, box(["1" * 400 + "/1"])),
    ("many boxes", "5", W, ["".join(THOUSAND), "\\boxed{5}" * 1000 + "\\boxed{4}"]),
    ("many boxes, gold last", "5", C, ["".join(THOUSAND[:4:-1])]),
    ("no box", "5", "no_answer", ["\\boxed{" + "{" * 10_000 + "5" + "}" * 9_999 + "\\}"]),
    (
        "no complete box",
        "5",
        "no_answer",
        ["\\boxed{5" + "\\}" * 99, "<think>" * 999 + "\\boxed{5}"],
    ),
    ("braces", "5", C, ["\\boxed{" * 10_001 + "5" + "}" * 10_000, "}{" * 10_000 + "\\boxed{5}"]),
    (
        "more braces",
        "5",
        C,
        ["\\boxed{5}" + "}" * 10_000, "<think>" * 99 + "</think>\\boxed{5} so"],
    ),
    ("empty box", "5", "no_answer", box(["", *SPACES, "5\\boxed{}"]) + ["\\boxed{5}\\boxed{}"]),
    ("other scripts' digits", "5", W, box(FIVES)),
    ("among ours", "55", W, box(["5" + c for c in FIVES] + [c + "5" for c in FIVES])),
    ("invisible", "5", W, box([*(c + "5" for c in INVISIBLE), "5\u200b", "5\u202c"])),
    ("invisible pairs", "5", W, box(["\u202a5\u202c", "\u20675\u2069"])),
    ("inside a number", "55", W, box(["5" + c + "5" for c in CONTROLS])),
    ("around a number", "5", C, box([space + "5" + space for space in SPACES])),
]
# Each would run until the limit ends it, or nearly.
HANGS = box(r"""
    2^{2^{2^{2^{2^{2}}}}}  10^{10^{100}}  (-9)^{9^9}  \sqrt[9]{9^{9^{9}}}  9^{-9^{9}}
    x^{9^{9^{9}}}  10^{10^{10}}-10^{10^{10}}+6  5^{1^{9^{9^{9}}}}+1  (1+x)^{10^{6}}
    (1+x+y+z)^{99}  7^{7777777}  9!!!  (10^{9})!  5!!!!!!!!!  (9^9)!
    \frac{(10^{8})!}{(10^{8}-1)!}  \binom{10^{12}}{5\cdot10^{11}}  \Gamma(10^{10})
    \prod_{i=1}^{10^{9}}i  \frac{1000000!}{999999!}  \sum_{i=1}^{10^{12}}\frac{1}{i}
    \int e^{x^x} dx  \sum_{i=1}^{\infty}\frac{1}{i^{1.0001}}
    \prod_{i=1}^{\infty}(1+\frac{1}{i^2+i+7})  \int_0^1\int_0^1\int_0^1 e^{xyz} dx dy dz
    \sum_{n=1}^{10^6}n^{n}  \operatorname{ones}(9999,9999)
""") + box(["|x" * 19, "||1||" * 7])


def test_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with Verifier(workers=2, seconds=1) as verifier:
        # The first answer of a worker and later ones take different paths.
        assert verifier.grade([("\\sqrt{4}", "2")]) == [C]
        graded = verifier.grade([(answer, "5") for answer in HOSTILE])
        verdicts = dict(zip(HOSTILE, graded, strict=True))
        assert set(verdicts.values()) == {"wrong", "timeout"}, verdicts
        assert verdicts["9^{9^{9}}"] == verdicts["((9!)!)!"] == "timeout"
        assert verdicts["1" * 10_000] == verdicts["\ud800"] == "wrong"
        before = time.monotonic()
        # From the cache.
        assert (
            verifier.grade([("9^{9^{9}}", "5")]) == ["timeout"] and time.monotonic() - before < 0.5
        )
        workers = [worker.process.pid for worker in verifier._workers if worker.process]
    assert time.monotonic() - start < 3.0 * len(HOSTILE)
    assert not any(map(alive, workers)) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "gold, verdict, texts", [pytest.param(*family, id=name) for name, *family in FAMILIES]
)
def test_hostile_family(verifier, gold, verdict, texts):
    def others(texts, finished, expected):
        graded = grade_responses(verifier, texts, [finished] * len(texts), [gold] * len(texts))
        rows = zip(texts, graded, strict=True)
        return {text[:99]: result for text, result in rows if result != expected}

    assert not others(texts, True, (C if verdict == C else "incorrect", verdict))
    assert not others(texts, False, ("truncated", "truncated"))
    # A think block is never read, whatever it holds.
    thoughts = ["<think>" + text + "</think>\\boxed{-99}" for text in texts]
    assert not others(thoughts, True, ("incorrect", W))


def test_hostile_gold_answers(verifier):
    golds = [extract(text) or text for _, _, _, texts in FAMILIES for text in texts[::9]]
    for gold, problem in zip(golds, verifier.check_golds(golds), strict=True):
        try:
            verdict = verifier.grade([(gold if problem is None else "1/2", gold)])
        except ValueError:
            assert problem
        else:  # what complains about itself has no right answer
            assert verdict == [C] if problem is None else verdict[0] in (W, "timeout"), gold[:99]


def test_hangs(hasty):
    for text in HANGS if LONG else HANGS[::10]:
        start = time.monotonic()
        assert grade_responses(hasty, [text], [True], ["5"])[0] in (
            ("incorrect", W),
            ("incorrect", "timeout"),
        ), text
        # 20 s: to start another worker on a loaded machine.
        assert time.monotonic() - start < hasty.seconds + 20, text


def test_a_verifier_works_on_after_time_outs_interrupts_and_deaths():
    with Verifier(workers=1, seconds=5) as verifier:
        assert verifier.grade(
            [("9^{9^{9}}", "5"), ("\\sqrt4", "2"), (None, "5"), ("\\sqrt5", "2")]
        ) == ["timeout", C, "no_answer", W]
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            verifier.grade([("9^{9^{8}}", "1/2"), ("8^{8^{9}}", "1/2")])
        # No verdict of the interrupted call is left in the pipe.
        assert verifier.grade([("\\sqrt6", "2"), ("\\sqrt9", "3")]) == [W, C]
        first = verifier._workers[0].process.pid
        os.kill(first, signal.SIGKILL)  # as the system does when memory runs out
        assert verifier.grade([("\\sqrt{16}", "4")]) == [C]
        second = verifier._workers[0].process
        assert second.pid != first and second.poll() is None
        # One that has not answered yet is not blamed for dying idle either.
        verifier._workers[0].used = False
        second.kill()
        second.wait()
        assert verifier.grade([("\\sqrt{25}", "5")]) == [C]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_memory_limit():
    with Verifier(workers=1, seconds=10, memory_mb=256) as verifier:
        worker = verifier._workers[0]
        assert verifier.grade([("\\sqrt4", "2")]) == [C]
        with open(f"/proc/{worker.process.pid}/limits") as limits:
            assert str(256 << 20) in limits.read()


def children():
    """Process ids of our children, and of theirs, that have not been waited for."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                parents[int(pid)] = int(stat.read().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def megabytes(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_nothing_leaks(verifier):
    # The verdicts on ordinary pairs, by another verifier.
    pairs = [(row[1], row[0]) for row in VERDICTS if row[2] in (C, W) and not whole(*row[1:3])]
    verdicts = dict(zip(pairs, verifier.grade(pairs), strict=True))
    processes, files = children(), len(os.listdir("/proc/self/fd"))
    # 5 s: ordinary answers must not time out on a busy machine.
    with Verifier(workers=2, seconds=5) as verifier, ThreadPoolExecutor(2) as threads:
        assert verifier.grade([("9^{9^{9}}", "5"), ("8^{9^{10}}", "5")]) == ["timeout"] * 2
        workers = children() - processes
        assert len(workers) == 2  # those that were killed are gone, not zombies
        pairs = list(reversed(verdicts))  # in other company and from two threads: the same verdicts
        halves = [pairs[::4], pairs[1::4]]
        assert list(threads.map(verifier.grade, halves)) == [
            [verdicts[pair] for pair in half] for half in halves
        ]
        open_files, memory = len(os.listdir("/proc/self/fd")), []
        for block in range(10):
            numbers = range(block * 2000, block * 2000 + (1000 if LONG else 30))
            verdict = verifier.grade(
                [
                    (f"\\frac{{{2 * i}\\pi}}{{14}}", f"{i}\\pi/7")
                    if i % 10
                    else (f"x_{{{i}}}+{i}", f"{i}+x_{{{i}}}")
                    for i in numbers
                ]
            )
            assert verdict == [C] * len(numbers)
            memory.append(sum(map(megabytes, [os.getpid(), *workers])))
        assert children() - processes == workers and len(os.listdir("/proc/self/fd")) == open_files
        # 40 MB, of 200 or so: caches that fill up take a few.
        assert memory[-1] < memory[1] + 40, memory
    assert children() == processes and len(os.listdir("/proc/self/fd")) == files


def test_close_is_final_and_idempotent():
    verifier = Verifier()
    assert verifier.grade([]) == [] and verifier.grade([("5", "5")]) == [C]
    assert not any(worker.process for worker in verifier._workers)  # integers need no worker
    verifier.grade([("\\sqrt4", "2")])
    pids = [worker.process.pid for worker in verifier._workers if worker.process]
    verifier.close()
    verifier.close()
    assert pids and not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="closed"):
        verifier.grade([("5", "5")])


@pytest.mark.parametrize("kill", [True, False])
def test_workers_do_not_outlive_their_parent(tmp_path, kill):
    # No `if __name__` guard and never closed: both must be harmless.
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, threading, time\n"
        "from verify import Verifier\n"
        "verifier = Verifier(workers=1, seconds=2)\n"
        "verifier.grade([('x', '1x')])\n"
        "print(verifier._workers[0].process.pid, flush=True)\n"
        + ("verifier.grade([('9^{9^{9}}', '5')])\n" if kill else "")
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(verify.__file__))}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid = int(parent.stdout.readline())
        if kill:
            parent.kill()
        assert (parent.wait(20) == 0) != kill
    deadline = time.monotonic() + 8
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="did not start"):
        verifier.grade([("\\sqrt4", "2")])


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"seconds": 0}, {"memory_mb": 0}])
def test_bad_limits(arguments):
    with pytest.raises(ValueError, match="Verifier needs"):
        Verifier(**arguments)


def test_gold_answers(verifier):
    problems = verifier.check_golds(["5", "0.\\overline{3}", "\\frac{1}{0}", "1+" * 300 + "1", ""])
    for problem, says in zip(problems[1:4], ("cannot parse", "to itself", "longer"), strict=True):
        assert says in problem
    assert problems[0] is None and problems[4]
    with pytest.raises(ValueError, match="overline"):
        verifier.grade([("0.5", "0.\\overline{3}")])
    with pytest.raises(ValueError, match="5 million.*no unit"):
        verifier.grade([("5", "5 million")])


def test_grade_responses(verifier):
    texts = ["\\boxed{5}", "\\boxed{6}", "5", "\\boxed{5}", "<think>\\boxed{5}"]
    expected = [
        ("correct", "correct"),
        ("incorrect", "wrong"),
        ("incorrect", "no_answer"),
        ("truncated", "truncated"),
        ("incorrect", "no_answer"),
    ]
    assert grade_responses(verifier, texts, [True, True, True, False, True], ["5"] * 5) == expected
    verifier = SimpleNamespace(grade=lambda pairs: ["timeout"] * len(pairs))
    assert grade_responses(verifier, ["\\boxed{5}"] * 2, [True, False], ["5"] * 2) == [
        ("incorrect", "timeout"),
        ("truncated", "truncated"),
    ]
    with pytest.raises(ValueError):
        grade_responses(verifier, ["\\boxed{5}"], [True, True], ["5"])


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(verify, "CACHE_PAIRS", 2)
    with Verifier(workers=1) as verifier:
        pairs = [
            ("\\sqrt4", "2"),
            ("\\sqrt5", "2"),
            ("\\sqrt9", "3"),
            ("\\sqrt4\\text{ cm}", "2 dollars"),
            ("\\sqrt4\\text{ cm}", "2"),
        ]
        assert verifier.grade(pairs) == [C, W, C, W, C]
        # Normal forms: the last pair was the first once more.
        assert list(verifier._cache) == [("\\sqrt{5}", "2"), ("\\sqrt{9}", "3")]


@pytest.mark.parametrize(
    "arguments, code, stdout, stderr",
    [
        (["so \\boxed{1/2}", "0.5"], 0, "answer:  1/2\nverdict: correct\n", ""),
        (["\\boxed{-7}", "-7"], 0, "answer:  -7\nverdict: correct\n", ""),
        (["\\boxed{6}", "5"], 1, "answer:  6\nverdict: wrong\n", ""),
        (["5", "5"], 1, "answer:  None\nverdict: no_answer\n", ""),
        (["\\boxed{5}", "\\foo"], 2, "", "gold answer '\\\\foo': math-verify cannot parse it\n"),
        (["5"], 2, "", "usage: "),
    ],
)
def test_command_line(arguments, code, stdout, stderr):
    result = subprocess.run(
        [sys.executable, verify.__file__, *arguments], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr) and result.stderr.count("\n") == (code == 2)


def test_import_is_light():
    code = (
        "import sys, json, verify; "
        "heavy = ('torch', 'transformers', 'sympy', 'math_verify'); "
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(verify.__file__)),
    )
    assert json.loads(result.stdout) == []


# The keys of a row of eval.py --out, one response each.
KEYS = ["question", "gold", "response", "answer", "verdict"]
OUT = {
    "settings": {"question": "no row: it has no response"},
    "benchmarks": {
        "math": {"model a": {"responses": [["1+1?", "2", "\\boxed{2}", "2", "correct"]]}},
        "aime": [
            {"responses": [["2+3?", "5", "so 5", None, "no_answer"]]},
            {"responses": [["1/2?", "0.5", "\\boxed{½}", "½", "correct"]]},
            {"responses": [["7?", "7", "\\boxed{8}", "8", "wrong"]]},
        ],
    },
}


def rows_of(node):
    """OUT with dicts for rows."""
    if isinstance(node, dict):
        return {key: rows_of(value) for key, value in node.items()}
    if isinstance(node, list):
        row = len(node) == 5 and isinstance(node[0], str)
        return dict(zip(KEYS, node, strict=True)) if row else [rows_of(part) for part in node]
    return node


@pytest.mark.parametrize("packed", [True, False])
def test_disagreements(tmp_path, packed, capsys):
    path = str(tmp_path / "out.json") + ".gz" * packed
    with gzip.open(path, "wt") if packed else open(path, "w") as file:
        json.dump(rows_of(OUT), file)
    assert verify.main(["--disagreements", path]) == 0
    *found, last = capsys.readouterr().out.splitlines()
    assert [(row["gold"], row["math-verify"]) for row in map(json.loads, found)] == [
        ("5", C),
        ("0.5", W),
    ]
    assert last == "math-verify says otherwise of 2 responses"


def test_disagreements_of_a_file_without_rows(tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text('{"accuracy": [0.5]}')
    assert verify.main(["--disagreements", str(path)]) == 0
    assert capsys.readouterr().out == "math-verify says otherwise of 0 responses\n"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    for name, says in (("missing.json", "No such file"), ("broken.json", "Expecting")):
        assert verify.main(["--disagreements", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert says in error and name in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Golds in data files: data.load_file

ROW = '{"question": "How many?", "answer": %s}'


def load(tmp_path, content, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    import data  # torch, which the rest does not need

    return data.load_file(str(path))


def test_numbers_in_data_become_decimal_text(tmp_path):
    numbers = "2 2.50 0.00001 1e16 1e-7 -1.5e3 1E2".split()
    texts = "2 2.5 0.00001 10000000000000000 0.0000001 -1500.0 100.0".split()
    for number, text in zip(numbers, texts, strict=True):
        assert load(tmp_path, ROW % number)[0].answer == text


@pytest.mark.parametrize("missing", split('NaN  Infinity  -Infinity  1e999  null  ""  " "  "nan"'))
def test_missing_golds_are_refused_by_row(tmp_path, missing, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, ROW % 5 + "\n" + ROW % missing)
    assert re.fullmatch(r"error: \S+, line 2: no answer .*\n", capsys.readouterr().err)


def test_forms_of_json_files(tmp_path):
    five = ROW % 5
    forms = ["\ufeff" + five, five + "\r\n", f"[{five}]", f"\n [\n{five}\n]\n"]
    for form in [*forms, "\n" + five.replace("many", "m\u2028\u00e9ny")]:
        for name in ("a.json", "a.jsonl"):
            assert [problem.answer for problem in load(tmp_path, form, name)] == ["5"]


FIVE = ROW % 5
WIDE = "a.jsonl, line 1: not UTF-8 (invalid start byte); save the file as UTF-8"
ARRAY = "a.jsonl: begins like a JSON array, but is not JSON "
MILLION = (
    "a.jsonl, line 2: gold answer '5 million': it is prose, or has words or numbers beside a "
    "number that are no unit (answers.py) (the first of 2 such rows)"
)
LATIN = "a.jsonl, line 2: not UTF-8 (invalid continuation byte); save the file as UTF-8"
UNREADABLE = [
    (FIVE.encode("utf-16"), WIDE),
    (FIVE.encode("utf-16-le"), "a.jsonl, line 1: not JSON"),
    ((FIVE + "\n" + ROW % '"\u00e9"').encode("latin-1"), LATIN),
    (f"[{FIVE}, 5]", "a.jsonl, row 2: not a JSON object"),
    ("[" + FIVE, ARRAY + "(Expecting ',' delimiter"),
    ("[1]\n[2]", ARRAY + "(Extra data"),
    (FIVE + "\n5", "a.jsonl, line 2: not a JSON object"),
    (FIVE + "\n" + ROW % '"5 million"' + "\n" + ROW % '"10 80"', MILLION),
    ("", "no rows"),
    ("[]", "no rows"),
]


@pytest.mark.parametrize("content, message", UNREADABLE)
def test_unreadable_data_is_one_line(tmp_path, content, message, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, content)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_units_of_golds_are_reported(tmp_path, capsys):
    problems = load(
        tmp_path, "\n".join(ROW % gold for gold in ("5", '"15 balls"', '"5 m"', '"9 (apples)"'))
    )
    # What a context shows is the text of the data.
    assert [problem.answer for problem in problems] == ["5", "15 balls", "5 m", "9 (apples)"]
    said = capsys.readouterr().out
    assert "2 golds have a unit, which a response may leave out: 15 balls" in said
    load(tmp_path, ROW % 5)
    assert capsys.readouterr().out == ""
