"""The paper's figures 1 to 4 and others from the runs' own files, as PNG and SVG.

    python -m tools.plot pairs filters-*.json contexts-*.json --out pairs
    python -m tools.plot path runs/*/metrics.jsonl --out figure1
    python -m tools.plot plane evaluation.json --out plane
    python -m tools.plot position runs/mine/kl_by_position.jsonl --out figure2
    python -m tools.plot trajectory runs/*/metrics.jsonl --out figure3
    python -m tools.plot shift evaluation.json --out figure4

pairs: change of accuracy by what the teacher reads, from reproduce.sh's evaluations. plane: change
of accuracy against change of length, a cross a checkpoint; shift: problems repaired and damaged;
both from what eval.py --out writes. position: per-token KL by position and outcome, summed over
steps, from opsd.py --kl-by-position. trajectory: accuracy and length over the steps; path: the same
steps in the plane; both from the logs of runs with --eval-every, path also from what tools.dial
--out writes.

Several files: runs, or evaluations, whose settings differ in the seed alone are seeds of one thing;
in a folder's name that is a trailing -SEED, the run's own. Files may be compressed (.gz).
"""

import json
import os
import re
from contextlib import contextmanager

import numpy as np

from cli import Parser, fail, start
from run import HARMLESS
from tools import open_text, read_json
from tools.results import mean_interval

COLOURS = {"correct": "#1b7837", "incorrect": "#b2182b", "truncated": "#8c8c8c"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=list(FIGURES))
    add("files", nargs="+", help="of the runs")
    add("--out", required=True, help=".png and .svg are written")
    add("--steps", type=int, help="position: only the first steps of the run (else all)")
    return parser.parse_args(argv)


def colour(name):
    return next((COLOURS[kind] for kind in ("incorrect", "correct") if kind in name), "#4d4d4d")


def read_lines(file):
    with open_text(file) as stream:
        return [json.loads(line) for line in stream]


# ------------------------------------------------------------------------------------------------
# Which files are seeds of one thing


def without_seed(value, seed):
    """A setting with -SEED taken off the end of a name, before its extension if it has one, or of
    each name in a list.
    """
    if isinstance(value, list):
        return [without_seed(item, seed) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(rf"-{seed}(?=(\.\w+)?$)", "", value.rstrip("/"))


def group_seeds(items):
    """{label: [value, ...]} of items (name, settings, value), values of one label being seeds.

    They are where the settings agree, but for the seed and what cannot matter, and no seed comes
    twice. The label is the name without folder and seed, where that is enough to tell labels apart.
    """
    groups = {}  # {what they share: {seed: (name, value)}}
    for name, settings, value in items:
        seed = settings["seed"]
        rest = {k: v for k, v in settings.items() if k not in HARMLESS - {"steps"} | {"seed"}}
        rest = {k: without_seed(v, seed) for k, v in rest.items()}
        key = json.dumps(rest, sort_keys=True)
        while seed in groups.get(key, {}):
            key += " again"
        groups.setdefault(key, {})[seed] = (without_seed(name, seed), value)
    names = [name_of([name for name, _ in members.values()]) for members in groups.values()]
    short = [os.path.basename(name) for name in names]
    labels = {}
    for name, base, members in zip(names, short, groups.values(), strict=True):
        label = base if short.count(base) == 1 else name
        while label in labels:
            label += "'"
        labels[label] = [value for _, value in members.values()]
    return labels


def name_of(seeds):
    others = len(set(seeds)) - 1
    return seeds[0] + (f" and {others} more" if others else "")


def changes(files):
    """The records with a change, a list a label: over all problems, and over the mean of the
    benchmarks where there are several.
    """
    items = []
    for file in files:
        evaluation = read_json(file)
        records = [r for r in evaluation["records"] if r["group"] == "all" and r["change"]]
        means = [r for r in records if r["benchmark"] == "mean"]
        # The other checkpoints of an evaluation do not matter, its baseline does.
        models = evaluation["args"]["model"]
        settings = dict(evaluation["args"], model=models[0], context=None)
        items += [(r["name"], dict(settings, name=r["name"]), r) for r in means or records]
    if not items:
        raise ValueError("no checkpoint beside the baseline")
    return group_seeds(items)


# ------------------------------------------------------------------------------------------------
# Figures: functions (axes, files, args)


def plane(axes, files, args):
    """Change of accuracy (points) against change of length (percent), each with its 95% interval
    over problems: a cross a checkpoint and file.
    """
    labels = []
    for name, records in changes(files).items():
        for record in records:
            y, y_low, y_high = record["change"]["accuracy"]
            x, x_low, x_high = record["change"]["length"]
            errors = dict(xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]])
            style = dict(fmt="o", markersize=4, linewidth=1, capsize=2)
            axes.errorbar(x, y, **errors, **style, color=colour(name))
        pair = [np.mean([r["change"][key][0] for r in records]) for key in ("accuracy", "length")]
        labels.append((*pair, name))
    axes.plot(0, 0, "o", color="black")
    style = dict(textcoords="offset points", ha="right", fontsize=8)
    axes.annotate("before", (0, 0), xytext=(-5, 6), **style)
    low, high = axes.get_ylim()
    place = -np.inf
    for y, x, name in sorted(labels):  # from below, each at least a line above the one before
        place = max(y, place + 0.055 * (high - low))
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.12 * abs(axes.get_xlim()[0]), place),
            va="center",
            fontsize=8,
            color=colour(name),
            arrowprops=dict(arrowstyle="-", linewidth=0.5, color=colour(name), shrinkB=4),
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of mean response length, percent")
    axes.set_ylabel("change of accuracy, points")


