"""The one verifier: reward, filter and evaluation all grade through this file.

Grading rules (1 to 4 are answers.py's):
 1. Only what follows the last `</think>` counts; without think tags, the whole text. A `<think>`
    never closed leaves no answer: put back the one that a chat template writes into the prompt.
 2. The answer is in the last complete `\\boxed{...}`, or in the last ones if only a comma, "and" or
    "or" stands between them. No box, or an empty one, is "no_answer".
 3. Answer and gold are brought to a normal form, a value and a unit: see the top of answers.py.
    A unit (`15 balls`, `5\\text{ cm}`, `\\$18`) may be left out, but two units must agree.
 4. Plain integers, decimals and fractions are compared exactly, where rule 5 says the same of them.
 5. All else is compared by math-verify: LaTeX grammar to sympy, then `verify(gold, prediction)`
    (strict; floats equal to 6 decimals, small ones to 5 digits; 15 digits; `x<2` is an interval),
    its own dropping of units off. Of `A \\approx B`, A is the answer and B has to be A, rounded.
    Of `A=B`, B is, and sides that are numbers have to agree; an A that the grammar lacks is a name.
    math_verify.parse is not used: it *searches* a text (in `3}+` it finds the 3), compares strings,
    and passes digits to sympy's eval. What the grammar lacks is wrong.
 6. An answer of more than 500 characters, with brackets 13 deep or more than 40 of `^_|` is wrong
    unread: parsing takes seconds from there on, or Python's stack, which differs by version.
 7. An answer that passes the time limit or kills its grader (memory) is "timeout", so incorrect.
 8. A gold that is not read, does not parse, or does not equal itself is an error in the data.
 9. A response that did not end by itself is "truncated", whatever it says.

    python verify.py "so it is \\boxed{1/2}" "0.5"  # exit code 0 correct, 1 not, 2 unusable gold
    python verify.py --disagreements responses.json.gz  # of eval.py --out: see `disagreements`
"""

import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import wait

from answers import TEXT, extract, normal, units_agree

MAX_CHARS = 500  # rule 6
# x_{\max}=, \det(A)= or P(X>2)=: a left side that the grammar lacks and that can be a name
NAMED = re.compile(
    r"(?![0-9 ])((?:[A-Za-z0-9_{}()\[\]|,'<> ]|\\(?:det|dim|deg|rank|max|min|lim|angle|triangle"
    r"|text|operatorname|overline|vec|math[a-z]+|cap|cup|mid|to|infty)(?![a-z]))+)=(.+)"
)
CACHE_PAIRS = 50_000  # about 20 MB of short answers
START_SECONDS = 120.0  # importing sympy takes 1 to 2 s, more from a cold network disk

UNUSABLE = {
    "bad_gold": "math-verify cannot parse it",
    "unread": "it is prose, or has words or numbers beside a number that are no unit (answers.py)",
}
ROW = {"question", "gold", "response", "answer", "verdict"}  # of eval.py --out
# Rule 4: short enough that math-verify's floats of 15 digits tell apart what differs by 1e-6.
NUMBER = re.compile("[+-]?([0-9]{1,6}[.][0-9]{1,6}|[0-9]{1,12}/0*[1-9][0-9]{0,11}|[0-9]{1,18})")
FRACTION = re.compile(r"^([+-]?)\\[dt]?frac *\{([0-9]+)\}\{([0-9]+)\}$")  # -\dfrac{1}{2}
OR = re.compile(rf",? ?(?:{TEXT}or ?\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![a-z])) ?")
INNER = re.compile(r"[({\[][^(){}\[\]]*[)}\]]")  # a pair of brackets without others in it


def grade_responses(
    verifier: "Verifier", texts: list[str], finished: list[bool], golds: list[str]
) -> list[tuple[str, str]]:
    """(outcome, reason) of each response. `finished[i]`: text i ended with its own stop token.

    outcome: correct, incorrect or truncated. reason: correct, wrong, no_answer, timeout, truncated.
    Raises ValueError for lists of unequal length and for an unusable gold (`Verifier.check_golds`).
    """
    rows = zip(texts, finished, golds, strict=True)
    reasons = verifier.grade([(extract(text) if done else None, gold) for text, done, gold in rows])
    reasons = [r if done else "truncated" for r, done in zip(reasons, finished, strict=True)]
    outcomes = {"correct": "correct", "truncated": "truncated"}
    return [(outcomes.get(reason, "incorrect"), reason) for reason in reasons]


