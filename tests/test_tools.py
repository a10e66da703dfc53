"""Tools: tables, figures, memory, token classes."""

import argparse
import gzip
import json
import os

import numpy as np
import pytest
import torch

import eval as evaluation
import model as model_module
import opsd
import rlvr
import sft
import toy
from rollout import kl_by_position
from tests.helpers import graded, some_rollouts, write
from tools import (
    dose,
    gates,
    memory,
    paper,
    plot,
    pretrained,
    seeds,
    table,
    token_classes,
    top_tokens,
)
from tools import results as results_module


def test_token_classes_add_up_to_the_whole_kl(tokenizer, tmp_path, capsys):
    out = tmp_path / "k.json"
    flags = "--problems 10 --threads 1 --max-new-tokens 90 --out".split()
    token_classes.main([*flags, str(out)])
    saved = json.loads(out.read_text())
    assert sum(saved["count"].values()) == 10 and "easy: check or go on" in capsys.readouterr().out
    for outcome in saved["table"].values():
        assert all(value > -1e-3 and tokens > 0 for value, tokens in outcome.values())
    rollouts = some_rollouts(tokenizer, 6)
    for r in rollouts:
        r.measures = torch.rand(5, len(r.response_ids))
    found = token_classes.by_class(tokenizer, rollouts)
    for outcome in ("correct", "truncated"):
        kl = torch.cat([r.measures[0] for r in rollouts if r.outcome == outcome])
        total = sum(value for value, _ in found[outcome].values())
        assert total == pytest.approx(kl.sum().item(), rel=1e-5)
        assert sum(count for _, count in found[outcome].values()) == len(kl)


def test_top_tokens_by_mean_kl_with_the_place_of_the_largest(tmp_path, capsys):
    def line(outcome, values):
        best = [[("x", 0.9), ("y", 0.1)]] * 3
        views = dict(solution=dict(reverse_kl=values, teacher_best=best))
        tokens = dict(tokens=["a", "b", "a"], student_best=best)
        return json.dumps(dict(outcome=outcome, after=False, contexts=views, **tokens))

    file = tmp_path / "tokens.jsonl"
    write(file, line("correct", [1.0, 0.5, 4.0]), line("incorrect", [0.0, 2.0, 0.0]))
    top_tokens.main([str(file), "--least", "1"])
    correct, incorrect = capsys.readouterr().out.split("incorrect responses: 1")
    rows = [row.split(" | ") for row in correct.split("\n") if row.startswith("| `")]
    assert [row[:5] for row in rows] == [
        ["| `a`", "2", "2.500", "91", "`ab`"],
        ["| `b`", "1", "0.500", "9", "`a`"],
    ]
    assert "| `b` | 1 | 2.000 | 100 | `a` | `x` 0.90, `y` 0.10 |" in incorrect
    with pytest.raises(SystemExit):
        top_tokens.main([str(file), "--context", "answer"])
    assert "--context answer: not in" in capsys.readouterr().err


def test_pretrained_problems_end_right_and_traces_only_add_checks():
    steps, values = pretrained.steps_of("5 + 9 - 7")
    assert steps == [("5 + 9 = 14", "14 - 9 = 5"), ("14 - 7 = 7", "7 + 7 = 14")]
    assert values == [5, 14, 7]
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(50):
        lines = pretrained.redundant_trace(steps, rng).split("\n")
        assert [line.split(".")[0] for line in lines] == [step for step, _ in steps]
        lengths.add(len("".join(lines)))
    assert len(lengths) > 4


# ------------------------------------------------------------------------------------------------
# Tables and figures


BRANCHES = {part: [e.branch for e in paper.EXPERIMENTS if e.part == part] for part in table.PARTS}
BRANCHES["contexts"] += ["wrong-correct", "wrong-incorrect"]