# Right and whole references, and the others.
PANELS = (("solution", "answer", "instruction"), ("wrong", "other", "part"))


def pairs(axes, files, args):
    """Change of accuracy (points) with correct and with incorrect rollouts, a line a pipeline, by
    what the teacher reads; dots are means with their 95% interval over the pipelines.
    """
    found = changes(files)
    for panel, contexts in zip((axes, axes.inset_axes([1.15, 0, 1, 1])), PANELS, strict=True):
        for place, context in enumerate(contexts):
            prefix, both = "" if context == "solution" else f"{context}-", []
            for outcome, x in (("correct", place - 0.2), ("incorrect", place + 0.2)):
                values = [r["change"]["accuracy"][0] for r in found[prefix + outcome]]
                mean, low, high = mean_interval(values)
                style = dict(fmt="o", markersize=5, capsize=3, color=COLOURS[outcome], zorder=3)
                label = f"{outcome} rollouts" if place == 0 else None
                bars = (
                    None if low is None else [[mean - low], [high - mean]]
                )  # of one pipeline none
                panel.errorbar(x, mean, yerr=bars, label=label, **style)
                both.append(values)
            panel.plot([place - 0.2, place + 0.2], both, color="#bbbbbb", linewidth=0.8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(contexts)), contexts)
        panel.set_xlabel("what the teacher reads")
        panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("change of accuracy, points")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def trajectory_of(file):
    """(run directory, settings, [[step, change of accuracy, of length], ...]) of a run's metrics,
    from 0 at step 0.
    """
    head, *rows = read_lines(file)
    curve = [(0, 0.0, 0.0)]
    for row in rows:
        for record in row.get("evaluation", ()):
            if record["change"] and record["group"] == "all":
                change = record["change"]
                curve.append((row["step"], change["accuracy"][0], change["length"][0]))
    if len(curve) == 1:
        raise ValueError(f"{file}: no evaluation in it (--eval-every)")
    return head["args"]["out"], head["args"], np.array(curve)


def dial_of(file):
    """The same of a file of tools.dial: shares of the way instead of steps, from its first on."""
    evaluation = read_json(file)
    args = evaluation["args"]
    records = [r for r in evaluation["records"] if r["group"] == "all"]
    changes = [r["change"] or dict(accuracy=[0.0], length=[0.0]) for r in records]
    curve = [
        (at, c["accuracy"][0], c["length"][0]) for at, c in zip(args["at"], changes, strict=True)
    ]
    return args["models"][1], args, np.array(curve)


