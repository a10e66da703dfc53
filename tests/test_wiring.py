"""Wiring: what main hands to the parts. Short runs are recorded, and all that their flags promise
is computed again from the records: row by row, from full logits in float64, by formulas written
out here.
"""

import json
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import data
import eval as evaluation
import model as modelling
import opsd
import rlvr
import rollout
import run
import sft
import toy
from data import embedded_problems, problem_batch
from metrics import EVALUATION_SEED, compare, table_of
from samplers import TransformersSampler
from tests.helpers import TINY, apart, flat_gradient, metrics, read_lines, weights, write

FIRST = os.path.join(os.path.dirname(TINY), "sft")
CLIP = 0.005  # below every norm here: AdamW's first updates hide a gradient's scale
CAP, MEMO_CAP = 70, 24  # tokens; tells responses from what the teacher writes
SHORT = "--steps 3 --eval-problems 8 --seed 3 --threads 1 --micro-tokens 300".split()
SAMPLING = f"--max-new-tokens {CAP} --temperature 0.7 --top-p 0.9".split()
VERDICTS = [
    ("correct", "correct"),
    ("incorrect", "wrong"),
    ("incorrect", "no_answer"),
    ("truncated", "truncated"),
]


# ------------------------------------------------------------------------------------------------
# Records


@pytest.fixture
def events(monkeypatch, tokenizer):
    """Records a run: its samplings, updates and pushes, in their order.

    Verdicts are drawn instead of the verifier's, and memos given instead of the teacher's, the
    second of them truncated, so that filters, groups and failed contexts are at work on every
    machine. All else is the run's own.
    """
    events, batches = [], []
    own_sample, own_push = TransformersSampler.sample, TransformersSampler.push
    own_generate = transformers.LlamaForCausalLM.generate

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, logps=False):
        event = SimpleNamespace(kind="sample", prompts=prompts, seed=seed, generated=[])
        event.settings, event.weights = (max_new_tokens, temperature, top_p), flat(self.model)
        event.writes, event.done = max_new_tokens == MEMO_CAP, False
        events.append(event)
        settings = max_new_tokens, temperature, top_p, seed, logps
        event.results, event.done = own_sample(self, prompts, *settings), True
        if event.writes:
            texts = [f"so</think>7 +{i}, the answer is {10 + i}" for i in range(len(prompts))]
            memos = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            event.results = [(ids + [2], i != 1) for i, ids in enumerate(memos)]
        return event.results

    def generate(self, **kwargs):
        config = kwargs["generation_config"]
        settings = config.temperature, config.top_p, torch.initial_seed()
        events[-1].generated.append((*settings, config.do_sample, config.top_k))
        return own_generate(self, **kwargs)

    def push(self, model):
        if events[-1].done:  # else it is a part of `sample`
            events.append(SimpleNamespace(kind="push", weights=flat(model), done=True))
        return own_push(self, model)

    def grade_responses(verifier, texts, finished, answers):
        event = events[-1]
        assert finished == [end for _, end in event.results]
        for text, (ids, end) in zip(texts, event.results, strict=True):
            assert text == tokenizer.decode(ids[: len(ids) - end])
        batches.append(texts)
        drawn = random.Random(len(batches)).choices(VERDICTS, [4, 2, 1, 3], k=len(texts))
        event.golds, event.texts, event.verdicts = answers, texts, drawn
        return drawn

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            event = SimpleNamespace(kind="update", group={**group}, done=True)
            weights = group["params"]
            event.before = torch.cat([p.detach().flatten() for p in weights])
            event.gradient = torch.cat([p.grad.flatten() for p in weights])
            super().step()
            event.after = torch.cat([p.detach().flatten() for p in weights])
            events.append(event)

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    monkeypatch.setattr(TransformersSampler, "push", push)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    monkeypatch.setattr(rollout, "grade_responses", grade_responses)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    for limit, tokens in ((modelling.CHUNK, 60), (modelling.PIECE, 25)):  # several of each
        monkeypatch.setitem(limit, "cpu", tokens * len(tokenizer))
    assert modelling.CLIP == 1  # the paper's
    monkeypatch.setattr(modelling, "CLIP", CLIP)
    return events


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def run_recorded(script, flags, events, tokenizer, out, capsys, thinking=True):
    """Runs a script of three steps, and checks what it sampled and evaluated. Returns (first
    weights, [(events, line of the metrics) of each step], last weights); a push ends a step.
    """
    script.main([*flags, *SHORT, *SAMPLING, "--out", out])
    first, *between, last = events
    steps = [[]]
    for event in between:
        steps[-1].append(event)
        if event.kind == "push":
            steps.append([])
    assert steps.pop() == [] and len(steps) == 3
    seeds, lines = check_sampling(events, seed=3), metrics(out)[1:]
    assert len(set(seeds)) == len(seeds)
    printed = capsys.readouterr().out
    check_held_out(first, last, tokenizer, lines.pop()["evaluation"], printed, thinking)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert torch.equal(weights(out), last.weights)
    return first.weights, list(zip(steps, lines, strict=True)), last.weights


