"""Where teacher and student disagree: reverse KL by class of token (lab/traces.py), on correct
and on incorrect responses to embedded problems.

    python -m lab.token_classes          # tiny/rlvr against itself reading the worked solution:
                                           # what the first step of opsd.py sees
    python -m lab.token_classes --model runs/opsd-incorrect-001    # a trained student
"""

import data
import opsd
import rollout
import samplers
import toy
from data import CONTEXTS
from lab.traces import CLASS_NAMES, token_class
from model import load_model
from run import Parser, add_run_flags, check_out, set_up, start, tiny, write_json
from verify import Verifier


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default=tiny("rlvr"), help="the student")
    parser.add_argument("--teacher", default=tiny("rlvr"), help="the model that reads the context")
    add = add_run_flags(parser)
    add("--out", help="JSON file for the table (else only the screen)")
    samplers.add_sampling_flags(parser)
    add = parser.add_argument_group("measurement").add_argument
    add("--context", default="solution", choices=toy.CONTEXTS)
    add("--problems", type=int, default=512, help="held-out problems, one response each")
    add("--reinject", type=int, default=0, help="as in opsd.py")
    args = parser.parse_args(argv)
    args.teacher_thinking, args.context_first = args.thinking, False
    return args


def by_class(tokenizer, rollouts):
    """{outcome: {class: [sum of reverse KL in nats, tokens]}} of rollouts that have measures."""
    table = {r.outcome: {} for r in rollouts}
    for r in rollouts:
        text = ""
        for token, value in zip(r.response_ids, r.measures["reverse_kl"].tolist(), strict=True):
            row = table[r.outcome].setdefault(token_class(r.problem, text), [0.0, 0])
            row[0] += value
            row[1] += 1
            text += tokenizer.decode([token])
    return table


def print_table(table, count):
    print(f"{'':28s}" + "".join(f"{f'{outcome} ({count[outcome]})':>38s}" for outcome in table))
    columns = f"{'a token':>14s}{'a response':>14s}{'share':>10s}"
    print(f"{'class of token':28s}" + "".join(columns for _ in table))
    for name in CLASS_NAMES:
        line = f"{name:28s}"
        for outcome, classes in table.items():
            value, tokens = classes.get(name, (0.0, 0))
            share = 100 * value / sum(value for value, _ in classes.values())
            line += f"{value / max(1, tokens):14.3f}{value / count[outcome]:14.2f}{share:9.0f}%"
        print(line)


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    device = set_up(args)
    samplers.choose_backend(args, device)
    problems = data.embedded_problems(args.problems, args.seed, held_out=True)
    student, tokenizer = load_model(args.model, device, args.dtype)
    teacher, _ = load_model(args.teacher, device, args.dtype)
    sampler = samplers.make_sampler(student, tokenizer, args)
    rollouts = rollout.make_rollouts(sampler, tokenizer, problems, args, args.seed)
    with Verifier() as verifier:
        rollout.grade_rollouts(verifier, rollouts)
    contexts = CONTEXTS[args.context](rollouts, None, args)
    rollouts, _ = opsd.add_teacher_rows(rollouts, contexts, tokenizer, args, None)
    # Of a step of opsd.py only what it measures is wanted, not its gradient.
    opsd.accumulate_gradients(student, teacher, rollouts, opsd.parse_args([]))
    table = by_class(tokenizer, rollouts)
    count = {outcome: sum(r.outcome == outcome for r in rollouts) for outcome in table}
    print(f"{args.model} against {args.teacher} reading {args.context}; reverse KL in nats")
    print_table(table, count)
    if args.out:
        write_json(args.out, dict(args=vars(args), count=count, table=table))
        print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    start(main)
