"""Flags that cannot be meant: one line that names them, before anything is loaded."""

import json
import os
import re

import pytest
import torch

import eval as evaluation
import flags
import opsd
import rlvr
import sft
from run import Parser, check_run_directory
from tests.helpers import TINY, changed_model, write
from tools import bench, show

EVAL, SHOW = f"--model {TINY} ", "--out page.html "
REFUSED = [
    # Nothing reads them.
    (opsd, "--beta=0.5", "--beta: read only with --divergence jsd"),  # the default, but typed
    (opsd, "--teacher every --ema 0.9", "--ema: read only with --teacher ema"),
    (opsd, "--refresh 5", "--refresh: read only with --teacher every (--teacher is frozen)"),
    (opsd, "--gate agreement --gate-range 1", "--gate-range: read only with --gate student"),
    (opsd, "--context none --reinject 20", "--reinject: read only with --context"),
    (opsd, "--context none --context-first", "--context-first: read only with --context"),
    (opsd, "--context-tokens 99", "--context-tokens: read only with --context reflection"),
    (opsd, "--eval-data a.jsonl", "--eval-data: read only with --data"),
    (opsd, "--data a.jsonl --eval-data b.jsonl --eval-problems 0", "only with --eval-problems"),
    (opsd, "--eval-every 2 --eval-problems 0", "--eval-every: read only with --eval-problems"),
    (opsd, "--fields answer=gold", "--fields: read only with --data"),
    (opsd, "--overwrite", "--overwrite: read only with --out"),
    (opsd, "--temperature 0 --top-p 0.5", "--top-p: read only with --temperature"),
    (opsd, "--backend vllm --sample-batch 9", "--sample-batch: read only with --backend auto"),
    (opsd, "--backend transformers --vllm-memory 0.5", "--vllm-memory: read only with --backend"),
    (rlvr, "--backend transformers --vllm-eager", "--vllm-eager: read only with --backend"),
    (evaluation, EVAL + "--data a.jsonl --problems 5", "--problems: read only without --data"),
    (evaluation, EVAL + "--context solution --context-tokens 9", "--context-tokens: read"),
    (show, SHOW + "--lr 1e-5", "--lr: of opsd.py, not read here"),
    (show, SHOW + "--lora 4", "--lora: of opsd.py, not read here"),
    (show, SHOW + "--context=solution", "--context: of opsd.py, not read here"),
    (show, SHOW + "--context-tokens 9", "--context-tokens: read only with --context reflection"),
    # Nothing could come of them.
    (opsd, "--device mps", "--device: invalid choice: 'mps'"),
    (opsd, "--gate gap", "--gate gap: needs --gate-range FROM or"),
    (opsd, "--divergence split", "--divergence split: --filter correct keeps one outcome only"),
    (opsd, "--context sibling", "--context sibling: a response has siblings only with --group 2"),
    (opsd, "--lora 4 --teacher ema", "--teacher ema: with --lora it is the student"),
    (evaluation, EVAL + "--context sibling --samples 1", "only with --samples 2 or more"),
    # Beyond the last.
    (opsd, "--steps 2 --eval-every 3", "--eval-every 3: beyond --steps 2"),
    (opsd, "--steps 2 --save-every 3", "--save-every 3: beyond --steps 2"),
    (opsd, "--steps 2 --teacher every --refresh 3", "--refresh 3: beyond --steps 2"),
    (opsd, "--reinject 2048", "--reinject 2048: beyond --max-new-tokens 160"),
    (sft, "--steps 50 --warmup 51", "--warmup 51: beyond --steps 50"),
    # Numbers.
    (opsd, "--seed 99999999999999999999", "--seed 99999999999999999999: must be 0 or more and"),
    (opsd, "--steps 0", "--steps 0: must be above 0"),
    (opsd, "--refresh 0", "--refresh 0: must be above 0"),
    (opsd, "--ema 1", "--ema 1.0: must be 0 or more and below 1"),
    (opsd, "--vllm-memory 1.5", "--vllm-memory 1.5: must be above 0 and below 1"),
    (opsd, "--top-p 1.5", "--top-p 1.5: must be above 0 and at most 1"),
    (opsd, "--gate gap --gate-range -1", "--gate-range -1.0: must be 0 or more"),
    (opsd, "--gate gap --gate-range 1 2 3", "--gate gap: needs --gate-range FROM or"),
    (opsd, "--threads 100000", "--threads 100000: must be 0 or more and below 1025"),
    (opsd, "--temperature inf", "--temperature inf: must be 0 or more and finite"),
    (opsd, "--lr nan", "--lr nan: must be above 0 and finite"),
    (opsd, "--gate gap --gate-range 10 5", "--gate-range 10.0 5.0: no token is in it"),
    (opsd, "--gate position --gate-range 160", "--gate-range 160.0 inf: no token is in it"),
    (bench, "loss --tokens 8 -1", "--tokens -1: must be above 0"),
    # Twice, or equal anyhow.
    (evaluation, f"--model {TINY} {TINY}/", "one of them stands there twice"),
    (evaluation, EVAL + "--context answer answer", "--context answer answer: one of them"),
    (evaluation, EVAL + "--temperature 0", "--samples 4: at --temperature 0 all are equal"),
]


