"""The token view: what the teacher would have said, token by token, as a page that opens from disk.

The model answers held-out problems; the same model, frozen, then reads the very same tokens behind
each context in turn. Every token is coloured by a measure (S student, T teacher), in nats:
    reverse KL   sum_v S log(S/T), what OPSD trains on
    log-ratio    log T(y_t) - log S(y_t) of the sampled token, OPSD's advantage of the token
    entropies    of S and of T; and the gate, the factor on the token's loss

1. Of --draw answers --problems are shown: those not correct up to half, then correct ones. So the
   shown outcomes are no accuracy; that of the whole draw stands on the page.
2. With --run the model after OPSD answers them as well, measured against the same teacher.
3. The reference is shown in part, too: --shares percent of the solution's characters, without the
   sentence that gives the answer.
4. --jsonl writes the data, one line a response, arrays aligned with its tokens, unrounded.
5. All flags but those below are opsd.py's, with its defaults: model, data, sampling, gate.

    python -m tools.show --out page.html                    # the embedded model and task
    python -m tools.show --model MODEL --run runs/mine --data heldout.jsonl --max-new-tokens 2048 \\
        --shares --out page.html

docs/tokens.html and its picture. The address names what is seen: response, token, context, measure,
and, if need be, outcome and theme (#r7after.t32.part.ratio.incorrect.dark).
    python opsd.py --filter correct --out runs/opsd-correct-001
    python -m tools.show --run runs/opsd-correct-001 --problems 16 --out docs/tokens.html
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,1300 \\
        --user-data-dir=.chromium --screenshot=docs/tokens.png \\
        "file://$PWD/docs/tokens.html#r2.t10.solution.kl"
"""

import argparse
import json
import os

import torch

