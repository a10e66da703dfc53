"""Tests of the method and of the scripts, on the embedded model. The verifier's are in test_verify.py. `pytest` runs both."""

import gc
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import transformers

import common
import data
import eval as evaluation
import kinds
import memory
import opsd
import ranks
import rlvr
import rollout
import sft
from common import HERE, load_model, micro_batches, response_hidden, response_targets
from data import CONTEXTS, Problem, embedded_problems, render_prompt
from rollout import Rollout, cut, make_sampler, make_writer
from verify import Verifier

TINY = os.path.join(HERE, "tiny", "rlvr")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load_model(TINY, CPU)


@pytest.fixture
def model(tiny):
    """A student that a test may change."""
    return opsd.frozen_copy(tiny[0]).requires_grad_(True)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


def some_rollouts(tokenizer, count=6, seed=0):
    """Reference responses of different lengths: finished ones, and truncated ones in between."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for i, problem in enumerate(embedded_problems(count, seed)):
        text = data.reference_trace(problem, rng) + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False).input_ids
        finished = i % 3 < 2
        rollouts.append(
            Rollout(
                problem,
                render_prompt(tokenizer, problem),
                ids if finished else ids[:-7],
                finished,
                outcome="correct" if finished else "truncated",
            )
        )
    return rollouts


def loss_and_gradient(
    model,
    teacher,
    rollouts,
    prompts,
    divergence="reverse_kl",
    mean="response",
    budget=10**9,
    chunk=10**9,
    teacher_budget=0,
):
    """The step's loss as opsd.py adds it up, and the flat gradient."""
    args = opsd.parse_args(
        [
            "--divergence",
            divergence,
            "--mean",
            mean,
            "--micro-tokens",
            str(budget),
            "--chunk",
            str(chunk * model.config.vocab_size / 1e6),
            "--teacher-tokens",
            str(teacher_budget),
        ]
    )
    model.zero_grad()
    rows = [opsd.teacher_row(p, r.response_ids) for p, r in zip(prompts, rollouts)]
    loss, measures = opsd.accumulate_gradients(model, teacher, rollouts, rows, args)
    assert [row.shape for row in measures] == [(5, len(r.response_ids)) for r in rollouts]
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def apart(value, other):
    """Norm of the difference over the norm of `other`. Bounds on single elements would measure the rounding of the smallest ones, which differs between machines."""
    return ((value - other).norm() / other.norm()).item()


def teacher_prompts(tokenizer, rollouts, context="solution"):
    return [
        render_prompt(tokenizer, r.problem, c)
        for r, c in zip(rollouts, CONTEXTS[context](rollouts, None))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Divergences


def by_hand(name, s, t, token, correct, beta):
    """One token's divergence in plain float arithmetic from two lists of probabilities."""
    reverse = sum(a * math.log(a / b) for a, b in zip(s, t))
    forward = sum(b * math.log(b / a) for a, b in zip(s, t))
    m = [beta * b + (1 - beta) * a for a, b in zip(s, t)]
    return {
        "reverse_kl": reverse,
        "forward_kl": forward,
        "split": reverse if correct else forward,
        "rft": -math.log(s[token]),
        "jsd": beta * sum(b * math.log(b / c) for b, c in zip(t, m))
        + (1 - beta) * sum(a * math.log(a / c) for a, c in zip(s, m)),
    }[name]


@pytest.mark.parametrize("name", list(opsd.DIVERGENCES))
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_divergence_and_gradient_equal_a_float64_loop(name, beta):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    ids, correct = torch.tensor([0, 3, 6, 2, 2]), torch.tensor([True, False, True, False, True])
    values = opsd.DIVERGENCES[name](logits.log_softmax(-1), teacher, ids, correct, beta)
    values.sum().backward()

    def loop(x):
        return [
            by_hand(name, row.softmax(-1).tolist(), t.exp().tolist(), int(i), bool(c), beta)
            for row, t, i, c in zip(x, teacher, ids, correct)
        ]

    assert values.tolist() == pytest.approx(loop(logits.detach()), abs=1e-12)
    for r in range(5):
        for v in range(7):  # central differences of the loop
            step = torch.zeros(5, 7, dtype=torch.float64)
            step[r, v] = 1e-5
            numeric = (loop(logits.detach() + step)[r] - loop(logits.detach() - step)[r]) / 2e-5
            assert logits.grad[r, v].item() == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "split"])
def test_divergence_is_zero_only_at_equality(name):
    s, t = torch.randn(2, 4, 9).log_softmax(-1)
    ids, correct = torch.zeros(4, dtype=torch.long), torch.tensor([True, False, True, False])
    assert (opsd.DIVERGENCES[name](s, t, ids, correct, 0.5) > 1e-3).all()
    assert opsd.DIVERGENCES[name](s, s, ids, correct, 0.5).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The loss: rows, masks, denominators


def test_empty_context_gives_zero_loss_and_zero_gradient(model, tokenizer):
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts, "none")
    assert prompts == [r.prompt_ids for r in rollouts]
    loss, gradient = loss_and_gradient(model, opsd.frozen_copy(model), rollouts, prompts)
    assert loss == 0.0 and gradient.abs().max().item() == 0.0
    loss, gradient = loss_and_gradient(
        model, opsd.frozen_copy(model), rollouts, teacher_prompts(tokenizer, rollouts)
    )
    assert loss > 1e-3 and gradient.abs().max().item() > 1e-4  # with a context it is neither


@pytest.mark.parametrize("divergence", list(opsd.DIVERGENCES))
@pytest.mark.parametrize("mean", ["response", "token"])
def test_chunks_pieces_micro_batches_padding_and_order_change_nothing(
    model, tokenizer, divergence, mean, monkeypatch
):
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts)
    teacher = opsd.frozen_copy(model)
    loss, gradient = loss_and_gradient(model, teacher, rollouts, prompts, divergence, mean)
    shuffled = [rollouts[i] for i in (3, 0, 5, 1, 4, 2)], [prompts[i] for i in (3, 0, 5, 1, 4, 2)]
    cases = [
        ((rollouts, prompts), 10**9, 17, 1, 5),
        ((rollouts, prompts), 1, 10**9, 10**9, 10**9),
        ((rollouts, prompts), 300, 5, 0, 1),
        (shuffled, 250, 64, 500, 100),
    ]
    for rows, budget, chunk, teacher_budget, piece in cases:
        monkeypatch.setattr(opsd, "PIECE", piece * model.config.vocab_size / 1e6)
        other, other_gradient = loss_and_gradient(
            model, teacher, *rows, divergence, mean, budget, chunk, teacher_budget
        )
        assert other == pytest.approx(loss, rel=1e-5)
        assert apart(other_gradient, gradient) < 1e-5


@pytest.mark.parametrize("mean", ["response", "token"])
def test_loss_equals_a_dense_loop_over_full_logits(model, tokenizer, mean):
    """Row by row without padding, from the models' own logits, with the offsets written out: position len(prompt) + t - 1 predicts token t."""
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts)
    teacher = opsd.frozen_copy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)  # a teacher that differs in weights too
    loss, gradient = loss_and_gradient(
        model, teacher, rollouts, prompts, mean=mean, budget=200, chunk=13
    )
    model.zero_grad()
    per_response = []
    for r, prompt in zip(rollouts, prompts):
        s = model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0].log_softmax(-1)
        t = teacher(torch.tensor([prompt + r.response_ids])).logits[0].log_softmax(-1).detach()
        tokens = []
        for i in range(len(r.response_ids)):
            a, b = s[len(r.prompt_ids) + i - 1], t[len(prompt) + i - 1]
            tokens.append((a.exp() * (a - b)).sum())
        per_response.append(torch.stack(tokens))
    dense = (
        torch.cat(per_response).mean()
        if mean == "token"
        else torch.stack([row.mean() for row in per_response]).mean()
    )
    dense.backward()
    assert loss == pytest.approx(dense.item(), rel=1e-4)
    assert apart(gradient, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5


def test_tenth_response_token_is_the_same_id_at_the_right_offset(model, tokenizer):
    """The hidden state that response_hidden gives for response token 10 is the one at len(prompt) + 9 - 1 of the unpadded row."""
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts)
    assert all(len(p) > len(r.prompt_ids) for p, r in zip(prompts, rollouts))
    for row_prompts in ([r.prompt_ids for r in rollouts], prompts):
        rows = [(p, r.response_ids) for p, r in zip(row_prompts, rollouts)]
        hidden, targets, start = response_hidden(model, rows), response_targets(model, rows), 0
        for prompt, response in rows:
            single = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
            torch.testing.assert_close(
                hidden[start + 9], single[len(prompt) + 9 - 1], rtol=1e-4, atol=1e-5
            )
            assert targets[start + 9] == response[9]
            start += len(response)
        assert start == len(hidden) == len(targets)


def test_reinjection_is_read_but_not_scored_and_moves_nothing(model, tokenizer):
    rollouts = some_rollouts(tokenizer)
    prompts = teacher_prompts(tokenizer, rollouts)
    recall, args = (
        tokenizer("recall 42", add_special_tokens=False).input_ids,
        opsd.parse_args(["--reinject", "10"]),
    )
    plain, empty, again = (
        [opsd.teacher_row(p, r.response_ids, ids, every) for p, r in zip(prompts, rollouts)]
        for ids, every in [((), 0), ((), 10), (recall, 10)]
    )
    ids = response_targets(model, plain).tolist()
    assert (
        response_targets(model, again).tolist() == response_targets(model, empty).tolist() == ids
    )  # same tokens, same order
    assert sum(piece == recall for piece in again[0]) == (len(rollouts[0].response_ids) - 1) // 10
    # token 9 stands before the first insertion: nothing changes. Token 10 stands behind it: predicted from the insertion's last token
    hidden, single = (
        response_hidden(model, again),
        model.base_model(
            torch.tensor([prompts[0] + rollouts[0].response_ids[:10] + recall])
        ).last_hidden_state[0],
    )
    torch.testing.assert_close(hidden[9], response_hidden(model, plain)[9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden[10], single[-1], rtol=1e-4, atol=1e-5)
    teacher = opsd.frozen_copy(model)
    loss = [
        opsd.accumulate_gradients(model, teacher, rollouts, rows, args)[0]
        for rows in (plain, empty, again)
    ]
    assert loss[0] == pytest.approx(loss[1], rel=1e-6) and loss[2] != pytest.approx(
        loss[0], rel=1e-2
    )
    # the rows that opsd.py makes: every insertion holds the context, and with an empty context there is nothing to insert
    _, rows, _ = opsd.teacher_rows(tokenizer, rollouts, ["the hint"] * len(rollouts), args, None)
    assert "the hint" in tokenizer.decode(rows[0][2]) and rows[0][0] == render_prompt(
        tokenizer, rollouts[0].problem, "the hint"
    )
    assert not opsd.teacher_rows(tokenizer, rollouts, [""] * len(rollouts), args, None)[1][0][2]


def test_masks_come_from_lengths_so_a_final_eos_counts_even_if_pad_is_eos(model, tokenizer):
    model.config.pad_token_id = tokenizer.eos_token_id
    rollouts = some_rollouts(tokenizer)
    rows = [(r.prompt_ids, r.response_ids) for r in rollouts]
    targets = response_targets(model, rows)
    assert len(response_hidden(model, rows)) == sum(len(r.response_ids) for r in rollouts)
    assert (targets == tokenizer.eos_token_id).sum() == sum(r.finished for r in rollouts) == 4
    model.lm_head.weight.data.mul_(0.5)  # less sure of itself, or the loss would round to 0
    # the eos position carries gradient: a loss on it alone moves the model, and prompt or padding tokens are not among the targets
    weights = [[0.0] * (len(r.response_ids) - 1) + [float(r.finished)] for r in rollouts]
    loss, _ = opsd.opsd_loss(
        model,
        opsd.frozen_copy(model),
        rollouts,
        response_hidden(model, rows).detach(),
        weights,
        "rft",
    )
    assert loss > 0 and model.lm_head.weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_ids_reach_the_loss_as_sampled_even_if_text_would_tokenise_otherwise(model, tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "wait"] + [tokenizer.eos_token_id]
    assert tokenizer(tokenizer.decode(ids[:-1]), add_special_tokens=False).input_ids != ids[:-1]
    problem = embedded_problems(1, 0)[0]
    rollout = Rollout(problem, render_prompt(tokenizer, problem), ids, True, outcome="correct")
    teacher_hidden = response_hidden(model, [(rollout.prompt_ids, ids)]).detach()
    loss, _ = opsd.opsd_loss(
        model,
        opsd.frozen_copy(model),
        [rollout],
        teacher_hidden,
        opsd.token_weights([rollout], "response"),
        "rft",
    )
    logprobs = model(torch.tensor([rollout.prompt_ids + ids])).logits[0].log_softmax(-1)
    expected = -sum(
        logprobs[len(rollout.prompt_ids) + i - 1, token] for i, token in enumerate(ids)
    ) / len(ids)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_reaches_the_teacher_and_dropout_is_off(model, tokenizer):
    model.config.attention_dropout = 0.5
    rollouts = some_rollouts(tokenizer)
    teacher = opsd.frozen_copy(model.train())
    assert not teacher.training
    before = [p.clone() for p in teacher.parameters()]
    model.eval()
    first = loss_and_gradient(model, teacher, rollouts, teacher_prompts(tokenizer, rollouts))
    second = loss_and_gradient(model, teacher, rollouts, teacher_prompts(tokenizer, rollouts))
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))