class Verifier:
    """Grades answers in worker processes that can be killed.

    workers: processes, each started when first needed. seconds: wall-clock limit of one answer,
    start-up not counted. memory_mb: limit on each worker's address space, in MiB (not on macOS).
    Threads may share one Verifier; their calls are served one at a time.
    """

    def __init__(self, workers: int = 2, seconds: float = 3.0, memory_mb: int = 1024):
        if workers < 1 or seconds <= 0 or memory_mb < 1:
            got = f"{workers}, {seconds}, {memory_mb}"
            raise ValueError(f"Verifier needs workers >= 1, seconds > 0, memory_mb >= 1; got {got}")
        self.seconds, self.memory_mb = seconds, memory_mb
        self._workers = [_Worker(seconds, memory_mb) for _ in range(workers)]
        self._idle = list(self._workers)
        self._cache: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        # Runs at exit too, or when the object is dropped.
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Kill the workers and wait for their end. May be called twice, or not at all."""
        with self._lock:
            self._finalizer()

    def grade(self, pairs: list[tuple[str | None, str]]) -> list[str]:
        """Verdict of each (extracted answer or None, gold): correct, wrong, no_answer or timeout.

        Raises ValueError for an unusable gold, RuntimeError if closed or if workers cannot start.
        """
        verdicts = self._grade(pairs)
        for verdict, (_, gold) in zip(verdicts, pairs, strict=True):
            if verdict in UNUSABLE:
                raise ValueError(f"gold answer {gold!r}: {UNUSABLE[verdict]}")
        return verdicts

    def check_golds(self, golds: list[str]) -> list[str | None]:
        """What makes each gold unusable (rule 8), or None. The loader asks, and names the row."""
        too_long = f"it is longer than {MAX_CHARS} characters or too deep"
        problems = {
            **UNUSABLE,
            "correct": None,
            "wrong": f"{too_long}, or not equal to itself to math-verify",
            "timeout": f"grading it takes more than {self.seconds:g} s or {self.memory_mb} MiB",
        }
        return [problems[verdict] for verdict in self._grade([(gold, gold) for gold in golds])]

    def _grade(self, pairs):
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("this Verifier is closed")
            # A verdict, or the two values that a worker must compare.
            verdicts = {pair: _quick_verdict(*pair) for pair in pairs}
            todo = [v for v in verdicts.values() if type(v) is tuple and v not in self._cache]
            todo = list(dict.fromkeys(todo))
            if todo:
                with ThreadPoolExecutor(min(len(todo), len(self._workers))) as threads:
                    self._cache.update(zip(todo, threads.map(self._ask, todo), strict=True))
            verdicts = [self._cache.get(verdicts[pair], verdicts[pair]) for pair in pairs]
            while len(self._cache) > CACHE_PAIRS:
                del self._cache[next(iter(self._cache))]  # the oldest
            return verdicts

    def _ask(self, pair):
        worker = self._idle.pop()  # never empty: there are as many threads as workers, or fewer
        try:
            return worker.ask(pair)
        finally:
            self._idle.append(worker)


def _quick_verdict(answer, gold):
    """The verdict where no worker is needed, else (value of the answer, value of the gold)."""
    if answer is None:
        return "no_answer"
    if _too_much(answer):
        return "wrong"
    gold = None if _too_much(gold) else normal(gold)
    if not gold:
        return "unread"
    answer = normal(answer)
    if not answer or not units_agree(answer[1], gold[1]):
        return "wrong"
    values = answer[0], gold[0]
    plain = [FRACTION.sub(r"\1\2/\3", value) for value in values]
    if all(map(NUMBER.fullmatch, plain)):
        ours, theirs = map(Fraction, plain)
        # Numbers that near each other may be equal to math-verify, which rounds.
        if ours == theirs or abs(ours - theirs) >= 2e-6:
            return "correct" if ours == theirs else "wrong"
    return values


def _too_much(text):
    """Rule 6."""
    if len(text) > MAX_CHARS or len(re.findall("[_|^]", text)) > 40:
        return True
    for _ in range(12):
        text = INNER.sub("", text)
    return bool(re.search(r"[({\[]", text))


class _Worker:
    """One grading process and the pipes to it: one JSON line per pair, one per verdict.

    A fresh interpreter: a fork of a process with CUDA or threads can hang, and multiprocessing
    imports the caller's script again. One pair at a time: the pipes take 0.1 ms of the 1 to 10 ms.
    """

    def __init__(self, seconds, memory_mb):
        self.seconds, self.memory_mb = seconds, memory_mb
        self.process = None

    def start(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        command += [str(self.seconds), str(self.memory_mb)]
        # sympy's paths follow the order of sets: with this, same answer, same verdict.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # A session of its own: Ctrl-C ends the caller in good order, a kill of the group all of it.
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self.ready, self.used = False, False

    def stop(self):
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()  # closes the pipes and waits
            self.process = None

    def read(self, seconds):
        """The next line; b"" when the process has died, None when the time is over."""
        return self.process.stdout.readline() if wait([self.process.stdout], seconds) else None

    def ask(self, pair):
        if not self.process:
            self.start()
        self.ready = self.ready or bool(self.read(START_SECONDS))
        if not self.ready:
            self.stop()
            message = "its own message is above (is math-verify installed?)"
            raise RuntimeError(f"a worker of verify.py did not start; {message}")
        line = json.dumps(pair) + "\n"  # ASCII escapes: lone surrogates and control characters pass
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            self.used = True  # it died while idle, and the read below returns b""
        line, used = self.read(self.seconds), self.used
        if line:
            self.used = True
            return json.loads(line)
        self.stop()
        self.start()  # imports sympy while the caller goes on
        # A used worker may have died of what earlier pairs left in memory: a fresh one decides.
        return self.ask(pair) if line == b"" and used else "timeout"


def _stop_all(workers):
    for worker in workers:
        worker.stop()


def _serve(seconds, memory_mb):
    """The worker process: [answer, gold] lines from stdin, verdicts to stdout, until stdin ends."""
    import resource

    verdicts = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a library prints must not be read as a verdict
    with suppress(ValueError, OSError):  # macOS, or a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(4300)  # Python's default, whatever the environment says
    grader = _make_grader()
    grader("\\frac{x}{2}", "(1,2)")  # the first parse builds tables for 0.1 s
    os.dup2(nowhere, 2)  # import errors were for the user, what follows is noise
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends us if the caller was killed
        verdict = grader(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=verdicts, flush=True)


def _make_grader():
    """(answer, gold) -> correct, wrong or bad_gold. sympy is imported here, in the workers only."""
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from math_verify import LatexExtractionConfig, grader, verify
    from math_verify import parse as search
    from sympy import Abs, E, Eq, FiniteSet, Float, MatrixBase, Set, Tuple, Union, floor, log, oo
    from sympy.core.random import seed

    logging.disable()
    # boxed="none": math-verify would pick an inner \fbox{3} out of `5 \fbox{3}`. units: see rule 3.
    config = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)

    @lru_cache(256)  # the rollouts of one problem share its gold
    def parse(text, real):
        parts = [parse(part, real) for part in OR.split(text)] if OR.search(text) else []
        letters = {letter for part in parts for letter in part.free_symbols}
        if parts and len(letters) == 1 and not any(map(grader.is_equation, parts)):
            return Eq(letters.pop(), Union(*(part.as_set() for part in parts)), evaluate=False)
        try:
            return latex2sympy(text, is_real=real, normalization_config=config)
        except Exception:
            name, rest = NAMED.match(text).groups()
            text = "\\text{" + re.sub("[^A-Za-z0-9]", "", name) + "}=" + rest
            return latex2sympy(text, is_real=real, normalization_config=config)

    def decimals(value):
        """Of the gold's smallest number: how many zeros stand behind the point."""
        if isinstance(value, (Set, Tuple, MatrixBase)):
            parts = value.flat() if isinstance(value, MatrixBase) else value.args
            return max(map(decimals, parts), default=0)
        value = getattr(value, "rhs", value)
        size = Abs(value).evalf(5) if getattr(value, "is_number", False) else oo
        # Above 0.01, 6 decimals are enough.
        return -int(floor(log(size, 10)).evalf()) if size.is_finite and 0 < size < 0.01 else 0

    def equal(gold, answer):
        # In brackets: a bare list (`\operatorname{cols}(...)` gives one) would be several guesses.
        # No time limit: math-verify's is an exception, which C loops survive; ours is a kill.
        zeros = min(decimals(gold), 9999)
        digits = dict(float_rounding=max(6, 4 + zeros), numeric_precision=15 + zeros)
        options = dict(allow_set_relation_comp=True, timeout_seconds=None)
        if verify([gold], [answer], **digits, **options):
            return True
        twice = isinstance(answer, FiniteSet) and not isinstance(gold, (Set, Tuple))
        return twice and all(equal(gold, part) for part in answer.args)  # 1/2 or 0.5

    def rounded(value, text):
        half = 0.5000001 * 10 ** -len(text.strip().partition(".")[2])
        return abs(float(value) - float(text)) <= half

    def agree(side, other):
        floats = [(a, b) for a, b in ((side, other), (other, side)) if isinstance(b, Float)]
        return equal(side, other) or any(rounded(a.doit(), str(b).rstrip("0")) for a, b in floats)

    def grade(answer, gold, plain=False):
        seed(0)  # sympy tests some identities at random points: same answer, same verdict
        failure = "wrong" if plain else "bad_gold"
        # As in math_verify.parser, but for both, or a real x is not a complex x. Equations without
        # real solutions would all be the same: they are solved in complex numbers.
        equations = all("=" in text and not re.search("[<>]", text) for text in (answer, gold))
        strange = any("(I)" in t or grader.should_treat_as_complex(t) for t in (answer, gold))
        real = None if equations or strange else True
        try:
            if plain:
                gold = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
                gold, answer = (search(text, parsing_timeout=None) for text in (gold, answer))
                return "correct" if verify(gold, answer, timeout_seconds=None) else "wrong"
            gold = parse(gold.partition("\\approx")[0], real)
            failure = "wrong"
            answer, approx, text = answer.partition("\\approx")
            answer = parse(answer, real)
            right = equal(gold, answer)
            if grader.is_equation(answer):
                chain = getattr(answer, "_unsorted_args", [answer])  # `1=2=3` is two equations
                sides = [chain[0].lhs, *(equation.rhs for equation in chain)]
                known = [side for side in sides if getattr(side, "is_number", False)]
                answer, known = sides[-1], known[sides[0] == E :]  # e=5 is a name
                right = right and all(agree(side, known[-1]) for side in known)
            return "correct" if right and (not approx or rounded(answer, text)) else "wrong"
        except MemoryError:
            os._exit(1)  # counts as "timeout"
        except BaseException:  # math-verify's TimeoutException is no Exception
            return failure

    return grade


