"""The README's tables from what reproduce.sh left in results/: mean over seeds and 95% interval (Student's t over the seeds).

python table.py --seeds 101 102 103             # prints results/table.md, and writes it and results/table.json
python table.py --seeds 101 102 103 --readme    # and puts the tables into README.md
"""

import argparse
import json
import os

import numpy as np

from common import HERE, fail, write_json

RESULTS = os.path.join(HERE, "results")
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
}  # two-sided 95% quantile of Student's t for n seeds
COLUMNS = [
    "branch",
    "problems",
    "accuracy",
    "change, points",
    "length",
    "change, %",
    "truncated, %",
    "markers per 1,000",
    "kept rollouts a step",
    "loss tokens",
]


def mean_interval(values):
    """(mean, low, high) over seeds; low and high are None for a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def collect(part, seeds):
    """Records of one evaluation file over all seeds: one a (name, group), every measure as (mean, low, high)."""
    files = [
        json.load(open(os.path.join(RESULTS, "evaluations", f"{part}-{seed}.json")))
        for seed in seeds
    ]
    records = []
    for rows in zip(*(file["records"] for file in files)):
        branch = branch_of(rows[0]["name"], seeds[0])
        record = dict(part=part, branch=branch, group=rows[0]["group"])
        for key in ("accuracy", "length", "truncated", "no_answer", "markers"):
            record[key] = mean_interval([row[key] for row in rows])
        if rows[0]["change"]:
            for key in ("accuracy", "length"):
                record[f"{key}_change"] = mean_interval([row["change"][key][0] for row in rows])
            record["accuracy_changes"] = [
                row["change"]["accuracy"][0] for row in rows
            ]  # a seed each: is the order of branches the same?
            record["shift"] = {
                key: mean_interval([row["shift"][key] for row in rows])
                for key in ("repaired", "damaged", "net")
            }
        metrics = [os.path.join(RESULTS, "metrics", f"{branch}-{seed}.jsonl") for seed in seeds]
        if all(os.path.isfile(path) for path in metrics):
            steps = [
                [row for row in map(json.loads, open(path)) if "kept" in row] for path in metrics
            ]
            record["kept"] = mean_interval([np.mean([row["kept"] for row in run]) for run in steps])
            record["loss_tokens"] = mean_interval(
                [sum(row["loss_tokens"] for row in run) for run in steps]
            )
        records.append(record)
    return records


def mechanism(seeds, part):
    """Markdown: what the traces do on easy and on hard steps, in percent of such steps, means over seeds (see data.read_trace)."""
    files = [
        json.load(open(os.path.join(RESULTS, "evaluations", f"{part}-{seed}.json")))["traces"]
        for seed in seeds
    ]
    columns = [
        ("easy", "checked"),
        ("hard", "checked"),
        ("hard", "first_right"),
        ("hard", "right_if_checked"),
        ("hard", "careful_in_conflict"),
        ("hard", "right"),
    ]
    lines = [
        "| branch | "
        + " | ".join(f"{kind}: {key.replace('_', ' ')}" for kind, key in columns)
        + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for names in zip(*files):
        means = [
            np.mean([file[name][kind][key] for file, name in zip(files, names)])
            for kind, key in columns
        ]
        lines.append(
            f"| {branch_of(names[0], seeds[0])} | "
            + " | ".join(f"{mean:.1f}" for mean in means)
            + " |"
        )
    return "\n".join(lines)


def branch_of(name, seed):
    return name.removeprefix("runs/table/").removesuffix(f"-{seed}")


def markdown(records):
    show = lambda value, digits=1: "" if value is None else f"{value[0]:.{digits}f}"
    change = lambda value: (
        ""
        if value is None
        else f"{value[0]:+.1f}"
        + ("" if value[1] is None else f" [{value[1]:+.1f}, {value[2]:+.1f}]")
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in records:
        cells = [
            r["branch"] if r["group"] == "all" else "",
            r["group"],
            show(r["accuracy"]),
            change(r.get("accuracy_change")),
            show(r["length"]),
            change(r.get("length_change")),
            show(r["truncated"]),
            show(r["markers"]),
        ]
        cells += (
            [show(r.get("kept"), 1), show(r.get("loss_tokens"), 0)]
            if r["group"] == "all"
            else ["", ""]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The paper's tables and figures: (place in the paper, part and branch of ours, flags, the paper's result on Qwen3-8B / AceReason-7B unless named).
EXPERIMENTS = [
    (
        "figure 1, tables 2 and 6 (after RLVR): correct only",
        "filters",
        "correct",
        "python opsd.py --filter correct",
        "-1.0 pp, -29% / +3.5 pp, -18%",
    ),
    (
        "figure 1, tables 2 and 6 (after RLVR): incorrect only",
        "filters",
        "incorrect",
        "python opsd.py --filter incorrect",
        "-6.6 pp, -20% / -10.0 pp, -17%",
    ),
    (
        "table 2: all rollouts",
        "filters",
        "all",
        "python opsd.py --filter all",
        "-1.2 pp, -27% / -2.0 pp, -18%",
    ),
    (
        "table 2: split direction",
        "filters",
        "split",
        "python opsd.py --filter all --divergence split",
        "+0.5 pp, -26% / +0.0 pp, -21%",
    ),
    (
        "table 2: JSD",
        "filters",
        "jsd",
        "python opsd.py --filter all --divergence jsd",
        "-1.4 pp, -27% / +2.4 pp, -20%",
    ),
    (
        "table 4: only the answer as context, correct",
        "contexts",
        "answer-correct",
        "python opsd.py --filter correct --context answer",
        "not run",
    ),
    (
        "the same, incorrect",
        "contexts",
        "answer-incorrect",
        "python opsd.py --filter incorrect --context answer",
        "not run",
    ),
    (
        "table 4: conciseness instruction, correct",
        "contexts",
        "instruction-correct",
        "python opsd.py --filter correct --context instruction",
        "-2.5 pp, -23% (all rollouts)",
    ),
    (
        "the same, incorrect",
        "contexts",
        "instruction-incorrect",
        "python opsd.py --filter incorrect --context instruction",
        "not run",
    ),
    (
        "table 4: reflections; likewise reflection-demo, four-line, two-line, resolve",
        None,
        "the embedded model cannot write them",
        "python opsd.py --model MODEL --data DATA --context reflection",
        "-1.2 pp, -27%; -2.4, -26%; +2.0, -10%; +0.5, -6%; -6.6, -46%",
    ),
    (
        "table 5: reinjection, correct",
        "contexts",
        "reinject-correct",
        "python opsd.py --filter correct --reinject 32",
        "-2.6 pp, -33%",
    ),
    (
        "table 5: reinjection, all",
        "contexts",
        "reinject-all",
        "python opsd.py --filter all --reinject 32",
        "-4.2 pp, -33%",
    ),
    (
        "table 6: before RLVR, correct (against tiny/sft)",
        "order",
        "sft-correct",
        "python opsd.py --filter correct --model tiny/sft",
        "+1.9 pp, -20% (R1-Distill-7B)",
    ),
    (
        "table 6: before RLVR, incorrect (against tiny/sft)",
        "order",
        "sft-incorrect",
        "python opsd.py --filter incorrect --model tiny/sft",
        "-3.9 pp, -16% (R1-Distill-7B)",
    ),
    (
        "RLVR alone (against tiny/sft)",
        "order",
        "tiny/rlvr",
        "python rlvr.py",
        "published checkpoints",
    ),
    (
        "prompt only: the student reads the reference",
        "filters",
        "tiny/rlvr reading solution",
        "python eval.py --model tiny/rlvr --context solution",
        "not run",
    ),
    (
        "baseline: rejection-sampling fine-tuning",
        "baselines",
        "rft-correct",
        "python opsd.py --filter correct --divergence rft",
        "not run",
    ),
    (
        "baseline: length-penalised RLVR (20 steps of 256 rollouts)",
        "baselines",
        "length-penalty",
        "python rlvr.py --model tiny/rlvr --length-penalty 0.5 --steps 20",
        "not run",
    ),
    (
        "thinking off, correct",
        "off",
        "off-correct",
        "python opsd.py --filter correct --thinking off",
        "not run",
    ),
    (
        "thinking off, incorrect",
        "off",
        "off-incorrect",
        "python opsd.py --filter incorrect --thinking off",
        "not run",
    ),
    (
        "table 7: three seeds",
        None,
        "every row here",
        'SEEDS="101 102 103" bash reproduce.sh',
        "correct -1.6 +- 1.6 pp, incorrect -7.9 +- 2.1 / +3.5 +- 1.0, -12.9 +- 3.3",
    ),
    (
        "figure 2: KL by position",
        None,
        "results/figure2.png",
        "python opsd.py --filter all --kl-by-position 8 --out R; python plot.py position R/kl_by_position.jsonl --out F",
        "0.15 to 0.25 nats in the first 300 tokens, then 0.02 to 0.05",
    ),
    (
        "figure 3: trajectory",
        None,
        "results/figure3.png",
        "python opsd.py --filter correct --eval-every 10 --out R; python plot.py trajectory R/metrics.jsonl --out F",
        "length settles within 25 steps",
    ),
]
MARKERS = {
    "correct": "10.6 to 8.2 / 12.2 to 10.5",
    "incorrect": "10.6 to 9.4 / 12.2 to 11.0",
}  # table 3
SHIFTS = {"correct": "net +0.2 / +14.8", "incorrect": "net -24.9 / -77.5"}  # figure 4


def experiments(records):
    """Markdown: experiment of the paper, command, our result as mean and 95% interval over seeds, the paper's result."""
    found = {(r["part"], r["branch"]): r for r in records if r["group"] == "all"}
    change = lambda value: (
        f"{value[0]:+.1f}" + ("" if value[1] is None else f" [{value[1]:+.1f}, {value[2]:+.1f}]")
    )
    lines = [
        "| experiment of the paper | command | embedded model: accuracy, points; length, % | the paper: Qwen3-8B / AceReason-7B unless named |",
        "|---|---|---|---|",
    ]
    for place, part, branch, command, paper in EXPERIMENTS:
        record = found[part, branch] if part else None
        ours = (
            f"{change(record['accuracy_change'])}; {change(record['length_change'])}"
            if part
            else branch
        )
        lines.append(f"| {place} | `{command}` | {ours} | {paper} |")
    before = found["filters", "tiny/rlvr"]["markers"][0]
    for branch, paper in MARKERS.items():
        lines.append(
            f"| table 3: markers per 1,000 tokens, {branch} only | `python eval.py --model tiny/rlvr RUN` | {before:.1f} to {found['filters', branch]['markers'][0]:.1f} | {paper} |"
        )
    for branch, paper in SHIFTS.items():
        shift = found["filters", branch]["shift"]
        ours = (
            ", ".join(f"{key} {shift[key][0]:.1f}" for key in ("repaired", "damaged"))
            + f", net {change(shift['net'])}"
        )
        lines.append(
            f"| figure 4: shift, {branch} only, expected problems of 1,024 | `python eval.py --model tiny/rlvr RUN --problems 1024 --samples 2 --out E; python plot.py shift E --out F` | {ours} | {paper} |"
        )
    return "\n".join(lines)