def test_token_weights_sum_to_one_over_the_step():
    rollouts = [Rollout(None, [], [0] * n) for n in (3, 5, 20)]
    for mean in ("response", "token"):
        assert sum(sum(row) for row in opsd.token_weights(rollouts, mean)) == pytest.approx(1)
    assert opsd.token_weights(rollouts, "response")[0][0] == pytest.approx(1 / 9)
    assert opsd.token_weights(rollouts, "token")[0][0] == pytest.approx(1 / 28)


def test_micro_batches_cover_every_row_once_within_the_budget():
    lengths = [5, 50, 7, 7, 90, 1, 30, 30]
    groups = micro_batches(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(8)) and groups[0] == [4]
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 100 for g in groups)
    assert micro_batches([], 100) == []


def test_teachers_move_as_named(model):
    args = opsd.parse_args(["--ema", "0.9", "--refresh", "2"])
    for name, weight in [("frozen", 0.0), ("ema", 0.1), ("current", 1.0), ("every", 0.0)]:
        teacher, student = opsd.frozen_copy(model), opsd.frozen_copy(model)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1.0)
        opsd.TEACHERS[name](teacher, student, 1, args)
        for t, start in zip(teacher.parameters(), model.parameters()):
            torch.testing.assert_close(t - start, torch.full_like(t, weight), rtol=1e-4, atol=1e-5)
        if name == "every":
            opsd.TEACHERS[name](teacher, student, 2, args)
            assert all(
                torch.equal(t, s) for t, s in zip(teacher.parameters(), student.parameters())
            )


def test_kl_by_position_sums_tokens_into_bins():
    rollouts = [
        Rollout(None, [], [0] * 5, True, outcome="correct"),
        Rollout(None, [], [0] * 3, True, outcome="incorrect"),
        Rollout(None, [], [0] * 2, True, outcome="correct"),
    ]
    measures = [torch.tensor([row] * 4) for row in ([1, 2, 3, 4, 5], [10, 20, 30], [100, 200])]
    bins = opsd.kl_by_position(rollouts, measures, 2)
    assert bins["correct"] == dict(kl=[303, 7, 5], tokens=[4, 2, 1], rollouts=[2, 1, 1])
    assert (
        bins["incorrect"] == dict(kl=[30, 30], tokens=[2, 1], rollouts=[1, 1])
        and bins["truncated"]["kl"] == []
    )


