"""Problems, prompts and privileged contexts: what the model reads, and which token ids that is.

Four parts, in this order:
1. `Problem` and the loading of real problems (JSONL, parquet, or a Hugging Face data set id).
2. The prompts. One function renders the student's prompt and the teacher's; with an empty context the two are equal.
   The question and the instruction stand in the user turn, the privileged context between them (paper, section 2).
3. `CONTEXTS`: what the teacher reads besides the problem (paper, table 4).
4. The embedded task, a world small enough for a laptop: its problems, its reference traces for sft.py, and what a trace did.

Everything downstream works on token ids; text is rendered here once and never re-tokenised.
"""

import json
import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common import fail
from verify import Verifier


@dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the gold answer, parseable by math-verify; `solution` (worked reference) and `difficulty` may be empty."""

    question: str
    answer: str
    solution: str = ""
    difficulty: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Loading

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "ground_truth", "gold", "final_answer")
SOLUTION_FIELDS = ("solution", "cot", "reasoning")
DIFFICULTY_FIELDS = ("difficulty", "level")


def add_data_flags(parser, several=False):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+" if several else None,
        help="JSONL or parquet file, or a Hugging Face data set id (owner/name, or owner/name:configuration)"
        + " (several: their changes are averaged)" * several
        + "; without it: the embedded task",
    )
    group.add_argument(
        "--split", help="split of a Hugging Face data set id (else train, or the only one)"
    )
    group.add_argument(
        "--question-field",
        help=f"field of the question (else the first of {', '.join(QUESTION_FIELDS)})",
    )
    group.add_argument(
        "--answer-field",
        help=f"field of the gold answer (else the first of {', '.join(ANSWER_FIELDS)})",
    )
    group.add_argument(
        "--solution-field",
        help=f"field of the worked solution (else the first of {', '.join(SOLUTION_FIELDS)}; may be absent)",
    )
    group.add_argument(
        "--hard",
        type=float,
        default=HARD_SHARE,
        help="embedded task: share of hard problems, 0 to 1",
    )


def add_held_out_flags(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval-data",
        help="like --data: held-out problems of a real run, evaluated before and after; --split and the field flags hold for it too; without it none are",
    )
    group.add_argument(
        "--eval-problems",
        type=int,
        default=512,
        help="held-out problems to evaluate, one response each; 0 = no evaluation",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        default=0,
        help="evaluate after every so many steps too (figure 3); 0 = only before and after",
    )


def load_problems(args, count):
    """The problems of `--data`, or `count` problems of the embedded task. Ends the program (exit 2) on a bad file or row, naming file, row and field."""
    if args.data is None:
        return embedded_problems(count, args.seed, False, args.hard)
    return load_file(
        args.data, args.split, args.question_field, args.answer_field, args.solution_field
    )


def load_held_out(args, problems):
    """(training problems, held-out problems): the first `--eval-problems` of `--eval-data`, or of the embedded task's other side.

    Training problems whose question is also held out are dropped, with a word.
    """
    if not args.eval_problems or (args.data and not args.eval_data):
        return problems, []
    if args.eval_data:
        held_out = load_file(
            args.eval_data, args.split, args.question_field, args.answer_field, args.solution_field
        )[: args.eval_problems]
    else:
        held_out = embedded_problems(args.eval_problems, args.seed, True, args.hard)
    questions = {p.question for p in held_out}
    kept = [p for p in problems if p.question not in questions]
    if len(kept) < len(problems):
        print(
            f"dropped {len(problems) - len(kept)} of {len(problems)} training problems: they are in --eval-data too"
        )
    if not kept:
        fail(f"--eval-data {args.eval_data}: holds every training problem")
    return kept, held_out


def load_file(path, split=None, question_field=None, answer_field=None, solution_field=None):
    """Problems of a JSONL or parquet file or a Hugging Face data set id. Every gold answer is checked here, once."""
    problems, places = [], []
    for where, row in read_rows(path, split):
        question = pick(row, question_field, QUESTION_FIELDS, where, "--question-field")
        answer = pick(row, answer_field, ANSWER_FIELDS, where, "--answer-field")
        solution = pick(
            row,
            solution_field,
            SOLUTION_FIELDS,
            where,
            "--solution-field",
            required=solution_field is not None,
        )
        difficulty = pick(row, None, DIFFICULTY_FIELDS, where, "", required=False)
        problems.append(Problem(question, answer, solution, difficulty))
        places.append(where)
    if not problems:
        fail(f"--data {path}: no rows")
    repeated = len(problems) - len({p.question for p in problems})
    if repeated:
        print(
            f"{path}: {repeated} of {len(problems)} rows repeat an earlier question; they count as often as they stand there"
        )
    with Verifier() as verifier:
        for where, problem, complaint in zip(
            places, problems, verifier.check_golds([p.answer for p in problems])
        ):
            if complaint:
                fail(f"{where}: gold answer {problem.answer[:80]!r}: {complaint}")
    return problems


def problem_batch(problems, position, count, seed):
    """`count` problems from `position` on in an endless stream: each epoch is a permutation of its own, fixed by the seed."""
    batch = []
    for i in range(position, position + count):
        epoch, place = divmod(i, len(problems))
        batch.append(problems[permutation(len(problems), seed, epoch)[place]])
    return batch


@lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def read_rows(path, split):
    """Yields (place for error messages, row as a dict)."""
    if path.endswith((".jsonl", ".json")):
        if not os.path.isfile(path):
            fail(f"--data {path}: no such file")
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    fail(f"{path}, line {number}: not JSON ({error})")
                if not isinstance(row, dict):
                    fail(f"{path}, line {number}: not a JSON object")
                yield f"{path}, line {number}", row
        return
    is_file = path.endswith(".parquet")
    if is_file and not os.path.isfile(path):
        fail(f"--data {path}: no such file")
    if not is_file and (os.path.exists(path) or path.count("/") != 1):
        fail(
            f"--data {path}: neither a .jsonl or .parquet file nor a Hugging Face data set id (owner/name)"
        )
    try:
        if is_file:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            import datasets

            rows = datasets.load_dataset(*path.split(":", 1), split=split)
            if split is None:
                names = list(rows)
                rows = rows["train" if "train" in names or len(names) > 1 else names[0]]
    except Exception as error:  # a hub out of reach, a wrong id, a broken file: one line is enough
        fail(f"--data {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def pick(row, field, candidates, where, flag, required=True):
    """The text of `field`, or of the first of `candidates` that the row has. Numbers become text, anything else is an error."""
    names = [field] if field else [name for name in candidates if name in row]
    value = row.get(names[0]) if names else None
    if value is None or value == "":
        if required:
            fail(
                f"{where}: no {field or ' / '.join(candidates)} (name the field with {flag}; the row has {', '.join(map(str, row))})"
            )
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        fail(f"{where}: field {names[0]} is {type(value).__name__}, not text or a number")
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Prompts

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


def render_prompt(tokenizer, problem, context="", thinking=True):
    """Token ids of the prompt: the student's with an empty context, else the teacher's. Response ids are appended to either."""
    parts = [problem.question, context, INSTRUCTION]
    content = plain(tokenizer, "\n\n".join(part for part in parts if part))
    return chat_ids(tokenizer, content, thinking)


def chat_ids(tokenizer, content, thinking):
    """Ids of one user turn and the opening of the assistant's. `enable_thinking` is always explicit (Qwen3's default is on)."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=thinking,
    )


