"""The README's tables from what reproduce.sh left in results/: mean over seeds and 95% interval (Student's t over the seeds).

    python table.py --seeds 101 102 103         # prints results/table.md, and writes it and results/table.json
"""
import argparse
import json
import os

import numpy as np

from common import HERE, fail, write_json

RESULTS = os.path.join(HERE, "results")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}      # two-sided 95% quantile of Student's t for n seeds
COLUMNS = ["branch", "problems", "accuracy", "change, points", "length", "change, %", "truncated, %", "markers per 1,000", "kept rollouts a step", "loss tokens"]


def mean_interval(values):
    """(mean, low, high) over seeds; low and high are None for a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def collect(part, seeds):
    """Records of one evaluation file over all seeds: one a (name, group), every measure as (mean, low, high)."""
    files = [json.load(open(os.path.join(RESULTS, "evaluations", f"{part}-{seed}.json"))) for seed in seeds]
    records = []
    for rows in zip(*(file["records"] for file in files)):
        branch = branch_of(rows[0]["name"], seeds[0])
        record = dict(part=part, branch=branch, group=rows[0]["group"])
        for key in ("accuracy", "length", "truncated", "no_answer", "markers"):
            record[key] = mean_interval([row[key] for row in rows])
        if rows[0]["change"]:
            for key in ("accuracy", "length"):
                record[f"{key}_change"] = mean_interval([row["change"][key][0] for row in rows])
            record["accuracy_changes"] = [row["change"]["accuracy"][0] for row in rows]         # a seed each: is the order of branches the same?
            record["shift"] = {key: mean_interval([row["shift"][key] for row in rows]) for key in ("repaired", "damaged", "net")}
        metrics = [os.path.join(RESULTS, "metrics", f"{branch}-{seed}.jsonl") for seed in seeds]
        if all(os.path.isfile(path) for path in metrics):
            steps = [[row for row in map(json.loads, open(path)) if "kept" in row] for path in metrics]
            record["kept"] = mean_interval([np.mean([row["kept"] for row in run]) for run in steps])
            record["loss_tokens"] = mean_interval([sum(row["loss_tokens"] for row in run) for run in steps])
        records.append(record)
    return records


def mechanism(seeds):
    """Markdown: what the traces do on easy and on hard steps, in percent of such steps, means over seeds (see data.read_trace)."""
    files = [json.load(open(os.path.join(RESULTS, "evaluations", f"filters-{seed}.json")))["traces"] for seed in seeds]
    columns = [("easy", "checked"), ("hard", "first_right"), ("hard", "checked"), ("hard", "check_right"), ("hard", "conflict"), ("hard", "trusted"), ("hard", "right")]
    lines = ["| branch | " + " | ".join(f"{kind}: {key.replace('_', ' ')}" for kind, key in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for names in zip(*files):
        means = [np.mean([file[name][kind][key] for file, name in zip(files, names)]) for kind, key in columns]
        lines.append(f"| {branch_of(names[0], seeds[0])} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(lines)


def branch_of(name, seed):
    return name.removeprefix("runs/table/").removesuffix(f"-{seed}")


def markdown(records):
    show = lambda value, digits=1: "" if value is None else f"{value[0]:.{digits}f}"
    change = lambda value: "" if value is None else f"{value[0]:+.1f}" + ("" if value[1] is None else f" [{value[1]:+.1f}, {value[2]:+.1f}]")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in records:
        cells = [r["branch"] if r["group"] == "all" else "", r["group"], show(r["accuracy"]), change(r.get("accuracy_change")), show(r["length"]),
                 change(r.get("length_change")), show(r["truncated"]), show(r["markers"])]
        cells += [show(r.get("kept"), 1), show(r.get("loss_tokens"), 0)] if r["group"] == "all" else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", required=True, help="of reproduce.sh")
    args = parser.parse_args()
    titles = dict(filters="Filters and divergences after RLVR (tables 2 and 3, figure 1)", contexts="Contexts and reinjection (tables 4 and 5)",
                  baselines="Baselines that the paper never ran, after RLVR", order="RLVR, and OPSD before it (table 6): changes against tiny/sft",
                  off="Thinking off: the answer alone")
    records, text = [], ""
    try:
        for part, title in titles.items():
            rows = collect(part, args.seeds)
            records += rows
            text += f"**{title}**\n\n{markdown(rows)}\n\n"
        text += f"**What the traces do, percent of easy and of hard steps**\n\n{mechanism(args.seeds)}\n"
    except OSError as error:
        fail(f"{error.filename}: no such file; run reproduce.sh first")
    open(os.path.join(RESULTS, "table.md"), "w").write(text)
    write_json(os.path.join(RESULTS, "table.json"), dict(seeds=args.seeds, records=records))
    print(text)


if __name__ == "__main__":
    main()
