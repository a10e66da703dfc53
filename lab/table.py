"""The documents' tables from what reproduce.sh left in lab/results/: means over pipelines, a seed
each, and their 95% intervals (Student's t over the pipelines).

    python -m lab.table            # prints all tables in full, and writes lab/results/table.md
    python -m lab.table --docs     # and the few that stand in README.md, docs/ and lab/
    python -m lab.table --check    # writes nothing; names each table that is stale, and exits with
                                   # 1 if one is

In a document a table stands between the lines <!-- name --> and <!-- end -->.
"""

import glob
import os
import re
from typing import NamedTuple

if __name__ == "__main__":
    from launch import start

import numpy as np

from lab import gates, results
from lab.paper import PICKS, experiments_table, picked_table
from lab.plot import GATE
from lab.results import (
    FEW,
    OLD_SEEDS,
    REAL_SEEDS,
    SEEDS,
    T95,
    branch_of,
    change,
    evaluations,
    log_of,
    mean,
    mean_interval,
)
from lab.seeds import seeds_table
from run import HERE, Parser, fail
from tools import markdown, read_json
from tools.plot import read_lines


class Part(NamedTuple):
    """One evaluation of reproduce.sh."""

    title: str
    # new: SEEDS, ready: those of these that are there; old: OLD_SEEDS, few: the first FEW of these;
    # real: REAL_SEEDS
    seeds: str = "old"


