"""Classes of tokens, oracle gates from outside, what traces do, evaluations in short."""

import json

import numpy as np
import pytest
import torch

import eval as evaluation
import opsd
import toy_model
from data import Problem, embedded_problems
from lab import keep, oracles, traces
from rollout import Rollout
from run import HERE
from tests.helpers import TINY, read_lines

TRACE = Problem("53 +4 -26?, result?", "51", "53+4=57, 57-6=51", "hard")
TEXT = "<think>\n53+4=57 check 53+4=57\n57-2=55 wait 26 so 57-6=51\n</think>\n\n\\boxed{51}"


@pytest.fixture
def oracle_gates(monkeypatch):
    """The entries of lab/oracles.py, taken out again after the test."""
    monkeypatch.setattr(opsd, "GATES", dict(opsd.GATES))
    monkeypatch.setattr(opsd, "FILTERS", dict(opsd.FILTERS))
    oracles.add_oracles()


def test_token_classes_go_by_the_line_that_a_token_stands_in():
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
    for name, end in places:
        assert traces.token_class(TRACE, TEXT[: TEXT.index(end) + len(end)]) == name, end


def test_oracle_gates_on_a_hand_written_trace(tokenizer, oracle_gates):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    r = Rollout(TRACE, [], ids, outcome="correct", weight=1.0)
    traces.add_tags([r], tokenizer)
    names = [traces.CLASS_NAMES[number] for number in r.tags]
    texts = [tokenizer.decode([token]) for token in ids]
    assert names == [traces.token_class(TRACE, "".join(texts[:i])) for i in range(len(ids))]
    tokens, args = opsd.tokens_of([r], torch.device("cpu")), opsd.parse_args([])

    def let_through(name):
        gate = opsd.GATES[name](None, None, tokens, args).tolist()
        return "".join(text if g else "." for text, g in zip(texts, gate, strict=True))

    # The choice to check (made), what stands in the check, and the choice to check again (not
    # made: the line break). The check of the smudged digit is not redundant.
    assert let_through("redundant-checks").strip(".") == " check 53+4=57\n"
    digit = TEXT.index("6=51\n</think>")
    assert let_through("not-the-digit") == TEXT[:digit] + "." + TEXT[digit + 1 :]
    assert let_through("the-digit").strip(".") == "6"


def test_an_oracle_trains_from_outside_and_is_refused_on_other_data(tmp_path, oracle_gates, capsys):
    flags = "--filter all --gate the-digit --steps 1 --batch 12 --eval-problems 0 --threads 1"
    oracles.main([*flags.split(), "--model", TINY, "--out", str(tmp_path / "run")])
    (step,) = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert 0 < step["gate_mass"] < 0.05
    with pytest.raises(SystemExit):
        oracles.main(["--data", "x.jsonl", "--gate", "the-digit"])
    assert "embedded task only" in capsys.readouterr().err


def test_read_trace_tells_what_a_step_did():
    p = Problem("50 +23? -7 +26?, result?", "52", "50+3=53, 53-7=46, 46+6=52", "hard")
    lines = ["50+2=52 wait 23 so 50+3=53", "53-7=46 check 53-7=46", "46+2=48"]
    text = "<think>\n" + "\n".join(lines) + "\n</think>\n\n\\boxed{48}"
    expected = dict(
        hard=[1, 0, 1],
        first_right=[0, 1, 0],
        checked=[1, 1, 0],
        conflict=[1, 0, 1],
        careful=[1, 0, 0],
        right=[1, 1, 0],
    )
    rows = traces.read_trace(p, text)
    assert {key: [int(row[key]) for row in rows] for key in expected} == expected
    rows = traces.read_trace(p, "<think>\n50+3=54\n54-7=47\nnonsense\n")
    assert [row["right"] for row in rows] == [False, True]


@pytest.mark.parametrize("context", toy_model.CONTEXTS)
def test_reference_traces_have_every_step_right(context):
    rng = np.random.default_rng(0)
    pairs = [(p, toy_model.reference_trace(p, rng, context)) for p in embedded_problems(300, 0)]
    table = traces.trace_table(pairs)
    assert table["easy"]["right"] == table["hard"]["right"] == 100
    assert sum(row["steps"] for row in table.values()) == sum(
        len(p.solution.split(", ")) for p, _ in pairs
    )
    assert table["hard"]["checked"] > 50
    easy = table["easy"]["checked"]
    assert easy > 80 if context == "none" else easy < 5


def test_an_evaluation_is_kept_in_short(tmp_path):
    out, kept = str(tmp_path / "e.json"), str(tmp_path / "e.json.gz")
    flags = (
        f"--model {TINY} {HERE}/tiny/sft --context solution --problems 6 --samples 2 --threads 1"
    )
    evaluation.main([*flags.split(), "--max-new-tokens", "90", "--out", out])
    keep.main([out, kept])
    with open(out) as stream:
        whole = json.load(stream)
    short = keep.read_json(kept)
    assert short["records"] == whole["records"] and keep.compact(short) is short
    names = [TINY, f"{TINY} reading solution", f"{HERE}/tiny/sft"]
    responses = short["responses"]["embedded"]
    assert [model["name"] for model in responses["models"]] == names == list(short["traces"])
    assert len(responses["questions"]) == 6
    for model in responses["models"]:
        rows = whole["responses"]["embedded"][model["name"]]
        assert sum(model["reasons"], []) == [row["verdict"] for row in rows]
        assert sum(model["lengths"], []) == [row["length"] for row in rows]
    problems = {p.question: p for p in embedded_problems(6, 0, held_out=True)}
    pairs = [(problems[r["question"]], r["response"]) for r in whole["responses"]["embedded"][TINY]]
    assert short["traces"][TINY] == traces.trace_table(pairs)
