"""Accuracy and length of one or several checkpoints against a baseline, with intervals.

1. average@k accuracy: k samples a problem, graded by verify.py; a response that hits the token cap counts as not correct, and is
   counted apart (truncated), as is a response without an answer (no answer) from one with a wrong answer.
2. Length in tokens, eos included, over all responses and over the correct ones: truncation alone can look like compression.
3. Changes are against the first checkpoint: points (pp) of accuracy, percent of mean length, with 95% paired bootstrap intervals
   over problems (the same problems for both; k samples of one problem stay together).
4. Shift: expected number of problems repaired and damaged. Several --data: one table each, then the mean over benchmarks, each counting alike.
5. --context NAME evaluates the prompt-only row as well: the same model reading the teacher's prompt. The student is pulled towards it.

    python eval.py --model tiny/rlvr runs/opsd-correct-001 runs/opsd-incorrect-001
    python eval.py --model tiny/rlvr --context solution
    python eval.py --model Qwen/Qwen3-1.7B runs/qwen --data math500.jsonl aime24.jsonl aime25.jsonl --samples 8 --temperature 0.6 --max-new-tokens 30000
"""

import os
import re

import numpy as np

import ranks
from common import (
    add_run_flags,
    check_out,
    fail,
    load_model,
    make_parser,
    positive,
    provenance,
    set_up,
    write_json,
)
from data import (
    CONTEXTS,
    add_data_flags,
    embedded_problems,
    load_file,
    read_trace,
    require_thinking_switch,
)
from rollout import (
    add_context_flags,
    add_sampling_flags,
    choose_backend,
    grade_rollouts,
    make_rollouts,
    make_sampler,
    make_writer,
)
from verify import Verifier

# Table 3 of the paper: words that mark hesitation.
MARKERS = re.compile(
    r"\b(wait|hmm|perhaps|maybe|actually|alternatively|seems|might|likely|check)\b", re.IGNORECASE
)
EVALUATION_SEED = 1_000_003  # keeps evaluation draws apart from the draws of training steps


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="checkpoints; the first is the baseline of the changes",
    )
    add_run_flags(
        parser,
        out="JSON file for the table and every response's outcome and length (else only the screen)",
    )
    add_data_flags(parser, several=True)
    add_sampling_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--problems", type=int, default=512, help="embedded task: number of held-out problems"
    )
    group.add_argument("--samples", type=int, default=4, help="samples a problem (k of average@k)")
    group.add_argument(
        "--context",
        nargs="*",
        default=[],
        choices=list(CONTEXTS),
        help="also evaluate the first model reading this context",
    )
    add_context_flags(group)
    args = parser.parse_args(argv)
    positive(parser, args, "problems", "samples", "max_new_tokens", "sample_batch")
    return args


def evaluate(sampler, tokenizer, problems, verifier, args, samples=1, contexts=None):
    """`samples` graded rollouts a problem, problem after problem. The same seed each time: checkpoints are compared like with like."""
    repeated = [problem for problem in problems for _ in range(samples)]
    rollouts = make_rollouts(
        sampler, tokenizer, repeated, args, EVALUATION_SEED + args.seed, contexts
    )
    grade_rollouts(verifier, rollouts)
    return rollouts


def summarise(rollouts):
    """The measures of one set of rollouts: rates in percent, lengths in tokens, markers per 1,000 tokens."""
    lengths = np.array([len(r.response_ids) for r in rollouts])
    outcomes = np.array([r.outcome for r in rollouts])
    length = lambda outcome: (
        float(lengths[outcomes == outcome].mean()) if outcome in outcomes else None
    )
    rate = lambda reason: 100 * float(np.mean([r.reason == reason for r in rollouts]))
    return dict(
        responses=len(rollouts),
        accuracy=100 * float((outcomes == "correct").mean()),
        length=float(lengths.mean()),
        length_correct=length("correct"),
        length_incorrect=length("incorrect"),
        truncated=rate("truncated"),
        no_answer=rate("no_answer"),
        wrong=rate("wrong") + rate("timeout"),
        markers=1000
        * sum(len(MARKERS.findall(r.text)) for r in rollouts)
        / max(1, int(lengths.sum())),
    )


def per_problem(rollouts, samples):
    """(accuracy, length), each the mean over a problem's samples: (problems,)."""
    correct = np.array([r.outcome == "correct" for r in rollouts], float).reshape(-1, samples)
    lengths = np.array([len(r.response_ids) for r in rollouts], float).reshape(-1, samples)
    return correct.mean(1), lengths.mean(1)


