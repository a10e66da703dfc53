"""Accuracy and length of one or several checkpoints against a baseline, with intervals.

1. average@k accuracy: k samples a problem, graded by verify.py. A response that hits the token cap
   is not correct and counted apart (truncated), as is one without an answer from a wrong one.
2. Length in tokens, eos included, over all responses and over the correct ones: truncation alone
   can look like compression.
3. Changes are against the first checkpoint: points of accuracy, percent of mean length, with 95%
   paired bootstrap intervals over problems (k samples of one problem stay together).
4. Shift: expected number of problems repaired and damaged (figure 4). Several --data: one table
   each, then the mean over benchmarks, each counting alike.
5. --context NAME evaluates the prompt-only row as well: the first model reading the teacher's
   prompt. The student is pulled towards it.

    python eval.py --model tiny/rlvr runs/opsd-correct-001 runs/opsd-incorrect-001
    python eval.py --model tiny/rlvr --context solution
    python eval.py --model Qwen/Qwen3-1.7B runs/qwen --data math500.jsonl aime24.jsonl \\
        --samples 8 --temperature 0.6 --max-new-tokens 30000
"""

import os
import re

import numpy as np

import data
import ranks
import rollout
import samplers
from answers import extract
from data import CONTEXTS
from model import load_model, load_tokenizer
from run import (
    Parser,
    add_run_flags,
    check_out,
    fail,
    provenance,
    set_up,
    start,
    write_json,
)
from verify import Verifier

# Table 3 of the paper: words that mark hesitation.
MARKERS = re.compile(
    r"\b(wait|hmm|perhaps|maybe|actually|alternatively|seems|might|likely|check)\b", re.IGNORECASE
)
EVALUATION_SEED = 1_000_003  # keeps evaluation draws apart from the draws of training steps
DRAWS = 10_000  # of the bootstrap


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="checkpoints; first: baseline")
    add = add_run_flags(parser)
    add(
        "--out", help="JSON file, .json or .json.gz: the table, and every response with its verdict"
    )
    data.add_data_flags(parser, several=True)
    samplers.add_sampling_flags(parser)
    add = add_evaluation_flags(parser)
    add("--context", nargs="*", default=[], choices=list(CONTEXTS), help="prompt-only rows")
    rollout.add_context_flags(add)
    return parser.parse_args(argv)


def add_evaluation_flags(parser):
    add = parser.add_argument_group("evaluation").add_argument
    add("--problems", type=int, default=512, help="embedded task: number of held-out problems")
    add("--samples", type=int, default=4, help="samples a problem (k of average@k)")
    return add


# ------------------------------------------------------------------------------------------------
# Measures and intervals


def evaluate(sampler, tokenizer, problems, verifier, args, samples=1, contexts=None):
    """`samples` graded rollouts a problem, problem after problem.

    The same seed each time: checkpoints are compared like with like.
    """
    repeated = [problem for problem in problems for _ in range(samples)]
    seed = EVALUATION_SEED + args.seed
    rollouts = rollout.make_rollouts(sampler, tokenizer, repeated, args, seed, contexts)
    rollout.grade_rollouts(verifier, rollouts)
    return rollouts


def summarise(rollouts):
    """The measures of a set of rollouts: rates in percent, lengths in tokens, markers per 1,000."""
    lengths = np.array([len(r.response_ids) for r in rollouts])
    outcomes = np.array([r.outcome for r in rollouts])
    reasons = np.array([r.reason for r in rollouts])

    def length(outcome):
        return float(lengths[outcomes == outcome].mean()) if outcome in outcomes else None

    def rate(*names):
        return 100 * float(np.isin(reasons, names).mean())

    markers = sum(len(MARKERS.findall(r.text)) for r in rollouts)
    return dict(
        responses=len(rollouts),
        accuracy=100 * float((outcomes == "correct").mean()),
        length=float(lengths.mean()),
        length_correct=length("correct"),
        length_incorrect=length("incorrect"),
        truncated=rate("truncated"),
        no_answer=rate("no_answer"),
        wrong=rate("wrong", "timeout"),
        markers=1000 * markers / max(1, int(lengths.sum())),
    )


def per_problem(rollouts):
    """(accuracy, length), each the mean over a question's responses: (problems,). Rows that repeat
    a question are not independent: they are one problem.
    """
    responses = {}
    for r in rollouts:
        row = r.outcome == "correct", len(r.response_ids)
        responses.setdefault(r.problem.question, []).append(row)
    return np.array([np.mean(rows, 0) for rows in responses.values()]).T


