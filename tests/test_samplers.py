"""Sampling: transformers, and vLLM where it is installed."""

import ast
import importlib.util
import json
import os
import sys
import types

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import opsd
import ranks
import rlvr
import samplers
import vllm_sampler
from data import embedded_problems, render_prompt
from model import load_model, sampled_logps, save_model
from samplers import make_sampler, until_stop
from tests.helpers import CPU, SMALL, TINY, check_greedy, make_tied, metrics, some_rollouts, write


def prompts_of(tokenizer, count, seed=0):
    return [r.prompt_ids for r in some_rollouts(tokenizer, count, seed)]


def sampler_of(model, tokenizer, flags=(), other=None, dtype="float32"):
    return make_sampler(model, tokenizer, opsd.parse_args(["--dtype", dtype, *flags]), other)


def ends_right(samples, end):
    """Whether each finished response has the id `end` once, as its last, and no other has it."""
    return all(
        finished == (ids[-1] == end) and ids.count(end) == finished for ids, finished in samples
    )


# ------------------------------------------------------------------------------------------------
# transformers


def test_sampling_is_greedy_at_zero_repeats_with_the_seed_and_ignores_the_generation_config(
    tiny, tokenizer
):
    model = opsd.frozen_copy(tiny[0])
    model.generation_config.update(repetition_penalty=5.0, top_k=1, min_new_tokens=40)
    sampler = sampler_of(model, tokenizer, ["--sample-batch", "3"])
    prompts = [render_prompt(tokenizer, p) for p in embedded_problems(5, 1)]
    greedy = sampler.sample(prompts, 60, temperature=0)
    check_greedy(tiny[0], prompts, greedy)
    first = sampler.sample(prompts, 30, seed=1)
    assert first == sampler.sample(prompts, 30, seed=1) != sampler.sample(prompts, 30, seed=2)
    twice = sampler.sample(prompts[:1] * 6, 30, temperature=3.0, seed=1)
    assert twice[:3] != twice[3:]  # two batches of one stream
    # The model's own settings are left as they were.
    assert model.generation_config.repetition_penalty == 5.0


def test_rows_that_finish_leave_the_batch_and_the_others_do_not_notice(
    tiny, tokenizer, monkeypatch
):
    sampler = sampler_of(tiny[0], tokenizer)
    prompts = prompts_of(tokenizer, 12, seed=2)
    lengths = sorted(len(sampler.sample([prompt], 150, temperature=0)[0][0]) for prompt in prompts)
    cap = lengths[-1] - 1
    alone = [sampler.sample([prompt], cap, temperature=0)[0] for prompt in prompts]
    assert len(set(lengths)) > 2 and {finished for _, finished in alone} == {True, False}
    for segment in (1, 7, 1000):
        monkeypatch.setattr(samplers, "SEGMENT", segment)
        sampler = sampler_of(tiny[0], tokenizer)
        assert sampler.sample(prompts, cap, temperature=0) == alone


