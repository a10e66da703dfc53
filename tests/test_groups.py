"""Several responses a problem: what short runs sample, keep, and let the teacher read."""

import json

import pytest

import opsd
import rollout
import toy
from data import INSTRUCTION, embedded_problems, problem_batch
from run import tiny
from tests.helpers import metrics, write


def train(flags, folder, monkeypatch):
    """[(draws, rollouts in the loss, line of the log) of each step] of a run of five problems."""
    draws, trained = [[]], []
    grade, own = rollout.grade_rollouts, opsd.accumulate_gradients

    def note(verifier, rollouts):
        draws[-1].append(rollouts)
        return grade(verifier, rollouts)

    def end_step(student, teacher, rollouts, args):
        draws.append([])
        trained.append(rollouts)
        return own(student, teacher, rollouts, args)

    monkeypatch.setattr(rollout, "grade_rollouts", note)
    monkeypatch.setattr(opsd, "accumulate_gradients", end_step)
    flags = f"--model {tiny('sft')} {flags} --steps 3 --batch 5 --eval-problems 0"
    opsd.main([*flags.split(), "--threads", "1", "--out", str(folder / "run")])
    return list(zip(draws[:-1], trained, metrics(folder / "run")[1:], strict=True))


def shortest_first(draw, problem):
    right = [r for r in draw if r.problem == problem and r.outcome == "correct"]
    return sorted(right, key=lambda r: len(r.response_ids))


@pytest.mark.parametrize("resample, keeps", [(1, "all"), (3, "correct")])
def test_the_shortest_sibling_is_read(resample, keeps, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "worked", lambda trace: f"({trace})")  # else siblings read alike
    flags = f"--group 3 --filter {keeps} --resample {resample} --context sibling"
    problems, drawn, failed, cut = embedded_problems(15 * (resample + 1), 0), 0, 0, 0
    for draws, kept, line in train(flags, tmp_path, monkeypatch):
        passed = []
        for draw in draws:
            assert len(passed) < 15
            batch = problem_batch(problems, drawn, 5, 0)
            assert [r.problem for r in draw] == [p for p in batch for _ in range(3)]
            for r in draw:
                others = [s for s in shortest_first(draw, r.problem) if s is not r]
                passed += [(r, others)] if keeps in ("all", r.outcome) else []
            drawn += 5
        assert len(passed) >= 15 or len(draws) == resample + 1
        passed, cut = passed[:15], cut + len(passed) - 15
        read = [(r, others[0].text) for r, others in passed if others]
        assert kept == [r for r, _ in read]
        for r, text in read:
            think = text.split("<think>\n")[1].split("\n</think>")[0]
            reference = f"solution:\n({think})\nThe answer is {r.problem.answer}.\n"
            assert reference in tokenizer.decode(r.teacher_row[0])
        assert (line["sampled"], line["kept"]) == (15 * len(draws), len(kept))
        assert line["context_failed"] == len(passed) - len(kept)
        failed += line["context_failed"]
    assert failed > 0 and (cut > 0) == (keeps == "correct")


def test_the_shortest_correct_response_of_each_problem_is_kept(tmp_path, monkeypatch):
    for draws, kept, _ in train("--group 4 --filter shortest --resample 1", tmp_path, monkeypatch):
        best = [r for draw in draws for r in draw if r in shortest_first(draw, r.problem)[:1]]
        assert len(draws) == 2 and kept == best and 5 < len(kept) <= 10  # a full step has 20


def test_a_rows_own_text_is_read_as_it_is(tokenizer, tmp_path, monkeypatch):
    rows = [dict(question=f"{i}+1?", answer=i + 1, context=f"{{Add}} {i}.") for i in range(5)]
    path = write(tmp_path / "d.jsonl", *map(json.dumps, rows))
    for _, kept, _ in train(f"--data {path} --context given --filter all", tmp_path, monkeypatch):
        for r in kept:
            text = f"?\n\n{{Add}} {r.problem.question[0]}.\n\n{INSTRUCTION}"
            assert text in tokenizer.decode(r.teacher_row[0])