def pairs(part, seed):
    """An evaluation in which every branch is right everywhere and 20 or 21 tokens shorter than the
    baseline, and the baseline right everywhere with the solution in its prompt.
    """
    branches = [branch for branch in BRANCHES[part] if branch != "rlvr reading solution"]
    baseline = f"runs/table/{'sft' if part == 'order' else 'rlvr'}-{seed}"
    named = [(baseline, graded(["correct"] * 3 + ["incorrect"], 100))]
    for name in [f"{baseline} reading solution", *(f"runs/table/{b}-{seed}" for b in branches)]:
        named.append((name, graded(["correct"] * 4, 80 - seed)))
    return named


def write_gz(path, *lines):
    with gzip.open(path, "wt") as stream:
        stream.write("\n".join(lines) + "\n")


def write_results(path, seed):
    """What reproduce.sh leaves of a seed: evaluations, metrics of runs, a run's KL by position."""
    for part in table.PARTS:
        named = pairs(part, seed)
        responses = [evaluation.responses_of(*pair, 1) for pair in named]
        record = dict(
            args=dict(model=[name for name, _ in named], seed=seed),
            records=evaluation.compare(named, 1),
            traces={name: toy.trace_table([]) for name, _ in named},
            responses=dict(test=dict(questions=[], models=responses)),
        )
        write_gz(path / "evaluations" / f"{part}-{seed}.json.gz", json.dumps(record))
    for name in ("correct", "incorrect"):  # the dial: RLVR's weights, then those of the branch
        before, _, branch = pairs("filters", seed)[:3]
        args = dict(at=[0, 1], models=["", f"runs/table/{name}-{seed}"], seed=seed)
        record = json.dumps(dict(args=args, records=evaluation.compare([before, branch], 1)))
        write_gz(path / "evaluations" / f"dial-{name}-{seed}.json.gz", record)
    grid = [f"grid-{rate}-{name}" for rate in table.RATES for name in ("correct", "incorrect")]
    for name in ["correct", "incorrect", *grid]:
        args = dict(out=f"runs/table/{name}-{seed}", seed=seed, model=f"runs/table/rlvr-{seed}")
        args |= dict(filter=name.rpartition("-")[2], context="solution", thinking="on", reinject=0)
        rows = [dict(args=dict(args, divergence="reverse_kl"))]
        for step in (20, 40, 80):
            rows.append(dict(step=step, kept=5 + step / 10, loss_tokens=step))
            rows.append(
                dict(step=step, evaluation=evaluation.compare(pairs("filters", seed)[:2], 1))
            )
        write_gz(path / "metrics" / f"{name}-{seed}.jsonl.gz", *map(json.dumps, rows))
    rollouts = pairs("filters", seed)[0][1]
    for r in rollouts:
        r.measures = torch.rand(5, 100)
    bins = kl_by_position(rollouts, 8)
    write_gz(path / f"kl-{seed}.jsonl.gz", *[json.dumps(dict(step=1, bin=8, **bins))] * 4)


