"""The two engines: prompt ids in, response ids out. `make_sampler` chooses one by --backend.

A sampler has two methods and two attributes, whatever the engine:
    sample(prompts, ...)  [(response ids, finished), ...]; finished: the model ended it, not the cap
    push(model)           the student's weights after an optimizer step
    limit                 tokens of prompt and response together, or None
    logps                 the engine's log-probabilities of what `sample` returned last, a list a
                          response; None with transformers
The sampled end-of-sequence token is part of the response. A truncated response has none.
"""

import os
import random
import sys
from importlib.util import find_spec

import torch
from transformers import GenerationConfig

from model import response_hidden, stop_ids
from ranks import device_of, distributed, full, gather, is_sharded, open_head, rank_and_world
from run import fail, one_line, progress

SEGMENT = 32  # tokens after which rows that have finished leave the batch


def add_sampling_flags(parser, max_new_tokens=160):
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, help="cap of a response, in tokens")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="0 = greedy; only 1 with top-p 1 samples the model's own distribution",
    )
    add("--top-p", type=float, default=1.0, help="1 = off")
    add("--thinking", default="on", choices=["on", "off"], help="the template's enable_thinking")
    add("--sample-batch", type=int, default=256, help="rows sampled at once by transformers")
    add(
        "--backend",
        default="auto",
        choices=["auto", "transformers", "vllm"],
        help="auto: vllm if it is installed and the device is CUDA",
    )
    add("--vllm-memory", type=float, default=0.3, help="share of the card for vLLM's part")
    add("--vllm-eager", action="store_true", help="no CUDA graphs: starts quicker, samples slower")


def choose_backend(args, device):
    """Settles --backend auto in `args`; ends the program if vLLM is wanted and cannot run."""
    if not 0 < args.top_p <= 1:
        fail(f"--top-p {args.top_p}: above 0 and at most 1")
    if args.backend == "auto":
        cuda = device.type == "cuda" and find_spec("vllm")
        args.backend = "vllm" if cuda else "transformers"
        print(f"sampling with {args.backend}")
    if args.backend == "transformers":
        return
    if not 0 < args.vllm_memory < 1:
        fail(f"--vllm-memory {args.vllm_memory}: above 0 and below 1")
    if not find_spec("vllm"):
        fail("--backend vllm: vllm is not installed (pip install -r requirements-vllm.txt)")
    try:
        has = import_vllm().platforms.current_platform.device_type
    except Exception as error:
        fail(f"--backend vllm: vllm cannot be imported ({one_line(error)})")
    if has != device.type or device.index and not distributed():
        hint = " (choose the card by CUDA_VISIBLE_DEVICES)" if device.index else ""
        here = has or "no device that is here"
        fail(f"--backend vllm: this vllm runs on {here}, the model on {device}{hint}")


def make_sampler(model, tokenizer, args, other=None):
    """`other`: a sampler of a model of the same shape, whose engine or copy is used again."""
    kind = VllmSampler if args.backend == "vllm" else TransformersSampler
    return kind(model, tokenizer, args, other)


def check_room(prompts, max_new_tokens, limit):
    """Nothing is truncated silently: rollout.drop_long made sure of it, or it stops here."""
    longest = max(map(len, prompts), default=0)
    if limit and longest + max_new_tokens > limit:
        room = f"the longest prompt has {longest} tokens and the model's context is {limit}"
        fail(f"--max-new-tokens {max_new_tokens}: {room}")


def until_stop(ids, stop):
    """(ids up to and including the first stop id, True), or (ids, False): the rest is padding."""
    for t, token in enumerate(ids):
        if token in stop:
            return ids[: t + 1], True
    return ids, False


# ------------------------------------------------------------------------------------------------
# transformers