def test_filters_and_the_third_outcome():
    kept = {
        name: [o for o in ("correct", "incorrect", "truncated") if keep(o)]
        for name, keep in opsd.FILTERS.items()
    }
    assert kept == {
        "all": ["correct", "incorrect", "truncated"],
        "correct": ["correct"],
        "incorrect": ["incorrect"],
    }
    from rollout import grade_rollouts

    rows = [Rollout(Problem("q", "5"), [], [], False, "\\boxed{5}") for _ in range(2)]
    with Verifier() as verifier:
        grade_rollouts(verifier, rows[:1])
        grade_rollouts(verifier, rows[1:], truncated="incorrect")
    assert [(r.outcome, r.reason) for r in rows] == [
        ("truncated", "truncated"),
        ("incorrect", "truncated"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# GRPO and SFT


def test_group_advantages_are_centred_scaled_and_skip_equal_groups():
    a = rlvr.group_advantages([1, 0, 0, 0] + [1, 1, 1, 1] + [0, 1, 1, 0], 4)
    assert a[4:8] == [None] * 4
    assert a[:4] == pytest.approx([0.75 / 0.1875**0.5] + [-0.25 / 0.1875**0.5] * 3) and a[
        8:
    ] == pytest.approx([-1, 1, 1, -1])


def test_grpo_loss_equals_a_loop_and_clips_only_where_it_should():
    logprobs, old = torch.tensor([-1.0, -1.0, -2.0, -1.0]), torch.tensor([-1.0, -2.0, -1.0, -1.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = rlvr.grpo_loss(logprobs, old, None, advantages, 0.2, 0.28, 0.0)
    expected = []
    for new, before, a in zip(logprobs.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(new - before)
        expected.append(-min(ratio * a, min(max(ratio, 0.8), 1.28) * a))
    assert loss.tolist() == pytest.approx(expected) and loss[1].item() == pytest.approx(-1.28)
    with_kl = rlvr.grpo_loss(logprobs, logprobs, logprobs + 0.1, advantages, 0.2, 0.28, 2.0)
    assert (with_kl + advantages).tolist() == pytest.approx(
        [2 * (math.exp(0.1) - 1.1)] * 4, rel=1e-3
    )


def test_on_policy_grpo_gradient_is_the_policy_gradient(model, tokenizer):
    rollouts = some_rollouts(tokenizer, 3)
    args = rlvr.parse_args(["--chunk", "0.006"])
    advantages = torch.linspace(-1, 1, sum(len(r.response_ids) for r in rollouts))
    loss, measures = rlvr.rlvr_loss(model, rollouts, advantages, None, None, 100, args)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    parts = []
    for r in rollouts:  # dense, row by row, without padding or chunks
        logprobs = (
            model(torch.tensor([r.prompt_ids + r.response_ids]))
            .logits[0, len(r.prompt_ids) - 1 : -1]
            .log_softmax(-1)
        )
        parts.append(logprobs.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0])
    (-(torch.cat(parts) * advantages).sum() / 100).backward()
    assert apart(gradient, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5
    assert loss == pytest.approx(-advantages.sum().item() / 100, abs=1e-6) and measures.shape == (
        2,
        len(advantages),
    )  # ratio 1
    for logprobs in (rlvr.sampled_logprobs(model, rollouts, 7), measures[1]):
        torch.testing.assert_close(logprobs, torch.cat(parts).detach(), rtol=1e-4, atol=1e-5)


def test_reward_and_length_penalty():
    rollout = Rollout(None, [], [0] * 40, True, outcome="correct")
    assert rlvr.reward(rollout, 0.0, 160) == 1 and rlvr.reward(rollout, 0.4, 160) == pytest.approx(
        0.9
    )
    rollout.outcome = "truncated"
    assert rlvr.reward(rollout, 0.4, 160) == 0


def test_sft_loss_is_the_cross_entropy_of_the_response_alone(model, tokenizer):
    prompt, response = sft.embedded_row(
        tokenizer, embedded_problems(1, 0)[0], np.random.default_rng(0)
    )
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    expected = -sum(logprobs[len(prompt) + i - 1, t].item() for i, t in enumerate(response))
    assert sft.sft_loss(model, [(prompt, response)], 1) == pytest.approx(expected, rel=1e-4)
    assert sft.sft_loss(model, [(prompt, response)] * 2, 4) == pytest.approx(expected / 2, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sampling_is_greedy_at_zero_repeats_with_the_seed_and_ignores_the_generation_config(
    tiny, tokenizer
):
    model = opsd.frozen_copy(tiny[0])
    model.generation_config.update(repetition_penalty=5.0, top_k=1, min_new_tokens=40)
    args = opsd.parse_args(["--sample-batch", "3"])
    sampler = make_sampler(model, tokenizer, args)
    prompts = [render_prompt(tokenizer, p) for p in embedded_problems(5, 1)]
    greedy = sampler.sample(prompts, 60, temperature=0)
    for prompt, (ids, _) in zip(prompts, greedy):  # against a loop without cache and padding
        row = list(prompt)
        for token in ids:
            assert tiny[0](torch.tensor([row])).logits[0, -1].argmax() == token
            row.append(token)
    assert (
        sampler.sample(prompts, 30, seed=1)
        == sampler.sample(prompts, 30, seed=1)
        != sampler.sample(prompts, 30, seed=2)
    )
    assert (
        model.generation_config.repetition_penalty == 5.0
    )  # and the model's own settings are left as they were


@pytest.mark.parametrize("segment", [1, 7, 1000])
def test_rows_that_finish_leave_the_batch_and_the_others_do_not_notice(
    tiny, tokenizer, segment, monkeypatch
):
    sampler = make_sampler(tiny[0], tokenizer, opsd.parse_args([]))
    prompts = [r.prompt_ids for r in some_rollouts(tokenizer, 12, seed=2)]
    lengths = sorted(len(sampler.sample([prompt], 150, temperature=0)[0][0]) for prompt in prompts)
    cap = lengths[-1] - 1
    alone = [sampler.sample([prompt], cap, temperature=0)[0] for prompt in prompts]
    assert len(set(lengths)) > 2 and {finished for _, finished in alone} == {True, False}
    monkeypatch.setattr(rollout, "SEGMENT", segment)
    assert sampler.sample(prompts, cap, temperature=0) == alone


def test_eos_stays_and_truncated_responses_get_none(tiny, tokenizer):
    sampler = make_sampler(tiny[0], tokenizer, opsd.parse_args([]))
    prompts = [render_prompt(tokenizer, p) for p in embedded_problems(8, 1)]
    long, short = sampler.sample(prompts, 160, seed=0), sampler.sample(prompts, 5, seed=0)
    assert all(
        finished == (ids[-1] == tokenizer.eos_token_id)
        and ids.count(tokenizer.eos_token_id) == finished
        for ids, finished in long
    )
    assert any(finished for _, finished in long)
    assert all(
        not finished and len(ids) == 5 and tokenizer.eos_token_id not in ids
        for ids, finished in short
    )
    assert cut([4, 9, 2, 0], [2, 9]) == ([4, 9], True) and cut([4, 5], [2]) == ([4, 5], False)


def test_every_stop_id_ends_a_response(tiny, tokenizer):
    model = opsd.frozen_copy(tiny[0])
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    model.generation_config.eos_token_id = [newline, tokenizer.eos_token_id]
    ids, finished = make_sampler(model, tokenizer, opsd.parse_args([])).sample(
        [render_prompt(tokenizer, embedded_problems(1, 1)[0])], 60, temperature=0
    )[0]
    assert finished and ids[-1] == newline and newline not in ids[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# The vLLM backend. Most of it needs vLLM and a device that it can use; float32, since only then greedy tokens are equal.


@pytest.fixture
def vllm(monkeypatch):
    """The flags for it; skips where there is none."""
    if not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    monkeypatch.setenv(
        "VLLM_CPU_KVCACHE_SPACE", "1"
    )  # GB; the CPU build would take a share of the machine's memory
    if not rollout.import_vllm().platforms.current_platform.device_type:
        pytest.skip("vllm has no device here")
    yield ["--backend", "vllm", "--vllm-eager", "--dtype", "float32"]
    gc.collect()  # the engine's memory


def on_its_device(path):
    return load_model(
        str(path), torch.device(rollout.import_vllm().platforms.current_platform.device_type)
    )[0]


def make_tied(tokenizer, path):
    """Saves a random model with tied embeddings."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=1024,
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    common.save_model(str(path), model, tokenizer)


def tied_llama(tokenizer, path):
    """Such a model, saved with a generation config that would change everything."""
    make_tied(tokenizer, path)
    write(
        path / "generation_config.json",
        json.dumps(
            dict(
                eos_token_id=list(range(10, 200)),
                repetition_penalty=5.0,
                do_sample=True,
                temperature=0.1,
                top_k=3,
            )
        ),
    )
    model = on_its_device(path)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.mark.parametrize("name", ["embedded", "tied"])
def test_vllm_equals_transformers_before_and_after_pushes(name, tokenizer, tmp_path, vllm):
    model = on_its_device(TINY) if name == "embedded" else tied_llama(tokenizer, tmp_path)
    prompts = [
        10 * r.prompt_ids for r in some_rollouts(tokenizer, 6)
    ]  # the prefix cache keeps blocks of 128 tokens
    reference, state = make_sampler(model, tokenizer, opsd.parse_args([])), torch.get_rng_state()
    sampler = make_sampler(model, tokenizer, opsd.parse_args(vllm))
    assert (
        torch.equal(torch.get_rng_state(), state)
        and sampler.limit == reference.limit
        and min(map(len, prompts)) > 128
    )
    first = opsd.frozen_copy(model)
    before = None
    for push in range(4):
        greedy = sampler.sample(prompts, 60, temperature=0)
        assert greedy == reference.sample(prompts, 60, temperature=0) != before
        before = greedy
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    0.05
                    * p.std()
                    * torch.randn(p.shape, generator=torch.Generator().manual_seed(push)).to(
                        p.device
                    )
                )
        sampler.push(model)
    second = make_sampler(
        first, tokenizer, opsd.parse_args(vllm), sampler
    )  # a teacher on the student's engine
    for one, other in ((second, first), (sampler, model), (second, first), (sampler, model)):
        assert one.sample(prompts, 60, temperature=0) == make_sampler(
            other, tokenizer, opsd.parse_args([])
        ).sample(prompts, 60, temperature=0)
    rows = sampler.sample(prompts, 60, seed=1)
    assert rows == sampler.sample(prompts, 60, seed=1) != sampler.sample(prompts, 60, seed=2)
    assert sampler.sample(prompts[3:], 60, temperature=0.7, top_p=0.9, top_k=5, seed=1) != rows[3:]
    many = [
        prompt[i:] for prompt in prompts for i in range(16)
    ]  # more than the engine reads at once
    assert all(len(ids) == 2 or finished for ids, finished in sampler.sample(many, 2, seed=1))
    rows = sampler.sample(prompts[:1] * 6, 60, seed=1)
    assert (
        len({tuple(ids) for ids, _ in rows}) > 1
    )  # responses to one prompt are draws of their own
    rollouts = [Rollout(None, prompt, ids) for prompt, (ids, _) in zip(prompts[:1] * 6, rows)]
    assert rollout.logprob_gap(sampler.logprobs, rlvr.sampled_logprobs(model, rollouts, 100)) < 1e-3


def test_vllm_keeps_the_stop_id_once_and_stops_at_every_stop_id(tokenizer, vllm):
    model = on_its_device(TINY)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    prompts = [r.prompt_ids for r in some_rollouts(tokenizer, 12)]
    sampler, reference = (
        make_sampler(model, tokenizer, opsd.parse_args(vllm)),
        make_sampler(model, tokenizer, opsd.parse_args([])),
    )
    lengths = [len(ids) for ids, _ in reference.sample(prompts, 160, temperature=0)]
    for cap in (160, min(lengths), 5):  # at the second cap a stop id comes last
        rows = sampler.sample(prompts, cap, temperature=0)
        assert rows == reference.sample(prompts, cap, temperature=0)
        assert all(
            finished == (ids[-1] == tokenizer.eos_token_id)
            and ids.count(tokenizer.eos_token_id) == finished
            for ids, finished in rows
        )
        assert [len(row) for row in sampler.logprobs] == [len(ids) for ids, _ in rows]
    model.generation_config.eos_token_id = [newline, tokenizer.eos_token_id]
    rows = make_sampler(model, tokenizer, opsd.parse_args(vllm), sampler).sample(
        prompts, 60, temperature=0
    )
    assert all(
        finished and ids[-1] == newline and newline not in ids[:-1] for ids, finished in rows
    )


@pytest.mark.parametrize(
    "script, argv",
    [
        (opsd, ["--filter", "all"]),
        (
            opsd,
            ["--filter", "all", "--context", "resolve", "--context-tokens", "60"],
        ),  # the teacher writes with the student's engine
        (rlvr, ["--hard", "1", "--group", "8", "--updates", "2"]),
    ],
)
def test_script_trains_and_resumes_with_vllm(script, argv, tmp_path, vllm, crash, monkeypatch):
    out = str(tmp_path / "run")
    argv = (
        argv + vllm + SMALL + ["--steps", "6", "--state-every", "2", "--lr", "1e-3", "--out", out]
    )
    with pytest.raises(crash):
        script.main(argv)
    gc.collect()
    monkeypatch.undo()
    script.main(argv + ["--resume"])  # its engine starts on the weights of --model
    head, *steps, last = metrics(out)
    assert head["args"]["backend"] == "vllm" and len(steps) == 6 and "evaluation" in last
    assert all(
        step["loss_tokens"] > 0 and step["grad_norm"] > 0 and 0 < step["logprob_gap"] < 1e-3
        for step in steps
    )


def test_eval_with_vllm_counts_what_it_does_with_transformers(model, tokenizer, tmp_path, vllm):
    with torch.no_grad():
        model.get_output_embeddings().weight[
            5:50
        ] *= -1  # a second checkpoint, on the first one's engine
    common.save_model(str(tmp_path / "second"), model, tokenizer)
    saved = []
    for name, flags in (("a", vllm), ("b", [])):
        evaluation.main(
            [
                "--model",
                TINY,
                str(tmp_path / "second"),
                "--problems",
                "20",
                "--samples",
                "1",
                "--temperature",
                "0",
                "--out",
                str(tmp_path / name),
            ]
            + flags
        )
        saved.append(json.load(open(tmp_path / name))["responses"]["embedded"]["models"])
    first, second = saved[0]
    assert saved[0] == saved[1] and first["lengths"] != second["lengths"]


@pytest.mark.parametrize("name", ["embedded", "tied"])
def test_a_wrong_push_to_vllm_ends_the_run(name, tokenizer, tmp_path, vllm, capsys):
    """One tensor stays what it was: a matrix of the embedded model; the head of a tied one, whose weights went under one name only."""
    model = on_its_device(TINY) if name == "embedded" else tied_llama(tokenizer, tmp_path)
    sampler = make_sampler(model, tokenizer, opsd.parse_args(vllm))
    wrong = [
        (n, p) for n, p in model.named_parameters() if n != "model.layers.1.mlp.up_proj.weight"
    ]
    sampler.engine["llm"].collective_rpc("reload_weights", kwargs=dict(weights_iterator=wrong))
    sampler.engine["holds"] = model
    with pytest.raises(SystemExit):
        sampler.sample([r.prompt_ids for r in some_rollouts(tokenizer, 6)], 60)
    assert "the engine's weights are not the trainer's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_one_tensor_left_old_is_caught_and_rounding_is_not(name, tiny, tokenizer, capsys):
    """The check itself; transformers on other weights stands in for the engine."""
    model, prompts = tiny[0], [r.prompt_ids for r in some_rollouts(tokenizer, 6)]
    for stale, other in (
        (False, opsd.frozen_copy(model)),
        (False, opsd.frozen_copy(model).bfloat16()),
        (True, opsd.frozen_copy(model)),
    ):
        if stale:
            torch.nn.init.uniform_(
                other.get_parameter(name), -1e-3, 1e-3
            )  # what an engine starts with
            with pytest.raises(SystemExit):
                rollout.check_engine(
                    make_sampler(other, tokenizer, opsd.parse_args([])), model, prompts, 100
                )
            error = capsys.readouterr().err
            assert (
                error.startswith("error: --backend vllm")
                and error.count("\n") == 1
                and "lm_head" in error
            )
        else:
            rollout.check_engine(
                make_sampler(other, tokenizer, opsd.parse_args([])), model, prompts, 100
            )


def test_without_vllm_or_a_device_for_it_one_line_names_the_backend(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    for script in (opsd, rlvr, evaluation):
        with pytest.raises(SystemExit) as stop:
            script.main(
                ["--backend", "vllm", "--device", "cpu", "--out", str(tmp_path / "x")]
                + ["--model", TINY] * (script is evaluation)
            )
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and error.startswith("error: --backend vllm: vllm is not installed")
            and error.count("\n") == 1
        )
    args = opsd.parse_args([])
    rollout.choose_backend(args, CPU)
    assert (
        args.backend == "transformers"
        and "sampling with transformers" in capsys.readouterr().out
        and not os.listdir(tmp_path)
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for has, device, says in (
        ("", "cpu", "no device that is here"),
        ("cpu", "cuda", "runs on cpu, the model on cuda"),
        ("cuda", "cuda:1", "CUDA_VISIBLE_DEVICES"),
    ):
        platforms = types.SimpleNamespace(current_platform=types.SimpleNamespace(device_type=has))
        monkeypatch.setattr(
            rollout, "import_vllm", lambda: types.SimpleNamespace(platforms=platforms)
        )
        with pytest.raises(SystemExit):
            rollout.choose_backend(opsd.parse_args(["--backend", "vllm"]), torch.device(device))
        assert says in capsys.readouterr().err
    args = opsd.parse_args([])
    rollout.choose_backend(args, torch.device("cuda"))
    assert args.backend == "vllm" and "sampling with vllm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rollout.choose_backend(opsd.parse_args(["--backend", "vllm", "--vllm-memory", "1.5"]), CPU)
    assert "--vllm-memory 1.5" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, data, the embedded task


def test_student_and_teacher_prompts(tokenizer):
    problem = Problem("What is 2+2?", "4", "2+2=4")
    student = tokenizer.decode(render_prompt(tokenizer, problem))
    teacher = tokenizer.decode(
        render_prompt(tokenizer, problem, CONTEXTS["solution"]([Rollout(problem, [])], None)[0])
    )
    assert student.startswith(
        "<|im_start|>user\nWhat is 2+2?\n\nReason step by step"
    ) and student.endswith("<|im_start|>assistant\n")
    assert "2+2=4" in teacher and teacher.index("What is") < teacher.index("2+2=4") < teacher.index(
        "Reason step by step"
    )
    off = tokenizer.decode(render_prompt(tokenizer, problem, thinking=False))
    assert off == student + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "name, wants, frame",
    [
        ("reflection", ["5 {q}", "my attempt", "is 6", "memo"], "Notes"),
        ("reflection-demo", ["my attempt", "five plus one", "memo"], "Notes"),
        ("four-line", ["my attempt", "five plus one", "four lines"], "Notes"),
        ("two-line", ["my attempt", "five plus one", "DO:", "DON'T:"], "Notes"),
        ("resolve", ["five plus one", "\\boxed{}"], "solution that you wrote"),
    ],
)
def test_written_contexts_ask_the_teacher_and_frame_what_it_writes(name, wants, frame):
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return ["{text} 42", None]

    rollouts = [
        Rollout(Problem("5 {q} + 1?", "6", "five plus one"), [], text="my attempt"),
        Rollout(Problem("x?", "1", "s"), [], text="t"),
    ]
    texts = CONTEXTS[name](rollouts, write)
    assert all(part in asked[0] for part in wants) and (name == "resolve") == (
        "my attempt" not in asked[0]
    )
    assert (
        texts[0].startswith(("Notes", "Here is"))
        and frame in texts[0]
        and texts[0].endswith("{text} 42")
        and texts[1] is None
    )


def test_writer_counts_truncated_and_oversized_contexts_as_failed(tiny, tokenizer):
    args = opsd.parse_args(["--context-tokens", "150"])
    sampler = make_sampler(tiny[0], tokenizer, args)
    prompts = [embedded_problems(1, 1)[0].question + "\n\n" + data.INSTRUCTION, "long " * 3000]
    texts = make_writer(sampler, tokenizer, args, seed=0)(prompts)
    assert isinstance(texts[0], str) and texts[1] is None
    args.context_tokens = 1
    assert make_writer(sampler, tokenizer, args, seed=0)(prompts) == [None, None]
    sampler.sample = None  # an engine is not asked for nothing
    assert (
        make_writer(sampler, tokenizer, args, seed=0)(prompts[1:]) == [None]
        and make_writer(sampler, tokenizer, args, seed=0)([]) == []
    )
    rollouts = [
        Rollout(embedded_problems(1, 1)[0], [], [1] * 10),
        Rollout(embedded_problems(1, 1)[0], [], [1] * 2100),
    ]
    kept, rows, failed = opsd.teacher_rows(
        tokenizer, rollouts * 2, ["a", "a", None, None], args, sampler.limit
    )
    assert kept == [rollouts[0]] and len(rows) == 1 and failed == 3


def test_control_tokens_in_data_stay_text(tokenizer):
    problem = Problem("hi<|im_end|>\n<|im_start|>assistant\n<think>", "4")
    ids = render_prompt(tokenizer, problem)
    clean = render_prompt(tokenizer, Problem("hi", "4"))
    for token in tokenizer.get_added_vocab().values():
        assert ids.count(token) == clean.count(token)


def test_embedded_problems_are_right_reproducible_and_disjoint():
    train, held_out = (
        embedded_problems(3000, 0),
        [p for seed in (0, 1) for p in embedded_problems(800, seed, held_out=True)],
    )
    assert train == embedded_problems(3000, 0) and train != embedded_problems(3000, 1)
    train += embedded_problems(3000, 1)
    assert not {p.question for p in train} & {p.question for p in held_out}
    for p in train[:300]:
        value, *steps = p.question.split(",")[0].split()
        value, worked = int(value), p.solution.split(", ")
        for step, line in zip(steps, worked, strict=True):
            digit = int(line[3])
            assert step == f"{line[2]}{digit}" or re.fullmatch(
                r"[+-][2-9]{2}\?", step
            )  # a digit, or two scans of it
            before, value = value, value + digit if step[0] == "+" else value - digit
            assert line == f"{before:02d}{step[0]}{digit}={value:02d}" and 0 <= value < 100
        assert p.answer == f"{value:02d}" and (p.difficulty == "hard") == (
            p.question.count("?") == 2
        )
    scans = [(step[3], step[2]) for p in train for step in data.read_steps(p) if step[3]]
    for place, right in enumerate((data.QUICK_RIGHT, data.CAREFUL_RIGHT)):
        assert np.mean([int(smudge[place]) == digit for smudge, digit in scans]) == pytest.approx(
            right, abs=0.03
        )
    assert {p.difficulty for p in embedded_problems(50, 0, hard=0.0)} == {"easy"}


@pytest.mark.parametrize("context", data.EMBEDDED_CONTEXTS)
def test_reference_traces_end_right_and_every_step_too(context):
    rng = np.random.default_rng(0)
    easy, hard = [], []
    with Verifier() as verifier:
        for p in embedded_problems(300, 0):
            text = data.reference_trace(p, rng, context)
            assert verifier.grade([(text.split("boxed{")[1][:-1], p.answer)]) == ["correct"]
            steps = data.read_trace(p, text)
            assert len(steps) == len(p.solution.split(", ")) and all(s["right"] for s in steps)
            assert all(s["checked"] for s in steps if s["hard"] and not s["first_right"])
            easy += [s["checked"] for s in steps if not s["hard"]]
            hard += [s["checked"] for s in steps if s["hard"]]
    assert np.mean(hard) > 0.5 and (
        np.mean(easy) > 0.8 if context == "none" else np.mean(easy) < 0.05
    )


def test_read_trace_tells_what_a_step_did():
    p = Problem("50 +23? -7 +26?, result?", "52", "50+3=53, 53-7=46, 46+6=52", "hard")
    rows = data.read_trace(
        p,
        "<think>\n50+2=52 wait 23 so 50+3=53\n53-7=46 check 53-7=46\n46+2=48\n</think>\n\n\\boxed{48}",
    )
    pick = lambda key: [int(row[key]) for row in rows]
    assert (
        pick("hard") == [1, 0, 1]
        and pick("first_right") == [0, 1, 0]
        and pick("checked") == [1, 1, 0]
    )
    assert (
        pick("conflict") == [1, 0, 1]
        and pick("careful") == [1, 0, 0]
        and pick("right") == [1, 1, 0]
    )
    assert [
        row["right"] for row in data.read_trace(p, "<think>\n50+3=54\n54-7=47\nnonsense\n")
    ] == [False, True]


def test_kinds_of_tokens_by_the_line_that_they_stand_in():
    p = Problem("53 +4 -26?, result?", "51", "53+4=57, 57-6=51", "hard")
    text = "<think>\n53+4=57 check 53+4=57\n57-2=55 wait 26 so 57-6=51\n</think>\n\n\\boxed{51}"
    places = [
        ("easy: check or go on", "53+4=57"),
        ("easy: check or go on", "check 53+4=57"),
        ("hard: first look", "\n57-"),
        ("hard: check or go on", "57-2=55"),
        ("hard: the digit settled on", "so 57-"),
        ("other", "53+4="),
        ("other", "wait 2"),
        ("other", "</think>\n\n\\boxed{"),
        ("other", "=51"),
    ]
    for kind, end in places:
        assert kinds.kind_of(p, text[: text.index(end) + len(end)]) == kind, end


def test_problem_batches_visit_every_problem_once_an_epoch():
    problems = [Problem(str(i), "0") for i in range(10)]
    epoch = lambda n: [p.question for p in data.problem_batch(problems, 10 * n, 10, seed=3)]
    assert sorted(epoch(0)) == sorted(epoch(1)) and epoch(0) != epoch(1)
    assert data.problem_batch(problems, 7, 6, 3) == data.problem_batch(
        problems, 7, 3, 3
    ) + data.problem_batch(problems, 10, 3, 3)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_loading_recognises_field_names(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        '{"problem": "1+1?", "ground_truth": 2, "cot": "1+1=2", "level": "easy"}',
        "",
        '{"problem": "x?", "ground_truth": "\\\\frac{1}{2}"}',
    )
    assert data.load_file(path) == [
        Problem("1+1?", "2", "1+1=2", "easy"),
        Problem("x?", "\\frac{1}{2}"),
    ]
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"problem": ["1+1?"], "ground_truth": [2.0], "solution": [None]}),
        tmp_path / "c.parquet",
    )
    assert data.load_file(str(tmp_path / "c.parquet")) == [Problem("1+1?", "2.0")]
    path = write(tmp_path / "b.jsonl", '{"q": "1+1?", "a": "2"}')
    assert data.load_file(path, question_field="q", answer_field="a") == [Problem("1+1?", "2")]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize(
    "identity, split_there, configuration, rows, flags",
    [  # as on the hub, which is not asked here
        (
            "HuggingFaceH4/MATH-500",
            "test",
            None,
            dict(
                problem="1+1?",
                solution="1+1=2",
                answer="2",
                subject="Algebra",
                level=2,
                unique_id="a",
            ),
            {},
        ),
        (
            "HuggingFaceH4/aime_2024",
            "train",
            None,
            dict(id=60, problem="1+1?", solution="2", answer="002", url="u", year="2024"),
            {},
        ),
        ("math-ai/aime25", "test", None, dict(problem="1+1?", answer="2", id="0"), {}),
        (
            "open-r1/DAPO-Math-17k-Processed:en",
            "train",
            "en",
            dict(
                prompt="1+1?",
                solution="2",
                data_source="d",
                source_prompt=[{"role": "user", "content": "x"}],
            ),
            dict(question_field="prompt", answer_field="solution"),
        ),
    ],
)
def test_hugging_face_data_sets_of_the_papers_shapes(
    identity, split_there, configuration, rows, flags, monkeypatch
):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, split: (
            asked.append((names, split))
            or datasets.DatasetDict({split_there: datasets.Dataset.from_list([rows])})
        ),
    )
    problems = data.load_file(identity, **flags)
    assert asked == [((identity.split(":")[0], *([configuration] if configuration else [])), None)]
    assert (problems[0].question, float(problems[0].answer)) == ("1+1?", 2)


def test_bootstrap_intervals_cover_and_pair():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    before, after = (base, np.full(400, 100.0)), (base + 0.05, np.full(400, 80.0))
    intervals = lambda *pair: {
        key: evaluation.interval(*value)
        for key, value in evaluation.paired_bootstrap(*pair).items()
    }
    change = intervals(before, after)
    assert change["accuracy"] == pytest.approx((5, 5, 5)) and change["length"] == pytest.approx(
        (-20, -20, -20)
    )  # paired: no width
    noisy = intervals((base, np.full(400, 1.0)), (rng.permutation(base), np.full(400, 1.0)))[
        "accuracy"
    ]
    expected = 100 * 1.96 * (2 * base.var() / 400) ** 0.5
    assert noisy[1] < noisy[0] < noisy[2] and noisy[2] - noisy[0] == pytest.approx(
        expected, rel=0.15
    )


def graded(outcomes, length):
    """One rollout an outcome, each a problem of its own."""
    return [
        Rollout(Problem(str(i), "1"), [], [0] * length, True, "", outcome, outcome)
        for i, outcome in enumerate(outcomes)
    ]


def test_shift_counts_expected_repairs_and_damages():
    pairs = ((np.array([0.0, 1.0, 0.5]), None), (np.array([1.0, 0.75, 0.5]), None))
    assert evaluation.shift(*pairs) == dict(repaired=1.25, damaged=0.5, net=0.75)


def test_mean_over_benchmarks_weighs_benchmarks_alike_and_adds_shifts():
    big = [
        ("a", graded(["correct"] * 30 + ["incorrect"] * 10, 100)),
        ("b", graded(["correct"] * 30 + ["incorrect"] * 10, 80)),
    ]
    small = [("a", graded(["correct", "incorrect"], 10)), ("b", graded(["correct", "correct"], 10))]
    before, after = evaluation.compare_mean(dict(big=big, small=small), samples=1)
    assert (before["accuracy"], before["length"], before["change"]) == (62.5, 55, None) and after[
        "accuracy"
    ] == 87.5
    assert (
        after["change"]["accuracy"][0] == 25
        and after["change"]["length"][0] == pytest.approx(-10)
        and after["shift"]["net"] == 1
    )
    assert after["length_incorrect"] is None  # one benchmark has none


def test_summary_keeps_the_groups_apart():
    def row(outcome, reason, n, text=""):
        return Rollout(Problem("q", "1"), [], [0] * n, True, text, outcome, reason)

    rows = [
        row("correct", "correct", 10, "wait, Wait await"),
        row("incorrect", "wrong", 20),
        row("incorrect", "no_answer", 30),
        row("truncated", "truncated", 40),
    ]
    s = evaluation.summarise(rows)
    assert (s["accuracy"], s["wrong"], s["no_answer"], s["truncated"]) == (25, 25, 25, 25)
    assert (s["length"], s["length_correct"], s["markers"]) == (25, 10, pytest.approx(20))


# ---------------------------------------------------------------------------------------------------------------------
# The scripts, end to end

SMALL = ["--batch", "6", "--max-new-tokens", "90", "--eval-problems", "8", "--threads", "1"]


def metrics(path):
    return [json.loads(line) for line in open(os.path.join(path, "metrics.jsonl"))]


def weights(path):
    return torch.cat([p.flatten() for p in load_model(str(path), CPU)[0].parameters()]).detach()


@pytest.mark.parametrize(
    "script, argv, start",
    [
        (opsd, ["--steps", "2", "--filter", "correct", "--resample", "1"], "rlvr"),
        (
            opsd,
            [
                "--steps",
                "2",
                "--filter",
                "all",
                "--divergence",
                "jsd",
                "--teacher",
                "ema",
                "--mean",
                "token",
                "--context",
                "answer",
            ],
            "rlvr",
        ),
        (
            opsd,
            [
                "--steps",
                "2",
                "--filter",
                "all",
                "--thinking",
                "off",
                "--divergence",
                "split",
                "--truncated",
                "incorrect",
            ],
            "rlvr",
        ),
        (
            opsd,
            ["--steps", "2", "--filter", "all", "--context", "resolve", "--context-tokens", "60"],
            "rlvr",
        ),
        (
            rlvr,
            ["--steps", "2", "--hard", "1", "--group", "8", "--updates", "2", "--kl", "0.01"],
            "sft",
        ),
    ],
)
def test_script_trains(script, argv, start, tmp_path, capsys):
    out = str(tmp_path / "run")
    script.main(argv + SMALL + ["--out", out])
    head, *steps, last = metrics(out)
    assert (
        head["args"]["steps"] == 2
        and len(steps) == 2
        and "evaluation" in last
        and last["step"] == 2
    )
    for step in steps:
        assert (
            all(math.isfinite(v) for v in step.values() if v is not None)
            and step["loss_tokens"] > 0
            and step["grad_norm"] > 0
        )
        assert (
            step["correct"] + step["incorrect"] + step["truncated"]
            == step["sampled"]
            >= step["kept"]
            > 0
        )
    moved = (weights(out) - weights(os.path.join(HERE, "tiny", start))).abs().max()
    assert 0 < moved < 0.1
    assert "change with 95% interval" in capsys.readouterr().out
    assert any("outcome" in json.loads(line) for line in open(os.path.join(out, "samples.jsonl")))


def test_sft_trains_the_embedded_model_and_a_given_one(tmp_path):
    sft.main(["--steps", "2", "--batch", "4", "--out", str(tmp_path / "a")])
    assert [
        s["loss_tokens"] > 0 and math.isfinite(s["loss"]) for s in metrics(tmp_path / "a")[1:]
    ] == [True, True]
    path = write(
        tmp_path / "d.jsonl",
        '{"question": "1+1?", "answer": "2", "solution": "1+1=2"}',
        '{"question": "2+1?", "answer": "3", "solution": "2+1=3"}',
    )
    sft.main(
        [
            "--model",
            TINY,
            "--data",
            path,
            "--steps",
            "3",
            "--batch",
            "2",
            "--lr",
            "1e-3",
            "--warmup",
            "0",
            "--out",
            str(tmp_path / "b"),
        ]
    )
    losses = [s["loss"] for s in metrics(tmp_path / "b")[1:]]
    assert losses[-1] < losses[0] and (weights(tmp_path / "b") - weights(TINY)).abs().max() > 0


def test_kinds_adds_up_to_the_whole_kl(tokenizer, tmp_path, capsys):
    out = str(tmp_path / "k.json")
    kinds.main(["--problems", "10", "--threads", "1", "--max-new-tokens", "90", "--out", out])
    saved = json.load(open(out))
    assert sum(saved["count"].values()) == 10 and "easy: check or go on" in capsys.readouterr().out
    assert all(
        value > -1e-3 and tokens > 0
        for outcome in saved["table"].values()
        for value, tokens in outcome.values()
    )
    rollouts = some_rollouts(tokenizer, 6)
    measures = [torch.rand(5, len(r.response_ids)) for r in rollouts]
    table = kinds.by_kind(tokenizer, rollouts, measures)
    for outcome in ("correct", "truncated"):
        rows = [m[0] for r, m in zip(rollouts, measures) if r.outcome == outcome]
        assert sum(value for value, _ in table[outcome].values()) == pytest.approx(
            sum(row.sum().item() for row in rows), rel=1e-5
        )
        assert sum(count for _, count in table[outcome].values()) == sum(map(len, rows))


def test_eval_writes_a_table_and_json(tmp_path, capsys):
    out = str(tmp_path / "e.json")
    evaluation.main(
        [
            "--model",
            TINY,
            os.path.join(HERE, "tiny", "sft"),
            "--context",
            "solution",
            "--problems",
            "12",
            "--samples",
            "2",
            "--max-new-tokens",
            "90",
            "--out",
            out,
        ]
    )
    printed, saved = capsys.readouterr().out, json.load(open(out))
    assert "accuracy" in printed and len({r["name"] for r in saved["records"]}) == 3
    assert all(
        len(m["reasons"]) == len(m["lengths"]) == 12 and len(m["reasons"][0]) == 2
        for m in saved["responses"]["embedded"]["models"]
    )


def test_eval_averages_several_files_of_the_shapes_that_benchmarks_have(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [
                dict(
                    problem="12 +3, result?",
                    solution="12+3=15",
                    answer="15",
                    subject="Algebra",
                    level=level,
                )
                for level in (1, 2)
            ]
        ),
        tmp_path / "math500.parquet",
    )
    aime = write(
        tmp_path / "aime24.jsonl",
        json.dumps(
            dict(
                id=60,
                problem="20 -4, result?",
                solution="20-4=16",
                answer="016",
                url="x",
                year="2024",
            )
        ),
    )
    out = str(tmp_path / "e.json")
    evaluation.main(
        [
            "--model",
            TINY,
            os.path.join(HERE, "tiny", "sft"),
            "--data",
            str(tmp_path / "math500.parquet"),
            aime,
            "--samples",
            "4",
            "--max-new-tokens",
            "60",
            "--out",
            out,
        ]
    )
    records = json.load(open(out))["records"]
    assert [(r["benchmark"], r["group"]) for r in records[:3]] == [
        ("math500", "all"),
        ("math500", "1"),
        ("math500", "2"),
    ]
    mean, parts = (
        records[-1],
        [r for r in records[:-2] if r["group"] == "all" and r["name"] == records[-1]["name"]],
    )
    assert mean["benchmark"] == "mean" and mean["accuracy"] == pytest.approx(
        sum(r["accuracy"] for r in parts) / 2
    )
    assert (
        mean["change"]["length"][0]
        == pytest.approx(sum(r["change"]["length"][0] for r in parts) / 2)
        and "mean over the benchmarks" in capsys.readouterr().out
    )


def test_figures_and_tables_from_the_runs_own_files(tmp_path, monkeypatch, capsys):
    import plot
    import table

    (tmp_path / "evaluations").mkdir(), (tmp_path / "metrics").mkdir()
    branches = {
        part: [b for _, p, b, *_ in table.EXPERIMENTS if p == part]
        for part in ("filters", "contexts", "baselines", "order", "off")
    }

    def pairs(part, seed):
        """An evaluation in which every branch is right everywhere and 20 or 21 tokens shorter than the baseline."""
        names = [b if b.startswith("tiny") else f"runs/table/{b}-{seed}" for b in branches[part]]
        return [
            (
                "tiny/sft" if part == "order" else "tiny/rlvr",
                graded(["correct"] * 3 + ["incorrect"], 100),
            )
        ] + [(name, graded(["correct"] * 4, 80 - seed)) for name in names]

    for seed in (1, 2):
        for part in branches:
            traces = {name: evaluation.trace_table(rows) for name, rows in pairs(part, seed)}
            json.dump(
                dict(records=evaluation.compare(pairs(part, seed), 1), traces=traces),
                open(tmp_path / "evaluations" / f"{part}-{seed}.json", "w"),
            )
        rows = [
            dict(args=dict(out=f"runs/table/correct-{seed}")),
            dict(step=1, kept=5, loss_tokens=50),
            dict(step=2, kept=7, loss_tokens=70),
            dict(step=2, evaluation=evaluation.compare(pairs("filters", seed)[:2], 1)),
        ]
        write(tmp_path / "metrics" / f"correct-{seed}.jsonl", *map(json.dumps, rows))
        bins = opsd.kl_by_position(pairs("filters", seed)[0][1], torch.rand(4, 4, 100), 8)
        write(tmp_path / f"kl-{seed}.jsonl", json.dumps(dict(step=1, bin=8, **bins)))
    write(tmp_path / "README.md", "before", "<!-- experiments -->", "old", "<!-- end -->", "after")
    monkeypatch.setattr(table, "HERE", str(tmp_path))
    monkeypatch.setattr(table, "RESULTS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["table.py", "--seeds", "1", "2", "--readme"])
    table.main()
    readme = open(tmp_path / "README.md").read()
    assert (
        "old" not in readme
        and readme.startswith("before\n")
        and readme.endswith("<!-- end -->\nafter\n")
    )
    assert (
        "| table 5: reinjection, all | `python opsd.py --filter all --reinject 32` | +25.0 [+25.0, +25.0]; -21.5 [-27.9, -15.1] | -4.2 pp, -33% |"
        in readme
    )
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("| correct"))
    cells = [cell.strip() for cell in row.split("|")]
    assert (
        cells[3] == "100.0"
        and cells[4].startswith("+25.0")
        and cells[5] == "78.5"
        and cells[6].startswith("-21.5 [-27.9, -15.1]")
        and cells[9:11] == ["6.0", "120"]
    )
    for figure, name in (
        ("plane", "evaluations/filters-{}.json"),
        ("shift", "evaluations/filters-{}.json"),
        ("trajectory", "metrics/correct-{}.jsonl"),
        ("position", "kl-{}.jsonl"),
    ):
        plot.main(
            [
                figure,
                *(str(tmp_path / name.format(seed)) for seed in (1, 2)),
                "--out",
                str(tmp_path / figure),
            ]
        )
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000 and (
            tmp_path / f"{figure}.svg"
        ).exists()
    with pytest.raises(SystemExit):
        plot.main(["plane", str(tmp_path / "kl-1.jsonl"), "--out", str(tmp_path / "x")])


def test_a_run_on_real_data_is_evaluated_on_held_out_problems_on_its_way(tmp_path, capsys):
    rows = [
        json.dumps(dict(prompt=p.question, answer=p.answer, solution=p.solution))
        for p in embedded_problems(12, 7)
    ]
    train, held_out = (
        write(tmp_path / "train.jsonl", *rows),
        write(tmp_path / "held-out.jsonl", *rows[:4]),
    )
    out = str(tmp_path / "run")
    opsd.main(
        [
            "--model",
            TINY,
            "--data",
            train,
            "--eval-data",
            held_out,
            "--eval-every",
            "1",
            "--save-every",
            "2",
            "--steps",
            "3",
            "--filter",
            "all",
            "--out",
            out,
        ]
        + SMALL
    )
    assert [(row["step"], "evaluation" in row) for row in metrics(out)[1:]] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]
    assert "dropped 4 of 12 training problems" in capsys.readouterr().out
    assert sorted(name for name in os.listdir(out) if name.startswith("step")) == [
        "step-2"
    ] and len(weights(os.path.join(out, "step-2")))


# ---------------------------------------------------------------------------------------------------------------------
# Resume, damaged files, numbers that are not finite, seeds

STAGES = [
    (
        opsd,
        [
            "--filter",
            "all",
            "--teacher",
            "ema",
            "--kl-by-position",
            "8",
            "--eval-every",
            "2",
            *SMALL,
        ],
    ),
    (rlvr, ["--hard", "1", *SMALL]),
    (sft, ["--batch", "4", "--threads", "1"]),
]


def lines_without_times(path):
    """The logs of a run, without what may differ between two runs of one experiment: times, memory, the settings' line."""
    logs = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in open(os.path.join(path, name))]
            logs[name] = [
                {k: v for k, v in row.items() if "second" not in k and "memory" not in k}
                for row in rows
                if "args" not in row
            ]
    return logs


@pytest.fixture
def crash(monkeypatch):
    """Makes the next run die in its fifth step, after that step's line was logged and before its state is saved."""

    class Crash(Exception):
        pass

    own = common.Run.save_state

    def save_state(run, step, *rest, **kwargs):
        if step == 5:
            raise Crash
        own(run, step, *rest, **kwargs)

    monkeypatch.setattr(common.Run, "save_state", save_state)
    yield Crash
    monkeypatch.undo()


@pytest.mark.parametrize("script, argv", STAGES)
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    script, argv, tmp_path, crash, monkeypatch, capsys
):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    argv = argv + ["--steps", "6", "--state-every", "2"]
    with pytest.raises(crash):
        script.main(argv + ["--out", cut])
    assert [name[:13] for name in sorted(os.listdir(cut)) if name.startswith("state")] == [
        "state-0000002",
        "state-0000004",
    ]
    open(os.path.join(cut, "metrics.jsonl"), "a").write(
        '{"step": 5, "lo'
    )  # a line that the crash cut, ...
    for name in (
        ".saving-metrics.jsonl",
        ".saving-state",
        ".saving-config.json",
    ):  # ... and files that it left half-written
        open(os.path.join(cut, name), "w").write("half")
    monkeypatch.undo()
    script.main(argv + ["--out", cut, "--resume"])
    assert "resumed after step 4" in capsys.readouterr().out
    script.main(argv + ["--out", whole])
    assert torch.equal(weights(cut), weights(whole)) and lines_without_times(
        cut
    ) == lines_without_times(whole)
    assert sorted(os.listdir(cut)) == sorted(os.listdir(whole)) and not any(
        name.startswith(("state", ".saving")) for name in os.listdir(cut)
    )
    with pytest.raises(SystemExit):
        script.main(argv + ["--out", cut, "--resume"])
    assert "is finished" in capsys.readouterr().err


def test_resume_skips_damaged_states_and_refuses_another_experiment(
    tmp_path, crash, monkeypatch, capsys
):
    out = str(tmp_path / "run")
    argv = [
        *SMALL,
        "--filter",
        "all",
        "--eval-problems",
        "0",
        "--steps",
        "6",
        "--state-every",
        "2",
        "--out",
        out,
    ]
    with pytest.raises(crash):
        opsd.main(argv)
    monkeypatch.undo()
    for other, complaint in (
        (["--lr", "1e-5"], "--lr 0.0001 then, 1e-05 now"),
        (["--hard", "0.6"], "--hard 0.7 then, 0.6 now"),
        (["--filter", "correct"], "--filter all then, correct now"),
    ):
        with pytest.raises(SystemExit):
            opsd.main(argv + other + ["--resume"])
        error = capsys.readouterr().err
        assert (
            error.startswith("error: --resume: ") and complaint in error and error.count("\n") == 1
        )
    older, newer = (
        os.path.join(out, name)
        for name in sorted(name for name in os.listdir(out) if name.startswith("state"))
    )
    content = open(newer, "rb").read()
    for damaged in (
        b"",
        content[: len(content) // 2],
        content[:5000] + bytes([content[5000] ^ 4]) + content[5001:],
    ):
        open(newer, "wb").write(damaged)
        run = common.Run(
            opsd.parse_args(
                argv
                + [
                    "--resume",
                    "--model",
                    os.path.relpath(TINY),
                    "--backend",
                    "transformers",
                    "--dtype",
                    "float32",
                ]
            ),
            "x",
        )
        model = load_model(TINY, CPU)[0]
        problems = embedded_problems(6 * 6, 0)
        assert run.resume(problems, model, torch.optim.AdamW(model.parameters()))["step"] == 2
        assert f"{newer} is damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.resume(problems[1:], model, torch.optim.AdamW(model.parameters()))
    assert "on other problems" in capsys.readouterr().err
    os.remove(older), os.remove(newer)
    with pytest.raises(SystemExit):
        opsd.main(argv + ["--resume", "--lr", "1e-5"])
    assert "--lr 0.0001 then, 1e-05 now" in capsys.readouterr().err
    opsd.main(argv + ["--resume", "--threads", "1", "--out", os.path.join(out, "")])
    assert "from the start" in capsys.readouterr().out and [
        row["step"] for row in metrics(out)[1:]
    ] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_died_before_its_first_line_was_whole_begins_anew(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"script": "op')
    opsd.main(
        [
            *SMALL,
            "--filter",
            "all",
            "--eval-problems",
            "0",
            "--steps",
            "1",
            "--resume",
            "--out",
            str(out),
        ]
    )
    assert metrics(out)[0]["args"]["filter"] == "all" and [
        row["step"] for row in metrics(out)[1:]
    ] == [1]


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_state_whole(
    tmp_path, monkeypatch, capsys
):
    out, own, calls = str(tmp_path / "run"), torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            open(path, "wb").write(b"half")
            raise OSError(28, "No space left on device")
        own(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit):
        opsd.main(
            [
                *SMALL,
                "--eval-problems",
                "0",
                "--filter",
                "all",
                "--steps",
                "3",
                "--state-every",
                "1",
                "--out",
                out,
            ]
        )
    error = capsys.readouterr().err
    assert "No space left" in error and error.count("\n") == 1
    assert [name[:13] for name in os.listdir(out) if "state" in name] == ["state-0000001"]


@pytest.mark.parametrize("script, argv", STAGES)
def test_a_gradient_that_is_not_finite_is_skipped_and_ends_the_run_after_some(
    script, argv, tmp_path, monkeypatch, capsys
):
    out, own, steps = str(tmp_path / "run"), torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, clip):
        parameters = list(parameters)
        steps.append(0)
        if len(steps) != 2:
            parameters[0].grad[0, 0] = math.nan
        return own(parameters, clip)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(SystemExit):
        script.main(argv + ["--steps", "9", "--give-up", "3", "--out", out])
    assert len(steps) == 5 and "not_finite.jsonl" in capsys.readouterr().err
    rows = [json.loads(line) for line in open(os.path.join(out, "not_finite.jsonl"))]
    assert [row["step"] for row in rows] == [1, 3, 4, 5] and rows[0]["rows"][0]["response_ids"]
    assert not os.path.exists(os.path.join(out, "model.safetensors"))


def test_one_seed_fixes_everything(tmp_path):
    runs = [str(tmp_path / name) for name in "abc"]
    for out, seed in zip(runs, "001"):
        opsd.main(["--steps", "2", "--filter", "all", "--seed", seed, "--out", out] + SMALL)
    a, b, c = map(lines_without_times, runs)
    assert a == b != c and torch.equal(weights(runs[0]), weights(runs[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks. Two of gloo do in `two_ranks`, below, what the tests do on one and then compare; greedy sampling or given rollouts make both see the same.

SHORT = ["--threads", "1", "--device", "cpu", "--steps", "2", "--eval-problems", "3", "--overwrite"]
GREEDY = [
    *SHORT,
    "--filter",
    "all",
    "--temperature",
    "0",
    "--max-new-tokens",
    "100",
    "--batch",
    "5",
    "--lr",
    "1e-3",
]
RANKS = {
    "opsd": (
        opsd,
        [*GREEDY, "--teacher", "ema", "--micro-tokens", "300", "--kl-by-position", "8"],
    ),  # other numbers of micro-batches on the two ranks
    "lone": (
        opsd,
        [*GREEDY, "--batch", "1", "--context", "reflection", "--context-tokens", "200"],
    ),  # nothing to sample, write or score for one of them
    "tied": (opsd, [*GREEDY, "--model", "TIED", "--teacher", "current", "--max-new-tokens", "20"]),
    "rlvr": (
        rlvr,
        [
            *SHORT,
            "--temperature",
            "0",
            "--batch",
            "3",
            "--group",
            "4",
            "--updates",
            "2",
            "--kl",
            "0.1",
            "--micro-tokens",
            "500",
            "--lr",
            "1e-3",
        ],
    ),
    "sft": (
        sft,
        [
            *(flag for flag in SHORT if flag not in ("--eval-problems", "3")),
            "--batch",
            "5",
            "--micro-tokens",
            "300",
        ],
    ),
}
LEAN = {
    "opsd": ["--checkpointing", "--offload", "--teacher-tokens", "100000"],
    "tied": ["--offload"],
    "rlvr": ["--checkpointing"],
}
LOW = [*GREEDY, "--dtype", "bfloat16", "--lr", "1e-6", "--eval-problems", "0"]


def given_rollouts(monkeypatch):
    """rlvr.py's training rollouts are reference traces of different lengths, right and wrong in turns, on any number of ranks."""

    def make(sampler, tokenizer, problems, args, seed, contexts=None):
        rollouts = some_rollouts(tokenizer, len(problems), seed)
        for i, r in enumerate(rollouts):
            r.response_ids, r.outcome = (
                r.response_ids[: 20 + 9 * i],
                "correct" if i % 3 else "incorrect",
            )
        return rollouts

    monkeypatch.setattr(rlvr, "make_rollouts", make)
    monkeypatch.setattr(rlvr, "grade_rollouts", lambda *args: None)


def two_ranks(folder):
    """What each rank does, started by torchrun with this file as script. The runs go to `folder`, what a rank saw to seen-RANK.json there."""
    seen = {}
    monkeypatch = pytest.MonkeyPatch()
    given_rollouts(monkeypatch)
    monkeypatch.setattr(ranks, "stop", lambda: None)  # several scripts in one process
    own, deals = common.deal, []
    monkeypatch.setattr(opsd, "deal", lambda *args: deals.append(own(*args)) or deals[-1])
    fill = lambda argv: [os.path.join(folder, "tied") if flag == "TIED" else flag for flag in argv]
    for name, (script, argv) in RANKS.items():
        script.main(fill(argv) + ["--out", os.path.join(folder, "two-" + name)])
        seen[name] = [[counts for _, counts in dealt] for dealt in deals]
        deals.clear()
        if name in LEAN:
            script.main(fill(argv) + LEAN[name] + ["--out", os.path.join(folder, "lean-" + name)])
            deals.clear()
    opsd.main(LOW + ["--out", os.path.join(folder, "two-low")])
    argv = [
        "--threads",
        "1",
        "--device",
        "cpu",
        "--model",
        TINY,
        os.path.join(folder, "two-opsd"),
        "--problems",
        "5",
        "--samples",
        "1",
        "--temperature",
        "0",
    ]
    evaluation.main(argv + ["--out", os.path.join(folder, "two.json")])

    # a run that breaks off before the state of its fourth step is saved, resumed; and one that is not disturbed
    class Crash(Exception):
        pass

    save = common.Run.save_state
    argv = [*GREEDY, "--temperature", "1", "--teacher", "ema", "--steps", "5", "--state-every", "2"]
    monkeypatch.setattr(
        common.Run,
        "save_state",
        lambda run, step, *rest, **kwargs: (
            save(run, step, *rest, **kwargs) if step < 4 else (_ for _ in ()).throw(Crash)
        ),
    )
    try:
        opsd.main(argv + ["--out", os.path.join(folder, "cut")])
    except Crash:
        torch.distributed.barrier()
    monkeypatch.setattr(common.Run, "save_state", save)
    if ranks.rank_and_world()[0] == 0:
        shutil.copytree(
            os.path.join(folder, "cut"), os.path.join(folder, "cut-one")
        )  # to be resumed by one rank
    opsd.main(
        [flag for flag in argv if flag != "--overwrite"]
        + ["--out", os.path.join(folder, "cut"), "--resume"]
    )
    opsd.main(argv + ["--out", os.path.join(folder, "whole")])

    # responses of a rank's own; a gradient that is not finite on one of them; equal prompts in bfloat16
    args = opsd.parse_args(["--dtype", "bfloat16", "--device", "cpu"])
    model, tokenizer = load_model(TINY, CPU)
    rollouts = rollout.make_rollouts(
        make_sampler(model, tokenizer, args),
        tokenizer,
        embedded_problems(1, 0, False, 1.0) * 8,
        args,
        0,
    )
    seen["responses"] = [r.response_ids for r in rollouts]
    seen["turns"] = ranks.gather([[0], [1, 1, 1]][ranks.rank_and_world()[0]])
    teacher = opsd.frozen_copy(model)
    ranks.prepare(model, args, CPU), ranks.prepare(teacher, args, CPU, low=True)
    given = some_rollouts(tokenizer, 3)
    loss, _ = opsd.accumulate_gradients(
        model, teacher, given, [[r.prompt_ids, r.response_ids] for r in given], args
    )
    seen["equal"] = [loss, max(ranks.full(p.grad).abs().max().item() for p in model.parameters())]
    before = [p.to_local().clone() for p in model.parameters()]
    if ranks.rank_and_world()[0] == 1:
        next(model.parameters()).grad.to_local()[0, 0] = math.nan
    norm, stepped = common.optimizer_step(
        model, torch.optim.AdamW(model.parameters(), fused=True), 1.0
    )
    seen["skipped"] = [
        math.isnan(norm),
        stepped,
        all(map(torch.equal, before, [p.to_local() for p in model.parameters()])),
    ]
    json.dump(seen, open(os.path.join(folder, f"seen-{ranks.rank_and_world()[0]}.json"), "w"))


def torchrun(*command):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command]


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """(the folder in which two ranks left their runs, what each of them saw); beside them the same runs of one rank, named one-..."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tied(tokenizer, folder / "tied")
        process = subprocess.Popen(
            torchrun(__file__, str(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        try:
            said = process.communicate(timeout=1200)[0]
        finally:
            process.terminate()  # a hang: torchrun ends its ranks
        assert process.returncode == 0, said[-3000:]
        given_rollouts(monkeypatch)
        for name, (script, argv) in RANKS.items():
            script.main(
                [str(folder / "tied") if flag == "TIED" else flag for flag in argv]
                + ["--out", str(folder / f"one-{name}")]
            )
    return folder, [json.load(open(folder / f"seen-{rank}.json")) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(RANKS))
def test_two_ranks_train_as_one(name, pair):
    folder, seen = pair
    one, two = metrics(folder / f"one-{name}"), metrics(folder / f"two-{name}")
    assert two[0]["ranks"] == 2 and one[0]["ranks"] == 1
    steps = [row for row in two if "loss" in row]
    assert len(steps) == 2 and all(
        row["loss_tokens"] > 0 and row["grad_norm"] > 1e-3 for row in steps
    )
    close = lambda a, b: (
        a == b if not isinstance(a, float) else a == pytest.approx(b, rel=1e-4, abs=1e-6)
    )
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.keys() == b.keys()
        assert [
            key
            for key in a
            if "second" not in key and "memory" not in key and not close(a[key], b[key])
        ] == []
    start = (
        sft.build_tiny(0)[0].state_dict()
        if name == "sft"
        else load_model(one[0]["args"]["model"], CPU)[0].state_dict()
    )
    a, b = (load_model(str(folder / f"{count}-{name}"), CPU)[0] for count in ("one", "two"))
    moved = torch.cat([(value - start[key]).flatten() for key, value in a.state_dict().items()])
    apart = torch.cat(
        [(value - b.state_dict()[key]).flatten() for key, value in a.state_dict().items()]
    )
    assert moved.norm() > 0 and apart.norm() < 1e-3 * moved.norm()
    assert sorted(os.listdir(folder / f"one-{name}")) == sorted(os.listdir(folder / f"two-{name}"))
    if name == "tied":
        assert os.path.getsize(folder / "two-tied" / "model.safetensors") == os.path.getsize(
            folder / "one-tied" / "model.safetensors"
        )
    if name in LEAN:  # memory is saved, and nothing else changes
        assert (
            weights(folder / f"lean-{name}") - weights(folder / f"two-{name}")
        ).norm() < 1e-3 * moved.norm()
    if name == "opsd":  # step 1: three micro-batches here and two there, and one for show
        assert (
            sorted(counts.count(True) for counts in (seen[0][name][0], seen[1][name][0])) == [2, 3]
            and False in seen[1][name][0]
        )
    if name == "lone":
        assert seen[0][name][0] == [True] and seen[1][name][0] == [False]


def test_two_ranks_draw_their_own_and_agree_on_everything_else(pair):
    folder, seen = pair
    assert (
        seen[0]["responses"] == seen[1]["responses"]
        and seen[0]["responses"][0::2] != seen[0]["responses"][1::2]
    )  # dealt to the two in turns
    assert [s["turns"] for s in seen] == [[0, 1, 1, 1]] * 2  # lists of different lengths
    assert [s["skipped"] for s in seen] == [
        [True, False, True]
    ] * 2  # one rank's gradient was not finite: neither steps
    assert [s["equal"] for s in seen] == [
        [0.0, 0.0]
    ] * 2  # equal prompts: teacher and student compute the very same


def test_two_ranks_resume_as_if_undisturbed_and_one_goes_on_with_their_state(
    pair, tmp_path, capsys
):
    folder, _ = pair
    assert torch.equal(weights(folder / "cut"), weights(folder / "whole")) and lines_without_times(
        folder / "cut"
    ) == lines_without_times(folder / "whole")
    assert metrics(folder / "cut")[-2]["step"] == 5
    args = metrics(folder / "cut-one")[0]["args"]
    assert [name[:13] for name in os.listdir(folder / "cut-one") if name.startswith("state")] == [
        "state-0000002"
    ]
    argv = [
        *GREEDY,
        "--temperature",
        "1",
        "--teacher",
        "ema",
        "--steps",
        "5",
        "--state-every",
        "2",
        "--resume",
        "--out",
        args["out"],
    ]
    os.rename(folder / "cut", folder / "cut-two"), os.rename(folder / "cut-one", folder / "cut")
    opsd.main([flag for flag in argv if flag != "--overwrite"])
    assert "resumed after step 2" in capsys.readouterr().out and [
        row["step"] for row in metrics(folder / "cut")[1:]
    ] == [1, 2, 3, 4, 5, 5]
    assert metrics(folder / "cut")[2] == metrics(folder / "cut-two")[2]


def test_two_ranks_evaluate_as_one(pair):
    folder, _ = pair
    evaluation.main(
        [
            "--threads",
            "1",
            "--model",
            TINY,
            str(folder / "two-opsd"),
            "--problems",
            "5",
            "--samples",
            "1",
            "--temperature",
            "0",
            "--out",
            str(folder / "one.json"),
        ]
    )
    one, two = (json.load(open(folder / name)) for name in ("one.json", "two.json"))
    assert one["records"] == two["records"] and one["responses"] == two["responses"]


def test_bfloat16_computes_low_and_keeps_what_a_small_step_adds(pair, tmp_path, model):
    folder, _ = pair
    opsd.main(LOW + ["--out", str(tmp_path / "one")])
    start, reference = weights(TINY), metrics(folder / "one-opsd")[1]
    for out in (tmp_path / "one", folder / "two-low"):
        assert load_model(str(out), CPU)[0].dtype == torch.float32
        assert (weights(out) != start).float().mean() > 0.85  # float32 masters keep steps of 1e-6
        assert metrics(out)[1]["loss"] != reference["loss"] and metrics(out)[1][
            "loss"
        ] == pytest.approx(reference["loss"], rel=0.05)
    low = opsd.frozen_copy(model).requires_grad_(True).bfloat16()
    before = torch.cat([p.detach().flatten() for p in low.parameters()]).clone()
    for p in low.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(low.parameters(), lr=1e-6, weight_decay=0).step()
    assert (
        torch.cat([p.detach().flatten() for p in low.parameters()]) == before
    ).float().mean() > 0.9  # what it would be otherwise


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_computes_twice_and_changes_nothing(dtype, model, tokenizer):
    rollouts, results, counts = some_rollouts(tokenizer), [], []
    rows = [(r.prompt_ids, r.response_ids) for r in rollouts]
    for flags in ([], ["--checkpointing"]):
        student, args, calls = (
            opsd.frozen_copy(model).requires_grad_(True),
            opsd.parse_args(["--dtype", dtype, *flags]),
            [],
        )
        ranks.prepare(student, args, CPU)
        hook = student.base_model.layers[0].mlp.register_forward_pre_hook(
            lambda *_: calls.append(flags)
        )
        loss, gradient = loss_and_gradient(
            student, opsd.frozen_copy(model), rollouts, teacher_prompts(tokenizer, rollouts)
        )
        counts.append(len(calls))
        hook.remove()
        samples = make_sampler(student, tokenizer, args).sample(
            [r.prompt_ids for r in rollouts], 40, temperature=0
        )
        results.append((loss, gradient.tolist(), samples))
        twin = opsd.frozen_copy(
            student
        )  # computes with its own weights, not with those that it was copied from
        with torch.no_grad():
            before = response_hidden(twin, rows)
            student.base_model.layers[0].mlp.down_proj.weight.zero_()
            assert torch.equal(before, response_hidden(twin, rows)) and not torch.equal(
                before, response_hidden(student, rows)
            )
    assert results[0] == results[1] and counts == [1, 2]


def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path):
    out = str(tmp_path / "run")
    command = torchrun(
        os.path.join(HERE, "opsd.py"),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--filter",
        "all",
        "--batch",
        "4",
        "--eval-problems",
        "0",
        "--max-new-tokens",
        "40",
        "--steps",
        "12",
        "--state-every",
        "1",
        "--out",
        out,
    )
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    deadline = time.time() + 300
    while (
        not (os.path.isdir(out) and common.find_states(out))
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.05)
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    assert len(workers) == 2 and process.poll() is None
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.time()
    said = process.communicate(timeout=60)[0]
    assert (
        time.time() - killed < 60
        and process.returncode != 0
        and re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", said)
        and "SIGKILL" in said
    )
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    newest = common.find_states(out)[0]
    assert newest == f"{newest[:13]}-{common.checksum(os.path.join(out, newest))}.pt"
    resumed = subprocess.run(
        command + ["--resume"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (
        resumed.returncode == 0
        and f"resumed after step {int(newest[6:13])}" in resumed.stdout
        and not common.find_states(out)
    )
    assert [row["step"] for row in metrics(out)[1:]] == list(range(1, 13)) and weights(
        out
    ).isfinite().all()


def test_dry_run_prints_prompts_and_memory_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (
        monkeypatch.setattr(common, "load_model", None),
        monkeypatch.setattr(opsd, "load_model", None),
    )  # no weights
    for script, argv, prompts in (
        (opsd, ["--context", "solution"], 2),
        (opsd, ["--context", "reflection", "--teacher", "ema"], 2),
        (rlvr, [], 1),
        (sft, [], 1),
    ):
        script.main([*argv, "--dry-run", "--out", str(tmp_path / "run")])
        said = capsys.readouterr().out
        assert (
            said.count("<|im_start|>assistant") == prompts
            and "peak of training, ranks 1" in said
            and said.rstrip().endswith("nothing was written")
        )
        assert "solution" not in argv or "The answer is" in said
        assert ("(what the teacher will have written)" in said, "teacher" in said) == (
            "reflection" in argv,
            script is opsd,
        )
        assert not os.listdir(tmp_path)


def test_memory_estimate_is_near_what_torch_allocates_and_the_shapes_are_qwens():
    assert memory.check([("float32", ()), ("bfloat16", ("--checkpointing",))]) == pytest.approx(
        [1, 1], abs=0.15
    )
    assert [round(memory.sizes(memory.qwen3(name))[0] / 1e9, 2) for name in memory.QWEN3] == [
        1.72,
        4.02,
        8.19,
    ]  # billions, as the models' cards have them
    whole = lambda **flags: sum(
        memory.estimate(memory.qwen3("Qwen3-8B"), tokens=8192, sampler=False, **flags).values()
    )
    assert (
        whole(gpus=1)
        > whole(gpus=2)
        > whole(gpus=8)
        > whole(gpus=8, checkpointing=True)
        > whole(gpus=8, checkpointing=True, offload=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing left behind


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--filter", "corect"], "--filter"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "empty.jsonl"], "empty.jsonl: no rows"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
        (["--data", "no_answer.jsonl"], "no_answer.jsonl, line 2: no answer"),
        (["--data", "bad_gold.jsonl"], "bad_gold.jsonl, line 1: gold answer"),
        (["--data", "long.jsonl", "--eval-problems", "0"], "--max-new-tokens"),
        (["--data", "notes.txt"], "notes.txt"),
        (["--data", "broken.parquet"], "broken.parquet"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--beta", "1"], "--beta"),
        (["--data", "good.jsonl"], "--context: it needs a worked solution"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed -1"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--hard", "1.5"], "--hard"),
        (["--out", "taken"], "--out taken"),
        (["--max-new-tokens", "5000"], "--max-new-tokens 5000"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = '{"question": "1+1?", "answer": "2"}'
    write(tmp_path / "good.jsonl", good)
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "broken.jsonl", good, "{not json")
    write(tmp_path / "no_answer.jsonl", good, '{"question": "1+1?"}')
    write(tmp_path / "bad_gold.jsonl", '{"question": "1+1?", "answer": "}{"}')
    write(
        tmp_path / "long.jsonl",
        json.dumps({"question": "long " * 3000, "answer": "1", "solution": "1"}),
    )
    write(tmp_path / "notes.txt", "hello")
    write(tmp_path / "broken.parquet", "hello")
    (tmp_path / "taken").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as stop:
        opsd.main(argv)
    error = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and complaint in error[-1] and "Traceback" not in "".join(error)
    assert sorted(os.listdir(tmp_path)) == before


def changed_model(path, **config):
    """A copy of the embedded model whose tokenizer_config.json holds other entries (None removes one)."""
    shutil.copytree(TINY, path)
    file = os.path.join(path, "tokenizer_config.json")
    settings = {**json.load(open(file)), **config}
    json.dump({k: v for k, v in settings.items() if v is not None}, open(file, "w"))
    return str(path)


def test_hostile_model_directories_are_refused_by_name(tmp_path, capsys):
    def refused(path):
        with pytest.raises(SystemExit) as stop:
            load_model(str(path), CPU)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and error.startswith(f"error: --model {path}: ")
            and error.count("\n") == 1
        )
        return error

    template = changed_model(tmp_path / "template")
    open(os.path.join(template, "chat_template.jinja"), "w").write(
        "{{ raise_exception('only tools') }}"
    )
    assert "chat template fails" in refused(template)
    bare = changed_model(tmp_path / "bare")
    os.remove(os.path.join(bare, "chat_template.jinja"))
    assert "no chat template" in refused(bare)
    pickled = changed_model(tmp_path / "pickled")
    model, _ = load_model(TINY, CPU)
    os.remove(os.path.join(pickled, "model.safetensors"))
    torch.save(model.state_dict(), os.path.join(pickled, "pytorch_model.bin"))
    assert "safetensors" in refused(pickled)
    coded = changed_model(tmp_path / "coded")
    config = json.load(open(os.path.join(coded, "config.json")))
    json.dump(
        {
            **config,
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        },
        open(os.path.join(coded, "config.json"), "w"),
    )
    open(os.path.join(coded, "mine.py"), "w").write(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(coded)
    assert not os.path.exists(tmp_path / "ran")
    rotten = changed_model(tmp_path / "rotten")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    model.save_pretrained(rotten)
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in refused(rotten)
    endless = changed_model(tmp_path / "endless", eos_token=None)
    os.remove(os.path.join(endless, "generation_config.json"))
    file = os.path.join(endless, "config.json")
    json.dump({**json.load(open(file)), "eos_token_id": None}, open(file, "w"))
    assert "end-of-sequence" in refused(endless)


def test_a_temperature_without_do_sample_can_be_saved(tmp_path):
    path = changed_model(tmp_path / "model")
    file = os.path.join(path, "generation_config.json")
    json.dump({**json.load(open(file)), "temperature": 0.6}, open(file, "w"))
    common.save_model(str(tmp_path / "saved"), *load_model(path, CPU))
    assert load_model(str(tmp_path / "saved"), CPU)[0].generation_config.temperature == 0.6


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    (out / "step-1").mkdir(parents=True)
    for name in ("train.jsonl", "notes.txt"):
        write(out / name, "x")
    with pytest.raises(SystemExit):
        opsd.main([*SMALL, "--overwrite", "--out", str(out)])
    assert "not the directory of a run" in capsys.readouterr().err and len(os.listdir(out)) == 3
    write(out / "metrics.jsonl", "{}"), write(out / "model.safetensors", "x")
    with pytest.raises(SystemExit):
        opsd.main([*SMALL, "--overwrite", "--out", str(out), "--model", os.path.join(out, "")])
    assert "is --model as well" in capsys.readouterr().err and len(os.listdir(out)) == 5
    monkeypatch.setattr(opsd, "accumulate_gradients", lambda *args: opsd.fail("stop"))
    with pytest.raises(SystemExit):
        opsd.main(
            [*SMALL, "--filter", "all", "--eval-problems", "0", "--overwrite", "--out", str(out)]
        )
    assert sorted(os.listdir(out)) == [
        "metrics.jsonl",
        "notes.txt",
        "samples.jsonl",
        "train.jsonl",
    ]  # no model of another run beside this one's log


def test_a_machine_without_git_trains(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.provenance()["commit"] is None


def test_sft_does_not_open_a_think_block_twice(tokenizer, monkeypatch):
    problem = Problem("1+1?", "2", "1+1=2")
    prompt, response = sft.real_row(tokenizer, problem, 2)
    assert tokenizer.decode(response[:-1]) == "<think>\n1+1=2\n</think>\n\n\\boxed{2}"
    monkeypatch.setattr(
        sft, "render_prompt", lambda *args: prompt + tokenizer("<think>\n").input_ids
    )
    assert (
        tokenizer.decode(sft.real_row(tokenizer, problem, 2)[1][:-1])
        == "1+1=2\n</think>\n\n\\boxed{2}"
    )


def test_sft_without_one_update_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "optimizer_step", lambda *args: (math.nan, False))
    with pytest.raises(SystemExit):
        sft.main(["--batch", "2", "--threads", "1", "--steps", "2", "--out", str(tmp_path / "run")])
    assert "no step was taken" in capsys.readouterr().err and not os.path.exists(
        tmp_path / "run" / "model.safetensors"
    )


def test_a_tokenizer_without_eos_or_pad_trains_and_one_without_thinking_is_told(tmp_path, capsys):
    path = changed_model(
        tmp_path / "model", eos_token=None, pad_token=None
    )  # the generation config still names the eos
    tokenizer = load_model(path, CPU)[1]
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id is None
    rows = write(
        tmp_path / "d.jsonl",
        *[
            json.dumps(dict(question=p.question, answer=p.answer, solution=p.solution))
            for p in embedded_problems(6, 3)
        ],
    )
    sft.main(
        [
            "--model",
            path,
            "--data",
            rows,
            "--steps",
            "1",
            "--batch",
            "2",
            "--threads",
            "1",
            "--out",
            str(tmp_path / "sft"),
        ]
    )
    opsd.main(
        [
            "--model",
            path,
            "--data",
            rows,
            "--filter",
            "all",
            "--steps",
            "1",
            *SMALL,
            "--out",
            str(tmp_path / "opsd"),
        ]
    )
    assert metrics(tmp_path / "opsd")[1]["loss_tokens"] > 0
    open(os.path.join(path, "chat_template.jinja"), "w").write(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(SystemExit):
        opsd.main(["--model", path, "--thinking", "off", "--out", str(tmp_path / "off")])
    assert (
        "--thinking off: this model's chat template has no enable_thinking switch"
        in capsys.readouterr().err
    )


def test_oversized_and_repeated_rows_are_named_and_control_tokens_in_them_stay_text(
    tmp_path, capsys
):
    good = [
        dict(question=p.question, answer=p.answer, solution=p.solution)
        for p in embedded_problems(4, 3)
    ]
    rows = [
        *good,
        good[0],
        dict(question="9 " * 500_000, answer="1", solution="1"),
        dict(good[1], question="<|im_end|>\n<|im_start|>assistant\n<think>"),
    ]
    path = write(tmp_path / "d.jsonl", *map(json.dumps, rows))
    opsd.main(
        [
            "--model",
            TINY,
            "--data",
            path,
            "--filter",
            "all",
            "--steps",
            "1",
            *SMALL,
            "--out",
            str(tmp_path / "run"),
        ]
    )
    said = capsys.readouterr().out
    assert (
        "1 of 7 rows repeat an earlier question" in said
        and "dropped 1 of 7 problems, the first being number 6" in said
    )


def test_a_long_prompt_among_others_is_dropped_with_a_word(tokenizer, capsys):
    from rollout import drop_long

    args = opsd.parse_args(["--data", "x.jsonl"])
    problems = [
        Problem("1+1?", "2", "2"),
        Problem("long " * 3000, "1", "1"),
        Problem("short?", "2", "long " * 3000),
    ]
    assert drop_long(problems, tokenizer, args, 2048) == [problems[0], problems[2]]
    assert drop_long(problems, tokenizer, args, 2048, "solution") == problems[:1]
    assert "dropped 2 of 3 problems, the first being number 2" in capsys.readouterr().out


def test_a_filter_that_keeps_nothing_is_logged_and_then_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(opsd.FILTERS, "correct", lambda outcome: False)
    with pytest.raises(SystemExit) as stop:
        opsd.main(["--steps", "5", "--give-up", "2", "--out", str(tmp_path / "run")] + SMALL)
    assert (
        stop.value.code == 2
        and "--filter correct: kept nothing in 2 steps in a row" in capsys.readouterr().err
    )
    steps = metrics(tmp_path / "run")[1:]
    assert [s["kept"] for s in steps] == [0, 0] and not os.path.exists(
        tmp_path / "run" / "model.safetensors"
    )


def test_every_readme_command_parses():
    commands = re.findall(
        r"(?:python|torchrun --nproc-per-node \d+) (\w+)\.py([^\n&|#`;]*)",
        open(os.path.join(HERE, "README.md")).read(),
    )
    assert len(commands) > 5
    for script, line in commands:
        argv = shlex.split(line)
        module = {"opsd": opsd, "rlvr": rlvr, "sft": sft, "eval": evaluation, "kinds": kinds}.get(
            script
        )
        if module and "--help" not in argv:
            module.parse_args(argv)


if __name__ == "__main__":  # a rank, started by the fixture `pair`
    two_ranks(sys.argv[1])
