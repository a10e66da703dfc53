"""Sampling: prompt ids in, response ids and finish reasons out. Text is decoded once, for the verifier and for people.

`make_sampler` chooses the backend; a sampler has two methods and two attributes, whatever the backend:
    sample(prompts, ...) -> [(response ids, finished), ...]     finished: the model ended the response itself; else the cap did
    push(model)                                                 the student's weights after an optimizer step
    limit                                                       tokens of prompt and response together, or None
    logprobs                                                    the engine's own, of what `sample` returned last: a list a response; None with transformers
The sampled end-of-sequence token is part of the response. A truncated response has none, and none is added.
"""

import os
import random
from dataclasses import dataclass, field

from common import fail, response_hidden, stop_ids
from data import CONTEXTS, Problem, chat_ids, plain, render_prompt
from ranks import device_of, distributed, full, gather, is_sharded, open_head, rank_and_world, share
from verify import grade_responses


@dataclass
class Rollout:
    """One response to one problem, with everything that later stages say about it."""

    problem: Problem
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    finished: bool = False
    text: str = ""
    outcome: str = ""  # correct / incorrect / truncated
    reason: str = ""  # correct / wrong / no_answer / timeout / truncated
    logprobs: list = None  # the vLLM engine's log-probabilities of the response ids


def add_sampling_flags(parser, max_new_tokens=160):
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help="cap of a response in tokens, eos included",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 = greedy; only 1 with top-p 1 and top-k 0 samples the model's own distribution",
    )
    group.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    group.add_argument("--top-k", type=int, default=0, help="0 = off")
    group.add_argument(
        "--sample-batch",
        type=int,
        default=256,
        help="rows that are sampled at once (transformers backend)",
    )
    group.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "transformers", "vllm"],
        help="auto: vllm if it is installed and the device is CUDA",
    )
    group.add_argument(
        "--vllm-memory",
        type=float,
        default=0.3,
        help="share of the card's memory for vLLM's weights and cache, beside the trainer's",
    )
    group.add_argument(
        "--vllm-eager",
        action="store_true",
        help="neither compile nor capture CUDA graphs: a quicker start, slower sampling",
    )
    group.add_argument(
        "--thinking",
        default="on",
        choices=["on", "off"],
        help="the chat template's enable_thinking, for student and teacher alike",
    )


def make_rollouts(sampler, tokenizer, problems, args, seed, contexts=None):
    """Samples one response a problem. `contexts` (a text a problem; None for one that failed) turns the prompts into the teacher's.

    On several ranks each samples its share, with a seed of its own, and all get the whole list."""
    contexts = contexts or [""] * len(problems)
    rollouts = [
        Rollout(p, render_prompt(tokenizer, p, c or "", args.thinking == "on"))
        for p, c in share(list(zip(problems, contexts)))
    ]
    samples = sampler.sample(
        [r.prompt_ids for r in rollouts],
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        rank_seed(seed),
    )
    for rollout, (ids, finished), logprobs in zip(
        rollouts, samples, sampler.logprobs or [None] * len(samples)
    ):
        rollout.response_ids, rollout.finished, rollout.logprobs = ids, finished, logprobs
        rollout.text = opened_think(tokenizer, rollout.prompt_ids) + tokenizer.decode(
            ids[:-1] if finished else ids
        )
    return gather(rollouts)


def rank_seed(seed):
    """Rank 0 has the seed of a run on one rank; the others are far from it, since a run's seeds go up by --batch a draw."""
    return seed + 1_000_000_007 * rank_and_world()[0]


def opened_think(tokenizer, prompt):
    """The "<think>" that some chat templates write into the prompt: the verifier must see it, or an unfinished block would pass as an answer."""
    return "<think>\n" if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>") else ""


SEGMENT = 32  # tokens


