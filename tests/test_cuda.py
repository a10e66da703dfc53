"""What matters on a card. `pytest -m cuda` runs the marked tests where there is one; elsewhere they
are skipped, and CHECK_DEVICE=cpu tries them on the CPU. The others need no card.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import model as modelling
import opsd
import ranks
import rlvr
import run
from data import embedded_problems, render_prompt
from model import load_model
from run import HERE
from samplers import make_sampler
from tests.helpers import (
    SMALL,
    TINY,
    apart,
    check_greedy,
    dense_loss,
    flat_gradient,
    loss_and_gradient,
    metrics,
    read_rollouts,
    weights,
)
from tools import memory
from tools.bench import LOSSES, begin_peak, head_only_model, peak_since, random_rollouts

DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
QWEN = 151_936  # ids of Qwen3's vocabulary


@pytest.fixture
def device():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device (CHECK_DEVICE=cpu tries these tests on the CPU)")
    return torch.device(DEVICE)


# ------------------------------------------------------------------------------------------------
# Without a card


class Launches(TorchDispatchMode):
    """Counts the operators of PyTorch within it, about one kernel each; views are none."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info]
        empty = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        self.count += not empty and all(alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def operators(tokens, vocabulary=152):
    """Operators of our loss on a model without layers."""
    torch.manual_seed(0)
    student, teacher = (head_only_model(vocabulary, 8, torch.float32) for _ in range(2))
    teacher.requires_grad_(False)
    rollouts = random_rollouts(1, 1, tokens, vocabulary)
    with Launches() as launches:
        LOSSES["ours"](student, teacher, rollouts)
    return launches.count


def test_on_a_card_launches_grow_with_chunks_and_not_with_tokens(monkeypatch):
    """A thousandth of the card's sizes and of Qwen3's vocabulary: a chunk has 1,684 tokens as
    there, a piece 421.
    """
    of_cpu = modelling.PIECE["cpu"]
    monkeypatch.setitem(modelling.CHUNK, "cpu", modelling.CHUNK["cuda"] / 1000)
    monkeypatch.setitem(modelling.PIECE, "cpu", modelling.PIECE["cuda"] / 1000)
    pieces = math.ceil(1684 / 421)
    assert operators(100) == operators(421)  # one piece
    one, two, three = (operators(count * 1684) for count in (1, 2, 3))
    assert two - one == three - two <= 60 * pieces
    assert (one - operators(421)) / (pieces - 1) <= 60  # of a further piece
    monkeypatch.setitem(modelling.PIECE, "cpu", of_cpu / 1000)  # 6 tokens
    assert operators(2 * 1684) - operators(1684) > 50 * (two - one)


def test_one_rank_under_torchrun_is_one_rank_without(tmp_path):
    argv = [*SMALL, *"--device cpu --filter all --temperature 0 --eval-problems 0".split()]
    argv += "--steps 2 --state-every 0 --overwrite --out".split()
    plain, sharded = str(tmp_path / "plain"), str(tmp_path / "sharded")
    opsd.main([*argv, plain])
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    command = [sys.executable, *launcher, os.path.join(HERE, "opsd.py"), *argv, sharded]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one, other in zip(metrics(plain)[1:], metrics(sharded)[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    start = weights(TINY)
    assert apart(weights(sharded) - start, weights(plain) - start) < 1e-2


def test_attention_is_never_cudnns():
    torch.backends.cuda.enable_cudnn_sdp(True)
    run.set_up(opsd.parse_args(["--device", "cpu"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("vllm", [True, False])
def test_groups_are_left_to_vllm_where_it_is(vllm, monkeypatch):
    calls = []
    monkeypatch.setattr(ranks, "joined", True)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(ranks.dist, name, lambda name=name: calls.append(name))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    if vllm:
        monkeypatch.setitem(sys.modules, "vllm", None)
    ranks.leave()
    assert calls == ["barrier"] + ["destroy_process_group"] * (not vllm)
    assert not ranks.joined


# ------------------------------------------------------------------------------------------------
# The method


def prepared(model, device, flags):
    """Readies the student as a run does; returns its teacher."""
    args = opsd.parse_args(flags.split())
    ranks.prepare(model, args, device)
    return opsd.frozen_copy(model, args, device)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_of_1_and_64_million_logits_give_one_gradient(device, dtype, monkeypatch):
    vocabulary = QWEN if device.type == "cuda" else 2000
    scale = vocabulary / QWEN
    torch.manual_seed(0)
    config = memory.qwen3_config(64, 128, 2, 2, 1, True, vocabulary, 32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    flags = f"--dtype {dtype}"
    teacher = prepared(model, device, flags)
    rollouts, found = random_rollouts(4, 16, 150, vocabulary), []  # 600 tokens: 91 million logits
    compiled = modelling.COMPILE
    for piece in (1e6, 64e6, 256e6):
        monkeypatch.setitem(modelling.PIECE, device.type, piece * scale)
        monkeypatch.setitem(modelling.CHUNK, device.type, 256e6 * scale)
        # The last one compiled, as a card does by itself.
        monkeypatch.setattr(modelling, "COMPILE", compiled if piece == 256e6 else {})
        found.append(loss_and_gradient(model, teacher, rollouts, flags))
    (loss, gradient), *others = found
    assert loss > 0 and gradient.norm() > 0
    for other, other_gradient in others:
        assert other == pytest.approx(loss, rel=1e-4)
        assert apart(other_gradient, gradient) < (1e-4 if dtype == "float32" else 1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 0.1)])
def test_the_loss_is_that_of_full_logits_in_float32(device, dtype, bound):
    model, tokenizer = load_model(TINY, device)
    plain, start = opsd.frozen_copy(model).requires_grad_(True), opsd.frozen_copy(model)
    rollouts, flags = read_rollouts(tokenizer), f"--dtype {dtype} --micro-tokens 300"
    teacher = prepared(model, device, flags)
    loss, gradient = loss_and_gradient(model, teacher, rollouts, flags)
    dense = dense_loss(plain, start, rollouts)
    dense.backward()
    assert loss == pytest.approx(dense.item(), rel=bound)
    assert apart(gradient, flat_gradient(plain)) < bound


@pytest.mark.cuda
def test_memory_of_the_loss_does_not_grow_with_the_response(device):
    if device.type != "cuda":
        pytest.skip("of the card's allocator")
    student, teacher = (head_only_model(QWEN, 64, torch.bfloat16).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    peaks = []
    for tokens in (4096, 4096, 16384):  # the first makes the gradients
        rollouts = random_rollouts(tokens // 512, 8, 512, 1000)
        held = begin_peak(device)
        LOSSES["ours"](student, teacher, rollouts)
        peaks.append(peak_since(device) - held)
    assert peaks[2] < 1.1 * peaks[1]


# ------------------------------------------------------------------------------------------------
# Sampler and scripts


@pytest.mark.cuda
def test_greedy_sampling_is_that_of_a_loop(device):
    model, tokenizer = load_model(TINY, device)
    args = opsd.parse_args("--backend transformers --dtype float32".split())
    prompts = [render_prompt(tokenizer, problem) for problem in embedded_problems(6, 1)]
    samples = make_sampler(model, tokenizer, args).sample(prompts, 60, temperature=0)
    check_greedy(model, prompts, samples)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "script, flags",
    [
        (opsd, "--filter all"),
        (opsd, "--filter all --checkpointing --teacher ema --divergence jsd"),
        (opsd, "--filter all --context resolve --context-tokens 60"),
        (rlvr, "--group 8 --kl 0.1"),
    ],
)
def test_scripts_train(device, script, flags, tmp_path):
    out = str(tmp_path / "run")
    argv = [*SMALL, *flags.split(), *"--backend transformers --steps 2 --lr 1e-3".split()]
    script.main([*argv, "--device", device.type, "--out", out])
    head, *steps, last = metrics(out)
    assert head["args"]["dtype"] == ("bfloat16" if device.type == "cuda" else "float32")
    assert len(steps) == 2 and "evaluation" in last
    for step in steps:
        assert math.isfinite(step["loss"]) and step["peak_memory_mb"] > 0
    trained = weights(out)
    assert trained.isfinite().all() and not torch.equal(trained, weights(TINY))
