"""Tools: figures of a run's own logs, memory, the bench."""

import gc
import json
import os
import re

import numpy as np
import pytest
import torch

import metrics
import model as modelling
import opsd
from tests.helpers import CPU, graded, write
from tools import bench, memory, plot

# ------------------------------------------------------------------------------------------------
# Figures


def test_figures_from_the_runs_own_files(tmp_path, refused):
    files = []
    for seed in (1, 2):
        rows = [dict(args=dict(out=f"runs/correct-{seed}", seed=seed))]
        for step in (20, 40) if seed == 1 else (10, 20, 40):
            pair = [
                ("before", graded(["correct"] * 3 + ["incorrect"], 100)),
                ("after", graded(["correct"] * 4, 80 - seed - step)),
            ]
            rows.append(dict(step=step, evaluation=metrics.compare(pair)))
        files.append(write(tmp_path / f"{seed}.jsonl", *map(json.dumps, rows)))
    bare = write(tmp_path / "bare.jsonl", json.dumps(rows[0]))  # no evaluation: left out
    for figure in ("path", "trajectory"):
        plot.main([figure, bare, *files, "--out", str(tmp_path / figure)])
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
        assert (tmp_path / f"{figure}.svg").exists()
    # Runs that differ in their own seed are seeds of one thing.
    curves = plot.curves_of(files)
    assert list(curves) == ["correct"] and len(curves["correct"]) == 2
    assert curves["correct"][0][:, :2].tolist() == [[0, 0], [20, 25], [40, 25]]
    with plot.figure(tmp_path / "mean") as axes:  # of seeds at the same step
        assert plot.draw_runs(axes, files, 0, 1)["correct"][:, 0].tolist() == [0, 20, 40]
    none = write(tmp_path / "none.jsonl", "{}")
    refusals = {bare: "no run with an evaluation", none: "no files", none + "x": "No such file"}
    for file, says in refusals.items():
        assert says in refused(plot.main, ["path", file, "--out", str(tmp_path / "x")])


def test_position_leaves_out_where_few_rollouts_are_left(tmp_path, monkeypatch, refused):
    bins = dict(kl=[8.0, 60.0, 90.0], tokens=[80, 60, 9], rollouts=[10, 10, 9])
    outcomes = dict.fromkeys(plot.COLOURS, bins)
    write(tmp_path / "kl.jsonl", json.dumps(dict(step=1, bin=8, **outcomes)))
    with plot.figure(os.devnull) as axes:
        monkeypatch.setattr(axes.figure, "savefig", lambda *args, **kwargs: None)
        plot.position(axes, [str(tmp_path / "kl.jsonl")])
        line, counts = axes.get_lines()[0], axes.child_axes[0].get_lines()[0]
        np.testing.assert_allclose(line.get_ydata(), [0.1, 1.0, np.nan])
        assert list(line.get_xdata()) == [4, 12, 20] and list(counts.get_ydata()) == [10, 10, 9]
    bins["rollouts"] = [9, 9, 9]
    write(tmp_path / "few.jsonl", json.dumps(dict(step=1, bin=8, **outcomes)))
    argv = ["position", str(tmp_path / "few.jsonl"), "--out", str(tmp_path / "f")]
    assert "no position with 10 rollouts" in refused(plot.main, argv)
    write(tmp_path / "few.jsonl", *(json.dumps(dict(bin=bin, **outcomes)) for bin in (8, 16)))
    assert "[8, 16] tokens wide" in refused(plot.main, argv)


# ------------------------------------------------------------------------------------------------
# Memory and speed


@pytest.mark.parametrize("context, more", [("solution", 0), ("reflection", 512), ("sibling", 120)])
def test_a_planned_run_prints_prompt_and_memory_and_leaves_nothing(
    context, more, tmp_path, monkeypatch, capsys
):
    model = os.path.abspath(opsd.tiny("rlvr"))
    monkeypatch.chdir(tmp_path)
    for module in (modelling, opsd):
        monkeypatch.setattr(module, "load_model", None)  # no weights
    flags = f"--gpus 1 --model {model} --context {context} --group 2 --out {tmp_path}/run"
    flags += " --micro-tokens 1 --max-new-tokens 120"
    memory.main(flags.split())
    said = capsys.readouterr().out
    assert said.count("<|im_start|>assistant") == 1
    assert "peak of training on each of 1 GPUs" in said
    prompt = int(re.search("teacher's prompt, ([0-9]+) tokens", said)[1])
    assert f"micro-batches of {prompt + 120 + more} tokens" in said  # the longest that it may read
    assert ("The answer is" in said) == (context in ("solution", "sibling"))
    assert ("(what the teacher will have written)" in said) == (context == "reflection")
    assert not os.listdir(tmp_path)


def allocated(config, args):
    """Peak of the bytes that torch allocates on the CPU in two updates, the models' loading
    included.
    """
    gc.collect()  # models of other tests: freed within it they would count
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        update = bench.make_update(config, args, CPU)
        assert update() > 0 and update() > 0
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "flags", ["float32", "bfloat16 --checkpointing", "float32 --lora 16", "bfloat16 --lora 16"]
)
def test_memory_estimate_is_near_what_torch_allocates(flags):
    config = memory.qwen3_config(256, 768, 6, 4, 2, False, 8192, 64)
    common = "--device cpu --backend vllm --micro-tokens 1024 --dtype"
    args = opsd.parse_args([*common.split(), *flags.split()])
    estimate = sum(memory.estimate(config, args, 1, 1024, False).values())
    assert estimate == pytest.approx(allocated(config, args), rel=0.15)


def test_shapes_are_qwens_and_more_cards_and_flags_need_less():
    # Billions, as the models' cards have them.
    billions = [round(memory.sizes(config)[0] / 1e9, 2) for config in memory.SHAPES.values()]
    assert billions[-3:] == [1.72, 4.02, 8.19]

    def whole(gpus, *flags):
        args = opsd.parse_args([*memory.CUDA, *flags])
        return sum(memory.estimate(memory.SHAPES["Qwen3-8B"], args, gpus, 8192, True).values())

    flags = "--checkpointing", "--offload"
    sizes = [whole(1), whole(2), whole(8), whole(8, *flags[:1]), whole(8, *flags)]
    assert sizes == sorted(sizes, reverse=True)
    args = opsd.parse_args([*memory.CUDA[:-1], "transformers"])  # from a copy in bfloat16
    assert memory.estimate(memory.SHAPES["tiny"], args, 1, 8, False)["sampler"] > 0


def test_the_bench_measures_each_case_and_says_what_cannot_be(monkeypatch, capsys):
    argv = "--model tiny --rounds 1 --threads 1 --tokens".split()

    def measure(what, tokens, variant):
        line = [what, *argv, tokens, "--variant", variant]
        return bench.MEASURES[what](bench.parse_args(line))

    ours, naive = (measure("loss", "70", name) for name in ("ours", "naive"))
    assert ours["gradient"] == pytest.approx(naive["gradient"], rel=1e-4)
    step = measure("step", "600", "python")
    assert step["speed"] == pytest.approx(4 * 284 / step["seconds"]) and step["gradient"] > 0
    monkeypatch.setattr(bench.json, "loads", lambda line: dict(seconds=1, memory=2, gradient=3))

    def run(call, **options):
        failed = call[-1] == "trl"
        return type("Done", (), dict(returncode=failed, stdout="{}", stderr="KeyError: 'x'\n"))

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["loss", *argv, "8"])
    said = capsys.readouterr().out
    assert "trl: not measured (KeyError: 'x')" in said
    assert "| naive | 1.000 s | 2 MB | 1.000 | 1.000 |" in said
