"""The token view: what the teacher would have said, token by token, as a page that opens from disk.

The model answers held-out problems; the same model, frozen, then reads the very same tokens behind
each context in turn. Every token is coloured by a measure (S student, T teacher), in nats:
    reverse KL   sum_v S log(S/T), what OPSD trains on
    log-ratio    log T(y_t) - log S(y_t) of the sampled token, OPSD's advantage of the token
    entropies    of S and of T; with --gate also the factor on the token's loss

1. Of --draw answers --problems are shown: those not correct up to half, then correct ones. So the
   shown outcomes are no accuracy; that of the whole draw stands on the page.
2. With --run the model after OPSD answers them as well, measured against the same teacher.
3. --jsonl writes the page's data, one line a response, arrays aligned with its tokens: measures
   and probabilities to 0.0001, of each distribution at most BEST tokens of at least 1%.
4. All other flags are opsd.py's, with its defaults: model, data, sampling, gate.

    python -m tools.show --out page.html                    # the embedded model and task
    python -m tools.show --model MODEL --run runs/mine --data heldout.jsonl --max-new-tokens 2048 \\
        --out page.html

docs/tokens.html and its picture; the address names what is seen (#r7after.t32.answer.ratio.dark).
    python opsd.py --filter correct --out runs/opsd-correct-001
    python -m tools.show --run runs/opsd-correct-001 --problems 16 --out docs/tokens.html
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,930 \\
        --user-data-dir=.chromium --screenshot=docs/tokens.png "file://$PWD/docs/tokens.html"
"""

import argparse
import json
import os

if __name__ == "__main__":
    from launch import start

import data
import opsd
import rollout
import samplers
from metrics import evaluate, summarise
from model import load_model, response_logps, take
from run import HERE, Parser, check_out, fail, set_up, write_file
from verify import Verifier

