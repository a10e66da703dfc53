"""The two engines: prompt ids in, response ids out. `make_sampler` chooses one by --backend.

A sampler has two methods and two attributes, whatever the engine:
    sample(prompts, ...)  [(response ids, finished), ...]; finished: the model ended it, not the cap
    push(model)           the student's weights after an optimizer step
    limit                 tokens of prompt and response together, or None
    logps                 the engine's log-probabilities of what `sample` returned last, a list a
                          response; None where the model itself samples
The sampled end-of-sequence token is part of the response. A truncated response has none.
"""

import math
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from model import context_limit, sampled_logps, stop_ids
from ranks import device_of, has_adapters, is_sharded, plain_tensors
from run import fail, one_line, progress

SEGMENT = 32  # tokens after which rows that have finished leave the batch


def add_sampling_flags(parser):
    add = parser.add_argument_group("sampling", "how responses are drawn").add_argument
    add("--max-new-tokens", type=int, default=160, help="cap of a response, in tokens")
    own = "0 = greedy; only 1 with top-p 1 samples the model's own distribution"
    add("--temperature", type=float, default=1.0, help=own)
    add("--top-p", type=float, default=1.0, help="of --temperature: mass sampled from; 1 = all")
    add("--thinking", default="on", choices=["on", "off"], help="the template's enable_thinking")
    add("--sample-batch", type=int, default=256, help="of --backend auto, transformers: rows")
    backends, auto = ["auto", "transformers", "vllm"], "auto: vllm on CUDA where it is installed"
    add("--backend", default="auto", choices=backends, help=auto)
    vllm = "auto, vllm" if find_spec("vllm") else "vllm"
    add("--vllm-memory", type=float, default=0.5, help=f"of --backend {vllm}: share of the card")
    add("--vllm-eager", action="store_true", help=f"of --backend {vllm}: no CUDA graphs")


def choose_backend(args, device):
    """Settles --backend auto in `args`; ends the program if vLLM is wanted and cannot run."""
    if args.backend == "auto":
        cuda = device.type == "cuda" and find_spec("vllm")
        args.backend = "vllm" if cuda else "transformers"
        print(f"sampling with {args.backend}")
    if args.backend == "transformers":
        return
    try:
        from vllm_sampler import import_vllm

        has = import_vllm().platforms.current_platform.device_type
    except Exception as error:
        hint = "pip install -r requirements-vllm.txt"
        fail(f"--backend vllm: vllm cannot be imported ({one_line(error)}); {hint}")
    if has != device.type:
        here = has or "no device that is here"
        fail(f"--backend vllm: this vllm runs on {here}, the model on {device}")


def make_sampler(model, tokenizer, args, other=None):
    """`other`: a sampler of a model of the same shape, whose engine or copy is used again."""
    if args.backend == "vllm":
        from vllm_sampler import VllmSampler

        return VllmSampler(model, tokenizer, args, other)
    return TransformersSampler(model, tokenizer, args, other)


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

    A sharded model cannot sample: its ranks would have to agree on every token. Float32 weights
    under autocast keep keys and values in float32, twice the memory, and adapters (--lora) cost
    time at every token. In these cases student and teacher share a copy: it holds one model's
    weights at a time, those of the one that samples or was pushed.
    """

    def __init__(self, model, tokenizer, args, other=None):
        self.model, self.stop = model, stop_ids(model, tokenizer)
        self.dtype, self.batch = getattr(torch, args.dtype), args.sample_batch
        self.limit, self.logps = context_limit(model.config)[0], None
        self.engine = other.engine if other else dict(copy=None, holds=None)
        sharded = any(map(is_sharded, model.parameters()))
        self.copies = sharded or has_adapters(model)
        self.copies |= any(weight.dtype != self.dtype for weight in model.parameters())
        self.segment = None

    def push(self, model):
        """On several ranks all must call it, and so `sample`."""
        if not self.copies:
            return
        if self.engine["copy"] is None:  # of the same shape, in one piece
            with torch.random.fork_rng(devices=[]), device_of(model):
                copy = AutoModelForCausalLM.from_config(model.config, dtype=self.dtype)
            self.engine["copy"] = copy.eval().requires_grad_(False)
        old = tensors_of(self.engine["copy"])
        with torch.no_grad():
            for name, new in plain_tensors(model, tensors_of(model)):
                old[name].copy_(new)
        self.engine["holds"] = model

    def sample(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, logps=False):
        """Returns (response ids, finished) in the order of `prompts`."""
        if self.engine["holds"] is not self.model:
            self.push(self.model)
        torch.manual_seed(seed)
        # By length: little padding, and the same rows together.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results = [None] * len(prompts)
        bar = progress(range(len(prompts)), "sampling")
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            batch = [prompts[i] for i in rows]
            with torch.no_grad():
                samples = self.generate(batch, max_new_tokens, temperature, top_p, bar)
            for i, sample in zip(rows, samples, strict=True):
                results[i] = sample
        bar.close()
        self.logps = self.score(prompts, results) if logps and self.copies else None
        return results

    def score(self, prompts, results):
        """The copy's log-probabilities of what it sampled: the trainer's are compared with them."""
        rows = [(prompt, ids) for prompt, (ids, _) in zip(prompts, results, strict=True)]
        return [sampled_logps(self.engine["copy"], [row]).tolist() for row in rows]

    def generate(self, prompts, max_new_tokens, temperature, top_p, bar):
        """One batch, in segments of SEGMENT tokens; finished rows leave it and cost no more."""
        model = self.engine["copy"] if self.copies else self.model
        width = max(map(len, prompts))
        padded = [([0] * (width - len(prompt)), prompt) for prompt in prompts]  # on the left
        ids = [gap + prompt for gap, prompt in padded]
        mask = [gap + [1] * len(prompt) for gap, prompt in padded]
        ids = torch.tensor(ids, device=model.device)  # (B, T)
        mask = torch.tensor(mask, device=model.device)  # (B, T); generate gets the positions of it
        settings = dict(eos_token_id=self.stop, pad_token_id=self.stop[0])
        if temperature > 0:
            settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
        own = model.generation_config
        model.generation_config = GenerationConfig()  # generate merges the model's own in: not here
        # Of a slice, which generate takes, matmul would copy a frozen head's weights once a row.
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, states: states[0].contiguous())
        results, rows, cache = [None] * len(prompts), list(range(len(prompts))), None
        if self.segment is None:
            self.segment = SEGMENT if rows_can_leave(model) else math.inf
        try:
            while rows:
                room = min(self.segment, width + max_new_tokens - ids.shape[1])
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
            hook.remove()
        return results


def rows_can_leave(model):
    """Whether all that the model's cache holds is keys and values, of which rows can be dropped;
    states of linear attention and convolutions cannot.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)  # (1, T)
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if type(cache) is not DynamicCache:
        return False
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def tensors_of(model):
    """All that a model computes with: {name: parameter or buffer}."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
