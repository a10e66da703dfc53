"""The one verifier: reward, filter and evaluation all grade through this file.

Grading rules:
 1. Only what follows the last `</think>` counts; without think tags, the whole text. A `<think>` that is never closed leaves no answer.
    Where the chat template itself writes `<think>` into the prompt, put it back in front of the response before calling `extract`.
 2. The answer is the content of the last complete `\\boxed{...}`; no such box, or an empty one, is "no_answer".
 3. The answer as a whole is compared with the gold answer by math-verify: LaTeX grammar to sympy, then `verify(gold, prediction)` with its
    defaults (strict; floats equal to 6 decimals; 15 digits). The order matters: gold `x<2` accepts `(-\\infty,2)`, not the other way round.
    math_verify.parse is not used, because it *searches* a text: where `3}+` does not parse it grades the 3, compares strings where nothing
    parses, and passes digits to sympy's eval-based parser. Here an answer outside the grammar is wrong: no substring, no string equality.
 4. Two plain integers of at most 18 digits are compared as integers, which is what rule 3 says of them too.
 5. An answer of more than 500 characters is wrong unread: parsing takes seconds from there on.
 6. An answer that takes more than the time limit, or brings its grader down (memory), is "timeout"; callers count it as incorrect.
 7. A gold answer that math-verify cannot parse, or that does not equal itself, is an error in the data, never a wrong answer.
 8. A response that did not end by itself is "truncated", whatever it says.

    python verify.py "so it is \\boxed{1/2}" "0.5"      # prints answer and verdict; exit code 0 correct, 1 not, 2 usage or unusable gold
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

MAX_CHARS = 500  # rule 5
CACHE_PAIRS = 50_000  # about 20 MB of short answers
START_SECONDS = 120.0  # importing sympy takes 1 to 2 s, more from a cold network disk

# `\\` is a LaTeX line break, so the brace after it is a real one; it is left alone before "boxed" because models do write `\\boxed{5}`.
BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")
PLAIN_INTEGER = re.compile(r"-?[0-9]{1,18}")  # [0-9], since \d also takes other scripts' digits


def extract(text: str) -> str | None:
    """The final answer of a response (rules 1 and 2), stripped, or None. One pass, linear in the length of the text."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    opened = []  # start of the content for a box, -1 for any other brace
    start, end = -1, -1  # of the complete box that starts last
    for token in BRACE.finditer(text):
        if token[0] == "{":
            opened.append(-1)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box > start:
                start, end = box, token.start()
    return text[start:end].strip() or None if start >= 0 else None


def grade_responses(
    verifier: "Verifier", texts: list[str], finished: list[bool], golds: list[str]
) -> list[tuple[str, str]]:
    """(outcome, reason) of each response text, in order. `finished[i]` says that response i ended with a stop token of its own.

    outcome: correct, incorrect or truncated. reason: correct, wrong, no_answer, timeout or truncated.
    Raises ValueError for lists of unequal length and for an unusable gold answer (see `Verifier.check_golds`).
    """
    rows = list(zip(texts, finished, golds, strict=True))
    reasons = verifier.grade([(extract(text) if done else None, gold) for text, done, gold in rows])
    reasons = [reason if done else "truncated" for reason, (_, done, _) in zip(reasons, rows)]
    outcomes = {"correct": "correct", "truncated": "truncated"}
    return [(outcomes.get(reason, "incorrect"), reason) for reason in reasons]


