"""The laboratory's tables and figures; the pretrained model's problems."""

import gzip
import itertools
import json
import os

import numpy as np
import pytest

from eval import response_of
from lab import gates, paper, plot, pretrained, seeds, table, top_tokens, traces
from lab import results as results_module
from lab.keep import outcomes_of
from metrics import DRAWS, compare, interval
from tests.helpers import graded, write
from tools.plot import COLOURS, figure


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
SETTLED = ["correct", "incorrect", "all"]
BRANCHES["settled"] = [f"settled-{name}{after}" for name in SETTLED for after in (" after 40", "")]
BRANCHES[table.GATED] = [branch for pair in plot.GATE.values() for branch in pair]
for picked, branch, _ in itertools.chain(*paper.PICKS.values()):
    if branch not in BRANCHES[picked]:
        BRANCHES[picked].append(branch)
BRANCHES["settled-contexts"].append("settled-wrong-incorrect")  # of TRACE_PICKS


def pairs(part, seed):
    """An evaluation in which every branch is right everywhere and 20 or 21 tokens shorter than the
    baseline, and the baseline right everywhere with the solution in its prompt.
    """
    branches = [branch for branch in BRANCHES[part] if branch != "rlvr reading solution"]
    baseline = f"runs/table/{'sft' if part == 'order' else 'rlvr'}-{seed}"
    named = [(baseline, graded(["correct"] * 3 + ["incorrect"], 100))]
    paths = []
    for branch in branches:
        run, _, step = branch.partition(" after ")
        paths.append(f"runs/table/{run}-{seed}" + (f"/step-{step}" if step else ""))
    for name in [f"{baseline} reading solution", *paths]:
        named.append((name, graded(["correct"] * 4, 80 - seed)))
    return named


def write_gz(path, *lines):
    with gzip.open(path, "wt") as stream:
        stream.write("\n".join(lines) + "\n")


def write_results(path, seed):
    """What reproduce.sh leaves of a seed: evaluations, logs of two runs."""
    for part in table.PARTS:
        named = pairs(part, seed)
        models = []
        for name, rollouts in named:
            rows = [response_of(r) for r in rollouts]
            models.append(outcomes_of(name, rows, 1))
        record = dict(
            args=dict(model=[name for name, _ in named], seed=seed),
            records=compare(named),
            traces={name: traces.trace_table([]) for name, _ in named},
            responses=dict(test=dict(questions=[], models=models)),
        )
        write_gz(path / "evaluations" / f"{part}-{seed}.json.gz", json.dumps(record))
    for name in ("correct", "incorrect"):
        rows = [dict(args=dict(out=f"runs/table/{name}-{seed}", seed=seed))]
        rows += [dict(step=step, kept=5 + step / 10, loss_tokens=step) for step in (20, 40, 80)]
        write_gz(path / "metrics" / f"{name}-{seed}.jsonl.gz", *map(json.dumps, rows))
    write_gz(path / "metrics" / f"settled-correct-{seed}.jsonl.gz", *map(json.dumps, way()))
    for _, gated in plot.GATE.values():
        row = json.dumps(dict(kept=1, loss_tokens=1, gate_mass=seed / 4))
        write_gz(path / "metrics" / f"{gated}-{seed}.jsonl.gz", row)


def way():
    """The log of 120 steps whose KL falls to a tenth and whose accuracy dips by 6 points."""
    rows = []
    for step in range(1, 121):
        kl = 0.5 if step < 40 else 0.05
        rows.append(dict(step=step, kept=9, loss_tokens=9, reverse_kl=kl))
        if step % 10 == 0:
            gained = {10: -6.0, 20: -3.0}.get(step, 2.0 - 0.5 * (step == 30))
            change = dict(accuracy=[gained, 0.0, 0.0])
            rows.append(dict(step=step, evaluation=[dict(group="all", change=change)]))
    return rows


