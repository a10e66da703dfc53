"""An evaluation of eval.py as results/ keeps it: small enough for the repository.

Of each response reason and length, a list a problem, and no text; of embedded problems with
thinking on what the traces do (lab/traces.py), which is read from the texts.

    python eval.py --model tiny/rlvr --problems 64 --samples 2 --out runs/e.json
    python -m lab.keep runs/e.json runs/small.json.gz
"""

if __name__ == "__main__":
    from launch import start

from data import embedded_problems
from lab.traces import trace_table
from run import Parser, write_json
from tools import read_json


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("evaluation", help="what eval.py --out wrote")
    parser.add_argument("out", help="the file to keep, .json or .json.gz")
    return parser.parse_args(argv)


def compact(evaluation):
    """The evaluation in short; one that is in short already as it is."""
    if "traces" in evaluation:
        return evaluation
    args, responses = evaluation["args"], {}
    for benchmark, named in evaluation["responses"].items():
        first = next(iter(named.values()))[:: args["samples"]]
        responses[benchmark] = dict(
            questions=[row["question"] for row in first],
            difficulties=[row["difficulty"] for row in first],
            models=[outcomes_of(name, rows, args["samples"]) for name, rows in named.items()],
        )
    traces = {}
    if not args["data"] and args["thinking"] == "on":
        problems = embedded_problems(args["problems"], args["seed"], held_out=True)
        problems = {problem.question: problem for problem in problems}
        for name, rows in evaluation["responses"]["embedded"].items():
            traces[name] = trace_table(
                [(problems[row["question"]], row["response"]) for row in rows]
            )
    return dict(evaluation, traces=traces, responses=responses)


def outcomes_of(name, rows, samples):
    rows = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return dict(
        name=name,
        reasons=[[r["verdict"] for r in row] for row in rows],
        lengths=[[r["length"] for r in row] for row in rows],
    )


def main(argv=None):
    args = parse_args(argv)
    write_json(args.out, compact(read_json(args.evaluation)))


if __name__ == "__main__":
    start(main)