class TransformersSampler:
    """`generate` on the training model itself, or on a copy in the computation dtype.

    A sharded model cannot sample: its ranks would have to agree on every token. And float32 weights
    under autocast keep keys and values in float32, twice the memory. In both cases student and
    teacher share a copy: it holds one model's weights at a time, those of the one that samples or
    was pushed.
    """

    logps = None

    def __init__(self, model, tokenizer, args, other=None):
        self.model, self.stop = model, stop_ids(model, tokenizer)
        self.dtype, self.batch = getattr(torch, args.dtype), args.sample_batch
        self.limit = getattr(model.config, "max_position_embeddings", None)
        self.engine = other.engine if other else dict(copy=None, holds=None)
        sharded = any(map(is_sharded, model.parameters()))
        self.copies = sharded or any(weight.dtype != self.dtype for weight in model.parameters())

    def push(self, model):
        """On several ranks all must call it, and so `sample`."""
        if not self.copies:
            return
        if self.engine["copy"] is None:
            self.engine["copy"] = whole_model(model, self.dtype)
        copied = zip(self.engine["copy"].parameters(), model.parameters(), strict=True)
        with torch.no_grad():
            for old, new in copied:
                old.copy_(full(new))
        self.engine["holds"] = model

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, logps=False):
        """Returns (response ids, finished) in the order of `prompts`.

        Ends the program if a prompt leaves no room for the response.
        """
        check_room(prompts, max_new_tokens, self.limit)
        if self.engine["holds"] is not self.model:
            self.push(self.model)
        torch.manual_seed(seed)
        # By length: little padding, and the same rows together.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results = [None] * len(prompts)
        bar = progress(range(len(prompts)), "sampling")
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            with torch.no_grad():
                batch = [prompts[i] for i in rows]
                samples = self.generate(batch, max_new_tokens, temperature, top_p, bar)
            for i, sample in zip(rows, samples, strict=True):
                results[i] = sample
        bar.close()
        return results

    def generate(self, prompts, max_new_tokens, temperature, top_p, bar):
        """One batch, in segments of SEGMENT tokens; finished rows leave it and cost no more."""
        model = self.engine["copy"] if self.copies else self.model
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T), padded on the left
        mask = torch.zeros_like(ids)  # (B, T); generate derives the positions from it
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        settings = dict(eos_token_id=self.stop, pad_token_id=self.stop[0])
        if temperature > 0:
            settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
        own = model.generation_config
        model.generation_config = GenerationConfig()  # generate merges the model's own in: not here
        results, rows, cache = [None] * len(prompts), list(range(len(prompts))), None
        try:
            while rows:
                room = min(SEGMENT, width + max_new_tokens - ids.shape[1])
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=GenerationConfig(
                        max_new_tokens=room, return_dict_in_generate=True, **settings
                    ),
                )
                ids, cache = out.sequences, out.past_key_values  # (B, T), its keys and values
                going = []
                for place, row in enumerate(ids[:, width:].tolist()):
                    response, finished = results[rows[place]] = until_stop(row, self.stop)
                    if not finished and len(response) < max_new_tokens:
                        going.append(place)
                bar.update(len(rows) - len(going))
                rows = [rows[place] for place in going]
                if rows:
                    keep = torch.tensor(going, device=ids.device)
                    cache.batch_select_indices(keep)
                    ids = ids[keep]
                    new = mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])
                    mask = torch.cat([mask[keep], new], 1)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            fail("the model's probabilities are not finite any more (is --lr too high?)")
        finally:
            model.generation_config = own
        return results


def whole_model(model, dtype):
    """A model of the same shape in one piece, its weights to be filled in."""
    with torch.random.fork_rng(devices=[]), device_of(model):
        copy = type(model)._from_config(model.config, dtype=dtype)
    return copy.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# vLLM