def paired_bootstrap(before, after, draws=10_000, seed=0):
    """Change of accuracy (points) and of mean length (percent), resampling problems in pairs: each (estimate, draws of it).

    `before` and `after` are what `per_problem` returns, over the same problems in the same order.
    """
    (accuracy0, length0), (accuracy1, length1) = before, after
    rows = np.random.default_rng(seed).integers(
        len(accuracy0), size=(draws, len(accuracy0))
    )  # (draws, problems)
    return dict(
        accuracy=(
            100 * (accuracy1 - accuracy0).mean(),
            100 * (accuracy1 - accuracy0)[rows].mean(1),
        ),  # (), (draws,)
        length=(
            100 * (length1.mean() / length0.mean() - 1),
            100 * (length1[rows].mean(1) / length0[rows].mean(1) - 1),
        ),
    )  # (), (draws,)


def interval(estimate, draws):
    """(estimate, low, high): 95%, by percentiles of the draws."""
    return (float(estimate), *(float(v) for v in np.percentile(draws, [2.5, 97.5])))


def shift(before, after):
    """Expected number of problems repaired (wrong before and right after, one response each) and damaged (the reverse), and the net: figure 4."""
    (old, _), (new, _) = before, after
    return dict(
        repaired=float(((1 - old) * new).sum()),
        damaged=float((old * (1 - new)).sum()),
        net=float((new - old).sum()),
    )


def compare(named, samples, benchmark=""):
    """One record a (name, rollouts) pair and difficulty: `summarise`, plus the change against the first pair."""
    records, groups = [], ["all"]
    difficulties = sorted({r.problem.difficulty for r in named[0][1]} - {""})
    groups += difficulties if len(difficulties) > 1 else []
    for name, rollouts in named:
        for group in groups:
            select = lambda rows: [r for r in rows if group in ("all", r.problem.difficulty)]
            mine, base = (
                per_problem(select(rollouts), samples),
                per_problem(select(named[0][1]), samples),
            )
            record = dict(
                name=name,
                benchmark=benchmark,
                group=group,
                **summarise(select(rollouts)),
                change=None,
            )
            if rollouts is not named[0][1]:
                record["change"] = {
                    key: interval(*value) for key, value in paired_bootstrap(base, mine).items()
                }
                record["shift"] = shift(base, mine)
            records.append(record)
    return records


def compare_mean(benchmarks, samples):
    """The same over several benchmarks, as in the paper: measures and changes are means over benchmarks, each counting alike, shifts are sums."""
    records = []
    for i, (name, _) in enumerate(next(iter(benchmarks.values()))):
        parts = [summarise(named[i][1]) for named in benchmarks.values()]
        mean = lambda key: (
            None if None in (values := [part[key] for part in parts]) else float(np.mean(values))
        )
        record = dict(
            name=name,
            benchmark="mean",
            group="all",
            **{key: mean(key) for key in parts[0]},
            change=None,
        )
        if i:
            pairs = [
                (per_problem(named[0][1], samples), per_problem(named[i][1], samples))
                for named in benchmarks.values()
            ]
            changes = [
                paired_bootstrap(*pair, seed=seed) for seed, pair in enumerate(pairs)
            ]  # a seed each: draws are independent
            record["change"] = {
                key: interval(*(np.mean([change[key][k] for change in changes], 0) for k in (0, 1)))
                for key in changes[0]
            }
            shifts = [shift(*pair) for pair in pairs]
            record["shift"] = {key: sum(part[key] for part in shifts) for key in shifts[0]}
        records.append(record)
    return records


def print_table(records):
    """The records of `compare` as an aligned table."""
    show = lambda interval, unit: (
        f"{interval[0]:+.1f}{unit} [{interval[1]:+.1f}, {interval[2]:+.1f}]"
    )
    rows = [
        (
            "",
            "",
            "accuracy",
            "change, points",
            "length",
            "change, percent",
            "correct's",
            "incorrect's",
            "truncated",
            "no answer",
            "markers/1k",
        )
    ]
    for r in records:
        change = r["change"]
        rows.append(
            (
                r["name"] if r["group"] == "all" else "",
                r["group"],
                f"{r['accuracy']:.1f}",
                show(change["accuracy"], "") if change else "",
                f"{r['length']:.1f}",
                show(change["length"], "%") if change else "",
                *(
                    f"{r[key]:.1f}" if r[key] else "-"
                    for key in ("length_correct", "length_incorrect")
                ),
                f"{r['truncated']:.1f}%",
                f"{r['no_answer']:.1f}%",
                f"{r['markers']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
        )


def trace_table(rollouts):
    """Embedded task: what the traces do on easy and hard steps, in percent of such steps (see data.read_trace)."""
    table = {}
    for kind in (False, True):
        steps = [s for r in rollouts for s in read_trace(r.problem, r.text) if s["hard"] == kind]
        checked = [s for s in steps if s["checked"]]
        conflicts = [s for s in checked if s["conflict"]]
        share = lambda rows, key: 100 * sum(s[key] for s in rows) / max(1, len(rows))
        table["hard" if kind else "easy"] = dict(
            steps=len(steps),
            first_right=share(steps, "first_right"),
            checked=share(steps, "checked"),
            right_if_checked=share(checked, "right"),
            conflict=share(checked, "conflict"),
            careful_in_conflict=share(conflicts, "careful"),
            right=share(steps, "right"),
        )
    return table


def log_evaluation(run, step, before, after):
    """The table of a training run's held-out problems, one response each, on the screen and in metrics.jsonl."""
    records = compare([("before", before), ("after", after)], samples=1)
    print(
        f"\n{len(after)} held-out problems, one response each, after step {step}; change with 95% interval"
    )
    print_table(records)
    run.log("metrics", dict(step=step, evaluation=records))


def load_benchmarks(args):
    """{name: problems}: a benchmark a file or data set of `--data`, or the embedded task's held-out side."""
    if not args.data:
        return {"embedded": embedded_problems(args.problems, args.seed, True, args.hard)}
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.data]
    if len(set(names)) < len(names):
        fail(f"--data {' '.join(args.data)}: two benchmarks of one name")
    return {
        name: load_file(
            path, args.split, args.question_field, args.answer_field, args.solution_field
        )
        for name, path in zip(names, args.data)
    }


