"""The bench of gates."""

import json

import pytest
import torch

import opsd
from lab import gates
from lab.traces import CLASS_NAMES
from rollout import Rollout
from tests.helpers import TINY, read_lines


@pytest.fixture(autouse=True)
def own_entries(monkeypatch):
    """What a test adds to the product's dicts is taken out again."""
    monkeypatch.setattr(opsd, "GATES", dict(opsd.GATES))
    monkeypatch.setattr(opsd, "FILTERS", dict(opsd.FILTERS))


def test_shares_let_through_equal_a_hand_count():
    names = ["other", "easy: check or go on", "easy: inside a check", "hard: the digit settled on"]
    rows = []
    for gate in ([1, 1, 0, 0], [0, 1, 0.5, 1]):
        r = Rollout(None, [], [0] * 4, tags=[CLASS_NAMES.index(name) for name in names])
        r.measures = dict(gate=torch.tensor(gate))
        rows.append(r)
    assert gates.shares(rows[:1]) == dict(redundant=0.5, unknowable=0, rest=1)
    assert gates.shares(rows) == dict(redundant=0.625, unknowable=0.5, rest=0.5)


def test_every_gate_of_the_bench_parses_and_every_gate_is_in_it():
    gates.add_oracles()
    used = {opsd.parse_args(flags.split()).gate for flags in gates.GATES.values()}
    product = {"all", "student-entropy", "teacher-entropy", "gap", "position", "agreement"}
    assert used == product | set(gates.ORACLES)


def test_the_bench_trains_once_and_goes_on(tmp_path, monkeypatch, capsys):
    argv = f"--seeds 0 --pipelines {TINY} --gates the-digit --filters all --steps 1".split()
    argv += ["--problems", "8", "--out", str(tmp_path)]
    gates.main(argv)
    row = next(line for line in capsys.readouterr().out.split("\n") if "| the-digit" in line)
    gate, redundant, unknowable, rest, mass, gradient, cell = row.strip("| ").split(" | ")
    assert (redundant, unknowable, rest) == ("0.0", "100.0", "0.0")  # that digit alone
    assert 0 < float(mass) < 5  # percent of the weight
    (step,) = read_lines(tmp_path / "0" / "the-digit-all" / "metrics.jsonl")[1:]
    assert gradient == f"{step['grad_norm']:.3f}"
    assert (tmp_path / "figure.png").stat().st_size > 5000
    records = json.loads((tmp_path / "0" / "evaluation.json").read_text())["records"]
    changes = {r["group"]: r["change"] for r in records if r["change"]}
    whole = changes["all"]
    points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*whole["accuracy"])
    assert cell == f"{points}; {whole['length'][0]:+.0f}%"
    (record,) = json.loads((tmp_path / "table.json").read_text())["records"]
    for key, group in (("accuracy_easy", "easy"), ("accuracy_hard", "hard"), ("accuracy", "all")):
        assert record[key] == changes[group]["accuracy"]
    assert record["length"] == whole["length"]
    table = (tmp_path / "table.md").read_text()
    monkeypatch.setattr(gates, "run", None)  # nothing is trained or evaluated again
    monkeypatch.setattr(gates, "load_model", None)  # nor measured
    gates.main(argv)
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(SystemExit):
        gates.main([*argv, "--steps", "2"])
    assert "has other --steps" in capsys.readouterr().err


def test_the_bench_names_a_missing_pipeline_and_why_a_run_failed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gates.main(["--seeds", "7", "--out", str(tmp_path)])
    assert "runs/table/rlvr-7: no such directory" in capsys.readouterr().err
    args = gates.parse_args(["--pipelines", "nowhere", "--out", str(tmp_path)])
    assert "--model nowhere" in gates.train(args, 0, "all", "correct")
