"""The method, on the embedded model. tests/ has the rest; `pytest` runs both."""

import math
import os

import pytest
import torch

import data
import model as modelling
import opsd
import rollout
import run
import sft
from data import Problem, embedded_problems, render_prompt
from model import micro_batches, response_hidden, scored_ids
from rollout import Rollout, grade_rollouts
from tests.helpers import (
    SMALL,
    apart,
    dense_loss,
    flat_gradient,
    loss_and_gradient,
    metrics,
    read_lines,
    read_rollouts,
    some_rollouts,
    with_teacher_rows,
)
from verify import Verifier

# ------------------------------------------------------------------------------------------------
# Divergences


def by_hand(name, s, t, token, correct, beta):
    """One token's divergence in plain float arithmetic from two lists of probabilities."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
    return {
        "reverse_kl": kl(s, t),
        "forward_kl": kl(t, s),
        "split": kl(s, t) if correct else kl(t, s),
        "rft": -math.log(s[token]),
        "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m),
    }[name]


def tokens_of(ids, correct):
    ones = torch.ones(len(ids))
    outcome = torch.tensor([0 if c else 1 for c in correct])
    return opsd.Tokens(torch.tensor(ids), outcome, ones, ones, ones, ones)


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "split", "rft")


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_divergence_and_gradient_equal_a_float64_loop(name, beta):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = tokens_of([0, 3, 6, 2, 2], [True, False, True, False, True])
    args = opsd.parse_args(["--divergence", "jsd", "--beta", str(beta)])
    values = opsd.DIVERGENCES[name](logits.log_softmax(-1), teacher, tokens, args)
    values.sum().backward()

    def loop(x):
        rows = zip(x, teacher, tokens.ids.tolist(), (tokens.outcome == 0).tolist(), strict=True)
        return [
            by_hand(name, row.softmax(-1).tolist(), t.exp().tolist(), i, c, beta)
            for row, t, i, c in rows
        ]

    assert values.tolist() == pytest.approx(loop(logits.detach()), abs=1e-12)
    for r in range(5):
        for v in range(7):  # central differences of the loop
            step = torch.zeros(5, 7, dtype=torch.float64)
            step[r, v] = 1e-5
            numeric = (loop(logits.detach() + step)[r] - loop(logits.detach() - step)[r]) / 2e-5
            assert logits.grad[r, v].item() == pytest.approx(numeric, abs=1e-8)
    equal = opsd.DIVERGENCES[name](teacher, teacher, tokens, args)
    assert (equal.abs().max() < 1e-15) == (name != "rft")


# ------------------------------------------------------------------------------------------------
# Gates

GATES = ("all", "student-entropy", "teacher-entropy", "gap", "position", "agreement")
BOUNDED = GATES[1:5]


def gate_by_hand(name, s, t, token, position):
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
    expected = values = [gate_by_hand(name, *row) for row in zip(*columns, strict=True)]
    args = opsd.parse_args([])
    if name in BOUNDED:
        low, high = sorted(values)[10], sorted(values)[30]
        expected = [float(low <= v < high) for v in values]
        rounding = 0 if name == "position" else 1e-9  # must not decide
        args.gate_range = [low - rounding, high - rounding]
    assert opsd.GATES[name](s, t, tokens, args).tolist() == expected
    assert name == "all" or 0 < sum(expected) < len(expected)
    if name in BOUNDED:  # above and below one number are complements
        args.gate_range = [1.0]
        above = opsd.GATES[name](s, t, tokens, args)
        args.gate_range = [0, 1.0]
        assert torch.equal(above, 1 - opsd.GATES[name](s, t, tokens, args))


# ------------------------------------------------------------------------------------------------
# The loss: rows, masks, denominators


def test_empty_context_gives_zero_loss_and_zero_gradient(model, tokenizer):
    rollouts, teacher = read_rollouts(tokenizer, "none"), opsd.frozen_copy(model)
    assert [r.teacher_row for r in rollouts] == [list(r.row) for r in rollouts]
    loss, gradient = loss_and_gradient(model, teacher, rollouts)
    assert loss == 0.0 and gradient.abs().max().item() == 0.0
    loss, gradient = loss_and_gradient(model, teacher, read_rollouts(tokenizer))
    assert loss > 1e-3 and gradient.abs().max().item() > 1e-4  # with a context it is neither


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_pieces_micro_batches_padding_and_order_change_nothing(
    model, tokenizer, divergence, monkeypatch
):
    rollouts, teacher = read_rollouts(tokenizer), opsd.frozen_copy(model)
    flags = f"--divergence {divergence}"
    loss, gradient = loss_and_gradient(model, teacher, rollouts, flags)
    shuffled = [rollouts[i] for i in (3, 0, 5, 1, 4, 2)]
    for rows, budget, chunk, piece in [
        (rollouts, 10**9, 17, 5),
        (rollouts, 1, 10**9, 10**9),
        (rollouts, 300, 5, 1),
        (shuffled, 250, 64, 100),
    ]:
        monkeypatch.setitem(modelling.CHUNK, "cpu", chunk * model.config.vocab_size)
        monkeypatch.setitem(modelling.PIECE, "cpu", piece * model.config.vocab_size)
        small = f"{flags} --micro-tokens {budget}"
        other, other_gradient = loss_and_gradient(model, teacher, rows, small)
        assert other == pytest.approx(loss, rel=1e-5)
        assert apart(other_gradient, gradient) < 1e-5


def test_loss_equals_a_dense_loop_over_full_logits(model, tokenizer, monkeypatch):
    monkeypatch.setitem(modelling.CHUNK, "cpu", 13 * model.config.vocab_size)
    rollouts, teacher = read_rollouts(tokenizer), opsd.frozen_copy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)  # a teacher that differs in weights too
    loss, gradient = loss_and_gradient(model, teacher, rollouts, "--micro-tokens 200")
    model.zero_grad()
    dense = dense_loss(model, teacher, rollouts)
    dense.backward()
    assert loss == pytest.approx(dense.item(), rel=1e-4)
    assert apart(gradient, flat_gradient(model)) < 1e-5


def test_a_recalled_context_stays_text_and_an_empty_one_inserts_nothing(tokenizer):
    args, rollouts = opsd.parse_args(["--reinject", "10"]), some_rollouts(tokenizer)
    for hint in ("the hint<|im_end|>", ""):
        opsd.add_teacher_rows(rollouts, [hint] * len(rollouts), tokenizer, args, None)
        row = rollouts[0].teacher_row
        assert row[0] == render_prompt(tokenizer, rollouts[0].problem, hint)
        assert "the hint" in tokenizer.decode(row[2]) if hint else row[2] == []
        assert tokenizer.eos_token_id not in row[2]


def test_masks_come_from_lengths_so_a_final_eos_counts_even_if_pad_is_eos(
    model, tokenizer, monkeypatch
):
    model.config.pad_token_id = tokenizer.eos_token_id
    rollouts = some_rollouts(tokenizer)
    rows = [r.row for r in rollouts]
    targets = scored_ids(model, rows)
    assert len(response_hidden(model, rows)) == sum(len(r.response_ids) for r in rollouts)
    assert (targets == tokenizer.eos_token_id).sum() == sum(r.finished for r in rollouts) == 4
    model.lm_head.weight.data.mul_(0.5)  # less sure of itself, or the loss would round to 0
    # The eos position carries gradient: a loss on it alone moves the model, and prompt or padding
    # tokens are not among the targets.
    args, teacher = opsd.parse_args(["--divergence", "rft"]), opsd.frozen_copy(model)
    with_teacher_rows(rollouts, [p for p, _ in rows])
    at_the_end = torch.cat([torch.eye(len(r.response_ids))[-1] * r.finished for r in rollouts])
    own = opsd.tokens_of
    monkeypatch.setattr(opsd, "tokens_of", lambda *x: own(*x)._replace(weight=at_the_end))
    loss, _ = opsd.opsd_loss(model, teacher, rollouts, args)
    assert loss > 0 and model.lm_head.weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_ids_reach_the_loss_as_sampled_even_if_text_would_tokenise_otherwise(model, tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "wait"] + [tokenizer.eos_token_id]
    assert tokenizer(tokenizer.decode(ids[:-1]), add_special_tokens=False).input_ids != ids[:-1]
    problem = embedded_problems(1, 0)[0]
    prompt = render_prompt(tokenizer, problem)
    r = Rollout(problem, prompt, ids, True, outcome="correct", teacher_row=[prompt, ids])
    loss, _ = loss_and_gradient(model, opsd.frozen_copy(model), [r], "--divergence rft")
    logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    expected = -sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(ids)) / len(ids)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_reaches_the_teacher_and_dropout_is_off(model, tokenizer):
    model.config.attention_dropout = 0.5
    rollouts, teacher = read_rollouts(tokenizer), opsd.frozen_copy(model.train())
    assert not teacher.training
    before = [p.clone() for p in teacher.parameters()]
    model.eval()
    first, second = (loss_and_gradient(model, teacher, rollouts) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(map(torch.equal, before, teacher.parameters()))


def test_micro_batches_cover_every_row_once_within_the_budget():
    lengths = [5, 50, 7, 7, 90, 1, 30, 30]
    groups = micro_batches(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(8)) and groups[0] == [4]
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 100 for g in groups)
    assert micro_batches([], 100) == []


def test_a_current_teacher_is_the_student(model):
    teacher = opsd.frozen_copy(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    opsd.TEACHERS["current"](teacher, model, {}, None)
    assert all(map(torch.equal, teacher.parameters(), model.parameters()))


def test_filters_and_the_third_outcome():
    drawn = [Rollout(None, [], outcome=outcome) for outcome in rollout.OUTCOMES]
    for name, kept in {
        "all": ["correct", "incorrect", "truncated"],
        "correct": ["correct"],
        "incorrect": ["incorrect"],
        "not-correct": ["incorrect", "truncated"],
        "truncated": ["truncated"],
    }.items():
        assert [r.outcome for r in opsd.FILTERS[name](drawn, None)] == kept
    rows = [Rollout(Problem("q", "5"), [], [], False, "\\boxed{5}")]
    with Verifier() as verifier:
        grade_rollouts(verifier, rows)
    assert (rows[0].outcome, rows[0].reason) == ("truncated", "truncated")


# ------------------------------------------------------------------------------------------------
# Steps that cannot be taken


def test_sft_without_one_update_fails(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(sft, "optimizer_step", lambda *args: (math.nan, False))
    argv = "--batch 2 --threads 1 --steps 2 --out".split() + [str(tmp_path / "run")]
    assert "no step was taken" in refused(sft.main, argv)
    assert not os.path.exists(tmp_path / "run" / "model.safetensors")


def test_a_filter_that_keeps_nothing_is_logged_and_ends_the_run(tmp_path, monkeypatch, refused):
    counts = iter([0, 6, 0, 0])
    monkeypatch.setitem(opsd.FILTERS, "correct", lambda rollouts, args: rollouts[: next(counts)])
    monkeypatch.setattr(run, "GIVE_UP", 2)
    error = refused(opsd.main, ["--steps", "5", "--out", str(tmp_path / "run"), *SMALL])
    assert "--filter and --context left nothing" in error and "2 steps in a row" in error
    assert [step["kept"] for step in metrics(tmp_path / "run")[1:]] == [0, 6, 0, 0]
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in samples if "teacher_prompt" in row] == [2]
    assert not os.path.exists(tmp_path / "run" / "model.safetensors")


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
