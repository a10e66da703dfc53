"""Somebody else's model: works, or is refused in one line before anything is trained.

Each model is built here, at random and tiny. docs/models.md has the families.
"""

import copy
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import opsd
import samplers
import sft
from data import Problem, embedded_problems, render_prompt
from model import load_model, sampled_logps, save_model
from tests.helpers import (
    CPU,
    SMALL,
    TINY,
    changed_json,
    changed_model,
    check_greedy,
    metrics,
    random_model,
    write,
)

SHORT = [*"--filter all --steps 1 --eval-problems 0".split(), *SMALL[:4], "--threads", "1"]


def refused(path, capsys):
    """What load_model says of a model that it refuses: one line."""
    with pytest.raises(SystemExit):
        load_model(str(path), CPU)
    *bars, error, end = capsys.readouterr().err.split("\n")  # bars: of transformers
    assert error.startswith(f"error: --model {path}: ") and not end
    return error


def changed_weights(path, change):
    """The weights of the model there go through `change`, a dict to a dict."""
    weights = change(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata=dict(format="pt"))


@pytest.fixture
def other(tmp_path):
    """The folder of a copy of the embedded model, to be changed."""
    return shutil.copytree(TINY, tmp_path / "m")


def one_more_token(path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(path)


def without_eos(path):
    os.remove(path / "generation_config.json")
    changed_json(path / "config.json", eos_token_id=None)
    changed_json(path / "tokenizer_config.json", eos_token=None)


def pickled(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    os.remove(path / "model.safetensors")


def with_weights(change):
    return lambda path: changed_weights(path, change)


def without(part):
    return with_weights(lambda w: {name: w[name] for name in w if part not in name})


def with_template(text):
    return lambda path: write(path / "chat_template.jinja", text)


PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "change, says",
    [
        (
            with_weights(lambda w: {f"module.{name}": w[name] for name in w}),
            "module.lm_head.weight",
        ),
        (without("lm_head"), "lm_head.weight"),
        (without("layers.1.mlp.up"), "model.layers.1.mlp.up_proj.weight"),
        (with_weights(lambda w: {**w, "model.norm.weight": torch.ones(4)}), "model.norm.weight"),
        (
            with_weights(lambda w: {**w, "model.norm.weight": w["model.norm.weight"] / 0}),
            "model.norm.weight holds values that are not finite",
        ),
        (pickled, "safetensors"),
        (without_eos, "end-of-sequence"),
        (one_more_token, "394 tokens, the model 393"),
        (with_template(PARTS + "<|im_start|>assistant\n"), "drops the user's text"),
        (with_template("{{ raise_exception('only tools') }}"), "its chat template fails"),
        (lambda path: os.remove(path / "chat_template.jinja"), "its chat template fails"),
    ],
)
def test_what_would_be_another_model_is_refused(change, says, other, capsys):
    change(other)
    assert says in refused(other, capsys)


def test_a_models_own_code_is_not_run(other, tmp_path, capsys):
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    changed_json(other / "config.json", model_type="mine", auto_map=classes)
    write(other / "mine.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(other, capsys)
    assert not os.path.exists(tmp_path / "ran")


def test_capped_and_scaled_logits_are_told_by_the_config(tokenizer, tmp_path, capsys):
    path = random_model(transformers.Gemma2Config, tokenizer, tmp_path / "m", head_dim=16)
    assert "final_logit_softcapping" in refused(path, capsys)


def test_what_cannot_be_saved_is_known_before_the_first_step(other, tmp_path, capsys, monkeypatch):
    changed_json(other / "generation_config.json", pad_token_id=-1, temperature=0.6, top_p=0.9)
    saved = tmp_path / "saved"
    save_model(str(saved), *load_model(str(other), CPU))
    assert load_model(str(saved), CPU)[0].generation_config.temperature == 0.6
    umask = os.umask(0)
    os.umask(umask)
    for file in saved.iterdir():  # others can read them
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file

    def full(self, *args, **kwargs):
        raise OSError("cannot")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    assert "cannot be saved" in refused(TINY, capsys)


# ------------------------------------------------------------------------------------------------
# Weights


def test_weights_that_no_layer_takes_are_named_and_left_out(other, capsys):
    changed_weights(other, lambda w: {**w, "mtp.weight": torch.ones(4)})
    load_model(str(other), CPU)
    assert "mtp.weight" in capsys.readouterr().out


def test_a_head_of_its_own_stays_one_though_the_config_says_tied(other, tokenizer):
    changed_json(other / "config.json", tie_word_embeddings=True)
    model, _ = load_model(str(other), CPU)
    own = load_file(other / "model.safetensors")
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, own["model.embed_tokens.weight"])
    args = opsd.parse_args(["--dtype", "bfloat16"])
    sampler = samplers.make_sampler(model, tokenizer, args)
    sampler.push(model)
    assert torch.equal(sampler.engine["copy"].lm_head.weight, own["lm_head.weight"].bfloat16())


def test_the_samplers_copy_has_the_models_buffers_and_the_gap_would_tell(
    tokenizer, tmp_path, monkeypatch
):
    experts = dict(n_routed_experts=4, num_experts_per_tok=1, n_shared_experts=1, n_group=1)
    experts |= dict(topk_group=1, first_k_dense_replace=0, moe_intermediate_size=32, head_dim=16)
    kind, path = transformers.Glm4MoeConfig, tmp_path / "m"
    random_model(kind, tokenizer, path, initializer_range=0.5, **experts)
    bias = torch.tensor([9.0, 0.0, 0.0, -9.0])  # decides who is asked
    changed_weights(
        path, lambda w: {k: bias.clone() if "correction_bias" in k else w[k] for k in w}
    )
    flags = [*SHORT, "--model", str(path), "--dtype", "bfloat16", "--out"]
    opsd.main([*flags, str(tmp_path / "run")])
    gap = metrics(tmp_path / "run")[1]["logprob_gap"]
    assert gap < 0.15
    monkeypatch.setattr(samplers, "tensors_of", lambda model: dict(model.named_parameters()))
    opsd.main([*flags, str(tmp_path / "other")])
    assert metrics(tmp_path / "other")[1]["logprob_gap"] > 2 * gap


# ------------------------------------------------------------------------------------------------
# Tokenizers and templates


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path, capsys):
    path = changed_model(tmp_path / "m", tokenizer_class="LlamaTokenizerFast")
    try:
        _, tokenizer = load_model(path, CPU)
    except SystemExit:
        assert "changes text" in capsys.readouterr().err
    else:  # this transformers keeps the file as it is
        assert tokenizer.decode(tokenizer("a b\n\nc").input_ids) == "a b\n\nc"


