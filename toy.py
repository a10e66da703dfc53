"""The embedded world, small enough for a laptop: chains of sums, some with a digit hard to read.

    53 +4 -74? +2, result?

Easy problems add and subtract digits. In a hard one, one digit is smudged: the question shows two
scans of it, a quick one, right with probability QUICK_RIGHT, and a careful one, right with
CAREFUL_RIGHT. A first look takes the quick scan; a check looks at both and settles on a digit.
So checks are redundant on easy steps, pay on hard ones, and some failures are nobody's slip:
only a reference could tell. docs/world.md has the story.

A leaf: it imports no other file of the project. A problem here is anything with `question` and
`solution`; data.py makes a Problem of each row, as it does of a line of JSONL.
"""

import re
import zlib

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ------------------------------------------------------------------------------------------------
# Problems

HARD_SHARE = 0.7
QUICK_RIGHT = 0.3
CAREFUL_RIGHT = 0.7


def problem_rows(count, seed, held_out=False):
    """`count` rows (question, answer, solution, difficulty) from a seed.

    A hash of the question decides the side, so no seed can put one question on both.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    rows = []
    while len(rows) < count:
        row = problem_row(rng, "hard" if rng.random() < HARD_SHARE else "easy")
        if (zlib.crc32(row["question"].encode()) % 8 == 0) == held_out:
            rows.append(row)
    return rows


def problem_row(rng, difficulty):
    start = value = int(rng.integers(10, 90))
    count = int(rng.integers(2, 5))
    smudged = int(rng.integers(count)) if difficulty == "hard" else None
    asked, worked = [], []
    for i in range(count):
        # Every digit keeps the value within two digits.
        op = "+" if value < 10 or (value < 90 and rng.random() < 0.5) else "-"
        digit = int(rng.integers(2, 10))
        asked.append(op + (two_scans(rng, digit) + "?" if i == smudged else str(digit)))
        worked.append(f"{value:02d}{op}{digit}={compute(value, op, digit):02d}")
        value = compute(value, op, digit)
    return dict(
        question=f"{start:02d} {' '.join(asked)}, result?",
        answer=f"{value:02d}",
        solution=", ".join(worked),
        difficulty=difficulty,
    )


def two_scans(rng, digit):
    others = [d for d in range(2, 10) if d != digit]
    scans = [
        digit if rng.random() < p else rng.choice(others) for p in (QUICK_RIGHT, CAREFUL_RIGHT)
    ]
    return "".join(map(str, scans))


def compute(value, op, digit):
    return value + digit if op == "+" else value - digit


def read_steps(problem):
    """[(value before, op, true digit, scans or "", value after), ...] of a problem."""
    asked = problem.question.split(",")[0].split()[1:]
    scans = [step[1:-1] if step.endswith("?") else "" for step in asked]
    return [
        (int(step[:2]), step[2], int(step[3]), smudge, int(step[5:]))
        for step, smudge in zip(problem.solution.split(", "), scans, strict=True)
    ]


def worked(trace):
    """The steps that a trace settled on, the last of each line, written as solutions are: the model
    cannot read them otherwise.
    """
    return ", ".join(re.findall(r"\S+$", trace, re.MULTILINE))


def wrong_reference(problem):
    """(solution, answer) with one digit read wrong, and every sum of it right; None where no digit
    keeps the values within two digits.

    The smudged digit is what a wrong scan says, the careful one first; where both are right, and at
    the first digit of an easy problem, the next other digit that fits.
    """
    steps = read_steps(problem)
    at = next((i for i, step in enumerate(steps) if step[3]), 0)
    _, _, digit, scans, _ = steps[at]
    others = sorted(set(range(2, 10)) - {digit}, key=lambda other: abs(other - digit))
    for other in [*map(int, reversed(scans)), *others]:
        value, worked = steps[0][0], []
        for i, (_, op, right, _, _) in enumerate(steps):
            before, read = value, other if i == at else right
            value = compute(before, op, read)
            worked.append(f"{before:02d}{op}{read}={value:02d}")
        if other != digit and all(re.fullmatch(r"\d\d.\d=\d\d", step) for step in worked):
            return ", ".join(worked), f"{value:02d}"
    return None


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


def draw_mixture(rng):
    """(context, thinking) of one training trace."""
    _, context, thinking = MIXTURE[rng.choice(len(MIXTURE), p=[share for share, _, _ in MIXTURE])]
    return context, thinking


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