class Verifier:
    """Grades answers in worker processes that can be killed. A context manager; `close()` may be called twice or forgotten.

    workers: processes, each started when first needed. seconds: wall-clock limit of one answer, start-up not counted.
    memory_mb: limit on each worker's address space, in MiB (macOS does not enforce it).
    Threads may share one Verifier; their calls are served one at a time.
    """

    def __init__(self, workers: int = 2, seconds: float = 3.0, memory_mb: int = 1024):
        if workers < 1 or seconds <= 0 or memory_mb < 1:
            raise ValueError(
                f"Verifier needs workers >= 1, seconds > 0, memory_mb >= 1; got {workers}, {seconds}, {memory_mb}"
            )
        self.seconds, self.memory_mb = seconds, memory_mb
        self._workers = [_Worker(seconds, memory_mb) for _ in range(workers)]
        self._idle = list(self._workers)
        self._cache: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(
            self, _stop_all, self._workers
        )  # runs at exit too, or when the object is dropped

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Kill the workers and wait for their end."""
        with self._lock:
            self._finalizer()

    def grade(self, pairs: list[tuple[str | None, str]]) -> list[str]:
        """Verdict of each (extracted answer or None, gold answer), in order: correct, wrong, no_answer or timeout.

        Raises ValueError for a gold answer that does not parse, RuntimeError when workers cannot start or after `close()`.
        """
        verdicts = self._grade(pairs)
        for verdict, (_, gold) in zip(verdicts, pairs):
            if verdict == "bad_gold":
                raise ValueError(f"math-verify cannot parse the gold answer {gold!r}")
        return verdicts

    def check_golds(self, golds: list[str]) -> list[str | None]:
        """What makes each gold answer unusable, or None (rule 7). For loading data: there an error can still name the row."""
        problems = {
            "correct": None,
            "bad_gold": "math-verify cannot parse it",
            "wrong": f"it is longer than {MAX_CHARS} characters or, to math-verify, not equal to itself",
            "timeout": f"grading it takes more than {self.seconds:g} s or {self.memory_mb} MiB",
        }
        return [problems[verdict] for verdict in self._grade([(gold, gold) for gold in golds])]

    def _grade(self, pairs):
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("this Verifier is closed")
            verdicts = {pair: _quick_verdict(*pair) or self._cache.get(pair) for pair in pairs}
            todo = [pair for pair, verdict in verdicts.items() if verdict is None]
            if todo:
                with ThreadPoolExecutor(min(len(todo), len(self._workers))) as threads:
                    new = dict(zip(todo, threads.map(self._ask, todo)))
                verdicts.update(new)
                self._cache.update(new)
                while len(self._cache) > CACHE_PAIRS:
                    del self._cache[next(iter(self._cache))]  # the oldest
            return [verdicts[pair] for pair in pairs]

    def _ask(self, pair):
        worker = self._idle.pop()  # never empty: there are as many threads as workers, or fewer
        try:
            return worker.ask(pair)
        finally:
            self._idle.append(worker)


def _quick_verdict(answer, gold):
    """The verdict where no worker is needed, else None."""
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_CHARS:
        return "wrong"
    if PLAIN_INTEGER.fullmatch(answer) and PLAIN_INTEGER.fullmatch(gold):
        return "correct" if int(answer) == int(gold) else "wrong"
    return None


class _Worker:
    """One grading process and the pipes to it: one JSON line per pair, one per verdict.

    A fresh interpreter: a fork of a process with CUDA or threads can hang, and multiprocessing would import the caller's script again.
    """

    def __init__(self, seconds, memory_mb):
        self.seconds, self.memory_mb = seconds, memory_mb
        self.process = None

    def start(self):
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--worker",
            str(self.seconds),
            str(self.memory_mb),
        ]
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
        }  # sympy's paths follow the order of sets: same answer, same verdict
        # A session of its own: Ctrl-C ends the caller in good order, and nothing outlives a kill of the group.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.ready, self.used = False, False

    def stop(self):
        if self.process:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.communicate()  # closes the pipes and waits
            self.process = None

    def read(self, seconds):
        """The next line; b"" when the process has died, None when the time is over."""
        return self.process.stdout.readline() if wait([self.process.stdout], seconds) else None

    def ask(self, pair):
        if not self.process:
            self.start()
        if not self.ready:
            self.ready = bool(self.read(START_SECONDS))
        if not self.ready:
            self.stop()
            raise RuntimeError(
                "a worker of verify.py did not start; its own message is above (is math-verify installed?)"
            )
        try:
            self.process.stdin.write(
                json.dumps(pair).encode() + b"\n"
            )  # ASCII escapes: lone surrogates and control characters pass
            self.process.stdin.flush()
        except BrokenPipeError:
            self.used = True  # it died while idle, and the read below returns b""
        line, used = self.read(self.seconds), self.used
        if line:
            self.used = True
            return json.loads(line)
        self.stop()
        self.start()  # imports sympy while the caller goes on
        # A used worker may have died of something else than this pair, say of what earlier ones left in memory: a fresh one decides.
        return self.ask(pair) if line == b"" and used else "timeout"


def _stop_all(workers):
    for worker in workers:
        worker.stop()


def _serve(seconds, memory_mb):
    """The worker process: reads [answer, gold] lines from stdin, writes verdicts to stdout, ends when stdin does."""
    import resource

    verdicts = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a library prints must not be read as a verdict
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    except (ValueError, OSError):
        pass  # macOS, or a lower limit is set already
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(
        4300
    )  # Python's default, whatever the environment says; the recursion limit stays at its default too
    grader = _make_grader()
    grader("1/2", "0.5")  # the first parse builds tables for 0.1 s
    os.dup2(nowhere, 2)  # import errors were for the user, what follows is noise
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(
            signal.ITIMER_REAL, seconds + 1
        )  # should the caller be killed meanwhile, the kernel ends this process
        verdict = grader(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=verdicts, flush=True)


def _make_grader():
    """The function (answer, gold) -> correct, wrong or bad_gold. math-verify and sympy are imported here, in the workers only."""
    import logging
    from dataclasses import replace
    from functools import lru_cache
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from math_verify import LatexExtractionConfig, verify
    from math_verify.grader import should_treat_as_complex
    from sympy.core.random import seed

    logging.disable()
    # boxed="none": the box is off already, and math-verify would pick an inner \fbox{3} out of `5 \fbox{3}`.
    config = replace(LatexExtractionConfig().normalization_config, boxed="none")

    @lru_cache(64)  # the rollouts of one problem share its gold
    def parse(text):
        real = not should_treat_as_complex(text)
        return latex2sympy(
            text, is_real=real, convert_degrees=False, normalization_config=config
        )  # as in math_verify.parser

    def grader(answer, gold):
        seed(0)  # sympy tests some identities at random points: same answer, same verdict
        failure = "bad_gold"
        try:
            gold = parse(gold)
            failure = "wrong"
            # math-verify's own time limit is a SIGALRM exception, which a `finally` or a C loop in sympy survives; ours is a kill.
            # The brackets: verify() takes a bare list for several guesses of which one must fit, and `\operatorname{cols}(...)` parses to a list.
            return "correct" if verify([gold], [parse(answer)], timeout_seconds=None) else "wrong"
        except MemoryError:
            os._exit(1)  # counts as "timeout"
        except BaseException:  # math-verify's TimeoutException is no Exception
            return failure

    return grader


def main(argv):
    if argv[:1] == ["--worker"]:
        _serve(float(argv[1]), int(argv[2]))
        return 0
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 2:  # no argparse: answers begin with a minus sign
        print(
            'usage: python verify.py "response with \\boxed{answer}" "gold answer"', file=sys.stderr
        )
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
