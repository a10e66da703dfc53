"""--lora: gradients, a teacher that is the student, what is pushed, saved, resumed; test_ranks.py
has it on two ranks.
"""

import types

import peft
import pytest
import safetensors.torch
import torch
import transformers

import lora
import opsd
import ranks
import vllm_sampler
from model import frozen_copy, response_hidden, save_model
from samplers import make_sampler
from tests import helpers
from tests.helpers import CPU, apart, some_rollouts


def with_adapters(model, dtype="float32"):
    """(model with adapters that do something, its frozen teacher, args)."""
    args = opsd.parse_args(["--lora", "4", "--dtype", dtype])
    ranks.prepare(model, args, CPU)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model, frozen_copy(model, args, CPU), args


def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule(model, tokenizer):
    plain, (model, teacher, args) = frozen_copy(model), with_adapters(model)
    rollouts = some_rollouts(tokenizer)
    helpers.with_teacher_rows(rollouts, [r.prompt_ids for r in rollouts])
    plain.requires_grad_(True).load_state_dict(dict(lora.merged(model, model.state_dict())))
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    expected = opsd.accumulate_gradients(plain, teacher, rollouts, args)
    assert loss == pytest.approx(expected, rel=1e-4) and loss > 0
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert len(trained) == 2 * 7 * len(model.model.layers)
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer):
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            whole = plain.get_parameter(f"{name}.weight").grad  # (out, in)
            assert apart(b.grad, 2 * whole @ a.T) < 1e-3 and apart(a.grad, 2 * b.T @ whole) < 1e-3


def test_the_samplers_get_merged_weights(model, tokenizer):
    prompts, start = [r.prompt_ids for r in some_rollouts(tokenizer)], frozen_copy(model)
    student, teacher, args = with_adapters(model)
    sampler = make_sampler(student, tokenizer, args)
    second = make_sampler(teacher, tokenizer, args, sampler)
    own, greedy = make_sampler(start, tokenizer, args), (prompts, 60, 0.0)
    before, own.model = own.sample(*greedy), student  # the adapted model itself generates
    expected = own.sample(*greedy)
    assert not own.copies and expected != before
    for each, its in ((sampler, expected), (second, before), (sampler, expected)):
        assert each.sample(*greedy) == its
    pushed = []
    llm = types.SimpleNamespace(
        collective_rpc=lambda _, kwargs: pushed.append(dict(kwargs["weights_iterator"])),
        reset_prefix_cache=lambda: True,
    )
    engine = types.SimpleNamespace(engine=dict(llm=llm, asleep=False), dtype=torch.bfloat16)
    for each, plain in ((student, sampler.engine["copy"]), (teacher, start)):
        vllm_sampler.VllmSampler.push(engine, each)
        assert pushed[-1].keys() == plain.state_dict().keys()
        for name, weight in plain.state_dict().items():
            assert torch.equal(pushed[-1][name], weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_the_start_and_peft_loads_what_is_saved(dtype, model, tokenizer, tmp_path):
    for weight in model.parameters():  # not the buffers; most checkpoints are bfloat16
        weight.data = weight.data.to(dtype)
    start, base = frozen_copy(model), frozen_copy(model.float())
    name = str(dtype).removeprefix("torch.")
    student, teacher, args = with_adapters(model, name)
    args.lora = 0
    ranks.prepare(start, args, CPU)
    rows = [r.row for r in some_rollouts(tokenizer)]
    with torch.no_grad():
        hidden = [response_hidden(each, rows) for each in (start, teacher, student)]  # (R, D)
    assert torch.equal(hidden[0], hidden[1]) and apart(hidden[2], hidden[0].float()) > 0.01
    for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
        assert mine is its and mine.dtype == (torch.float32 if mine.requires_grad else dtype)
    save_model(str(tmp_path), student, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(base) and plain.dtype == torch.float32
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert file.keys() == base.state_dict().keys()
    assert {weight.dtype for weight in file.values()} == {torch.float32}
    ids = torch.arange(40)[None]  # (1, T)
    with torch.no_grad():
        first, logits = base(ids).logits, plain(ids).logits  # (1, T, V)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert apart(adapted, logits) < 1e-5 and apart(adapted, first) > 0.01


MOE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
MOE.update(vocab_size=100, num_key_value_heads=2)


@pytest.mark.parametrize(
    "family, shape, refusal",
    [
        ("Mamba", dict(vocab_size=100, hidden_size=32, num_hidden_layers=1), "'out_proj' is incom"),
        ("Glm4Moe", dict(MOE, first_k_dense_replace=0), "leaves out layers.0.mlp.shared_experts"),
        ("Phimoe", MOE, None),  # its router is a subclass of Linear that returns two tensors
    ],
)
def test_a_family_gets_an_adapter_in_every_linear_layer_or_is_refused(
    family, shape, refusal, capsys
):
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if refusal is None:
        assert with_adapters(model)[0](torch.arange(4)[None]).logits.shape == (1, 4, 100)
        return
    with pytest.raises(SystemExit):
        with_adapters(model)
    assert refusal in capsys.readouterr().err