def rollouts_of(event, problems):
    """What a recorded draw on `problems` gave."""
    rows = []
    assert event.golds == [problem.answer for problem in problems]
    columns = problems, event.prompts, event.results, event.verdicts, event.texts
    for problem, prompt, (ids, _), (outcome, reason), text in zip(*columns, strict=True):
        rows.append(SimpleNamespace(problem=problem, prompt=prompt, ids=ids, response_ids=ids))
        rows[-1].text, rows[-1].outcome, rows[-1].reason = text, outcome, reason
    return rows


def prompt_of(tokenizer, problem, context="", thinking=True):
    parts = [problem.question, context, data.INSTRUCTION]
    return chat(tokenizer, "\n\n".join(part for part in parts if part), thinking)


def chat(tokenizer, content, thinking):
    opened = "" if thinking else "<think>\n\n</think>\n\n"
    text = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{opened}"
    return tokenizer(text, add_special_tokens=False).input_ids


def check_sampling(events, seed):
    """Every sampling of a run with `seed` follows the flags. Returns the seeds of its draws, the
    evaluations' as the last.
    """
    draws = [event for event in events if event.kind == "sample"]
    for event in draws:
        assert event.settings == (MEMO_CAP if event.writes else CAP, 0.7, 0.9)
        assert set(event.generated) == {(0.7, 0.9, event.seed, True, 0)}
        assert all(len(ids) <= CAP for ids, _ in event.results)
    first, *between, last = draws
    assert first.seed == last.seed == EVALUATION_SEED + seed
    writers = [event.seed for event in between if event.writes]
    assert len(set(writers)) == len(writers)
    return [event.seed for event in between if not event.writes] + [first.seed]


def check_held_out(first, last, tokenizer, rows, printed, thinking=True):
    """`rows`: the table after a run, between whose evaluations `first` and `last` it trained."""
    problems = embedded_problems(8, 3, held_out=True)
    prompts = [prompt_of(tokenizer, problem, "", thinking) for problem in problems]
    assert first.prompts == last.prompts == prompts
    before, after = (rollouts_of(event, problems) for event in (first, last))
    records = compare([("before", before), ("after", after)])
    assert rows == json.loads(json.dumps(records)) and table_of(records) in printed
    assert any(records[-1]["change"][key][0] for key in ("accuracy", "length"))


def check_step_line(line, seen, kept):
    """The counts and lengths in a line of the metrics."""

    def length(rows):
        return pytest.approx(np.mean([len(r.ids) for r in rows])) if rows else None

    expected = {outcome: sum(r.outcome == outcome for r in seen) for outcome in rollout.OUTCOMES}
    expected.update(sampled=len(seen), kept=len(kept), loss_tokens=sum(len(r.ids) for r in kept))
    expected.update(no_answer=sum(r.reason == "no_answer" for r in seen), length=length(seen))
    expected.update(length_correct=length([r for r in seen if r.outcome == "correct"]))
    assert {key: line[key] for key in expected} == expected
    for rows, what, activity in ((seen, "sampled", "sampling"), (kept, "trained", "training")):
        rate = sum(len(r.ids) for r in rows) / line[f"{activity}_seconds"]
        assert line[f"{activity}_seconds"] < 1e6  # a duration, no clock's reading
        assert line[f"{what}_tokens_per_second"] == pytest.approx(rate)


