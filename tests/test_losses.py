"""Gates, roles, and one more entry of each dict: what a token and a rollout contribute."""

import math

import pytest
import torch

import data
import opsd
from tests.helpers import (
    SMALL,
    flat_gradient,
    metrics,
    some_rollouts,
    teacher_prompts,
    with_teacher_rows,
)

GATES = ("all", "student-entropy", "teacher-entropy", "gap", "position", "agreement")
BOUNDED = GATES[1:5]


@pytest.fixture
def step(model, tokenizer):
    """A step of opsd.py with flags on six reference responses; the teacher is the student, reading:
    (loss, flat gradient, rollouts).
    """
    rollouts = some_rollouts(tokenizer)
    with_teacher_rows(rollouts, teacher_prompts(tokenizer, rollouts))
    teacher = opsd.frozen_copy(model)

    def run(flags):
        args = opsd.parse_args(["--filter", "all", *flags.split()])
        model.zero_grad()
        loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
        return loss, flat_gradient(model), rollouts

    return run


# ------------------------------------------------------------------------------------------------
# Gates against hand-written loops


def a_piece(rows=40, vocabulary=7):
    """(student, teacher (P, V), tokens, lists of probabilities of both), in float64."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64).mul(2)
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    ones = torch.ones(rows)
    tokens = opsd.Tokens(ids, ones.long(), ones, torch.arange(rows), ones, ones.long())
    return s, t, tokens


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
    s, t, tokens = a_piece()
    rows = zip(s, t, tokens.ids, tokens.position, strict=True)
    values = [
        by_hand(name, a.tolist(), b.tolist(), *map(torch.Tensor.item, c)) for a, b, *c in rows
    ]
    args = opsd.parse_args([])
    expected = values
    if name in BOUNDED:
        args.gate_above, args.gate_below = sorted(values)[10], sorted(values)[30]
        expected = [float(args.gate_above <= v < args.gate_below) for v in values]
        if name != "position":  # rounding must not decide
            args.gate_above, args.gate_below = args.gate_above - 1e-9, args.gate_below - 1e-9
    gate = opsd.GATES[name](s, t, tokens, args)
    assert gate.tolist() == expected
    assert name == "all" or 0 < sum(expected) < len(expected)


def test_above_and_below_one_number_are_complements():
    s, t, tokens = a_piece()
    args = opsd.parse_args([])
    for name in BOUNDED:
        args.gate_above, args.gate_below = 1.0, None
        above = opsd.GATES[name](s, t, tokens, args)
        args.gate_above, args.gate_below = None, 1.0
        assert torch.equal(above, 1 - opsd.GATES[name](s, t, tokens, args))


# ------------------------------------------------------------------------------------------------
# Gates in the loss


def test_gate_1_changes_nothing_and_gate_0_gives_a_gradient_of_exactly_0(step):
    loss, gradient, _ = step("")
    ones, same, _ = step("--gate gap --gate-below 1e9")
    assert ones == loss and torch.equal(same, gradient)
    nothing, none, _ = step("--gate gap --gate-above 1e9")
    assert nothing == 0.0 and none.abs().max() == 0.0


def test_masks_do_not_change_denominators(step):
    """A gate and its complement add up to the ungated step: loss, gradient and mass."""
    whole, gradient, _ = step("")
    for above, below in [
        ("--gate gap --gate-above 0.01", "--gate gap --gate-below 0.01"),
        ("--gate position --gate-above 30", "--gate position --gate-below 30"),
    ]:
        parts = [step(flags) for flags in (above, below)]
        assert sum(loss for loss, *_ in parts) == pytest.approx(whole, rel=1e-5)
        difference = sum(part for _, part, _ in parts) - gradient
        assert difference.norm() < 1e-5 * gradient.norm()


def test_a_gate_carries_no_gradient(step, monkeypatch):
    """A soft gate that depends on the student: the gradient is that of its value as a constant."""
    values = []

    def soft(student_logps, teacher_logps, tokens, args):
        values.append(opsd.entropy(student_logps).clamp(max=1))
        return values[-1]

    monkeypatch.setitem(opsd.GATES, "soft", soft)
    loss, gradient, _ = step("--gate soft")
    constants = iter([v.clone() for v in values])
    assert not any(v.requires_grad for v in values)
    monkeypatch.setitem(opsd.GATES, "soft", lambda *inputs: next(constants))
    again, same, _ = step("--gate soft")
    assert again == loss and torch.equal(same, gradient) and gradient.norm() > 0


def test_the_log_says_what_a_gate_lets_through(step):
    rollouts = step("--gate agreement")[2]
    record = opsd.step_record(1, 1, 0.0, 1.0, rollouts, 0)
    # By hand: the loop over tokens.
    triples = [
        (g, k, r.weight)
        for r in rollouts
        for g, k in zip(r.measures["gate"].tolist(), r.measures["reverse_kl"].tolist(), strict=True)
    ]
    inside = [k for g, k, _ in triples if g]
    outside = [k for g, k, _ in triples if not g]
    assert record["gate_mass"] == pytest.approx(sum(w for g, _, w in triples if g), rel=1e-5)
    assert record["reverse_kl_inside"] == pytest.approx(sum(inside) / len(inside), rel=1e-4)
    assert record["reverse_kl_outside"] == pytest.approx(sum(outside) / len(outside), rel=1e-4)
    assert record["reverse_kl"] == pytest.approx(sum(inside + outside) / len(triples), rel=1e-4)
    assert 0 < record["gate_mass"] < 1
    whole = opsd.step_record(1, 1, 0.0, 1.0, step("")[2], 0)
    assert whole["gate_mass"] == pytest.approx(1) and whole["reverse_kl_outside"] is None


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--gate gap", "--gate gap: needs --gate-above or --gate-below"),
        ("--gate-above 1", "--gate-above, --gate-below: not read by --gate all"),
        ("--divergence split", "--divergence split: --filter correct keeps one outcome only"),
        ("--gate gap --gate-above -1", "--gate-above -1.0: must be 0 or more"),
        ("--context sibling", "--context sibling: a response has siblings only with --group 2"),
        ("--group 0", "--group 0: must be above 0"),
    ],
)
def test_flags_that_cannot_work_are_one_line(flags, complaint, capsys):
    with pytest.raises(SystemExit):
        opsd.parse_args(flags.split())
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_the_teachers_thinking_is_its_own(tokenizer):
    args = opsd.parse_args([])
    assert args.teacher_thinking == "on"
    assert opsd.parse_args(["--thinking", "off"]).teacher_thinking == "off"
    rollouts = some_rollouts(tokenizer, 2)
    args = opsd.parse_args(["--teacher-thinking", "off"])
    opsd.add_teacher_rows(rollouts, ["c"] * 2, tokenizer, args, None)
    for r in rollouts:
        expected = data.render_prompt(tokenizer, r.problem, "c", thinking=False)
        assert r.teacher_row == [expected, r.response_ids]
        assert r.prompt_ids == data.render_prompt(tokenizer, r.problem)
    args = opsd.parse_args(["--context-first"])
    opsd.add_teacher_rows(rollouts, ["c"] * 2, tokenizer, args, None)
    for r in rollouts:
        assert r.teacher_row[0] == data.render_prompt(tokenizer, r.problem, "c", context_first=True)


# ------------------------------------------------------------------------------------------------
# One more of each, without touching the loop, and from outside


def trains(tmp_path, flags):
    out = str(tmp_path / "run")
    opsd.main(["--steps", "2", *SMALL, "--out", out, *flags.split()])
    assert all(s["loss_tokens"] > 0 and 0 < s["grad_norm"] for s in metrics(out)[1:-1])
    return metrics(out)[1]


def test_one_more_gate_that_sees_outcomes_and_tags(tmp_path, monkeypatch):
    def tagged(rollouts, args):
        for r in rollouts:
            r.tags = [i % 3 for i in range(len(r.response_ids))]
        return rollouts

    seen = []

    def doubt(student_logps, teacher_logps, tokens, args):
        seen.append(tokens)
        doubtful = 1 - opsd.sampled(teacher_logps, tokens).exp()
        return torch.where((tokens.tag == 2) | (tokens.outcome == 0), 0.0, doubtful)

    monkeypatch.setitem(opsd.FILTERS, "tagged", tagged)
    monkeypatch.setitem(opsd.GATES, "doubt", doubt)
    assert 0 < trains(tmp_path, "--filter tagged --gate doubt")["gate_mass"] < 0.5
    for tokens in seen:
        assert torch.equal(tokens.tag, tokens.position % 3)


def test_one_more_divergence(tmp_path, monkeypatch):
    def tv(student_logps, teacher_logps, tokens, args):
        return (student_logps.exp() - teacher_logps.exp()).abs().sum(-1) / 2

    monkeypatch.setitem(opsd.DIVERGENCES, "tv", tv)
    assert 0 < trains(tmp_path, "--filter all --divergence tv")["loss"] < 1


def test_one_more_context(tmp_path, monkeypatch):
    def hint(rollouts, write, args):
        return [f"The last digit is {r.problem.answer[-1]}." for r in rollouts]

    monkeypatch.setitem(data.CONTEXTS, "hint", hint)
    trains(tmp_path, "--filter all --context hint")


def test_one_more_filter_that_compares_rollouts(tmp_path, monkeypatch):
    def shorter_half(rollouts, args):
        ordered = sorted(rollouts, key=lambda r: len(r.response_ids))
        return ordered[: len(ordered) // 2]

    monkeypatch.setitem(opsd.FILTERS, "shorter-half", shorter_half)
    line = trains(tmp_path, "--filter shorter-half")
    assert line["length_kept"] < line["length"] and line["kept"] == 3


def test_one_more_teacher_that_sees_the_step(tmp_path, monkeypatch):
    seen = []

    def refresh(teacher, student, step, args):
        seen.append((step["updates"], step["reverse_kl"]))

    monkeypatch.setitem(opsd.TEACHERS, "when-close", refresh)
    first = trains(tmp_path, "--filter all --teacher when-close")
    assert seen[0] == (1, first["reverse_kl"]) and [n for n, _ in seen] == [1, 2]


def test_one_more_measure_is_logged_by_its_name(tmp_path, monkeypatch):
    own = opsd.token_loss

    def token_loss(student_logps, teacher_logps, tokens, args):
        losses, measures = own(student_logps, teacher_logps, tokens, args)
        best = student_logps.detach().max(-1).values
        return losses, dict(best=best, **measures)  # before the others

    monkeypatch.setattr(opsd, "token_loss", token_loss)
    line = trains(tmp_path, "--filter all")
    assert line["best"] < 0 and line["logp"] < line["best"]


@pytest.mark.parametrize(
    "flags",
    [
        "--context wrong --filter all --gate agreement",
        "--context other --filter all --teacher-thinking off",
    ],
)
def test_ablations_train(flags, tmp_path):
    trains(tmp_path, flags)