GATED = "settled-gate"
PARTS = {
    "settled": Part("Filters, after 40 steps and settled", "new"),
    "settled-contexts": Part("A wrong solution, an instruction: after 40 steps and settled", "new"),
    "lora": Part("With --lora 16 --lr 1e-3: after 40 steps and settled", "new"),
    GATED: Part("References without and with the gate agreement, settled", "ready"),
    "settled-more": Part("An instruction on correct ones; all ones after 40 steps", "ready"),
    "sibling": Part("A correct sibling as the reference: after 40 steps and settled", "ready"),
    "shortest": Part("The shortest correct one of four, after 40 steps and settled", "ready"),
    "cap70": Part("A cap of 70 tokens in training: half of the responses truncated", "ready"),
    "cap44": Part("A cap of 44 tokens in training: nine tenths truncated", "ready"),
    "filters": Part("Filters and divergences after RLVR, 40 steps"),
    "contexts": Part("Contexts, 40 steps"),
    "order": Part("RLVR, and OPSD before it: changes against SFT"),
    "baselines": Part("Baselines and reinjection", "few"),
    "off": Part("Thinking off, the answer alone", "few"),
    "roles": Part("Roles, outcomes, gates against a wrong reference", "few"),
    "by-outcome": Part("Only correct rollouts are shown the reference (commit c922497)", "few"),
    "sft400": Part("SFT of 400 steps (commit c922497)", "few"),
    "sft700": Part("SFT of 700 steps (commit c922497)", "few"),
    "dial-correct": Part("Models on the line from RLVR to correct (commit c922497)", "few"),
    "dial-incorrect": Part("Models on the line from RLVR to incorrect (commit c922497)", "few"),
    "real": Part("A pretrained model: filters after RLVR", "real"),
    "real-contexts": Part("A pretrained model: contexts", "real"),
    "real-order": Part("A pretrained model: OPSD before RLVR, changes against SFT", "real"),
    "real-long": Part("A pretrained model: 24 steps instead of 10", "real"),
    "real-four": Part("A pretrained model that solves most of its problems: 40 steps", "real"),
    "real-four-gates": Part("The same model, all responses: without, with the gate", "real"),
}
DEEPEST = "208", "204", "201"  # by table `way`
DIP = "settled-correct", "slow-correct", "agreement-correct"
HEAD = "# Every table in full\n\n[How to read them](../README.md#the-tables).\n"
NO_TRACES = ("off", "dial-correct", "dial-incorrect")
BENCHES = {
    "gates": "Token gates; contrast: commit c922497",
    "gates-slow": "A quarter of the learning rate (commit c922497)",
    "gates-frozen": "Adam with the second moments of the ungated run, held (commit c922497)",
    "gates-anchored": "Agreeing tokens kept; the pipelines of all other tables (commit c922497)",
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", default=SEEDS, help="of reproduce.sh")
    add("--old-seeds", nargs="+", default=OLD_SEEDS, help="of the second edition's pipelines")
    add("--real-seeds", nargs="+", default=REAL_SEEDS, help="of reproduce.sh real")
    add("--docs", action="store_true", help="also write the tables in README.md, docs/ and lab/")
    add("--check", action="store_true", help="write nothing, say which tables are stale")
    args = parser.parse_args(argv)
    for name in ("seeds", "old_seeds", "real_seeds"):
        if len(getattr(args, name)) > max(T95):
            fail(f"--{name.replace('_', '-')}: more than {max(T95)} seeds")
    return args


# ------------------------------------------------------------------------------------------------
# Reading results/


def collect(part, seeds):
    """Records of one evaluation over all seeds: one a (name, group), every measure as (mean, low,
    high).
    """
    records = []
    files = [file["records"] for file in evaluations(part, seeds)]
    for rows in zip(*files, strict=True):
        branches = [branch_of(row["name"], seed) for row, seed in zip(rows, seeds, strict=True)]
        branch = branches[0]
        if set(branches) != {branch}:
            fail(f"evaluations of {part}: seeds have other branches, {', '.join(branches)}")
        record = dict(part=part, branch=branch, group=rows[0]["group"])
        for key in ("accuracy", "length", "truncated", "no_answer", "markers"):
            record[key] = mean_interval([row[key] for row in rows])
        if rows[0]["change"]:
            for key in ("accuracy", "length"):
                record[f"{key}_change"] = mean_interval([row["change"][key][0] for row in rows])
            record["shift"] = {
                key: mean_interval([row["shift"][key] for row in rows])
                for key in ("repaired", "damaged", "net")
            }
        record.update(training(branch, seeds))
        records.append(record)
    return records


def training(branch, seeds):
    """Rollouts kept a step and tokens in the loss of a branch; nothing if it is no run of ours."""
    kept, tokens = [], []
    for seed in seeds:
        path = log_of(f"{branch}-{seed}")
        if not os.path.isfile(path):
            return {}
        steps = [row for row in read_lines(path) if "kept" in row]
        kept.append(np.mean([row["kept"] for row in steps]))
        tokens.append(sum(row["loss_tokens"] for row in steps))
    return dict(kept=mean_interval(kept), loss_tokens=mean_interval(tokens))


# ------------------------------------------------------------------------------------------------
# Tables


def part_table(records):
    header = ["branch", "problems", "accuracy", "change, points", "length", "change, %"]
    header += ["truncated, %", "markers per 1,000", "kept rollouts a step", "loss tokens"]
    rows = []
    for r in records:
        first = r["group"] == "all"
        row = [r["branch"] if first else "", r["group"]]
        row += [mean(r["accuracy"]), change(r.get("accuracy_change"))]
        row += [mean(r["length"]), change(r.get("length_change"))]
        row += [mean(r["truncated"]), mean(r["markers"])]
        row += [mean(r.get("kept")), mean(r.get("loss_tokens"), 0)] if first else ["", ""]
        rows.append(row)
    return markdown(header, rows)


MECHANISMS = [("easy", "checked"), ("hard", "checked"), ("hard", "careful_in_conflict")]
MECHANISMS += [("hard", "right_if_checked"), ("hard", "first_right"), ("hard", "right")]
TRACES = ["branch", *(f"{kind}: {key.replace('_', ' ')}" for kind, key in MECHANISMS)]
# The rows of them on experiments.md.
TRACE_PICKS = ["rlvr", "rlvr reading solution", "settled-correct", "settled-incorrect"]
TRACE_PICKS += ["settled-wrong-correct", "settled-wrong-incorrect"]


def mechanisms(part, seeds):
    """{branch: row}: what the traces do on easy and on hard steps, in percent of such steps, means
    over seeds (see lab/traces.py).
    """
    files, rows = [file["traces"] for file in evaluations(part, seeds)], {}
    for names in zip(*files, strict=True):
        tables = [file[name] for file, name in zip(files, names, strict=True)]
        means = [np.mean([table[kind][key] for table in tables]) for kind, key in MECHANISMS]
        branch = branch_of(names[0], seeds[0])
        rows[branch] = [branch, *(f"{value:.1f}" for value in means)]
    return rows


def by_branch(part, seeds):
    """Of each seed {branch: its record over all problems}."""
    return [
        {branch_of(r["name"], seed): r for r in file["records"] if r["group"] == "all"}
        for seed, file in zip(seeds, evaluations(part, seeds), strict=True)
    ]


def pipelines_table(part, columns, pair, seeds):
    """A row a pipeline, changes with their 95% interval over problems; then the means over the
    pipelines, with the interval over pipelines and that over the problems of these pipelines.

    columns: {(branch, accuracy or length): its header}. pair: the branches that the last column
    compares, the accuracy of the first minus that of the second.
    """
    found = by_branch(part, seeds)
    before = [pipeline["rlvr"]["accuracy"] for pipeline in found]
    changes = {(b, key): [pipeline[b]["change"][key] for pipeline in found] for b, key in columns}
    pairs = [changes[branch, "accuracy"] for branch in pair]
    gaps = [incorrect[0] - correct[0] for incorrect, correct in zip(*pairs, strict=True)]
    rows = [
        [str(seed), f"{accuracy:.1f}", *map(change, cells), f"{gap:+.1f}"]
        for seed, accuracy, gap, *cells in zip(seeds, before, gaps, *changes.values(), strict=True)
    ]
    over, within = [], []
    for column in changes.values():
        over.append(mean_interval([value for value, _, _ in column]))
        halves = [(high - low) / 2 for _, low, high in column]
        half = float(np.sqrt(np.square(halves).sum())) / len(halves)
        within.append((over[-1][0], over[-1][0] - half, over[-1][0] + half))
    cells = [*map(change, over), change(mean_interval(gaps))]
    rows.append(["mean, over pipelines", mean(mean_interval(before)), *cells])
    rows.append(["mean, over problems", "", *map(change, within), ""])
    header = ["pipeline", "after RLVR", *columns.values(), "incorrect minus correct, points"]
    return markdown(header, rows)


READING = {("rlvr reading solution", "accuracy"): "reading the solution, points"}
OLD_COLUMNS = READING | {
    (name, key): f"{name}: {key_name}"
    for name in ("correct", "incorrect")
    for key, key_name in (("accuracy", "points"), ("length", "length, %"))
}
OLD_PAIR, SETTLED_PAIR = ("incorrect", "correct"), ("settled-incorrect", "settled-correct")
SETTLED_COLUMNS = READING | {
    (f"settled-{name}{after}", key): f"{name}{after or ', settled'}: {unit}"
    for name in ("correct", "incorrect")
    for after, key, unit in (
        (" after 40", "accuracy", "points"),
        ("", "accuracy", "points"),
        ("", "length", "length, %"),
    )
}


def gate_table(seeds):
    """Without and with the gate `agreement`, and the difference in pairs, by which responses are
    trained on and what the teacher reads.
    """
    found, rows = by_branch(GATED, seeds), []
    for label, branches in GATE.items():
        pair = [[pipeline[branch]["change"] for pipeline in found] for branch in branches]
        plain, gated = ([changed["accuracy"][0] for changed in of_one] for of_one in pair)
        lengths = [np.mean([changed["length"][0] for changed in of_one]) for of_one in pair]
        lines = [line for seed in seeds for line in read_lines(log_of(f"{branches[1]}-{seed}"))]
        mass = np.mean([line["gate_mass"] for line in lines if line.get("kept")])
        in_pairs = np.subtract(gated, plain)
        cells = [change(mean_interval(values)) for values in (plain, gated, in_pairs)]
        both = ", ".join(f"{length:+.1f}" for length in lengths)
        rows.append([label.replace("\n", " "), *cells, both, f"{100 * mass:.0f}"])
    header = ["responses, what the teacher reads", "all tokens, points", "agreement, points"]
    header += ["in pairs, points", "length, %", "weight counted, %"]
    return markdown(header, rows)


def way_table(names):
    """How runs on correct rollouts got there, a row a run, from their logs (256 held-out problems):
    the mean reverse KL of their last three updates as a share of the first three's; the deepest
    change of accuracy; where it is within a point of the run's last four evaluations again.
    """
    marks, rows = (10, 20, 40, 120), []
    for name in names:
        lines = read_lines(log_of(name))
        kls = [line["reverse_kl"] for line in lines if line.get("kept")]
        shares = [100 * np.mean(kls[step - 3 : step]) / np.mean(kls[:3]) for step in marks]
        found = []  # (step, change of accuracy)
        for line in lines:
            for r in line.get("evaluation", ()):
                if r["change"] and r["group"] == "all":
                    found.append((line["step"], r["change"]["accuracy"][0]))
        end = np.mean([gained for _, gained in found[-4:]])
        step, deepest = min(found, key=lambda pair: pair[1])
        back = next(at for at, gained in found if at >= step and gained >= end - 1)
        dip = [f"{deepest:+.1f}", str(step), str(back), f"{end:+.1f}"]
        rows.append([name, *(f"{share:.1f}" for share in shares), *dip])
    header = ["run", *(f"KL, step {step}, % of the first" for step in marks)]
    header += ["deepest, points", "at step", "back at step", "at the end, points"]
    return markdown(header, rows)


# ------------------------------------------------------------------------------------------------
# Writing


def update(path, tables):
    """(the document's text with these tables in it, the names of those that were others)."""
    with open(path) as stream:
        text, stale = stream.read(), []
    for name in re.findall(r"^<!-- ([\w-]+) -->$", text, re.MULTILINE):
        if name == "end":
            continue
        if name not in tables:
            fail(f"{path}: no table is called {name}")
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        old, end, after = rest.partition("<!-- end -->")
        if not end:
            fail(f"{path}: no <!-- end --> after <!-- {name} -->")
        new = tables[name] + "\n"
        if old != new:
            stale.append(name)
        text = before + mark + new + end + after
    return text, stale


def main(argv=None):
    args = parse_args(argv)
    groups = dict(new=args.seeds, old=args.old_seeds, few=args.old_seeds[:FEW])
    groups["real"] = args.real_seeds
    seeds = {
        part: groups.get(PARTS[part].seeds)
        or [s for s in args.seeds if os.path.exists(results.evaluation(part, s))]
        for part in PARTS
    }
    tables, traces, text = {}, {}, [HEAD]

    def add(name, title, table):
        tables[name] = table
        text.append(f"## {name}\n\n{title}.\n\n{table}\n")

    try:
        parts = {part: collect(part, seeds[part]) for part in PARTS}
        records = [record for part in parts.values() for record in part]
        for part, rows in parts.items():
            add(part, f"{PARTS[part].title}; pipelines: {len(seeds[part])}", part_table(rows))
        for part in PARTS:
            if PARTS[part].seeds == "real":
                title = f"{PARTS[part].title}, seed by seed"
                add(f"{part}-seeds", title, seeds_table(part, seeds[part]))
            elif part not in NO_TRACES:
                traces[part] = mechanisms(part, seeds[part])
                table = markdown(TRACES, traces[part].values())
                add(f"mechanism-{part}", f"What the traces do: {part}", table)
        found = traces["settled-contexts"] | traces["settled"]
        tables["traces"] = markdown(TRACES[:5], [found[branch][:5] for branch in TRACE_PICKS])
        table = pipelines_table("settled", SETTLED_COLUMNS, SETTLED_PAIR, args.seeds)
        add("settled-pipelines", "Pipeline by pipeline, settled", table)
        table = way_table([f"settled-correct-{seed}" for seed in args.seeds])
        add("way", "The way there, correct rollouts (256 problems)", table)
        found = [f"{branch}-{seed}" for seed in DEEPEST for branch in DIP]
        table = way_table([name for name in found if os.path.isfile(log_of(name))])
        add("dip", "The deepest dips: --lr 3e-5 (400 steps), --gate agreement", table)
        table = pipelines_table("filters", OLD_COLUMNS, OLD_PAIR, args.old_seeds)
        add("pipelines", "Pipeline by pipeline, 40 steps", table)
        title = f"Without and with the gate agreement, settled; pipelines: {len(seeds[GATED])}"
        add("agreement", title, gate_table(seeds[GATED]))
        for name, title in BENCHES.items():
            bench = read_json(os.path.join(results.RESULTS, "gates", f"{name}.json.gz"))
            add(name, title, gates.make_table(bench["records"]))
    except OSError as error:
        fail(f"{error.filename}: no such file; run lab/reproduce.sh first")
    add("experiments", "The paper's experiments", experiments_table(records))
    text = "\n".join(text)
    tables |= {name: picked_table(records, name) for name in PICKS}

    pages = "README.md", "docs/findings.md", "lab/*.md"
    documents = sum((glob.glob(os.path.join(HERE, page)) for page in pages), [])
    updated = {path: update(path, tables) for path in sorted(documents)}
    if args.check:
        stale = [
            f"{os.path.relpath(path, HERE)}: {name}"
            for path, (_, names) in updated.items()
            for name in names
        ]
        with open(os.path.join(results.RESULTS, "table.md")) as stream:
            stale += [] if stream.read() == text else ["lab/results/table.md"]
        print("\n".join(f"stale: {name}" for name in stale) or "every table is as the results say")
        raise SystemExit(1 if stale else 0)
    write_text(os.path.join(results.RESULTS, "table.md"), text)
    for path, (content, _) in updated.items() if args.docs else ():
        write_text(path, content)
    print(text)


def write_text(path, text):
    with open(path, "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    start(main)