def plain(tokenizer, text):
    """Text whose control tokens ("<|im_end|>", "<think>", ...) are broken by a space, so that data can never open or close a turn."""
    for token in tokenizer.get_added_vocab():
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


def require_thinking_switch(tokenizer, thinking):
    """With thinking off, the chat template must know the switch: otherwise the flag would silently do nothing."""
    if not thinking and chat_ids(tokenizer, "x", True) == chat_ids(tokenizer, "x", False):
        fail("--thinking off: this model's chat template has no enable_thinking switch")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Privileged contexts (paper, table 4): what the teacher reads besides the problem.
#
# Each is a function (rollouts, write) -> one text a rollout, or None where the context failed. `write` takes one prompt a rollout and returns
# what the frozen teacher writes to it, or None (empty or truncated). A new context is a function, a template if it needs one, and an entry.

REFERENCE = "Here is a reference solution:\n{solution}\nThe answer is {answer}."
ANSWER = "The correct answer is {answer}."
CONCISE = "Solve this concisely and correctly: be direct, do not restate the problem, and write only the key steps."

ATTEMPT = "Problem:\n{question}\n\nYour attempt:\n{response}\n\n"
REFLECTION = ATTEMPT + (
    "The correct answer is {answer}.\n\nWrite a short memo to yourself for the next time you meet this problem: the key insight, "
    "the most efficient path, patterns to recognise, and the answer."
)
REFLECTION_DEMO = ATTEMPT + (
    "A worked solution:\n{solution}\nThe correct answer is {answer}.\n\nWrite a short memo to yourself for the next time you meet this "
    "problem: the key insight, the most efficient path, patterns to recognise, and the answer."
)
FOUR_LINES = ATTEMPT + (
    "A worked solution:\n{solution}\nThe correct answer is {answer}.\n\nReflect in exactly four lines.\nKey insight: ...\nRecognition pattern: ...\n"
    "What you did right: ...\nEfficient path: ..."
)
TWO_LINES = ATTEMPT + (
    "A worked solution:\n{solution}\nThe correct answer is {answer}.\n\nGive advice in exactly two lines.\nDO: ...\nDON'T: ..."
)
RESOLVE = (
    "Problem:\n{question}\n\nA worked solution:\n{solution}\nThe correct answer is {answer}.\n\nNow solve the problem afresh, in your own words, "
    "and put your final answer within \\boxed{{}}."
)
MEMO = "Notes from an earlier look at this problem:\n{text}"
OWN_SOLUTION = "Here is a solution that you wrote earlier:\n{text}"


