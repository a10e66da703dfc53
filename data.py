"""Problems, prompts and privileged contexts: what the models read, and which token ids that is.

1. `Problem`, and loading: JSONL, parquet, a Hugging Face data set id, or the embedded world.
2. The prompts. One function renders the student's and the teacher's; with an empty context the two
   are equal. Question and instruction stand in the user turn, the privileged context between them
   (paper, section 2) or, with --context-first, before them.
3. `CONTEXTS`: what the teacher reads besides the problem (paper, table 4).
"""

import json
import math
import os
import re
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np

import toy
from answers import normal
from run import fail, one_line
from verify import Verifier


@dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the gold as the data has it, unit and all; the rest may be empty."""

    question: str
    answer: str
    solution: str = ""
    difficulty: str = ""
    context: str = ""  # what the teacher reads with --context given


# ------------------------------------------------------------------------------------------------
# 1. Loading

# The names that the field of a problem's part may have in a row; the first that is there counts.
FIELDS = {
    "question": ("question", "problem", "prompt", "messages"),
    "answer": ("answer", "ground_truth", "gold", "final_answer", "reward_model"),
    "solution": ("solution", "cot", "reasoning"),
    "difficulty": ("difficulty", "level"),
    "context": ("context",),
}


def add_data_flags(parser, several=False):
    add = parser.add_argument_group("data", "without --data the embedded task").add_argument
    source = "JSONL, parquet, a directory of parquet, or a Hugging Face data set, "
    source += "owner/name[:configuration][@split]"
    add("--data", nargs="+" if several else None, help=source)
    known = "; ".join(f"{part}: {', '.join(names)}" for part, names in FIELDS.items())
    other = f"of --data: other names of a row's fields than these: {known}"
    add("--fields", nargs="+", default=[], metavar="PART=NAME[,NAME]", help=other)
    skip = "of --data: drop rows whose gold no rule reads"
    add("--skip-unreadable", action="store_true", help=skip)


def add_held_out_flags(parser):
    add = parser.add_argument_group("evaluation", "before, on the way, after").add_argument
    add("--eval-data", help="of --data and of --eval-problems: held-out problems")
    add("--eval-problems", type=int, default=512, help="number of held-out problems; 0 = none")
    add("--eval-every", type=int, default=0, help="of --eval-problems: steps between; 0 = none")


def embedded_problems(count, seed, held_out=False):
    return [Problem(**row) for row in toy.problem_rows(count, seed, held_out)]


def load_problems(args, count):
    """The problems of `--data`, or `count` problems of the embedded task."""
    if args.data is None:
        return embedded_problems(count, args.seed)
    return load_file(args, args.data)


def load_held_out(args, problems):
    """(training problems, held-out problems): the first `--eval-problems` of `--eval-data`, or of
    the embedded task's other side. Training problems that are also held out are dropped.
    """
    if args.eval_problems and args.data and not args.eval_data:
        if args.eval_every:
            fail(f"--eval-every {args.eval_every}: nothing to evaluate without --eval-data")
        print("no --eval-data: nothing is evaluated before and after")
    if not args.eval_problems or (args.data and not args.eval_data):
        return problems, []
    if args.eval_data:
        held_out = load_file(args, args.eval_data, "--eval-data")[: args.eval_problems]
    else:
        held_out = embedded_problems(args.eval_problems, args.seed, held_out=True)
    questions = {p.question for p in held_out}
    kept = [p for p in problems if p.question not in questions]
    if dropped := len(problems) - len(kept):
        print(f"dropped {dropped} of {len(problems)} training problems: they are held out too")
    if not kept:
        fail(f"--eval-data {args.eval_data}: holds every training problem")
    return kept, held_out


def fields_of(pairs):
    """({part: names of its field}, parts that a row must have): FIELDS, and --fields in their
    place. What is named there is one part's, and no other's.
    """
    given = {}
    for pair in pairs:
        part, _, names = pair.partition("=")
        if part not in FIELDS or not names or part in given:
            fail(f"--fields {pair}: PART=NAME, once each, PART one of {', '.join(FIELDS)}")
        given[part] = names.split(",")
    taken = {name for names in given.values() for name in names}
    others = {part: [n for n in names if n not in taken] for part, names in FIELDS.items()}
    return {**others, **given}, {"question", "answer", *given}


def load_file(args, path, flag="--data"):
    """Problems of a JSON(L) or parquet file or a Hugging Face data set.

    Ends the program at a bad file or row, and at a gold that no rule reads. With --skip-unreadable
    such rows are dropped, and their numbers noted in args, which runs and evaluations log.
    """
    problems, places, (fields, required) = [], [], fields_of(args.fields)
    for where, row in read_rows(path, flag):
        parts = {part: pick(row, part, fields, where, part in required) for part in fields}
        solution, marked, answer = parts["answer"].rpartition("####")  # gsm8k's
        if marked:
            parts.update(answer=answer.strip(), solution=parts["solution"] or solution.strip())
        problems.append(Problem(**parts))
        places.append(where)
    if not problems:
        fail(f"{flag} {path}: no rows")
    if repeated := len(problems) - len({p.question for p in problems}):
        print(f"{path}: {repeated} of {len(problems)} rows repeat an earlier question; all count")
    with Verifier() as verifier:
        complaints = verifier.check_golds([p.answer for p in problems])
    bad = [i for i, complaint in enumerate(complaints) if complaint]
    texts = [f"{places[i]}: gold answer {problems[i].answer[:80]!r}: {complaints[i]}" for i in bad]
    count = f"{len(bad)} of {len(problems)} rows"
    if bad and (not args.skip_unreadable or len(bad) == len(problems)):
        fail(f"{texts[0]} ({count} are so; --skip-unreadable drops them)")
    if bad:
        print(f"{path}: dropped {count}, whose golds no rule reads:", *texts[:3], sep="\n")
        numbers = [int(places[i].split()[-1]) for i in bad]
        args.unreadable = {**getattr(args, "unreadable", {}), path: numbers}
    problems = [p for p, complaint in zip(problems, complaints, strict=True) if not complaint]
    if units := [p.answer for p in problems if normal(p.answer)[1]]:
        print(f"{path}: {len(units)} golds have a unit, which a response may leave out: {units[0]}")
    return problems


def read_rows(path, flag="--data"):
    """Yields (place for error messages, row as a dict)."""
    if path.endswith((".jsonl", ".json")):
        yield from read_json(path, flag)
        return
    files = sorted(map(str, Path(path).glob("*.parquet"))) or [path] * path.endswith(".parquet")
    split = r"(?:^|/)(train|test|val|dev|[^/\n]+(?=-\d+-of-\d+))[^/\n]*$"
    if len(splits := set(re.findall(split, "\n".join(files), re.MULTILINE))) > 1:
        fail(f"{flag} {path}: has several splits: {', '.join(sorted(splits))}; name a file")
    if not files and (os.path.exists(path) or path.count("/") != 1):
        fail(f"{flag} {path}: not a .jsonl or .parquet file, nor a data set id (owner/name)")
    try:
        rows = read_table(path, files)
    except Exception as error:  # a hub out of reach, a wrong id, a broken file: one line is enough
        fail(f"{flag} {path}: {type(error).__name__}: {one_line(error)}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def read_json(path, flag):
    """Rows of a UTF-8 file, with or without a BOM: one JSON object a line, or one array of them."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        fail(f"{flag} {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fail(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8")
    is_array, lines = text.lstrip().startswith("["), text.split("\n")  # U+2028: in a string
    places = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    for where, part in [(path, text)] if is_array else places:
        try:
            rows = json.loads(part)
            json.dumps(rows, ensure_ascii=False).encode()  # no half of a character
        except (ValueError, RecursionError) as error:
            begins = "begins like a JSON array, but is " if is_array else ""
            fail(f"{where}: {begins}not JSON ({error})")
        for number, row in enumerate(rows if is_array else [rows], 1):
            here = f"{path}, row {number}" if is_array else where
            if not isinstance(row, dict):
                fail(f"{here}: not a JSON object")
            yield here, row


def read_table(path, files):
    if files:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(files).to_pylist()
    import datasets

    name, _, split = path.partition("@")
    rows = datasets.load_dataset(*name.split(":", 1), split=split or None)
    if split:
        return rows
    if len(rows) > 1:
        raise ValueError(f"name one of its splits, {path}@{', @'.join(rows)}")
    return next(iter(rows.values()))


def pick(row, part, fields, where, required):
    """The text of a part of the problem, from the first of its fields that the row has.

    Numbers become plain decimals (1e-05 would be read as e - 5); NaN and infinity are a missing
    value, as an empty text is.
    """
    name = next((name for name in fields[part] if name in row), None)
    value = row.get(name)
    if isinstance(value, dict):  # verl's reward_model
        value = value.get("ground_truth")
    if isinstance(value, list):  # messages
        users = [m for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = users[0].get("content") if len(users) == 1 else value
    infinite = isinstance(value, float) and math.isinf(value)
    if value is None or infinite or str(value).strip().lower() in ("", "nan"):
        if required:
            wanted, has = name or " / ".join(fields[part]), ", ".join(map(str, row))
            fail(f"{where}: no {wanted} (--fields {part}=NAME names it; the row has {has})")
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        fail(f"{where}: field {name} is {type(value).__name__}, not text or a number")
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def problem_batch(problems, position, count, seed):
    """`count` problems from `position` on in an endless stream; each epoch is a permutation of its
    own, fixed by the seed.
    """
    batch = []
    for i in range(position, position + count):
        epoch, place = divmod(i, len(problems))
        batch.append(problems[permutation(len(problems), seed, epoch)[place]])
    return batch


@lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


# ------------------------------------------------------------------------------------------------
# 2. Prompts

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


def render_prompt(tokenizer, problem, context="", thinking=True, context_first=False):
    """Token ids of the prompt: the student's with an empty context, else the teacher's.

    Response ids are appended to either. context_first: it stands before the question.
    """
    parts = [problem.question, context, INSTRUCTION]
    if context_first:
        parts = [context, problem.question, INSTRUCTION]
    content = plain(tokenizer, "\n\n".join(part for part in parts if part))
    return chat_ids(tokenizer, content, thinking)


def chat_ids(tokenizer, content, thinking):
    """Ids of one user turn and the opening of the assistant's.

    The switch of thinking is always explicit (Qwen3's default is on), and the date that some
    templates write is one day's: a prompt is the same tomorrow.
    """
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=thinking,
        thinking=thinking,  # its name in Granite and DeepSeek
        strftime_now=datetime(2026, 1, 1).strftime,
    )


def turn_end(tokenizer):
    """The id with which the template ends an assistant's turn; None where it writes none."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("yz")[2]
    except Exception:  # a template for user turns only
        return None
    ids = tokenizer(text.strip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def plain(tokenizer, text):
    """Text whose control tokens ("<|im_end|>", "<think>", ...) are broken by a space, so that data
    can never open or close a turn. Those are special, of thinking, or in the chat template; other
    added tokens (runs of spaces, letters, tags) are ordinary text and stay.
    """
    template = str(tokenizer.chat_template)
    for token in tokenizer.added_tokens_decoder.values():
        word = token.content
        control = token.special or "think" in word or word in template
        if control and len(word.strip()) > 1 and word in text:
            text = text.replace(word, word[:1] + " " + word[1:])
    return text


def require_thinking_switch(tokenizer, thinking, flag="--thinking"):
    """With thinking off the template must know the switch, or the flag would do nothing."""
    if not thinking and chat_ids(tokenizer, "x", True) == chat_ids(tokenizer, "x", False):
        fail(f"{flag} off: this model's chat template has no enable_thinking switch")


# ------------------------------------------------------------------------------------------------
# 3. Privileged contexts (paper, table 4): what the teacher reads besides the problem.
#
# Each is a function (rollouts, write, args) -> one text a rollout, or None where it failed. `write`
# takes one prompt a rollout and returns what the frozen teacher writes to it, or None where that is
# empty or truncated. A new one is an entry. The last two are controls: no reference of the problem.

REFERENCE = "Here is a reference solution:\n{solution}\nThe answer is {answer}."
ANSWER = "The correct answer is {answer}."
CONCISE = (
    "Solve this concisely and correctly: be direct, do not restate the problem, and write only the "
    "key steps."
)

ATTEMPT = "Problem:\n{question}\n\nYour attempt:\n{response}\n\n"
DEMO = "A worked solution:\n{solution}\nThe correct answer is {answer}.\n\n"
WRITE_MEMO = (
    "Write a short memo to yourself for the next time you meet this problem: the key insight, "
    "the most efficient path, patterns to recognise, and the answer."
)
REFLECTION = ATTEMPT + "The correct answer is {answer}.\n\n" + WRITE_MEMO
REFLECTION_DEMO = ATTEMPT + DEMO + WRITE_MEMO
FOUR_LINES = (
    ATTEMPT + DEMO + "Reflect in exactly four lines.\nKey insight: ...\n"
    "Recognition pattern: ...\nWhat you did right: ...\nEfficient path: ..."
)
TWO_LINES = ATTEMPT + DEMO + "Give advice in exactly two lines.\nDO: ...\nDON'T: ..."
RESOLVE = (
    "Problem:\n{question}\n\n" + DEMO + "Now solve the problem afresh, in your own words, "
    "and put your final answer within \\boxed{{}}."
)
MEMO = "Notes from an earlier look at this problem:\n{text}"
OWN_SOLUTION = "Here is a solution that you wrote earlier:\n{text}"


def fill(template, rollout):
    """The template with this rollout's fields."""
    return template.format(**vars(rollout.problem), response=rollout.text)


def given(template):
    """A context that needs no generation."""
    return lambda rollouts, write, args: [fill(template, r) for r in rollouts]


def written(template, frame=MEMO):
    """A context that the frozen teacher writes first: `template` is what it is asked, `frame` what
    stands around its text afterwards.
    """

    def context(rollouts, write, args):
        texts = write([fill(template, r) for r in rollouts])
        return [None if text is None else frame.format(text=text) for text in texts]

    return context


def sibling(rollouts, write, args):
    """As the reference the shortest other correct response of the draw; None where none is."""
    read, texts = toy.worked if args.data is None else str, []
    for r in rollouts:
        correct = [s for s in r.siblings if s.outcome == "correct"]
        best = min(correct, key=lambda s: len(s.response_ids), default=None)
        parts = best and dict(solution=read(best.reasoning), answer=best.problem.answer)
        texts.append(parts and REFERENCE.format(**parts))
    return texts


def of_another(rollouts, write, args):
    """The reference of another problem, the next one in the list (behind the last comes the first);
    None where there is none.
    """
    texts = []
    for i, r in enumerate(rollouts):
        later = (rollouts[(i + step) % len(rollouts)] for step in range(1, len(rollouts)))
        other = next((o for o in later if o.problem.question != r.problem.question), None)
        texts.append(other and fill(REFERENCE, other))
    return texts


def wrong(rollouts, write, args):
    """A reference whose answer is wrong; None where none can be made."""
    make = toy.wrong_reference if args.data is None else with_wrong_answer
    pairs = [make(r.problem) for r in rollouts]
    return [pair and REFERENCE.format(solution=pair[0], answer=pair[1]) for pair in pairs]


def with_wrong_answer(problem):
    """(solution, answer): the answer's last number is one more, there and wherever the solution has
    the answer. The steps stay right, so a reader can tell. None for an answer without a number.
    """
    *_, last = [None, *re.finditer(r"\d+", problem.answer)]
    if last is None:
        return None
    more = str(int(last[0]) + 1).zfill(len(last[0]))
    answer = problem.answer[: last.start()] + more + problem.answer[last.end() :]
    whole = rf"(?<![\w.]){re.escape(problem.answer)}(?!\w|\.\d)"
    return re.sub(whole, lambda match: answer, problem.solution), answer


WRITTEN = {  # they read --context-tokens
    "reflection": written(REFLECTION),
    "reflection-demo": written(REFLECTION_DEMO),
    "four-line": written(FOUR_LINES),
    "two-line": written(TWO_LINES),
    "resolve": written(RESOLVE, OWN_SOLUTION),
}
CONTEXTS = {
    "none": given(""),
    "solution": given(REFERENCE),
    "answer": given(ANSWER),
    "instruction": given(CONCISE),
    "given": given("{context}"),
    "sibling": sibling,
    **WRITTEN,
    "other": of_another,
    "wrong": wrong,
}
NEED_SOLUTION = "solution reflection-demo four-line two-line resolve other wrong".split()
NEEDS = {"given": "context", **dict.fromkeys(NEED_SOLUTION, "solution")}


def require_parts(problems, context):
    """Ends the program where the context is made of a part that a problem has not."""
    part = NEEDS.get(context)
    for number, problem in enumerate(problems if part else (), 1):
        if not getattr(problem, part):
            has_none = f"problem {number} of {len(problems)} has none (--fields {part}=NAME?)"
            fail(f"--context {context}: needs a {part}, and {has_none}")
