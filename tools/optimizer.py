"""opsd.py with another optimizer than AdamW, which does not see the scale of a gradient: what of a
gate's effect is the gate's, and what the optimizer's?

    python -m tools.optimizer sgd --lr 0.1 --filter incorrect --gate the-digit    # flags of opsd.py
    python -m tools.optimizer runs/opsd-incorrect-001 --filter incorrect --gate the-digit

sgd: with momentum 0.9. A run directory: Adam whose second moments are those that this run ended
with, and stay, so that a gate that takes most of the gradient away makes smaller steps.
"""

import os
import sys

import torch

import opsd
from cli import fail, start
from run import load_state


class FrozenAdam(torch.optim.Optimizer):
    """Adam without weight decay; `moments`: a tensor a parameter, the second moments for good."""

    def __init__(self, parameters, lr, moments, beta=0.9, eps=1e-8):
        super().__init__(parameters, dict(lr=lr, beta=beta, eps=eps, updates=0))
        self.moments = moments

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        group["updates"] += 1
        for parameter, moment in zip(group["params"], self.moments, strict=True):
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - group["beta"])
            unbiased = mean / (1 - group["beta"] ** group["updates"])
            parameter.sub_(group["lr"] * unbiased / (moment.sqrt() + group["eps"]))


def second_moments(path):
    """Adam's second moments, without their bias, at the end of a run of opsd.py."""
    state = load_state(path) if os.path.isdir(path) else {}
    if not state:
        fail(f"{path}: no state in it (it is no run directory of opsd.py, or --state-every was 0)")
    beta, states = state["optimizer"]["param_groups"][0]["betas"][1], state["optimizer"]["state"]
    return [states[i]["exp_avg_sq"] / (1 - beta ** states[i]["step"]) for i in sorted(states)]


def parse_args(argv=None):
    """(sgd or a run directory, the flags of opsd.py)."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit
    if not name or name.startswith("-"):
        fail("first sgd or a run directory of opsd.py, then opsd.py's flags (--help)")
    opsd.parse_args(flags)
    return name, flags


def main(argv=None):
    name, flags = parse_args(argv)
    if name == "sgd":
        opsd.make_optimizer = lambda model, args: torch.optim.SGD(
            model.parameters(), lr=args.lr, momentum=0.9
        )
    else:
        moments = second_moments(name)
        opsd.make_optimizer = lambda model, args: FrozenAdam(model.parameters(), args.lr, moments)
    opsd.main(flags)


if __name__ == "__main__":
    start(main)
