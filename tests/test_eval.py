"""Evaluation: measures, intervals, benchmarks."""

import gc
import gzip
import json
import os
import weakref

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import eval as evaluation
from data import Problem
from metrics import compare, interval, paired_bootstrap, per_problem, shift, summarise, table_of
from rollout import Rollout
from run import HERE
from tests.helpers import TINY, changed_model, graded, write

SFT = os.path.join(HERE, "tiny", "sft")


def sums(accuracy, length):
    """What per_problem returns of one response a problem."""
    return accuracy, length, np.ones(len(accuracy))


def test_bootstrap_intervals_cover_and_pair():
    def intervals(before, after):
        changes = paired_bootstrap(sums(*before), sums(*after))
        return [interval(*changes[key]) for key in ("accuracy", "length")]

    rng = np.random.default_rng(0)
    base, length = rng.random(400), rng.integers(20, 200, 400)
    points, percent = intervals((base, length), (base + 0.05, 0.8 * length))
    assert points == pytest.approx((5, 5, 5))  # paired: no width
    assert percent == pytest.approx((-20, -20, -20))
    noisy, _ = intervals((base, length), (rng.permutation(base), length))
    expected = 100 * 1.96 * (2 * base.var() / 400) ** 0.5
    assert noisy[1] < noisy[0] < noisy[2]
    assert noisy[2] - noisy[0] == pytest.approx(expected, rel=0.15)


def test_shift_counts_expected_repairs_and_damages():
    responses = np.full(3, 4)
    pairs = (np.array([0, 4, 2]), None, responses), (np.array([4, 3, 2]), None, responses)
    assert shift(*pairs) == dict(repaired=1.25, damaged=0.5, net=0.75)


def test_mean_over_benchmarks_weighs_benchmarks_alike_and_adds_shifts():
    outcomes = ["correct"] * 30 + ["incorrect"] * 10
    big = [("a", graded(outcomes, 100)), ("b", graded(outcomes, 80))]
    small = [("a", graded(["correct", "incorrect"], 10)), ("b", graded(["correct", "correct"], 10))]
    before, after = evaluation.compare_mean(dict(big=big, small=small))
    assert (before["accuracy"], before["length"], before["change"]) == (62.5, 55, None)
    assert after["accuracy"] == 87.5
    assert after["change"]["accuracy"][0] == 25
    assert after["change"]["length"][0] == pytest.approx(-10)
    assert after["shift"]["net"] == 1
    assert after["length_incorrect"] is None  # one benchmark has none


