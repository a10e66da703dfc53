"""The loss compiled, as on CUDA, by backends that a CPU has: equal to autograd, piece by piece."""

import re
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import model as modelling
import opsd
import rlvr
import sft
from tests.helpers import apart, flat_gradient, read_rollouts

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "split", "rft")
GATES = ("all", "student-entropy", "teacher-entropy", "gap", "position", "agreement")


@pytest.fixture
def compile_by(monkeypatch):
    """Compiles the loss by a backend; returns what counts its graphs. None: not compiled."""

    def use(backend):
        torch._dynamo.reset()
        modelling.compiled.cache_clear()
        counter = CompileCounterWithBackend(backend) if backend else None
        own = {"cpu": dict(backend=counter)} if counter else {}
        monkeypatch.setattr(modelling, "COMPILE", own)
        return counter

    return use


def arguments(divergence="reverse_kl", gate="all"):
    args = opsd.parse_args(["--filter", "all", "--divergence", divergence])
    args.gate, args.gate_range = gate, [1.0]
    return args


def a_chunk(count, dtype=torch.float32, vocabulary=300):
    """(student's, teacher's logits (C, V), tokens)."""
    generator = torch.Generator().manual_seed(count)
    s, t = torch.randn(2, count, vocabulary, generator=generator).mul(3).to(dtype)
    place = torch.arange(count)
    ids = torch.where(place % 2 == 0, t.argmax(-1), place)  # for the gate `agreement`
    weight = torch.rand(count, generator=generator)
    return s, t, opsd.Tokens(ids, place % 3, weight - 0.5, place, weight, place % 2)


def gradients(token_loss, args, dtype=torch.float32):
    """Of chunks of several sizes: [(gradient (C, V), loss, measures {name: (C,)}), ...]."""
    results = []
    for count in (37, 50, 1, 11):
        logits, teacher_logits, tokens = a_chunk(count, dtype)
        parts = list(modelling.differentiate(token_loss, logits, teacher_logits, tokens, args))
        ((_, loss, measures),) = parts  # so small that it is one piece in any case
        results.append((logits, loss, measures))
    return results


def check_equal(results, expected, bound):
    (mine, *rest), (its, *its_rest) = (zip(*r, strict=True) for r in (results, expected))
    mine, its = (torch.cat([g.flatten().float() for g in each]) for each in (mine, its))
    assert its.norm() > 0 and apart(mine, its) <= bound
    torch.testing.assert_close(rest, its_rest, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
@pytest.mark.parametrize(
    "divergence, gate, dtype, bound",
    [("reverse_kl", "all", "bfloat16", 1e-2)]
    + [(*pair, "float32", 1e-5) for pair in zip(DIVERGENCES, GATES[1:], strict=True)],
)
def test_inductors_kernels_compute_the_same(divergence, gate, dtype, bound, compile_by):
    args, dtype = arguments(divergence, gate), getattr(torch, dtype)
    compile_by(None)
    expected = gradients(opsd.token_loss, args, dtype)
    counter = compile_by("inductor")
    check_equal(gradients(opsd.token_loss, args, dtype), expected, bound)
    assert counter.frame_count <= 2 and "cpu" in modelling.COMPILE


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
def test_no_float32_tensor_of_a_chunks_size_is_written(compile_by, monkeypatch):
    """Of the code that inductor would make for CUDA the loops over V, in C++: bytes a logit."""
    options = modelling.COMPILE["cuda"]["options"]
    compile_by("inductor")
    monkeypatch.setitem(modelling.COMPILE, "cpu", dict(options=options))
    monkeypatch.setattr("torch._inductor.ir.is_cpu", lambda node: False)  # stores every exp
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    chunk = a_chunk(8, torch.bfloat16, 4096)
    for tensor in (*chunk[:2], *chunk[2]):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    run = modelling.compiled("cpu")
    code = "\n".join(run_and_get_code(run, opsd.token_loss, *chunk, arguments())[1])
    types = dict((name, kind) for kind, name in re.findall(r"(float|at::BFloat16)\* (\w+)", code))
    seen = []
    for loop in re.split(r"for\(int64_t x1=", code)[1:]:
        seen += set(re.findall(r"(loadu|store)\((\w+) \+ static_cast<int64_t>\(x1 \+ 4096L", loop))
    assert {types[name] for _, name in seen} == {"at::BFloat16"}
    assert 2 * len(seen) == 18 and sum(kind == "store" for kind, _ in seen) == 1


def losses_and_gradients(model, rollouts):
    """Of the three stages, one micro-batch each."""
    rows = [r.row for r in rollouts]
    for i, r in enumerate(rollouts):
        r.weight, r.advantage = 0.01, 1.0 - i % 3
    teacher = opsd.frozen_copy(model)
    for loss_of in (
        lambda: opsd.opsd_loss(model, teacher, rollouts, arguments("jsd")),
        lambda: rlvr.rlvr_loss(model, teacher, rollouts, rlvr.parse_args(["--kl", "0.1"])),
        lambda: (sft.sft_loss(model, rows, 0.01), {}),
    ):
        model.zero_grad()
        loss, measures = loss_of()
        yield flat_gradient(model), torch.as_tensor(loss), measures


def test_the_three_stages_train_as_without(compile_by, model, tokenizer, monkeypatch):
    rollouts = read_rollouts(tokenizer)
    monkeypatch.setitem(modelling.CHUNK, "cpu", 5e4)  # several, the last one smaller
    monkeypatch.setitem(modelling.PIECE, "cpu", 1e4)
    compile_by(None)
    expected = list(losses_and_gradients(model, rollouts))
    counter = compile_by("aot_eager")
    check_equal(list(losses_and_gradients(model, rollouts)), expected, 1e-6)
    assert 3 <= counter.frame_count <= 6


def test_what_cannot_be_compiled_is_one_line_and_goes_on(compile_by, monkeypatch, capsys):
    def by_value(s, t, tokens, args):
        return opsd.kl(s, t) * (1.0 if s.sum().item() < 0 else 2.0)

    monkeypatch.setitem(opsd.DIVERGENCES, "by-value", by_value)
    args = arguments()
    args.divergence = "by-value"
    compile_by(None)
    expected = gradients(opsd.token_loss, args)
    compile_by("aot_eager")
    check_equal(gradients(opsd.token_loss, args), expected, 0)
    said = capsys.readouterr().out
    assert said.startswith("the loss is not compiled, and slower: ") and said.count("\n") == 1
    assert not modelling.COMPILE