@pytest.mark.parametrize("script, line, complaint", REFUSED)
def test_a_flag_that_cannot_be_meant_is_named(script, line, complaint, refused):
    assert complaint in refused(script.parse_args, line.split())


READ = [
    (opsd, "--divergence jsd --beta 0.3 --teacher ema --ema 0.9 --context none"),
    (opsd, "--gate gap --gate-range 1 2 --reinject 20 --context-first"),
    (opsd, "--context two-line --context-tokens 99 --out x --overwrite"),
    (opsd, "--data a.jsonl --eval-data b.jsonl --fields answer=gold --eval-every 40"),
    (opsd, "--backend vllm --vllm-memory 0.5 --top-p 0.5 --seed 9223372036854775807"),
    (evaluation, EVAL + "--context answer reflection --context-tokens 9 --problems 5"),
    (show, SHOW + "--contexts answer reflection --context-tokens 9 --overwrite"),
    (sft, "--steps 50 --warmup 50"),
]


@pytest.mark.parametrize("script, line", READ)
def test_a_flag_that_is_read_is_taken(script, line):
    script.parse_args(line.split())


def test_what_helps_say_of_reading_names_flags_and_choices(monkeypatch):
    parsers = []
    monkeypatch.setattr(Parser, "parse_known_args", lambda self, *argv: parsers.append(self) or 1)
    for script in (opsd, rlvr, sft, evaluation):
        with pytest.raises(TypeError):  # the parser is made, nothing is parsed
            script.parse_args([])
    conditions = 0
    for parser in parsers:
        actions = {flag: a for a in parser._actions for flag in a.option_strings}
        for action in parser._actions:
            for part in str(action.help).partition(": ")[0].split(" and "):
                if not re.match("(of|without) -", part):
                    continue
                _, other, values = flags.READ.fullmatch(part).groups()
                assert set((values or "").split(", ")) - {""} <= set(actions[other].choices or ())
                conditions += 1
    assert len(parsers) == 4 and conditions > 30


