"""The paper's figures 1 to 4 from the runs' own files, as PNG and SVG.

    python plot.py plane evaluation.json --out figure1                          # accuracy against length, with interval crosses
    python plot.py position runs/mine/kl_by_position.jsonl --out figure2        # per-token KL by position, per outcome
    python plot.py trajectory runs/*/metrics.jsonl --out figure3                # accuracy and length over the steps
    python plot.py shift evaluation.json --out figure4                          # problems repaired and damaged

`plane` and `shift` read what eval.py --out writes, `position` what opsd.py --kl-by-position writes (summed over steps), `trajectory` the logs
of runs with --eval-every. Several files are several seeds of the same checkpoints: names differ in the trailing "-SEED" alone.
"""

import argparse
import json
import re

import numpy as np

from common import fail

COLOURS = {"correct": "#1b7837", "incorrect": "#b2182b", "truncated": "#8c8c8c"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("files", nargs="+", help="of the runs")
    parser.add_argument(
        "--out", required=True, help="path without ending: .png and .svg are written"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="position: only the first steps of the run; 0 = all"
    )
    return parser.parse_args(argv)


def label(name):
    """The checkpoint's name without its folder and seed."""
    return re.sub(r"-\d+$", "", name.rstrip("/").split("/")[-1])


def colour(name):
    return next((COLOURS[kind] for kind in ("incorrect", "correct") if kind in name), "#4d4d4d")


def changes(files):
    """The records with a change, one list a label: over all problems, and over the mean of the benchmarks where there are several."""
    found = {}
    for file in files:
        records = [
            r for r in json.load(open(file))["records"] if r["group"] == "all" and r["change"]
        ]
        means = [r for r in records if r["benchmark"] == "mean"]
        for record in means or records:
            found.setdefault(label(record["name"]), []).append(record)
    return found


def plane(axes, files, args):
    """Change of accuracy (points) against change of length (percent), each with its 95% interval over problems: a cross a checkpoint and file."""
    found, labels = changes(files), []
    for name, records in found.items():
        for record in records:
            (y, y_low, y_high), (x, x_low, x_high) = (
                record["change"]["accuracy"],
                record["change"]["length"],
            )
            axes.errorbar(
                x,
                y,
                xerr=[[x - x_low], [x_high - x]],
                yerr=[[y - y_low], [y_high - y]],
                fmt="o",
                markersize=4,
                linewidth=1,
                color=colour(name),
                capsize=2,
            )
        labels.append(
            [
                np.mean([record["change"][key][0] for record in records])
                for key in ("accuracy", "length")
            ]
            + [name]
        )
    axes.plot(0, 0, "o", color="black")
    axes.annotate(
        "before", (0, 0), textcoords="offset points", xytext=(-5, 6), ha="right", fontsize=8
    )
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


def trajectory(axes, files, args):
    """Change of accuracy (points) and of length (percent) over the steps: a thin line a file, a thick one for their mean."""
    below = axes.inset_axes([0, -0.75, 1, 0.68], sharex=axes)
    runs = {}
    for file in files:
        head, *rows = [json.loads(line) for line in open(file)]
        curve = [
            (
                row["step"],
                *(row["evaluation"][index]["change"][key][0] for key in ("accuracy", "length")),
            )
            for row in rows
            if "evaluation" in row
            for index in [
                next(
                    i
                    for i, r in enumerate(row["evaluation"])
                    if r["change"] and r["group"] == "all"
                )
            ]
        ]
        runs.setdefault(label(head["args"]["out"]), []).append(np.array([(0, 0.0, 0.0), *curve]))
    for name, curves in runs.items():
        for part, panel in ((1, axes), (2, below)):
            for curve in curves if len(curves) > 1 else []:
                panel.plot(
                    curve[:, 0], curve[:, part], color=colour(name), linewidth=0.6, alpha=0.5
                )
            panel.plot(
                curves[0][:, 0],
                np.mean([curve[:, part] for curve in curves], 0),
                color=colour(name),
                marker="o",
                markersize=3,
                label=name,
            )
            panel.axhline(0, color="black", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("accuracy, points")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False, fontsize=8)
    below.set_ylabel("length, percent")
    below.set_xlabel("step")


def shift(axes, files, args):
    """Expected number of problems repaired (up) and damaged (down), and the net (dot): means over files."""
    found = changes(files)
    for x, (name, records) in enumerate(found.items()):
        mean = {
            key: np.mean([record["shift"][key] for record in records])
            for key in ("repaired", "damaged", "net")
        }
        axes.bar(
            x,
            mean["repaired"],
            color=COLOURS["correct"],
            width=0.6,
            label="repaired" if x == 0 else None,
        )
        axes.bar(
            x,
            -mean["damaged"],
            color=COLOURS["incorrect"],
            width=0.6,
            label="damaged" if x == 0 else None,
        )
        axes.plot(x, mean["net"], "o", color="black", label="net" if x == 0 else None)
        axes.annotate(
            f"{mean['net']:+.1f}",
            (x, mean["net"]),
            textcoords="offset points",
            xytext=(9, -3),
            fontsize=8,
        )
    axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("expected problems")
    axes.legend(frameon=False, fontsize=8)


def position(axes, files, args):
    """Mean reverse KL per token by position, and the number of rollouts that are still there."""
    rows = [json.loads(line) for file in files for line in open(file)]
    rows = [row for row in rows if not args.steps or row["step"] <= args.steps]
    below = axes.inset_axes([0, -0.48, 1, 0.26], sharex=axes)
    for outcome, colour in COLOURS.items():
        length = max(len(row[outcome]["kl"]) for row in rows)
        if not length:
            continue
        total = lambda key: sum(
            np.pad(np.array(row[outcome][key], float), (0, length - len(row[outcome][key])))
            for row in rows
        )
        x = (np.arange(length) + 0.5) * rows[0]["bin"]
        axes.plot(x, total("kl") / total("tokens"), color=colour, label=outcome)
        below.plot(x, total("rollouts"), color=colour)
    axes.set_ylabel("reverse KL, nats per token")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False)
    below.set_yscale("log")
    below.set_ylabel("rollouts")
    below.set_xlabel("position in the response, tokens")


FIGURES = {"plane": plane, "position": position, "trajectory": trajectory, "shift": shift}


def main(argv=None):
    args = parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    axes.spines[["top", "right"]].set_visible(False)
    try:
        FIGURES[args.figure](axes, args.files, args)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        fail(f"{args.figure}: {type(error).__name__}: {error}")
    for ending in ("png", "svg"):
        figure.savefig(f"{args.out}.{ending}", bbox_inches="tight", dpi=150)
        print(f"written {args.out}.{ending}")


if __name__ == "__main__":
    main()
