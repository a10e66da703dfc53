"""Figures of our pipelines from evaluations, as eval.py writes them or results/ keeps them.

    python -m lab.plot pairs settled-2*.json.gz settled-contexts-*.json.gz --out pairs
    python -m lab.plot shift evaluation.json --out figure4

pairs: changes by what the teacher reads and which responses are trained on. shift: problems
repaired and damaged, a bar a branch, figure 4 of the paper. Several files are seeds of one thing
where a name differs in its trailing -SEED alone. Figures of a run's own logs: tools/plot.py.
"""

if __name__ == "__main__":
    from launch import start

import numpy as np

from lab.results import branch_of, mean_interval
from run import Parser
from tools import read_json
from tools.plot import COLOURS, figure


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=list(FIGURES))
    add("files", nargs="+", help="evaluations, .json or .json.gz")
    add("--out", required=True, help=".png and .svg are written")
    return parser.parse_args(argv)


def changes(files):
    """{branch: [its record over all problems in each file that has it], ...}, baselines aside."""
    found = {}
    for file in files:
        evaluation = read_json(file)
        for record in evaluation["records"]:
            if record["group"] == "all" and record["change"]:
                branch = branch_of(record["name"], evaluation["args"]["seed"])
                found.setdefault(branch, []).append(record)
    if not found:
        raise ValueError("no checkpoint beside the baseline")
    return found


# Branch and label, from the top.
ROWS = {
    "settled-correct": "right reference,\ncorrect responses",
    "settled-incorrect": "right reference,\nincorrect responses",
    "settled-wrong-incorrect": "wrong reference,\nincorrect responses",
    "settled-wrong-correct": "wrong reference,\ncorrect responses",
}


def pairs(axes, files):
    """Change of accuracy (left) and of length (right) by what the teacher reads and which responses
    are trained on: a small dot a pipeline, a large one their mean with its 95% interval.
    """
    found = changes(files)
    panels = ("accuracy", axes), ("length", axes.inset_axes([1.06, 0, 0.6, 1], sharey=axes))
    for key, panel in panels:
        for place, branch in enumerate(ROWS):
            values = [r["change"][key][0] for r in found[branch]]
            mean, low, high = mean_interval(values)
            outcome = branch.rpartition("-")[2]
            style = dict(fmt="o", markersize=7, capsize=4, color=COLOURS[outcome], zorder=3)
            bars = None if low is None else [[mean - low], [high - mean]]
            panel.errorbar(mean, place, xerr=bars, **style)
            panel.plot(values, [place + 0.22] * len(values), "o", markersize=3, color="#9a9a9a")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_yticks(range(len(ROWS)), ROWS.values())
    axes.set_xlabel("change of accuracy, points")
    panels[1][1].tick_params(labelleft=False)
    panels[1][1].set_xlabel("change of length, percent")


def shift(axes, files):
    """Expected number of problems repaired (up) and damaged (down), and the net (dot): means over
    files.
    """
    found = changes(files)
    for x, records in enumerate(found.values()):
        repaired, damaged, net = (
            np.mean([r["shift"][key] for r in records]) for key in ("repaired", "damaged", "net")
        )
        names = ("repaired", "damaged", "net") if x == 0 else (None, None, None)
        axes.bar(x, repaired, color=COLOURS["correct"], width=0.6, label=names[0])
        axes.bar(x, -damaged, color=COLOURS["incorrect"], width=0.6, label=names[1])
        axes.plot(x, net, "o", color="black", label=names[2])
        style = dict(textcoords="offset points", fontsize=8)
        axes.annotate(f"{net:+.1f}", (x, net), xytext=(9, -3), **style)
    axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("expected problems")
    axes.legend(frameon=False, fontsize=8)


FIGURES = {"pairs": pairs, "shift": shift}


def main(argv=None):
    args = parse_args(argv)
    with figure(args.out) as axes:
        FIGURES[args.figure](axes, args.files)


if __name__ == "__main__":
    start(main)
