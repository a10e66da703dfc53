"""Tests of verify.py: what math-verify accepts and refuses (surprises included), extraction, hostile answers, processes, command line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import verify
from verify import Verifier, extract, grade_responses

C, W = "correct", "wrong"

# (gold, answer, verdict)
ORDINARY = [
    # integers and decimals
    ("5", "5", C), ("5", "6", W), ("-5", "5", W), ("5", "05", C), ("5", "+5", C), ("-5", "- 5", C), ("-5", "\u22125", C),
    ("5", "5.0", C), ("5", "5.01", W), ("1", "213", W), ("213", "1", W), ("0", "-0", C),
    ("1267650600228229401496703205376", "2^{100}", C), ("1267650600228229401496703205376", "1267650600228229401496703205377", W),
    # fractions
    ("0.5", "1/2", C), ("\\frac{1}{2}", "0.5", C), ("\\frac12", "\\dfrac{1}{2}", C), ("\\frac{1}{2}", "\\frac{2}{4}", C),
    ("\\frac{1}{2}", "\\frac{2}{1}", W), ("-\\frac{1}{2}", "\\frac{-1}{2}", C), ("\\frac{1}{2}", ".5", C),
    # roots, powers, constants, functions
    ("\\sqrt{8}", "2\\sqrt{2}", C), ("\\sqrt{2}", "\\sqrt2", C), ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", C), ("\\sqrt[3]{27}", "3", C),
    ("1024", "2^{10}", C), ("120000", "1.2\\times10^5", C), ("\\pi", "\u03c0", C), ("5!", "120", C), ("\\binom{5}{2}", "10", C),
    ("\\log_2 8", "3", C), ("\\infty", "-\\infty", W),
    # expressions
    ("x^2+2x+1", "(x+1)^2", C), ("x^2+2x+1", "(x+2)^2", W), ("\\frac{x^2-1}{x-1}", "x+1", C), ("2x+3", "2y+3", W), ("1", "\\sin^2 x+\\cos^2 x", C),
    # percent, money, units, angles, separators
    ("50\\%", "0.5", C), ("50\\%", "50 percent", C), ("18.9", "\\$18.90", C), ("5", "5\\text{ cm}", C), ("5", "5\\,\\text{cm}^2", C), ("90", "90^\\circ", C),
    ("10080", "10,080", C), ("10,080", "10{,}080", C), ("1,000,000", "10^6", C),
    # mixed numbers and ratios
    ("\\frac{7}{2}", "3\\frac{1}{2}", C), ("3.5", "3\\frac12", C), ("2:3", "4:6", C),
    # intervals, tuples, sets, matrices
    ("[1,2)", "[1,2)", C), ("[1,2)", "(1,2]", W), ("(1,2)", "[1,2]", W), ("(-\\infty,2)\\cup(3,4)", "(3,4)\\cup(-\\infty,2)", C),
    ("(1,3)", "(1,2)\\cup[2,3)", C), ("x<2", "(-\\infty,2)", C), ("(-\\infty,2)", "x<2", W),
    ("(1,2,3)", "(1,2,3)", C), ("(1,2,3)", "(3,2,1)", W), ("(\\frac{1}{2},3)", "(0.5, 3)", C), ("(2,1)", "(1,2)", W),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", C), ("1,2", "2, 1", C), ("3", "2, 3", W), ("3", "3 and 5", W), ("\\pm 2", "2,-2", C), ("\\emptyset", "\\{\\}", C),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", C),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\operatorname{cols}(\\begin{pmatrix}0&1\\\\0&2\\end{pmatrix})", W),  # parses to a list: several guesses
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", W), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)", W),
    # equations and inequalities
    ("3", "x=3", C), ("x=3", "3", C), ("x=3", "3=x", C), ("x=3", "y=3", W), ("y=2x+1", "2x-y+1=0", C), ("x=2 \\text{ or } x=-2", "\\pm 2", C),
    ("x>2", "2<x", C), ("x\\ge2", "x>2", W), ("[1,2]", "x \\in [1,2]", C),
    # words
    ("\\text{Evelyn}", "Evelyn", C), ("\\text{Evelyn}", "\\text{Bob}", W), ("\\text{(A)}", "A", C), ("A", "B", W),
]
# Where math-verify (0.9.0) surprises. Pinned, so that another version is noticed; each row with a C that should be W, or the other way, is a known limit.
SURPRISING = [
    ("\\frac{1}{3}", "0.333333", C), ("\\frac{1}{3}", "0.33333", W),  # floats are rounded to 6 decimals, absolutely:
    ("10^{-7}", "0.0000002", C), ("0", "0.0000001", W),  # so small ones agree with each other, though not with 0
    ("50\\%", "50", C), ("50", "50\\%", C), ("12.5\\%", "12.5", W),  # the sign % may be missing, from integers only
    ("5\\text{ cm}", "5\\text{ m}", C),  # units are dropped, not compared
    ("5t", "5", C), ("2x+3d", "2x+3", C),  # as is a last letter that might be a unit (t, d, s, m, c, g, h, l)
    ("5", "5 oranges", W), ("5", "5 apples", C), ("5", "5 km/h", W),  # "apples" is on its list of units
    ("3", "3 \\text{, or not, } 4 \\text{ cm}", C),  # everything from the first \text to a last \text is "the unit"
    ("10080", "10 080", W), ("90", "10\\,080", C),  # a space between numbers makes a mixed number, 10 + 80
    ("1.5", "1,5", W),  # a comma makes a set
    ("3.5", "3 1/2", W), ("2", "3 1/2", C),  # (3 + 1)/2: real mixed numbers need \frac
    ("120000", "1.2e5", W),  # e is Euler's number
    ("5", "5.", W), ("90", "90\u00b0", W), ("0.5", "\u00bd", W), ("5", "\uff15", W), ("5", "\u0665", W),  # not in the grammar
    ("\\frac{\\pi}{2}", "90^\\circ", W), ("0.5", "\\sin(30^\\circ)", W),  # degrees are not converted
    ("(1,2)", "1,2", C), ("(1,2,3)", "1,2,3", C), ("(1,2,3)", "3,2,1", W),  # brackets may be missing, and the gold tuple's order counts;
    ("1,2,3", "(1,2,3)", C), ("1,2,3", "(3,2,1)", C),  # a gold set has no order
    ("1", "1,1", C), ("\\{1,2\\}", "\\{1,2,2\\}", C), ("3", "[3]", C), ("3", "\\{3\\}", C),
    ("\\emptyset", "\\varnothing", W), ("\\mathbb{R}", "\\text{all real numbers}", W),  # words and unknown commands are names
    ("3", "2x=3", C), ("3", "1=2=3", C),  # of an equation only the last side is read when the gold is no equation
    ("3", "3 \\approx 4", C), ("3", "4 \\approx 3", W), ("x>2", "2x>4", W),
    ("\\text{June 20}", "June 20", W), ("AB", "BA", C), ("x", "X", C), ("52_8", "52", C), ("101_2", "5", W), ("i", "\\sqrt{-1}", W),
]
# Where math_verify.parse, the text search that verify.py does not use, would say "correct".
SEARCHED = [
    ("3", "\\fbox{3} 5", W), ("3", "5 \\fbox{3}", W), ("3", "final answer is $3$. I hope", W), ("3", "\\foo = 3", W), ("3", "what = ? = 3", W),
    ("7", "**? 7", W), ("\\frac{1}{2}", "\\foo{4} \\frac{1}{2}", W), ("3", "3}+", W),
]
HOSTILE = [
    "9^{9^{9}}", "((9!)!)!", "\\binom{10^9}{10^8}", "2^{10^{10}}", "e^{e^{e^{e^{9}}}}", "(" * 40 + "1" + ")" * 40,
    "1" * 10_000, "{" * 10_000 + "1" + "}" * 10_000, "\\frac{1}{0}", "0/0", "5\0", "\0", "\ud800", "5\udfff", "\u202e5", "5\u200f", "5\n\n6", '5"]\n"correct"',
    "\\input{/etc/passwd}", "\\write18{ls}", "", " ", "\\", "%", "{", "}", "$", "\\left(", "^", "5" + "\\" * 400, "\\frac" * 80, "\\sqrt" * 80, "x" * 100,
    '__import__("os").system("touch pwned")', "exit()", "lambda: 5", "True", "None", "nan", "NaN", "5 if 1 else 2",
]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, seconds=10) as shared:  # a loaded machine must not fail an ordinary answer
        yield shared


@pytest.fixture(scope="module")
def verdicts(verifier):
    pairs = [(answer, gold) for gold, answer, _ in ORDINARY + SURPRISING + SEARCHED]
    return dict(zip(pairs, verifier.grade(pairs)))


@pytest.mark.parametrize("gold, answer, verdict", ORDINARY + SURPRISING + SEARCHED)
def test_verdict(verdicts, gold, answer, verdict):
    assert verdicts[answer, gold] == verdict


def test_agrees_with_the_public_functions_where_nothing_is_searched():
    from math_verify import parse
    from math_verify import verify as compare
    for gold, answer, verdict in ORDINARY + SURPRISING + SEARCHED:
        gold_and_answer = [parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, answer)]
        searched = (gold, answer, verdict) in SEARCHED
        assert compare(*gold_and_answer, timeout_seconds=None) == (searched or verdict == C), (gold, answer)


def test_order_of_gold_and_answer(verifier):
    assert verifier.grade([("(1,2)", "1<x<2"), ("1<x<2", "(1,2)")]) == [C, W]


def test_integer_short_cut_equals_math_verify(verifier):
    numbers = ["0", "-0", "1", "-1", "7", "07", "-07", "007", "10", "100", "213", "-213", "1000", "1234", "99999", "100000", "9" * 18, "-" + "9" * 18, "9" * 17 + "8", "0" * 18]
    for gold in numbers:
        for answer in numbers:
            assert verify._quick_verdict(answer, gold) == verifier._ask((answer, gold)), (answer, gold)
    for other in ("9" * 19, "+5", "5.0", "\u0665", "5 ", "--5", "1,000", "5\n", ""):
        assert verify._quick_verdict(other, "5") is None


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{5}", "5"), ("\\boxed{ 5 }", "5"), ("\\boxed {5}", "5"), ("\\\\boxed{5}", "5"), ("\\\\\\boxed{5}", "5"),
    ("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{\\sqrt{2}}} done", "\\frac{1}{\\sqrt{2}}"), ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."), ("\\boxed{1 \\\\{2}}", "1 \\\\{2}"), ("\\boxed{5\n}", "5"),
    ("\\boxed{\\boxed{5}}", "5"), ("\\boxed{1 + \\boxed{5} + 2}", "5"), ("\\boxed{5} and \\boxed{6", "5"), ("\\boxed{ oh \\boxed{5}", "5"),
    ("a { b \\boxed{5}", "5"), ("} } \\boxed{5} {", "5"), ("\\fbox{5}", None), ("boxed{5}", None), ("\\boxed5", None), ("\\boxedx{5}", None),
    ("", None), ("5", None), ("\\boxed{5", None), ("\\boxed{{5}", None), ("\\boxed{5\\}", None), ("\\boxed{}", None), ("\\boxed{5} \\boxed{ }", None),
    ("<think>\\boxed{1}</think>\\boxed{2}", "2"), ("<think>the gold is \\boxed{1}</think> unsure", None), ("<think>\\boxed{1}", None), ("\\boxed{1} <think> hm", None),
    ("\\boxed{1}</think> \\boxed{2}", "2"), ("\\boxed{1}</think>", None), ("<think>a</think>\\boxed{1}</think>\\boxed{2}", "2"),
    ("<think>a</think>\\boxed{1}</think>", None), ("<think>a</think>\\boxed{1}<think>", None), ("<think></think>\\boxed{\ud800}", "\ud800"),
])
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize("text, size", [
    ("\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}", 20_001), ("\\boxed{" * 100_000, None), ("\\boxed{1}" * 100_000, 1), ("\\boxed{" * 50_000 + "1" + "}" * 50_000, 1),
    ("\\boxed" + " " * 1_000_000, None), ("\\" * 1_000_001, None), ("<think>" * 100_000, None), ("</think>" * 100_000 + "\\boxed{1}", 1), ("}" * 1_000_000, None),
])
def test_extract_is_linear(text, size):
    start = time.process_time()
    answer = extract(text)
    assert (answer and len(answer)) == size
    assert time.process_time() - start < 2


def test_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with Verifier(workers=2, seconds=1) as verifier:
        assert verifier.grade([("\\sqrt{4}", "2")]) == [C]  # the first answer of a worker and later ones take different paths
        verdicts = dict(zip(HOSTILE, verifier.grade([(answer, "5") for answer in HOSTILE])))
        assert set(verdicts.values()) == {"wrong", "timeout"}, verdicts
        assert verdicts["9^{9^{9}}"] == verdicts["((9!)!)!"] == "timeout"
        assert verdicts["1" * 10_000] == verdicts["\ud800"] == "wrong"
        before = time.monotonic()
        assert verifier.grade([("9^{9^{9}}", "5")]) == ["timeout"] and time.monotonic() - before < 0.5  # from the cache
        workers = [worker.process.pid for worker in verifier._workers if worker.process]
    assert time.monotonic() - start < 3.0 * len(HOSTILE)
    assert not any(map(alive, workers)) and not os.listdir(tmp_path)


def test_a_verifier_works_on_after_time_outs_interrupts_and_deaths():
    with Verifier(workers=1, seconds=1) as verifier:
        assert verifier.grade([("9^{9^{9}}", "5"), ("1/2", "0.5"), (None, "5"), ("0.7", "0.5")]) == ["timeout", C, "no_answer", W]
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            verifier.grade([("9^{9^{8}}", "1/2"), ("8^{8^{9}}", "1/2")])
        assert verifier.grade([("1/3", "0.5"), ("2/6", "1/3")]) == [W, C]  # no verdict of the interrupted call is left in the pipe
        first = verifier._workers[0].process.pid
        os.kill(first, signal.SIGKILL)  # as the system does when memory runs out
        assert verifier.grade([("2/4", "0.5")]) == [C]
        second = verifier._workers[0].process
        assert second.pid != first and second.poll() is None
        verifier._workers[0].used = False  # one that has not answered yet is not blamed for dying idle either
        second.kill()
        second.wait()
        assert verifier.grade([("3/6", "0.5")]) == [C]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_memory_limit():
    with Verifier(workers=1, seconds=10, memory_mb=256) as verifier:
        worker = verifier._workers[0]
        assert verifier.grade([("1/2", "0.5")]) == [C]
        with open(f"/proc/{worker.process.pid}/limits") as limits:
            assert str(256 << 20) in limits.read()


def test_close_is_final_and_idempotent():
    verifier = Verifier()
    assert verifier.grade([]) == [] and verifier.grade([("5", "5")]) == [C]
    assert not any(worker.process for worker in verifier._workers)  # integers need no worker
    verifier.grade([("0.5", "1/2")])
    pids = [worker.process.pid for worker in verifier._workers if worker.process]
    verifier.close()
    verifier.close()
    assert pids and not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="closed"):
        verifier.grade([("5", "5")])


@pytest.mark.parametrize("kill", [True, False])
def test_workers_do_not_outlive_their_parent(tmp_path, kill):
    script = tmp_path / "parent.py"  # no `if __name__` guard and never closed: both must be harmless
    script.write_text(
        "import sys, threading, time\nfrom verify import Verifier\nverifier = Verifier(workers=1, seconds=2)\nverifier.grade([('0.5', '1/2')])\n"
        "print(verifier._workers[0].process.pid, flush=True)\n" + ("verifier.grade([('9^{9^{9}}', '5')])\n" if kill else ""))
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(verify.__file__))}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
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
        verifier.grade([("0.5", "1/2")])


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"seconds": 0}, {"memory_mb": 0}])
def test_bad_limits(arguments):
    with pytest.raises(ValueError, match="Verifier needs"):
        Verifier(**arguments)


def test_gold_answers(verifier):
    golds = ["5", "\\frac{1}{2}", "$x=3$", "\\boxed{7}", "", "0.\\overline{3}", "\\frac{1}{0}", "3 apples and a }", "1+" * 300 + "1"]
    problems = verifier.check_golds(golds)
    assert problems[:4] == [None] * 4 and all(problems[4:])
    assert "cannot parse" in problems[5] and "equal to itself" in problems[6] and "longer" in problems[8]
    with pytest.raises(ValueError, match="overline"):
        verifier.grade([("0.5", "0.\\overline{3}")])


def test_grade_responses(verifier):
    texts = ["\\boxed{5}", "\\boxed{6}", "5", "\\boxed{5}", "<think>\\boxed{5}"]
    expected = [("correct", "correct"), ("incorrect", "wrong"), ("incorrect", "no_answer"), ("truncated", "truncated"), ("incorrect", "no_answer")]
    assert grade_responses(verifier, texts, [True, True, True, False, True], ["5"] * 5) == expected
    verifier = SimpleNamespace(grade=lambda pairs: ["timeout"] * len(pairs))
    assert grade_responses(verifier, ["\\boxed{5}"] * 2, [True, False], ["5"] * 2) == [("incorrect", "timeout"), ("truncated", "truncated")]
    with pytest.raises(ValueError):
        grade_responses(verifier, ["\\boxed{5}"], [True, True], ["5"])


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(verify, "CACHE_PAIRS", 2)
    with Verifier(workers=1) as verifier:
        pairs = [("1/2", "0.5"), ("1/3", "0.5"), ("2/4", "0.5"), ("1/2", "0.5")]
        assert verifier.grade(pairs) == [C, W, C, C]
        assert list(verifier._cache) == [("1/3", "0.5"), ("2/4", "0.5")]


@pytest.mark.parametrize("arguments, code, stdout, stderr", [
    (["so \\boxed{1/2}", "0.5"], 0, "answer:  1/2\nverdict: correct\n", ""), (["\\boxed{-7}", "-7"], 0, "answer:  -7\nverdict: correct\n", ""),
    (["\\boxed{6}", "5"], 1, "answer:  6\nverdict: wrong\n", ""), (["5", "5"], 1, "answer:  None\nverdict: no_answer\n", ""),
    (["\\boxed{5}", "\\foo"], 2, "", "gold answer '\\\\foo': math-verify cannot parse it\n"), (["5"], 2, "", "usage: "),
])
def test_command_line(arguments, code, stdout, stderr):
    result = subprocess.run([sys.executable, verify.__file__, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr) and result.stderr.count("\n") == (code == 2)


def test_import_is_light():
    code = "import sys, json, verify; print(json.dumps([name for name in ('torch', 'transformers', 'sympy', 'math_verify') if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(verify.__file__)))
    assert json.loads(result.stdout) == []
