"""Figures of our pipelines from evaluations, as eval.py writes them or results/ keeps them.

    python -m lab.plot pairs filters-*.json.gz contexts-*.json.gz --out pairs
    python -m lab.plot shift evaluation.json --out figure4

pairs: change of accuracy by what the teacher reads, a line a pipeline. shift: problems repaired and
damaged, a bar a branch, figure 4 of the paper. Several files are seeds of one thing where a name
differs in its trailing -SEED alone. Figures of a run's own logs: tools/plot.py.
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


# Right and whole references, and the others.
PANELS = (("solution", "answer", "instruction"), ("wrong", "other", "part"))


def pairs(axes, files):
    """Change of accuracy (points) with correct and with incorrect rollouts, a line a pipeline, by
    what the teacher reads; dots are means with their 95% interval over the pipelines.
    """
    found = changes(files)
    for panel, contexts in zip((axes, axes.inset_axes([1.15, 0, 1, 1])), PANELS, strict=True):
        prefixes = {context: f"{context}-" for context in contexts} | {"solution": ""}
        contexts = [context for context in contexts if f"{prefixes[context]}correct" in found]
        for place, context in enumerate(contexts):
            both = []
            for outcome, x in (("correct", place - 0.2), ("incorrect", place + 0.2)):
                records = found[prefixes[context] + outcome]
                values = [r["change"]["accuracy"][0] for r in records]
                mean, low, high = mean_interval(values)
                style = dict(fmt="o", markersize=5, capsize=3, color=COLOURS[outcome], zorder=3)
                label = f"{outcome} rollouts" if place == 0 else None
                bars = None if low is None else [[mean - low], [high - mean]]
                panel.errorbar(x, mean, yerr=bars, label=label, **style)
                both.append(values)
            panel.plot([place - 0.2, place + 0.2], both, color="#bbbbbb", linewidth=0.8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(contexts)), contexts)
        panel.set_xlabel("what the teacher reads")
        panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("change of accuracy, points")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


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