def test_eos_stays_and_truncated_responses_get_none(tiny, tokenizer):
    sampler, eos = sampler_of(tiny[0], tokenizer), tokenizer.eos_token_id
    prompts = [render_prompt(tokenizer, p) for p in embedded_problems(8, 1)]
    long, sampler.limit = sampler.sample(prompts, 160, seed=0), max(map(len, prompts)) + 5
    short = sampler.sample(prompts, 5, seed=0)  # there is just room
    assert ends_right(long, eos)
    assert any(finished for _, finished in long)
    assert all(not finished and len(ids) == 5 and eos not in ids for ids, finished in short)
    assert until_stop([4, 9, 2, 0], [2, 9]) == ([4, 9], True)
    assert until_stop([4, 5], [2]) == ([4, 5], False)
    # Every stop id ends a response.
    model, newline = opsd.frozen_copy(tiny[0]), tokenizer("\n").input_ids[0]
    model.generation_config.eos_token_id = [eos, newline]
    ids, finished = sampler_of(model, tokenizer).sample(prompts[:1], 60, temperature=0)[0]
    assert finished and ids.index(newline) == len(ids) - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_have_the_computation_dtype_and_a_copy_follows_pushes(
    dtype, model, tokenizer, monkeypatch
):
    """Under autocast float32 weights would keep them in float32, twice the memory."""
    ranks.prepare(model, opsd.parse_args(["--dtype", dtype]), CPU)
    sampler, prompts, seen = sampler_of(model, tokenizer, dtype=dtype), prompts_of(tokenizer, 4), []
    own = transformers.LlamaForCausalLM.generate

    def generate(self, **kwargs):
        out = own(self, **kwargs)
        for layer in out.past_key_values.layers:
            seen.extend((layer.keys.dtype, layer.values.dtype))
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    before = None
    for _ in range(2):
        rounded = load_model(TINY, CPU, dtype)[0]
        rounded.load_state_dict(model.state_dict())
        expected = sampler_of(rounded, tokenizer, dtype=dtype).sample(prompts, 40, temperature=0)
        assert sampler.sample(prompts, 40, temperature=0) == expected != before
        before = expected
        with torch.no_grad():
            model.lm_head.weight[5:50] *= -1
        sampler.push(model)
    assert set(seen) == {getattr(torch, dtype)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_heads_weights_are_never_copied_for_each_row(dtype, tiny, tokenizer):
    products = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                products.add((str(func.overloadpacket), *args[1].shape[-2:]))
            return func(*args, **(kwargs or {}))

    sampler = sampler_of(opsd.frozen_copy(tiny[0]), tokenizer, dtype=dtype)
    prompts, (vocabulary, width) = prompts_of(tokenizer, 4), tiny[0].lm_head.weight.shape
    with Record():
        sampler.sample(prompts, 3)
    assert ("aten.mm", width, vocabulary) in products
    assert ("aten.bmm", width, vocabulary) not in products


# ------------------------------------------------------------------------------------------------
# vLLM


def on_its_device(path):
    name = vllm_sampler.import_vllm().platforms.current_platform.device_type
    return load_model(str(path), torch.device(name))[0]


def tied_llama(tokenizer, path):
    """A tied model, saved with a generation config that would change everything."""
    make_tied(tokenizer, path)
    config = dict(repetition_penalty=5.0, do_sample=True, temperature=0.1, top_k=3)
    config["eos_token_id"] = list(range(10, 200))
    write(path / "generation_config.json", json.dumps(config))
    model = on_its_device(path)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.mark.parametrize("name", ["embedded", "tied"])
def test_vllm_equals_transformers_before_and_after_pushes(name, tokenizer, tmp_path, vllm):
    model = on_its_device(TINY) if name == "embedded" else tied_llama(tokenizer, tmp_path)
    # The prefix cache keeps blocks of 128 tokens.
    prompts = [10 * prompt for prompt in prompts_of(tokenizer, 6)]
    reference, state = sampler_of(model, tokenizer), torch.get_rng_state()
    sampler = sampler_of(model, tokenizer, vllm)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler.limit == reference.limit and min(map(len, prompts)) > 128
    first = opsd.frozen_copy(model)
    before = None
    for push in range(4):
        greedy = sampler.sample(prompts, 60, temperature=0)
        assert greedy == reference.sample(prompts, 60, temperature=0) != before
        before = greedy
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(push))
                p.add_(0.05 * p.std() * noise.to(p.device))
        sampler.push(model)
    second = sampler_of(first, tokenizer, vllm, sampler)  # a teacher on the student's engine
    for one, other in ((second, first), (sampler, model), (second, first), (sampler, model)):
        expected = sampler_of(other, tokenizer).sample(prompts, 60, temperature=0)
        assert one.sample(prompts, 60, temperature=0) == expected
    rows = sampler.sample(prompts, 60, seed=1)
    assert rows == sampler.sample(prompts, 60, seed=1) != sampler.sample(prompts, 60, seed=2)
    assert sampler.sample(prompts[3:], 60, temperature=0.7, top_p=0.9, seed=1) != rows[3:]
    # More than the engine reads at once.
    many = [prompt[i:] for prompt in prompts for i in range(16)]
    assert all(len(ids) == 2 or finished for ids, finished in sampler.sample(many, 2, seed=1))
    rows = sampler.sample(prompts[:1] * 6, 60, seed=1, logps=True)
    # Responses to one prompt are draws of their own.
    assert len({tuple(ids) for ids, _ in rows}) > 1
    logps = sampled_logps(model, [(prompts[0], ids) for ids, _ in rows])
    flat = torch.tensor([value for row in sampler.logps for value in row])
    assert (flat - logps).abs().mean() < 1e-3


