"""The one verifier: reward, filter and evaluation all grade through this file.

Grading rules (1 to 3 are answers.py's):
 1. Only what follows the last `</think>` counts; without think tags, the whole text. A `<think>`
    never closed leaves no answer: put back the one that a chat template writes into the prompt.
 2. The answer is in the last complete `\\boxed{...}`, or in the last ones if only a comma, "and" or
    "or" stands between them. No box, or an empty one, is "no_answer".
 3. Answer and gold become a value and a unit (`15 balls`, `\\$18`), which one of them may lack.
 4. Values are compared by math-verify: LaTeX grammar to sympy, then `verify(gold, prediction)`
    (strict; floats equal to 6 decimals, small ones to 5 digits; `x<2` is an interval), and plain
    numbers here, with the same result. Of `A=B`, B is the answer, and sides that are numbers have
    to agree; an A that the grammar lacks is a name. What else it lacks is wrong: math_verify.parse
    *searches* a text (in `3}+` it finds the 3), and is not used.
 5. An answer of more than 500 characters, with brackets 13 deep or more than 40 of `^_|` is wrong
    unread: parsing takes seconds from there on, or Python's stack, which differs by version.
 6. An answer that passes the time limit or kills its grader (memory) is "timeout", so incorrect.
 7. A gold that is not read, does not parse, or does not equal itself is an error in the data.
 8. A response that did not end by itself is "truncated", whatever it says.

    python verify.py "so it is \\boxed{1/2}" "0.5"  # exit code 0 correct, 1 not, 2 unusable gold
    python verify.py --disagreements responses.json.gz  # of eval.py --out: see `disagreements`
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import chain

from answers import TEXT, extract, normal, units_agree

MAX_CHARS = 500  # rule 5
CACHE_PAIRS = 50_000  # about 20 MB of short answers
START_SECONDS = 120  # importing sympy takes 1 to 2 s, more from a cold network disk
NUMBER = re.compile("[+-]?([0-9]{1,6}[.][0-9]{1,6}|[0-9]{1,12}/0*[1-9][0-9]{0,11}|[0-9]{1,18})")
FRACTION = re.compile(r"^([+-]?)\\[dt]?frac *\{([0-9]+)\}\{([0-9]+)\}$")  # -\dfrac{1}{2}
# x_{\max}=, \det(A)= or P(X>2)=: a left side that the grammar lacks and that can be a name
NAMED = re.compile(
    r"(?![0-9 ])((?:[A-Za-z0-9_{}()\[\]|,'<> ]|\\(?:det|dim|deg|rank|max|min|lim|angle|triangle"
    r"|text|operatorname|overline|vec|math[a-z]+|cap|cup|mid|to|infty)(?![a-z]))+)=(.+)"
)
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


class Verifier(AbstractContextManager):
    """Grades answers in worker processes, each started when first needed; not for several threads.

    A fresh interpreter: a fork of a process with CUDA or threads can hang, and multiprocessing
    imports the caller's script again. It reads from a pipe, and so ends with its caller: a JSON
    line a pair, one a verdict (0.1 ms of the 1 to 10 ms of an answer).

    seconds: wall-clock limit of one answer, start-up not counted. memory_mb: limit on each worker's
    address space, in MiB (not on macOS).
    """

    def __init__(self, workers: int = 2, seconds: float = 3.0, memory_mb: int = 1024):
        self.seconds, self.memory_mb = seconds, memory_mb
        self._workers: list[subprocess.Popen | None] = [None] * workers
        self._cache: dict[tuple[str, str], str] = {}

    def __exit__(self, *exception):
        """Kills the workers, which also end with their caller. The next answer starts others."""
        for worker in filter(None, self._workers):
            worker.kill()
            worker.communicate()  # closes the pipes and waits
        self._workers = [None] * len(self._workers)

    def grade(self, pairs: list[tuple[str | None, str]]) -> list[str]:
        """Verdict of each (extracted answer or None, gold): correct, wrong, no_answer or timeout.

        Raises ValueError for an unusable gold, RuntimeError if a worker cannot start.
        """
        verdicts = self._grade(pairs)
        for verdict, (_, gold) in zip(verdicts, pairs, strict=True):
            if verdict not in ("correct", "wrong", "no_answer", "timeout"):
                raise ValueError(f"gold answer {gold!r}: {verdict}")
        return verdicts

    def check_golds(self, golds: list[str]) -> list[str | None]:
        """What makes each gold unusable (rule 7), or None. The loader asks, and names the row."""
        late = f"grading it takes more than {self.seconds:g} s or {self.memory_mb} MiB"
        unequal = "it is not equal to itself to math-verify"
        problems = {"correct": None, "wrong": unequal, "timeout": late}
        return [problems.get(v, v) for v in self._grade([(gold, gold) for gold in golds])]

    def plain(self, pairs: list[tuple[str, str]]) -> list[bool]:
        """Whether math-verify alone, without this file's rules, accepts each (response, gold)."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            verdicts = threads.map(self._ask, [(*pair, True) for pair in pairs])
        return [verdict == "correct" for verdict in verdicts]

    def _grade(self, pairs):
        """Verdicts; what makes the gold unusable stands in a verdict's place."""
        # A verdict, or the two values that a worker must compare.
        found = [_quick_verdict(*pair) for pair in pairs]
        todo = [v for v in dict.fromkeys(found) if type(v) is tuple and v not in self._cache]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            self._cache.update(zip(todo, threads.map(self._ask, todo), strict=True))
        verdicts = [self._cache.get(verdict, verdict) for verdict in found]
        while len(self._cache) > CACHE_PAIRS:
            del self._cache[next(iter(self._cache))]  # the oldest
        return verdicts

    def _ask(self, pair):
        """A worker's verdict, "timeout" if it dies of this pair."""
        worker = used = self._workers.pop()  # never empty: no more threads than workers
        try:
            worker = worker or self._start()
            with suppress(BrokenPipeError):  # it died while idle, and the line is empty
                worker.stdin.write(json.dumps(pair).encode() + b"\n")  # lone surrogates escaped
                worker.stdin.flush()
            line = worker.stdout.readline()
            if line:
                return json.loads(line)
            worker.communicate()
            late, worker = worker.returncode == -signal.SIGALRM, None
        finally:
            self._workers.append(worker)
        # A used worker may have died of what earlier pairs left in memory: a fresh one decides.
        return self._ask(pair) if used and not late else "timeout"

    def _start(self):
        command = [sys.executable, __file__, "--worker", str(self.seconds), str(self.memory_mb)]
        # sympy's paths follow the order of sets: with this, same answer, same verdict.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # A session of its own: Ctrl-C ends the caller in good order.
        worker = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        if not worker.stdout.readline():
            worker.communicate()
            message = "its own message is above (is math-verify installed?)"
            raise RuntimeError(f"a worker of verify.py did not start; {message}")
        return worker


