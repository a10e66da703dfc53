"""Sampling: prompt ids in, response ids and finish reasons out. Text is decoded once, for the verifier and for people.

`make_sampler` chooses the backend; a sampler has two methods, whatever the backend:
    sample(prompts, ...) -> [(response ids, finished), ...]     finished: the model ended the response itself; else the cap did
    push(model)                                                 the student's weights after an optimizer step
The sampled end-of-sequence token is part of the response. A truncated response has none, and none is added.
"""
from dataclasses import dataclass, field

from common import fail, stop_ids
from data import CONTEXTS, Problem, chat_ids, plain, render_prompt
from verify import grade_responses


@dataclass
class Rollout:
    """One response to one problem, with everything that later stages say about it."""
    problem: Problem
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    finished: bool = False
    text: str = ""
    outcome: str = ""           # correct / incorrect / truncated
    reason: str = ""            # correct / wrong / no_answer / timeout / truncated


def add_sampling_flags(parser, max_new_tokens=160):
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="cap of a response in tokens, eos included")
    group.add_argument("--temperature", type=float, default=1.0, help="0 = greedy; only 1 with top-p 1 and top-k 0 samples the model's own distribution")
    group.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    group.add_argument("--top-k", type=int, default=0, help="0 = off")
    group.add_argument("--sample-batch", type=int, default=256, help="rows that are sampled at once (transformers backend)")
    group.add_argument("--thinking", default="on", choices=["on", "off"], help="the chat template's enable_thinking, for student and teacher alike")


def make_rollouts(sampler, tokenizer, problems, args, seed, contexts=None):
    """Samples one response a problem. `contexts` (a text a problem; None for one that failed) turns the prompts into the teacher's."""
    contexts = contexts or [""] * len(problems)
    rollouts = [Rollout(p, render_prompt(tokenizer, p, c or "", args.thinking == "on")) for p, c in zip(problems, contexts)]
    samples = sampler.sample([r.prompt_ids for r in rollouts], args.max_new_tokens, args.temperature, args.top_p, args.top_k, seed)
    for rollout, (ids, finished) in zip(rollouts, samples):
        rollout.response_ids, rollout.finished = ids, finished
        rollout.text = opened_think(tokenizer, rollout.prompt_ids) + tokenizer.decode(ids[:-1] if finished else ids)
    return rollouts


def opened_think(tokenizer, prompt):
    """The "<think>" that some chat templates write into the prompt: the verifier must see it, or an unfinished block would pass as an answer."""
    return "<think>\n" if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>") else ""


SEGMENT = 32        # tokens


class TransformersSampler:
    """`generate` of transformers on the training model itself: no copy of the weights, nothing to push."""

    def __init__(self, model, tokenizer, batch):
        self.model, self.batch, self.stop = model, batch, stop_ids(model, tokenizer)
        self.limit = getattr(model.config, "max_position_embeddings", None)

    def push(self, model):
        pass

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0):
        """Returns (response ids, finished) in the order of `prompts`. Ends the program if a prompt leaves no room for the response."""
        import torch
        check_room(prompts, max_new_tokens, self.limit)
        torch.manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))              # little padding, and the same rows together
        results = [None] * len(prompts)
        for start in range(0, len(order), self.batch):
            rows = order[start:start + self.batch]
            for i, ids in zip(rows, self.generate([prompts[i] for i in rows], max_new_tokens, temperature, top_p, top_k)):
                results[i] = ids
        return results

    def generate(self, prompts, max_new_tokens, temperature, top_p, top_k):
        """One batch, generated in segments of SEGMENT tokens; rows that have finished leave the batch in between and cost nothing more."""
        import torch
        from transformers import GenerationConfig
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)                        # (B, T), padded on the left
        mask = torch.zeros(len(prompts), width, dtype=torch.long)                       # (B, T); generate derives the positions from it
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt):] = torch.tensor(prompt)
            mask[i, width - len(prompt):] = 1
        ids, mask = ids.to(device), mask.to(device)
        config = dict(eos_token_id=self.stop, pad_token_id=self.stop[0], do_sample=temperature > 0, return_dict_in_generate=True)
        if temperature > 0:
            config.update(temperature=temperature, top_p=top_p, top_k=top_k)
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig()                               # generate merges the model's own settings in: not here
        results, rows, cache = [None] * len(prompts), list(range(len(prompts))), None
        try:
            while rows:
                room = min(SEGMENT, width + max_new_tokens - ids.shape[1])
                with torch.no_grad():
                    out = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=GenerationConfig(max_new_tokens=room, **config))
                ids, cache = out.sequences, out.past_key_values                         # (B, T), its keys and values
                samples = [cut(row, self.stop) for row in ids[:, width:].tolist()]
                going = [place for place, (response, finished) in enumerate(samples) if not finished and len(response) < max_new_tokens]
                for row, sample in zip(rows, samples):
                    results[row] = sample
                rows = [rows[place] for place in going]
                if rows:
                    keep = torch.tensor(going, device=device)
                    cache.batch_select_indices(keep)
                    ids = ids[keep]
                    mask = torch.cat([mask[keep], mask.new_ones(len(going), ids.shape[1] - mask.shape[1])], 1)
        finally:
            self.model.generation_config = own
        return results