def check_samples(samples, step, rollouts):
    """The first two rollouts of a step in samples.jsonl; returns their lines."""
    lines = [row for row in samples if row["step"] == step and "outcome" in row]
    keys = "question", "gold", "response", "outcome", "reason"
    assert [tuple(line[key] for key in keys) for line in lines] == [
        (r.problem.question, r.problem.answer, r.text, r.outcome, r.reason) for r in rollouts[:2]
    ]
    return lines


def prompts_shown(samples):
    """The one line of samples.jsonl that has the prompts, of the first step."""
    (shown,) = [row for row in samples if "student_prompt" in row]
    assert shown["step"] == 1
    return shown


def memos_of(event, tokenizer, frame):
    """The contexts that come of what the teacher wrote; None of a truncated one."""
    texts = [tokenizer.decode(ids[:-1]) if end else None for ids, end in event.results]
    return [text and f"{frame}\n{text.split('</think>')[1]}" for text in texts]


def sibling_of(_, other=None, *rest):
    """The context of the best of a group: the second best; None where there is none."""
    if other is None:
        return None
    think = toy.worked(other.text.split("</think>")[0].replace("<think>", "").strip())
    return data.REFERENCE.format(solution=think, answer=other.problem.answer)


# ------------------------------------------------------------------------------------------------
# By hand


def by_hand(model, vector=None):
    """The model in float64, with the weights of `vector`."""
    copy = opsd.frozen_copy(model).double().requires_grad_(True)
    if vector is not None:
        torch.nn.utils.vector_to_parameters(vector.double(), copy.parameters())
    return copy


def logps_of(model, *parts):
    """Log-probabilities (tokens, V) before each token of parts 1, 3, ... of a row."""
    places, end = [], 0
    for number, part in enumerate(parts):
        if number % 2:
            places += range(end - 1, end + len(part) - 1)
        end += len(part)
    logits = model(torch.tensor([[token for part in parts for token in part]])).logits[0]
    return logits[places].log_softmax(-1)


def chosen(logps, ids):
    return logps[range(len(ids)), ids]


def check_update(event, model, loss, lr, weight_decay=0.0, betas=(0.9, 0.999)):
    """The gradient of `loss`, of `model` by hand, reached AdamW, clipped; returns its norm."""
    assert torch.equal(event.before.double(), flat(model))
    model.zero_grad()
    loss.backward()
    gradient = flat_gradient(model)
    norm = gradient.norm().item()
    assert norm > CLIP
    assert apart(event.gradient, gradient * CLIP / norm) < 1e-3
    assert event.group["lr"] == pytest.approx(lr)
    assert (event.group["weight_decay"], event.group["betas"]) == (weight_decay, betas)
    assert not event.group["amsgrad"] and not event.group["maximize"]
    return norm


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def entropy(p):
    return -(p.exp() * p).sum(-1)


def jsd(s, t, correct, beta=0.3):
    mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)


def soft(student_logps, teacher_logps, tokens, args):
    """A gate that depends on the student, and must not carry a gradient."""
    return opsd.entropy(student_logps).clamp(max=1) * torch.where(tokens.position % 2 == 0, 1, 0.5)


MEASURES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
BY_HAND = {
    "jsd": jsd,
    "reverse_kl": lambda s, t, correct: kl(s, t),
    "split": lambda s, t, correct: kl(s, t) if correct else kl(t, s),
}
RUNS = {
    "frozen": (
        "--filter correct --resample 2 --divergence jsd --beta 0.3 --batch 6",
        dict(keeps=("correct",), resample=2),
    ),
    "every": (
        "--filter all --teacher every --refresh 2 --context answer --thinking off --batch 4",
        dict(keeps=rollout.OUTCOMES, every=2, thinking=False),
    ),
    "ema": (
        "--filter not-correct --divergence split --teacher ema --ema 0.3 --reinject 8 "
        f"--context resolve --context-tokens {MEMO_CAP} --gate soft --batch 8",
        dict(keeps=("incorrect", "truncated"), ema=0.3, memo=True),
    ),
    "siblings": (
        "--filter shortest --group 4 --resample 1 --context sibling --batch 3",
        dict(keeps=("correct",), shortest=True, resample=1),
    ),
}


