"""Problems, prompts, contexts, the embedded world."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data
import opsd
import toy
import toy_model
from data import CONTEXTS, Problem, embedded_problems, render_prompt
from rollout import Rollout, drop_long, make_rollouts, make_writer
from samplers import make_sampler
from tests.helpers import write
from verify import Verifier


def load_file(path, *fields, skip=False):
    return data.load_file(SimpleNamespace(fields=fields, skip_unreadable=skip), path)


# ------------------------------------------------------------------------------------------------
# Prompts and contexts


def test_thinking_and_the_contexts_place_are_the_teachers_own(tokenizer):
    problem = Problem("What is 2+2?", "4")
    student = tokenizer.decode(render_prompt(tokenizer, problem))
    first = student.replace("What is", "c\n\nWhat is")
    off = student.replace("2+2?", "2+2?\n\nc") + "<think>\n\n</think>\n\n"
    r = Rollout(problem, [], [5])
    prompts = {"--context-first": first, "--teacher-thinking off": off, "--thinking off": off}
    for flags, teacher in prompts.items():
        args = opsd.parse_args(flags.split())
        opsd.add_teacher_rows([r], ["c"], tokenizer, args, None)
        assert tokenizer.decode(r.teacher_row[0]) == teacher
    args = opsd.parse_args(["--context-first"])
    sampler = SimpleNamespace(sample=lambda prompts, *_: [([1], True)] * len(prompts))
    sampler.logps = sampler.limit = None
    (read,) = make_rollouts(sampler, tokenizer, [problem], args, 0, ["c"])
    assert tokenizer.decode(read.prompt_ids) == first


ASKS = {
    "reflection": ["5 {q}", "my attempt", "is 6", "memo"],
    "reflection-demo": ["my attempt", "five plus one", "memo"],
    "four-line": ["my attempt", "five plus one", "four lines"],
    "two-line": ["my attempt", "five plus one", "DO:", "DON'T:"],
    "resolve": ["five plus one", "\\boxed{}"],
}


@pytest.mark.parametrize("name", ASKS)
def test_written_contexts_ask_the_teacher_and_frame_what_it_writes(name):
    asked, problem = [], Problem("5 {q} + 1?", "6", "five plus one")

    def write_text(prompts):
        asked.extend(prompts)
        return ["{text} 42", None]

    rollouts = [Rollout(problem, [], text="my attempt"), Rollout(problem, [], text="t")]
    texts = CONTEXTS[name](rollouts, write_text, None)
    assert all(part in asked[0] for part in ASKS[name])
    assert (name == "resolve") == ("my attempt" not in asked[0])
    frame = "Here is a solution that you wrote" if name == "resolve" else "Notes from an earlier"
    assert texts[0].startswith(frame) and texts[0].endswith("{text} 42") and texts[1] is None


def contexts_of(name, problems, flags="--data d.jsonl"):
    """The context of each problem; with --data as for problems that are not embedded ones."""
    return CONTEXTS[name]([Rollout(p, []) for p in problems], None, opsd.parse_args(flags.split()))


def test_other_is_a_derangement_of_references_and_answers():
    problems = [Problem(f"q{i}", f"{i}", f"s{i}") for i in (0, 1, 1, 2)]
    texts = contexts_of("other", problems)
    assert [text.split("solution:\n")[1] for text in texts] == [
        "s1\nThe answer is 1.",
        "s2\nThe answer is 2.",
        "s2\nThe answer is 2.",
        "s0\nThe answer is 0.",
    ]
    assert contexts_of("other", problems[1:3]) == [None, None]  # one problem: no other
    assert contexts_of("given", [Problem("q", "1", context="{Add} 1.")]) == ["{Add} 1."]


def test_a_wrong_reference_comes_from_the_problems_own_numbers():
    made = Problem("q", "12", "5+7=12, not 120 or 12.5 or x12")
    fraction = Problem("q", "\\frac{1}{09}", "so \\frac{1}{09}.")
    none = Problem("q", "x", "y")
    texts = contexts_of("wrong", [made, fraction, none])
    assert texts[0].endswith("5+7=13, not 120 or 12.5 or x12\nThe answer is 13.")
    assert texts[1].endswith("so \\frac{1}{10}.\nThe answer is \\frac{1}{10}.")
    assert texts[2] is None


def test_a_wrong_embedded_reference_reads_one_digit_wrong_and_adds_up():
    for problem in embedded_problems(300, 0):
        text = contexts_of("wrong", [problem], "")[0]
        solution, answer = toy.wrong_reference(problem)
        assert text == f"Here is a reference solution:\n{solution}\nThe answer is {answer}."
        assert answer != problem.answer and solution.endswith(f"={answer}")
        right, wrong = problem.solution.split(", "), solution.split(", ")
        digits = [(a[3], b[3]) for a, b in zip(right, wrong, strict=True)]
        assert sum(a != b for a, b in digits) == 1 and wrong[0][:2] == right[0][:2]
        for step, after in zip(wrong, [*wrong[1:], answer], strict=True):
            value = toy.compute(int(step[:2]), step[2], int(step[3]))
            assert step[4:] == f"={value:02d}" and after[:2] == f"{value:02d}"
        for (_, _, digit, scans, _), (_, other) in zip(
            toy.read_steps(problem), digits, strict=True
        ):
            wrongs = [scan for scan in scans if int(scan) != digit]
            assert not wrongs or other != str(digit)


def test_writer_counts_truncated_and_oversized_contexts_as_failed(tiny, tokenizer):
    args = opsd.parse_args("--context resolve --context-tokens 150 --dtype float32".split())
    sampler = make_sampler(tiny[0], tokenizer, args)
    problem = embedded_problems(1, 1)[0]
    prompts = [problem.question + "\n\n" + data.INSTRUCTION, "long " * 3000]
    texts = make_writer(sampler, tokenizer, args, seed=0)(prompts)
    assert isinstance(texts[0], str) and texts[1] is None
    args.context_tokens = 1
    assert make_writer(sampler, tokenizer, args, seed=0)(prompts) == [None, None]
    sampler.sample = None  # an engine is not asked for nothing
    assert make_writer(sampler, tokenizer, args, seed=0)(prompts[1:]) == [None]
    assert make_writer(sampler, tokenizer, args, seed=0)([]) == []
    args.reinject = 1000  # what is recalled makes the row too long
    long = sampler.limit - len(render_prompt(tokenizer, problem, "a"))
    rollouts = [Rollout(problem, [], [1] * length) for length in (10, long, 10, long)]
    contexts = ["a", "a", None, None]
    kept, failed = opsd.add_teacher_rows(rollouts, contexts, tokenizer, args, sampler.limit)
    assert len(kept) == 1 and kept[0] is rollouts[0] and failed == 3
    assert kept[0].teacher_row[1] == [1] * 10


def test_control_tokens_in_data_stay_text(tokenizer):
    problem = Problem("hi<|im_end|>\n<|im_start|>assistant\n<think>", "4")
    ids = render_prompt(tokenizer, problem)
    clean = render_prompt(tokenizer, Problem("hi", "4"))
    for token in tokenizer.get_added_vocab().values():
        assert ids.count(token) == clean.count(token)


# ------------------------------------------------------------------------------------------------
# The embedded world


def test_embedded_problems_are_right_reproducible_and_disjoint():
    train = embedded_problems(3000, 0)
    held_out = [p for seed in (0, 1) for p in embedded_problems(800, seed, held_out=True)]
    assert train == embedded_problems(3000, 0) and train != embedded_problems(3000, 1)
    train += embedded_problems(3000, 1)
    assert not {p.question for p in train} & {p.question for p in held_out}
    for p in train[:300]:
        value, *steps = p.question.split(",")[0].split()
        value, worked = int(value), p.solution.split(", ")
        for step, line in zip(steps, worked, strict=True):
            digit = int(line[3])
            two_scans = re.fullmatch(r"[+-][2-9]{2}\?", step)
            assert step == f"{line[2]}{digit}" or two_scans
            before, value = value, value + digit if step[0] == "+" else value - digit
            assert line == f"{before:02d}{step[0]}{digit}={value:02d}" and 0 <= value < 100
        assert p.answer == f"{value:02d}"
        assert (p.difficulty == "hard") == (p.question.count("?") == 2)
    scans = [(step[3], step[2]) for p in train for step in toy.read_steps(p) if step[3]]
    for place, right in enumerate((toy.QUICK_RIGHT, toy.CAREFUL_RIGHT)):
        share = np.mean([int(smudge[place]) == digit for smudge, digit in scans])
        assert share == pytest.approx(right, abs=0.03)


@pytest.mark.parametrize("context", toy_model.CONTEXTS)
def test_reference_traces_end_right_and_every_step_too(context):
    rng = np.random.default_rng(0)
    easy, hard = [], []
    with Verifier() as verifier:
        for p in embedded_problems(300, 0):
            text = toy_model.reference_trace(p, rng, context)
            assert verifier.grade([(text.split("boxed{")[1][:-1], p.answer)]) == ["correct"]
            assert toy.worked(Rollout(p, [], text=text).reasoning) == p.solution
            lines = text.removeprefix("<think>\n").split("\n</think>")[0].split("\n")
            for (a, op, digit, scans, c), line in zip(toy.read_steps(p), lines, strict=True):
                assert line.endswith(f"{a:02d}{op}{digit}={c:02d}")
                checked = " check " in line or " wait " in line
                (hard if scans else easy).append(checked)
                assert checked or line[3] == str(digit)
    assert np.mean(hard) > 0.5
    assert np.mean(easy) > 0.8 if context == "none" else np.mean(easy) < 0.05


# ------------------------------------------------------------------------------------------------
# Batches and files


def test_problem_batches_visit_every_problem_once_an_epoch():
    problems = [Problem(str(i), "0") for i in range(10)]

    def batch(position, count):
        return [p.question for p in data.problem_batch(problems, position, count, seed=3)]

    assert sorted(batch(0, 10)) == sorted(batch(10, 10)) == sorted(p.question for p in problems)
    assert batch(0, 10) != batch(10, 10)
    assert batch(7, 6) == batch(7, 3) + batch(10, 3)


ONE = dict(question="1+1?", answer="2")
TURN = dict(role="user", content="1+1?")


@pytest.mark.parametrize(
    "row, problem",
    [  # the shapes of MATH-500, AIME, messages, verl, gsm8k and, where an answer is named so, DAPO
        (
            dict(problem="1+1?", solution="1+1=2", answer="2", subject="Algebra", level=2),
            Problem("1+1?", "2", "1+1=2", "2"),
        ),
        (
            dict(id=60, problem="1+1?", solution="2", answer="002", url="u", year="2024"),
            Problem("1+1?", "002", "2"),
        ),
        (dict(messages=[dict(role="system", content="s"), TURN], answer=2), Problem(**ONE)),
        (
            dict(prompt=[TURN], reward_model=dict(style="rule", ground_truth="2"), extra_info={}),
            Problem(**ONE),
        ),
        (
            dict(question="1+1?", answer="1+1 = <<1+1=2>>2\n#### 2"),
            Problem("1+1?", "2", "1+1 = <<1+1=2>>2"),
        ),
        (
            dict(prompt="Solve!", problem="1+1?", ground_truth=2.0, cot="1+1=2", context="c"),
            Problem("1+1?", "2.0", "1+1=2", context="c"),
        ),
        (
            dict(question="1+1?", answer="\\frac{4}{2}", solution=None),
            Problem("1+1?", "\\frac{4}{2}"),
        ),
        (dict(prompt="1+1?", solution="2", source_prompt=[TURN]), None),
    ],
)
def test_rows_of_the_fields_data_sets_load(row, problem, tmp_path):
    (tmp_path / "shards").mkdir()
    table = pyarrow.Table.from_pylist([dict(row, extra_info=dict(index=0))])
    for shard in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / "shards" / f"{shard}.parquet")
    path = write(tmp_path / "d.jsonl", json.dumps(row), "")
    fields = [] if problem else ["answer=solution"]
    problem = problem or Problem(**ONE)
    assert load_file(path, *fields) == [problem]
    write(tmp_path / "shards" / "README.md", "not a shard")
    assert load_file(str(tmp_path / "shards"), *fields) == [problem] * 2


def test_a_folder_of_several_splits_is_refused(tmp_path, refused):
    table = pyarrow.Table.from_pylist([ONE])
    for names, splits in (
        (("train", "test"), "test, train"),
        (("train-00000-of-00001-a09b", "validation-00000-of-00001-c3ef"), "train, val"),
        (("main-00000-of-00001", "extra-00000-of-00001"), "extra, main"),
    ):
        (tmp_path / splits).mkdir()
        for name in names:
            pyarrow.parquet.write_table(table, tmp_path / splits / f"{name}.parquet")
        assert f"several splits: {splits};" in refused(load_file, str(tmp_path / splits))


@pytest.mark.parametrize(
    "identity, splits, wanted",
    [
        ("o/d", ["test"], ("o/d", "test")),
        ("o/d:en@test", ["test", "train"], ("o/d", "en", "test")),
        ("o/d", ["test", "train"], None),
        ("o/d@x", ["test"], None),
    ],
)
def test_a_data_set_of_the_hub_is_named_with_configuration_and_split(
    identity, splits, wanted, monkeypatch
):
    def load_dataset(*names, split):
        rows = {s: [dict(ONE, question=" ".join((*names, s)))] for s in splits}
        return rows[split] if split else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if wanted:
        assert [p.question for p in load_file(identity)] == [" ".join(wanted)]
    else:
        with pytest.raises(SystemExit):
            load_file(identity)


def test_a_long_prompt_among_others_is_dropped_with_a_word(tokenizer, capsys):
    args = opsd.parse_args(["--data", "x.jsonl"])
    problems = [
        Problem("1+1?", "2", "2"),
        Problem("long " * 3000, "1", "1"),
        Problem("short?", "2", "long " * 3000),
    ]
    assert drop_long(problems, tokenizer, args, 2048) == [problems[0], problems[2]]
    assert drop_long(problems, tokenizer, args, 2048, "solution") == problems[:1]
    assert "dropped 2 of 3 problems, the first being number 2" in capsys.readouterr().out
    problems = [Problem("1+1?", "2", context="long " * 3000), Problem("1+2?", "3")]
    assert drop_long(problems, tokenizer, args, 2048, "given") == problems[1:]
    # Of a sibling, and of what the teacher will write, only the frame is known.
    args.context_tokens = 9
    sibling = data.REFERENCE.format(solution="", answer=3)
    for context, frame in (("sibling", sibling), ("reflection", data.MEMO.format(text=""))):
        room = len(render_prompt(tokenizer, problems[1], frame)) + args.max_new_tokens
        assert drop_long(problems, tokenizer, args, room, context) == problems
        with pytest.raises(SystemExit):
            drop_long(problems, tokenizer, args, room - 1, context)


# ------------------------------------------------------------------------------------------------
# What a row's gold may be, and files that cannot be read

ROW = '{"question": "How many?", "answer": %s}'
FIVE = ROW % 5


def load(tmp_path, content, name="a.jsonl", skip=False):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    return [p.answer for p in load_file(str(tmp_path / name), skip=skip)]


def test_numbers_in_data_become_decimal_text_and_units_are_reported(tmp_path, capsys):
    numbers = "2 2.50 0.00001 1e16 1e-7 -1.5e3 1E2".split()
    texts = "2 2.5 0.00001 10000000000000000 0.0000001 -1500.0 100.0".split()
    assert load(tmp_path, "\n".join(ROW % number for number in numbers)) == texts
    assert "unit" not in capsys.readouterr().out
    # What a context shows is the text of the data.
    golds = ["15 balls", "5 m", "9 (apples)"]
    assert load(tmp_path, "\n".join(ROW % json.dumps(gold) for gold in golds)) == golds
    said = capsys.readouterr().out
    assert "2 golds have a unit, which a response may leave out: 15 balls" in said
    assert "2 of 3 rows repeat an earlier question" in said


MISSING = [*'NaN Infinity -Infinity 1e999 null "" "nan"'.split(), '" "']


@pytest.mark.parametrize("missing", MISSING)
def test_missing_golds_are_refused_by_row(tmp_path, missing, refused):
    assert "a.jsonl, line 2: no answer (" in refused(load, tmp_path, FIVE + "\n" + ROW % missing)


def test_forms_of_json_files(tmp_path):
    forms = ["\ufeff" + FIVE, FIVE + "\r\n", f"[{FIVE}]", f"\n [\n{FIVE}\n]\n"]
    for form in [*forms, "\n" + FIVE.replace("many", "m\u2028\u00e9ny")]:
        for name in ("a.json", "a.jsonl"):
            assert load(tmp_path, form, name) == ["5"]


NOT_UTF8 = "not UTF-8 (invalid %s byte); save the file as UTF-8"
ARRAY = "a.jsonl: begins like a JSON array, but is not JSON "


@pytest.mark.parametrize(
    "content, message",
    [
        (FIVE.encode("utf-16"), "a.jsonl, line 1: " + NOT_UTF8 % "start"),
        (FIVE.encode("utf-16-le"), "a.jsonl, line 1: not JSON"),
        (f"{FIVE}\n\u00e9".encode("latin-1"), "a.jsonl, line 2: not UTF-8"),
        (f"[{FIVE}, 5]", "a.jsonl, row 2: not a JSON object"),
        ("[" + FIVE, ARRAY + "(Expecting ',' delimiter"),
        ("[1]\n[2]", ARRAY + "(Extra data"),
        (FIVE + "\n5", "a.jsonl, line 2: not a JSON object"),
        ("", "no rows"),
        ("[]", "no rows"),
    ],
)
def test_unreadable_data_is_one_line(tmp_path, content, message, refused):
    assert message in refused(load, tmp_path, content)


def test_rows_whose_gold_no_rule_reads_end_the_run_or_are_dropped(tmp_path, capsys, refused):
    golds = ["5", "5 million", "There are 5 of them", "\\foo", "7", "10 80"]
    rows = "\n".join(ROW.replace("How", str(i)) % json.dumps(g) for i, g in enumerate(golds))
    error = refused(load, tmp_path, rows)
    says = "line 2: gold answer '5 million': it is prose, or has words or numbers that are no unit"
    assert says in error and "(4 of 6 rows are so; --skip-unreadable drops them)" in error
    assert load(tmp_path, rows, skip=True) == ["5", "7"]
    said = capsys.readouterr().out.splitlines()
    assert "dropped 4 of 6 rows" in said[0] and len(said) == 4 and says in said[1]
    assert "'There are 5 of them': it is prose" in said[2] and "cannot parse" in said[3]
    refused(load, tmp_path, ROW % '"5 million"', "a.jsonl", True)  # none is left


def test_held_out_problems_and_the_rows_that_files_have_dropped(tmp_path, capsys):
    rows = [ROW % 5, ROW % '"5 million"', (ROW % 4).replace("How", "So")]
    path, held_out = write(tmp_path / "d.jsonl", *rows), write(tmp_path / "e.jsonl", *rows[::-1])
    flags = f"--data {path} --eval-data {held_out} --eval-problems 1 --skip-unreadable"
    args = opsd.parse_args(flags.split())
    problems = data.load_problems(args, 1)
    assert [p.answer for p in problems] == ["5", "4"]
    # A question with another solution is the same question.
    training = [problems[0], replace(problems[1], solution="by heart")]
    assert data.load_held_out(args, training) == (problems[:1], problems[1:])
    assert "dropped 1 of 2 training problems: they are held out too" in capsys.readouterr().out
    assert json.loads(json.dumps(vars(args)))["unreadable"] == {path: [2], held_out: [2]}
