"""The paper's figures from the runs' own files, as PNG and SVG.

    python plot.py plane results/evaluation.json --out results/figure1          # figure 1: accuracy against length, with interval crosses
    python plot.py position runs/kl/kl_by_position.jsonl --out results/figure2  # figure 2: per-token KL by position, per outcome

`plane` reads what eval.py --out writes: one file, or one per seed (then a point a branch and seed, joined by its mean). `position` reads
what opsd.py --kl-by-position writes, and sums over steps.
"""
import argparse
import json

import numpy as np

from common import fail

COLOURS = {"correct": "#1b7837", "incorrect": "#b2182b", "truncated": "#8c8c8c"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("files", nargs="+", help="of the runs")
    parser.add_argument("--out", required=True, help="path without ending: .png and .svg are written")
    parser.add_argument("--steps", type=int, default=0, help="position: only the first steps of the run; 0 = all")
    return parser.parse_args(argv)


def plane(axes, files, args):
    """Change of accuracy (points) against change of length (percent), each with its 95% interval, one cross a checkpoint and file."""
    for number, file in enumerate(files):
        for record in json.load(open(file))["records"]:
            if record["group"] != "all" or not record["change"]:
                continue
            (y, y_low, y_high), (x, x_low, x_high) = record["change"]["accuracy"], record["change"]["length"]
            kind = next((k for k in ("incorrect", "correct") if k in record["name"]), "")
            axes.errorbar(x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]], fmt="o", color=COLOURS.get(kind, "#4d4d4d"), capsize=2)
            if number == 0:
                axes.annotate(record["name"].rstrip("/").split("/")[-1], (x, y), textcoords="offset points", xytext=(6, 6))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of mean response length, percent")
    axes.set_ylabel("change of accuracy, points")


def position(axes, files, args):
    """Mean reverse KL per token by position, and the number of rollouts that are still there."""
    rows = [json.loads(line) for file in files for line in open(file)]
    rows = [row for row in rows if not args.steps or row["step"] <= args.steps]
    below = axes.inset_axes([0, -0.48, 1, 0.26], sharex=axes)
    for outcome, colour in COLOURS.items():
        length = max(len(row[outcome]["kl"]) for row in rows)
        if not length:
            continue
        total = lambda key: sum(np.pad(np.array(row[outcome][key], float), (0, length - len(row[outcome][key]))) for row in rows)
        x = (np.arange(length) + 0.5) * rows[0]["bin"]
        axes.plot(x, total("kl") / total("tokens"), color=colour, label=outcome)
        below.plot(x, total("rollouts"), color=colour)
    axes.set_ylabel("reverse KL, nats per token")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False)
    below.set_yscale("log")
    below.set_ylabel("rollouts")
    below.set_xlabel("position in the response, tokens")


FIGURES = {"plane": plane, "position": position}


def main(argv=None):
    args = parse_args(argv)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    axes.spines[["top", "right"]].set_visible(False)
    try:
        FIGURES[args.figure](axes, args.files, args)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{args.figure}: {type(error).__name__}: {error}")
    for ending in ("png", "svg"):
        figure.savefig(f"{args.out}.{ending}", bbox_inches="tight", dpi=150)
        print(f"written {args.out}.{ending}")


if __name__ == "__main__":
    main()
