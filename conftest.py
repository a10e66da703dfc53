"""Fixtures of several test files."""

import gc
import importlib.util
import signal

import pytest
import torch

import opsd
import vllm_sampler
from model import load_model
from tests.helpers import CPU, TINY

# A shell that starts the tests with & has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_dicts(monkeypatch):
    """What a test, or a script that it calls, adds to opsd's dicts is gone after it."""
    for name in ("FILTERS", "TEACHERS", "DIVERGENCES", "GATES"):
        monkeypatch.setattr(opsd, name, dict(getattr(opsd, name)))


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load_model(TINY, CPU)


@pytest.fixture
def model(tiny):
    """A student that a test may change."""
    return opsd.frozen_copy(tiny[0]).requires_grad_(True)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture
def refused(capsys):
    """Calls what ends with exit code 2 and one line on stderr, and returns the line."""

    def call(function, *args):
        with pytest.raises(SystemExit) as stop:
            function(*args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return call


@pytest.fixture
def vllm(monkeypatch):
    """The flags for it; skips where there is none."""
    if not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    # GB; the CPU build would take a share of the machine's memory.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    if not vllm_sampler.import_vllm().platforms.current_platform.device_type:
        pytest.skip("vllm has no device here")
    yield ["--backend", "vllm", "--vllm-eager", "--dtype", "float32"]
    gc.collect()  # the engine's memory
