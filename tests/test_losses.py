"""Gates, roles, and one more entry of each dict: what a token and a rollout contribute."""

import math

import pytest
import torch

import data
import opsd
from tests.helpers import SMALL, metrics

GATES = ("all", "student-entropy", "teacher-entropy", "gap", "position", "agreement")
BOUNDED = GATES[1:5]


# ------------------------------------------------------------------------------------------------
# Gates against hand-written loops


def by_hand(name, s, t, token, position):
    """One token's measure (of a bounded gate) or gate, from two lists of log-probabilities."""
    return {
        "student-entropy": -sum(math.exp(a) * a for a in s),
        "teacher-entropy": -sum(math.exp(b) * b for b in t),
        "gap": sum(math.exp(a) * (a - b) for a, b in zip(s, t, strict=True)),
        "position": position,
        "agreement": float(t[token] == max(t)),
        "all": 1.0,
    }[name]


@pytest.mark.parametrize("name", GATES)
def test_gates_equal_a_hand_written_loop(name):
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 40, 7, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    ids, ones = torch.randint(7, (40,), generator=generator), torch.ones(40)
    tokens = opsd.Tokens(ids, ones.long(), ones, torch.arange(40), ones, ones.long())
    columns = (column.tolist() for column in (s, t, tokens.ids, tokens.position))
    expected = values = [by_hand(name, *row) for row in zip(*columns, strict=True)]
    args = opsd.parse_args([])
    if name in BOUNDED:
        args.gate_above, args.gate_below = sorted(values)[10], sorted(values)[30]
        expected = [float(args.gate_above <= v < args.gate_below) for v in values]
        if name != "position":  # rounding must not decide
            args.gate_above, args.gate_below = args.gate_above - 1e-9, args.gate_below - 1e-9
    assert opsd.GATES[name](s, t, tokens, args).tolist() == expected
    assert name == "all" or 0 < sum(expected) < len(expected)
    if name in BOUNDED:  # above and below one number are complements
        args.gate_above, args.gate_below = 1.0, None
        above = opsd.GATES[name](s, t, tokens, args)
        args.gate_above, args.gate_below = None, 1.0
        assert torch.equal(above, 1 - opsd.GATES[name](s, t, tokens, args))


# ------------------------------------------------------------------------------------------------
# One more of each, without touching the loop, and from outside


def test_one_more_entry_of_each_dict_trains(tmp_path, monkeypatch):
    seen, steps, own = [], [], opsd.token_loss

    def shorter_half(rollouts, args):
        """A filter that compares rollouts with one another, and tags their tokens."""
        for r in rollouts:
            r.tags = [i % 3 for i in range(len(r.response_ids))]
        return sorted(rollouts, key=lambda r: len(r.response_ids))[: len(rollouts) // 2]

    def doubt(student_logps, teacher_logps, tokens, args):
        """A gate that sees outcomes and tags."""
        seen.append(tokens)
        doubtful = 1 - opsd.sampled(teacher_logps, tokens).exp()
        return torch.where(tokens.tag == 2, 0.0, doubtful / (1 + tokens.outcome))

    def tv(student_logps, teacher_logps, tokens, args):
        return (student_logps.exp() - teacher_logps.exp()).abs().sum(-1) / 2

    def hint(rollouts, write, args):
        return [f"The last digit is {r.problem.answer[-1]}." for r in rollouts]

    def refresh(teacher, student, step, args):
        """A teacher that sees the step."""
        steps.append((step["updates"], step["reverse_kl"]))

    def token_loss(student_logps, teacher_logps, tokens, args):
        """With a measure more, before the others: it is logged by its name."""
        losses, measures = own(student_logps, teacher_logps, tokens, args)
        best = student_logps.detach().max(-1).values
        return losses, dict(best=best, **measures)

    monkeypatch.setitem(opsd.FILTERS, "shorter-half", shorter_half)
    monkeypatch.setitem(opsd.GATES, "doubt", doubt)
    monkeypatch.setitem(opsd.DIVERGENCES, "tv", tv)
    monkeypatch.setitem(data.CONTEXTS, "hint", hint)
    monkeypatch.setitem(opsd.TEACHERS, "when-close", refresh)
    monkeypatch.setattr(opsd, "token_loss", token_loss)
    flags = "--filter shorter-half --gate doubt --divergence tv --context hint"
    flags += " --teacher when-close --steps 2 --out"
    opsd.main([*SMALL, *flags.split(), str(tmp_path / "run")])
    first, second = lines = metrics(tmp_path / "run")[1:-1]
    for line in lines:
        assert line["kept"] == 3 and line["length_kept"] < line["length"]
        assert 0 < line["gate_mass"] < 1 and 0 < line["loss"] < 1 and line["grad_norm"] > 0
        assert line["best"] < 0 and line["logp"] < line["best"]
    assert steps == [(1, first["reverse_kl"]), (2, second["reverse_kl"])]
    assert seen and all(torch.equal(tokens.tag, tokens.position % 3) for tokens in seen)
