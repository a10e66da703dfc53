"""Dose and response: what a branch of OPSD loses, against what its teacher knows more than the
student, over the pipelines, contexts and lengths of SFT of reproduce.sh.

    python -m tools.dose --out results/dose

Dose: accuracy of the model before OPSD with the context in its prompt, minus without. Response:
change of its accuracy by OPSD with that context. Both in points, on the same held-out problems.
A slope is that of a line of least squares, its 95% interval by resampling whole pipelines. The line
is drawn through contexts that SFT taught to read (TAUGHT) on models that solve half of the problems
without one; "all right references" has half a solution and weaker models, too. Both choices were
made after those points were seen. Writes OUT.png, OUT.svg and OUT.json.
"""

import glob
import os

import numpy as np

from cli import Parser, fail, start
from run import write_json
from tools import markdown, read_json, results
from tools.plot import colour, figure, read_lines
from tools.results import SEEDS, branch_of, change, mean_interval

FILTERS = ("incorrect", "correct", "all")
TAUGHT = ("solution", "answer", "instruction")  # what a slope is through
MARKERS = dict(zip("solution answer instruction part other wrong".split(), "os^Dv<", strict=True))
HOLLOW = dict(markerfacecolor="none")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--seeds", nargs="+", default=SEEDS, help="of reproduce.sh")
    parser.add_argument("--out", required=True, help=".png, .svg and .json are written")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# Points and slope


def read_points(seeds):
    """A dict a branch: seed, branch, filter, context, accuracy before (percent), dose, response."""
    points, folder = [], os.path.join(results.RESULTS, "evaluations")
    for seed in seeds:
        for path in sorted(glob.glob(os.path.join(folder, f"*-{seed}.json.gz"))):
            records = [r for r in read_json(path)["records"] if r["group"] == "all"]
            changes = {r["name"]: r["change"]["accuracy"][0] for r in records if r["change"]}
            for name, response in changes.items():
                log = results.log_of(os.path.basename(name))
                args = read_lines(log)[0]["args"] if os.path.isfile(log) else {}
                prompt_only = f"{args.get('model')} reading {args.get('context')}"
                if prompt_only in changes and is_plain(args):
                    point = dict(seed=seed, branch=branch_of(name, seed))
                    point |= {key: args[key] for key in ("filter", "context")}
                    point["before"] = records[0]["accuracy"]
                    points.append(point | dict(dose=changes[prompt_only], response=response))
    return points


def is_plain(args):
    """A branch after RLVR, all settings but filter and context as they come."""
    after_rlvr = os.path.basename(args["model"]).startswith("rlvr")
    plain = args["divergence"] == "reverse_kl" and args["thinking"] == "on"
    return after_rlvr and plain and not args["reinject"]


def on_line(point):
    """Whether a slope's line goes through it."""
    return point["context"] in TAUGHT and point["before"] >= 50


def slopes_of(points):
    """{filter: its slope}."""
    return {
        name: slope([p for p in points if p["filter"] == name]) for name in ("incorrect", "correct")
    }


def slope(points):
    """(slope, low, high): points of response a point of dose, 95% over draws of pipelines."""
    of_seed = {}
    for point in points:
        of_seed.setdefault(point["seed"], []).append((point["dose"], point["response"]))
    groups = [np.array(group) for group in of_seed.values()]

    def fit(chosen):
        x, y = np.concatenate(chosen).T
        return np.polyfit(x, y, 1)[0]

    rng = np.random.default_rng(0)
    draws = rng.integers(len(groups), size=(10_000, len(groups)))
    low, high = np.percentile([fit([groups[i] for i in draw]) for draw in draws], [2.5, 97.5])
    return fit(groups), low, high


# ------------------------------------------------------------------------------------------------
# Table and figure


def dose_table(points):
    """A row a context and length of SFT: dose, and response by filter, over its pipelines."""
    found = {}
    for p in points:
        row = found.setdefault((p["context"], "".join(filter(str.isdigit, p["branch"]))), {})
        row.setdefault(p["filter"], []).append(p["response"])
        row.setdefault("dose", {})[p["seed"]] = p["dose"]
    rows = []
    for context, steps in sorted(found, key=lambda key: (list(MARKERS).index(key[0]), key[1])):
        row = found[context, steps]
        dose = list(row["dose"].values())
        cells = [dose, *(row.get(name) for name in FILTERS)]
        name = context + (f", SFT of {steps} steps" if steps else "")
        rows.append([name, str(len(dose)), *(change(v and mean_interval(v)) for v in cells)])
    columns = [f"{name}: points" for name in FILTERS]
    return markdown(["context", "pipelines", "dose, points", *columns], rows)


def draw(axes, points, slopes):
    for p in points:
        style = dict(color=colour(p["filter"]), markersize=4) | ({} if on_line(p) else HOLLOW)
        axes.plot(p["dose"], p["response"], MARKERS[p["context"]], **style)
    for name, (found, _, _) in slopes.items():
        line = [p for p in points if on_line(p) and p["filter"] == name]
        x, y = np.array([(p["dose"], p["response"]) for p in line]).T
        ends = np.array([x.min(), x.max()])
        label = f"{name}: {found:+.2f} points a point"
        axes.plot(ends, y.mean() + found * (ends - x.mean()), color=colour(name), label=label)
    for context, marker in MARKERS.items():
        style = dict(color="black", markersize=4) | ({} if context in TAUGHT else HOLLOW)
        axes.plot([], [], marker, label=context, **style)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("dose: accuracy with the context minus without, points")
    axes.set_ylabel("response: change of accuracy by OPSD, points")
    axes.legend(frameon=False, fontsize=7)


def main(argv=None):
    args = parse_args(argv)
    points = read_points(args.seeds)
    if not points:
        fail(f"no branch of --seeds {' '.join(args.seeds)} in results/; run reproduce.sh first")
    slopes = slopes_of([p for p in points if on_line(p)])
    wider = slopes_of([p for p in points if p["context"] in (*TAUGHT, "part")])
    print(dose_table(points))
    for title, found in (("", slopes), (", all right references", wider)):
        for name, (value, low, high) in found.items():
            print(f"{name}{title}: {value:+.2f} [{low:+.2f}, {high:+.2f}] points a point of dose")
    with figure(args.out) as axes:
        draw(axes, points, slopes)
    write_json(f"{args.out}.json", dict(slopes=slopes, all_right_references=wider, points=points))


if __name__ == "__main__":
    start(main)