class VllmSampler:
    """vLLM's engine in this process: random weights until the first `sample` or `push`.

    `other`: a sampler whose engine is shared (the teacher's with the student's, checkpoint after
    checkpoint in eval.py). It holds one model's weights at a time, and gets the other's when that
    one samples. On CUDA it sleeps while the trainer works: its weights and cache leave the card.

    Weights are pushed as vLLM documents it for an engine in one's own process ("layerwise
    reloading"): reload_weights from an iterator over the checkpoint's names. A tied matrix goes
    under both of its names: under one, nothing is raised and the head of the CPU build stays what
    it was. Run: the CPU build of 0.32.0, untied and tied Llamas, float32 and bfloat16. Not run:
    CUDA.
    """

    def __init__(self, model, tokenizer, args, other=None):
        self.model, self.stop = model, stop_ids(model, tokenizer)
        self.dtype, self.checked, self.logps = getattr(torch, args.dtype), False, None
        if other and shapes(other.model) != shapes(model):
            names = f"{model.name_or_path} has other shapes than {other.model.name_or_path}"
            fail(f"--backend vllm: {names}, whose engine it would use: one shape a run")
        self.engine = other.engine if other else build_engine(model, args)
        self.limit = self.engine["llm"].model_config.max_model_len

    def push(self, model):
        """On several ranks all must call it, and so `sample`: engines get whole tensors."""
        llm = self.engine["llm"]
        if self.engine["asleep"]:
            torch.cuda.empty_cache()  # what the trainer holds and does not use
            llm.wake_up(tags=["weights"])
        tensors = (
            (name, full(weight.detach()).to(self.dtype))
            for name, weight in model.named_parameters(remove_duplicate=False)
        )
        llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=tensors))
        if self.engine["asleep"]:
            llm.wake_up(tags=["kv_cache"])
            self.engine["asleep"] = False
        # Or the next prompts read keys and values of the old weights.
        if llm.reset_prefix_cache() is False:
            fail("--backend vllm: its prefix cache could not be reset after new weights")
        self.engine["holds"] = model

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, logps=False):
        """As TransformersSampler's. Each prompt has a seed of its own, so that a response does not
        depend on which others are sampled beside it. logps: keep the engine's log-probabilities.
        """
        from vllm import SamplingParams

        check_room(prompts, max_new_tokens, self.limit)
        if not self.checked:
            self.checked = True
            some = prompts[:: -(-len(prompts) // 8) or 1]
            check_engine(self, self.model, some, min(100, max_new_tokens))
        if self.engine["holds"] is not self.model:
            self.push(self.model)
        seeds = random.Random(seed)
        settings = [
            SamplingParams(
                seed=seeds.getrandbits(63),
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                detokenize=False,
                logprobs=0 if logps else None,
                stop_token_ids=self.stop,
                ignore_eos=True,  # or the generation config's ids end a response as well
            )
            for _ in prompts
        ]
        inputs = [dict(prompt_token_ids=prompt) for prompt in prompts]
        # A bar on a terminal, as with transformers.
        bar = sys.stderr.isatty() and rank_and_world()[0] == 0
        outputs = self.engine["llm"].generate(inputs, settings, use_tqdm=bar)
        outputs = [output.outputs[0] for output in outputs]
        self.logps = [] if logps else None
        for output in outputs if logps else ():
            rows = zip(output.token_ids, output.logprobs, strict=True)
            self.logps.append([row[token].logprob for token, row in rows])
        if self.engine["sleeps"]:
            self.engine["llm"].sleep(level=2)  # new weights come before the next sample anyway
            self.engine.update(asleep=True, holds=None)
        # The engine keeps the stop id, and samples nothing behind it.
        return [until_stop(list(output.token_ids), self.stop) for output in outputs]


def shapes(model):
    return [(name, weight.shape) for name, weight in model.named_parameters()]


def build_engine(model, args):
    """The engine and its state: whose weights it holds, whether it sleeps between samples."""
    LLM = import_vllm().LLM
    cuda = device_of(model).type == "cuda"
    with torch.random.fork_rng(devices=[]):  # the engine seeds torch's global generator
        try:
            llm = LLM(
                model=model.name_or_path,
                dtype=args.dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=-1,  # as long as the memory allows: `limit`
                # Under torchrun an engine a rank, on the rank's card.
                distributed_executor_backend="external_launcher" if distributed() else None,
                # The CPU build fails on a prompt in pieces that has a seed.
                enable_chunked_prefill=cuda,
                # Beside a trainer: less is set aside for profiling, the rest is for the cache.
                max_num_batched_tokens=4096 if cuda else None,
                enable_sleep_mode=cuda,
                logprobs_mode="raw_logprobs",  # before temperature and top-p, as the trainer's
                gpu_memory_utilization=args.vllm_memory,
                enforce_eager=args.vllm_eager,
                enable_prefix_caching=True,
                generation_config="vllm",
            )
        except Exception as error:  # most often memory
            wanted = f"--vllm-memory {args.vllm_memory}"
            fail(f"--backend vllm: no engine with {wanted} ({one_line(error, 250)})")
    return dict(llm=llm, holds=None, sleeps=cuda, asleep=False)


def import_vllm():
    # The engine in this process: weights go from tensor to tensor.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm.platforms

    return vllm


def check_engine(sampler, model, prompts, tokens):
    """Ends the program if a short greedy sample shows that the engine has other weights.

    Tokens and texts may differ by rounding, so log-probabilities are compared: what the trainer's
    own best token has more than the engine's choice, and how far the two are apart on that choice;
    both in nats, means over all tokens. On SmolLM2-135M in bfloat16 (CPU) rounding makes them 0.00
    and 0.02, a single stale matrix in the middle layer at least 0.12 and 0.26.
    """
    tolerance = 0.1 if sampler.dtype == torch.bfloat16 else 0.03
    samples = sampler.sample(prompts, tokens, temperature=0, logps=True)
    engine_logps = sampler.logps or [None] * len(samples)
    rows = [
        (prompt, ids, logps)
        for prompt, (ids, _), logps in zip(prompts, samples, engine_logps, strict=True)
    ]
    rows = gather(rows)[: max(8, rank_and_world()[1])]
    best, chosen = [], []
    for prompt, ids, _ in rows:  # all ranks score all rows
        with torch.no_grad():
            hidden, (head, _) = response_hidden(model, [(prompt, ids)]), open_head(model)  # (R, D)
            logps = torch.log_softmax(head(hidden).float(), -1)  # (R, V)
        best.append(logps.max(-1).values)  # (R,)
        ids = torch.tensor(ids, device=logps.device)  # (R,)
        chosen.append(logps.gather(-1, ids[:, None])[:, 0])  # (R,)
    worse = (torch.cat(best) - torch.cat(chosen)).mean().item()
    gap = logp_gap([logps for _, _, logps in rows], torch.cat(chosen)) or 0.0
    if not (worse <= tolerance and gap <= tolerance):
        found = f"{worse:.2f} nats below its best token, {gap:.2f} nats apart"
        fail(
            f"--backend vllm: the engine's weights are not the trainer's ({found}): most likely "
            "the push left old weights in a tied lm_head or another tensor; use transformers"
        )


def logp_gap(rows, logps):
    """Mean absolute difference (nats) of the engine's log-probabilities, a list a response, and the
    trainer's of the same tokens, (R,). None without an engine.
    """
    flat = [value for row in rows for value in row or []]
    if not flat:
        return None
    return (torch.tensor(flat, device=logps.device) - logps).abs().mean().item()
