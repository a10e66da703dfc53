"""Other people's models: builds one of each family at random, tiny, and has opsd.py sample, train,
save and resume it; then greedy responses against the model's own logits. docs/models.md has the
table.

    python -m lab.families [NAME ...]
"""

import contextlib
import io
import os
import tempfile

if __name__ == "__main__":
    from launch import start

import torch
import transformers

import opsd
import samplers
from data import embedded_problems, render_prompt
from model import load_model
from run import Parser, fail, tiny

EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
ROUTED = dict(EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
LATENT.update(v_head_dim=16, qk_head_dim=16, head_dim=8)
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16
)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
)
# Name of the configuration's class: what a tiny one needs besides SHAPE.
FAMILIES = {
    **{name: {} for name in "Llama Qwen2 Phi3 Olmo2 Olmo3 SmolLM3 Exaone4 Apertus".split()},
    **{name: {} for name in "StableLm Nemotron GPTNeoX Mistral Ministral3 Qwen3 Glm4".split()},
    **{name: {} for name in "Ernie4_5 HunYuanDenseV1 SeedOss Gemma Gemma3Text Gemma4Text".split()},
    "Gemma2": dict(final_logit_softcapping=None),
    "Granite": dict(logits_scaling=1.0),
    "Qwen3Moe": dict(EXPERTS, num_experts=4),
    "Mixtral": dict(num_local_experts=2),
    "Phimoe": dict(num_local_experts=2),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2),
    "DeepseekV3": dict(ROUTED, **LATENT, first_k_dense_replace=1),
    "Glm4Moe": dict(ROUTED, first_k_dense_replace=0),
    "Mamba": dict(state_size=8),
    "Mamba2": dict(num_heads=4, state_size=8, n_groups=1, expand=2, chunk_size=16),
    "Lfm2": dict(layer_types=["conv", "full_attention"], conv_L_cache=3),
    "Jamba": dict(num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1),
    "Bamba": dict(MAMBA, attn_layer_indices=[1]),
    "FalconH1": dict(MAMBA, mamba_d_ssm=64, lm_head_multiplier=1.0),
    "NemotronH": dict(
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
    ),
    "GraniteMoeHybrid": dict(
        MAMBA, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=64
    ),
    "Qwen3Next": dict(DELTA, num_experts=0, mlp_only_layers=[0, 1]),
    "Qwen3_5Text": DELTA,
    "MiniMax": dict(layer_types=DELTA["layer_types"], num_local_experts=2, block_size=16),
    # Refused.
    "Cohere2": {},
    "Llama4Text": dict(num_local_experts=2, intermediate_size_mlp=64),
}
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SHAPE.update(num_key_value_heads=2, head_dim=16, max_position_embeddings=1024)
SHAPE.update(bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
RUN = "--filter all --batch 6 --max-new-tokens 50 --eval-problems 0 --threads 1".split()


def build(name, path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("rlvr"))
    config = getattr(transformers, name + "Config")
    config = config(**{**SHAPE, "vocab_size": len(tokenizer), **FAMILIES[name]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def worst_choice(path):
    """By how much (in logits) a greedily sampled token was ever below the model's own best."""
    model, tokenizer = load_model(path, torch.device("cpu"))
    sampler = samplers.make_sampler(model, tokenizer, opsd.parse_args(["--dtype", "float32"]))
    prompts, worst = [render_prompt(tokenizer, p) for p in embedded_problems(4, 0)], 0.0
    samples = sampler.sample(prompts, 50, temperature=0)
    for prompt, (ids, _) in zip(prompts, samples, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # (tokens, V)
        chosen = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, (logits.max(-1).values - chosen).max().item())
    return worst


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; none = all")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FAMILIES:
            fail(f"{name}: not one of {', '.join(FAMILIES)}")
    return args


def main(argv=None):
    for name in parse_args(argv).names or FAMILIES:
        said = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            model, out = os.path.join(folder, "model"), os.path.join(folder, "run")
            flags = [*RUN, "--model", model, "--out", out]
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    build(name, model)
                    opsd.main([*flags, "--steps", "1"])
                    opsd.main([*flags, "--steps", "2", "--resume"])
                    worst = worst_choice(out)
                print(f"{name}: " + ("works" if worst < 1e-3 else f"{worst:.3f} below the best"))
            except SystemExit:
                print(f"{name}: {said.getvalue().strip().splitlines()[-1]}")


if __name__ == "__main__":
    start(main)
