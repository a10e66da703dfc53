"""docs/forking.md: every diff applies to a copy and trains, and so does the file without a fork.

Here, not among the product's tests: a fork's own entry may stand where a diff goes.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from run import HERE

with open(os.path.join(HERE, "docs", "forking.md")) as stream:
    PAGE = stream.read()
FORKS = re.findall(r"```diff\n(.*?\n)```\n\n    python (\w+\.py [^\n]+)", PAGE, re.DOTALL)
SHORT = "--threads 1 --batch 16 --max-new-tokens 90".split()
PLACES = (2, 1, 2, 4)


def trains(folder, command):
    command = [sys.executable, *shlex.split(command), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "step 2/2  loss" in done.stdout


def test_the_page_has_the_forks_that_it_promises():
    assert len(FORKS) == len(PLACES)


@pytest.mark.parametrize("fork", range(len(PLACES)))
def test_forks_apply_and_train(fork, tmp_path):
    diff, command = FORKS[fork]
    assert diff.count("\n@@") <= PLACES[fork] and diff.count("\n+++ ") == 1
    for path in glob.glob("*.py", root_dir=HERE):
        shutil.copy(os.path.join(HERE, path), tmp_path)
    shutil.copytree(os.path.join(HERE, "tiny"), tmp_path / "tiny")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    trains(tmp_path, command)


def test_a_gate_from_outside_trains(tmp_path, monkeypatch):
    code, command = re.search(
        r"```python\n(.*?)```\n\n    python (\S+ [^\n]+)", PAGE, re.S
    ).groups()
    assert len([line for line in code.split("\n") if line.strip()]) <= 10
    (tmp_path / command.split()[0]).write_text(code)
    monkeypatch.setenv("PYTHONPATH", HERE)
    trains(tmp_path, command)
