"""Several ranks, computation dtype, checkpointing. The fixture `pair` starts this file as a script
under torchrun, on two ranks.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress

import pytest
import torch

import eval as evaluation
import model as modelling
import opsd
import ranks
import rlvr
import rollout
import run
import sft
from data import embedded_problems
from model import load_model, response_hidden
from run import HERE
from samplers import make_sampler
from tests.helpers import (
    CPU,
    TINY,
    Crash,
    apart,
    crash_at,
    lines_without_times,
    loss_and_gradient,
    make_tied,
    metrics,
    read_rollouts,
    some_rollouts,
    torchrun,
    weights,
    without_times,
)
from tools import read_json

BARE = "--threads 1 --device cpu --steps 2 --overwrite".split()
SHORT = [*BARE, "--eval-problems", "3"]
GREEDY = SHORT + "--filter all --temperature 0 --max-new-tokens 100 --batch 5 --lr 1e-3".split()
WRITTEN = "--context reflection --context-tokens 100"
GROUPS = "--temperature 0 --batch 3 --group 4 --kl 0.1"
RANKS = {
    # Other numbers of micro-batches on the two ranks.
    "opsd": (opsd, GREEDY + "--teacher ema --micro-tokens 300".split()),
    # Nothing to sample, write or score for one of them.
    "lone": (opsd, GREEDY + "--batch 1 --context reflection --context-tokens 200".split()),
    "tied": (opsd, GREEDY + "--model TIED --teacher current --max-new-tokens 20".split()),
    "rlvr": (rlvr, SHORT + f"{GROUPS} --micro-tokens 500 --lr 1e-3".split()),
    "sft": (sft, BARE + "--batch 5 --micro-tokens 300".split()),
    "lora": (opsd, GREEDY + f"{WRITTEN} --lora 4 --micro-tokens 300 --max-new-tokens 60".split()),
    "lora-tied": (
        opsd,
        GREEDY + "--model TIED --lora 4 --checkpointing --max-new-tokens 20".split(),
    ),
    "lora-rlvr": (rlvr, SHORT + f"{GROUPS} --lora 4 --lr 1e-3".split()),
    "lora-sft": (sft, BARE + f"--batch 5 --model {TINY} --lora 4 --warmup 1".split()),
}
LEAN = {
    "opsd": ["--checkpointing", "--offload"],
    "tied": ["--offload"],
    "rlvr": ["--checkpointing"],
}
LOW = GREEDY + "--dtype bfloat16 --lr 1e-6 --eval-problems 0".split()
UNDISTURBED = GREEDY + "--temperature 1 --teacher ema --steps 5 --state-every 2".split()
RESUMED = [flag for flag in UNDISTURBED if flag != "--overwrite"] + ["--resume"]
EVALUATION = "--problems 5 --samples 1 --temperature 0".split()


def filled(argv, folder):
    return [os.path.join(folder, "tied") if flag == "TIED" else flag for flag in argv]


def given_rollouts(monkeypatch):
    """rlvr.py's training rollouts are reference traces of different lengths, right and wrong in
    turns, on any number of ranks. Its evaluations sample.
    """

    def make(sampler, tokenizer, problems, args, seed, contexts=None, logps=False):
        rollouts = some_rollouts(tokenizer, len(problems), seed)
        for i, r in enumerate(rollouts):
            r.response_ids = r.response_ids[: 20 + 9 * i]
            r.outcome = "correct" if i % 3 else "incorrect"
        return rollouts

    own = dict(vars(rollout), make_rollouts=make, grade_rollouts=lambda *args: None)
    monkeypatch.setattr(rlvr, "rollout", types.SimpleNamespace(**own))


def two_ranks(folder):
    """What each rank does. The runs go to `folder`, what a rank saw to seen-RANK.json there."""
    seen = {}
    monkeypatch = pytest.MonkeyPatch()
    given_rollouts(monkeypatch)
    monkeypatch.setattr(ranks, "leave", lambda: None)  # several scripts in one process
    own, shared = modelling.my_micro_batches, []

    def noted(*args):
        shared.append(own(*args))
        return shared[-1]

    monkeypatch.setattr(opsd, "my_micro_batches", noted)
    for name, (script, argv) in RANKS.items():
        script.main(filled(argv, folder) + ["--out", os.path.join(folder, "two-" + name)])
        seen[name] = [[counts for _, counts in groups] for groups in shared]
        shared.clear()
        if name in LEAN:
            lean = ["--out", os.path.join(folder, "lean-" + name)]
            script.main(filled(argv, folder) + LEAN[name] + lean)
            shared.clear()
    opsd.main(LOW + ["--out", os.path.join(folder, "two-low")])
    argv = ["--threads", "1", "--device", "cpu", *EVALUATION]
    argv += ["--model", TINY, os.path.join(folder, "two-opsd")]
    evaluation.main(argv + ["--out", os.path.join(folder, "two.json")])

    # A run that breaks off before the state of its fourth step is saved, resumed; and one that is
    # not disturbed.
    cut = os.path.join(folder, "cut")
    with monkeypatch.context() as patch:
        crash_at(patch, 4)
        with suppress(Crash):
            opsd.main(UNDISTURBED + ["--out", cut])
    torch.distributed.barrier()
    if ranks.rank_and_world()[0] == 0:
        shutil.copytree(cut, os.path.join(folder, "cut-one"))  # to be resumed by one rank
    opsd.main(RESUMED + ["--out", cut])
    opsd.main(UNDISTURBED + ["--out", os.path.join(folder, "whole")])

    # Responses of a rank's own; equal prompts in bfloat16; a gradient that is not finite on one.
    args = opsd.parse_args(["--dtype", "bfloat16", "--device", "cpu"])
    model, tokenizer = load_model(TINY, CPU)
    sampler = make_sampler(model, tokenizer, args)
    problems = embedded_problems(1, 0) * 8
    rollouts = rollout.make_rollouts(sampler, tokenizer, problems, args, 0)
    seen["responses"] = [r.response_ids for r in rollouts]
    others = [[s for s in rollouts if s is not r] for r in rollouts]
    seen["siblings"] = all(r.siblings == o for r, o in zip(rollouts, others, strict=True))
    teacher = opsd.frozen_copy(model)
    ranks.prepare(model, args, CPU)
    ranks.prepare(teacher, args, CPU, low=True)
    given = read_rollouts(tokenizer, "none")
    loss = opsd.accumulate_gradients(model, teacher, given, args)
    seen["equal"] = [loss, max(ranks.full(p.grad).abs().max().item() for p in model.parameters())]
    before = [p.to_local().clone() for p in model.parameters()]
    if ranks.rank_and_world()[0] == 1:
        next(model.parameters()).grad.to_local()[0, 0] = math.nan
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    norm, updated = modelling.optimizer_step(model, optimizer)
    same = all(map(torch.equal, before, [p.to_local() for p in model.parameters()]))
    seen["skipped"] = [math.isnan(norm), updated, same]
    with open(os.path.join(folder, f"seen-{ranks.rank_and_world()[0]}.json"), "w") as stream:
        json.dump(seen, stream)


def start_ranks(command):
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=HERE, env=dict(os.environ, OMP_NUM_THREADS="1"), **pipe)


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """(the folder in which two ranks left their runs, what each of them saw); beside them the same
    runs of one rank, named one-...
    """
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tied(tokenizer, folder / "tied")
        process = start_ranks(torchrun("-m", "tests.test_ranks", str(folder)))
        try:
            said = process.communicate(timeout=1200)[0]
        finally:
            process.terminate()  # a hang: torchrun ends its ranks
        assert process.returncode == 0, said[-3000:]
        given_rollouts(monkeypatch)
        for name, (script, argv) in RANKS.items():
            script.main(filled(argv, folder) + ["--out", str(folder / f"one-{name}")])
    return folder, [read_json(str(folder / f"seen-{rank}.json")) for rank in (0, 1)]


def differing(a, b):
    """The keys of two lines of a log whose values are not close, times and memory aside."""
    a, b = without_times(a), without_times(b)
    near = {key: pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a if type(a[key]) is float}
    return [key for key in a if a[key] != near.get(key, b[key])]


@pytest.mark.parametrize("name", list(RANKS))
def test_two_ranks_train_as_one(name, pair):
    folder, seen = pair
    one, two = metrics(folder / f"one-{name}"), metrics(folder / f"two-{name}")
    assert two[0]["ranks"] == 2 and one[0]["ranks"] == 1
    steps = [row for row in two if "loss" in row]
    assert len(steps) == 2
    assert all(row["loss_tokens"] > 0 and row["grad_norm"] > 1e-3 for row in steps)
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.keys() == b.keys()
        # A sharded model samples from a copy, and the gap says that it is one.
        assert differing(a, b) in ([], ["logprob_gap"])
        assert b.get("logprob_gap") is None or b["logprob_gap"] < 1e-4
    if not one[0]["args"]["model"]:
        start = torch.cat([p.detach().flatten() for p in sft.build_tiny(0)[0].parameters()])
    else:
        start = weights(one[0]["args"]["model"])
    folders = folder / f"one-{name}", folder / f"two-{name}"
    moved = weights(folders[0]) - start
    assert moved.norm() > 0 and apart(weights(folders[1]) - start, moved) < 1e-3
    assert len({tuple(sorted(os.listdir(path))) for path in folders}) == 1
    assert len({os.path.getsize(path / "model.safetensors") for path in folders}) == 1
    if name in LEAN:  # memory is saved, and nothing else changes
        lean = weights(folder / f"lean-{name}") - start
        assert apart(lean, weights(folders[1]) - start) < 1e-3
    if name == "opsd":  # step 1: three micro-batches here and two there, and one for show
        counted = [s[name][0].count(True) for s in seen]
        assert sorted(counted) == [2, 3] and False in seen[1][name][0]
    if name == "lone":
        assert seen[0][name][0] == [True] and seen[1][name][0] == [False]


def test_two_ranks_draw_their_own_and_agree_on_everything_else(pair):
    _, seen = pair
    assert seen[0]["responses"] == seen[1]["responses"]
    # Shared out in turns.
    assert seen[0]["responses"][0::2] != seen[0]["responses"][1::2]
    # Responses to one problem know each other across ranks.
    assert [s["siblings"] for s in seen] == [True, True]
    # One rank's gradient was not finite: neither steps.
    assert [s["skipped"] for s in seen] == [[True, False, True]] * 2
    # Equal prompts: teacher and student compute the very same.
    assert [s["equal"] for s in seen] == [[0.0, 0.0]] * 2


def test_two_ranks_resume_as_if_undisturbed_and_one_goes_on_with_their_state(pair, capsys):
    folder, _ = pair
    assert torch.equal(weights(folder / "cut"), weights(folder / "whole"))
    assert lines_without_times(folder / "cut") == lines_without_times(folder / "whole")
    assert metrics(folder / "cut")[-2]["step"] == 5
    args = metrics(folder / "cut-one")[0]["args"]
    assert run.find_states(folder / "cut-one") == ["state-0000002.pt"]
    os.rename(folder / "cut", folder / "cut-two")
    os.rename(folder / "cut-one", folder / "cut")
    opsd.main(RESUMED + ["--out", args["out"]])
    assert "resumed after step 2" in capsys.readouterr().out
    assert [row["step"] for row in metrics(folder / "cut")[1:]] == [1, 2, 3, 4, 5, 5]
    assert metrics(folder / "cut")[2] == metrics(folder / "cut-two")[2]


def test_two_ranks_evaluate_as_one(pair):
    folder, _ = pair
    argv = ["--threads", "1", *EVALUATION, "--model", TINY, str(folder / "two-opsd")]
    evaluation.main(argv + ["--out", str(folder / "one.json")])
    one, two = (read_json(str(folder / f"{count}.json")) for count in ("one", "two"))
    assert one["records"] == two["records"] and one["responses"] == two["responses"]


def test_bfloat16_computes_low_and_keeps_what_a_small_step_adds(pair, tmp_path):
    folder, _ = pair
    opsd.main(LOW + ["--out", str(tmp_path / "one")])
    start, reference = weights(TINY), metrics(folder / "one-opsd")[1]["loss"]
    for out in (tmp_path / "one", folder / "two-low"):
        assert load_model(str(out), CPU)[0].dtype == torch.float32
        assert (weights(out) != start).float().mean() > 0.85  # float32 masters keep steps of 1e-6
        loss = metrics(out)[1]["loss"]
        assert loss != reference and loss == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_computes_twice_and_changes_nothing(dtype, model, tokenizer):
    rollouts, results, counts = read_rollouts(tokenizer), [], []
    rows = [r.row for r in rollouts]
    for flags in ([], ["--checkpointing"]):
        student = opsd.frozen_copy(model).requires_grad_(True)
        args, calls = opsd.parse_args(["--dtype", dtype, *flags]), []
        ranks.prepare(student, args, CPU)
        mlp = student.base_model.layers[0].mlp
        hook = mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss, gradient = loss_and_gradient(student, opsd.frozen_copy(model), rollouts)
        counts.append(len(calls))
        hook.remove()
        sampler = make_sampler(student, tokenizer, args)
        samples = sampler.sample([r.prompt_ids for r in rollouts], 40, temperature=0)
        results.append((loss, gradient.tolist(), samples))
        # A copy computes with its own weights, not with those that it was copied from.
        twin = opsd.frozen_copy(student)
        with torch.no_grad():
            before = response_hidden(twin, rows)
            mlp.down_proj.weight.zero_()
            assert torch.equal(before, response_hidden(twin, rows))
            assert not torch.equal(before, response_hidden(student, rows))
    assert results[0] == results[1] and counts == [1, 2]


def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path):
    out = str(tmp_path / "run")
    flags = "--threads 1 --device cpu --filter all --batch 4 --eval-problems 0".split()
    flags += "--max-new-tokens 40 --steps 12 --state-every 1".split()
    command = torchrun(os.path.join(HERE, "opsd.py"), *flags, "--out", out)
    process = start_ranks(command)
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline:
        if os.path.isdir(out) and run.find_states(out):
            break
        time.sleep(0.05)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as stream:
        workers = stream.read().split()
    assert len(workers) == 2 and process.poll() is None
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.time()
    said = process.communicate(timeout=60)[0]
    assert time.time() - killed < 60 and process.returncode != 0
    assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", said) and "SIGKILL" in said
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    newest = run.find_states(out)[0]
    resumed = start_ranks(command + ["--resume"])
    assert f"resumed after step {int(newest[6:13])}" in resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0 and run.find_states(out) == ["state-0000012.pt"]
    assert [row["step"] for row in metrics(out)[1:]] == list(range(1, 13))
    assert weights(out).isfinite().all()


if __name__ == "__main__":  # a rank, started by the fixture `pair`
    two_ranks(sys.argv[1])
