"""--lora: gradients, a teacher that is the student, what is pushed, saved, resumed; two ranks, on
which the fixture `pair` starts this file as a script.
"""

import os
import subprocess
import sys
import types

import peft
import pytest
import safetensors.torch
import torch
import transformers

import lora
import opsd
import ranks
import rlvr
import run
import sft
import vllm_sampler
from model import frozen_copy, response_hidden, save_model
from run import HERE
from samplers import make_sampler
from tests.helpers import (
    CPU,
    TINY,
    apart,
    lines_without_times,
    make_tied,
    metrics,
    some_rollouts,
    torchrun,
    weights,
    with_teacher_rows,
)
from tests.test_ranks import differing, filled, given_rollouts

BARE = "--threads 1 --device cpu --steps 2 --overwrite --lora 4 --lr 1e-3".split()
GREEDY = BARE + "--temperature 0 --max-new-tokens 60 --eval-problems 3".split()
OPSD = GREEDY + "--filter all --batch 5 --micro-tokens 300".split()
WRITTEN = ["--context", "reflection", "--context-tokens", "100"]
RUNS = {
    "opsd": (opsd, OPSD + WRITTEN),
    "lean": (opsd, OPSD + ["--model", "TIED", "--checkpointing"]),
    "rlvr": (rlvr, GREEDY + "--batch 3 --group 4 --kl 0.1 --micro-tokens 500".split()),
    "sft": (sft, BARE + ["--batch", "5", "--model", TINY, "--warmup", "1"]),
}


def with_adapters(model, dtype="float32"):
    """(model with adapters that do something, its frozen teacher, args)."""
    args = opsd.parse_args(["--lora", "4", "--dtype", dtype])
    ranks.prepare(model, args, CPU)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model, frozen_copy(model, args, CPU), args


def round_weights(model, dtype):
    for weight in model.parameters():  # not the buffers
        weight.data = weight.data.to(getattr(torch, dtype))


def prompts_of(tokenizer):
    return [r.prompt_ids for r in some_rollouts(tokenizer)]


def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule(model, tokenizer):
    plain, (model, teacher, args) = frozen_copy(model), with_adapters(model)
    rollouts = with_teacher_rows(some_rollouts(tokenizer), prompts_of(tokenizer))
    plain.requires_grad_(True).load_state_dict(dict(lora.merged(model, model.state_dict())))
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    expected = opsd.accumulate_gradients(plain, teacher, rollouts, args)
    assert loss == pytest.approx(expected, rel=1e-4) and loss > 0
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * 7 * len(model.model.layers)
    assert all(".lora_" in name for name in trained)
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer):
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            whole = plain.get_parameter(f"{name}.weight").grad  # (out, in)
            assert apart(b.grad, 2 * whole @ a.T) < 1e-3
            assert apart(a.grad, 2 * b.T @ whole) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_is_the_start_and_shares_every_weight(dtype, model, tokenizer):
    start = frozen_copy(model, opsd.parse_args(["--dtype", dtype]), CPU)
    round_weights(start, dtype)
    student, teacher, _ = with_adapters(model, dtype)
    rows = [r.row for r in some_rollouts(tokenizer)]
    with torch.no_grad():
        hidden = [response_hidden(each, rows) for each in (start, teacher, student)]
    assert torch.equal(hidden[0], hidden[1]) and apart(hidden[2], hidden[0].float()) > 0.01
    for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
        frozen = torch.float32 if mine.requires_grad else getattr(torch, dtype)
        assert mine is its and mine.dtype == frozen


