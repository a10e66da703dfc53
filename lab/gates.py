"""The bench of token gates, where the truth is known: every gate on correct, incorrect and all
rollouts of the embedded task, on several pipelines of reproduce.sh.

    python -m lab.gates       # interrupted, the same command goes on
    python -m lab.gates --seeds 0 --pipelines tiny/rlvr --gates all the-digit --filters incorrect

Writes table.md, table.json and figure.png, .svg (accuracy against length, a point a gate) to --out.
The table, a row a gate: which share it lets through of each kind of token (redundant checks, the
digit that nobody can know, the rest; see lab/oracles.py) and, over the run, of the loss's weight;
the norm of the first step's gradient; these of the last filter. Then the changes of accuracy (means
over the seeds with their 95% interval, or for one seed the interval over problems) and of length.
table.json has these for each filter, and for easy and hard problems.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":
    from launch import start

import numpy as np

import data
import opsd
import rollout
import samplers
from data import CONTEXTS
from lab.oracles import ORACLES, REDUNDANT, UNKNOWABLE, add_oracles
from lab.results import both, mean_interval
from lab.traces import CLASS_NAMES, add_tags
from model import load_model
from run import Parser, fail, set_up, write_json
from tools import markdown, read_json
from tools.plot import COLOURS, figure, read_lines
from verify import Verifier

# In the first step of tiny/rlvr above 0.01 nats lie 11% of the loss's weight by the student's
# entropy, 13% by the teacher's and 8% by gap; 58% lie in the first 40 tokens.
GATES = {
    "all": "",
    "student-entropy-high": "--gate student-entropy --gate-range 0.01",
    "student-entropy-low": "--gate student-entropy --gate-range 0 0.01",
    "teacher-entropy-high": "--gate teacher-entropy --gate-range 0.01",
    "teacher-entropy-low": "--gate teacher-entropy --gate-range 0 0.01",
    "gap-high": "--gate gap --gate-range 0.01",
    "gap-low": "--gate gap --gate-range 0 0.01",
    "early": "--gate position --gate-range 0 40",
    "late": "--gate position --gate-range 40",
    "agreement": "--gate agreement",
    **{name: f"--gate {name}" for name in ORACLES},
}
KINDS = {"redundant": REDUNDANT, "unknowable": UNKNOWABLE}
KINDS["rest"] = set(CLASS_NAMES) - REDUNDANT - UNKNOWABLE


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[101, 102, 103], help="of training and evaluation")
    add("--pipelines", default="runs/table/rlvr-SEED", help="models, SEED being the seed")
    add("--gates", nargs="+", default=list(GATES), choices=list(GATES), help="rows of the table")
    add("--filters", nargs="+", default=["correct", "incorrect", "all"], choices=list(opsd.FILTERS))
    add("--steps", type=int, default=40, help="of each run")
    add("--lr", type=float, default=1e-4, help="of each run")
    add("--problems", type=int, default=1024, help="held-out problems, one response each")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--out", default="runs/gates", help="folder of the runs, the table and the figure")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        fail(f"--jobs {args.jobs}: at least 1")
    return args


def pipeline(args, seed):
    return args.pipelines.replace("SEED", str(seed))


def folder(args, seed, gate, outcome):
    return os.path.join(args.out, str(seed), f"{gate}-{outcome}")


# ------------------------------------------------------------------------------------------------
# Training


def train(args, seed, gate, outcome):
    """One run of opsd.py, unless it is there: "", or why it failed."""
    out = folder(args, seed, gate, outcome)
    if os.path.isfile(os.path.join(out, "model.safetensors")):
        before, now = read_lines(os.path.join(out, "metrics.jsonl"))[0]["args"], vars(args)
        if any(before[key] != now[key] for key in ("steps", "lr")):
            return f"{out}: has other --steps or --lr; give another --out"
        if before["model"] != pipeline(args, seed):
            return f"{out}: started from {before['model']}; give another --out"
        return ""
    flags = f"--filter {outcome} --steps {args.steps} --lr {args.lr} {GATES[gate]} --overwrite"
    where = ["--model", pipeline(args, seed), "--eval-problems", "0", "--out", out]
    script = "lab.oracles" if gate in ORACLES else "opsd"
    return run([script, *flags.split(), *where], seed, out)


def evaluate(args, seed):
    """All runs of a seed against its pipeline, unless it is there: likewise."""
    cells = [folder(args, seed, gate, outcome) for gate in args.gates for outcome in args.filters]
    models, out = [pipeline(args, seed), *cells], evaluation(args, seed)
    if os.path.isfile(out):
        before = read_json(out)["args"]
        if set(models) <= set(before["model"]) and before["problems"] == args.problems:
            return ""
    flags = f"--problems {args.problems} --samples 1 --overwrite --out {out}"
    return run(["eval", "--model", *models, *flags.split()], seed, out)


def evaluation(args, seed):
    return os.path.join(args.out, str(seed), "evaluation.json")


def run(module, seed, out):
    command = [sys.executable, "-m", *module, "--seed", str(seed), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{out}: {'done' if done.returncode == 0 else 'failed'}", flush=True)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return "" if done.returncode == 0 else f"{out}: {said[-1]}"


# ------------------------------------------------------------------------------------------------
# The truth: what each gate lets through in a first step


def measure_truth(args, seed):
    """{gate: {filter: {kind: share of its tokens that is let through}}} on a pipeline's own
    rollouts, before any training. Kept in truth.json.
    """
    path = os.path.join(args.out, str(seed), "truth.json")
    truth = {}
    if os.path.isfile(path):
        truth = read_json(path)
    missing = [gate for gate in args.gates if gate not in truth]
    if not missing:
        return truth
    flags = ["--model", pipeline(args, seed), "--seed", str(seed), "--threads", "1"]
    common = opsd.parse_args([*flags, "--filter", "all"])
    device = set_up(common)
    samplers.choose_backend(common, device)
    model, tokenizer = load_model(common.model, device, common.dtype)
    teacher = opsd.frozen_copy(model)
    sampler = samplers.make_sampler(model, tokenizer, common)
    problems = data.embedded_problems(256, seed)
    rollouts = rollout.make_rollouts(sampler, tokenizer, problems, common, seed)
    with Verifier() as verifier:
        rollout.grade_rollouts(verifier, rollouts)
    add_tags(rollouts, tokenizer)
    contexts = CONTEXTS[common.context](rollouts, None, common)
    opsd.add_teacher_rows(rollouts, contexts, tokenizer, common, None)
    for gate in missing:
        step = opsd.parse_args([*flags, "--filter", "all", *GATES[gate].split()])
        # Of a step of opsd.py only what it measures is wanted, not its gradient.
        opsd.accumulate_gradients(model, teacher, rollouts, step)
        truth[gate] = {name: shares(opsd.FILTERS[name](rollouts, step)) for name in opsd.FILTERS}
    write_json(path, truth)
    return truth


def shares(rollouts):
    """{kind: share of these rollouts' tokens that the gate let through}."""
    through, tokens = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for r in rollouts:
        for value, number in zip(r.measures["gate"].tolist(), r.tags, strict=True):
            kind = next(k for k, names in KINDS.items() if CLASS_NAMES[number] in names)
            through[kind] += value
            tokens[kind] += 1
    return {kind: through[kind] / tokens[kind] if tokens[kind] else None for kind in KINDS}


# ------------------------------------------------------------------------------------------------
# The table and the figure


def read_runs(args, seed):
    """{folder of a run: dict(accuracy, length, accuracy_easy, accuracy_hard: (change, low, high)
    over problems; gate_mass: mean over the steps; gradient: norm of the first step's)}.
    """
    runs = {}
    for r in read_json(evaluation(args, seed))["records"]:
        if r["change"] and r["group"] == "all":
            steps = read_lines(os.path.join(r["name"], "metrics.jsonl"))
            steps = [step for step in steps if step.get("gate_mass") is not None]
            mass = sum(step["gate_mass"] for step in steps) / len(steps)
            gradient = steps[0]["grad_norm"]
            runs[r["name"]] = dict(**r["change"], gate_mass=mass, gradient=gradient)
        elif r["change"]:
            runs[r["name"]][f"accuracy_{r['group']}"] = r["change"]["accuracy"]
    return runs


def collect(args, truth):
    """A record a gate and filter; each number as (mean, low, high)."""
    records, found = [], {seed: read_runs(args, seed) for seed in args.seeds}
    for gate in args.gates:
        for outcome in args.filters:
            runs = [found[seed][folder(args, seed, gate, outcome)] for seed in args.seeds]
            record = dict(gate=gate, filter=outcome, seeds=args.seeds)
            for key in ("accuracy", "accuracy_easy", "accuracy_hard", "length"):
                several = mean_interval([run[key][0] for run in runs])
                record[key] = several if len(runs) > 1 else runs[0][key]
            record["accuracies"] = [run["accuracy"][0] for run in runs]  # a seed each
            for key in ("gate_mass", "gradient"):
                record[key] = mean_interval([run[key] for run in runs])
            for kind in KINDS:
                values = [truth[seed][gate][outcome][kind] for seed in args.seeds]
                values = [value for value in values if value is not None]
                record[kind] = mean_interval(values) if values else None
            records.append(record)
    return records


def make_table(records):
    def percent(value):
        return "-" if value is None else f"{100 * value[0]:.1f}"

    gates = {}  # {gate: its records, one a filter}
    for r in records:
        gates.setdefault(r["gate"], []).append(r)
    header = ["gate", *(f"{kind}, %" for kind in KINDS), "weight, %", "gradient"]
    header += [f"{r['filter']}: points; length" for r in gates[records[0]["gate"]]]
    rows = [
        [gate, *(percent(of_gate[-1][key]) for key in (*KINDS, "gate_mass"))]
        + [f"{of_gate[-1]['gradient'][0]:.3f}"]
        + [both(r["accuracy"], r["length"]) for r in of_gate]
        for gate, of_gate in gates.items()
    ]
    return markdown(header, rows)


def draw(axes, records):
    """Change of accuracy (points) against change of length (percent), a panel a filter, a point a
    gate; names stand beside them, in the order of accuracy.
    """
    filters = list(dict.fromkeys(r["filter"] for r in records))
    low = min(r["accuracy"][0] for r in records)
    high = max(0, *(r["accuracy"][0] for r in records))
    line = 0.055 * (high - low)  # room of a name
    for number, outcome in enumerate(filters):
        panel = axes if number == 0 else axes.inset_axes([1.05 * number, 0, 1, 1], sharey=axes)
        color, place = COLOURS.get(outcome, "#4d4d4d"), np.inf
        of_filter = [r for r in records if r["filter"] == outcome]
        for r in sorted(of_filter, key=lambda r: -r["accuracy"][0]):
            x, y = r["length"][0], r["accuracy"][0]
            place = min(y, place - line)
            arrow = dict(arrowstyle="-", linewidth=0.4, color="#999999", shrinkB=3)
            where = dict(xytext=(-20, place), fontsize=7, va="center", ha="center")
            panel.annotate(r["gate"], (x, y), arrowprops=arrow, **where)
            panel.plot(x, y, "o", color=color, markersize=4)
        panel.plot(0, 0, "o", color="black")  # the model before
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{outcome} rollouts", fontsize=9)
        panel.set_xlabel("change of mean response length, percent")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelleft=number == 0)
    axes.set_ylabel("change of accuracy, points")