class TransformersSampler:
    """`generate` of transformers on the training model itself: no copy of the weights, nothing to push.

    A model in pieces cannot sample: its ranks would have to agree on every token. Then each rank has a whole copy, in the computation dtype, that
    student and teacher share: it holds one model's weights at a time, those of the one that samples or was pushed.
    """

    logprobs = None

    def __init__(self, model, tokenizer, args, other=None):
        self.model, self.stop, self.dtype, self.batch = (
            model,
            stop_ids(model, tokenizer),
            args.dtype,
            args.sample_batch,
        )
        self.limit = getattr(model.config, "max_position_embeddings", None)
        self.engine = other.engine if other else dict(copy=None, holds=None)
        self.rounded = args.dtype == "bfloat16" and "bfloat16" not in str(model.dtype)

    def push(self, model):
        """On several ranks all must call it, and so `sample`."""
        if not any(map(is_sharded, model.parameters())):
            return
        import torch

        if self.engine["copy"] is None:
            self.engine["copy"] = whole_model(model, getattr(torch, self.dtype))
        with torch.no_grad():
            for old, new in zip(self.engine["copy"].parameters(), model.parameters(), strict=True):
                old.copy_(full(new))
        self.engine["holds"] = model

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0):
        """Returns (response ids, finished) in the order of `prompts`. Ends the program if a prompt leaves no room for the response."""
        import torch

        check_room(prompts, max_new_tokens, self.limit)
        if self.engine["holds"] is not self.model:
            self.push(self.model)
        torch.manual_seed(seed)
        order = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # little padding, and the same rows together
        results = [None] * len(prompts)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            with torch.autocast(
                device_of(self.model).type, torch.bfloat16, enabled=self.rounded
            ):  # outermost, so weights are rounded once, not for every token
                samples = self.generate(
                    [prompts[i] for i in rows], max_new_tokens, temperature, top_p, top_k
                )
            for i, sample in zip(rows, samples):
                results[i] = sample
        return results

    def generate(self, prompts, max_new_tokens, temperature, top_p, top_k):
        """One batch, generated in segments of SEGMENT tokens; rows that have finished leave the batch in between and cost nothing more."""
        import torch
        from transformers import GenerationConfig

        model = self.engine["copy"] or self.model
        width, device = max(map(len, prompts)), model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T), padded on the left
        mask = torch.zeros(
            len(prompts), width, dtype=torch.long
        )  # (B, T); generate derives the positions from it
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        config = dict(
            eos_token_id=self.stop,
            pad_token_id=self.stop[0],
            do_sample=temperature > 0,
            return_dict_in_generate=True,
        )
        if temperature > 0:
            config.update(temperature=temperature, top_p=top_p, top_k=top_k)
        own = model.generation_config
        model.generation_config = (
            GenerationConfig()
        )  # generate merges the model's own settings in: not here
        results, rows, cache = [None] * len(prompts), list(range(len(prompts))), None
        try:
            while rows:
                room = min(SEGMENT, width + max_new_tokens - ids.shape[1])
                with torch.no_grad():
                    out = model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        past_key_values=cache,
                        generation_config=GenerationConfig(max_new_tokens=room, **config),
                    )
                ids, cache = out.sequences, out.past_key_values  # (B, T), its keys and values
                samples = [cut(row, self.stop) for row in ids[:, width:].tolist()]
                going = [
                    place
                    for place, (response, finished) in enumerate(samples)
                    if not finished and len(response) < max_new_tokens
                ]
                for row, sample in zip(rows, samples):
                    results[row] = sample
                rows = [rows[place] for place in going]
                if rows:
                    keep = torch.tensor(going, device=device)
                    cache.batch_select_indices(keep)
                    ids = ids[keep]
                    mask = torch.cat(
                        [mask[keep], mask.new_ones(len(going), ids.shape[1] - mask.shape[1])], 1
                    )
        finally:
            model.generation_config = own
        return results


def whole_model(model, dtype):
    """A model of the same shape in one piece, its weights to be filled in."""
    import torch

    with torch.random.fork_rng(devices=[]), device_of(model):
        copy = type(model)._from_config(model.config, dtype=dtype)
    return copy.eval().requires_grad_(False)