def test_ordinary_text_is_never_rewritten_and_control_tokens_are(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["    ", "\n\n", "ö", "<b>", "<|User|>"])
    other.chat_template = other.chat_template.replace("assistant", "<|User|>")
    text = "a    b\n\nschön <b>x</b>"
    assert data.plain(other, text) == text
    assert data.plain(other, "<|User|><|im_end|><think></think>") == (
        "< |User|>< |im_end|>< think>< /think>"
    )


def test_sft_targets_hold_one_end_and_one_think_block(tokenizer, monkeypatch):
    problem = Problem("q", "2", "<think>\n1+1<|im_end|></think>\n\n=2")
    text = "1+1< |im_end|>\n</think>\n\n\\boxed{2}"
    prompt, response = sft.real_row(tokenizer, problem, 2)
    assert response[-1] == 2 and tokenizer.decode(response[:-1]) == f"<think>\n{text}"
    opened = prompt + tokenizer("<think>\n").input_ids  # by the template
    monkeypatch.setattr(data, "render_prompt", lambda *args: opened)
    assert tokenizer.decode(sft.real_row(tokenizer, problem, 2)[1][:-1]) == text


def test_a_template_with_todays_date_or_another_name_for_thinking(tokenizer):
    """The date is no part of the experiment; thinking is switched by either name."""
    other, problem = copy.deepcopy(tokenizer), embedded_problems(1, 0)[0]
    other.chat_template = "{{ strftime_now('%d %b %Y %S') }} " + tokenizer.chat_template
    assert "01 Jan 2026 00" in other.decode(render_prompt(other, problem))
    other.chat_template = tokenizer.chat_template.replace("enable_thinking", "thinking")
    for thinking in (True, False):
        expected = render_prompt(tokenizer, problem, "", thinking)
        assert render_prompt(other, problem, "", thinking) == expected
    data.require_thinking_switch(other, False)