def write_bench(path, name):
    """A bench with one gate."""
    keys = ("accuracy", "length", "gate_mass", "gradient", *gates.KINDS)
    record = dict(gate="the-digit", filter="incorrect", **{key: (0.5, 0.25, 0.75) for key in keys})
    write_gz(path / "gates" / f"{name}.json.gz", json.dumps(dict(records=[record])))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository with the results of two seeds, and a README with a table that is stale."""
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "gates").mkdir()
    for seed in (1, 2):
        write_results(tmp_path, seed)
    for name in table.BENCHES:
        write_bench(tmp_path, name)
    write(tmp_path / "README.md", "before", "<!-- experiments -->", "old", "<!-- end -->", "after")
    monkeypatch.setattr(table, "HERE", str(tmp_path))
    monkeypatch.setattr(results_module, "RESULTS", str(tmp_path))
    return tmp_path


def test_tables_from_the_runs_own_files(results, capsys):
    table.main("--seeds 1 2 --real-seeds 1 2 --docs".split())
    readme = (results / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith("before\n") and readme.endswith("<!-- end -->\nafter\n")
    row = [
        "table 5: reinjection, all",
        "`python opsd.py --filter all --reinject 32`",
        "+25.0 [+25.0, +25.0]; -21.5 [-27.9, -15.1]",
        "-4.2 pp, -33%",
    ]
    assert f"| {' | '.join(row)} |" in readme
    printed = capsys.readouterr().out
    of_gate = "+0.5 [+0.2, +0.8]; +0%"
    assert f"| the-digit | 50.0 | 50.0 | 50.0 | 50.0 | 0.500 | {of_gate} |" in printed
    assert f"| the-digit | {' | '.join([of_gate] * len(table.BENCHES))} |" in printed
    on_the_line = "+25.0 [+25.0, +25.0]; -21%"
    assert f"| 1 | {on_the_line} | {on_the_line} |" in printed
    row = next(line for line in printed.split("\n") if line.startswith("| correct"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "100.0" and cells[4].startswith("+25.0") and cells[5] == "78.5"
    assert cells[6].startswith("-21.5 [-27.9, -15.1]") and cells[9:11] == ["9.7", "140"]


def test_seeds_side_by_side_with_both_intervals_of_their_mean(monkeypatch, capsys):
    rng, right, lengths = np.random.default_rng(0), {}, {}
    for seed in "78":
        for name, share, mean in (("rlvr", 0.5, 90), ("correct", 0.9, 60), ("incorrect", 0.1, 30)):
            right[f"{name}-{seed}"] = rng.random((50, 2)) < share
            lengths[f"{name}-{seed}"] = rng.poisson(mean, (50, 2))

    def of_seed(seed):
        models = [
            dict(name=name, lengths=lengths[name], reasons=np.where(ok, "correct", "wrong"))
            for name, ok in right.items()
            if name.endswith(seed)
        ]
        return dict(responses=dict(test=dict(models=models, questions=questions[seed])))

    questions = {"7": ["1+1?"], "8": ["1+1?"]}
    monkeypatch.setattr(seeds, "evaluations", lambda part, seeds: map(of_seed, seeds))
    rows = [row.strip("|").split(" | ") for row in seeds.seeds_table("x", "78").split("\n")]
    assert rows[0][2:] == ["seed 7", "seed 8", "mean, over seeds", "mean, over problems "]
    names = ["correct", "incorrect", "incorrect against correct"]
    assert [row[0].strip() for row in rows[2::2]] == names
    drawn = np.random.default_rng(0).integers(50, size=(evaluation.DRAWS, 50))
    for name, after, before in (
        ("correct", "correct", "rlvr"),
        ("incorrect against correct", "incorrect", "correct"),
    ):
        first = 2 + 2 * names.index(name)
        pairs = [(after + f"-{seed}", before + f"-{seed}") for seed in "78"]
        gained = [100.0 * (right[a].mean(1) - right[b].mean(1)) for a, b in pairs]
        points = [(g.mean(), g[drawn].mean(1)) for g in gained]
        percent = [
            [100 * (lengths[a][i].mean((-2, -1)) / lengths[b][i].mean((-2, -1)) - 1)]
            for a, b in pairs
            for i in (np.arange(50), drawn)
        ]
        percent = [(*percent[i], *percent[i + 1]) for i in (0, 2)]
        for row, pairs in ((rows[first], points), (rows[first + 1], percent)):
            estimates, draws = zip(*pairs, strict=True)
            expected = [evaluation.interval(*pair) for pair in pairs]
            expected.append(results_module.mean_interval(estimates))
            expected.append(evaluation.interval(np.mean(estimates), np.mean(draws, 0)))
            assert [cell.strip() for cell in row[2:]] == [*map(table.change, expected)]
    questions["8"] = ["1+2?"]
    with pytest.raises(SystemExit):
        seeds.seeds_table("x", "78")
    assert "seeds 7 8 have other problems" in capsys.readouterr().err


def test_check_names_the_tables_that_are_stale_and_writes_nothing(results, capsys):
    table.main("--seeds 1 2 --real-seeds 1 2 --docs".split())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        table.main("--seeds 1 2 --real-seeds 1 2 --check".split())
    assert stop.value.code == 0 and "stale" not in capsys.readouterr().out
    readme = results / "README.md"
    readme.write_text(readme.read_text().replace("+25.0", "+26.0"))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        table.main("--seeds 1 2 --real-seeds 1 2 --check".split())
    assert stop.value.code == 1 and capsys.readouterr().out == "stale: README.md: experiments\n"
    after = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert before == after


def test_a_seeds_name_is_left_out_where_settings_are_compared():
    assert plot.without_seed(["runs/real/train-2.jsonl", "runs/x-2/", 2], 2) == [
        "runs/real/train.jsonl",
        "runs/x",
        2,
    ]


@pytest.mark.parametrize(
    "figure, name",
    [
        ("plane", "evaluations/filters-{}.json.gz"),
        ("shift", "evaluations/filters-{}.json.gz"),
        ("trajectory", "metrics/correct-{}.jsonl.gz"),
        ("position", "kl-{}.jsonl.gz"),
    ],
)
def test_figures_from_the_runs_own_files(figure, name, results):
    files = [str(results / name.format(seed)) for seed in (1, 2)]
    plot.main([figure, *files, "--out", str(results / figure)])
    assert (results / f"{figure}.png").stat().st_size > 5000
    assert (results / f"{figure}.svg").exists()


def test_position_leaves_out_where_few_rollouts_are_left(tmp_path, monkeypatch, capsys):
    bins = dict(kl=[8.0, 60.0, 90.0], tokens=[80, 60, 9], rollouts=[10, 10, 9])
    outcomes = dict.fromkeys(plot.COLOURS, bins)
    write(tmp_path / "kl.jsonl", json.dumps(dict(step=1, bin=8, **outcomes)))
    with plot.figure(os.devnull) as axes:
        monkeypatch.setattr(axes.figure, "savefig", lambda *args, **kwargs: None)
        plot.position(axes, [str(tmp_path / "kl.jsonl")], argparse.Namespace(steps=None))
        line, counts = axes.get_lines()[0], axes.child_axes[0].get_lines()[0]
        np.testing.assert_allclose(line.get_ydata(), [0.1, 1.0, np.nan])
        assert list(line.get_xdata()) == [4, 12, 20] and list(counts.get_ydata()) == [10, 10, 9]
    bins["rollouts"] = [9, 9, 9]
    write(tmp_path / "few.jsonl", json.dumps(dict(step=1, bin=8, **outcomes)))
    with pytest.raises(SystemExit):
        plot.main(["position", str(tmp_path / "few.jsonl"), "--out", str(tmp_path / "f")])
    assert "no position with 10 rollouts" in capsys.readouterr().err


def test_pairs_are_a_line_a_pipeline_and_means_with_their_interval(monkeypatch):
    """Pipelines in which wrong references cost correct rollouts 10 and 30 points, and no other
    context anything.
    """

    def found(files):
        values = {}
        for context in sum(plot.PANELS, ()):
            for outcome in ("correct", "incorrect"):
                name = outcome if context == "solution" else f"{context}-{outcome}"
                costs = (10, 30) if name == "wrong-correct" else (0, 0)
                values[name] = [dict(change=dict(accuracy=[-cost])) for cost in costs]
        return values

    monkeypatch.setattr(plot, "changes", found)
    with plot.figure(os.devnull) as axes:
        monkeypatch.setattr(axes.figure, "savefig", lambda *args, **kwargs: None)
        plot.pairs(axes, [], None)
        panel = axes.child_axes[0]
        lines = [line.get_ydata() for line in panel.get_lines() if line.get_linestyle() == "-"]
        assert [list(y) for y in lines if len(y) == 2 and min(y) < 0] == [[-10, 0], [-30, 0]]
        (mean,) = [line for line in panel.get_lines() if list(line.get_ydata()) == [-20]]
        assert mean.get_color() == plot.COLOURS["correct"] and mean.get_xdata()[0] < 0
        assert all(not any(line.get_ydata()) for line in axes.get_lines())


def test_a_figure_from_another_figures_file_is_an_error(results):
    with pytest.raises(SystemExit):
        plot.main(["plane", str(results / "kl-1.jsonl"), "--out", str(results / "x")])


def test_dose_and_response_of_plain_branches_only(results):
    log = results / "metrics" / "incorrect-2.jsonl.gz"
    lines = (
        gzip.open(log, "rt").read().strip().replace('"reinject": 0', '"reinject": 32').split("\n")
    )
    write_gz(log, *lines)
    points = dose.read_points(["1", "2"])
    assert [(p["seed"], p["branch"]) for p in points] == [
        ("1", "correct"),
        ("1", "incorrect"),
        ("2", "correct"),
    ]
    assert all(p["dose"] == p["response"] == 25 for p in points)
    assert (
        "| solution | 2 | +25.0 [+25.0, +25.0] | +25.0 | +25.0 [+25.0, +25.0] |  |"
        in dose.dose_table(points)
    )


def test_the_slope_is_a_line_of_least_squares_with_an_interval_over_pipelines(tmp_path):
    rng = np.random.default_rng(0)
    points = []
    for seed in range(8):
        for context in dose.MARKERS:
            x = rng.uniform(0, 20)
            point = dict(seed=seed, filter="incorrect", context=context, dose=x, before=75)
            points.append(dict(point, response=1 - 0.5 * x + rng.normal(0, 0.1)))
    found, low, high = dose.slope(points)
    assert low < -0.5 < high < low + 0.05 and low < found < high
    with plot.figure(tmp_path / "dose") as axes:
        dose.draw(axes, points, dict(incorrect=(found, low, high)))
        drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
        (line,) = [line for line in drawn if "points a point" in str(line.get_label())]
        rise = np.diff(line.get_ydata()) / np.diff(line.get_xdata())
        assert rise[0] == pytest.approx(found) and (tmp_path / "dose.svg").exists() is False
    assert (tmp_path / "dose.svg").exists()


# ------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "script, flags, prompts",
    [
        ("opsd.py", "--context solution", 2),
        ("opsd.py", "--context reflection --teacher ema", 2),
        ("rlvr.py", "", 1),
        ("sft.py", "", 1),
    ],
)
def test_a_planned_run_prints_prompts_and_memory_and_leaves_nothing(
    script, flags, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for module in (model_module, opsd, rlvr, sft):
        monkeypatch.setattr(module, "load_model", None)  # no weights
    memory.main([script, *flags.split(), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.count("<|im_start|>assistant") == prompts
    assert "peak of training on each of 1 GPUs" in said
    assert said.rstrip().endswith("nothing was written")
    assert "solution" not in flags or "The answer is" in said
    assert ("(what the teacher will have written)" in said) == ("reflection" in flags)
    assert ("teacher" in said) == (script == "opsd.py")
    assert not os.listdir(tmp_path)


def test_memory_estimate_is_near_what_torch_allocates_and_the_shapes_are_qwens():
    ratios = memory.check([("float32", ()), ("bfloat16", ("--checkpointing",))])
    assert ratios == pytest.approx([1, 1], abs=0.15)
    # Billions, as the models' cards have them.
    billions = [round(memory.sizes(memory.qwen3(name)).all / 1e9, 2) for name in memory.QWEN3]
    assert billions == [1.72, 4.02, 8.19]

    def whole(**flags):
        config = memory.qwen3("Qwen3-8B")
        return sum(memory.estimate(config, tokens=8192, sampler=False, **flags).values())

    assert (
        whole(gpus=1)
        > whole(gpus=2)
        > whole(gpus=8)
        > whole(gpus=8, checkpointing=True)
        > whole(gpus=8, checkpointing=True, offload=True)
    )