def write_bench(path):
    """Benches with one gate."""
    keys = ("accuracy", "length", "gate_mass", "gradient", *gates.KINDS)
    record = dict(gate="the-digit", filter="incorrect", **{key: (0.5, 0.25, 0.75) for key in keys})
    for name in table.BENCHES:
        write_gz(path / "gates" / f"{name}.json.gz", json.dumps(dict(records=[record])))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository with the results of two seeds, and a README with a table that is stale."""
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "gates").mkdir()
    for seed in (1, 2):
        write_results(tmp_path, seed)
    write_bench(tmp_path)
    names = "experiments", "other-than-the-paper", "wrong-references", "agreement", "traces"
    marks = [line for name in names for line in (f"<!-- {name} -->", "old", "<!-- end -->")]
    write(tmp_path / "README.md", "before", *marks, "after")
    monkeypatch.setattr(table, "HERE", str(tmp_path))
    monkeypatch.setattr(results_module, "RESULTS", str(tmp_path))
    return tmp_path


def test_tables_from_the_runs_own_files(results, capsys):
    table.main("--seeds 1 2 --old-seeds 1 2 --real-seeds 1 2 --docs".split())
    readme = (results / "README.md").read_text()
    assert "old" not in readme.split("\n")
    assert readme.startswith("before\n") and readme.endswith("<!-- end -->\nafter\n")
    row = [
        "table 5: reinjection, all",
        "`python opsd.py --filter all --reinject 32`",
        "+25.0 [+25.0, +25.0]; -21.5 [-27.9, -15.1]",
        "-4.2 pp, -33%",
    ]
    assert f"| {' | '.join(row)} |" in readme
    ours = "+25.0 [+25.0, +25.0] | -21.5 [-27.9, -15.1]"
    assert f"\n| all, `--reinject 32` | {ours} | -4.2 pp, -33% |\n" in readme
    assert f"\n| correct, `--context other` | {ours} |\n" in readme  # none of these is the paper's
    gate = "| all responses, a wrong solution | +25.0 [+25.0, +25.0] | +25.0 [+25.0, +25.0] "
    assert f"\n{gate}| +0.0 [+0.0, +0.0] | -21.5, -21.5 | 38 |\n" in readme
    traces = readme.split("<!-- traces -->\n")[1].split("\n")[2:-3]
    assert [row.split(" | ")[0] for row in traces] == [f"| {name}" for name in table.TRACE_PICKS]
    printed = capsys.readouterr().out
    of_gate = "+0.5 [+0.2, +0.8]; +0%"
    assert f"| the-digit | 50.0 | 50.0 | 50.0 | 50.0 | 0.500 | {of_gate} |" in printed
    row = next(line for line in printed.split("\n") if line.startswith("| correct"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "100.0" and cells[4].startswith("+25.0") and cells[5] == "78.5"
    assert cells[6].startswith("-21.5 [-27.9, -15.1]") and cells[9:11] == ["9.7", "140"]
    row = "| settled-correct-1 | 100.0 | 100.0 | 70.0 | 10.0 | -6.0 | 10 | 30 | +2.0 |"
    assert row in printed  # the way


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
    drawn = np.random.default_rng(0).integers(50, size=(DRAWS, 50))
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
            expected = [interval(*pair) for pair in pairs]
            expected.append(results_module.mean_interval(estimates))
            expected.append(interval(np.mean(estimates), np.mean(draws, 0)))
            assert [cell.strip() for cell in row[2:]] == [*map(table.change, expected)]
    questions["8"] = ["1+2?"]
    with pytest.raises(SystemExit):
        seeds.seeds_table("x", "78")
    assert "seeds 7 8 have other problems" in capsys.readouterr().err


def test_check_names_the_tables_that_are_stale_and_writes_nothing(results, capsys):
    table.main("--seeds 1 2 --old-seeds 1 2 --real-seeds 1 2 --docs".split())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        table.main("--seeds 1 2 --old-seeds 1 2 --real-seeds 1 2 --check".split())
    assert stop.value.code == 0 and "stale" not in capsys.readouterr().out
    readme = results / "README.md"
    readme.write_text(readme.read_text().replace("+25.0", "+26.0", 1))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        table.main("--seeds 1 2 --old-seeds 1 2 --real-seeds 1 2 --check".split())
    assert stop.value.code == 1 and capsys.readouterr().out == "stale: README.md: experiments\n"
    after = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert before == after


def test_shift_is_a_bar_a_branch_whatever_the_seeds(results):
    files = [str(results / f"evaluations/filters-{seed}.json.gz") for seed in (1, 2)]
    plot.main(["shift", *files, "--out", str(results / "shift")])
    assert (results / "shift.png").stat().st_size > 5000 and (results / "shift.svg").exists()
    found = plot.changes(files)
    assert list(found)[0] == "rlvr reading solution" and {len(v) for v in found.values()} == {2}


def test_pairs_are_a_row_a_reference_and_outcome(monkeypatch):
    """Pipelines in which wrong references cost correct responses 10 and 30 points, and nothing else
    does; all are half as long.
    """

    def found(files):
        costs = {"settled-wrong-correct": (10, 30)}
        return {
            name: [dict(change=dict(accuracy=[-c], length=[-50])) for c in costs.get(name, (0, 0))]
            for (name,) in plot.PAIRS.values()
        }

    monkeypatch.setattr(plot, "changes", found)
    with figure(os.devnull) as axes:
        monkeypatch.setattr(axes.figure, "savefig", lambda *args, **kwargs: None)
        plot.pairs(axes, [])
        place = list(plot.PAIRS.values()).index(["settled-wrong-correct"])
        dots = [line for line in axes.get_lines() if list(line.get_xdata()) == [-10, -30]]
        (mean,) = [line for line in axes.get_lines() if list(line.get_xdata()) == [-20]]
        assert len(dots) == 1 and list(mean.get_ydata()) == [place]
        assert mean.get_color() == COLOURS["correct"]
        lengths = [list(line.get_xdata()) for line in axes.child_axes[0].get_lines()]
        assert lengths.count([-50, -50]) == len(plot.PAIRS) and [-50] in lengths