TEMPLATE = os.path.join(HERE, "tools", "show.html")
BEST = 5  # tokens listed of each distribution
SHOWN = ["none", "instruction", "other", "answer", "solution"]  # by what they give away
UNREAD = {  # of opsd.py's flags
    *("--filter", "--group", "--resample", "--context", "--reinject", "--teacher-thinking"),
    *("--divergence", "--beta", "--teacher", "--ema", "--refresh", "--lora"),
    *("--steps", "--batch", "--lr", "--micro-tokens", "--checkpointing", "--offload", "--resume"),
    *("--state-every", "--save-every", "--eval-data", "--eval-problems", "--eval-every"),
}
EMBEDDED_NOTE = (
    "The problems are chains of sums; “-59?” is a smudged digit that a quick scan takes for 5 "
    "and a careful one for 9; either may be wrong."
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", help="the page, an HTML file", required=True)
    add("--run", help="run directory: the same model after OPSD, shown beside it")
    add("--problems", type=int, default=12, help="problems on the page")
    add("--draw", type=int, default=0, help="problems answered, to choose from; 0 = 4 x --problems")
    add("--contexts", nargs="+", default=SHOWN, choices=list(data.CONTEXTS), help="in this order")
    add("--jsonl", help="file for the data, one line a response")
    own, flags = parser.parse_known_args(argv)
    if unread := UNREAD.intersection(word.partition("=")[0] for word in flags):
        fail(f"{min(unread)}: of opsd.py, not read here")
    context = next((name for name in own.contexts if name in data.WRITTEN), "solution")
    settled = opsd.parse_args([*flags, "--out", own.out, "--context", context])
    args = argparse.Namespace(**vars(settled) | vars(own))
    args.draw = args.draw or 4 * args.problems
    return args


# ------------------------------------------------------------------------------------------------
# The data


def answer_problems(args, device):
    """(tokenizer, {path: (model, its rollouts)}, contexts: {name: a text a problem}, limit)."""
    if args.data:
        problems = data.load_file(args, args.data)[: args.draw]
    else:
        problems = data.embedded_problems(args.draw, args.seed, held_out=True)
    if len(problems) < args.problems:
        fail(f"--problems {args.problems}: only {len(problems)} are drawn (--draw, --data)")
    for name in args.contexts:
        data.require_parts(problems, name)
    answers, texts, sampler = {}, {}, None
    with Verifier() as verifier:
        for path in filter(None, [args.model, args.run]):
            model, tokenizer = load_model(path, device, args.dtype)
            data.require_thinking_switch(tokenizer, args.thinking == "on")
            sampler = samplers.make_sampler(model, tokenizer, args, sampler)
            rollouts = evaluate(sampler, tokenizer, problems, verifier, args)
            answers[path] = model, rollouts
            if not texts:  # the teacher writes its contexts about its own answers
                write = rollout.make_writer(sampler, tokenizer, args, args.seed)
                texts = {name: data.CONTEXTS[name](rollouts, write, args) for name in args.contexts}
                for name in texts:
                    if all(text is None for text in texts[name]):
                        fail(f"--contexts {name}: none of the {len(rollouts)} responses has one")
    return tokenizer, answers, texts, sampler.limit


def choose(rollouts, count):
    """Numbers of the rollouts to show: those not correct up to half, then correct ones."""
    wrong = [i for i, r in enumerate(rollouts) if r.outcome != "correct"]
    right = [i for i, r in enumerate(rollouts) if r.outcome == "correct"]
    wrong = wrong[: max(count // 2, count - len(right))]
    return sorted(wrong + right[: count - len(wrong)])


def measure_response(student, teacher, answer, prompt, args, token_texts):
    """{name: a list aligned with the response's tokens}; prompt: the teacher's ids."""
    answer.weight = 1.0
    tokens = opsd.tokens_of([answer], student.device)
    columns = dict(student_best=[], teacher_best=[])
    rows = (student, answer.row), (teacher, [prompt, answer.response_ids])
    chunks = zip(*(response_logps(model, [row]) for model, row in rows), strict=True)
    for (chunk, student_logps), (_, teacher_logps) in chunks:  # (C, V) each
        part = take(tokens, chunk)
        _, measures = opsd.token_loss(student_logps, teacher_logps, part, args)
        measures["log_ratio"] = opsd.sampled(teacher_logps, part) - measures["logp"]  # (C,)
        for name, values in measures.items():
            columns.setdefault(name, []).extend(round(value, 4) for value in values.tolist())
        columns["student_best"] += best_tokens(student_logps, token_texts)
        columns["teacher_best"] += best_tokens(teacher_logps, token_texts)
    return columns


def best_tokens(logps, token_texts):
    """[[(text, probability), ...], ...]: the likeliest at each position of (C, V)."""
    top = logps.topk(min(BEST, logps.shape[-1]))  # (C, BEST)
    places = []
    for ids, values in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True):
        pairs = list(zip(ids, values, strict=True))
        pairs = pairs[:1] + [(token, p) for token, p in pairs[1:] if p >= 0.01]
        places.append([(token_texts[token], round(p, 4)) for token, p in pairs])
    return places


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


def make_record(model, teacher, r, prompts, args, token_texts):
    """The data of one response."""
    record = dict(question=r.problem.question, answer=r.problem.answer, outcome=r.outcome)
    record.update(reason=r.reason, student_prompt=token_texts.decode(r.prompt_ids))
    record.update(token_ids=r.response_ids, tokens=[token_texts[t] for t in r.response_ids])
    names = ["reverse_kl", "log_ratio", "teacher_entropy", "teacher_best"]
    names += ["gate"] if args.gate != "all" else []
    contexts = {}
    for name, prompt in prompts.items():
        columns = measure_response(model, teacher, r, prompt, args, token_texts)
        contexts[name] = {key: columns[key] for key in names}
        contexts[name]["teacher_prompt"] = token_texts.decode(prompt)
        record.update(student_logp=columns["logp"], student_best=columns["student_best"])
        record["student_entropy"] = columns["student_entropy"]
    return dict(record, contexts=contexts)


def make_records(args, tokenizer, answers, texts, limit):
    """A dict a response: of each problem that is shown that of the model, then that of --run."""
    records, token_texts = [], TokenTexts(tokenizer)
    teacher, rollouts = answers[args.model]
    layout = args.thinking == "on", args.context_first
    for i in choose(rollouts, args.problems):
        if failed := [name for name in texts if texts[name][i] is None]:
            print(f"problem {i + 1} is left out: the teacher wrote no {failed[0]}")
            continue
        problem = rollouts[i].problem
        prompts = {
            name: data.render_prompt(tokenizer, problem, texts[name][i], *layout) for name in texts
        }
        for path, (model, rows) in answers.items():
            length = max(map(len, prompts.values())) + len(rows[i].response_ids)
            if limit and length > limit:
                fail(f"--max-new-tokens: a teacher's row of {length}, the model has {limit}")
            record = make_record(model, teacher, rows[i], prompts, args, token_texts)
            records.append(dict(problem=i, model=path, after=path != args.model, **record))
        print(f"problem {i + 1}: {len(texts)} contexts read", flush=True)
    return records


# ------------------------------------------------------------------------------------------------
# The page


def render(page):
    """The HTML. No "<" of the data stays: it could end the script element around them."""
    with open(TEMPLATE, encoding="utf-8") as file:
        head, tail = file.read().split("/*DATA*/")
    text = json.dumps(page, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return (head + text + tail).encode("utf-8", "replace")  # lone surrogates


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    check_out(args, directory=False, name="jsonl")
    if args.jsonl and os.path.realpath(args.jsonl) == os.path.realpath(args.out):
        fail(f"--jsonl {args.jsonl}: is --out as well")
    device = set_up(args)
    samplers.choose_backend(args, device)
    tokenizer, answers, texts, limit = answer_problems(args, device)
    records = make_records(args, tokenizer, answers, texts, limit)
    if args.jsonl:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(args.jsonl, lines.encode())
    counts = {path: summarise(rows) for path, (_, rows) in answers.items()}
    page = dict(model=args.model, run=args.run, counts=counts, shown=args.contexts)
    page.update(note="" if args.data else EMBEDDED_NOTE, responses=records)
    write_file(args.out, render(page))
    print(f"{len(records)} responses: {args.out}")


if __name__ == "__main__":
    start(main)
