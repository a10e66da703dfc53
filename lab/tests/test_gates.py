"""The bench of gates and the dial."""

import json
import os

import pytest
import torch

import opsd
import toy
from model import load_model
from rollout import Rollout
from tests.helpers import TINY, changed_model, read_lines
from tools import dial, gates, optimizer, plot


def test_the_dial_at_0_and_1_is_the_checkpoints(model, tokenizer):
    first = [p.detach().clone() for p in model.parameters()]
    second = [p + 0.1 * torch.randn_like(p) for p in first]
    for at, expected in [(1, second), (0, first), (1, second)]:
        dial.turn(model, first, second, at)
        assert all(map(torch.equal, model.parameters(), expected))
    dial.turn(model, first, second, 1.5)
    for weight, a, b in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(weight, a + 1.5 * (b - a))


def test_the_dials_table_holds_the_checkpoints_own_rows(tmp_path, capsys):
    """At 0 and at 1 the responses are those that eval.py draws from A and from B."""
    import eval as evaluation

    other = TINY.replace("rlvr", "sft")
    flags = "--problems 12 --samples 1 --threads 1 --max-new-tokens 90 --out".split()
    dial.main([TINY, other, "--at", "0", "0.5", "1", *flags, str(tmp_path / "d.json")])
    evaluation.main(["--model", TINY, other, *flags, str(tmp_path / "e.json")])
    assert "0.5 of the way" in capsys.readouterr().out
    d, e = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "de")
    of_dial, of_eval = d["responses"]["embedded"]["models"], e["responses"]["embedded"]["models"]
    for number, at in enumerate((0, 2)):
        for key in ("reasons", "lengths"):
            assert of_dial[at][key] == of_eval[number][key]
    assert of_dial[1]["lengths"] != of_dial[0]["lengths"]
    name, args, curve = plot.dial_of(str(tmp_path / "d.json"))
    change = next(r["change"] for r in e["records"] if r["name"] == other and r["group"] == "all")
    assert name == other and curve[0].tolist() == [0, 0, 0]
    assert curve[2].tolist() == [1, change["accuracy"][0], change["length"][0]]
    plot.main(["path", str(tmp_path / "d.json"), "--out", str(tmp_path / "dial")])
    assert (tmp_path / "dial.png").stat().st_size > 5000


def test_a_line_between_two_models_that_do_not_match_is_an_error(tmp_path, capsys):
    path = changed_model(tmp_path / "model", extra_special_tokens=["<|new|>"])
    with pytest.raises(SystemExit):
        dial.main([TINY, path, "--problems", "2", "--threads", "1"])
    error = capsys.readouterr().err
    assert "two vocabularies" in error and error.count("\n") == 1


def test_shares_let_through_equal_a_hand_count():
    names = ["other", "easy: check or go on", "easy: inside a check", "hard: the digit settled on"]
    rows = []
    for outcome, gate in (("correct", [1, 1, 0, 0]), ("incorrect", [0, 1, 0.5, 1])):
        r = Rollout(None, [], [0] * 4, outcome=outcome)
        r.token_classes = [toy.CLASS_NAMES.index(name) for name in names]
        r.measures = torch.tensor([[0.0] * 4] * 5 + [gate])
        rows.append(r)
    found = {name: gates.shares(rows, name, None) for name in ("correct", "incorrect", "all")}
    assert found["correct"] == dict(redundant=0.5, unknowable=0, rest=1)
    assert found["incorrect"] == dict(redundant=0.75, unknowable=1, rest=0)
    assert found["all"] == dict(redundant=0.625, unknowable=0.5, rest=0.5)
    assert gates.shares(rows, "not-correct", None) == found["incorrect"]


def test_every_gate_of_the_bench_parses_and_every_gate_is_in_it():
    used = set()
    for flags in gates.GATES.values():
        used |= set(opsd.parse_args(flags.split()).gate)
    assert used == set(opsd.GATES)


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


def test_frozen_moments_make_steps_in_proportion_to_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(3))
    gradient, moment = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([1.0, 4.0, 16.0])
    adam = optimizer.FrozenAdam([weight], lr=0.1, moments=[moment])
    for scale, expected in ((1, -0.1), (0, -0.1 - 0.1 * 0.9 * 0.1 / 0.19)):
        weight.grad = scale * gradient
        adam.step()
        wanted = expected * torch.tensor([1.0, -1.0, 1.0])
        torch.testing.assert_close(weight.detach(), wanted)


def test_another_optimizer_moves_other_weights_by_the_same_gradient(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opsd, "make_optimizer", opsd.make_optimizer)  # put back at the end
    flags = f"--model {TINY} --steps 1 --batch 8 --eval-problems 0 --threads 1 --lr 1e-4".split()
    run = str(tmp_path / "adamw")
    opsd.main([*flags, "--out", run])

    def weights(path):
        return torch.cat([weight.flatten() for weight in load_model(path, "cpu")[0].parameters()])

    moves = []
    for name in ("sgd", run):
        out = str(tmp_path / os.path.basename(name)) + "-2"
        optimizer.main([name, *flags, "--out", out])
        moves.append((weights(out) - weights(TINY)).detach())
    sgd, adam = moves
    # After one step Adam's moments are the squared gradient, so each weight moves by the rate.
    large = sgd.abs() > 1e-8
    expected = 1e-4 * sgd[large].sign()
    torch.testing.assert_close(adam[large], expected, rtol=0.05, atol=0)
    gradient = read_lines(tmp_path / "sgd-2" / "metrics.jsonl")[1]["grad_norm"]
    assert sgd.norm().item() == pytest.approx(1e-4 * gradient, rel=1e-2)
    with pytest.raises(SystemExit):
        optimizer.main([str(tmp_path / "nowhere"), *flags])
    assert "no state in it" in capsys.readouterr().err


def test_the_bench_hands_its_optimizer_on():
    args = gates.parse_args(["--optimizer", "runs/gates"])
    assert gates.optimizer(args, 7, "all") == ["tools.optimizer", "runs/gates/7/all-all"]
    assert gates.optimizer(gates.parse_args([]), 7, "all") == ["opsd"]
    args = gates.parse_args(["--optimizer", "sgd"])
    assert gates.optimizer(args, 7, "all") == ["tools.optimizer", "sgd"]


def test_the_bench_names_a_missing_pipeline_and_why_a_run_failed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gates.main(["--seeds", "7", "--out", str(tmp_path)])
    assert "runs/table/rlvr-7: no such directory" in capsys.readouterr().err
    args = gates.parse_args(["--pipelines", "nowhere", "--out", str(tmp_path)])
    assert "--model nowhere" in gates.train(args, 0, "all", "correct")
