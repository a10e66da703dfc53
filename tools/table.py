"""The documents' tables from what reproduce.sh left in results/: means over the seeds and their 95%
intervals (Student's t over the seeds).

    python -m tools.table --seeds 101 102 103           # prints results/table.md, and writes it and
                                                        # results/table.json
    python -m tools.table --seeds 101 102 103 --docs    # and the tables in README.md and docs/
    python -m tools.table --seeds 101 102 103 --check   # writes nothing; names each table that is
                                                        # stale, and exits with 1 if one is

In a document a table stands between the lines <!-- name --> and <!-- end -->.
"""

import glob
import json
import os
import re
from typing import NamedTuple

import numpy as np

from cli import HERE, Parser, fail, start
from run import write_json
from tools import markdown, memory

RESULTS = os.path.join(HERE, "results")

# Two-sided 95% quantile of Student's t for n seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}

# Parts: each is one evaluation of reproduce.sh.
TITLES = {
    "filters": "Filters and divergences after RLVR",
    "contexts": "Contexts and reinjection",
    "baselines": "Baselines",
    "order": "RLVR, and OPSD before it: changes against tiny/sft",
    "off": "Thinking off: the answer alone",
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", required=True, help="of reproduce.sh")
    add("--docs", action="store_true", help="also write the tables in README.md and docs/")
    add("--check", action="store_true", help="write nothing, say which tables are stale")
    args = parser.parse_args(argv)
    if len(args.seeds) > max(T95):
        fail(f"--seeds: {len(args.seeds)} seeds, at most {max(T95)}")
    return args


# ------------------------------------------------------------------------------------------------
# Reading results/


def read_json(*names):
    with open(os.path.join(RESULTS, *names)) as stream:
        return json.load(stream)


def evaluations(part, seeds):
    return [read_json("evaluations", f"{part}-{seed}.json") for seed in seeds]


def branch_of(name, seed):
    return name.removeprefix("runs/table/").removesuffix(f"-{seed}")


def mean_interval(values):
    """(mean, low, high) over seeds; low and high are None for a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def collect(part, seeds):
    """Records of one evaluation over all seeds: one a (name, group), every measure as (mean, low,
    high).
    """
    records = []
    files = [file["records"] for file in evaluations(part, seeds)]
    for rows in zip(*files, strict=True):
        branch = branch_of(rows[0]["name"], seeds[0])
        record = dict(part=part, branch=branch, group=rows[0]["group"])
        for key in ("accuracy", "length", "truncated", "no_answer", "markers"):
            record[key] = mean_interval([row[key] for row in rows])
        if rows[0]["change"]:
            for key in ("accuracy", "length"):
                record[f"{key}_change"] = mean_interval([row["change"][key][0] for row in rows])
            # A seed each: is the order of branches the same?
            record["accuracy_changes"] = [row["change"]["accuracy"][0] for row in rows]
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
        path = os.path.join(RESULTS, "metrics", f"{branch}-{seed}.jsonl")
        if not os.path.isfile(path):
            return {}
        with open(path) as stream:
            steps = [row for row in map(json.loads, stream) if "kept" in row]
        kept.append(np.mean([row["kept"] for row in steps]))
        tokens.append(sum(row["loss_tokens"] for row in steps))
    return dict(kept=mean_interval(kept), loss_tokens=mean_interval(tokens))


# ------------------------------------------------------------------------------------------------
# Tables


def mean(value, digits=1):
    return "" if value is None else f"{value[0]:.{digits}f}"


def change(value):
    if value is None:
        return ""
    interval = "" if value[1] is None else f" [{value[1]:+.1f}, {value[2]:+.1f}]"
    return f"{value[0]:+.1f}{interval}"


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


def mechanism_table(part, seeds):
    """What the traces do on easy and on hard steps, in percent of such steps, means over seeds (see
    toy.read_trace).
    """
    columns = [("easy", "checked"), ("hard", "checked"), ("hard", "first_right")]
    columns += [("hard", "right_if_checked"), ("hard", "careful_in_conflict"), ("hard", "right")]
    files, rows = [file["traces"] for file in evaluations(part, seeds)], []
    for names in zip(*files, strict=True):
        tables = [file[name] for file, name in zip(files, names, strict=True)]
        means = [np.mean([table[kind][key] for table in tables]) for kind, key in columns]
        rows.append([branch_of(names[0], seeds[0]), *(f"{value:.1f}" for value in means)])
    return markdown(["branch", *(f"{k}: {key.replace('_', ' ')}" for k, key in columns)], rows)


class Experiment(NamedTuple):
    """A table or figure of the paper."""

    place: str  # in the paper
    part: str | None  # of ours; None: none, and `branch` is what stands in its place
    branch: str
    command: str
    paper: str = "not run"  # its result on Qwen3-8B / AceReason-7B unless named


OPSD, EVAL = "python opsd.py --filter", "python eval.py --model tiny/rlvr"
PLOT = "python -m tools.plot"
SHIFT = f"RUN --problems 1024 --samples 2 --out E; {PLOT} shift E --out F"
POSITION = f"--kl-by-position 8 --out R; {PLOT} position R/kl_by_position.jsonl --out F"
TRAJECTORY = f"--eval-every 10 --out R; {PLOT} trajectory R/metrics.jsonl --out F"

EXPERIMENTS = [
    Experiment(
        "figure 1, tables 2 and 6 (after RLVR): correct only",
        "filters",
        "correct",
        f"{OPSD} correct",
        "-1.0 pp, -29% / +3.5 pp, -18%",
    ),
    Experiment(
        "figure 1, tables 2 and 6 (after RLVR): incorrect only",
        "filters",
        "incorrect",
        f"{OPSD} incorrect",
        "-6.6 pp, -20% / -10.0 pp, -17%",
    ),
    Experiment(
        "table 2: all rollouts", "filters", "all", f"{OPSD} all", "-1.2 pp, -27% / -2.0 pp, -18%"
    ),
    Experiment(
        "table 2: split direction",
        "filters",
        "split",
        f"{OPSD} all --divergence split",
        "+0.5 pp, -26% / +0.0 pp, -21%",
    ),
    Experiment(
        "table 2: JSD",
        "filters",
        "jsd",
        f"{OPSD} all --divergence jsd",
        "-1.4 pp, -27% / +2.4 pp, -20%",
    ),
    Experiment(
        "table 4: only the answer as context, correct",
        "contexts",
        "answer-correct",
        f"{OPSD} correct --context answer",
    ),
    Experiment(
        "the same, incorrect", "contexts", "answer-incorrect", f"{OPSD} incorrect --context answer"
    ),
    Experiment(
        "table 4: conciseness instruction, correct",
        "contexts",
        "instruction-correct",
        f"{OPSD} correct --context instruction",
        "-2.5 pp, -23% (all rollouts)",
    ),
    Experiment(
        "the same, incorrect",
        "contexts",
        "instruction-incorrect",
        f"{OPSD} incorrect --context instruction",
    ),
    Experiment(
        "table 4: reflections; likewise reflection-demo, four-line, two-line, resolve",
        None,
        "the embedded model cannot write them",
        "python opsd.py --model MODEL --data DATA --context reflection",
        "-1.2 pp, -27%; -2.4, -26%; +2.0, -10%; +0.5, -6%; -6.6, -46%",
    ),
    Experiment(
        "table 5: reinjection, correct",
        "contexts",
        "reinject-correct",
        f"{OPSD} correct --reinject 32",
        "-2.6 pp, -33%",
    ),
    Experiment(
        "table 5: reinjection, all",
        "contexts",
        "reinject-all",
        f"{OPSD} all --reinject 32",
        "-4.2 pp, -33%",
    ),
    Experiment(
        "table 6: before RLVR, correct (against tiny/sft)",
        "order",
        "sft-correct",
        f"{OPSD} correct --model tiny/sft",
        "+1.9 pp, -20% (R1-Distill-7B)",
    ),
    Experiment(
        "table 6: before RLVR, incorrect (against tiny/sft)",
        "order",
        "sft-incorrect",
        f"{OPSD} incorrect --model tiny/sft",
        "-3.9 pp, -16% (R1-Distill-7B)",
    ),
    Experiment(
        "RLVR alone (against tiny/sft)",
        "order",
        "tiny/rlvr",
        "python rlvr.py",
        "published checkpoints",
    ),
    Experiment(
        "prompt only: the student reads the reference",
        "filters",
        "tiny/rlvr reading solution",
        f"{EVAL} --context solution",
    ),
    Experiment(
        "baseline: rejection-sampling fine-tuning",
        "baselines",
        "rft-correct",
        f"{OPSD} correct --divergence rft",
    ),
    Experiment(
        "baseline: length-penalised RLVR (20 steps of 256 rollouts)",
        "baselines",
        "length-penalty",
        "python rlvr.py --model tiny/rlvr --length-penalty 0.5 --steps 20",
    ),
    Experiment("thinking off, correct", "off", "off-correct", f"{OPSD} correct --thinking off"),
    Experiment(
        "thinking off, incorrect", "off", "off-incorrect", f"{OPSD} incorrect --thinking off"
    ),
    Experiment(
        "table 7: three seeds",
        None,
        "every row here",
        'SEEDS="101 102 103" bash reproduce.sh',
        "correct -1.6 +- 1.6 pp, incorrect -7.9 +- 2.1 / +3.5 +- 1.0, -12.9 +- 3.3",
    ),
    Experiment(
        "figure 2: KL by position",
        None,
        "results/figure2.png",
        f"{OPSD} all {POSITION}",
        "0.15 to 0.25 nats in the first 300 tokens, then 0.02 to 0.05",
    ),
    Experiment(
        "figure 3: trajectory",
        None,
        "results/figure3.png",
        f"{OPSD} correct {TRAJECTORY}",
        "length settles within 25 steps",
    ),
]
# Table 3 and figure 4: the filter and the paper's result.
MARKERS = {"correct": "10.6 to 8.2 / 12.2 to 10.5", "incorrect": "10.6 to 9.4 / 12.2 to 11.0"}
SHIFTS = {"correct": "net +0.2 / +14.8", "incorrect": "net -24.9 / -77.5"}


def experiments_table(records):
    """Experiment of the paper, command, our result, the paper's result."""
    found = {(r["part"], r["branch"]): r for r in records if r["group"] == "all"}
    header = ["experiment of the paper", "command", "embedded model: accuracy, points; length, %"]
    header += ["the paper: Qwen3-8B / AceReason-7B unless named"]
    rows = []
    for e in EXPERIMENTS:
        ours = e.branch
        if e.part:
            record = found[e.part, e.branch]
            ours = f"{change(record['accuracy_change'])}; {change(record['length_change'])}"
        rows.append([e.place, f"`{e.command}`", ours, e.paper])
    before = mean(found["filters", "tiny/rlvr"]["markers"])
    for branch, paper in MARKERS.items():
        place = f"table 3: markers per 1,000 tokens, {branch} only"
        ours = f"{before} to {mean(found['filters', branch]['markers'])}"
        rows.append([place, f"`{EVAL} RUN`", ours, paper])
    for branch, paper in SHIFTS.items():
        place = f"figure 4: shift, {branch} only, expected problems of 1,024"
        shift = found["filters", branch]["shift"]
        ours = f"repaired {mean(shift['repaired'])}, damaged {mean(shift['damaged'])}, "
        rows.append([place, f"`{EVAL} {SHIFT}`", ours + f"net {change(shift['net'])}", paper])
    return markdown(header, rows)


# Rows of README's table: (part, branch, its name there).
FRONT = [
    ("filters", "correct", "correct"),
    ("filters", "incorrect", "incorrect"),
    ("filters", "all", "all"),
    ("contexts", "instruction-incorrect", "incorrect, `--context instruction`"),
]


def front_table(records):
    found = {(r["part"], r["branch"]): r for r in records if r["group"] == "all"}
    papers = {(e.part, e.branch): e.paper for e in EXPERIMENTS}
    header = ["rollouts in the loss", "accuracy, points", "length, %"]
    rows = []
    for part, branch, name in FRONT:
        r = found[part, branch]
        ours = change(r["accuracy_change"]), change(r["length_change"])
        rows.append([name, *ours, papers[part, branch]])
    return markdown([*header, "the paper: Qwen3-8B / AceReason-7B"], rows)


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
    try:
        parts = {part: collect(part, args.seeds) for part in TITLES}
        steps = {part: mechanism_table(part, args.seeds) for part in TITLES if part != "off"}
    except OSError as error:
        fail(f"{error.filename}: no such file; run reproduce.sh first")
    records = [record for part in parts.values() for record in part]
    tables, text = {}, []

    def add(name, title, table):
        tables[name] = table
        text.append(f"**{title}**\n\n{table}\n")

    for part, rows in parts.items():
        add(part, TITLES[part], part_table(rows))
    for part, table in steps.items():
        title = f"What the traces do, percent of easy and of hard steps: {part}"
        add(f"mechanism-{part}", title, table)
    add("experiments", "The paper's experiments", experiments_table(records))
    text = "\n".join(text)
    tables |= dict(front=front_table(records), memory=memory.table())

    documents = [os.path.join(HERE, "README.md"), *glob.glob(os.path.join(HERE, "docs", "*.md"))]
    updated = {path: update(path, tables) for path in sorted(documents)}
    if args.check:
        stale = [
            f"{os.path.relpath(path, HERE)}: {name}"
            for path, (_, names) in updated.items()
            for name in names
        ]
        with open(os.path.join(RESULTS, "table.md")) as stream:
            stale += [] if stream.read() == text else ["results/table.md"]
        print("\n".join(f"stale: {name}" for name in stale) or "every table is as the results say")
        raise SystemExit(1 if stale else 0)
    write_text(os.path.join(RESULTS, "table.md"), text)
    write_json(os.path.join(RESULTS, "table.json"), dict(seeds=args.seeds, records=records))
    for path, (content, _) in updated.items() if args.docs else ():
        write_text(path, content)
    print(text)


def write_text(path, text):
    with open(path, "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    start(main)