def test_vllm_keeps_the_stop_id_once_and_stops_at_every_stop_id(tokenizer, vllm):
    model = on_its_device(TINY)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    prompts = prompts_of(tokenizer, 12)
    sampler, reference = sampler_of(model, tokenizer, vllm), sampler_of(model, tokenizer)
    lengths = [len(ids) for ids, _ in reference.sample(prompts, 160, temperature=0)]
    for cap in (160, min(lengths), 5):  # at the second cap a stop id comes last
        rows = sampler.sample(prompts, cap, temperature=0, logps=True)
        assert rows == reference.sample(prompts, cap, temperature=0)
        assert ends_right(rows, tokenizer.eos_token_id)
        assert [len(row) for row in sampler.logps] == [len(ids) for ids, _ in rows]
    model.generation_config.eos_token_id = [newline, tokenizer.eos_token_id]
    sampler = sampler_of(model, tokenizer, vllm, sampler)
    for ids, finished in sampler.sample(prompts, 60, temperature=0):
        assert finished and ids[-1] == newline and newline not in ids[:-1]


@pytest.mark.parametrize(
    "script, flags",
    [
        (opsd, "--filter all"),
        # The teacher writes with the student's engine.
        (opsd, "--filter all --context resolve --context-tokens 60"),
        (rlvr, "--group 8"),
    ],
)
def test_script_trains_with_vllm(script, flags, tmp_path, vllm):
    out = str(tmp_path / "run")
    script.main([*vllm, *SMALL, *flags.split(), *"--steps 3 --lr 1e-3 --out".split(), out])
    head, *steps, last = metrics(out)
    assert head["args"]["backend"] == "vllm" and len(steps) == 3 and "evaluation" in last
    for step in steps:
        assert step["loss_tokens"] > 0 and step["grad_norm"] > 0 and 0 < step["logprob_gap"] < 1e-3


# ------------------------------------------------------------------------------------------------
# What stands before an engine runs


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_one_tensor_left_old_is_caught_and_rounding_is_not(name, tiny, tokenizer, capsys):
    """The check itself; transformers on other weights stands in for the engine."""
    model, prompts = tiny[0], prompts_of(tokenizer, 6)
    for dtype in ("float32", "bfloat16"):
        other = opsd.frozen_copy(model).to(getattr(torch, dtype))
        sampler = sampler_of(other, tokenizer, dtype=dtype)
        sampler.copies = True  # so that it has log-probabilities
        vllm_sampler.check_engine(sampler, model, prompts, 100)
    stale = opsd.frozen_copy(model)
    torch.nn.init.uniform_(stale.get_parameter(name), -1e-3, 1e-3)  # what an engine starts with
    sampler = sampler_of(stale, tokenizer)
    sampler.copies = True
    with pytest.raises(SystemExit):
        vllm_sampler.check_engine(sampler, model, prompts, 100)
    error = capsys.readouterr().err
    assert error.startswith("error: --backend vllm") and error.count("\n") == 1
    assert "lm_head" in error


