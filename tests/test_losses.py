"""Gates, weights by outcome, the control teacher, roles: what a token and a rollout contribute."""

import math

import pytest
import torch

import data
import losses
import opsd
import toy
from data import Problem
from model import sampled_logps
from rollout import Rollout
from tests.helpers import (
    SMALL,
    flat_gradient,
    metrics,
    some_rollouts,
    teacher_prompts,
    weights,
    with_teacher_rows,
)

TRACE = Problem("53 +4 -26?, result?", "51", "53+4=57, 57-6=51", "hard")
TEXT = "<think>\n53+4=57 check 53+4=57\n57-2=55 wait 26 so 57-6=51\n</think>\n\n\\boxed{51}"


def step_of(model, teacher, rollouts, prompts, tokenizer, flags):
    """(loss, flat gradient) of a step of opsd.py; the rollouts keep their measures."""
    args = opsd.parse_args(["--filter", "all", *flags.split()])
    model.zero_grad()
    with_teacher_rows(rollouts, prompts)
    for r in rollouts:
        r.control_row = opsd.teacher_row(r.prompt_ids, r.response_ids) if args.contrast else None
    opsd.add_token_classes(rollouts, tokenizer, args)
    opsd.read_by_teacher(teacher, rollouts, args)
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    return loss, flat_gradient(model)


@pytest.fixture
def step(model, tokenizer):
    """The step above on six reference responses; the teacher is the student, reading."""
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts)
    teacher = opsd.frozen_copy(model)

    def run(flags):
        return (*step_of(model, teacher, rollouts, prompts, tokenizer, flags), rollouts)

    return run


# ------------------------------------------------------------------------------------------------
# Gates against hand-written loops


def a_piece(rows=40, vocabulary=7):
    """(student, teacher (P, V), tokens, lists of probabilities of both), in float64."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64).mul(2)
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    control = torch.rand(rows, generator=generator, dtype=torch.float64).log()
    ones = torch.ones(rows)
    classes = torch.arange(rows) % len(toy.CLASS_NAMES)
    tokens = losses.Tokens(ids, ones.bool(), ones, torch.arange(rows), ones, control, classes)
    return s, t, tokens


def by_hand(name, s, t, token, position, control):
    """One token's measure (of a bounded gate) or gate, from two lists of log-probabilities."""

    def sign(value):
        return (value > 0) - (value < 0)

    return {
        "student-entropy": -sum(math.exp(a) * a for a in s),
        "teacher-entropy": -sum(math.exp(b) * b for b in t),
        "gap": sum(math.exp(a) * (a - b) for a, b in zip(s, t, strict=True)),
        "position": position,
        "agreement": float(t[token] == max(t)),
        "contrast": float(sign(t[token] - s[token]) == sign(control - s[token])),
        "all": 1.0,
    }[name]


@pytest.mark.parametrize("name", sorted(set(losses.GATES) - set(toy.ORACLES)))
def test_gates_equal_a_hand_written_loop(name):
    s, t, tokens = a_piece()
    rows = zip(s, t, tokens.ids, tokens.position, tokens.control, strict=True)
    values = [
        by_hand(name, a.tolist(), b.tolist(), *map(torch.Tensor.item, c)) for a, b, *c in rows
    ]
    args = opsd.parse_args([])
    expected = values
    if name in losses.BOUNDED:
        args.gate_above, args.gate_below = sorted(values)[10], sorted(values)[30]
        expected = [float(args.gate_above <= v < args.gate_below) for v in values]
        if name != "position":  # rounding must not decide
            args.gate_above, args.gate_below = args.gate_above - 1e-9, args.gate_below - 1e-9
    gate = losses.GATES[name](s, t, tokens, args)
    assert gate.tolist() == expected
    assert name == "all" or 0 < sum(expected) < len(expected)


def test_above_and_below_one_number_are_complements():
    s, t, tokens = a_piece()
    args = opsd.parse_args([])
    for name in losses.BOUNDED:
        args.gate_above, args.gate_below = 1.0, None
        above = losses.GATES[name](s, t, tokens, args)
        args.gate_above, args.gate_below = None, 1.0
        assert torch.equal(above, 1 - losses.GATES[name](s, t, tokens, args))