def cut(ids, stop):
    """(ids up to and including the first stop id, True), or (ids, False) if there is none: what follows a stop id is padding."""
    for t, token in enumerate(ids):
        if token in stop:
            return ids[:t + 1], True
    return ids, False


def check_room(prompts, max_new_tokens, limit):
    """Nothing is truncated silently. `drop_long` has made sure of this beforehand; a caller who did not is stopped here."""
    longest = max(map(len, prompts))
    if limit and longest + max_new_tokens > limit:
        fail(f"--max-new-tokens {max_new_tokens}: the longest prompt has {longest} tokens and the model's context is {limit}")


def drop_long(problems, tokenizer, args, limit, context="none"):
    """The problems whose prompts, the student's and the teacher's, leave room for the response. Says how many it drops; ends the program if none is left.

    Embedded problems are all of one size: only the first is looked at.
    """
    look_at = problems if args.data else problems[:1]
    contexts = CONTEXTS[context]([Rollout(problem, []) for problem in look_at], lambda prompts: [""] * len(prompts))      # written ones: their frame
    room = limit - args.max_new_tokens if limit else None
    long = {i for i, (p, c) in enumerate(zip(look_at, contexts)) if room is not None
            and max(len(render_prompt(tokenizer, p, text, args.thinking == "on")) for text in ("", c)) > room}
    if long:
        print(f"dropped {len(long)} of {len(problems)} problems, the first being number {min(long) + 1}: prompt and --max-new-tokens {args.max_new_tokens} exceed the model's context of {limit}")
    if len(long) == len(look_at):
        fail(f"--max-new-tokens {args.max_new_tokens}: no prompt leaves room for it in the model's context of {limit} tokens")
    return [p for i, p in enumerate(problems) if i not in long]


def add_context_flags(group):
    group.add_argument("--context-tokens", type=int, default=512, help="cap in tokens of a context that the teacher writes; one that hits it has failed")
    group.add_argument("--context-thinking", default="off", choices=["on", "off"], help="enable_thinking while the teacher writes a context")


def make_writer(sampler, tokenizer, args, seed):
    """The `write` of data.CONTEXTS: what the sampler's model writes to each prompt, in one batch; None where it is empty, truncated or the prompt too long."""
    def write(prompts):
        ids = [chat_ids(tokenizer, plain(tokenizer, prompt), args.context_thinking == "on") for prompt in prompts]
        fits = [i for i, row in enumerate(ids) if not sampler.limit or len(row) + args.context_tokens <= sampler.limit]
        texts = [None] * len(prompts)
        samples = sampler.sample([ids[i] for i in fits], args.context_tokens, args.temperature, args.top_p, args.top_k, seed) if fits else []
        for i, (response, finished) in zip(fits, samples):
            text = tokenizer.decode(response[:-1]).rpartition("</think>")[2].strip()
            texts[i] = text if finished and text else None
        return texts
    return write


def make_sampler(model, tokenizer, args):
    if not 0 < args.top_p <= 1:
        fail(f"--top-p {args.top_p}: above 0 and at most 1")
    return TransformersSampler(model, tokenizer, args.sample_batch)


def grade_rollouts(verifier, rollouts, truncated="apart"):
    """Writes outcome and reason into each rollout. `truncated` = "incorrect" counts a response that hit the cap as incorrect."""
    graded = grade_responses(verifier, [r.text for r in rollouts], [r.finished for r in rollouts], [r.problem.answer for r in rollouts])
    for rollout, (outcome, reason) in zip(rollouts, graded):
        rollout.outcome = "incorrect" if outcome == "truncated" and truncated == "incorrect" else outcome
        rollout.reason = reason