def check_bins(line, step, kept, width):
    """A line of kl_by_position.jsonl: sums over bins of `width` tokens."""
    assert (line["step"], line["bin"]) == (step, width)
    for outcome in rollout.OUTCOMES:
        rows = [r.kl for r in kept if r.outcome == outcome]
        starts = range(0, max(map(len, rows), default=0), width)
        bins = [[row[at : at + width] for row in rows if len(row) > at] for at in starts]
        found = line[outcome]
        assert found["kl"] == pytest.approx([sum(map(sum, b)) for b in bins], rel=1e-2, abs=1e-4)
        assert found["tokens"] == [sum(map(len, b)) for b in bins]
        assert found["rollouts"] == [len(b) for b in bins]


@pytest.mark.parametrize("name", list(RUNS))
def test_opsd_does_what_its_flags_say(
    name, model, tokenizer, events, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(opsd.GATES, "soft", soft)
    (flags, is_), out = RUNS[name], str(tmp_path / "run")
    flags = [*flags.split(), "--lr", "2e-3"]
    args, resample = opsd.parse_args(flags), is_.get("resample", 0)
    batch, group, full = args.batch, args.group, args.batch * args.group
    thinking, memo, shortest = is_.get("thinking", True), "memo" in is_, "shortest" in is_
    problems = embedded_problems(3 * batch * (resample + 1), 3)
    first, steps, last = run_recorded(opsd, flags, events, tokenizer, out, capsys, thinking)
    samples = read_lines(os.path.join(out, "samples.jsonl"))
    student_weights, drawn, all_prompts, overfull = flat(model), 0, [], False
    teacher = by_hand(model)
    assert torch.equal(first, student_weights)
    for number, (step, line) in enumerate(steps, 1):
        *draws, update, push = step
        assert [event.kind for event in draws] == ["sample"] * len(draws)
        writer = draws.pop() if memo else None
        assert not any(event.writes for event in draws)
        # What was drawn, and what of it reaches the loss.
        seen, kept = [], []
        for event in draws:
            assert len(kept) < full
            expected = [p for p in problem_batch(problems, drawn, batch, 3) for _ in range(group)]
            assert event.prompts == [prompt_of(tokenizer, p, "", thinking) for p in expected]
            assert torch.equal(event.weights, student_weights)
            rollouts = rollouts_of(event, expected)
            seen += rollouts
            for r in rollouts:
                right = [s for s in rollouts if s.problem == r.problem and s.outcome == "correct"]
                r.best = sorted(right, key=lambda s: len(s.ids))
            passed = [r for r in rollouts if r.outcome in is_["keeps"]]
            kept += [r for r in passed if not shortest or r is r.best[0]]
            all_prompts += event.prompts[::group]
            drawn += batch
        assert len(kept) >= full or len(draws) == resample + 1
        overfull |= len(kept) > full
        kept = kept[:full]
        # What the teacher reads.
        if memo:
            assert apart(writer.weights.double(), flat(teacher)) < 1e-6
            asked = [data.RESOLVE.format(**vars(r.problem)) for r in kept]
            assert writer.prompts == [chat(tokenizer, question, False) for question in asked]
            frame = "Here is a solution that you wrote earlier:"
            contexts = memos_of(writer, tokenizer, frame)
        elif shortest:
            contexts = [sibling_of(*r.best) for r in kept]
        else:
            frame = data.REFERENCE if resample else data.ANSWER
            contexts = [frame.format(**vars(r.problem)) for r in kept]
        failed = contexts.count(None)
        assert failed == memo or shortest and 0 < failed < len(kept)
        kept = [r for r, context in zip(kept, contexts, strict=True) if context]
        for r, context in zip(kept, filter(None, contexts), strict=True):
            recall = f"\n\nActually, I recall:\n{context}\nContinuing from this.\n\n"
            recall = tokenizer(recall, add_special_tokens=False).input_ids
            width = 8 if memo else CAP
            r.row = [prompt_of(tokenizer, r.problem, context, thinking), r.ids[:width]]
            for start in range(width, len(r.ids), width):
                r.row += [recall, r.ids[start : start + width]]
        # The loss, its gradient, the update.
        student = by_hand(model, student_weights)
        values, measures, gates = [], [], []
        for r in kept:
            s, t = logps_of(student, r.prompt, r.ids), logps_of(teacher, *r.row).detach()
            value = BY_HAND[args.divergence](s, t, r.outcome == "correct")
            gates.append(torch.ones(len(value)))
            if memo:
                gates[-1] = entropy(s).detach().clamp(max=1)
                gates[-1][1::2] *= 0.5
            values.append(value * gates[-1])
            r.kl = kl(s, t).tolist()
            measures.append(torch.stack([kl(s, t), kl(t, s), entropy(s), entropy(t)], 1))
        loss = torch.stack([value.mean() for value in values]).mean()
        norm = check_update(update, student, loss, lr=2e-3)
        student_weights = update.after
        assert torch.equal(push.weights, student_weights)
        if "ema" in is_:
            moved = is_["ema"] * flat(teacher) + (1 - is_["ema"]) * student_weights.double()
            teacher = by_hand(model, moved)
        if number == is_.get("every"):
            teacher = by_hand(model, student_weights)
        # What is logged.
        assert line["context_failed"] == failed
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        means = torch.cat(measures).mean(0).tolist()
        assert [line[key] for key in MEASURES] == pytest.approx(means, rel=1e-3)
        assert abs(means[0] - means[1]) > 0.01 * means[0] and line["logprob_gap"] is None
        gate, kls = torch.cat(gates), torch.cat(measures)[:, 0]
        weight = sum(each.mean() for each in gates) / len(kept)
        assert line["gate_mass"] == pytest.approx(weight.item(), rel=1e-3)
        inside, outside = (kls * gate).sum() / gate.sum(), (kls * (1 - gate)).sum()
        assert line["reverse_kl_inside"] == pytest.approx(inside.item(), rel=1e-3)
        outside = pytest.approx((outside / (1 - gate).sum()).item(), rel=1e-3) if memo else None
        assert line["reverse_kl_outside"] == outside
        assert line["length_kept"] == pytest.approx(np.mean([len(r.ids) for r in kept]))
        check_step_line(line, seen, kept)
        shown = check_samples(samples, number, seen)
        assert [row["kept"] for row in shown] == [any(r is k for k in kept) for r in seen[:2]]
        bins = read_lines(os.path.join(out, "kl_by_position.jsonl"))[number - 1]
        check_bins(bins, number, kept, CAP // 20)
        if number == 1:
            prompts = prompts_shown(samples)
            assert prompts["student_prompt"] == tokenizer.decode(kept[0].prompt)
            assert prompts["teacher_prompt"] == tokenizer.decode(kept[0].row[0])
            reinjected = tokenizer.decode(kept[0].row[2]) if memo else None
            assert prompts.get("reinjected") == reinjected
    assert len({tuple(prompt) for prompt in all_prompts}) == len(all_prompts) == drawn
    assert overfull or not resample or shortest  # a draw too many was there to be cut
    assert torch.equal(last, student_weights)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_rlvr_does_what_its_flags_say(weight, tokenizer, events, tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = f"--kl {weight} --group 3 --batch 4 --length-penalty 0.5 --lr 4e-4"
    problems = embedded_problems(3 * 4, 3)
    first, steps, last = run_recorded(rlvr, flags.split(), events, tokenizer, out, capsys)
    samples = read_lines(os.path.join(out, "samples.jsonl"))
    model, _ = modelling.load_model(FIRST, torch.device("cpu"))
    start, student_weights, dropped = by_hand(model), flat(model), 0
    assert torch.equal(first, student_weights)
    for number, (step, line) in enumerate(steps, 1):
        draw, *changes, push = step
        assert [e.kind for e in (draw, *changes)] == ["sample", "update"]
        expected = problem_batch(problems, 4 * (number - 1), 4, 3)
        expected = [problem for problem in expected for _ in range(3)]
        assert draw.prompts == [prompt_of(tokenizer, problem) for problem in expected]
        assert torch.equal(draw.weights, student_weights)
        seen, kept = rollouts_of(draw, expected), []
        for r in seen:
            r.reward = (1 - 0.5 * len(r.ids) / CAP) * (r.outcome == "correct")
        for place in range(0, len(seen), 3):
            group = seen[place : place + 3]
            rewards = np.array([r.reward for r in group])
            if rewards.std() > 1e-6:
                kept += group
                for r in group:
                    r.advantage = (r.reward - rewards.mean()) / rewards.std()
        dropped += len(seen) - len(kept)
        tokens = sum(len(r.ids) for r in kept)
        for update in changes:
            student, loss, entropies = by_hand(model, update.before), 0.0, []
            for r in kept:
                logps = logps_of(student, r.prompt, r.ids)
                entropies += entropy(logps).tolist()
                logps = chosen(logps, r.ids)
                ratio = (logps - logps.detach()).exp()  # on-policy
                loss -= (ratio * r.advantage).sum() / tokens
                d = chosen(logps_of(start, r.prompt, r.ids), r.ids).detach() - logps
                loss += weight * (d.exp() - d - 1).sum() / tokens
            norm = check_update(update, student, loss, lr=4e-4)
        student_weights = update.after
        assert torch.equal(push.weights, student_weights)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["student_entropy"] == pytest.approx(np.mean(entropies), rel=1e-3)
        assert line["reward"] == pytest.approx(np.mean([r.reward for r in seen]))
        assert line["equal_groups"] == (len(seen) - len(kept)) // 3
        assert line["logprob_gap"] is None
        check_step_line(line, seen, kept)
        check_samples(samples, number, seen)
    draws = [step[0] for step, _ in steps]
    assert len({tuple(draw.prompts[i]) for draw in draws for i in range(0, 12, 3)}) == 12
    assert prompts_shown(samples)["student_prompt"] == tokenizer.decode(draws[0].prompts[0])
    assert dropped > 0 and torch.equal(last, student_weights)


def test_rlvr_takes_no_step_where_all_groups_are_equal(events, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(rlvr, "reward", lambda *args: 1.0)
    monkeypatch.setattr(run, "GIVE_UP", 2)
    flags = ["--group", "2", "--batch", "2", *SHORT, "--max-new-tokens", "8"]
    error = refused(rlvr.main, [*flags, "--out", str(tmp_path / "run")])
    assert "--group 2: every group had equal rewards" in error
    assert [event.kind for event in events] == ["sample"] * 3
    lines = metrics(tmp_path / "run")[1:]
    assert [(row["equal_groups"], row["kept"]) for row in lines] == [(2, 0)] * 2
    assert not any("student_entropy" in row for row in lines)


@pytest.mark.parametrize("given", [True, False])
def test_sft_does_what_its_flags_say(given, model, tokenizer, events, tmp_path, monkeypatch):
    flags, out = "--steps 5 --batch 4 --warmup 2 --lr 2e-3 --threads 1", str(tmp_path / "run")
    flags, rows, problems = [*flags.split(), "--micro-tokens", "150", "--seed", "3"], [], []
    own, streams = sft.embedded_row, set()

    def embedded_row(tokenizer, problem, rng):
        streams.add(str(rng.bit_generator.state))
        rows.append(own(tokenizer, problem, rng))
        problems.append(problem)
        return rows[-1]

    monkeypatch.setattr(sft, "embedded_row", embedded_row)
    if given:
        seven = embedded_problems(7, 5)
        texts = [json.dumps(vars(problem)) for problem in seven]
        flags += ["--data", write(tmp_path / "d.jsonl", *texts)]
        for i in range(20):
            p = seven[i % 7]
            text = f"<think>\n{p.solution}\n</think>\n\n\\boxed{{{p.answer}}}<|im_end|>"
            response = tokenizer(text, add_special_tokens=False).input_ids
            rows.append((prompt_of(tokenizer, p), response))
    sft.main(["--model", TINY, *flags, "--out", out])
    if not given:
        weights_of = [next(sft.build_tiny(seed)[0].parameters()) for seed in (0, 1)]
        assert not torch.equal(*weights_of)
        assert problems == embedded_problems(20, 3) and len(streams) == 20
    assert [event.kind for event in events] == ["update"] * 5
    student_weights, lines = flat(model), metrics(out)[1:]
    rates = [1e-3, 2e-3, 2e-3]
    rates += [2e-4 + 9e-4 * (1 + math.cos(math.pi * share)) for share in (1 / 3, 2 / 3)]
    for number, (update, line) in enumerate(zip(events, lines, strict=True), 1):
        step = rows[4 * (number - 1) : 4 * number]
        tokens, loss = sum(len(response) for _, response in step), 0.0
        student = by_hand(model, student_weights)
        for prompt, response in step:
            loss -= chosen(logps_of(student, prompt, response), response).sum() / tokens
        norm = check_update(update, student, loss, rates[number - 1], 0.01, (0.9, 0.95))
        student_weights = update.after
        assert (line["step"], line["loss_tokens"]) == (number, tokens)
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-3)
        assert line["lr"] == pytest.approx(rates[number - 1])
        assert line["epoch"] == (4 * (number - 1) // 7 if given else 0)
    assert torch.equal(weights(out), student_weights)


def test_eval_does_what_its_flags_say(model, tokenizer, events, tmp_path, capsys):
    out, problems = str(tmp_path / "e.json"), embedded_problems(6, 6, held_out=True)
    flags = f"--problems 6 --samples 2 --context-tokens {MEMO_CAP} --seed 6 --threads 1"
    flags = [*flags.split(), "--context", "answer", "reflection", *SAMPLING]
    evaluation.main(["--model", TINY, FIRST, *flags, "--out", out])
    assert len(set(check_sampling(events, seed=6))) == 1
    plain, answer, writer, reflection, second = events
    memos = memos_of(writer, tokenizer, "Notes from an earlier look at this problem:")
    assert memos.count(None) == 1
    repeated = [problem for problem in problems for _ in range(2)]
    asked = [
        data.REFLECTION.format(**vars(p), response=text)
        for p, text in zip(repeated, plain.texts, strict=True)
    ]
    asked = [text.replace("<think>", "< think>").replace("</think>", "< /think>") for text in asked]
    assert writer.prompts == [chat(tokenizer, question, False) for question in asked]
    golds = [f"The correct answer is {problem.answer}." for problem in repeated]
    other = flat(modelling.load_model(FIRST, torch.device("cpu"))[0])
    names = [TINY, f"{TINY} reading answer", f"{TINY} reading reflection", FIRST]
    with open(out) as stream:
        saved = json.load(stream)
    named = []
    assert f"{names[2]} on embedded, 1 of 12 contexts failed" in capsys.readouterr().out
    for name, event, contexts in zip(
        names,
        (plain, answer, reflection, second),
        ([""] * 12, golds, memos, [""] * 12),
        strict=True,
    ):
        pairs = zip(repeated, contexts, strict=True)
        assert event.prompts == [prompt_of(tokenizer, p, c) for p, c in pairs]
        assert torch.equal(event.weights, other if event is second else flat(model))
        assert event.seed == plain.seed
        rows = rollouts_of(event, repeated)
        named.append((name, rows))
        keys = "question", "gold", "response", "length", "verdict"
        found = [tuple(row[k] for k in keys) for row in saved["responses"]["embedded"][name]]
        columns = [(r.problem.question, r.problem.answer, r.text, len(r.ids)) for r in rows]
        assert found == [(*row, r.reason) for row, r in zip(columns, rows, strict=True)]
    assert saved["records"] == json.loads(json.dumps(compare(named, "embedded")))
    assert saved["args"]["temperature"] == 0.7


def test_the_defaults_are_those_of_the_documents():
    """What a bare command trains with."""
    method = dict(filter="correct", context="solution", divergence="reverse_kl", teacher="frozen")
    numbers = dict(temperature=1, max_new_tokens=160, ema=0.99, refresh=10, beta=0.5, top_p=1)
    for script, argv, wanted in (
        (opsd, [], dict(method, **numbers, steps=40, batch=96, lr=1e-4)),
        (rlvr, [], dict(steps=40, batch=32, lr=7e-5, group=8, length_penalty=0, kl=0)),
        (sft, [], dict(steps=1500, batch=32, lr=3e-3, warmup=100)),
        (sft, ["--steps", "50"], dict(warmup=5)),  # and not a run within its warm-up
        (evaluation, ["--model", "x"], dict(problems=512, samples=4)),
    ):
        args = vars(script.parse_args(argv))
        assert {name: args[name] for name in wanted} == wanted