def into_readme(name, text):
    """Replaces what stands in README.md between the lines <!-- name --> and <!-- end -->."""
    path = os.path.join(HERE, "README.md")
    readme = open(path).read()
    before, mark, rest = readme.partition(f"<!-- {name} -->\n")
    if mark:
        open(path, "w").write(before + mark + text + "\n" + rest[rest.index("<!-- end -->") :])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", required=True, help="of reproduce.sh")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="also put the tables into README.md, between their marks",
    )
    args = parser.parse_args()
    titles = dict(
        filters="Filters and divergences after RLVR",
        contexts="Contexts and reinjection",
        baselines="Baselines",
        order="RLVR, and OPSD before it: changes against tiny/sft",
        off="Thinking off: the answer alone",
    )
    try:
        parts = {part: collect(part, args.seeds) for part in titles}
        steps = {part: mechanism(args.seeds, part) for part in titles if part != "off"}
    except OSError as error:
        fail(f"{error.filename}: no such file; run reproduce.sh first")
    records = [record for part in parts.values() for record in part]
    tables = (
        {part: markdown(rows) for part, rows in parts.items()}
        | {f"mechanism-{part}": table for part, table in steps.items()}
        | dict(experiments=experiments(records))
    )
    titles |= {
        f"mechanism-{part}": f"What the traces do, percent of easy and of hard steps: {part}"
        for part in steps
    } | dict(experiments="The paper's experiments")
    text = "\n\n".join(f"**{titles[name]}**\n\n{table}" for name, table in tables.items()) + "\n"
    open(os.path.join(RESULTS, "table.md"), "w").write(text)
    write_json(os.path.join(RESULTS, "table.json"), dict(seeds=args.seeds, records=records))
    if args.readme:
        for name, table in tables.items():
            into_readme(name, table)
    print(text)


if __name__ == "__main__":
    main()
