"""The one verifier: reward, filter and evaluation all grade through this file.

Grading rules (1 to 4 are answers.py's):
 1. Only what follows the last `</think>` counts; without think tags, the whole text. A `<think>`
    never closed leaves no answer: put back the one that a chat template writes into the prompt.
 2. The answer is in the last complete `\\boxed{...}`. No box, or an empty one, is "no_answer".
 3. Answer and gold are brought to a normal form, a value and a unit: see the top of answers.py.
    A unit (`15 balls`, `5\\text{ cm}`, `\\$18`) may be left out, but two units must agree.
 4. Plain integers, decimals and fractions are compared exactly, where rule 5 says the same of them.
 5. All else is compared by math-verify: LaTeX grammar to sympy, then `verify(gold, prediction)`
    with its defaults (strict; floats equal to 6 decimals; 15 digits), its own dropping of units
    off. The order matters: gold `x<2` accepts `(-\\infty,2)`, not the other way round.
    Of `A \\approx B`, A is the answer and B has to be A, rounded. Of `A=B`, each side that is a
    number has to be right. math_verify.parse is not used: it *searches* a text (in `3}+` it finds
    the 3), compares strings, and passes digits to sympy's eval. What the grammar lacks is wrong.
 6. An answer of more than 500 characters is wrong unread: parsing takes seconds from there on.
 7. An answer that passes the time limit or kills its grader (memory) is "timeout", so incorrect.
 8. A gold that is not read, does not parse, or does not equal itself is an error in the data.
 9. A response that did not end by itself is "truncated", whatever it says.

    python verify.py "so it is \\boxed{1/2}" "0.5"  # exit code 0 correct, 1 not, 2 unusable gold
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from multiprocessing.connection import wait

from answers import extract, normal, number, units_agree

MAX_CHARS = 500  # rule 6
CACHE_PAIRS = 50_000  # about 20 MB of short answers
START_SECONDS = 120.0  # importing sympy takes 1 to 2 s, more from a cold network disk

UNUSABLE = {
    "bad_gold": "math-verify cannot parse it",
    "unread": "it has words or numbers beside a number that are no unit (see answers.py)",
}


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
        too_long = f"it is longer than {MAX_CHARS} characters"
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
    if len(answer) > MAX_CHARS:
        return "wrong"
    gold = normal(gold) if len(gold) <= MAX_CHARS else None
    if not gold:
        return "unread"
    answer = normal(answer)
    if not answer or not units_agree(answer[1], gold[1]):
        return "wrong"
    values = answer[0], gold[0]
    ours, theirs = map(number, values)
    if ours is None or theirs is None or 0 < abs(ours - theirs) < 2e-6:
        return values  # math-verify rounds: to it, numbers that near each other may be equal
    return "correct" if ours == theirs else "wrong"


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
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy, latex2sympy
    from math_verify import LatexExtractionConfig, grader, verify
    from sympy.core.random import seed

    logging.disable()
    # boxed="none": math-verify would pick an inner \fbox{3} out of `5 \fbox{3}`. units: see rule 3.
    config = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)
    full = _Latex2Sympy.create_parser

    def fast(self, text):
        parser = full(self, text)
        parser._interp.predictionMode = PredictionMode.SLL
        return parser

    @lru_cache(256)  # the rollouts of one problem share its gold
    def parse(text):
        real = not grader.should_treat_as_complex(text)  # as in math_verify.parser
        # ANTLR's SLL mode finds the full mode's tree, or none, up to ten times faster (`x=5`).
        for _Latex2Sympy.create_parser in (fast, full):
            try:
                return latex2sympy(text, is_real=real, normalization_config=config)
            except Exception as error:
                failure = error
        raise failure

    def equal(gold, answer):
        # In brackets: a bare list (`\operatorname{cols}(...)` gives one) would be several guesses.
        # No time limit: math-verify's is an exception, which C loops survive; ours is a kill.
        return verify([gold], [answer], timeout_seconds=None)

    def sides_hold(gold, answer, approx, rounded):
        """The last sentence of rule 5, about what verify() does not look at."""
        if grader.is_equation(answer):
            chain = getattr(answer, "_unsorted_args", [answer])  # `1=2=3` is two equations
            sides = [side for equation in chain for side in equation.args]
            numbers = [side for side in sides if getattr(side, "is_number", False)]
            if not grader.is_relation(gold) and not all(equal(gold, n) for n in numbers):
                return False
            answer = sides[-1]
        half = 0.5000001 * 10 ** -len(rounded.strip().partition(".")[2])
        return not approx or abs(float(answer) - float(rounded)) <= half

    def grade(answer, gold):
        seed(0)  # sympy tests some identities at random points: same answer, same verdict
        failure = "bad_gold"
        try:
            gold = parse(gold.partition("\\approx")[0])
            failure = "wrong"
            answer, *rest = answer.partition("\\approx")
            answer = parse(answer)
            return "correct" if equal(gold, answer) and sides_hold(gold, answer, *rest) else "wrong"
        except MemoryError:
            os._exit(1)  # counts as "timeout"
        except BaseException:  # math-verify's TimeoutException is no Exception
            return failure

    return grade


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
    text, gold = argv
    sys.stdout.reconfigure(errors="backslashreplace")
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