import data
import opsd
import rollout
import samplers
from eval import evaluate, summarise
from model import chunks_of, load_model, response_hidden, take
from ranks import open_head
from run import Parser, check_out, fail, set_up, start, write_whole
from verify import Verifier

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "show.html")
BEST = 5  # tokens listed of each distribution
SHOWN = ["none", "instruction", "other", "answer", "part", "solution"]  # by what they give away
EMBEDDED_NOTE = (
    "The problems are chains of sums; “-59?” is a smudged digit that a quick scan takes for 5 "
    "and a careful one for 9."
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", help="the page, an HTML file", required=True)
    add("--run", help="run directory: the same model after OPSD, shown beside it")
    add("--problems", type=int, default=12, help="problems on the page")
    add("--draw", type=int, default=0, help="problems answered, to choose from; 0 = 4 x --problems")
    contexts = [*data.CONTEXTS, "part"]
    add("--contexts", nargs="+", default=SHOWN, choices=contexts, help="part: half the solution")
    percent = "percent of the solution: stops of the slider beside 0 (none), 50 (part) and 100"
    add("--shares", nargs="*", type=int, default=[17, 33, 67, 83], help=percent)
    add("--jsonl", help="file for the data, one line a response")
    own, flags = parser.parse_known_args(argv)
    args = argparse.Namespace(**vars(opsd.parse_args(flags)) | vars(own))
    if args.problems < 1:
        fail(f"--problems {args.problems}: at least 1")
    if any(not 0 < share < 100 for share in args.shares):
        fail(f"--shares {' '.join(map(str, args.shares))}: above 0 and below 100")
    args.draw = args.draw or 4 * args.problems
    return args


# ------------------------------------------------------------------------------------------------
# Contexts: those of data.py, and parts of the solution


def part_of(percent):
    """The solution's first `percent` of characters, behind the words that introduce it."""
    opening = data.REFERENCE.partition("{solution}")[0]

    def context(rollouts, write, args):
        texts = [data.fill("{solution}", r) for r in rollouts]
        return [opening + text[: round(len(text) * percent / 100)] for text in texts]

    return context


def page_contexts(args):
    """({name: context function}, the slider's stops: [(percent, name), ...])."""
    parts = {share: f"part{share}" for share in args.shares if share != 50}
    known = {**data.CONTEXTS, "part": part_of(50)}
    contexts = {name: known[name] for name in args.contexts}
    contexts.update({name: part_of(share) for share, name in parts.items()})
    stops = sorted({0: "none", 50: "part", 100: "solution", **parts}.items())
    return contexts, [stop for stop in stops if stop[1] in contexts]


# ------------------------------------------------------------------------------------------------
# The data: what other modules know comes from these two functions


def answer_problems(args, device):
    """(tokenizer, {path: (model, its rollouts)}, contexts: {name: a text a problem}, limit)."""
    if args.data:
        problems = data.load_file(args, args.data)[: args.draw]
    else:
        problems = data.embedded_problems(args.draw, args.seed, held_out=True)
    answers, texts = {}, {}
    with Verifier() as verifier:
        for path in filter(None, [args.model, args.run]):
            model, tokenizer = load_model(path, device, args.dtype)
            data.require_thinking_switch(tokenizer, args.thinking == "on")
            sampler = samplers.make_sampler(model, tokenizer, args)
            rollouts = evaluate(sampler, tokenizer, problems, verifier, args)
            answers[path] = model, rollouts
            if not texts:  # the teacher writes its contexts about its own answers
                write = rollout.make_writer(sampler, tokenizer, args, args.seed)
                contexts, _ = page_contexts(args)
                texts = {name: make(rollouts, write, args) for name, make in contexts.items()}
    return tokenizer, answers, texts, sampler.limit


def measure_response(student, teacher, answer, prompts, args):
    """The arrays of one response, aligned with its tokens: (the student's, {context: teacher's}).

    prompts: {context: the teacher's prompt ids}. In nats; the best tokens as (id, probability).
    """
    answer.weight = 1.0
    tokens = opsd.tokens_of([answer], student.device)
    of_student = dict(student_entropy=[], student_logp=[], student_best=[])
    names = ("reverse_kl", "log_ratio", "teacher_entropy", "gate", "teacher_best")
    of_teacher = {context: {name: [] for name in names} for context in prompts}
    with torch.inference_mode():
        hidden = response_hidden(student, [answer.row])  # (R, D)
        behind = {  # (R, D) each
            context: response_hidden(teacher, [(prompt, answer.response_ids)])
            for context, prompt in prompts.items()
        }
        head, teacher_head = open_head(student)[0], open_head(teacher)[0]
        for chunk in chunks_of(hidden, student):
            part = take(tokens, chunk)
            student_logps = torch.log_softmax(head(hidden[chunk]).float(), -1)  # (C, V)
            of_student["student_best"] += best_tokens(student_logps)
            for context, row in of_teacher.items():
                logits = teacher_head(behind[context][chunk])  # (C, V)
                teacher_logps = torch.log_softmax(logits.float(), -1)  # (C, V)
                _, found = opsd.token_loss(student_logps, teacher_logps, part, args)
                found["log_ratio"] = opsd.sampled(teacher_logps, part) - found["logp"]  # (C,)
                for name in names[:-1]:
                    row[name] += found[name].tolist()
                row["teacher_best"] += best_tokens(teacher_logps)
            of_student["student_entropy"] += found["student_entropy"].tolist()
            of_student["student_logp"] += found["logp"].tolist()
    return of_student, of_teacher


def best_tokens(logps):
    """The likeliest tokens at each position of (C, V): [[(id, probability), ...], ...]."""
    top = logps.topk(min(BEST, logps.shape[-1]))  # (C, BEST)
    rows = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


class TokenTexts(dict):
    """{token id: its text}, read behind another token: alone, many lose their leading space."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False).input_ids[-1:]

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def __missing__(self, token):
        text = self.decode([*self.before, token])
        self[token] = text[len(self.decode(self.before)) :]
        return self[token]

    def best(self, rows):
        return [[(self[token], round(p, 4)) for token, p in row] for row in rows]


def choose(rollouts, count):
    """Numbers of the rollouts to show: those not correct up to half, then correct ones."""
    wrong = [i for i, r in enumerate(rollouts) if r.outcome != "correct"]
    right = [i for i, r in enumerate(rollouts) if r.outcome == "correct"]
    wrong = wrong[: max(count // 2, count - len(right))]
    return sorted(wrong + right[: count - len(wrong)])


def make_records(args, tokenizer, answers, texts, limit):
    """The lines of --jsonl: a dict a response."""
    records, token_texts = [], TokenTexts(tokenizer)
    teacher, rollouts = answers[args.model]
    chosen = choose(rollouts, args.problems)
    for number, i in enumerate(chosen):
        problem = rollouts[i].problem
        if failed := [name for name in texts if texts[name][i] is None]:
            print(f"problem {i + 1} is left out: the teacher wrote no {failed[0]}")
            continue
        layout = args.thinking == "on", args.context_first
        prompts = {
            name: data.render_prompt(tokenizer, problem, texts[name][i], *layout) for name in texts
        }
        for path, (model, rows) in answers.items():
            row = rows[i]
            length = max(map(len, prompts.values())) + len(row.response_ids)
            if limit and length > limit:
                fail(f"--max-new-tokens: a teacher's row of {length}, the model has {limit}")
            of_student, of_teacher = measure_response(model, teacher, row, prompts, args)
            of_student["student_best"] = token_texts.best(of_student["student_best"])
            for name, columns in of_teacher.items():
                columns["teacher_best"] = token_texts.best(columns["teacher_best"])
                columns["teacher_prompt"] = token_texts.decode(prompts[name])
            records.append(
                dict(
                    problem=i,
                    model=path,
                    after=path != args.model,
                    question=problem.question,
                    answer=problem.answer,
                    outcome=row.outcome,
                    reason=row.reason,
                    student_prompt=token_texts.decode(row.prompt_ids),
                    token_ids=row.response_ids,
                    tokens=[token_texts[token] for token in row.response_ids],
                    **of_student,
                    contexts=of_teacher,
                )
            )
        print(f"response {number + 1}/{len(chosen)}: {len(texts)} contexts read", flush=True)
    return records


# ------------------------------------------------------------------------------------------------
# The page


def page_data(records, facts):
    """The records in short: three digits, each text once in a vocabulary, of the teacher's prompt
    what it has more than the student's.
    """
    vocabulary = {}

    def number(text):
        return vocabulary.setdefault(text, len(vocabulary))

    def short(column):  # one number where all are equal
        values = [round(float(f"{value:.3g}"), 3) or 0 for value in column]
        return values if len(set(values)) > 1 else values[0]

    def short_best(column):  # token, probability in 1/1000, token, ...; the least are left out
        kept = [[(text, p) for text, p in row if p >= 0.001] for row in column]
        return [[n for text, p in row for n in (number(text), round(1000 * p))] for row in kept]

    responses = []
    for record in records:
        views = {}
        for name, columns in record["contexts"].items():
            at, read = insertion(record["student_prompt"], columns["teacher_prompt"])
            views[name] = dict(at=at, read=read, best=short_best(columns["teacher_best"]))
            for key in ("reverse_kl", "log_ratio", "teacher_entropy", "gate"):
                views[name][key] = short(columns[key])
        kept = ("problem", "after", "question", "answer", "outcome", "reason", "student_prompt")
        response = {key: record[key] for key in kept}
        response["tokens"] = [number(text) for text in record["tokens"]]
        response["student_entropy"] = short(record["student_entropy"])
        response["best"] = short_best(record["student_best"])
        responses.append(dict(response, views=views))
    return dict(facts, vocabulary=list(vocabulary), responses=responses)


def insertion(prompt, longer):
    """(where, what): the piece of text that `longer` has more than `prompt`; else (-1, longer)."""
    at = len(os.path.commonprefix([prompt, longer]))
    read = longer[at : at + len(longer) - len(prompt)]
    return (at, read) if prompt[:at] + read + prompt[at:] == longer else (-1, longer)


def render(page):
    """The HTML. No "<" of the data stays: it could end the script element around them."""
    with open(TEMPLATE, encoding="utf-8") as file:
        head, tail = file.read().split("/*DATA*/")
    text = json.dumps(page, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return (head + text + tail).encode("utf-8", "replace")  # lone surrogates


def write_file(path, content):
    def write(target):
        with open(target, "wb") as file:
            file.write(content)

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_whole(path, write)


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    device = set_up(args)
    samplers.choose_backend(args, device)
    tokenizer, answers, texts, limit = answer_problems(args, device)
    records = make_records(args, tokenizer, answers, texts, limit)
    if args.jsonl:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(args.jsonl, lines.encode())
    counts = {path: summarise(rows) for path, (_, rows) in answers.items()}
    facts = dict(model=args.model, run=args.run, counts=counts, shown=args.contexts)
    facts.update(slider=page_contexts(args)[1], note="" if args.data else EMBEDDED_NOTE)
    page = render(page_data(records, facts))
    write_file(args.out, page)
    print(f"{len(records)} responses, {len(page) / 1000:.0f} kB: {args.out}")


if __name__ == "__main__":
    start(main)