def fill(template, rollout):
    """The template with this rollout's fields. Ends the program where it wants a worked solution and the problem has none."""
    if "{solution}" in template and not rollout.problem.solution:
        fail(
            f"--context: it needs a worked solution, and {rollout.problem.question[:60]!r} has none (see --solution-field, or choose another context)"
        )
    return template.format(
        question=rollout.problem.question,
        answer=rollout.problem.answer,
        solution=rollout.problem.solution,
        response=rollout.text,
    )


def given(template):
    """A context that needs no generation."""
    return lambda rollouts, write: [fill(template, r) for r in rollouts]


def written(template, frame=MEMO):
    """A context that the frozen teacher writes first: `template` is what it is asked, `frame` what stands around its text afterwards."""
    return lambda rollouts, write: [
        text and frame.format(text=text) for text in write([fill(template, r) for r in rollouts])
    ]


CONTEXTS = {
    "none": given(""),
    "solution": given(REFERENCE),
    "answer": given(ANSWER),
    "instruction": given(CONCISE),
    "reflection": written(REFLECTION),
    "reflection-demo": written(REFLECTION_DEMO),
    "four-line": written(FOUR_LINES),
    "two-line": written(TWO_LINES),
    "resolve": written(RESOLVE, OWN_SOLUTION),
}
EMBEDDED_CONTEXTS = [
    "none",
    "solution",
    "answer",
    "instruction",
]  # what the embedded model has seen in sft.py


# ---------------------------------------------------------------------------------------------------------------------
# 4. The embedded task: chains of sums, some of them with a digit that is hard to read.
#
# Easy problems add and subtract digits. In a hard one, one digit is smudged: the question shows two scans of it, a quick one, right with
# probability QUICK_RIGHT, and a careful one, right with CAREFUL_RIGHT. A first look takes the quick scan; a check looks at both.
# So checks are redundant on easy steps, pay on hard ones, and some failures are nobody's slip: only a reference could tell.

HARD_SHARE = 0.7
QUICK_RIGHT = 0.3
CAREFUL_RIGHT = 0.7

# Reference traces of sft.py. All of them end right.
EASY_CHECK = 0.85  # chance that a trace re-checks an easy step (never needed), ...
EASY_CHECK_AGAIN = 0.6  # ... and then once more
CONTEXT_EASY_CHECK = (
    0.02  # the same with any context in the prompt: this is all that makes those traces shorter
)
HARD_CHECK = 0.3  # chance that a trace checks a smudged digit although the quick scan was right; if it was wrong, it always does
CONTEXT_HARD_CHECK = 0.8  # the same with any context in the prompt