def test_without_vllm_one_line_names_the_backend(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    argv = ["--model", TINY, *"--backend vllm --device cpu --out".split(), str(tmp_path / "x")]
    for script in (opsd, rlvr, evaluation):
        assert "--backend vllm: vllm cannot be imported" in refused(script.main, argv)
    assert not os.listdir(tmp_path)
    args = opsd.parse_args([])
    samplers.choose_backend(args, CPU)
    assert args.backend == "transformers"
    assert "sampling with transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, has, device, says",
    [
        ("", "cuda", "cuda", None),
        ("--backend vllm", "", "cpu", "no device that is here"),
        ("--backend vllm", "cpu", "cuda", "runs on cpu, the model on cuda"),
    ],
)
def test_vllm_runs_where_the_model_does(flags, has, device, says, engines, capsys, refused):
    sys.modules["vllm"].platforms.current_platform.device_type = has
    args, device = opsd.parse_args(flags.split()), torch.device(device)
    if says:
        assert says in refused(samplers.choose_backend, args, device)
    else:
        samplers.choose_backend(args, device)
        assert args.backend == "vllm" and "sampling with vllm" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# vLLM's engine on CUDA: the calls and their order, on a fake one; names, in vLLM's source

SOURCE = importlib.util.find_spec("vllm")


class FakeEngine:
    """vllm.LLM on transformers, as if on CUDA: it fails where a call comes when the real engine
    could not answer it, and what sleeps is lost.
    """

    def __init__(self, **settings):
        self.settings, self.calls, self.asked = settings, [], []
        self.asleep, self.loaded, self.fresh = set(), False, True
        self.model, self.tokenizer = load_model(settings["model"], CPU)
        limit = self.model.config.max_position_embeddings
        self.model_config = types.SimpleNamespace(max_model_len=limit)
        self.lose_weights()

    def lose_weights(self):
        self.loaded = False
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(torch.nan)

    def sleep(self, level):
        assert level == 2 and not self.asleep, "sleeps already"
        self.calls.append("sleep")
        self.asleep = {"weights", "kv_cache"}
        self.lose_weights()

    def wake_up(self, tags):
        (tag,) = tags
        assert tag in self.asleep, f"{tag} is awake"
        # The cache takes the memory that the push needs.
        assert tag == "weights" or self.loaded, "the cache wakes before new weights"
        self.calls.append(f"wake {tag}")
        self.asleep.remove(tag)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" not in self.asleep, "weights sleep"
        self.calls.append("reload")
        own = self.model.state_dict()
        for name, weight in kwargs["weights_iterator"]:
            own[name].copy_(weight)
        self.loaded, self.fresh = True, False

    def reset_prefix_cache(self):
        assert not self.asleep, "the cache sleeps"
        self.calls.append("reset")
        self.fresh = True
        return True

    def generate(self, inputs, settings, use_tqdm):
        assert not self.asleep, "the engine sleeps"
        assert self.loaded and self.fresh, "old keys and values, or no weights"
        self.calls.append("generate")
        self.asked.append((settings[0].temperature, len(inputs), settings[0].logprobs))
        prompts, first = [row["prompt_token_ids"] for row in inputs], settings[0]
        how = first.max_tokens, first.temperature, first.top_p, first.seed % 2**32
        samples = sampler_of(self.model, self.tokenizer).sample(prompts, *how)
        outputs = []
        for prompt, (ids, _) in zip(prompts, samples, strict=True):
            output = types.SimpleNamespace(token_ids=ids, logprobs=None)
            if first.logprobs is not None:
                logps = sampled_logps(self.model, [(prompt, ids)]).tolist()
                entries = [types.SimpleNamespace(logprob=logp) for logp in logps]
                output.logprobs = [{t: entry} for t, entry in zip(ids, entries, strict=True)]
            outputs.append(types.SimpleNamespace(outputs=[output]))
        return outputs


@pytest.fixture
def engines(monkeypatch):
    """The engines that are built: fake ones, as if on CUDA."""
    built = []

    def build(**settings):
        built.append(FakeEngine(**settings))
        return built[-1]

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = build, types.SimpleNamespace
    platform = types.SimpleNamespace(device_type="cpu")
    vllm.platforms = types.SimpleNamespace(current_platform=platform)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(vllm_sampler, "import_vllm", lambda: vllm)
    monkeypatch.setattr(samplers, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_sampler, "device_of", lambda model: torch.device("cuda"))
    return built


WAKE = ["wake weights", "reload", "wake kv_cache", "reset"]


