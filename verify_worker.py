r"""The worker of verify.py, which starts it: whether two values are equal to math-verify (rule 4).

A program of its own, since a value may hang it or take all memory. From standard input it reads a
line a pair, [value of the answer, value of the gold] in JSON, until that ends, and writes a verdict
each: correct, wrong, or what makes the gold unusable. [response, gold, true]: math-verify's own.

    python verify_worker.py SECONDS MEMORY_MB
"""

import json
import os
import re
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

if __name__ == "__main__":  # before sympy
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    VERDICTS, NOWHERE = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(NOWHERE, 1)  # what a library prints must not be read as a verdict
    # The system's alarm kills the worker when a pair takes too long, whatever loop it is in.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # callers may have ignored or blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(120)  # importing sympy takes 1 to 2 s, more from a cold network disk
    with suppress(ValueError, OSError):  # macOS, or a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]) << 20,) * 2)

from latex2sympy2_extended.latex2sympy2 import latex2sympy
from math_verify import LatexExtractionConfig, grader, verify
from math_verify import parse as search
from sympy import E, Eq, Float, Union, log, preorder_traversal
from sympy.core.random import seed

from answers import TEXT

# boxed="none": math-verify would pick an inner \fbox{3} out of `5 \fbox{3}`. units: see rule 3.
CONFIG = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)
# x_{\max}=, \det(A)= or P(X>2)=: a left side that the grammar lacks and that can be a name
NAMED = re.compile(
    r"(?![0-9 ])((?:[A-Za-z0-9_{}()\[\]|,'<> ]|\\(?:det|dim|deg|rank|max|min|lim|angle|triangle"
    r"|text|operatorname|overline|vec|math[a-z]+|cap|cup|mid|to|infty)(?![a-z]))+)=(.+)"
)
OR = re.compile(rf",? ?(?:{TEXT}or ?\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![a-z])) ?")


@lru_cache(256)  # the rollouts of one problem share its gold
def parse(text, real):
    parts = [parse(part, real) for part in OR.split(text)] if OR.search(text) else []
    letters = {letter for part in parts for letter in part.free_symbols}
    if parts and len(letters) == 1 and not any(map(grader.is_equation, parts)):
        return Eq(letters.pop(), Union(*(part.as_set() for part in parts)), evaluate=False)
    try:
        return latex2sympy(text, is_real=real, normalization_config=CONFIG)
    except Exception:
        name, rest = NAMED.match(text).groups()
        text = "\\text{" + re.sub("[^A-Za-z0-9]", "", name) + "}=" + rest
        return latex2sympy(text, is_real=real, normalization_config=CONFIG)


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
    """The verdict. plain: of a whole response, by math-verify alone."""
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


def main(seconds):
    os.dup2(NOWHERE, 2)  # import errors were for the user, what follows is noise
    grade("\\frac{x}{2}", "(1,2)")  # the first parse builds tables for 0.1 s
    signal.alarm(0)
    print("ready", file=VERDICTS, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = grade(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=VERDICTS, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
