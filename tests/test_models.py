"""Somebody else's model: works, or is refused in one line before anything is trained.

Each model is built here, at random and tiny. docs/models.md has the families.
"""

import json
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
from model import load_model, sampled_logps
from tests.helpers import CPU, SMALL, TINY, changed_model, metrics, write

SHORT = [*"--filter all --steps 1 --eval-problems 0".split(), *SMALL[:4], "--threads", "1"]


def refused(path, capsys):
    """What load_model says of a model that it refuses: one line."""
    with pytest.raises(SystemExit):
        load_model(str(path), CPU)
    *bars, error, end = capsys.readouterr().err.split("\n")  # bars: of transformers
    assert error.startswith(f"error: --model {path}: ") and not end
    return error


def changed_weights(path, change):
    """A copy of the embedded model whose weights went through `change`, a dict to a dict."""
    shutil.copytree(TINY, path)
    weights = load_file(path / "model.safetensors")
    save_file(change(weights), path / "model.safetensors", metadata=dict(format="pt"))
    return path


def changed_json(path, **entries):
    record = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def random_model(kind, tokenizer, path, tied=False, **config):
    """Saves a random model of a transformers configuration class, with the embedded tokenizer."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    shape |= dict(bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**shape, **config}))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# ------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "module.lm_head.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "lm_head.weight"),
        (
            lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up" not in k},
            "model.layers.1.mlp.up_proj.weight",
        ),
        (lambda w: {**w, "model.norm.weight": torch.ones(4)}, "model.norm.weight"),
    ],
)
def test_weights_that_a_checkpoint_lacks_are_named(change, says, tmp_path, capsys):
    assert says in refused(changed_weights(tmp_path / "m", change), capsys)


def test_weights_that_no_layer_takes_are_named_and_left_out(tmp_path, capsys):
    path = changed_weights(tmp_path / "m", lambda w: {**w, "mtp.weight": torch.ones(4)})
    load_model(str(path), CPU)
    assert "mtp.weight" in capsys.readouterr().out


def test_a_head_of_its_own_stays_one_though_the_config_says_tied(tmp_path, tokenizer):
    path = changed_weights(tmp_path / "m", lambda w: w)
    changed_json(path / "config.json", tie_word_embeddings=True)
    model, _ = load_model(str(path), CPU)
    own = load_file(path / "model.safetensors")
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, own["model.embed_tokens.weight"])
    args = opsd.parse_args(["--dtype", "bfloat16"])
    sampler = samplers.make_sampler(model, tokenizer, args)
    sampler.push(model)
    assert torch.equal(sampler.engine["copy"].lm_head.weight, own["lm_head.weight"].bfloat16())


def test_the_samplers_copy_has_the_models_buffers_and_the_gap_would_tell(
    tokenizer, tmp_path, monkeypatch
):
    path = random_model(
        transformers.Glm4MoeConfig,
        tokenizer,
        tmp_path / "m",
        n_routed_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        n_shared_experts=1,
        head_dim=16,
        initializer_range=0.5,
    )
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for name in [name for name in weights if "correction_bias" in name]:
        weights[name] = torch.tensor([9.0, 0.0, 0.0, -9.0])  # decides who is asked
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata=dict(format="pt"))
    flags = [*SHORT, "--model", path, "--dtype", "bfloat16", "--out"]
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


def test_a_template_that_drops_the_users_text_is_refused(tmp_path, capsys):
    path = changed_model(tmp_path / "m")
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    write(tmp_path / "m" / "chat_template.jinja", parts + "<|im_start|>assistant\n")
    assert "drops the user's text" in refused(path, capsys)


def test_ordinary_text_is_never_rewritten_and_control_tokens_are(tmp_path, tokenizer):
    path = tmp_path / "m"
    shutil.copytree(TINY, path)
    other = transformers.AutoTokenizer.from_pretrained(path)
    other.add_tokens(["    ", "\n\n", "ö", "<b>", "<|User|>"])
    other.chat_template = other.chat_template.replace("assistant", "<|User|>")
    text = "a    b\n\nschön <b>x</b>"
    assert data.plain(other, text) == text
    assert data.plain(other, "<|User|><|im_end|><think></think>") == (
        "< |User|>< |im_end|>< think>< /think>"
    )


def test_sft_targets_hold_one_end_and_one_think_block(tokenizer):
    problem = Problem("q", "2", "<think>1+1</think>=2<|im_end|>")
    _, response = sft.real_row(tokenizer, problem, 2)
    text = tokenizer.decode(response)
    assert response.count(2) == 1 and response[-1] == 2
    assert text.count("<think>") == text.count("</think>") == 1


def test_the_date_in_a_template_is_no_part_of_the_experiment(tmp_path, tokenizer):
    path = changed_model(tmp_path / "m")
    dated = "{{ strftime_now('%d %b %Y %S') }} " + tokenizer.chat_template
    write(tmp_path / "m" / "chat_template.jinja", dated)
    other = transformers.AutoTokenizer.from_pretrained(path)
    assert "01 Jan 2026 00" in other.decode(render_prompt(other, embedded_problems(1, 0)[0]))


def test_thinking_is_switched_by_either_name(tmp_path, tokenizer):
    path = changed_model(tmp_path / "m")
    template = tokenizer.chat_template.replace("enable_thinking", "thinking")
    write(tmp_path / "m" / "chat_template.jinja", template)
    other = transformers.AutoTokenizer.from_pretrained(path)
    problem = embedded_problems(1, 0)[0]
    for thinking in (True, False):
        assert render_prompt(other, problem, "", thinking) == render_prompt(
            tokenizer, problem, "", thinking
        )
    data.require_thinking_switch(other, False)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, capsys):
    path = tmp_path / "m"
    shutil.copytree(TINY, path)
    other = transformers.AutoTokenizer.from_pretrained(path)
    other.add_tokens(["<extra>"])
    other.save_pretrained(path)
    error = refused(path, capsys)
    assert "394 tokens, the model 393" in error


def test_a_turns_end_at_which_the_model_does_not_stop_is_told(tmp_path, capsys):
    path = changed_model(tmp_path / "m", eos_token="<|endoftext|>")
    changed_json(tmp_path / "m" / "generation_config.json", eos_token_id=0)
    load_model(path, CPU)
    assert "ends a turn with <|im_end|>, at which it does not stop" in capsys.readouterr().out
    load_model(TINY, CPU)
    assert "does not stop" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Saving is tried before the first step


def test_named_templates_are_saved_with_the_model(tmp_path, tokenizer):
    path = tmp_path / "m"
    shutil.copytree(TINY, path)
    (path / "additional_chat_templates").mkdir()
    write(path / "additional_chat_templates" / "tool_use.jinja", "{{ messages[0].content }}")
    for _ in range(2):  # also over an earlier one
        opsd.main([*SHORT, "--model", str(path), "--overwrite", "--out", str(tmp_path / "run")])
        _, saved = load_model(str(tmp_path / "run"), CPU)
        assert set(saved.chat_template) == {"default", "tool_use"}


def test_what_cannot_be_saved_is_known_before_the_first_step(tmp_path, capsys, monkeypatch):
    path = tmp_path / "m"
    shutil.copytree(TINY, path)
    changed_json(path / "generation_config.json", pad_token_id=-1, temperature=0.6, top_p=0.9)
    opsd.main([*SHORT, "--model", str(path), "--out", str(tmp_path / "run")])

    def full(self, *args, **kwargs):
        raise OSError("cannot")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    assert "cannot be saved" in refused(TINY, capsys)


# ------------------------------------------------------------------------------------------------
# Families

FAMILIES = {
    "mamba2": (
        transformers.Mamba2Config,
        dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, chunk_size=16),
    ),
    "lfm2": (transformers.Lfm2Config, dict(layer_types=["conv", "full_attention"], conv_L_cache=3)),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        dict(
            layer_types=["linear_attention", "full_attention"],
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            num_experts=0,
            mlp_only_layers=[0, 1],
        ),
    ),
    "granite_hybrid": (
        transformers.GraniteMoeHybridConfig,
        dict(
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_expand=2,
            mamba_n_groups=1,
            mamba_chunk_size=16,
            num_local_experts=0,
            shared_intermediate_size=64,
            position_embedding_type="nope",
        ),
    ),
    "gemma2": (transformers.Gemma2Config, dict(head_dim=16, final_logit_softcapping=None)),
    "gemma3": (transformers.Gemma3TextConfig, dict(head_dim=16)),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_sample_train_and_save(name, tokenizer, tmp_path):
    kind, config = FAMILIES[name]
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
    for prompt, (ids, _) in zip(prompts, samples, strict=True):
        logits = first(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.max(-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert best.max() < 1e-3


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="dynamic", factor=4.0, rope_theta=1e4),
        dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0] * 8,
            long_factor=[4.0] * 8,
            original_max_position_embeddings=128,
        ),
    ],
)
def test_rotary_embeddings_that_look_at_the_longest_row_are_kept_short_of_it(
    rope, tokenizer, tmp_path, capsys
):
    config = dict(rope_parameters=rope, max_position_embeddings=128)
    if rope["rope_type"] == "longrope":
        config["max_position_embeddings"] = 512
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


def test_capped_and_scaled_logits_are_told_by_the_config(tokenizer, tmp_path, capsys):
    path = random_model(transformers.Gemma2Config, tokenizer, tmp_path / "m", head_dim=16)
    assert "final_logit_softcapping" in refused(path, capsys)