def paired_bootstrap(before, after, seed=0):
    """Change of accuracy (points) and of mean length (percent), resampling problems in pairs: each
    (estimate, draws of it). `before` and `after` are what `per_problem` returns, over the same
    problems in the same order.
    """
    (accuracy0, length0), (accuracy1, length1) = before, after
    gained = 100 * (accuracy1 - accuracy0)  # (problems,)
    problems = len(gained)
    rows = np.random.default_rng(seed).integers(problems, size=(DRAWS, problems))
    shorter = length1[rows].mean(1) / length0[rows].mean(1)  # (DRAWS,)
    return dict(
        accuracy=(gained.mean(), gained[rows].mean(1)),
        length=(100 * (length1.mean() / length0.mean() - 1), 100 * (shorter - 1)),
    )


def interval(estimate, draws):
    """(estimate, low, high): 95%, by percentiles of the draws."""
    return (float(estimate), *(float(v) for v in np.percentile(draws, [2.5, 97.5])))


def shift(before, after):
    """Expected number of problems repaired (wrong before and right after, one response each) and
    damaged (the reverse), and the net: figure 4.
    """
    (old, _), (new, _) = before, after
    return dict(
        repaired=float(((1 - old) * new).sum()),
        damaged=float((old * (1 - new)).sum()),
        net=float((new - old).sum()),
    )


# ------------------------------------------------------------------------------------------------
# Comparisons


def compare(named, benchmark=""):
    """One record a (name, rollouts) pair and difficulty: `summarise`, and the change against the
    first pair.
    """
    _, first = named[0]
    difficulties = sorted({r.problem.difficulty for r in first} - {""})
    groups = ["all", *(difficulties if 1 < len(difficulties) <= 10 else [])]  # not a solve rate's
    records = []
    for name, rollouts in named:
        for group in groups:
            pair = of_group(first, group), of_group(rollouts, group)
            record = dict(name=name, benchmark=benchmark, group=group)
            records.append(dict(record, **compared([pair], rollouts is first)))
    return records


def of_group(rollouts, group):
    return [r for r in rollouts if group in ("all", r.problem.difficulty)]


def compare_mean(benchmarks):
    """The same over several benchmarks, as in the paper: measures and changes are means over
    benchmarks, each counting alike, shifts are sums.
    """
    records = []
    for named in zip(*benchmarks.values(), strict=True):  # one model on all benchmarks
        firsts = [named[0][1] for named in benchmarks.values()]
        pairs = list(zip(firsts, [rollouts for _, rollouts in named], strict=True))
        record = dict(name=named[0][0], benchmark="mean", group="all")
        records.append(dict(record, **compared(pairs, not records)))
    return records


def compared(pairs, baseline):
    """The measures of a model, its change and shift against the baseline; `pairs` is a list of
    (baseline's rollouts, model's rollouts), one a benchmark.
    """
    parts, record = [summarise(mine) for _, mine in pairs], dict(change=None)
    for key in parts[0]:
        values = [part[key] for part in parts]
        record[key] = None if None in values else float(np.mean(values))
    if baseline:
        return record
    measured = [(per_problem(base), per_problem(mine)) for base, mine in pairs]
    # A seed each: draws are independent.
    changes = [paired_bootstrap(*pair, seed=seed) for seed, pair in enumerate(measured)]
    record["change"] = {}
    for key in ("accuracy", "length"):
        estimates, draws = zip(*(change[key] for change in changes), strict=True)
        record["change"][key] = interval(np.mean(estimates), np.mean(draws, 0))
    shifts = [shift(*pair) for pair in measured]
    record["shift"] = {key: sum(part[key] for part in shifts) for key in shifts[0]}
    return record


