"""What is wrong with a flag that is given: its number, a value twice, or that nothing reads it."""

import math
import os
import re

POSITIVE = {
    *("--steps", "--batch", "--lr", "--micro-tokens", "--max-new-tokens", "--sample-batch"),
    *("--context-tokens", "--group", "--refresh", "--problems", "--samples", "--beta", "--top-p"),
    *("--vllm-memory", "--rounds", "--tokens"),
}
BELOW = {"--beta": 1, "--ema": 1, "--vllm-memory": 1, "--seed": 2**63, "--threads": 1025}
AT_MOST = {"--top-p": 1}
LAST = {  # flag: the one whose number is the last that it reaches
    **dict.fromkeys(("--eval-every", "--save-every", "--refresh", "--warmup"), "--steps"),
    "--reinject": "--max-new-tokens",
}
# When a flag is read stands at the beginning of its help, joined by "and":
#     of --teacher ema, every: ...   with one of these values
#     of --eval-problems: ...        with a value that is neither 0 nor none
#     without --data: ...
READ = re.compile(r"(of|without) (--[a-z-]+)(?: ([\w, -]+))?")


def complaint(flag, value, args, help):
    """What is wrong with the flag, "" if nothing is. args: the values of all flags."""
    values = value if isinstance(value, list) else [value]
    for number in values:
        if type(number) in (int, float):
            below = BELOW.get(flag, 2**31 if type(number) is int else math.inf)
            most = AT_MOST.get(flag, math.inf)
            if not 0 <= number < below or number > most or number == 0 and flag in POSITIVE:
                least = "above 0" if flag in POSITIVE else "0 or more"
                bound = "finite" if below == math.inf else f"below {below}"
                bound = f"at most {most}" if flag in AT_MOST else bound
                return f"{flag} {number}: must be {least} and {bound}"
        if number == "":
            return f"{flag}: is empty"
    if flag in LAST and value > value_of(args, LAST[flag]):
        return f"{flag} {value}: beyond {LAST[flag]} {value_of(args, LAST[flag])}"
    if len({os.path.normpath(str(v)) for v in values}) < len(values):
        return f"{flag} {' '.join(map(str, values))}: one of them stands there twice"
    for condition in map(READ.fullmatch, help.partition(": ")[0].split(" and ")):
        if condition is None:
            continue
        how, other, choices = condition.groups()
        now = value_of(args, other)
        chosen = set(now if isinstance(now, list) else [now]) - {None, 0, "none"}
        if choices:
            chosen &= set(choices.split(", "))
        if bool(chosen) != (how == "of"):
            reader = ("with " if how == "of" else "") + condition[0].removeprefix("of ")
            return f"{flag}: read only {reader} ({other} is {now})"
    return ""


def value_of(args, flag):
    return vars(args)[flag[2:].replace("-", "_")]