def _quick_verdict(answer, gold):
    """The verdict where no worker is needed, else (value of the answer, value of the gold)."""
    if answer is None:
        return "no_answer"
    if _too_much(gold):
        return f"it is longer than {MAX_CHARS} characters or too deep"
    try:
        gold, gold_unit = normal(gold)
    except ValueError as problem:
        return str(problem)
    try:
        answer, unit = ("", "") if _too_much(answer) else normal(answer)
    except ValueError:
        return "wrong"
    if not answer or not units_agree(unit, gold_unit):
        return "wrong"
    numbers = [FRACTION.sub(r"\1\2/\3", text) for text in (answer, gold)]
    if all(map(NUMBER.fullmatch, numbers)):
        ours, theirs = map(Fraction, numbers)
        # Numbers that near each other may be equal to math-verify, which rounds.
        if ours == theirs or abs(ours - theirs) >= 2e-6:
            return "correct" if ours == theirs else "wrong"
    return answer, gold


def _too_much(text):
    """Rule 5."""
    if len(text) > MAX_CHARS or len(re.findall("[_|^]", text)) > 40:
        return True
    for _ in range(12):
        text = INNER.sub("", text)
    return bool(re.search(r"[({\[]", text))


def _serve(seconds, memory_mb):
    """The worker: [answer, gold] lines from stdin, verdicts to stdout, until stdin ends. The alarm
    of the system kills it when a pair takes too long, whatever loop it is in."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # callers may have ignored or blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(START_SECONDS)
    verdicts = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a library prints must not be read as a verdict
    with suppress(ValueError, OSError):  # macOS, or a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    grader = _make_grader()
    os.dup2(nowhere, 2)  # import errors were for the user, what follows is noise
    grader("\\frac{x}{2}", "(1,2)")  # the first parse builds tables for 0.1 s
    signal.alarm(0)
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = grader(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=verdicts, flush=True)


def _make_grader():
    """(answer, gold) -> correct, wrong or what makes the gold unusable; sympy is imported here."""
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from math_verify import LatexExtractionConfig, grader, verify
    from math_verify import parse as search
    from sympy import E, Eq, Float, Union, log, preorder_traversal
    from sympy.core.random import seed

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

    def is_number(value):
        return getattr(value, "is_number", False)

    def claim(value):
        """(value, sides that are numbers) of an equation: `x=1+2=3` is x=3, and `1+2=3` is 3."""
        if not grader.is_equation(value):
            return value, []
        chain = getattr(value, "_unsorted_args", [value])
        sides = [chain[0].lhs, *(equation.rhs for equation in chain)]
        known = [side for side in sides[sides[0] == E :] if is_number(side)]
        names = [side for side in sides if side not in known]  # e of `e=5` is one
        if known:
            value = Eq(names[0], known[-1], evaluate=False) if names else known[-1]
        return value, known

    def equal(gold, answer):
        sizes = [abs(part.doit().evalf(5)) for part in preorder_traversal(gold) if is_number(part)]
        zeros = max((int(-log(size, 10).evalf()) for size in sizes if 0 < size < 1), default=0)
        digits = dict(float_rounding=max(6, 5 + zeros), numeric_precision=15 + zeros)
        # In brackets: a bare list (`\operatorname{cols}(...)` gives one) would be several guesses.
        # No time limit: math-verify's is an exception, which C loops survive; ours is a kill.
        options = dict(allow_set_relation_comp=True, timeout_seconds=None)
        return verify([gold], [answer], **digits, **options)

    def agree(side, other):
        """Whether they are equal, or one is a decimal and the other rounds to it."""
        decimals = [str(value).rstrip("0") for value in (side, other) if isinstance(value, Float)]
        if not decimals:
            return equal(side, other)
        places = min(len(decimal.partition(".")[2]) for decimal in decimals)
        return abs(float(side.doit()) - float(other.doit())) <= 0.5000001 / 10**places

    def grade(answer, gold, plain=False):
        seed(0)  # sympy tests some identities at random points: same answer, same verdict
        failure = "math-verify cannot parse it"
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
            gold = claim(parse(gold, real))[0]
            failure = "wrong"
            answer, known = claim(parse(answer, real))
            right = equal(gold, answer) and all(agree(side, known[-1]) for side in known)
            return "correct" if right else "wrong"
        except MemoryError:
            os._exit(1)  # counts as "timeout"
        except BaseException:  # math-verify's TimeoutException is no Exception
            return failure

    return grade


def disagreements(path):
    """Prints what eval.py --out holds of responses of which plain math-verify says otherwise."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        benchmarks = json.load(file)["responses"]
    rows = []
    for models in benchmarks.values():
        rows += chain(*models.values())
    with Verifier(seconds=10) as verifier:
        accepted = verifier.plain([(row["response"], row["gold"]) for row in rows])
    pairs = zip(rows, accepted, strict=True)
    rows = [row for row, plain in pairs if plain != (row["verdict"] == "correct")]
    print(*(json.dumps(row, ensure_ascii=False) for row in rows), sep="\n")
    print(f"math-verify says otherwise of {len(rows)} responses")


def main(argv):
    if argv[:1] == ["--worker"]:
        return _serve(float(argv[1]), int(argv[2]))
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 2:  # no argparse: answers begin with a minus sign
        print('usage: python verify.py "so \\boxed{answer}" "gold answer"', file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="backslashreplace")
    text, gold = argv
    try:
        if text == "--disagreements":
            return disagreements(gold)
        with Verifier(workers=1, seconds=10) as verifier:
            if problem := verifier.check_golds([gold])[0]:
                raise ValueError(problem)
            verdict = verifier.grade([(extract(text), gold)])[0]
    except (OSError, KeyError, ValueError) as error:
        print(f"{gold}: {error}", file=sys.stderr)
        return 2
    print(f"answer:  {extract(text)}\nverdict: {verdict}")
    return int(verdict != "correct")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