def main(argv=None):
    args = parse_args(argv)
    add_oracles()
    for seed in args.seeds:
        if not os.path.isdir(pipeline(args, seed)):
            fail(f"--pipelines {pipeline(args, seed)}: no such directory (reproduce.sh makes them)")
    os.makedirs(args.out, exist_ok=True)
    truth = {seed: measure_truth(args, seed) for seed in args.seeds}
    cells = [(s, g, f) for s in args.seeds for g in args.gates for f in args.filters]
    print(f"{len(cells)} runs, {args.jobs} at a time", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failures = list(filter(None, pool.map(lambda cell: train(args, *cell), cells)))
        if not failures:
            failures = list(filter(None, pool.map(lambda seed: evaluate(args, seed), args.seeds)))
    if failures:
        fail(f"{len(failures)} failed: {'; '.join(failures)}")
    records = collect(args, truth)
    table = make_table(records)
    seeds = ", ".join(map(str, args.seeds))
    made = f"Seeds {seeds}; models {args.pipelines}; {args.steps} steps, rate "
    made += f"{args.lr:g}; {args.problems} held-out problems, one response each; shares of tokens: "
    made += f"{args.filters[-1]} rollouts of 256 problems, first step."
    with open(os.path.join(args.out, "table.md"), "w") as stream:
        stream.write(f"{table}\n\n{made}\n")
    write_json(os.path.join(args.out, "table.json"), dict(args=vars(args), records=records))
    print(f"\n{table}\n\n{made}\n\nwritten: table.md, table.json in {args.out}")
    with figure(os.path.join(args.out, "figure"), size=(4.2, 4.2)) as axes:
        draw(axes, records)


if __name__ == "__main__":
    start(main)