def trajectory(axes, files, args):
    """Change of accuracy (points) and of length (percent) over the steps: a thin line a seed, a
    thick one for their mean.
    """
    below = axes.inset_axes([0, -0.75, 1, 0.68], sharex=axes)
    for name, curves in group_seeds([trajectory_of(file) for file in files]).items():
        for part, panel in ((1, axes), (2, below)):
            for curve in curves if len(curves) > 1 else ():
                steps, values = curve[:, 0], curve[:, part]
                panel.plot(steps, values, color=colour(name), linewidth=0.6, alpha=0.5)
            mean = np.mean([curve[:, part] for curve in curves], 0)
            style = dict(color=colour(name), marker="o", markersize=3, label=name)
            panel.plot(curves[0][:, 0], mean, **style)
            panel.axhline(0, color="black", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("accuracy, points")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False, fontsize=8)
    below.set_ylabel("length, percent")
    below.set_xlabel("step")


def path(axes, files, args):
    """The same in the plane of the two changes, as paths from the start: compression comes first,
    damage apart from it. A thin path a seed, a thick one for their mean; the numbers are steps, or
    shares of the way.
    """
    found = [trajectory_of(f) if ".jsonl" in f else dial_of(f) for f in files]
    for name, curves in group_seeds(found).items():
        for curve in curves if len(curves) > 1 else ():
            axes.plot(curve[:, 2], curve[:, 1], color=colour(name), linewidth=0.6, alpha=0.45)
        mean = np.mean(curves, 0)  # (steps, 3)
        style = dict(color=colour(name), marker="o", markersize=4, linewidth=2, label=name)
        axes.plot(mean[:, 2], mean[:, 1], **style)
        for step, y, x in mean[np.any(mean[:, 1:] != 0, 1)]:
            text = dict(textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour(name))
            axes.annotate(f"{step:g}", (x, y), **text)
    axes.plot(0, 0, "o", color="black")
    axes.annotate("before", (0, 0), textcoords="offset points", xytext=(-4, 6), fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of mean response length, percent")
    axes.set_ylabel("change of accuracy, points")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def shift(axes, files, args):
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


LEAST = 10  # rollouts behind a point: two long ones make a peak of their own


def position(axes, files, args):
    """Mean reverse KL per token by position, where LEAST rollouts are left, and their number."""
    rows = [row for file in files for row in read_lines(file)]
    rows = [row for row in rows if args.steps is None or row["step"] <= args.steps]
    if not rows:
        raise ValueError("no steps in it")
    below = axes.inset_axes([0, -0.48, 1, 0.26], sharex=axes)
    for outcome, color in COLOURS.items():
        length = max(len(row[outcome]["kl"]) for row in rows)
        if not length:
            continue
        total = {key: np.zeros(length) for key in ("kl", "tokens", "rollouts")}
        for row in rows:
            for key, bins in total.items():
                bins[: len(row[outcome][key])] += row[outcome][key]
        x = (np.arange(length) + 0.5) * rows[0]["bin"]
        means = np.where(total["rollouts"] < LEAST, np.nan, total["kl"] / total["tokens"])
        axes.plot(x, means, color=color, label=outcome)
        below.plot(x, total["rollouts"], color=color)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines()):
        raise ValueError(f"no position with {LEAST} rollouts")
    axes.set_ylabel("reverse KL, nats per token")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False)
    below.set_yscale("log")
    below.set_ylabel("rollouts")
    below.set_xlabel("position in the response, tokens")


FIGURES = {
    "pairs": pairs,
    "path": path,
    "plane": plane,
    "position": position,
    "trajectory": trajectory,
    "shift": shift,
}


@contextmanager
def figure(out, size=(6.5, 4.2)):
    """The axes of a figure that is then written to OUT.png and OUT.svg, `size` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=size)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    for ending in ("png", "svg"):
        try:
            drawn.savefig(f"{out}.{ending}", bbox_inches="tight", dpi=150)
        except OSError as error:
            fail(f"--out {out}: {error.strerror}")
        print(f"written {out}.{ending}")
    plt.close(drawn)


def main(argv=None):
    args = parse_args(argv)
    out, ending = os.path.splitext(args.out)
    out = out if ending in (".png", ".svg") else args.out
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        fail(f"--out {args.out}: {folder} is not a folder that can be written to")
    with figure(out) as axes:
        try:
            FIGURES[args.figure](axes, args.files, args)
        except OSError as error:
            fail(f"{args.figure}: {error.filename}: {error.strerror}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            files = " ".join(args.files)
            fail(f"{args.figure} {files}: not such a file ({type(error).__name__}: {error})")


if __name__ == "__main__":
    start(main)
