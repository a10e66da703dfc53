"""What a token contributes to OPSD's loss: divergences, gates, weights by outcome.

Functions of tensors: no model, no file, no rank. Axes: P tokens of a piece, V vocabulary. Each
takes the log-probabilities of student and teacher (P, V), what is known of the tokens, and the
flags. A divergence returns nats a token (P,); a gate a factor in [0, 1] on it (P,), without
gradient. A new one is a function, an entry, and, if it has a parameter, a flag.

A gate changes neither the denominators of eq. 1 nor the weights: a step whose gate lets 5% of the
weight through has a small gradient. AdamW does not see that scale, it makes a step of the usual
length from what is left; so `gate_mass` in the log, and the union `--gate NAME agreement`, which
keeps the tokens that hold the student where it is.
"""

import math
from typing import NamedTuple

import torch

import toy
from cli import fail
from data import CONTEXTS


class Tokens(NamedTuple):
    """What is known of each response token, (P,) each; None where no gate of the run needs it."""

    ids: torch.Tensor  # the sampled ids
    correct: torch.Tensor  # whether its rollout is correct
    advantage: torch.Tensor  # its rollout's
    position: torch.Tensor  # in its response, from 0
    weight: torch.Tensor  # in the step's loss
    control: torch.Tensor | None = None  # the second teacher's log-probability of the id
    token_class: torch.Tensor | None = None  # number in toy.CLASS_NAMES


# ------------------------------------------------------------------------------------------------
# Divergences. The KLs are written with the extra terms -P + Q, which sum to zero: where both
# distributions are equal the value and the gradient are then exactly 0, not a rounding error.


def kl(p, q):
    """KL(P || Q) = sum_v P log(P/Q) of log-probabilities p and q (P, V): (P,)."""
    return (p.exp() * (p - q - 1) + q.exp()).sum(-1)


def reverse_kl(student_logps, teacher_logps, tokens, args):
    return kl(student_logps, teacher_logps)


def forward_kl(student_logps, teacher_logps, tokens, args):
    return kl(teacher_logps, student_logps)


def jsd(student_logps, teacher_logps, tokens, args):
    of_teacher, of_student = math.log(args.beta), math.log(1 - args.beta)
    mixture = torch.logaddexp(teacher_logps + of_teacher, student_logps + of_student)  # (P, V)
    return args.beta * kl(teacher_logps, mixture) + (1 - args.beta) * kl(student_logps, mixture)


def split(student_logps, teacher_logps, tokens, args):
    reverse, forward = kl(student_logps, teacher_logps), kl(teacher_logps, student_logps)
    return torch.where(tokens.correct, reverse, forward)


def rft(student_logps, teacher_logps, tokens, args):
    return -sampled(student_logps, tokens)


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "split": split,
    "rft": rft,
}

# ------------------------------------------------------------------------------------------------
# Gates: which tokens. Several names on the command line are a union, the largest factor of a token.


def sampled(logps, tokens):
    """Of log-probabilities (P, V) those of the sampled ids: (P,)."""
    return logps.gather(-1, tokens.ids[:, None])[:, 0]


def entropy(logps):
    """Of log-probabilities (P, V), in nats: (P,)."""
    return -torch.linalg.vecdot(logps.exp(), logps)


def within(values, args):
    """1 where --gate-above <= value < --gate-below, so that the two with one number are each
    other's complement; a bound that is not given bounds nothing.
    """
    let_through = torch.ones_like(values, dtype=torch.bool)  # (P,)
    if args.gate_above is not None:
        let_through &= values >= args.gate_above
    if args.gate_below is not None:
        let_through &= values < args.gate_below
    return let_through.float()


def every_token(student_logps, teacher_logps, tokens, args):
    return torch.ones_like(tokens.weight)


def student_entropy(student_logps, teacher_logps, tokens, args):
    return within(entropy(student_logps), args)


def teacher_entropy(student_logps, teacher_logps, tokens, args):
    return within(entropy(teacher_logps), args)


def gap(student_logps, teacher_logps, tokens, args):
    return within(kl(student_logps, teacher_logps), args)


def position(student_logps, teacher_logps, tokens, args):
    return within(tokens.position, args)


