"""The documents: every command parses, every link leads somewhere, every made table is fresh."""

import ast
import glob
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import data
import opsd
from run import HERE
from tests.helpers import read_lines

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=HERE))]
COMMAND = re.compile(
    r"(?:\bpython|torchrun --nproc-per-node \d+) (?:-m (tools\.\w+)|(\w+)\.py)([^\n&|#`;<>]*)"
)


def text_of(page):
    with open(os.path.join(HERE, page)) as stream:
        return stream.read()


def commands(page):
    """(module, arguments) of each command of ours on a page, in code blocks or in a line."""
    for tool, script, line in COMMAND.findall(text_of(page).replace("\\\n", " ")):
        yield tool or script, shlex.split(line)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page):
    for name, argv in commands(page):
        if name == "verify" or "--help" in argv:
            continue
        if (page, name) == ("docs/forking.md", "opsd"):
            continue  # those need their diffs, see below
        if name == "tools.memory" and "opsd.py" in argv:
            argv.remove("opsd.py")
            del argv[argv.index("--gpus") : argv.index("--gpus") + 2]
            name = "opsd"
        importlib.import_module(name).parse_args(argv)


def test_every_script_and_tool_is_in_a_document():
    named = {name for page in PAGES for name, _ in commands(page)}
    tools = {path for path in glob.glob("tools/*.py", root_dir=HERE) if "def main" in text_of(path)}
    tools = {path[:-3].replace("/", ".") for path in tools}
    assert named >= tools | {"opsd", "rlvr", "sft", "eval", "verify"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(HERE, path)), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


FORKS = re.findall(
    r"```diff\n(.*?\n)```\n\n    python (opsd\.py [^\n]+)", text_of("docs/forking.md"), re.DOTALL
)


@pytest.mark.parametrize("fork", range(4))
def test_forks_apply_and_train(fork, tmp_path):
    diff, command = FORKS[fork]
    assert diff.count("\n@@") <= (3, 2, 5, 1)[fork]
    for path in glob.glob("*.py", root_dir=HERE):
        shutil.copy(os.path.join(HERE, path), tmp_path)
    shutil.copytree(os.path.join(HERE, "tiny"), tmp_path / "tiny")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    argv = [*shlex.split(command), "--threads", "1", "--batch", "16", "--max-new-tokens", "90"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2/2  loss" in done.stdout


# What a fork adds, in at most six lines each, and the flags that choose it.
ADDED = {
    "gate": (
        """
def first_ten(student_logps, teacher_logps, tokens, args):
    return (tokens.position < 10).float()
opsd.GATES["first-ten"] = first_ten""",
        "--filter all --gate first-ten",
    ),
    "context": (
        """
def hint(rollouts, write, args):
    return ["One hint: " + r.problem.solution[:7] for r in rollouts]
data.CONTEXTS["hint"] = hint""",
        "--filter all --context hint",
    ),
    "filter": (
        """
opsd.FILTERS["short"] = lambda r, args: len(r.response_ids) <= 50""",
        "--filter short",
    ),
    "divergence": (
        """
def tv(student_logps, teacher_logps, tokens, args):
    return (student_logps.exp() - teacher_logps.exp()).abs().sum(-1) / 2
opsd.DIVERGENCES["tv"] = tv""",
        "--filter all --divergence tv --mean token",
    ),
}


@pytest.mark.parametrize("kind", ADDED)
def test_a_gate_a_context_a_filter_a_divergence_are_a_few_lines(kind, tmp_path, monkeypatch):
    lines, flags = ADDED[kind]
    assert lines.count("\n") <= 6
    table, name = re.search(r"\w+\.([A-Z]+)\[\"(\S+)\"\]", lines).groups()
    monkeypatch.setitem(getattr(opsd, table), name, None)  # taken out again after the test
    exec(lines, dict(opsd=opsd, data=data))
    common = f"--steps 1 --batch 12 --eval-problems 0 --threads 1 --out {tmp_path / 'run'}"
    opsd.main(f"{flags} {common}".split())
    step = read_lines(tmp_path / "run" / "metrics.jsonl")[1]
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    if kind == "gate":
        assert 0 < step["gate_mass"] < 0.5
    if kind == "context":
        assert "One hint: " in samples[0]["teacher_prompt"]
    if kind == "filter":
        assert 0 < step["kept"] < step["sampled"] and step["length_kept"] <= 50
    if kind == "divergence":  # Pinsker's inequality, and Jensen's
        assert 0 < 2 * step["loss"] ** 2 <= step["reverse_kl"] != pytest.approx(step["loss"])


def test_the_front_page_is_short_and_files_are_readable():
    lines = text_of("README.md").split("\n")
    assert len(lines) <= 151 and max(map(len, lines)) <= 100
    for path in glob.glob("*.py", root_dir=HERE) + glob.glob("tools/*.py", root_dir=HERE):
        if not path.startswith("test_"):
            assert text_of(path).count("\n") <= 450, path


def test_the_tables_are_fresh(capsys):
    table = importlib.import_module("tools.table")
    with pytest.raises(SystemExit) as stop:
        table.main(["--check"])
    assert stop.value.code == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_snippets_import_what_is_there(page):
    for snippet in re.findall(r"python - <<'END'[^\n]*\n(.*?)\nEND\n", text_of(page), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and os.path.exists(f"{HERE}/{node.module}.py"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), node.module