def test_oracle_gates_on_a_hand_written_trace(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    rollouts = [Rollout(TRACE, [], ids)]
    opsd.add_token_classes(rollouts, tokenizer, opsd.parse_args(["--gate", "the-digit"]))
    classes = torch.tensor(rollouts[0].token_classes)
    tokens = losses.Tokens(torch.tensor(ids), None, None, None, None, token_class=classes)
    args = opsd.parse_args([])

    def let_through(name):
        gate = losses.GATES[name](None, None, tokens, args).tolist()
        return "".join(tokenizer.decode([i]) if g else "." for i, g in zip(ids, gate, strict=True))

    # The choice to check (made), what stands in the check, and the choice to check again (not
    # made: the line break). The check of the smudged digit is not redundant.
    assert let_through("redundant-checks").strip(".") == " check 53+4=57\n"
    digit = TEXT.index("6=51\n</think>")
    assert let_through("not-the-digit") == TEXT[:digit] + "." + TEXT[digit + 1 :]
    assert let_through("the-digit").strip(".") == "6"
    both = [losses.GATES[n](None, None, tokens, args) for n in ("the-digit", "not-the-digit")]
    assert torch.equal(sum(both), torch.ones(len(ids)))


def test_token_classes_of_a_response_are_those_of_its_prefixes(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    texts = [tokenizer.decode([token]) for token in ids]
    names = [toy.CLASS_NAMES[number] for number in toy.token_classes(TRACE, texts)]
    assert names == [toy.token_class(TRACE, "".join(texts[:i])) for i in range(len(texts))]
    assert names.count("easy: inside a check") == len(" 53+4=57")


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
        ("--gate the-digit", "--gate not-the-digit"),
    ]:
        parts = [step(flags) for flags in (above, below)]
        assert sum(loss for loss, *_ in parts) == pytest.approx(whole, rel=1e-5)
        difference = sum(part for _, part, _ in parts) - gradient
        assert difference.norm() < 1e-5 * gradient.norm()


def test_a_gate_carries_no_gradient(step, monkeypatch):
    """A soft gate that depends on the student: the gradient is that of its value as a constant."""
    values = []

    def soft(student_logps, teacher_logps, tokens, args):
        values.append(losses.entropy(student_logps).clamp(max=1))
        return values[-1]

    monkeypatch.setitem(losses.GATES, "soft", soft)
    loss, gradient, _ = step("--gate soft")
    constants = iter([v.clone() for v in values])
    assert not any(v.requires_grad for v in values)
    monkeypatch.setitem(losses.GATES, "soft", lambda *inputs: next(constants))
    again, same, _ = step("--gate soft")
    assert again == loss and torch.equal(same, gradient) and gradient.norm() > 0


def test_several_gates_are_a_union_and_the_log_says_what_they_let_through(step):
    gate = losses.MEASURES.index("gate")
    found = {}
    for flags in ("redundant-checks", "agreement", "redundant-checks agreement"):
        rollouts = step(f"--gate {flags}")[2]
        found[flags] = torch.cat([r.measures[gate] for r in rollouts])
        kl = torch.cat([r.measures[0] for r in rollouts])
    union = torch.maximum(found["redundant-checks"], found["agreement"])
    assert torch.equal(found["redundant-checks agreement"], union)
    assert found["agreement"].sum() < union.sum() < len(union)
    # By hand: the loop over tokens.
    measures = torch.cat([r.measures for r in rollouts], 1)
    flat = [w for r in rollouts for w in r.weights]
    record = losses.gate_metrics(measures, torch.tensor(flat))
    pairs = list(zip(union.tolist(), kl.tolist(), flat, strict=True))
    mass = sum(w for g, _, w in pairs if g) / sum(flat)
    inside = [k for g, k, _ in pairs if g]
    outside = [k for g, k, _ in pairs if not g]
    assert record["gate_mass"] == pytest.approx(mass, rel=1e-5)
    assert record["reverse_kl_inside"] == pytest.approx(sum(inside) / len(inside), rel=1e-4)
    assert record["reverse_kl_outside"] == pytest.approx(sum(outside) / len(outside), rel=1e-4)
    whole = losses.gate_metrics(step("")[2][0].measures, torch.tensor(rollouts[0].weights))
    assert whole["gate_mass"] == 1 and whole["reverse_kl_outside"] is None


def test_the_control_teachers_log_probabilities_are_those_of_its_row(step, model):
    for micro_tokens in (200, 10**6):  # in any grouping, each with its own rollout
        _, _, rollouts = step(f"--gate contrast --micro-tokens {micro_tokens}")
        for r in rollouts:
            assert r.control_row == [r.prompt_ids, r.response_ids]
            expected = sampled_logps(model, [r.control_row])
            torch.testing.assert_close(r.control_logps, expected, rtol=1e-4, atol=1e-5)
    # A control that is the student itself never moves a token, the teacher does.
    assert torch.cat([r.measures[-1] for r in rollouts]).mean() < 0.2


# ------------------------------------------------------------------------------------------------
# Weights by outcome


def test_weights_by_outcome_are_factors_and_a_negative_one_pushes_away(step, monkeypatch):
    whole, gradient, rollouts = step("")
    monkeypatch.setitem(losses.WEIGHTS, "away", dict(correct=-1.0, truncated=-1.0))
    away, opposite, _ = step("--weights away")
    assert away == -whole and torch.equal(opposite, -gradient)
    monkeypatch.setitem(losses.WEIGHTS, "some", dict(truncated=0.0))
    part, _, rollouts = step("--weights some")
    expected = sum(
        r.measures[0].sum().item() / len(r.response_ids) for r in rollouts if r.outcome == "correct"
    )
    assert part == pytest.approx(expected / len(rollouts), rel=1e-4)  # all still count below


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--gate gap", "--gate gap: needs --gate-above or --gate-below"),
        ("--gate-above 1", "--gate-above, --gate-below: not read by --gate all"),
        ("--contrast none", "--contrast none: not read by --gate all"),
        ("--gate the-digit --data x.jsonl", "--gate the-digit: knows the tokens of the embedded"),
        ("--weights repel", "--weights repel: --filter correct keeps one outcome only"),
        ("--gate gap --gate-above -1", "--gate-above -1.0: must be 0 or more"),
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
# One more of each, without touching the loop


def trains(tmp_path, flags):
    out = str(tmp_path / "run")
    opsd.main(["--steps", "2", *SMALL, "--out", out, *flags.split()])
    assert all(s["loss_tokens"] > 0 and 0 < s["grad_norm"] for s in metrics(out)[1:-1])
    return metrics(out)[1]


def test_one_more_gate(tmp_path, monkeypatch):
    def doubt(student_logps, teacher_logps, tokens, args):
        return 1 - losses.sampled(teacher_logps, tokens).exp()

    monkeypatch.setitem(losses.GATES, "doubt", doubt)
    assert 0 < trains(tmp_path, "--filter all --gate doubt")["gate_mass"] < 0.5


def test_one_more_divergence(tmp_path, monkeypatch):
    def tv(student_logps, teacher_logps, tokens, args):
        return (student_logps.exp() - teacher_logps.exp()).abs().sum(-1) / 2

    monkeypatch.setitem(losses.DIVERGENCES, "tv", tv)
    assert 0 < trains(tmp_path, "--filter all --divergence tv")["loss"] < 1


def test_one_more_context(tmp_path, monkeypatch):
    def hint(rollouts, write, args):
        return [f"The last digit is {r.problem.answer[-1]}." for r in rollouts]

    monkeypatch.setitem(data.CONTEXTS, "hint", hint)
    trains(tmp_path, "--filter all --context hint")


def test_one_more_filter(tmp_path, monkeypatch):
    monkeypatch.setitem(opsd.FILTERS, "short", lambda r, args: len(r.response_ids) < 80)
    assert trains(tmp_path, "--filter short")["length_kept"] < 80


@pytest.mark.parametrize(
    "flags",
    [
        "--gate contrast --contrast other",
        "--gate redundant-checks agreement --filter all",
        "--context wrong --filter all --weights repel",
        "--context other --filter all",
        "--context part --part 0.3 --filter all --teacher-thinking off",
    ],
)
def test_ablations_train(flags, tmp_path):
    trains(tmp_path, flags)
    assert weights(tmp_path / "run").isfinite().all()
