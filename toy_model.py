"""What sft.py makes of nothing: the embedded world's reference traces, tokenizer and model."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toy import compute, read_steps

# ------------------------------------------------------------------------------------------------
# Reference traces, for sft.py. All of them end right.

CONTEXTS = ("none", "solution", "answer", "instruction")  # those that the model has seen

# What sft.py draws from: (share, context in the prompt, thinking).
MIXTURE = [
    (0.30, "none", True),
    (0.50, "solution", True),
    (0.06, "answer", True),
    (0.06, "instruction", True),
    (0.05, "none", False),
    (0.03, "solution", False),
]

EASY_CHECK = 0.85  # chance that a trace re-checks an easy step (never needed), ...
EASY_CHECK_AGAIN = 0.6  # ... and then once more
CONTEXT_EASY_CHECK = 0.02  # the same with any context: all that makes those traces shorter
HARD_CHECK = 0.3  # chance of a check where the quick scan was right; where it was wrong, always
CONTEXT_HARD_CHECK = 0.8  # the same with any context


def reference_trace(problem, rng, context="none", thinking=True):
    """One reference response. It always ends in the right answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if not thinking:
        return box
    lines = [
        hard_step(rng, *step, context) if step[3] else easy_step(rng, *step, context)
        for step in read_steps(problem)
    ]
    return "<think>\n" + "\n".join(lines) + "\n</think>\n\n" + box


def easy_step(rng, a, op, digit, scans, c, context):
    line = f"{a:02d}{op}{digit}={c:02d}"
    if rng.random() >= (EASY_CHECK if context == "none" else CONTEXT_EASY_CHECK):
        return line
    checks = 2 if rng.random() < EASY_CHECK_AGAIN else 1
    return line + checks * f" check {line}"


def hard_step(rng, a, op, digit, scans, c, context):
    """The first look takes the quick scan; a check settles on a digit, always the right one."""
    first = int(scans[0])
    line = f"{a:02d}{op}{first}={compute(a, op, first):02d}"
    check = HARD_CHECK if context == "none" else CONTEXT_HARD_CHECK
    if first == digit and rng.random() >= check:
        return line
    return line + f" wait {scans} so {a:02d}{op}{digit}={c:02d}"


# ------------------------------------------------------------------------------------------------
# Model and tokenizer

# The shape of Qwen3's: with thinking off the prompt ends in an empty think block; with thinking on
# the model opens it itself.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


def build_tokenizer(corpus):
    """Byte-level BPE of 512 tokens, trained on `corpus` (texts). Digits and signs stay single."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=510,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text.replace("<think>", "").replace("</think>", "") for text in corpus]
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer, seed):
    """The untrained embedded model: a standard Llama, float32, 0.41 million parameters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=6,
            intermediate_size=256,
            max_position_embeddings=2048,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
