"""Our results beside the paper's, with the command of each experiment. For lab.table."""

from typing import NamedTuple

from lab.results import change, mean
from tools import markdown


class Experiment(NamedTuple):
    """A table or figure of the paper."""

    place: str  # in the paper
    part: str | None  # of ours; None: none, and `branch` is what stands in its place
    branch: str
    command: str
    paper: str = "not run"  # its result on Qwen3-8B / AceReason-7B unless named


OPSD, EVAL = "python opsd.py --filter", "python eval.py --model tiny/rlvr"
PLOT, LAB_PLOT = "python -m tools.plot", "python -m lab.plot"
SHIFT = f"RUN --problems 1024 --samples 2 --out E; {LAB_PLOT} shift E --out F"
POSITION = f"--out R; {PLOT} position R/kl_by_position.jsonl --out F"
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
        "baselines",
        "reinject-correct",
        f"{OPSD} correct --reinject 32",
        "-2.6 pp, -33%",
    ),
    Experiment(
        "table 5: reinjection, all",
        "baselines",
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
        "RLVR alone (against tiny/sft)", "order", "rlvr", "python rlvr.py", "published checkpoints"
    ),
    Experiment(
        "prompt only: the student reads the reference",
        "filters",
        "rlvr reading solution",
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
        "table 7: several seeds; here eight pipelines, or three",
        None,
        "every row here",
        "bash lab/reproduce.sh",
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
    before = mean(found["filters", "rlvr"]["markers"])
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


# The small tables of README and of lab's pages, a row each: part, branch, its name there.
PICKS = {
    "front": [
        ("settled", "settled-correct", "correct"),
        ("settled", "settled-incorrect", "incorrect"),
        ("settled", "settled-all", "all"),
        ("settled-contexts", "settled-instruction-incorrect", "incorrect, `--context instruction`"),
        ("settled-contexts", "settled-wrong-correct", "correct, `--context wrong`"),
        ("sibling", "sibling-correct", "correct, `--context sibling` (three runs)"),
    ],
    "adapters": [
        ("settled", "settled-correct", "correct, all weights"),
        ("lora", "lora-correct", "correct, `--lora 16 --lr 1e-3`"),
        ("settled", "settled-incorrect", "incorrect, all weights"),
        ("lora", "lora-incorrect", "incorrect, `--lora 16 --lr 1e-3`"),
    ],
    "caps": [
        ("cap44", "cap44-truncated", "44: truncated"),
        ("cap44", "cap44-correct", "44: correct"),
        ("cap44", "cap44-incorrect", "44: incorrect"),
        ("cap44", "cap44-all", "44: all"),
        ("cap70", "cap70-truncated after 40", "70: truncated, 40 steps"),
        ("cap70", "cap70-correct", "70: correct"),
    ],
    "other-than-the-paper": [
        ("filters", "split", "all, `--divergence split`"),
        ("baselines", "reinject-correct", "correct, `--reinject 32`"),
        ("baselines", "reinject-all", "all, `--reinject 32`"),
        ("order", "sft-correct", "correct, before RLVR"),
        ("order", "sft-incorrect", "incorrect, before RLVR"),
    ],
    "wrong-references": [
        ("contexts", "other-correct", "correct, `--context other`"),
        ("contexts", "other-incorrect", "incorrect, `--context other`"),
        ("roles", "wrong-correct", "correct, `--context wrong`"),
        ("roles", "wrong-contrast", "the same, `--gate contrast` (c922497)"),
        ("roles", "wrong-agreement", "the same, `--gate agreement`"),
    ],
}


PAPER = ("front", "other-than-the-paper")  # those with a column for the paper's results


def picked_table(records, name):
    """The table of that name in PICKS."""
    found = {(r["part"], r["branch"]): r for r in records if r["group"] == "all"}
    papers = {(e.part, e.branch): e.paper for e in EXPERIMENTS}
    header, rows = ["responses trained on", "accuracy, points", "length, %"], []
    for part, branch, row in PICKS[name]:
        r = found[part, branch]
        paper = "filters" if part == "settled" else part, branch.removeprefix("settled-")
        ours = change(r["accuracy_change"]), change(r["length_change"])
        rows.append([row, *ours, *([papers.get(paper, "not run")] if name in PAPER else [])])
    header += ["the paper: Qwen3-8B / AceReason-7B"] if name in PAPER else []
    return markdown(header, rows)