def agreement(student_logps, teacher_logps, tokens, args):
    """The teacher's best token is the one that the student wrote."""
    return (teacher_logps.argmax(-1) == tokens.ids).float()


def contrast(student_logps, teacher_logps, tokens, args):
    """A teacher that reads --contrast moves the sampled token the same way, up or down."""
    student = sampled(student_logps, tokens)
    by_teacher = (sampled(teacher_logps, tokens) - student).sign()
    by_control = (tokens.control - student).sign()
    return (by_teacher == by_control).float()


def oracle(names):
    """The gate that lets through the embedded world's token classes `names`, and no others."""
    let_through = [name in names for name in toy.CLASS_NAMES]

    def gate(student_logps, teacher_logps, tokens, args):
        table = torch.tensor(let_through, device=tokens.ids.device)
        return table[tokens.token_class].float()

    return gate


GATES = {
    "all": every_token,
    "student-entropy": student_entropy,
    "teacher-entropy": teacher_entropy,
    "gap": gap,
    "position": position,
    "agreement": agreement,
    "contrast": contrast,
    **{name: oracle(classes) for name, classes in toy.ORACLES.items()},
}
BOUNDED = ("student-entropy", "teacher-entropy", "gap", "position")  # they call `within`


def add_gate_flags(add):
    add("--gate", nargs="+", default=["all"], choices=list(GATES), help="tokens that count: any of")
    unit = f"of gate {', '.join(BOUNDED)}: nats, or tokens from 0"
    add("--gate-above", type=float, help=f"{unit}; this and above count; none = no bound")
    add("--gate-below", type=float, help="likewise; under this they count; none = no bound")
    add(
        "--contrast", choices=list(CONTEXTS), help="of gate contrast: its context, else instruction"
    )


def settle_gates(args):
    """Refuses gates that cannot work and flags that no gate reads; settles --contrast."""
    gates = " ".join(args.gate)
    bounds = (args.gate_above, args.gate_below) != (None, None)
    bounded = [name for name in args.gate if name in BOUNDED]
    if bounded and not bounds:
        fail(f"--gate {bounded[0]}: needs --gate-above or --gate-below")
    if bounds and not bounded:
        fail(f"--gate-above, --gate-below: not read by --gate {gates}")
    if args.contrast and "contrast" not in args.gate:
        fail(f"--contrast {args.contrast}: not read by --gate {gates}")
    if "contrast" in args.gate:
        args.contrast = args.contrast or "instruction"
    for name in args.gate:
        if name in toy.ORACLES and args.data:
            fail(f"--gate {name}: knows the tokens of the embedded task only, not of --data")


# ------------------------------------------------------------------------------------------------
# Weights by outcome: factors on a rollout's weights. A negative one pushes the student away from
# the teacher, and nothing bounds how far. An outcome that is not named has factor 1. The
# denominators stay as they are.

WEIGHTS = {
    "equal": {},
    "repel": dict(incorrect=-0.1, truncated=0.0),
}

# ------------------------------------------------------------------------------------------------
# What is logged of each token

MEASURES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "logp", "gate")


def measure(student_logps, teacher_logps, ids, gate):
    """The MEASURES of each token, (M, P), in nats; logp: the student's of the sampled id."""
    s, t = student_logps, teacher_logps
    p, q, dot = s.exp(), t.exp(), torch.linalg.vecdot
    ps, pt, qs, qt = dot(p, s), dot(p, t), dot(q, s), dot(q, t)
    logp = s.gather(-1, ids[:, None])[:, 0]
    return torch.stack([ps - pt, qt - qs, -ps, -qt, logp, gate])


def gate_metrics(measures, weights):
    """What the gate of a step let through, from the measures (M, R) and the tokens' weights (R,).

    gate_mass: the share of the weight (of its size, where some are negative). reverse_kl_inside,
    reverse_kl_outside: means over the tokens, counted by the gate and by 1 - gate; None where
    nothing is inside or outside.
    """
    reverse, gate, size = measures[0], measures[MEASURES.index("gate")], weights.abs()

    def mean(values, by):
        return (values * by).sum().item() / by.sum().item() if by.sum() > 0 else None

    return dict(
        gate_mass=mean(gate, size),
        reverse_kl_inside=mean(reverse, gate),
        reverse_kl_outside=mean(reverse, 1 - gate),
    )
