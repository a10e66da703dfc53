"""Runs: resuming, damage, bad input. One line, exit code 2, nothing left behind."""

import fcntl
import glob
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import opsd
import rlvr
import run
import sft
from data import embedded_problems
from metrics import kl_share, settled
from model import load_model, save_model
from run import HERE, Run, check_run_directory, fail, find_states, provenance
from tests.helpers import (
    CPU,
    SMALL,
    STAGES,
    TINY,
    WATCHED,
    Crash,
    changed_model,
    crash_at,
    lines_without_times,
    metrics,
    read_lines,
    weights,
    write,
)

BARE = [*SMALL, *"--filter all --eval-problems 0".split()]


def names_in(path):
    return sorted(os.listdir(path))


def steps_in(path):
    return [row["step"] for row in metrics(path)[1:]]


LORA = ["--lora", "4", *"--filter all --context reflection --context-tokens 100".split()]


@pytest.mark.parametrize("script, argv", [*STAGES, (opsd, [*WATCHED, *LORA])])
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    script, argv, tmp_path, monkeypatch, capsys, refused
):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    # In bfloat16 the sampler has a copy of the weights, which must follow.
    argv = argv + "--steps 6 --state-every 2 --save-every 4 --lr 1e-3 --dtype bfloat16".split()
    crash_at(monkeypatch, 5)
    with pytest.raises(Crash):
        script.main(argv + ["--out", cut])
    assert find_states(cut) == ["state-0000004.pt", "state-0000002.pt"]
    assert steps_in(cut)[-1] == 5  # a state is saved when its step is in the log
    with open(os.path.join(cut, "metrics.jsonl"), "a") as stream:
        stream.write('{"step": 5, "lo')  # a line that the crash cut, ...
    write(tmp_path / "cut" / "mine.jsonl", "{}")  # a file of the user's own
    for name in (".saving-metrics.jsonl", ".saving-state", ".saving-config.json"):
        write(tmp_path / "cut" / name, "half")  # ... and files that it left half-written
    monkeypatch.undo()
    adapters = [".lora_" in name for name in run.load_state(cut)["model"]]
    assert all(adapters) if "--lora" in argv else not any(adapters)
    fewer = [*argv[: argv.index("--steps")], *"--steps 3 --resume --out".split(), cut]
    assert "has done 4 steps" in refused(script.main, fewer) or script is sft
    script.main(argv + ["--out", cut, "--resume"])
    assert (tmp_path / "cut" / "mine.jsonl").read_text() == "{}\n"
    os.remove(tmp_path / "cut" / "mine.jsonl")
    assert "resumed after step 4" in capsys.readouterr().out
    script.main(argv + ["--out", whole])
    assert torch.equal(weights(cut), weights(whole))
    assert lines_without_times(cut) == lines_without_times(whole)
    assert names_in(cut) == names_in(whole)
    assert [name for name in names_in(whole) if "step" in name] == ["step-4"]
    evaluated = [row["step"] for row in metrics(whole) if "evaluation" in row]
    assert evaluated == ([] if script is sft else [2, 4, 6])
    assert find_states(cut) == ["state-0000006.pt"]  # to go on from, with more --steps
    assert not any(name.startswith(".saving") for name in names_in(cut))
    assert "has done 6 steps; with" in refused(script.main, argv + ["--out", cut, "--resume"])