def cut(ids, stop):
    """(ids up to and including the first stop id, True), or (ids, False) if there is none: what follows a stop id is padding."""
    for t, token in enumerate(ids):
        if token in stop:
            return ids[: t + 1], True
    return ids, False


class VllmSampler:
    """vLLM's engine in this process, with weights of its own: random ones until the first `sample`, then those that were pushed last.

    `other`: a sampler whose engine is shared (the teacher's with the student's, checkpoint after checkpoint in eval.py). It holds one
    model's weights at a time, and gets the other's when that one samples.

    Weights are pushed as vLLM documents it for an engine in one's own process ("layerwise reloading"): reload_weights from an iterator over
    the checkpoint's names, on CUDA as on a CPU. A tied matrix goes under both of its names: under one, nothing is raised and the head of
    the CPU build stays what it was. Run: the CPU build of 0.32.0, untied and tied Llamas, float32 and bfloat16. Not run: CUDA.
    """

    def __init__(self, model, tokenizer, args, other=None):
        self.model, self.stop, self.dtype, self.checked = (
            model,
            stop_ids(model, tokenizer),
            args.dtype,
            False,
        )
        if other and [(n, p.shape) for n, p in other.model.named_parameters()] != [
            (n, p.shape) for n, p in model.named_parameters()
        ]:
            fail(
                f"--backend vllm: {model.name_or_path} has other shapes than {other.model.name_or_path}, whose engine it would use: one shape a run"
            )
        self.engine = other.engine if other else dict(llm=build_engine(model, args), holds=None)
        self.limit = self.engine["llm"].model_config.max_model_len

    def push(self, model):
        """On several ranks all must call it, and so `sample`: the engines get whole tensors, one after the other."""
        import torch

        tensors = (
            (name, full(weight.detach()).to(getattr(torch, self.dtype)))
            for name, weight in model.named_parameters(remove_duplicate=False)
        )
        self.engine["llm"].collective_rpc("reload_weights", kwargs=dict(weights_iterator=tensors))
        self.engine[
            "llm"
        ].reset_prefix_cache()  # or the next prompts read keys and values of the old weights
        self.engine["holds"] = model

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0):
        """As TransformersSampler's. Each prompt has a seed of its own, so a response does not depend on which others are sampled beside it."""
        from vllm import SamplingParams

        check_room(prompts, max_new_tokens, self.limit)
        if self.engine["holds"] is not self.model:
            self.push(self.model)
        if not self.checked:
            self.checked = True
            check_engine(
                self, self.model, prompts[:: -(-len(prompts) // 8) or 1], min(100, max_new_tokens)
            )
        seeds = random.Random(seed)
        every = dict(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_new_tokens,
            detokenize=False,
            logprobs=0,
            stop_token_ids=self.stop,
            ignore_eos=True,
        )  # ignore_eos: or the generation config's ids end a response as well
        settings = [SamplingParams(seed=seeds.getrandbits(63), **every) for _ in prompts]
        outputs = [
            o.outputs[0]
            for o in self.engine["llm"].generate(
                [dict(prompt_token_ids=p) for p in prompts], settings, use_tqdm=False
            )
        ]
        self.logprobs = [
            [row[token].logprob for token, row in zip(o.token_ids, o.logprobs)] for o in outputs
        ]
        return [
            cut(list(o.token_ids), self.stop) for o in outputs
        ]  # the engine keeps the stop id, and samples nothing behind it


def build_engine(model, args):
    import torch

    LLM = import_vllm().LLM
    with torch.random.fork_rng(devices=[]):  # the engine seeds torch's global generator
        try:
            return LLM(
                model=model.name_or_path,
                dtype=args.dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=-1,  # as long as the memory allows: `limit`
                distributed_executor_backend="external_launcher"
                if distributed()
                else None,  # an engine a rank, on the rank's card
                enable_chunked_prefill=device_of(model).type
                != "cpu",  # the CPU build fails on a prompt in pieces that has a seed
                logprobs_mode="raw_logprobs",  # before temperature, top-p and top-k, as the trainer's
                gpu_memory_utilization=args.vllm_memory,
                enforce_eager=args.vllm_eager,
                enable_prefix_caching=True,
                generation_config="vllm",
            )
        except Exception as error:  # most often memory
            fail(
                f"--backend vllm: no engine with --vllm-memory {args.vllm_memory} ({' '.join(str(error).split())[:250]})"
            )


def import_vllm():
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # the engine in this process: weights go from tensor to tensor
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm.platforms

    return vllm


def choose_backend(args, device):
    """Settles --backend auto in `args`. Ends the program if vLLM is wanted and cannot run, before any model is loaded."""
    from importlib.util import find_spec

    if args.backend == "auto":
        args.backend = "vllm" if device.type == "cuda" and find_spec("vllm") else "transformers"
        print(f"sampling with {args.backend}")
    if args.backend == "vllm":
        if not 0 < args.vllm_memory < 1:
            fail(f"--vllm-memory {args.vllm_memory}: above 0 and below 1")
        if not find_spec("vllm"):
            fail("--backend vllm: vllm is not installed (pip install -r requirements-vllm.txt)")
        try:
            has = import_vllm().platforms.current_platform.device_type
        except Exception as error:
            fail(f"--backend vllm: vllm cannot be imported ({' '.join(str(error).split())[:200]})")
        if has != device.type or device.index and not distributed():
            hint = " (choose the card by CUDA_VISIBLE_DEVICES)" if device.index else ""
            fail(
                f"--backend vllm: this vllm runs on {has or 'no device that is here'}, the model on {device}{hint}"
            )


def check_engine(sampler, model, prompts, tokens):
    """Ends the program if a short greedy sample shows that the sampler's weights are not the model's.

    Tokens and texts may differ by rounding, so log-probabilities are compared: what the trainer's own best token has more than the engine's choice,
    and how far the two are apart on that choice; both in nats, means over all tokens. On SmolLM2-135M in bfloat16 (CPU) rounding makes them 0.00 and
    0.02, a single stale matrix in the middle layer at least 0.12 and 0.26.
    """
    import torch

    tolerance = 0.1 if sampler.dtype == "bfloat16" else 0.03
    best, chosen = [], []
    samples = sampler.sample(prompts, tokens, temperature=0)
    rows = gather(
        [
            (prompt, ids, logprobs)
            for prompt, (ids, _), logprobs in zip(
                prompts, samples, sampler.logprobs or [None] * len(samples)
            )
        ]
    )[: max(8, rank_and_world()[1])]
    for prompt, ids, _ in rows:  # all ranks score all rows
        with torch.no_grad():
            hidden, (head, _) = response_hidden(model, [(prompt, ids)]), open_head(model)  # (R, D)
            logprobs = torch.log_softmax(head(hidden).float(), -1)  # (R, V)
        best.append(logprobs.max(-1).values)  # (R,)
        chosen.append(
            logprobs.gather(-1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
        )  # (R,)
    worse = (torch.cat(best) - torch.cat(chosen)).mean().item()
    apart = logprob_gap([logprobs for _, _, logprobs in rows], torch.cat(chosen)) or 0.0
    if not (worse <= tolerance and apart <= tolerance):
        fail(
            f"--backend vllm: the engine's weights are not the trainer's ({worse:.2f} nats below its best token, {apart:.2f} nats apart): "
            "most likely the push left old weights in a tied lm_head or another tensor; use --backend transformers"
        )


def logprob_gap(rows, logprobs):
    """Mean absolute difference (nats) of the engine's log-probabilities, a list a response, and the trainer's of the same tokens, (R,). None without an engine."""
    import torch

    flat = [value for row in rows or [] for value in row or []]
    return (
        (torch.tensor(flat, device=logprobs.device) - logprobs).abs().mean().item()
        if flat
        else None
    )


def check_room(prompts, max_new_tokens, limit):
    """Nothing is truncated silently. `drop_long` has made sure of this beforehand; a caller who did not is stopped here."""
    longest = max(map(len, prompts), default=0)
    if limit and longest + max_new_tokens > limit:
        fail(
            f"--max-new-tokens {max_new_tokens}: the longest prompt has {longest} tokens and the model's context is {limit}"
        )


def drop_long(problems, tokenizer, args, limit, context="none"):
    """The problems whose prompts, the student's and the teacher's, leave room for the response. Says how many it drops; ends the program if none is left.

    Embedded problems differ by a few tokens only: just the first is looked at.
    """
    look_at = problems if args.data else problems[:1]
    contexts = CONTEXTS[context](
        [Rollout(problem, []) for problem in look_at], lambda prompts: [""] * len(prompts)
    )  # written ones: their frame
    room = limit - args.max_new_tokens if limit else None
    long = {
        i
        for i, (p, c) in enumerate(zip(look_at, contexts))
        if room is not None
        and max(len(render_prompt(tokenizer, p, text, args.thinking == "on")) for text in ("", c))
        > room
    }
    if long:
        print(
            f"dropped {len(long)} of {len(problems)} problems, the first being number {min(long) + 1}: prompt and --max-new-tokens {args.max_new_tokens} exceed the model's context of {limit}"
        )
    if len(long) == len(look_at):
        fail(
            f"--max-new-tokens {args.max_new_tokens}: no prompt leaves room for it in the model's context of {limit} tokens"
        )
    return [p for i, p in enumerate(problems) if i not in long]


def add_context_flags(group):
    group.add_argument(
        "--context-tokens",
        type=int,
        default=512,
        help="cap in tokens of a context that the teacher writes; one that hits it has failed",
    )
    group.add_argument(
        "--context-thinking",
        default="off",
        choices=["on", "off"],
        help="enable_thinking while the teacher writes a context",
    )


def make_writer(sampler, tokenizer, args, seed):
    """The `write` of data.CONTEXTS: what the sampler's model writes to each prompt, in one batch; None where it is empty, truncated or the prompt too long."""

    def write(prompts):
        ids = [
            chat_ids(tokenizer, plain(tokenizer, prompt), args.context_thinking == "on")
            for prompt in share(prompts)
        ]
        fits = [
            i
            for i, row in enumerate(ids)
            if not sampler.limit or len(row) + args.context_tokens <= sampler.limit
        ]
        texts = [None] * len(ids)
        samples = (
            sampler.sample(
                [ids[i] for i in fits],
                args.context_tokens,
                args.temperature,
                args.top_p,
                args.top_k,
                rank_seed(seed),
            )
            if gather(fits)
            else []
        )
        for i, (response, finished) in zip(fits, samples):
            text = tokenizer.decode(response[:-1]).rpartition("</think>")[2].strip()
            texts[i] = text if finished and text else None
        return gather(texts)

    return write


def make_sampler(model, tokenizer, args, other=None):
    """`other`: a sampler of a model of the same shape; vLLM then uses its engine again."""
    if not 0 < args.top_p <= 1:
        fail(f"--top-p {args.top_p}: above 0 and at most 1")
    return (
        VllmSampler(model, tokenizer, args, other)
        if args.backend == "vllm"
        else TransformersSampler(model, tokenizer, args, other)
    )


def grade_rollouts(verifier, rollouts, truncated="apart"):
    """Writes outcome and reason into each rollout. `truncated` = "incorrect" counts a response that hit the cap as incorrect."""
    mine = share(rollouts)
    graded = gather(
        grade_responses(
            verifier,
            [r.text for r in mine],
            [r.finished for r in mine],
            [r.problem.answer for r in mine],
        )
    )
    for rollout, (outcome, reason) in zip(rollouts, graded):
        rollout.outcome = (
            "incorrect" if outcome == "truncated" and truncated == "incorrect" else outcome
        )
        rollout.reason = reason