def table_of(records):
    """The records of `compare` as an aligned table, a text."""

    def changed(record, key):
        if not record["change"]:
            return ""
        estimate, low, high = record["change"][key]
        unit = "%" if key == "length" else ""
        return f"{estimate:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"

    def number(value):
        return f"{value:.1f}" if value else "-"

    # Columns that say nothing are left out; the line below the table says it.
    rates = [key for key in ("truncated", "no_answer") if any(r[key] for r in records)]
    header = ["", "", "accuracy", "change, points", "length", "change, percent", "correct", "wrong"]
    rows = [[*header, *(key.replace("_", " ") for key in rates), "markers"]]
    for r in records:
        first = r["group"] == "all"
        row = [r["name"] if first else "", r["group"], f"{r['accuracy']:.1f}"]
        row += [changed(r, "accuracy"), f"{r['length']:.1f}", changed(r, "length")]
        row += [number(r["length_correct"]), number(r["length_incorrect"])]
        rows.append(row + [f"{r[key]:.1f}%" for key in rates] + [f"{r['markers']:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:2] = row[0].ljust(widths[0]), row[1].ljust(widths[1])
        lines.append("  ".join(cells))
    lines.append(
        "length in tokens: of all, of correct, of wrong responses; markers per 1,000 tokens"
    )
    zero = [key.replace("_", " ") for key in ("truncated", "no_answer") if key not in rates]
    return "\n".join(lines + ([f"{' and '.join(zero)}: 0.0%"] if zero else []))


class HeldOut:
    """The held-out problems of a training run: evaluated now, on its way and after it."""

    def __init__(self, sampler, tokenizer, problems, verifier, args):
        if problems:
            problems = rollout.drop_long(problems, tokenizer, args, sampler.limit)
        self.inputs, self.args = (sampler, tokenizer, problems, verifier, args), args
        self.problems = problems
        self.before = self.respond() if problems else None

    def respond(self):
        print(f"evaluating {len(self.problems)} held-out problems", flush=True)
        return evaluate(*self.inputs)

    def evaluate(self, run, step, last=False):
        """Prints and logs the table after `step` steps, at the end or if --eval-every says so."""
        every = self.args.eval_every
        due = last or every and step % every == 0 and step < self.args.steps
        if not self.problems or not due:
            return
        records = compare([("before", self.before), ("after", self.respond())])
        about = f"{len(self.problems)} held-out problems, one response each, after step {step}"
        run.table = f"{about}; change with 95% interval\n{table_of(records)}"
        print(f"\n{run.table}")
        run.log("metrics", dict(step=step, evaluation=records))


# ------------------------------------------------------------------------------------------------


def load_benchmarks(args):
    """{name: problems}: one a file or data set of `--data`, or the embedded held-out side."""
    if not args.data:
        return {"embedded": data.embedded_problems(args.problems, args.seed, held_out=True)}
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.data]
    if len(set(names)) < len(names):
        fail(f"--data {' '.join(args.data)}: two benchmarks of one name")
    files = [data.load_file(args, path) for path in args.data]
    return dict(zip(names, files, strict=True))


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    device = set_up(args)
    samplers.choose_backend(args, device)
    benchmarks = load_benchmarks(args)
    for problems in benchmarks.values():
        for context in args.context:
            data.require_solutions(problems, context)
    for path in args.model:
        load_tokenizer(path)  # a wrong one is found here, not after the first was evaluated
    named = {benchmark: [] for benchmark in benchmarks}
    sampler = None
    with Verifier() as verifier:
        for path in args.model:
            model, tokenizer = load_model(path, device, args.dtype)
            data.require_thinking_switch(tokenizer, args.thinking == "on")
            sampler = samplers.make_sampler(model, tokenizer, args, sampler)
            for benchmark, problems in benchmarks.items():
                contexts = args.context if path == args.model[0] else []
                for context in dict.fromkeys(["none", *contexts]):
                    name, texts = path, None
                    if context != "none":
                        # Written ones reflect on the model's own responses, just sampled.
                        write = rollout.make_writer(sampler, tokenizer, args, args.seed)
                        texts = CONTEXTS[context](named[benchmark][0][1], write, args)
                        name = f"{path} reading {context}"
                        if None in texts:
                            failed = f"{texts.count(None)} of {len(texts)} contexts failed"
                            print(f"{name}: {failed}; those responses are without one")
                    print(f"evaluating {name} on {benchmark}", flush=True)
                    rollouts = evaluate(
                        sampler, tokenizer, problems, verifier, args, args.samples, texts
                    )
                    named[benchmark].append((name, rollouts))
    records = report(benchmarks, named, args)
    if args.out:
        write_evaluation(named, records, args)
    ranks.leave()


def report(benchmarks, named, args):
    """Prints all tables; returns the records."""
    records = []
    settings = f"temperature {args.temperature}, cap {args.max_new_tokens} tokens"
    for benchmark, problems in benchmarks.items():
        table = compare(named[benchmark], benchmark)
        counts = f"{len(problems)} problems, {args.samples} responses each"
        print(f"\n{benchmark}: {counts}, {settings}; change with 95% interval")
        print(table_of(table))
        records += table
    if len(benchmarks) > 1:
        table = compare_mean(named)
        print("\nmean over the benchmarks")
        print(table_of(table))
        records += table
    print()
    for r in records:
        if r["change"] and r["group"] == "all":
            counts = ", ".join(f"{key} {value:.1f}" for key, value in r["shift"].items())
            print(f"shift of {r['name']} on {r['benchmark']}, expected problems: {counts}")
    return records


def write_evaluation(named, records, args):
    """Writes --out: the settings, all tables, and every response with its verdict."""
    responses = {
        benchmark: {name: [response_of(r) for r in rollouts] for name, rollouts in pairs}
        for benchmark, pairs in named.items()
    }
    record = dict(args=vars(args), **provenance(), records=records, responses=responses)
    write_json(args.out, record)
    print(f"\nwritten to {args.out}")


def response_of(r):
    return dict(
        question=r.problem.question,
        difficulty=r.problem.difficulty,
        gold=r.problem.answer,
        response=r.text,
        answer=extract(r.text) if r.finished else None,
        verdict=r.reason,
        length=len(r.response_ids),
    )


if __name__ == "__main__":
    start(main)
