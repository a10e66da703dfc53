"""The one verifier: reward, filter and evaluation all grade through this file.

Grading rules (1 to 3 are answers.py's):
 1. Only what follows the last `</think>` counts; without think tags, the whole text. A `<think>`
    never closed leaves no answer: put back the one that a chat template writes into the prompt.
 2. The answer is in the last complete `\\boxed{...}`, or in the last ones if only a comma, "and" or
    "or" stands between them. No box, or an empty one, is "no_answer".
 3. Answer and gold become a value and a unit (`15 balls`, `\\$18`), which one of them may lack.
 4. verify_worker.py compares values by math-verify: LaTeX grammar to sympy, then `verify(gold,
    prediction)` (strict; floats equal to 6 decimals, small ones to 5 digits; `x<2` is an interval);
    plain numbers are compared here, with the same result. Of `A=B`, B is the answer, and sides that
    are numbers have to agree; an A that the grammar lacks is a name. What else it lacks is wrong:
    math_verify.parse *searches* a text (in `3}+` it finds the 3), and is not used.
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
from fractions import Fraction
from itertools import chain

from answers import extract, normal, units_agree

MAX_CHARS = 500  # rule 5
CACHE_PAIRS = 50_000  # about 20 MB of short answers
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "verify_worker.py")
NUMBER = re.compile("[+-]?([0-9]{1,6}[.][0-9]{1,6}|[0-9]{1,12}/0*[1-9][0-9]{0,11}|[0-9]{1,18})")
FRACTION = re.compile(r"^([+-]?)\\[dt]?frac *\{([0-9]+)\}\{([0-9]+)\}$")  # -\dfrac{1}{2}
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
    imports the caller's script again. It reads from a pipe, and so ends with its caller: a line
    there and one back take 0.1 ms of the 1 to 10 ms of an answer.

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
        command = [sys.executable, WORKER, str(self.seconds), str(self.memory_mb)]
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
