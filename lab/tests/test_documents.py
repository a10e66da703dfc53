"""The laboratory's pages: every command parses, every link leads somewhere, tables are fresh."""

import glob
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from lab import table
from run import HERE
from tests.test_documents import commands, follow_links, parse_commands, text_of

PAGES = sorted(glob.glob("lab/*.md", root_dir=HERE))
RESULTS = sorted(glob.glob("lab/results/*.md", root_dir=HERE))


@pytest.mark.parametrize("page", [*PAGES, *RESULTS, "lab/reproduce.sh"])
def test_commands_parse_and_links_lead_somewhere(page):
    if page.endswith(".sh"):
        modules = [name for name, _ in commands(page)]
        assert len(modules) > 8 and all(map(importlib.import_module, modules))
    else:
        parse_commands(page)
        follow_links(page)


# Stands for python: notes how it was called, and leaves the files that are looked for.
FAKE = """
import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
with open("calls.jsonl", "a") as calls:
    print(json.dumps(argv), file=calls)
if argv[0] == "-c":
    sys.exit(1)  # no vllm
out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else Path("runs/gates")
(out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
if out.suffix:
    out.touch()
else:
    for name in "metrics.jsonl kl_by_position.jsonl table.json figure.png figure.svg".split():
        (out / name).touch()
"""


@pytest.mark.parametrize("what", ["", "real"])
def test_reproduce_calls_what_scripts_take(what, tmp_path):
    (tmp_path / "lab").mkdir()
    shutil.copy(os.path.join(HERE, "lab", "reproduce.sh"), tmp_path / "lab")
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}{FAKE}")
    fake.chmod(0o755)
    seeds = dict(SEEDS="201", REAL_SEEDS="1", PATH=f"{fake.parent}:{os.environ['PATH']}")
    command = ["bash", "lab/reproduce.sh", *what.split()]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **seeds}, check=True)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    for first, *argv in calls:
        if first != "-c":
            name, argv = (argv[0], argv[1:]) if first == "-m" else (first[:-3], argv)
            script = importlib.import_module(name)
            if hasattr(script, "parse_args"):
                script.parse_args(argv)
    assert len(calls) > 30


def test_every_script_is_in_a_document():
    named = {name for page in PAGES for name, _ in commands(page)}
    scripts = [path for path in glob.glob("lab/*.py", root_dir=HERE) if "def main" in text_of(path)]
    assert named >= {path[:-3].replace("/", ".") for path in scripts}


# Here, not among the product's tests: an entry of a fork's own must break none of those.
def test_the_front_page_is_short_and_files_are_readable():
    lines = text_of("README.md").split("\n")
    assert len(lines) <= 111 and max(map(len, lines)) <= 100
    for path in glob.glob("*.py", root_dir=HERE) + glob.glob("tools/*.py", root_dir=HERE):
        if not path.startswith("test_"):
            assert text_of(path).count("\n") <= 450, path


def test_the_tables_are_fresh(capsys):
    with pytest.raises(SystemExit) as stop:
        table.main(["--check"])
    assert stop.value.code == 0, capsys.readouterr().out
