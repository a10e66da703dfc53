"""Accuracy and length of graded rollouts; changes with intervals; a run's held-out problems.

1. A response that hits the token cap is not correct and counted apart (truncated), as is one
   without an answer from a wrong one.
2. Length in tokens, eos included, over all responses and over the correct ones: truncation alone
   can look like compression.
3. Changes: points of accuracy, percent of mean length, with 95% paired bootstrap intervals over
   problems (all responses to one question stay together).
"""

import re

import numpy as np

import rollout

# Table 3 of the paper: words that mark hesitation.
MARKERS = re.compile(
    r"\b(wait|hmm|perhaps|maybe|actually|alternatively|seems|might|likely|check)\b", re.IGNORECASE
)
EVALUATION_SEED = 1_000_003  # keeps evaluation draws apart from the draws of training steps
DRAWS = 10_000  # of the bootstrap


def evaluate(sampler, tokenizer, problems, verifier, args, samples=1, contexts=None):
    """`samples` graded rollouts a problem, problem after problem; each time with the same seed."""
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
    """(correct responses, their tokens, their number), sums over all responses to a question:
    (3, problems). Rows that repeat a question are not independent: they are one problem.
    """
    sums = {}
    for r in rollouts:
        row = np.array([r.outcome == "correct", len(r.response_ids), 1.0])
        sums[r.problem.question] = sums.get(r.problem.question, 0) + row
    return np.array(list(sums.values())).T


def paired_bootstrap(before, after, seed=0):
    """Change of accuracy (points) and of mean length (percent), resampling problems in pairs: each
    (estimate, draws of it). `before` and `after` are what `per_problem` returns, over the same
    problems in the same order.
    """
    (correct0, length0, responses), (correct1, length1, _) = before, after  # (problems,)

    def changes(rows):  # (..., problems) -> (...) each; responses weigh alike, as in `summarise`
        points = 100 * (correct1 - correct0)[rows].sum(-1) / responses[rows].sum(-1)
        return points, 100 * (length1[rows].sum(-1) / length0[rows].sum(-1) - 1)

    every = np.arange(len(responses))
    drawn = np.random.default_rng(seed).integers(len(every), size=(DRAWS, len(every)))
    (points, percent), (points_drawn, percent_drawn) = changes(every), changes(drawn)
    return dict(accuracy=(points, points_drawn), length=(percent, percent_drawn))


def interval(estimate, draws):
    """(estimate, low, high): 95%, by percentiles of the draws."""
    return (float(estimate), *(float(v) for v in np.percentile(draws, [2.5, 97.5])))


def shift(before, after):
    """Expected number of problems repaired (wrong before and right after, one response each) and
    damaged (the reverse), and the net: figure 4.
    """
    old, new = before[0] / before[2], after[0] / after[2]  # (problems,)
    repaired, damaged = float(((1 - old) * new).sum()), float((old * (1 - new)).sum())
    return dict(repaired=repaired, damaged=damaged, net=repaired - damaged)


def compare(named, benchmark=""):
    """A record for each (name, rollouts) and difficulty: measures, and changes from the first."""
    _, first = named[0]
    difficulties = sorted({r.problem.difficulty for r in first} - {""})
    groups = ["all", *(difficulties if 1 < len(difficulties) <= 10 else [])]  # not a solve rate's
    records = []
    for name, rollouts in named:
        for group in groups:
            pair = [
                [r for r in rows if group in ("all", r.problem.difficulty)]
                for rows in (first, rollouts)
            ]
            record = dict(name=name, benchmark=benchmark, group=group)
            records.append(dict(record, **compared([pair], rollouts is first)))
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

    def changed(record, key, unit=""):
        if not record["change"]:
            return ""
        estimate, low, high = record["change"][key]
        return f"{estimate:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"

    def number(value):
        return f"{value:.1f}" if value else "-"

    # Columns that say nothing are left out; the line below the table says it.
    rates = [key for key in ("truncated", "no_answer") if any(r[key] for r in records)]
    header = ["", "", "accuracy", "change, points", "length", "correct", "wrong", "change, percent"]
    rows = [[*header, *(key.replace("_", " ") for key in rates), "markers"]]
    for r in records:
        first = r["group"] == "all"
        row = [r["name"] if first else "", r["group"], f"{r['accuracy']:.1f}"]
        row += [changed(r, "accuracy"), f"{r['length']:.1f}", number(r["length_correct"])]
        row += [number(r["length_incorrect"]), changed(r, "length", "%")]
        rows.append(row + [f"{r[key]:.1f}%" for key in rates] + [f"{r['markers']:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:2] = row[0].ljust(widths[0]), row[1].ljust(widths[1])
        lines.append("  ".join(cells))
    lines += [
        "length: tokens of all, of correct, of wrong responses; markers (wait, ...) per 1,000"
    ]
    zero = [key.replace("_", " ") for key in ("truncated", "no_answer") if key not in rates]
    return "\n".join(lines + ([f"{' and '.join(zero)}: 0.0%"] if zero else []))


class HeldOut:
    """The held-out problems of a training run: evaluated now, on its way and after it."""

    def __init__(self, sampler, tokenizer, problems, verifier, args):
        if problems:
            problems = rollout.drop_long(problems, tokenizer, args, sampler.limit)
        self.problems, self.args = problems, args
        self.inputs = sampler, tokenizer, problems, verifier, args
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
# Has the student arrived?

SETTLED = 0.05  # chosen on three pipelines that no table has


def kl_share(kls):
    """Mean reverse KL of the last three updates as a share of the first three's, from that of every
    update; None before the sixth.
    """
    return sum(kls[-3:]) / sum(kls[:3]) if len(kls) > 5 and any(kls[:3]) else None


def settled(kls):
    """A line for the end of a run. Accuracy dips while the KL falls, and comes back with it or
    later; on incorrect rollouts the KL may never fall: see docs/findings.md.
    """
    share = kl_share(kls)
    if share is None:
        return ""
    text = f"reverse KL {100 * share:.0f}% of the first steps'"
    if share < SETTLED:
        return f"{text}: settled (accuracy may take as long again)\n"
    return f"{text}: not settled (below {SETTLED:.0%})\n"
