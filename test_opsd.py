"""The method and the scripts, on the embedded model. tests/ has the rest; `pytest` runs both."""

import math
import os

import numpy as np
import pytest
import torch

import model as modelling
import opsd
import rlvr
import rollout
import run
import sft
from data import Problem, embedded_problems, render_prompt
from model import micro_batches, response_hidden, sampled_logps, scored_ids
from rollout import Rollout, grade_rollouts
from run import HERE
from tests.helpers import (
    SMALL,
    TINY,
    apart,
    flat_gradient,
    loss_and_gradient,
    metrics,
    read_lines,
    read_rollouts,
    some_rollouts,
    weights,
    with_teacher_rows,
    write,
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
    """Row by row without padding, from the models' own logits, with the offsets written out:
    position len(prompt) + t - 1 predicts token t.
    """
    monkeypatch.setitem(modelling.CHUNK, "cpu", 13 * model.config.vocab_size)
    rollouts, teacher = read_rollouts(tokenizer), opsd.frozen_copy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)  # a teacher that differs in weights too
    loss, gradient = loss_and_gradient(model, teacher, rollouts, "--micro-tokens 200")
    model.zero_grad()
    per_response = []
    for r in rollouts:
        prompt = r.teacher_row[0]
        s = model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0].log_softmax(-1)
        t = teacher(torch.tensor([prompt + r.response_ids])).logits[0].log_softmax(-1).detach()
        tokens = []
        for i in range(len(r.response_ids)):
            a, b = s[len(r.prompt_ids) + i - 1], t[len(prompt) + i - 1]
            tokens.append((a.exp() * (a - b)).sum())
        per_response.append(torch.stack(tokens))
    dense = torch.stack([row.mean() for row in per_response]).mean()
    dense.backward()
    assert loss == pytest.approx(dense.item(), rel=1e-4)
    assert apart(gradient, flat_gradient(model)) < 1e-5


def test_reinjection_is_read_but_not_scored_and_moves_nothing(model, tokenizer):
    rollouts = read_rollouts(tokenizer)
    prompts = [r.teacher_row[0] for r in rollouts]
    recall = tokenizer("recall 42", add_special_tokens=False).input_ids
    args = opsd.parse_args(["--reinject", "10"])

    def rows_with(ids, every):
        pairs = zip(prompts, rollouts, strict=True)
        return [opsd.teacher_row(p, r.response_ids, ids, every) for p, r in pairs]

    plain, empty, again = rows_with((), 0), rows_with((), 10), rows_with(recall, 10)
    ids = scored_ids(model, plain).tolist()  # same tokens, same order
    assert scored_ids(model, again).tolist() == ids
    assert scored_ids(model, empty).tolist() == ids
    assert sum(part == recall for part in again[0]) == (len(rollouts[0].response_ids) - 1) // 10
    # Token 9 stands before the first insertion: nothing changes. Token 10 stands behind it:
    # predicted from the insertion's last token.
    hidden = response_hidden(model, again)
    row = prompts[0] + rollouts[0].response_ids[:10] + recall
    single = model.base_model(torch.tensor([row])).last_hidden_state[0]
    torch.testing.assert_close(hidden[9], response_hidden(model, plain)[9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden[10], single[-1], rtol=1e-4, atol=1e-5)
    teacher, losses = opsd.frozen_copy(model), []
    for rows in (plain, empty, again):
        for r, row in zip(rollouts, rows, strict=True):
            r.teacher_row = row
        losses.append(opsd.accumulate_gradients(model, teacher, rollouts, args))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)
    # The rows that opsd.py makes: every insertion holds the context; an empty one inserts nothing.
    for hint in ("the hint<|im_end|>", ""):
        opsd.add_teacher_rows(rollouts, [hint] * len(rollouts), tokenizer, args, None)
        row = rollouts[0].teacher_row
        assert row[0] == render_prompt(tokenizer, rollouts[0].problem, hint)
        assert "the hint" in tokenizer.decode(row[2]) if hint else row[2] == []
        assert tokenizer.eos_token_id not in row[2]  # it stays text


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


