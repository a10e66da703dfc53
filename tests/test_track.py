"""--track: the numbers of metrics.jsonl, sent to the real packages where they are installed."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

import opsd
import run
from run import HERE
from tests.helpers import SMALL, metrics


def test_track_sends_the_numbers_of_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    out = str(tmp_path / "run")
    flags = f"--filter all --steps 2 --track trackio --out {out}".split()
    command = [sys.executable, os.path.join(HERE, "opsd.py"), *SMALL, *flags]
    subprocess.run(command, check=True, capture_output=True)
    expected = [row["reverse_kl"] for row in metrics(out)[1:3]]
    with sqlite3.connect(tmp_path / "trackio" / "opsd.db") as database:
        rows = database.execute("select metrics from metrics order by step").fetchall()
    rows = [json.loads(row) for (row,) in rows]
    sent = [row["reverse_kl"] for row in rows if "reverse_kl" in row]
    assert any("after/all/accuracy" in row for row in rows)
    assert sent == pytest.approx(expected, rel=1e-6)


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        opsd.main(["--track", "wandb", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert error == "error: --track wandb: not installed (pip install wandb)\n"
