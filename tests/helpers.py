"""What several test files use."""

import json
import os
import shutil
import sys

import numpy as np
import torch
import transformers

import opsd
import rlvr
import sft
import toy_model
from data import CONTEXTS, Problem, embedded_problems, render_prompt
from model import load_model
from rollout import Rollout
from run import HERE, Run

TINY = os.path.join(HERE, "tiny", "rlvr")
CPU = torch.device("cpu")

SMALL = "--batch 6 --max-new-tokens 90 --eval-problems 8 --threads 1".split()
WATCHED = ["--eval-every", "2", *SMALL]
STAGES = [
    (opsd, "--filter all --teacher every --refresh 3".split() + WATCHED),
    (rlvr, WATCHED),
    (sft, ["--batch", "4", "--threads", "1"]),
]


class Crash(Exception):
    pass


def crash_at(monkeypatch, step):
    """Makes the next run die in a step, after its line was logged, before its state is saved."""
    own = Run.save_state

    def save_state(self, number, *rest, **kwargs):
        if number == step:
            raise Crash
        own(self, number, *rest, **kwargs)

    monkeypatch.setattr(Run, "save_state", save_state)


def some_rollouts(tokenizer, count=6, seed=0):
    """Reference responses of different lengths: finished ones, and truncated ones in between."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for i, problem in enumerate(embedded_problems(count, seed)):
        text = toy_model.reference_trace(problem, rng) + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False).input_ids
        finished = i % 3 < 2
        r = Rollout(problem, render_prompt(tokenizer, problem), ids, finished, outcome="correct")
        if not finished:
            r.response_ids, r.outcome = ids[:-7], "truncated"
        rollouts.append(r)
    return rollouts


def with_teacher_rows(rollouts, prompts):
    """Puts plain teacher rows into the rollouts; returns them."""
    for r, prompt in zip(rollouts, prompts, strict=True):
        r.teacher_row = opsd.teacher_row(prompt, r.response_ids)
    return rollouts


def read_rollouts(tokenizer, context="solution"):
    """`some_rollouts` with the teacher's rows."""
    rollouts = some_rollouts(tokenizer)
    texts = CONTEXTS[context](rollouts, None, None)
    prompts = [render_prompt(tokenizer, r.problem, c) for r, c in zip(rollouts, texts, strict=True)]
    return with_teacher_rows(rollouts, prompts)


def loss_and_gradient(model, teacher, rollouts, flags=""):
    """The step's loss as opsd.py adds it up, in one micro-batch, and the flat gradient."""
    args = opsd.parse_args(f"--filter all --micro-tokens {10**9} {flags}".split())
    model.zero_grad()
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    for r in rollouts:
        assert {len(values) for values in r.measures.values()} == {len(r.response_ids)}
    return loss, flat_gradient(model)


def dense_loss(student, teacher, rollouts):
    """Eq. 1 row by row without padding, from full logits: position len(prompt) + t - 1 predicts
    token t.
    """
    means = []
    for r in rollouts:
        s, t = (
            model(torch.tensor([prompt + ids], device=model.device)).logits[0, len(prompt) - 1 : -1]
            for model, (prompt, ids) in ((student, r.row), (teacher, r.teacher_row))
        )  # (T, V) each
        s, t = s.log_softmax(-1), t.detach().log_softmax(-1)
        means.append((s.exp() * (s - t)).sum(-1).mean())
    return torch.stack(means).mean()


def check_greedy(model, prompts, samples):
    """Each token is the best one of the model's own logits, without cache and padding."""
    for prompt, (ids, _) in zip(prompts, samples, strict=True):
        row = torch.tensor([prompt + ids], device=model.device)  # (1, T)
        with torch.no_grad():
            logits = model(row).logits[0, len(prompt) - 1 : -1]  # (R, V)
        chosen = logits.gather(-1, row[0, len(prompt) :, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-3  # rounding may decide


def graded(outcomes, length):
    """One rollout an outcome, each a problem of its own."""
    rollouts = []
    for i, outcome in enumerate(outcomes):
        r = Rollout(Problem(str(i), "1"), [], [0] * length, True)
        r.outcome = r.reason = outcome
        rollouts.append(r)
    return rollouts


def apart(value, other):
    """Norm of the difference over the norm of `other`. Bounds on single elements would measure the
    rounding of the smallest ones, which differs between machines.
    """
    return ((value - other).norm() / other.norm()).item()


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def random_model(kind, tokenizer, path, **config):
    """Saves a random model of a transformers configuration class, with the embedded tokenizer."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    shape |= dict(bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**shape, **config}))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_tied(tokenizer, path):
    shape = dict(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    kind = transformers.LlamaConfig
    random_model(kind, tokenizer, path, tie_word_embeddings=True, **shape)


def changed_json(path, **entries):
    """Sets entries of a JSON file."""
    write(path, json.dumps({**json.loads(path.read_text()), **entries}))


def changed_model(path, **config):
    """A copy of the embedded model with other entries in tokenizer_config.json."""
    shutil.copytree(TINY, path)
    changed_json(path / "tokenizer_config.json", **config)
    return str(path)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read_lines(path):
    with open(path) as stream:
        return [json.loads(line) for line in stream]


def metrics(path):
    return read_lines(os.path.join(path, "metrics.jsonl"))


def weights(path):
    return torch.cat([p.flatten() for p in load_model(str(path), CPU)[0].parameters()]).detach()


def without_times(row):
    """A line of a log without what may differ between two runs of one experiment."""
    return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}


def lines_without_times(path):
    """The logs of a run, without the settings' line."""
    logs = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".jsonl"):
            rows = read_lines(os.path.join(path, name))
            logs[name] = [without_times(row) for row in rows if "args" not in row]
    return logs


def torchrun(*command):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