def disagreements(verifier: Verifier, rows) -> list[tuple[dict, str]]:
    """(row, what plain math-verify says) where that is not the verdict.

    rows: what eval.py --out holds; each dict in it that has the keys of ROW, however deep.
    """
    if isinstance(rows, dict) and ROW <= rows.keys():
        plain = verifier._ask((rows["response"], rows["gold"], True))
        return [(rows, plain)] if (plain == "correct") != (rows["verdict"] == "correct") else []
    rows = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list) else []
    return [pair for part in rows for pair in disagreements(verifier, part)]


def main(argv):
    if argv[:1] == ["--worker"]:
        _serve(float(argv[1]), int(argv[2]))
        return 0
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 2:  # no argparse: answers begin with a minus sign
        usage = 'usage: python verify.py "response with \\boxed{answer}" "gold answer"'
        print(usage, file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="backslashreplace")
    if argv[0] == "--disagreements":
        try:
            with gzip.open(argv[1]) if argv[1].endswith(".gz") else open(argv[1], "rb") as file:
                rows = json.load(file)
        except (OSError, ValueError) as error:
            print(f"--disagreements {argv[1]}: {error}", file=sys.stderr)
            return 2
        with Verifier(workers=1, seconds=10) as verifier:
            found = disagreements(verifier, rows)
        for row, plain in found:
            print(json.dumps({**row, "math-verify": plain}, ensure_ascii=False))
        print(f"math-verify says otherwise of {len(found)} responses")
        return 0
    text, gold = argv
    with Verifier(workers=1) as verifier:
        problem = verifier.check_golds([gold])[0]
        if problem:
            print(f"gold answer {gold!r}: {problem}", file=sys.stderr)
            return 2
        answer = extract(text)
        verdict = verifier.grade([(answer, gold)])[0]
    print(f"answer:  {answer}\nverdict: {verdict}")
    return 0 if verdict == "correct" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
