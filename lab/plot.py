"""Figures of our pipelines from evaluations, as eval.py writes them or results/ keeps them.

    python -m lab.plot pairs {settled,sibling,cap44}-*.json.gz --out pairs
    python -m lab.plot gate settled-gate-*.json.gz --out gate
    python -m lab.plot shift evaluation.json --out figure4

pairs: changes by what the teacher reads and which responses are trained on. gate: the same without
and with the gate `agreement`. shift: problems repaired and damaged, a bar a branch, figure 4 of the
paper. Several files are seeds of one thing where a name differs in its trailing -SEED alone.
Figures of a run's own logs: tools/plot.py.
"""

if __name__ == "__main__":
    from launch import start

from itertools import product

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


HOW = {"": "all tokens", "agreement-": "only those that the teacher would have written too"}
# {label: its branches}, from the top.
PAIRS = {
    "a right solution,\ncorrect responses": ["settled-correct"],
    "a right solution,\nincorrect responses": ["settled-incorrect"],
    "a right solution,\ntruncated responses": ["cap44-truncated"],
    "a correct sibling,\ncorrect responses": ["sibling-correct"],
    "a correct sibling,\nincorrect responses": ["sibling-incorrect"],
    "told to be concise,\ncorrect responses": ["settled-instruction-correct"],
    "told to be concise,\nincorrect responses": ["settled-instruction-incorrect"],
    "a wrong solution,\ncorrect responses": ["settled-wrong-correct"],
    "a wrong solution,\nincorrect responses": ["settled-wrong-incorrect"],
}
REFERENCES = {
    "": "the problem's solution",
    "other-": "another problem's solution",
    "wrong-": "a wrong solution",
    "instruction-": "told to be concise",
}
GATE = {
    f"{outcome} responses,\n{reference}": [f"settled-{how}{name}{outcome}" for how in HOW]
    for outcome in ("all", "incorrect")
    for name, reference in REFERENCES.items()
}


def pairs(axes, files):
    """Change of accuracy (left) and of length (right) by what the teacher reads and which responses
    are trained on.
    """
    colours = [[COLOURS[branches[0].rpartition("-")[2]]] for branches in PAIRS.values()]
    dots(axes, changes(files), PAIRS, colours)
    axes.figure.set_figheight(7)


def gate(axes, files):
    """The same of all tokens, and of those alone that the teacher would have written too."""
    colours = ["black", "#2166ac"]
    dots(axes, changes(files), GATE, [colours] * len(GATE))
    for name, colour in zip(HOW.values(), colours, strict=True):
        axes.plot([], [], "o", color=colour, label=name)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.figure.set_figheight(6)


def dots(axes, found, rows, colours):
    """A row a label, of each of its branches a small dot a pipeline and a large one, their mean
    with its 95% interval.
    """
    panels = ("accuracy", axes), ("length", axes.inset_axes([1.06, 0, 0.6, 1], sharey=axes))
    for (key, panel), (place, branches) in product(panels, enumerate(rows.values())):
        for number, (branch, colour) in enumerate(zip(branches, colours[place], strict=True)):
            values = [r["change"][key][0] for r in found[branch]]
            mean, low, high = mean_interval(values)
            bars = None if low is None else [[mean - low], [high - mean]]
            style = dict(fmt="o", markersize=7, capsize=4, color=colour, zorder=3)
            y = place + 0.4 * number
            panel.errorbar(mean, y, xerr=bars, **style)
            panel.plot(values, [y + 0.17] * len(values), "o", markersize=3, color="#9a9a9a")
    for _, panel in panels:
        panel.axvline(0, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(len(rows) - 0.3, -0.5)
    axes.set_yticks(range(len(rows)), rows)
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


FIGURES = {"pairs": pairs, "gate": gate, "shift": shift}


def main(argv=None):
    args = parse_args(argv)
    with figure(args.out) as axes:
        FIGURES[args.figure](axes, args.files)


if __name__ == "__main__":
    start(main)
