"""The tokens on which the teacher differs most from the student, in context: what does it want?

    python -m tools.show --model tiny/rlvr --problems 40 --jsonl tokens.jsonl --out page.html
    python -m lab.top_tokens tokens.jsonl --context solution

For correct and for incorrect responses (not for truncated ones) the sampled tokens with the largest
mean reverse KL, in nats: how many there are, that mean, their share of the KL of all such
responses, and the place with the largest KL: what stood before, and what student and teacher think
of the next token.
"""

import json

if __name__ == "__main__":
    from launch import start

from run import Parser, fail
from tools import markdown, open_text


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", help="what tools.show --jsonl wrote")
    add("--context", default="solution", help="what the teacher reads")
    add("--count", type=int, default=20, help="tokens a table")
    add("--least", type=int, default=5, help="occurrences of a token, or it is left out")
    add("--before", type=int, default=24, help="characters shown in front of a token")
    return parser.parse_args(argv)


def places(records, context):
    """{token text: [(KL, record, position), ...]} of these responses' tokens."""
    found = {}
    for record in records:
        values = record["contexts"][context]["reverse_kl"]
        for t, (text, value) in enumerate(zip(record["tokens"], values, strict=True)):
            found.setdefault(text, []).append((value, record, t))
    return found


def make_table(records, args):
    """Of the responses of one outcome; see above."""
    found = places(records, args.context)
    total = sum(value for rows in found.values() for value, _, _ in rows) or 1.0
    rows = []
    for text, seen in found.items():
        if len(seen) < args.least:
            continue
        mass = sum(value for value, _, _ in seen)
        mean = mass / len(seen)
        _, record, t = max(seen, key=lambda row: row[0])
        before = "".join(record["tokens"][:t])[-args.before :]
        best = record["student_best"][t], record["contexts"][args.context]["teacher_best"][t]
        cells = [shown(text), str(len(seen)), f"{mean:.3f}", f"{100 * mass / total:.0f}"]
        rows.append((mean, [*cells, shown(before), *map(likeliest, best)]))
    rows = [cells for _, cells in sorted(rows, key=lambda row: -row[0])[: args.count]]
    header = ["token", "times", "mean KL", "of all KL, %", "a place: before it"]
    return markdown([*header, "student there", "teacher there"], rows)


def shown(text):
    text = text or "(the start)"
    return "`" + text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'") + "`"


def likeliest(best):
    return ", ".join(f"{shown(text)} {probability:.2f}" for text, probability in best[:2])


def main(argv=None):
    args = parse_args(argv)
    try:
        with open_text(args.file) as stream:
            records = [json.loads(line) for line in stream]
    except OSError as error:
        fail(f"{args.file}: {error.strerror}")
    except ValueError as error:
        fail(f"{args.file}: not what tools.show --jsonl writes ({error})")
    if not records or args.context not in records[0].get("contexts", ()):
        fail(f"--context {args.context}: not in {args.file}")
    for outcome in ("correct", "incorrect"):
        of_outcome = [r for r in records if r["outcome"] == outcome and not r["after"]]
        print(f"\n{outcome} responses: {len(of_outcome)}\n\n{make_table(of_outcome, args)}")


if __name__ == "__main__":
    start(main)