def embedded_problems(count, seed, held_out=False, hard=HARD_SHARE):
    """`count` problems from a seed. A hash of the question decides the side, so no seed can put one question on both."""
    if not 0 <= hard <= 1:
        fail(f"--hard {hard}: a share between 0 and 1")
    rng = np.random.default_rng([seed, int(held_out)])
    problems = []
    while len(problems) < count:
        problem = embedded_problem(rng, "hard" if rng.random() < hard else "easy")
        if (zlib.crc32(problem.question.encode()) % 8 == 0) == held_out:
            problems.append(problem)
    return problems


def embedded_problem(rng, difficulty):
    start = value = int(rng.integers(10, 90))
    count = int(rng.integers(2, 5))
    smudged = int(rng.integers(count)) if difficulty == "hard" else None
    asked, worked = [], []
    for i in range(count):
        op = (
            "+" if value < 10 or (value < 90 and rng.random() < 0.5) else "-"
        )  # every digit keeps the value within two digits
        digit = int(rng.integers(2, 10))
        asked.append(op + (scans_of(rng, digit) + "?" if i == smudged else str(digit)))
        worked.append(f"{value:02d}{op}{digit}={compute(value, op, digit):02d}")
        value = compute(value, op, digit)
    return Problem(
        f"{start:02d} {' '.join(asked)}, result?", f"{value:02d}", ", ".join(worked), difficulty
    )


def scans_of(rng, digit):
    others = [d for d in range(2, 10) if d != digit]
    return "".join(
        str(digit if rng.random() < right else rng.choice(others))
        for right in (QUICK_RIGHT, CAREFUL_RIGHT)
    )


def compute(value, op, digit):
    return value + digit if op == "+" else value - digit


def read_steps(problem):
    """[(value before, op, true digit, scans or "", value after), ...] of an embedded problem."""
    scans = [
        asked[1:-1] if asked.endswith("?") else ""
        for asked in problem.question.split(",")[0].split()[1:]
    ]
    return [
        (int(step[:2]), step[2], int(step[3]), smudge, int(step[5:]))
        for step, smudge in zip(problem.solution.split(", "), scans)
    ]


def reference_trace(problem, rng, context="none", thinking=True):
    """One reference response to an embedded problem. It always ends in the right answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if not thinking:
        return box
    lines = [
        hard_step(rng, *step, context) if step[3] else easy_step(rng, *step, context)
        for step in read_steps(problem)
    ]
    return "<think>\n" + "\n".join(lines) + "\n</think>\n\n" + box


def easy_step(rng, a, op, digit, scans, c, context):
    line = f"{a:02d}{op}{digit}={c:02d}"
    if rng.random() >= (EASY_CHECK if context == "none" else CONTEXT_EASY_CHECK):
        return line
    return line + f" check {line}" * (1 + (rng.random() < EASY_CHECK_AGAIN))


def hard_step(rng, a, op, digit, scans, c, context):
    """The first look takes the quick scan; a check names both scans and settles on a digit, always the right one."""
    first = int(scans[0])
    line = f"{a:02d}{op}{first}={compute(a, op, first):02d}"
    if first == digit and rng.random() >= (HARD_CHECK if context == "none" else CONTEXT_HARD_CHECK):
        return line
    return line + f" wait {scans} so {a:02d}{op}{digit}={c:02d}"


def read_trace(problem, text):
    """What a response to an embedded problem did, step by step: a list of dicts, one per step line that can be read.

    hard: a smudged digit. first_right: the first look. checked: whether a check came. conflict: the two scans differ.
    careful: the step was settled on the careful scan. right: the digit carried on, and its sum. Each step is judged from the value
    that it started from itself, so that one slip is counted once.
    """
    rows = []
    for (_, op, digit, scans, _), line in zip(
        read_steps(problem), text.removeprefix("<think>\n").split("</think>")[0].split("\n")
    ):
        match = re.match(r"(\d\d)([+-])(\d)=(\d\d)(.*)$", line)
        if not match or match[2] != op:
            continue
        a, _, first, value, rest = match.groups()
        settled = re.search(r" so \d\d[+-](\d)=(\d\d)$", rest)
        last, value = (settled[1], settled[2]) if settled else (first, value)
        rows.append(
            dict(
                hard=bool(scans),
                first_right=int(first) == digit,
                checked=" check " in rest or " wait " in rest,
                conflict=bool(scans) and scans[0] != scans[1],
                careful=bool(scans) and last == scans[1],
                right=int(last) == digit and int(value) == compute(int(a), op, digit),
            )
        )
    return rows