def main(argv=None):
    args = parse_args(argv)
    check_out(args)
    device = set_up(args)
    choose_backend(args, device)
    benchmarks = load_benchmarks(args)
    named, traces, sampler = {benchmark: [] for benchmark in benchmarks}, {}, None
    with Verifier() as verifier:
        for path in args.model:
            model, tokenizer = load_model(path, device, args.dtype)
            require_thinking_switch(tokenizer, args.thinking == "on")
            sampler = make_sampler(model, tokenizer, args, sampler)
            for benchmark, problems in benchmarks.items():
                for context in ["none", *(args.context if path == args.model[0] else [])]:
                    name, contexts = path, None
                    if (
                        context != "none"
                    ):  # written ones reflect on the model's own responses, just sampled
                        contexts = CONTEXTS[context](
                            named[benchmark][0][1], make_writer(sampler, tokenizer, args, args.seed)
                        )
                        name = f"{path} reading {context}"
                        if None in contexts:
                            print(
                                f"{name}: {contexts.count(None)} of {len(contexts)} contexts failed; those responses are without one"
                            )
                    rollouts = evaluate(
                        sampler, tokenizer, problems, verifier, args, args.samples, contexts
                    )
                    named[benchmark].append((name, rollouts))
                    if not args.data and args.thinking == "on":
                        traces[name] = trace_table(rollouts)
                    print(f"evaluated {name}" + f" on {benchmark}" * bool(args.data), flush=True)
    records = []
    for benchmark, problems in benchmarks.items():
        records += (table := compare(named[benchmark], args.samples, benchmark))
        print(
            f"\n{benchmark}: {len(problems)} problems, {args.samples} responses each, temperature {args.temperature}, cap {args.max_new_tokens} tokens; change with 95% interval"
        )
        print_table(table)
    if len(benchmarks) > 1:
        records += (table := compare_mean(named, args.samples))
        print("\nmean over the benchmarks")
        print_table(table)
    for r in records:
        if r["change"] and r["group"] == "all":
            print(
                f"\nshift of {r['name']} on {r['benchmark']}, expected problems: repaired {r['shift']['repaired']:.1f}, damaged {r['shift']['damaged']:.1f}, net {r['shift']['net']:+.1f}",
                end="",
            )
    print()
    for name, table in traces.items():
        print(f"\nsteps of {name}, percent")
        for kind, row in table.items():
            print(
                f"  {kind}  "
                + "  ".join(
                    f"{key.replace('_', ' ')} {value:.1f}" if key != "steps" else f"{value} steps"
                    for key, value in row.items()
                )
            )
    if args.out:
        grid = lambda rollouts, value: [
            [value(r) for r in rollouts[i : i + args.samples]]
            for i in range(0, len(rollouts), args.samples)
        ]
        responses = {
            benchmark: dict(
                questions=[p.question for p in benchmarks[benchmark]],
                difficulties=[p.difficulty for p in benchmarks[benchmark]],
                models=[
                    dict(
                        name=name,
                        reasons=grid(rollouts, lambda r: r.reason),
                        lengths=grid(rollouts, lambda r: len(r.response_ids)),
                    )
                    for name, rollouts in pairs
                ],
            )
            for benchmark, pairs in named.items()
        }
        write_json(
            args.out,
            dict(
                args=vars(args), **provenance(), records=records, traces=traces, responses=responses
            ),
        )
        print(f"\nwritten to {args.out}")
    ranks.stop()


if __name__ == "__main__":
    main()