def test_a_turns_end_at_which_the_model_does_not_stop_is_told(tmp_path, capsys):
    path = changed_model(tmp_path / "m", eos_token="<|endoftext|>")
    changed_json(tmp_path / "m" / "generation_config.json", eos_token_id=0)
    load_model(path, CPU)
    assert "ends a turn with <|im_end|>, at which it does not stop" in capsys.readouterr().out
    load_model(TINY, CPU)
    assert "does not stop" not in capsys.readouterr().out


def test_named_templates_are_saved_with_the_model(other, tmp_path):
    (other / "additional_chat_templates").mkdir()
    write(other / "additional_chat_templates" / "tool_use.jinja", "{{ messages[0].content }}")
    for _ in range(2):  # also over an earlier one
        save_model(str(tmp_path / "run"), *load_model(str(other), CPU))
        _, saved = load_model(str(tmp_path / "run"), CPU)
        assert set(saved.chat_template) == {"default", "tool_use"}


# ------------------------------------------------------------------------------------------------
# Families

LINEAR = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_expand=2, mamba_n_groups=1)
FAMILIES = [
    (
        transformers.Mamba2Config,
        dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, chunk_size=16),
    ),
    (transformers.Lfm2Config, dict(layer_types=["conv", "full_attention"], conv_L_cache=3)),
    (
        transformers.Qwen3NextConfig,
        dict(LINEAR, linear_num_value_heads=2, head_dim=16, num_experts=0, mlp_only_layers=[0, 1])
        | dict(layer_types=["linear_attention", "full_attention"]),
    ),
    (
        transformers.GraniteMoeHybridConfig,
        dict(MAMBA, mamba_chunk_size=16, num_local_experts=0, shared_intermediate_size=64)
        | dict(layer_types=["mamba", "attention"], position_embedding_type="nope"),
    ),
    (transformers.Gemma2Config, dict(head_dim=16, final_logit_softcapping=None)),
    (transformers.Gemma3TextConfig, dict(head_dim=16)),
]


@pytest.mark.parametrize("kind, config", FAMILIES)
def test_families_sample_train_and_save(kind, config, tokenizer, tmp_path):
    path = random_model(kind, tokenizer, tmp_path / "m", **config)
    out = str(tmp_path / "run")
    opsd.main([*SHORT, "--max-new-tokens", "50", "--model", path, "--out", out])
    assert metrics(out)[1]["grad_norm"] > 0
    first, trained = load_model(path, CPU)[0], load_model(out, CPU)[0]
    assert first.state_dict().keys() == trained.state_dict().keys()
    # Greedy responses beyond a segment are the model's own, whichever rows ended before.
    sampler = samplers.make_sampler(first, tokenizer, opsd.parse_args(["--dtype", "float32"]))
    prompts = [render_prompt(tokenizer, p) for p in embedded_problems(4, 0)]
    samples = sampler.sample(prompts, 50, temperature=0)
    check_greedy(first, prompts, samples)


@pytest.mark.parametrize(
    "longest, rope",
    [
        (128, dict(rope_type="dynamic", factor=4.0)),
        (
            512,
            dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8)
            | dict(original_max_position_embeddings=128),
        ),
    ],
)
def test_rotary_embeddings_that_look_at_the_longest_row_are_kept_short_of_it(
    longest, rope, tokenizer, tmp_path, capsys
):
    config = dict(rope_parameters=dict(rope, rope_theta=1e4), max_position_embeddings=longest)
    path = random_model(transformers.LlamaConfig, tokenizer, tmp_path / "m", **config)
    model, _ = load_model(path, CPU)
    assert "128" in capsys.readouterr().out
    sampler = samplers.make_sampler(model, tokenizer, opsd.parse_args(["--dtype", "float32"]))
    assert sampler.limit == 128
    rows = [([5] * 20, [6] * 10), ([7] * 60, [8] * 60)]
    together, alone = sampled_logps(model, rows), sampled_logps(model, rows[:1])
    torch.testing.assert_close(together[:10], alone, rtol=1e-4, atol=1e-5)


def test_composite_configs_have_their_sizes_in_the_text_part(tokenizer, tmp_path):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=2, vocab_size=512, max_position_embeddings=256, head_dim=16)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, _ = load_model(str(tmp_path / "m"), CPU)
    sampler = samplers.make_sampler(loaded, tokenizer, opsd.parse_args(["--dtype", "float32"]))
    assert sampler.limit == 256