def test_a_repeated_question_is_one_problem_and_weighs_as_its_responses():
    """So that the change is the difference of the means beside it, and its interval as wide as that
    of the questions.
    """
    rng, one, two = np.random.default_rng(0), [], []
    for rows, right, longest in ((one, 0.5, 90), (two, 0.8, 50)):
        for question in range(60):
            for r in graded(rng.choice(["incorrect", "correct"], 4, p=[1 - right, right]), 0):
                text = str(question // 20 * question)  # 20 rows are one question
                r.problem = Problem(text, "1", difficulty="easy")
                r.response_ids = [0] * rng.integers(10, longest + question)
                rows.append(r)
    before, after = compare([("a", one), ("b", two)])
    points, percent = after["change"]["accuracy"], after["change"]["length"]
    assert points[0] == pytest.approx(after["accuracy"] - before["accuracy"])
    assert percent[0] == pytest.approx(100 * (after["length"] / before["length"] - 1))
    right, length, responses = per_problem(one)
    assert len(responses) == 41 and responses[0] == 80 and responses.sum() == len(one)
    assert length[0] == sum(len(r.response_ids) for r in one if r.problem.question == "0")
    # To answer twice alike tells nothing new.
    twice = [[r for r in rows for _ in range(2)] for rows in (one, two)]
    again = compare(list(zip("ab", twice, strict=True)))[1]["change"]
    assert again["accuracy"] == pytest.approx(points) and again["length"] == pytest.approx(percent)


def test_the_mean_of_two_equal_benchmarks_is_narrower_by_the_root_of_two():
    rng = np.random.default_rng(0)
    named = [
        (name, graded(rng.choice(["correct", "incorrect"], 400).tolist(), 10)) for name in "ab"
    ]
    one = compare(named)[1]["change"]["accuracy"]
    two = evaluation.compare_mean(dict(x=named, y=named))[1]["change"]["accuracy"]
    assert (one[2] - one[1]) / (two[2] - two[1]) == pytest.approx(2**0.5, rel=0.05)


def test_summary_keeps_the_groups_apart():
    def row(outcome, reason, n, text=""):
        ids = [0] * n
        return Rollout(Problem("q", "1"), [], ids, True, text, outcome=outcome, reason=reason)

    rows = [
        row("correct", "correct", 10, "wait, Wait await"),
        row("incorrect", "wrong", 20),
        row("incorrect", "no_answer", 30),
        row("truncated", "truncated", 40),
        row("incorrect", "timeout", 25),
    ]
    unfinished = Rollout(Problem("q", "1"), [], [0], False, "\\boxed{1}")
    assert evaluation.response_of(unfinished)["answer"] is None
    s = summarise(rows)
    assert (s["accuracy"], s["wrong"], s["no_answer"], s["truncated"]) == (20, 40, 20, 20)
    assert (s["length"], s["length_correct"], s["markers"]) == (25, 10, pytest.approx(16))


def test_a_context_that_leaves_no_room_is_none(tokenizer):
    args, rows = evaluation.parse_args(["--model", "x"]), [Rollout(Problem("q", "1"), [])] * 3
    texts = evaluation.drop_long_contexts(["", "long " * 3000, None], rows, tokenizer, args, 2048)
    assert texts == ["", None, None]


def test_a_rate_that_is_zero_everywhere_is_a_line_below_the_table():
    records = compare([("a", graded(["correct", "incorrect"], 10))])
    assert table_of(records).endswith("\ntruncated and no answer: 0.0%")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_model_at_a_time_is_in_memory(dtype, tmp_path, monkeypatch):
    load, loaded = evaluation.load_model, []

    def watched(*args):
        gc.collect()
        assert not any(model() for model in loaded)
        model, tokenizer = load(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluation, "load_model", watched)
    flags = "--context solution --problems 2 --samples 1 --max-new-tokens 9 --threads 1 --dtype"
    evaluation.main(["--model", TINY, changed_model(tmp_path / "second"), *flags.split(), dtype])
    assert len(loaded) == 2


def test_eval_averages_several_files_of_the_shapes_that_benchmarks_have(tmp_path, capsys):
    row = dict(problem="12 +3, result?", solution="12+3=15", answer="15", subject="Algebra")
    rows = pyarrow.Table.from_pylist([dict(**row, level=level) for level in (1, 2)])
    math500, out = str(tmp_path / "math500.parquet"), str(tmp_path / "e.json.gz")
    pyarrow.parquet.write_table(rows, math500)
    row = dict(problem="20 -4, result?", solution="20-4=16", answer="016", url="x", year="2024")
    aime = write(tmp_path / "aime24.jsonl", json.dumps(dict(id=60, **row)))
    flags = "--samples 4 --max-new-tokens 60 --context solution".split()
    evaluation.main(["--model", TINY, SFT, "--data", math500, aime, *flags, "--out", out])
    with gzip.open(out, "rt") as stream:  # packed, as its name says
        saved = json.load(stream)
    records, printed = saved["records"], capsys.readouterr().out
    groups = [(r["benchmark"], r["group"]) for r in records[:3]]
    assert groups == [("math500", "all"), ("math500", "1"), ("math500", "2")]
    assert len({r["name"] for r in records}) == 3
    assert (records[-1]["name"], records[-1]["benchmark"]) == (SFT, "mean")
    assert "mean over the benchmarks" in printed
    for name, count in (("math500", 8), ("aime24", 4)):
        for rows in saved["responses"][name].values():
            assert len(rows) == count and len({row["question"] for row in rows}) == 1
            for row in rows:
                right = row["answer"] is not None and int(row["answer"]) == int(row["gold"])
                assert (row["verdict"] == "correct") == right