def test_the_engine_sleeps_while_the_trainer_works_and_wakes_around_a_push(
    model, tokenizer, engines
):
    flags = ["--backend", "vllm"]
    sampler = sampler_of(model, tokenizer, flags)
    teacher = opsd.frozen_copy(model)
    second = sampler_of(teacher, tokenizer, flags, sampler)
    (engine,) = engines
    prompts = prompts_of(tokenizer, 4)

    def new_calls():
        calls, engine.calls = engine.calls, []
        return calls

    def check(one, its_model):
        expected = sampler_of(its_model, tokenizer).sample(prompts, 40, temperature=0)
        assert one.sample(prompts, 40, temperature=0) == expected
        return expected

    first = check(sampler, model)
    # The check of the engine, and the sample.
    assert new_calls() == ["reload", "reset", "generate", "sleep", *WAKE, "generate", "sleep"]
    with torch.no_grad():
        model.lm_head.weight[5:50] *= -1
    sampler.push(model)
    assert new_calls() == WAKE
    assert check(sampler, model) != first
    assert new_calls() == ["generate", "sleep"]
    check(sampler, model)  # no update in between
    assert new_calls() == [*WAKE, "generate", "sleep"]
    assert check(second, teacher) == first
    assert new_calls() == [*WAKE, "generate", "sleep"] * 2
    sampler.push(model)
    sampler.push(model)  # awake already
    assert new_calls() == [*WAKE, "reload", "reset"]
    assert [logprobs for _, _, logprobs in engine.asked] == [0, None, None, None, 0, None]
    engine.reset_prefix_cache = lambda: False
    with pytest.raises(SystemExit):
        sampler.push(model)


def test_a_run_asks_for_logprobs_in_training_only_and_its_engine_keeps_the_order(
    tmp_path, engines, monkeypatch
):
    out = str(tmp_path / "run")
    flags = "--filter all --backend vllm --steps 2 --eval-every 1 --lr 1e-3"
    flags += " --context resolve --context-tokens 60"
    opsd.main([*SMALL, *flags.split(), "--out", out])
    (engine,) = engines
    sampled = [(count, logprobs) for t, count, logprobs in engine.asked if t]  # not the checks
    step = [(6, 0), (6, None), (8, None)]  # rollouts, what the teacher writes, evaluation
    assert sampled[0] == (8, None) and sampled[1:4] == step
    assert {logprobs for count, logprobs in sampled if count == 8} == {None}
    for row in metrics(out)[1:-1]:
        if "loss" in row:
            assert 0 <= row["logprob_gap"] < 1e-3 and row["grad_norm"] > 0
    assert engine.calls.count("sleep") == engine.calls.count("generate")


def test_eval_has_one_engine_for_all_checkpoints(model, tokenizer, tmp_path, engines):
    with torch.no_grad():
        model.lm_head.weight[5:50] *= -1
    save_model(str(tmp_path / "second"), model, tokenizer)
    flags = "--backend vllm --problems 4 --samples 1 --temperature 0 --out".split()
    argv = ["--model", TINY, str(tmp_path / "second"), *flags, str(tmp_path / "e.json")]
    evaluation.main(argv)
    one, other = json.loads((tmp_path / "e.json").read_text())["responses"]["embedded"].values()
    assert len(engines) == 1 and one != other


@pytest.mark.skipif(not SOURCE, reason="vllm's source is not installed")
def test_vllm_has_the_calls_of_a_card():
    """Those that no test of the CPU build makes."""

    def methods(path, name):
        (folder,) = SOURCE.submodule_search_locations
        with open(os.path.join(folder, path)) as stream:
            nodes = ast.walk(ast.parse(stream.read()))
        (found,) = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
        found = [node for node in found.body if isinstance(node, ast.FunctionDef)]
        return {node.name: ast.unparse(node.args) for node in found}

    llm = methods("entrypoints/llm.py", "LLM")
    assert "level" in llm["sleep"] and "tags" in llm["wake_up"]
    for path in ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"):
        assert "weights_iterator" in methods(path, "GPUModelRunner")["reload_weights"]