def test_how_far_the_kl_has_fallen_is_logged_and_said(tmp_path, capsys):
    out = str(tmp_path / "run")
    opsd.main([*BARE, "--steps", "5", "--state-every", "5", "--out", out])
    assert "of the first steps'" not in capsys.readouterr().out  # six updates tell
    opsd.main([*BARE, "--steps", "7", "--state-every", "5", "--out", out, "--resume"])
    *_, sixth, last = steps = [row for row in metrics(out) if "loss" in row]
    kls = [row["reverse_kl"] for row in steps]
    assert sixth["kl_share"] == pytest.approx(sum(kls[3:6]) / sum(kls[:3]))
    assert last["kl_share"] == pytest.approx(sum(kls[4:]) / sum(kls[:3]))
    said = f"reverse KL {100 * last['kl_share']:.0f}% of the first steps': not settled"
    assert last["kl_share"] > 0.05 and said in capsys.readouterr().out
    text = "reverse KL 4% of the first steps': settled ("
    assert settled([2.0, 4.0, 6.0, 1.0, 0.3, 0.2, 0.01]).startswith(text)
    assert "not settled" in settled([2.0, 4.0, 6.0, 1.0, 0.3, 0.2, 0.2])
    assert kl_share([0.0] * 9) is None  # a teacher that reads nothing more