def test_teachers_move_as_named(model):
    args = opsd.parse_args(["--teacher", "ema", "--ema", "0.9"])
    args.refresh = 2
    for name, weight in [("frozen", 0.0), ("ema", 0.1), ("current", 1.0), ("every", 0.0)]:
        teacher, student = opsd.frozen_copy(model), opsd.frozen_copy(model)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1.0)
        opsd.TEACHERS[name](teacher, student, dict(updates=1), args)
        for t, first in zip(teacher.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(t - first, torch.full_like(t, weight), rtol=1e-4, atol=1e-5)
        if name == "every":
            opsd.TEACHERS[name](teacher, student, dict(updates=2), args)
            assert all(map(torch.equal, teacher.parameters(), student.parameters()))


def test_kl_by_position_sums_tokens_into_bins():
    rollouts = []
    for outcome, kl in [
        ("correct", [1, 2, 3, 4, 5]),
        ("incorrect", [10, 20, 30]),
        ("correct", [100, 200]),
    ]:
        r = Rollout(None, [], [0] * len(kl), True, outcome=outcome)
        r.measures = dict(reverse_kl=torch.tensor(kl))
        rollouts.append(r)
    bins = rollout.kl_by_position(rollouts, 2)
    assert bins["correct"] == dict(kl=[303, 7, 5], tokens=[4, 2, 1], rollouts=[2, 1, 1])
    assert bins["incorrect"] == dict(kl=[30, 30], tokens=[2, 1], rollouts=[1, 1])
    assert bins["truncated"]["kl"] == []


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
# GRPO and SFT


def test_group_advantages_are_centred_scaled_and_skip_equal_groups():
    a = rlvr.group_advantages([1, 0, 0, 0] + [1, 1, 1, 1] + [0, 1, 1, 0], 4)
    assert a[4:8] == [None] * 4
    assert a[:4] == pytest.approx([0.75 / 0.1875**0.5] + [-0.25 / 0.1875**0.5] * 3)
    assert a[8:] == pytest.approx([-1, 1, 1, -1])


def test_the_kl_to_the_start_is_estimated_without_bias_by_a_term_that_is_never_negative():
    logps = torch.randn(3, 7).log_softmax(-1)
    ones, ids = torch.ones(3), torch.tensor([0, 3, 6])
    chosen = logps.gather(-1, ids[:, None])[:, 0]
    tokens = rlvr.Tokens(ids, 0 * ones, ones, chosen + torch.tensor([0.1, 0.0, -0.2]))
    losses, _ = rlvr.token_loss(logps, None, tokens, rlvr.parse_args(["--kl", "2"]))
    expected = [2 * (math.exp(d) - d - 1) for d in (0.1, 0.0, -0.2)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_on_policy_grpo_gradient_is_the_policy_gradient(model, tokenizer, monkeypatch):
    monkeypatch.setitem(modelling.CHUNK, "cpu", 12 * model.config.vocab_size)
    rollouts = some_rollouts(tokenizer, 3)
    for r, advantage in zip(rollouts, (-1.0, 0.3, 0.8), strict=True):
        r.advantage = advantage
    for r in rollouts:
        r.weight = 1 / 100
    loss, measures = rlvr.rlvr_loss(model, None, rollouts, rlvr.parse_args([]))
    gradient = flat_gradient(model)
    model.zero_grad()
    expected, parts = 0.0, []
    for r in rollouts:  # dense, row by row, without padding or chunks
        logits = model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
        logps = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        parts.append(logps.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0])
        expected = expected - r.advantage * parts[-1].sum() / 100
    expected.backward()
    assert apart(gradient, flat_gradient(model)) < 1e-5
    ratio_1 = -sum(r.advantage * len(r.response_ids) for r in rollouts) / 100
    assert loss == pytest.approx(ratio_1, abs=1e-6)
    for logps in (sampled_logps(model, [r.row for r in rollouts]), measures["logp"]):
        torch.testing.assert_close(logps, torch.cat(parts).detach(), rtol=1e-4, atol=1e-5)


def test_reward_and_length_penalty():
    r = Rollout(None, [], [0] * 40, True, outcome="correct")
    assert rlvr.reward(r, 0.0, 160) == 1 and rlvr.reward(r, 0.4, 160) == pytest.approx(0.9)
    r.outcome = "truncated"
    assert rlvr.reward(r, 0.4, 160) == 0


def test_sft_loss_is_the_cross_entropy_of_the_response_alone(model, tokenizer):
    problem = embedded_problems(1, 0)[0]
    prompt, response = sft.embedded_row(tokenizer, problem, np.random.default_rng(0))
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    expected = -sum(logps[len(prompt) + i - 1, t].item() for i, t in enumerate(response))
    assert sft.sft_loss(model, [(prompt, response)], 1) == pytest.approx(expected, rel=1e-4)
    twice = [(prompt, response)] * 2
    assert sft.sft_loss(model, twice, 1 / 4) == pytest.approx(expected / 2, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# The scripts, end to end


@pytest.mark.parametrize(
    "script, flags, first",
    [
        (opsd, "--filter correct --resample 1 --context other --teacher-thinking off", "rlvr"),
        (opsd, "--filter all --divergence jsd --teacher ema --context answer", "rlvr"),
        (opsd, "--filter not-correct --thinking off --divergence split", "rlvr"),
        (opsd, "--filter all --context wrong --gate agreement", "rlvr"),
        (opsd, "--filter all --context resolve --context-tokens 60", "rlvr"),
        (rlvr, "--group 8 --kl 0.01", "sft"),
    ],
)
def test_script_trains(script, flags, first, tmp_path, capsys):
    out = str(tmp_path / "run")
    script.main(["--steps", "2", *flags.split(), *SMALL, "--out", out])
    head, *steps, last = metrics(out)
    assert head["args"]["steps"] == 2 and len(steps) == 2
    assert "evaluation" in last and last["step"] == 2
    for step in steps:
        assert all(math.isfinite(value) for value in step.values() if value is not None)
        assert step["loss_tokens"] > 0 and step["grad_norm"] > 0
        outcomes = step["correct"] + step["incorrect"] + step["truncated"]
        assert outcomes == step["sampled"] >= step["kept"] > 0
    moved = (weights(out) - weights(os.path.join(HERE, "tiny", first))).abs().max()
    assert 0 < moved < 0.1
    assert "change with 95% interval" in capsys.readouterr().out
    assert any("outcome" in line for line in read_lines(os.path.join(out, "samples.jsonl")))


def test_sft_trains_the_embedded_model_and_a_given_one(tmp_path, refused):
    sft.main(["--steps", "2", "--batch", "4", "--out", str(tmp_path / "a")])
    first = [next(sft.build_tiny(seed)[0].parameters()) for seed in (0, 1)]
    assert not torch.equal(*first)
    steps = metrics(tmp_path / "a")[1:]
    assert [s["loss_tokens"] > 0 and math.isfinite(s["loss"]) for s in steps] == [True, True]
    rows = [
        '{"question": "1+1?", "answer": "2", "solution": "1+1=2"}',
        '{"question": "2+1?", "answer": "3", "solution": "2+1=3"}',
    ]
    path = write(tmp_path / "d.jsonl", *rows, '{"question": "3+1?", "answer": "4"}')
    argv = ["--model", TINY, "--data", path, "--steps", "1", "--out", str(tmp_path / "b")]
    error = refused(sft.main, argv)
    assert "sft.py needs a solution in every row" in error
    write(tmp_path / "d.jsonl", *rows)
    flags = "--steps 3 --batch 2 --lr 1e-3 --warmup 0".split()
    sft.main(["--model", TINY, "--data", path, *flags, "--out", str(tmp_path / "b")])
    losses = [s["loss"] for s in metrics(tmp_path / "b")[1:]]
    assert losses[-1] < losses[0] and (weights(tmp_path / "b") - weights(TINY)).abs().max() > 0


def test_sft_does_not_open_a_think_block_twice(tokenizer, monkeypatch):
    problem = Problem("1+1?", "2", "1+1=2")
    prompt, response = sft.real_row(tokenizer, problem, 2)
    assert tokenizer.decode(response[:-1]) == "<think>\n1+1=2\n</think>\n\n\\boxed{2}"
    opened = prompt + tokenizer("<think>\n").input_ids
    monkeypatch.setattr(sft, "render_prompt", lambda *args: opened)
    _, response = sft.real_row(tokenizer, problem, 2)
    assert tokenizer.decode(response[:-1]) == "1+1=2\n</think>\n\n\\boxed{2}"


def test_sft_without_one_update_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "optimizer_step", lambda *args: (math.nan, False))
    with pytest.raises(SystemExit):
        sft.main("--batch 2 --threads 1 --steps 2 --out".split() + [str(tmp_path / "run")])
    assert "no step was taken" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run" / "model.safetensors")


def test_a_filter_that_keeps_nothing_is_logged_and_then_ends_the_run(tmp_path, monkeypatch, capsys):
    counts = iter([0, 6, 0, 0])
    monkeypatch.setitem(opsd.FILTERS, "correct", lambda rollouts, args: rollouts[: next(counts)])
    monkeypatch.setattr(run, "GIVE_UP", 2)
    with pytest.raises(SystemExit) as stop:
        opsd.main(["--steps", "5", "--out", str(tmp_path / "run"), *SMALL])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--filter correct kept nothing" in error
    assert "2 steps in a row" in error and error.count("\n") == 1
    assert [step["kept"] for step in metrics(tmp_path / "run")[1:]] == [0, 6, 0, 0]
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in samples if "teacher_prompt" in row] == [2]
    assert not os.path.exists(tmp_path / "run" / "model.safetensors")
