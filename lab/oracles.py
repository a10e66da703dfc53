"""opsd.py with gates that know the embedded world, added from outside: entries in its dicts.

redundant-checks: the choice to check an easy step again, and what then stands in the check. the-
digit: the one that a check of a smudged digit settles on, which nobody can know; not-the-digit: all
other tokens. Each filter writes the class of every token into the rollouts' tags.

    python -m lab.oracles --filter incorrect --gate the-digit    # flags of opsd.py
"""

import functools

if __name__ == "__main__":
    from launch import start

import torch

import opsd
from lab.traces import CLASS_NAMES, add_tags
from model import load_tokenizer
from run import fail

# The classes that each gate lets through. Checks of smudged digits pay: they are not redundant.
REDUNDANT = {"easy: check or go on", "easy: inside a check"}
UNKNOWABLE = {"hard: the digit settled on"}
ORACLES = {
    "redundant-checks": REDUNDANT,
    "the-digit": UNKNOWABLE,
    "not-the-digit": set(CLASS_NAMES) - UNKNOWABLE,
}


def oracle(names):
    """The gate that lets through the token classes `names`, and no others."""
    let_through = [name in names for name in CLASS_NAMES]

    def gate(student_logps, teacher_logps, tokens, args):
        return torch.tensor(let_through, device=tokens.tag.device)[tokens.tag].float()  # (P,)

    return gate


tokenizer_of = functools.cache(load_tokenizer)


def tagging(keep):
    """The filter `keep`, which also writes the tags of what it keeps."""

    def filtered(rollouts, args):
        kept = keep(rollouts, args)
        if not args.data:
            add_tags(kept, tokenizer_of(args.model))
        return kept

    return filtered


def add_oracles():
    if "the-digit" not in opsd.GATES:
        opsd.GATES.update({name: oracle(classes) for name, classes in ORACLES.items()})
        opsd.FILTERS.update({name: tagging(keep) for name, keep in opsd.FILTERS.items()})


def parse_args(argv=None):
    add_oracles()
    args = opsd.parse_args(argv)
    if args.data:
        fail("--data: these gates know the tokens of the embedded task only")
    return args


def main(argv=None):
    parse_args(argv)
    opsd.main(argv)


if __name__ == "__main__":
    start(main)
