"""The paper's figures 1 to 3 from the runs' own files, as PNG and SVG.

    python -m tools.plot path runs/*/metrics.jsonl --out figure1
    python -m tools.plot position runs/mine/kl_by_position.jsonl --out figure2
    python -m tools.plot trajectory runs/*/metrics.jsonl --out figure3

trajectory: change of accuracy and length over the steps; path: the same steps in the plane of the
two; both from the logs of runs with --eval-every. position: per-token KL by position and outcome,
summed over steps, from runs of opsd.py.

Several files: runs whose directories differ in a trailing -SEED alone, the run's own seed, are
seeds of one thing. Files may be compressed (.gz).
"""

import json
import os
from contextlib import contextmanager
from functools import reduce

if __name__ == "__main__":
    from launch import start

import numpy as np

from run import Parser, fail
from tools import open_text

COLOURS = {"correct": "#1b7837", "incorrect": "#b2182b", "truncated": "#8c8c8c"}
LEAST = 10  # rollouts behind a point of `position`: two long ones make a peak of their own


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=list(FIGURES))
    add("files", nargs="+", help="of the runs")
    add("--out", required=True, help=".png and .svg are written")
    return parser.parse_args(argv)


def colour(name):
    return next((COLOURS[kind] for kind in ("incorrect", "correct") if kind in name), "#4d4d4d")


def read_lines(file):
    with open_text(file) as stream:
        return [json.loads(line) for line in stream]


def curves_of(files):
    """{label: [curve (steps, 3), ...]} of runs' metrics, a curve a seed.

    Its columns: step, change of accuracy, of length, from 0 at step 0. The label is the run's
    directory without -SEED, and without the folders above where that is enough.
    """
    found = {}
    for file in files:
        head, *rows = read_lines(file)
        curve = [(0, 0.0, 0.0)]
        for row in rows:
            for record in row.get("evaluation", ()):
                if record["change"] and record["group"] == "all":
                    change = record["change"]
                    curve.append((row["step"], change["accuracy"][0], change["length"][0]))
        if len(curve) == 1:
            print(f"{file}: left out, no evaluation in it (--eval-every)")
            continue
        args = head["args"]
        run = args["out"].rstrip("/").removesuffix(f"-{args['seed']}")
        found.setdefault(run, []).append(np.array(curve))
    if not found:
        raise ValueError("no run with an evaluation")
    short = [os.path.basename(run) for run in found]
    labels = short if len(set(short)) == len(short) else list(found)
    return dict(zip(labels, found.values(), strict=True))


def draw_runs(panel, files, x, y):
    """Columns of `curves_of`: a thin line a seed, a thick one for their mean. Returns the means,
    {label: (steps, 3)}.
    """
    means, found = {}, curves_of(files)
    shared = os.path.commonprefix(list(found)).rpartition("-")[0] if len(found) > 1 else ""
    for name, curves in found.items():
        steps = reduce(np.intersect1d, [curve[:, 0] for curve in curves])  # that all seeds have
        for curve in curves if len(curves) > 1 else ():
            panel.plot(curve[:, x], curve[:, y], color=colour(name), linewidth=0.6, alpha=0.5)
        means[name] = mean = np.mean([c[np.isin(c[:, 0], steps)] for c in curves], 0)
        label = name[len(shared) :].lstrip("-")
        panel.plot(mean[:, x], mean[:, y], "o-", color=colour(name), markersize=3, label=label)
    panel.axhline(0, color="black", linewidth=0.8)
    return means


def panel_below(axes, height, xlabel, ylabel):
    """Another panel under the axes, `height` times as high, with the same horizontal axis."""
    below = axes.inset_axes([0, -height - 0.07, 1, height], sharex=axes)
    axes.tick_params(labelbottom=False)
    below.set(xlabel=xlabel, ylabel=ylabel)
    below.spines[["top", "right"]].set_visible(False)
    return below


# ------------------------------------------------------------------------------------------------
# Figures: functions (axes, files)


def trajectory(axes, files):
    below = panel_below(axes, 0.68, "step", "change of length, percent")
    draw_runs(below, files, 0, 2)
    draw_runs(axes, files, 0, 1)
    axes.set_ylabel("change of accuracy, points")
    axes.legend(frameon=False, fontsize=8)


def path(axes, files):
    """From the start: compression comes first, damage apart from it. The numbers are steps."""
    for name, mean in draw_runs(axes, files, 2, 1).items():
        for step, y, x in mean[1 :: 1 + len(mean) // 9]:  # not all, or nobody can read them
            text = dict(textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour(name))
            axes.annotate(f"{step:g}", (x, y), **text)
    axes.plot(0, 0, "o", color="black")
    axes.annotate("before", (0, 0), textcoords="offset points", xytext=(-4, 6), fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="change of mean response length, percent", ylabel="change of accuracy, points")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def position(axes, files):
    """Mean reverse KL per token by position, where LEAST rollouts are left, and their number."""
    rows = [row for file in files for row in read_lines(file)]
    if len(bins := {row["bin"] for row in rows}) > 1:
        raise ValueError(f"runs whose bins are {sorted(bins)} tokens wide; one width at a time")
    below = panel_below(axes, 0.26, "position in the response, tokens", "rollouts")
    below.set_yscale("log")
    for outcome, color in COLOURS.items():
        length = max(len(row[outcome]["kl"]) for row in rows)
        if not length:
            continue
        total = {key: np.zeros(length) for key in ("kl", "tokens", "rollouts")}
        for row in rows:
            for key, sums in total.items():
                sums[: len(row[outcome][key])] += row[outcome][key]
        x = (np.arange(length) + 0.5) * rows[0]["bin"]
        means = np.where(total["rollouts"] < LEAST, np.nan, total["kl"] / total["tokens"])
        axes.plot(x, means, color=color, label=outcome)
        below.plot(x, total["rollouts"], color=color)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines()):
        raise ValueError(f"no position with {LEAST} rollouts")
    axes.set_ylabel("reverse KL, nats per token")
    axes.legend(frameon=False)


FIGURES = {"path": path, "position": position, "trajectory": trajectory}


@contextmanager
def figure(out, size=(6.5, 4.2)):
    """The axes of a figure that is then written to OUT.png and OUT.svg, `size` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=size)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        yield axes
        for ending in ("png", "svg"):
            drawn.savefig(f"{out}.{ending}", bbox_inches="tight", dpi=150)
            print(f"written {out}.{ending}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"no files for this figure ({type(error).__name__}: {error})")
    plt.close(drawn)


def main(argv=None):
    args = parse_args(argv)
    with figure(args.out) as axes:
        FIGURES[args.figure](axes, args.files)


if __name__ == "__main__":
    start(main)