def test_the_samplers_get_merged_weights(model, tokenizer):
    prompts, start = prompts_of(tokenizer), frozen_copy(model)
    student, teacher, args = with_adapters(model)
    sampler = make_sampler(student, tokenizer, args)
    second = make_sampler(teacher, tokenizer, args, sampler)
    own = make_sampler(start, tokenizer, args)
    own.model = student  # the adapted model itself generates
    expected = own.sample(prompts, 60, temperature=0)
    assert sampler.sample(prompts, 60, temperature=0) == expected
    own.model = start
    assert not own.copies and sampler.copies
    before = own.sample(prompts, 60, temperature=0)
    assert second.sample(prompts, 60, temperature=0) == before != expected
    assert sampler.sample(prompts, 60, temperature=0) == expected  # its weights came back
    pushed = []
    llm = types.SimpleNamespace(
        collective_rpc=lambda _, kwargs: pushed.append(dict(kwargs["weights_iterator"])),
        reset_prefix_cache=lambda: True,
    )
    engine = types.SimpleNamespace(engine=dict(llm=llm, asleep=False), dtype=torch.bfloat16)
    for each in (student, teacher):
        vllm_sampler.VllmSampler.push(engine, each)
    copy = sampler.engine["copy"].state_dict()
    assert pushed[0].keys() == pushed[1].keys() == copy.keys()
    for name, weight in start.state_dict().items():
        assert torch.equal(pushed[0][name], copy[name].bfloat16())
        assert torch.equal(pushed[1][name], weight.bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_plain_and_peft_loads_its_adapter(dtype, model, tokenizer, tmp_path):
    out = str(tmp_path)
    round_weights(model, dtype)  # as most checkpoints are
    model.float()
    base = frozen_copy(model)
    with_adapters(model, dtype)
    save_model(out, model, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(plain) is type(base) and plain.dtype == torch.float32
    names = safetensors.torch.load_file(os.path.join(out, "model.safetensors")).keys()
    assert names == base.state_dict().keys()
    ids = torch.arange(40)[None]  # (1, T)
    with torch.no_grad():
        first = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, os.path.join(out, "adapter"))(ids).logits
        logits = plain(ids).logits
    assert apart(adapted, logits) < 1e-5 and apart(adapted, first) > 0.01
    files = [tmp_path / "config.json", tmp_path / "adapter" / "adapter_model.safetensors"]
    assert len({os.stat(file).st_mode for file in files}) == 1  # others may read it


@pytest.mark.parametrize("name", ["opsd", "rlvr", "sft"])
def test_states_hold_what_is_trained_and_resume_bit_for_bit(
    name, tmp_path, crash, monkeypatch, capsys
):
    script, argv = RUNS[name]
    argv = [*argv, *"--temperature 1".split()[: 2 * (name != "sft")]]
    argv = [flag for flag in argv if flag != "--overwrite"]
    argv += "--steps 6 --state-every 2 --save-every 4 --out".split()
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    with pytest.raises(crash):
        script.main([*argv, cut])
    monkeypatch.undo()
    names = run.load_state(cut)["model"].keys()
    assert names and all(".lora_" in name for name in names)
    script.main([*argv, cut, "--resume"])
    assert "resumed after step 4" in capsys.readouterr().out
    script.main([*argv, whole])
    assert torch.equal(weights(cut), weights(whole))
    assert lines_without_times(cut) == lines_without_times(whole)
    for path in (whole, cut + "/step-4"):
        assert os.path.isfile(path + "/adapter/adapter_config.json")
    assert apart(weights(whole), weights(TINY)) > 1e-3
    script.main([*argv[:-1], "--lora", "0", "--overwrite", "--out", cut])
    assert not os.path.exists(cut + "/adapter")


def test_other_teachers_are_refused_in_one_line(capsys):
    for teacher in ("ema", "every", "current"):
        with pytest.raises(SystemExit):
            opsd.parse_args(["--lora", "4", "--teacher", teacher])
        error = capsys.readouterr().err
        assert error.startswith(f"error: --teacher {teacher}: with --lora")
        assert error.count("\n") == 1


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """The folder in which two ranks and one left their runs, named two-... and one-..."""
    folder = tmp_path_factory.mktemp("ranks")
    make_tied(tokenizer, folder / "tied")
    command = torchrun("-m", "tests.test_lora", str(folder))
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    ranks = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE, env=environment, timeout=600
    )
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    run_all(folder, "one")
    return folder


def run_all(folder, count):
    with pytest.MonkeyPatch.context() as monkeypatch:
        given_rollouts(monkeypatch)  # rlvr.py's: greedy ones would all be equal
        for name, (script, argv) in RUNS.items():
            script.main([*filled(argv, folder), "--out", os.path.join(folder, f"{count}-{name}")])


@pytest.mark.parametrize("name", list(RUNS))
def test_two_ranks_train_as_one(name, pair):
    paths = [pair / f"{count}-{name}" for count in ("one", "two")]
    for a, b in zip(*(metrics(path)[1:] for path in paths), strict=True):
        assert differing(a, b) in ([], ["logprob_gap"])
        assert "loss" not in a or a["grad_norm"] > 1e-3
    one, two = (run.load_state(str(path))["model"] for path in paths)
    assert one.keys() == two.keys() and all(".lora_" in key for key in one)
    assert all(apart(two[key], one[key]) < 1e-3 for key in one)
    start = weights(pair / "tied" if name == "lean" else TINY)
    one, two = (weights(path) - start for path in paths)
    assert one.norm() > 0 and apart(two, one) < 1e-3


if __name__ == "__main__":  # a rank, started by the fixture `pair`
    ranks.leave = lambda: None  # several scripts in one process
    run_all(sys.argv[1], "two")