def test_resume_skips_damaged_states_and_refuses_another_experiment(
    tmp_path, monkeypatch, capsys, refused
):
    out = str(tmp_path / "run")
    argv = [*BARE, *"--steps 6 --state-every 2 --out".split(), out]
    crash_at(monkeypatch, 5)
    with pytest.raises(Crash):
        opsd.main(argv)
    monkeypatch.undo()
    # Before a model is loaded.
    monkeypatch.setattr(opsd, "load_model", lambda *args: pytest.fail("a model was loaded"))
    others = (
        ("--lr 1e-5", "--lr 0.0001 then, 1e-05 now"),
        ("--filter correct", "--filter all then, correct now"),
        ("--seed 1", "--seed 0 then, 1 now"),
    )
    for other, complaint in others:
        assert complaint in refused(opsd.main, [*argv, *other.split(), "--resume"])
    monkeypatch.undo()
    newer, older = (Path(out, name) for name in find_states(out))
    content = newer.read_bytes()
    flags = ["--resume", "--model", os.path.relpath(TINY)]
    args = opsd.parse_args([*argv, *flags, *"--backend transformers --dtype float32".split()])
    model, problems = load_model(TINY, CPU)[0], embedded_problems(6 * 6, 0)
    optimizer, identity = torch.optim.AdamW(model.parameters()), run.fingerprint(problems, model)
    flipped = content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]
    for damaged in (b"", content[: len(content) // 2], flipped):
        newer.write_bytes(damaged)
        state = check_run_directory(args)
        assert state["step"] == 2
        with Run(args, "x", identity, state) as going:
            assert going.resume(model, optimizer) == 2
        assert f"{newer} is damaged" in capsys.readouterr().out
    older.unlink()
    complaint = refused(opsd.main, [*argv, "--resume", "--lr", "1e-5"])  # no whole state is left
    assert "--lr 0.0001 then, 1e-05 now" in complaint
    opsd.main([*argv, "--resume", "--threads", "1", "--out", os.path.join(out, "")])
    assert "resumed after step 0 (no whole state)" in capsys.readouterr().out
    assert steps_in(out) == [1, 2, 3, 4, 5, 6]


def test_resuming_goes_by_what_models_and_problems_are_not_by_their_names(
    tmp_path, monkeypatch, capsys, refused
):
    model, file = tmp_path / "m", tmp_path / "d.jsonl"
    shutil.copytree(TINY, model)
    rows = [json.dumps(dict(question=f"{i}+1?", answer=i + 1, solution=f"{i}")) for i in range(20)]
    write(file, *rows)
    argv = [*BARE, *"--state-every 1 --out".split(), str(tmp_path / "run")]
    opsd.main([*argv, "--steps", "1", "--model", str(model), "--data", str(file)])
    monkeypatch.chdir(tmp_path)
    same = ["--resume", "--model", "./m/", "--data", "d.jsonl"]
    opsd.main([*argv, "--steps", "2", *same])
    assert "resumed after step 1" in capsys.readouterr().out
    again = [*argv, "--steps", "3", *same]
    write(file, *rows[:-1], rows[-1].replace('"solution": "19"', '"solution": "no"'))
    says = "on other problems or began with another model"
    assert says in refused(opsd.main, again)
    write(file, *rows)
    student, tokenizer = load_model("m", CPU)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.01)  # another teacher under the same name
    save_model("m", student, tokenizer)
    assert says in refused(opsd.main, again)


def test_two_runs_do_not_write_into_one_directory(tmp_path, refused):
    out = tmp_path / "run"
    argv = [*BARE, "--out", str(out)]
    opsd.main([*argv, "--steps", "1"])
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    for how in ("--resume", "--overwrite"):
        error = refused(opsd.main, [*argv, "--steps", "2", how])
        assert "another run is writing there" in error
    os.close(other)
    assert (out / "model.safetensors").exists()
    opsd.main([*argv, "--steps", "2", "--resume"])
    state = torch.load(out / "state-0000002.pt")
    torch.save({key: state[key] for key in state if key != "logs"}, out / "state-0000002.pt")
    error = refused(opsd.main, [*argv, "--steps", "3", "--resume"])
    assert "is of an older edition" in error


def test_a_run_that_died_before_its_first_line_was_whole_begins_anew(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    write(out / "metrics.jsonl", '{"script": "op')
    opsd.main([*BARE, "--steps", "1", "--resume", "--out", str(out)])
    assert metrics(out)[0]["args"]["filter"] == "all" and steps_in(out) == [1]


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_state_whole(
    tmp_path, monkeypatch, refused
):
    out, own, calls = str(tmp_path / "run"), torch.save, []

    def full(state, stream):
        calls.append(stream)
        if len(calls) == 2:
            stream.write(b"half")
            raise OSError(28, "No space left on device")
        own(state, stream)

    monkeypatch.setattr(torch, "save", full)
    argv = [*BARE, *"--steps 3 --state-every 1 --out".split(), out]
    assert "No space left" in refused(opsd.main, argv)
    assert find_states(out) == ["state-0000001.pt"] and ".saving" not in str(names_in(out))


@pytest.mark.parametrize("script, argv", STAGES)
def test_a_gradient_that_is_not_finite_is_skipped_and_ends_the_run_after_some(
    script, argv, tmp_path, monkeypatch, refused
):
    out, own, steps = str(tmp_path / "run"), torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, clip):
        parameters = list(parameters)
        steps.append(0)
        if len(steps) != 2:
            parameters[0].grad[0, 0] = math.nan
        return own(parameters, clip)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    monkeypatch.setattr(run, "GIVE_UP", 3)
    error = refused(script.main, argv + ["--steps", "9", "--out", out])
    assert len(steps) == 5 and "not_finite.jsonl" in error and "3 steps in a row" in error
    rows = read_lines(os.path.join(out, "not_finite.jsonl"))
    assert [row["step"] for row in rows] == [1, 3, 4, 5] and rows[0]["rows"][0]["response_ids"]
    assert not os.path.exists(os.path.join(out, "model.safetensors"))


@pytest.mark.parametrize(
    "into, code, said",
    [
        (" | head -n 1; exit ${PIPESTATUS[0]}", 1, ""),
        (" > /dev/full", 2, "error: standard output: No space left on device\n"),
    ],
)
def test_an_output_that_takes_no_more_is_no_traceback(into, code, said, tmp_path):
    command = [sys.executable, os.path.join(HERE, "opsd.py"), *BARE, "--steps", "3"]
    shell = ["bash", "-c", shlex.join([*command, "--out", str(tmp_path / "run")]) + into]
    environment = dict(os.environ, PYTHONIOENCODING="latin-1")
    done = subprocess.run(shell, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (code, said) and done.stdout.count("\n") == 2 - code


SCRIPTS = [path for f in ("", "tools/") for path in glob.glob(f"{f}*.py", root_dir=HERE)]
SCRIPTS = [p for p in SCRIPTS if "    start(main)\n" in Path(HERE, p).read_text()]


def test_ctrl_c_while_a_script_imports_torch_is_one_line(tmp_path):
    """The second import of what the first one, interrupted, left fails with another error."""
    interrupted = "import os; os.kill(os.getpid(), 2)\nfor _ in range(10**6): pass\n"
    for name in ("torch", "numpy"):
        write(tmp_path / f"{name}.py", f"try: exec({interrupted!r})", "finally: raise ImportError")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    assert len(SCRIPTS) >= 8
    for path in SCRIPTS:
        module = path.removesuffix(".py").replace("/", ".")
        command = [sys.executable, "-m", module]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
        assert (done.returncode, done.stderr) == (130, "\ninterrupted\n"), path


def test_a_card_has_the_command_and_the_table(tmp_path, monkeypatch, capsys):
    argv = [*"--steps 2 --filter all --out".split(), str(tmp_path / "run"), *SMALL]
    monkeypatch.setattr(sys, "argv", ["opsd.py", *argv])
    opsd.main(argv)
    card, printed = (tmp_path / "run" / "README.md").read_text(), capsys.readouterr().out
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card
    assert f"`python opsd.py {' '.join(argv)}`" in card
    table = card.split("```")[1].strip()
    assert table in printed and table.count("\n") >= 5
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert provenance()["commit"] is None


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, monkeypatch, refused):
    out = tmp_path / "run"
    for name in ("step-1", "adapter"):
        (out / name).mkdir(parents=True)
    for name in ("train.jsonl", "notes.txt", "model.safetensors"):  # somebody's own model
        write(out / name, "x")
    argv = [*BARE, "--overwrite", "--out", str(out)]
    assert "not the directory of a run" in refused(opsd.main, argv) and len(names_in(out)) == 5
    for name in ("metrics.jsonl", "kl_by_position.jsonl"):
        write(out / name, "{}")
    error = refused(opsd.main, [*argv, "--model", os.path.join(out, "")])
    assert "is --model as well" in error and len(names_in(out)) == 7
    monkeypatch.setattr(opsd, "accumulate_gradients", lambda *args: fail("stop"))
    refused(opsd.main, argv)
    # No model of another run beside this one's log.
    assert names_in(out) == ["metrics.jsonl", "notes.txt", "samples.jsonl", "train.jsonl"]


def test_a_tokenizer_without_eos_or_pad_trains_and_one_without_thinking_is_told(tmp_path, refused):
    # The generation config still names the eos.
    path = changed_model(tmp_path / "model", eos_token=None, pad_token=None)
    tokenizer = load_model(path, CPU)[1]
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id is None
    rows = [json.dumps(vars(problem)) for problem in embedded_problems(6, 3)]
    argv = ["--model", path, "--data", write(tmp_path / "d.jsonl", *rows), "--steps", "1"]
    sft.main([*argv, *"--batch 2 --threads 1 --out".split(), str(tmp_path / "sft")])
    opsd.main([*argv, "--filter", "all", *SMALL, "--out", str(tmp_path / "opsd")])
    assert metrics(tmp_path / "opsd")[1]["loss_tokens"] > 0
    write(tmp_path / "model" / "chat_template.jinja", "{{ messages[0].content }}")
    argv = ["--model", path, "--out", str(tmp_path / "out")]
    for script, flag in (
        (opsd, "--thinking"),
        (opsd, "--teacher-thinking"),
        (rlvr, "--thinking"),
        (evaluation, "--thinking"),
    ):
        error = refused(script.main, [*argv, flag, "off"])
        assert f"{flag} off: this model's chat template has no enable_thinking switch" in error
    flags = "--thinking on --problems 2 --samples 1 --max-new-tokens 8 --threads 1".split()
    evaluation.main([*argv, *flags])


def test_a_finished_run_goes_on_with_more_steps_and_the_same_problems(
    tmp_path, monkeypatch, refused
):
    finished = "steps; with its state and more it goes on"
    for script, flags in ((opsd, "--filter all"), (rlvr, "--group 4 --batch 2")):
        out = str(tmp_path / script.__name__)
        evaluated = "--eval-problems 2 --eval-every 2 --out".split()
        argv = [*SMALL, *flags.split(), *evaluated, out, "--steps"]
        script.main([*argv, "2"])
        assert finished in refused(script.main, [*argv, "2", "--resume"])
        script.main([*argv, "3", "--resume"])
        crash_at(monkeypatch, 5)
        with pytest.raises(Crash):
            script.main([*argv, "5", "--resume"])
        monkeypatch.undo()
        with open(os.path.join(out, "metrics.jsonl"), "a") as stream:
            stream.write('{"step": 5, "lo')
        script.main([*argv, "4", "--resume"])  # those of the first 2 steps still
        assert steps_in(out) == [1, 2, 2, 3, 3, 4, 4]  # no evaluation is lost
        for name in find_states(out):
            os.remove(os.path.join(out, name))
        assert finished in refused(script.main, [*argv, "5", "--resume"])
        os.rename(f"{out}/model.safetensors", f"{out}/model.safetensors.index.json")  # in shards
        assert finished in refused(script.main, [*argv, "5", "--resume"])
    argv = ["--batch", "2", "--threads", "1", "--out", str(tmp_path / "sft"), "--steps"]
    sft.main([*argv, "2"])
    assert "--steps 2 then, 3 now" in refused(sft.main, [*argv, "3", "--resume"])


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path):
    out = str(tmp_path / "run")
    command = [sys.executable, os.path.join(HERE, "opsd.py"), *SMALL, "--eval-problems", "0"]
    command += "--filter all --steps 1000 --state-every 1 --out".split() + [out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == f"interrupted; --out {out} --resume goes on"


@pytest.mark.parametrize("after", range(5))
def test_ctrl_c_while_a_state_is_written_is_no_write_error(after, tmp_path):
    """torch.save may raise a RuntimeError of its own when its stream was interrupted."""
    writes = []

    class Interrupted(io.BytesIO):
        def write(self, data):
            writes.append(data)
            if len(writes) == after + 1:
                raise KeyboardInterrupt
            return super().write(data)

    def save(target):
        with open(target, "wb"):
            torch.save([torch.zeros(9)], Interrupted())

    with pytest.raises(KeyboardInterrupt):
        run.write_whole(str(tmp_path / "state"), save)
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_before_its_first_step_leaves_no_numbered_directory(
    tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opsd, "accumulate_gradients", lambda *args: fail("stop"))
    monkeypatch.setattr(opsd.rollout, "show_prompts", lambda *args: None)
    refused(opsd.main, BARE)
    assert names_in(tmp_path / "runs") == []


def test_a_rate_that_is_too_high_is_named(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(run, "GIVE_UP", 2)
    argv = [*BARE, *"--lr 1e30 --steps 9 --out".split(), str(tmp_path / "run")]
    assert "is --lr too high?" in refused(opsd.main, argv)


def test_a_run_that_learns_no_more_says_how_its_model_is_saved(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(run, "GIVE_UP", 2)
    kept = iter([4, 4, 4, 0, 0])
    monkeypatch.setitem(opsd.FILTERS, "all", lambda rollouts, args: rollouts[: next(kept)])
    argv = [*SMALL, *"--filter all --state-every 2 --out".split(), str(tmp_path), "--overwrite"]
    write(tmp_path / "metrics.jsonl", "{}")
    said = refused(opsd.main, [*argv, "--steps", "9"])
    assert said.endswith("; --resume --steps 4 saves that model\n")
    opsd.main([*argv[:-1], "--resume", "--steps", "4"])
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_that_dies_in_its_last_evaluation_is_completed(tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    argv = [*SMALL, "--filter", "all", "--steps", "2", "--out", out]

    monkeypatch.setattr(opsd, "save_model", lambda path, *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opsd.main(argv)  # the evaluation is logged, the model is not saved
    assert ["evaluation" in row for row in metrics(out)[1:]] == [False, False, True]
    monkeypatch.undo()
    opsd.main([*argv, "--resume"])
    assert ["evaluation" in row for row in metrics(out)[1:]] == [False, False, True]
    assert os.path.exists(os.path.join(out, "model.safetensors"))
