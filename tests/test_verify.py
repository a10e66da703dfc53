"""Tests of verify.py and answers.py. What is right and what is wrong stands in verdicts.tsv: a user
adds a line, gold, answer, verdict and why between tabs. With VERIFY_LONG=1 in the environment: all
that hangs, and ten times the random answers.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import answers
import verify
from run import write_json
from tests.helpers import write
from verify import Verifier, extract, grade_responses

C, W = "correct", "wrong"
HERE = os.path.dirname(os.path.abspath(verify.__file__))
FILES, LONG = "/proc/self/fd", "VERIFY_LONG" in os.environ


def box(texts):
    return ["so \\boxed{" + text + "}" for text in texts]


def read_verdicts():
    r"""Rows of verdicts.tsv: (extracted answer, gold, verdict, response, what math-verify says).

    \u00a0 or \U0001d7d3 is that character. A text without a box is the content of one.
    """
    rows = []
    for line in Path(HERE, "tests", "verdicts.tsv").read_text("utf-8").strip("\n").split("\n")[1:]:
        code = r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}"
        cells = [re.sub(code, lambda m: chr(int(m[0][2:], 16)), cell) for cell in line.split("\t")]
        gold, text, verdict, _, says = (cells + [""])[:5]
        whole = verdict == "no_answer" or "\\boxed" in text or "think>" in text
        answer, response = (extract(text), text) if whole else (text, box([text])[0])
        rows.append((answer, gold, verdict, response, says))
    return rows


VERDICTS = read_verdicts()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, seconds=10) as shared:  # a loaded machine fails no ordinary answer
        yield shared


@pytest.fixture(scope="module")
def hasty():
    with Verifier(workers=1, seconds=0.5) as shared:
        yield shared


def test_verdicts(verifier):
    problems = verifier.check_golds([gold for _, gold, *_ in VERDICTS])
    unusable = [row for row, problem in zip(VERDICTS, problems, strict=True) if problem]
    assert unusable == [row for row in VERDICTS if row[2] == "unusable"] and len(VERDICTS) > 1200
    rows = [row for row in VERDICTS if row[2] not in ("unusable", "hangs")]
    found = zip(rows, verifier.grade([row[:2] for row in rows]), strict=True)
    assert not [(row, verdict) for row, verdict in found if verdict != row[2]]


def test_what_math_verify_says_of_them(verifier):
    rows = [row for row in VERDICTS if row[4]]
    plain = verifier.plain([(response, gold) for _, gold, _, response, _ in rows])
    for row, accepts in zip(rows, plain, strict=True):
        assert row[4] == ("agrees" if accepts == (row[2] == C) else "differs"), row


# Mutants that pass: 7 with another bracket at infinity, 2 in a name (\det[A)=5), 5 of 2 is 5 of 3,
# the n of `3^n for all n>=1`, and 4 in words (a unit, the sentence around a box).
KINDS = {"[0-9]": 3, "[-+]": 0, r"[()\[\]]": 9, "[A-Za-z]": 4}  # symbols: how many at most
OTHER = dict(zip("9+-()[]zZ", "0-+[](" + ")aA", strict=True))


def mutants(gold, symbols):
    """The gold with another symbol, the first or the last; commands and words in braces stay."""
    words = r"\\[A-Za-z]+|(?:(?<=text)|(?<=mathrm))\{[^{}]*\}"
    hits = [hit for hit in re.finditer(f"{words}|({symbols})", gold) if hit[1]]
    for hit in hits[:1] + hits[1:][-1:]:
        new = OTHER.get(hit[1], chr(ord(hit[1]) + 1))
        yield gold[: hit.start()] + new + gold[hit.end() :], gold


@pytest.mark.parametrize("symbols", KINDS)
def test_mutants_of_golds(verifier, symbols):
    golds = dict.fromkeys(row[1] for row in VERDICTS if row[2] != "unusable" and len(row[1]) < 100)
    changed = [mutant for gold in golds for mutant in mutants(gold, symbols)]
    verdicts = verifier.grade(changed)
    passed = [row for row, verdict in zip(changed, verdicts, strict=True) if verdict == C]
    assert len(changed) > 60 and len(passed) <= KINDS[symbols], passed


def notations(value, factor):
    """Plain texts of a Fraction: as a fraction expanded by `factor`, a decimal, an integer."""
    top, bottom = value.numerator * factor, value.denominator * factor
    texts = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{top}}}{{{bottom}}}"]
    decimal = [f"{float(value):.3f}"] if 1000 % value.denominator == 0 and abs(top) < 10**9 else []
    integer = [str(value), f"{int(value):,}", f"{value}.0"] if value.denominator == 1 else []
    return texts + decimal + integer


def fuzz(examples):
    few = dict(max_examples=examples * 10 if LONG else examples, deadline=None, database=None)
    return settings(derandomize=True, suppress_health_check=list(HealthCheck), **few)


VALUES = st.fractions(-(10**6), 10**6, max_denominator=1000) | st.integers().map(Fraction)
VALUES |= st.fractions(-(10**6), 10**6).map(lambda value: round(value, 3))
NUDGES = st.sampled_from([*map(Fraction, "0 0 0 1 -1 1/3 1/10 -1/1000".split())])
KIND = st.integers(0, 99)


@fuzz(300)
@given(VALUES, NUDGES, st.integers(1, 60), KIND, KIND)
def test_random_numbers_against_fractions(verifier, value, nudge, factor, one, other):
    golds, answers = notations(value, factor), notations(value + nudge, 3)
    gold, answer = golds[one % len(golds)], answers[other % len(answers)]
    # math-verify's floats have 15 digits.
    if nudge == 0 or "." not in gold + answer or abs(value) < 10**9:
        assert verifier.grade([(answer, gold)]) == [W if nudge else C], (gold, answer)


READABLE = [row[:2] for row in VERDICTS if row[2] in (C, W) and len(row[1]) < 100]
TOKENS = re.findall(r"\\[A-Za-z]+\{?|[0-9]+|\s*[A-Za-z]+|.", "".join(g for _, g in READABLE))
PIECES = [*dict.fromkeys(TOKENS), "\0", "\ud800", "\u202e", "\u0665", "\n"]
HARD = ["{1}", "1 000", "5/", "x<1 or ", "k ", "1e", "x, for all n ", "4k("]
HARD += [r"\text{ cm}/", ", ", "ℝ", "≈5", "½"]  # once exponential, or a square of the length
PIECE, STRANGE = st.sampled_from(PIECES), "\\frac{271828}{314159}"


@fuzz(200)
@given(st.lists(PIECE, max_size=12), st.sampled_from(READABLE), KIND, KIND, PIECE)
def test_garbage_and_edited_answers(hasty, pieces, pair, start, length, piece):
    garbage, (answer, gold) = "".join(pieces), pair
    edited = answer[:start] + piece + answer[start + length % 3 :]
    verdicts = hasty.grade([(garbage, STRANGE), (edited, gold)])
    assert verdicts[0] in (W, "timeout") and verdicts[1] in (C, W, "timeout")
    with suppress(ValueError):
        unit = answers.normal(garbage)[1]
        assert answers.units_agree(unit, unit)  # a gold agrees with itself


def test_plain_numbers_are_compared_as_math_verify_does(verifier, monkeypatch):
    texts = [*"0 -0 1 +7 07 -07 100 213".split(), "9" * 18, "-" + "9" * 18, "9" * 17 + "8"]
    texts += [*"1/2 0.5 -2/4 1/3 7.0 14/2 0.07 21/300".split(), r"-\dfrac{1}{2}"]
    pairs = [(answer, gold) for answer in texts for gold in texts]
    with Verifier(workers=1) as exact:
        verdicts = exact.grade(pairs)
        assert exact._workers == [None]  # they need no worker
    monkeypatch.setattr(verify, "NUMBER", re.compile("never"))
    assert verifier.grade(pairs) == verdicts and set(verdicts) == {C, W}


def test_reading_is_linear():  # a square of these lengths would not end
    for text in ("\\boxed{" * 10**5, "<think>" * 10**5, "\\boxed" + " " * 10**6, "\\" * 10**6):
        assert extract(text) is None
    ones = ["\\boxed{1}" * 10**5, "\\boxed{1}," * 10**5, "</think>" * 10**5 + "\\boxed{1}"]
    assert {extract(text) for text in [*ones, "\\boxed{0\\boxed{1}0}"]} == {"1"}
    assert len(extract("\\boxed{" + "{" * 10_000 + "1" + "}" * 10_001)) == 20_001
    for piece in [*PIECES, *HARD]:
        with suppress(ValueError):
            answers.normal(piece * (500 // len(piece)))


LONG_ANSWERS = ["-" * 449 + "5", "1" + "^1" * 41, "1" + "^1" * 200, "||1||" * 70, "1/" * 249 + "1"]
LONG_ANSWERS += ["1," * 249 + "1", "5=" * 200 + "6", "5\\pm" * 90 + "5", "_" * 400, "\\\\" * 200]
MANY = ["0" * 10**5 + "5", "5." + "0" * 10**5, "5" + "\u0660" * 10**5, "5" * 10**5, "5" * 501]
ONES = ["1" * 399, "1" * 401, "1" * 399 + "2", "-" + "1" * 400, "1" * 200 + "." + "1" * 200]
FAMILIES = {  # name: gold, verdict on every response, responses
    "long": ("5", W, box([*LONG_ANSWERS, *MANY, "10" * 50_000 + "/" + "2" * 50_000])),
    "spaces": ("5", C, box([" " * 10**5 + "5", "5" + "\n\u3000" * 10**5])),
    "400 digits, wrong": ("1" * 400, W, box([*ONES, "1" * 399 + "\u0661"])),
    "400 digits": ("1" * 400, C, box([a + "1" * 400 for a in ("", "0" * 90, "+")])),
    "many boxes": ("9", C, ["\\boxed{4}" * 999 + "\\boxed9", "}{" * 999 + "\\boxed{9}" + "}" * 99]),
    "no box": ("5", "no_answer", ["\\boxed{5" + "\\}" * 99, "<think>" * 999 + "\\boxed{5}"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_family(verifier, name):
    gold, expected, texts = FAMILIES[name]

    def graded(texts, finished=True):
        count = len(texts)
        return set(grade_responses(verifier, texts, [finished] * count, [gold] * count))

    assert graded(texts) == {(C if expected == C else "incorrect", expected)}
    assert graded(texts, False) == {("truncated", "truncated")}
    # A think block is never read, whatever it holds.
    assert graded(["<think>" + t + "</think>\\boxed{-99}" for t in texts]) == {("incorrect", W)}
    golds = [extract(text) or text for text in texts[::9]]
    for gold, problem in zip(golds, verifier.check_golds(golds), strict=True):
        assert problem or verifier.grade([(gold, gold)]) == [C]


def test_hangs(hasty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hangs = [row[:2] for row in VERDICTS if row[2] == "hangs"]
    assert hasty.grade([("\\sqrt4", "2")]) == [C]
    for pair in hangs if LONG else hangs[::9]:
        assert hasty.grade([pair])[0] in (W, "timeout")
    assert hasty.grade([("9^{9^{9}}", "5")] * 10_000) == ["timeout"] * 10_000  # from the cache
    assert not os.listdir(tmp_path)


def test_a_verifier_works_on_after_time_outs_interrupts_and_deaths():
    with Verifier(workers=1, seconds=5) as verifier:
        pairs = [("9^{9^{9}}", "5"), ("\\sqrt4", "2"), (None, "5"), ("\\sqrt5", "2")]
        assert verifier.grade(pairs) == ["timeout", C, "no_answer", W]
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            verifier.grade([("9^{9^{8}}", "1/2"), ("8^{8^{9}}", "1/2")])
        # No verdict of the interrupted call is left in the pipe.
        assert verifier.grade([("\\sqrt6", "2"), ("\\sqrt9", "3")]) == [W, C]
        first = verifier._workers[0]
        first.kill()  # as the system does when memory runs out
        assert verifier.grade([("\\sqrt{16}", "4")]) == [C] and first.poll() is not None


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_nothing_leaks(verifier):
    pairs = READABLE[::4]
    expected, files = verifier.grade(pairs), len(os.listdir(FILES))
    with Verifier(workers=2, seconds=5, memory_mb=1000) as other:
        assert other.grade([("9^{9^{9}}", "5"), ("8^{9^{10}}", "5")]) == ["timeout"] * 2
        # Backwards and in other company: the same verdicts.
        assert other.grade(pairs[1::2][::-1])[::-1] == expected[1::2]
        assert other.grade(pairs[::2][::-1])[::-1] == expected[::2]
        workers, used = set(other._workers), len(os.listdir(FILES))
        for i in range(100):
            assert other.grade([(f"\\frac{{{2 * i}\\pi}}{{14}}", f"{i}\\pi/7")]) == [C]
        assert set(other._workers) == workers and len(os.listdir(FILES)) == used
        for worker in workers:
            assert str(1000 << 20) in Path(f"/proc/{worker.pid}/limits").read_text()
    assert len(os.listdir(FILES)) == files and all(worker.returncode for worker in workers)


# No `if __name__` guard and never closed: both must be harmless.
PARENT = """
import sys, verify
assert not {"torch", "sympy", "math_verify"} & sys.modules.keys()
from verify import Verifier
verifier = Verifier(workers=1, seconds=2)
verifier.grade([("x", "1x")])
print(verifier._workers[0].pid, flush=True)
"""


@pytest.mark.parametrize("hang", ["", "verifier.grade([('9^{9^{9}}', '5')])"])
def test_workers_do_not_outlive_their_parent(tmp_path, hang):
    command = [sys.executable, write(tmp_path / "parent.py", PARENT, hang)]
    environment = {**os.environ, "PYTHONPATH": HERE}
    pipe = dict(stdout=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen(command, **pipe) as parent:
        worker = int(parent.stdout.readline())
        if hang:
            parent.kill()
        assert (parent.wait(20) == 0) != bool(hang)
    stat = Path(f"/proc/{worker}/stat")
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":  # 3 s at most
        time.sleep(0.1)


def test_limits_golds_and_workers_that_cannot_be(verifier, monkeypatch):
    golds = {"5": None, "0.\\overline{3}": "cannot parse", "\\frac{1}{0}": "to itself"}
    golds |= {"1+" * 300 + "1": "longer than 500", "5 million": "no unit", "10 80": "no unit"}
    golds |= {"There are 5 ways to do it": "prose", "": "to itself"}
    for gold, problem in zip(golds, verifier.check_golds(list(golds)), strict=True):
        assert problem is golds[gold] or golds[gold] in problem, problem
        if problem and golds[gold] != "to itself":
            with pytest.raises(ValueError, match=golds[gold]):
                verifier.grade([("0.5", gold)])
    monkeypatch.setattr(sys, "executable", "false")
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="did not start"):
        verifier.grade([("\\sqrt4", "2")])


def test_grade_responses_and_the_cache_of_normal_forms(monkeypatch):
    texts = ["\\boxed{5}", "\\boxed{6}", "5", "\\boxed{5}", "\\boxed{9^{9^9}}"]
    reasons = [C, W, "no_answer", "truncated", "timeout"]
    outcomes = [C, "incorrect", "incorrect", "truncated", "incorrect"]
    with Verifier(workers=1, seconds=2) as verifier:
        graded = grade_responses(verifier, texts, [True, True, True, False, True], ["5"] * 5)
        assert graded == list(zip(outcomes, reasons, strict=True))
        with pytest.raises(ValueError):
            grade_responses(verifier, ["\\boxed{5}"], [True, True], ["5"])
        monkeypatch.setattr(verify, "CACHE_PAIRS", 2)
        pairs = [("\\sqrt4", "2"), ("\\sqrt5", "2"), ("\\sqrt9", "3"), ("\\sqrt4\\text{ cm}", "2")]
        assert verifier.grade(pairs) == [C, W, C, C]
        assert list(verifier._cache) == [("\\sqrt{5}", "2"), ("\\sqrt{9}", "3")]


@pytest.mark.parametrize(
    "arguments, code, stdout, stderr",
    [
        (["so \\boxed{1/2}", "0.5"], 0, "answer:  1/2\nverdict: correct\n", ""),
        (["\\boxed{6}", "-5"], 1, "answer:  6\nverdict: wrong\n", ""),
        (["5", "5"], 1, "answer:  None\nverdict: no_answer\n", ""),
        (["\\boxed{5}", "\\foo"], 2, "", "\\foo: math-verify cannot parse it\n"),
        (["5"], 2, "", "usage: "),
    ],
)
def test_command_line(arguments, code, stdout, stderr):
    command = [sys.executable, verify.__file__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr) and result.stderr.count("\n") == (code == 2)


@pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
def test_disagreements(tmp_path, name, capsys):
    rows = [("2", "\\boxed{2}", C), ("5", "so 5", "no_answer"), ("0.5", "\\boxed{½}", C)]
    rows = [dict(gold=gold, response=text, verdict=verdict) for gold, text, verdict in rows]
    write_json(str(tmp_path / name), {"responses": {"math": {"a": rows[:2], "b": rows[2:]}}})
    assert not verify.main(["--disagreements", str(tmp_path / name)])
    *found, last = capsys.readouterr().out.splitlines()
    assert [json.loads(row)["gold"] for row in found] == ["5", "0.5"]
    assert last == "math-verify says otherwise of 2 responses"
    others = [write(tmp_path / "broken.json", "{"), write(tmp_path / "other.json", "{}")]
    for path in (str(tmp_path / "missing.json"), *others):
        assert verify.main(["--disagreements", path]) == 2
        assert re.fullmatch(re.escape(path) + ": .+\n", capsys.readouterr().err)