def test_a_script_refuses_what_only_its_files_tell(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    row = '{"question": "1+1?", "answer": "2", "solution": "2"}'
    half = row.replace("1+1?", "\\ud800")
    write(tmp_path / "good.jsonl", row)
    write(tmp_path / "bare.jsonl", row, '{"question": "2?", "answer": "2"}')
    write(tmp_path / "half.jsonl", row, half)
    write(tmp_path / "long.jsonl", row.replace("1+1?", "long " * 3000))
    write(tmp_path / "deep.json", "[" * 5000)
    for name in ("notes.txt", "broken.parquet"):
        write(tmp_path / name, "hello")
    for name in ("dir.jsonl", "taken"):
        (tmp_path / name).mkdir()
    for name, text in (("list", "[1]"), ("number", '{"args": 3}')):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", text)
    other = changed_model(tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:50]
    write(tmp_path / "other" / "tokenizer.json", json.dumps(words))
    ends = changed_model(tmp_path / "ends")
    write(tmp_path / "ends" / "generation_config.json", '{"eos_token_id": [3, 99999]}')
    bare = "--threads 1 --batch 1 --steps 1 --filter all --eval-problems 0".split()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = os.listdir(tmp_path)
    cases = (
        ("--data missing.jsonl", "missing.jsonl"),
        ("--data notes.txt", "notes.txt"),
        ("--data broken.parquet", "broken.parquet"),
        ("--data long.jsonl", "--max-new-tokens 160: no prompt leaves room"),
        ("--data bare.jsonl", "--context solution: needs a solution, and problem 2 of 2 has none"),
        ("--data good.jsonl --context given", "needs a context, and problem 1 of 1"),
        ("--max-new-tokens 5000", "--max-new-tokens 5000"),
        ("--model nowhere", "--model nowhere"),
        ("--device cuda", "--device cuda: needs CUDA device 0, 0 are here"),
        ("--out taken", "--out taken: exists already"),
        ("--data half.jsonl", "half.jsonl, line 2: not JSON ("),
        ("--data deep.json", "deep.json: begins like a JSON array, but is not JSON ("),
        ("--data dir.jsonl", "--data dir.jsonl: Is a directory"),
        ("--data good.jsonl --fields answer=answer answer=gold", "--fields answer=gold: PART="),
        ("--data good.jsonl --eval-problems 8 --eval-every 1", "without --eval-data"),
        ("--context resolve --context-tokens 9999", "--context-tokens 9999: the model's"),
        (f"--model {ends}", "99999] are none, or none of the model's"),
    )
    for line, complaint in cases:
        assert complaint in refused(opsd.main, [*bare, *line.split()]), line
    assert os.listdir(tmp_path) == before
    for line, complaint in (
        ("--data bare.jsonl", "sft.py needs a solution in every row"),
        ("--data long.jsonl", "--data: no row fits in the model's context of 2048 tokens"),
    ):
        assert complaint in refused(sft.main, ["--model", TINY, *line.split(), "--steps", "1"])
    few = "--contexts sibling --problems 2 --draw 2 --threads 1".split()
    assert "none of the 2 responses has one" in refused(show.main, [*SHOW.split(), *few])
    monkeypatch.setattr(evaluation.samplers, "make_sampler", None)  # before anything is sampled
    for line, complaint in (
        (f"{TINY} {other}", f"--model {other}: another tokenizer than {TINY}'s"),
        (f"{TINY} --data bare.jsonl long.jsonl", "a prompt has "),
        (f"{TINY} --out page/", "--out page/: is a directory, not a file"),
        (f"{TINY} --out good.jsonl/x.json", "good.jsonl is not a directory"),
        (f"{TINY} --out good.jsonl", "--out good.jsonl: exists already"),
        (f"{TINY} --data bare.jsonl --context solution", "--context solution: needs a solution"),
    ):
        assert complaint in refused(evaluation.main, ["--model", *line.split()])
    for line, complaint in (
        ("--jsonl good.jsonl", "--jsonl good.jsonl: exists already"),
        ("--jsonl page.html", "--jsonl page.html: is --out as well"),
        ("--data good.jsonl", "--problems 12: only 1 are drawn (--draw, --data)"),
        ("--problems 2 --data bare.jsonl", "--context other: needs a solution"),
        ("--problems 500 --draw 4", "--problems 500: only 4 are drawn"),
    ):
        assert complaint in refused(show.main, [*SHOW.split(), *line.split()])
    for out in ("list", "number"):  # no settings in line 0
        assert check_run_directory(opsd.parse_args(["--resume", "--out", out])) == {}
