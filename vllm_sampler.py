"""The sampler of --backend vllm, its engine in this process; samplers.py says what a sampler is."""

import os
import random
import sys

import torch

from model import context_limit, sampled_logps, stop_ids
from ranks import device_of, distributed, gather, plain_tensors, rank_and_world
from run import fail, one_line
from samplers import until_stop


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
        self.shapes = [(name, weight.shape) for name, weight in model.named_parameters()]
        if other and other.shapes != self.shapes:
            names = f"{model.name_or_path} has other shapes than the one before"
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
            (name, weight.to(self.dtype))  # a tied matrix under both of its names
            for name, weight in plain_tensors(model, model.state_dict(), self.dtype)
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


def build_engine(model, args):
    """The engine and its state: whose weights it holds, whether it sleeps between samples."""
    LLM = import_vllm().LLM
    cuda, (limit, short) = device_of(model).type == "cuda", context_limit(model.config)
    with torch.random.fork_rng(devices=[]):  # the engine seeds torch's global generator
        try:
            llm = LLM(
                model=model.name_or_path,
                dtype=args.dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=limit if short else -1,  # as long as the memory allows: `limit`
                # Under torchrun an engine a rank, on the rank's card.
                distributed_executor_backend="external_launcher" if distributed() else None,
                # The CPU build fails on a prompt in pieces that has a seed.
                enable_chunked_prefill=cuda,
                # Beside a trainer: less is set aside for profiling, the rest is for the cache.
                max_num_batched_tokens=4096 if cuda else None,
                max_num_seqs=256 if cuda else None,
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

    Tokens and texts may differ by rounding, so log-probabilities are compared: the mean difference
    of the engine's and the trainer's on the engine's own tokens, in nats. On SmolLM2-135M in
    bfloat16 (CPU) rounding makes it 0.02, a single stale matrix in the middle layer 0.26 or more.
    """
    tolerance = 0.1 if sampler.dtype == torch.bfloat16 else 0.03
    samples = sampler.sample(prompts, tokens, temperature=0, logps=True)
    rows = [
        (prompt, ids, logps)
        for prompt, (ids, _), logps in zip(prompts, samples, sampler.logps, strict=True)
    ]
    rows = gather(rows)[: max(8, rank_and_world()[1])]  # all ranks score all of them
    trainers = sampled_logps(model, [(prompt, ids) for prompt, ids, _ in rows])  # (R,)
    engines = torch.tensor([value for _, _, logps in rows for value in logps]).to(trainers)  # (R,)
    gap = (engines - trainers).abs().mean().item()
    if not gap <= tolerance:
        fail(
            f"--backend vllm: the engine's weights are not the trainer's ({gap:.2f} nats apart): "
            "most likely the push left old weights in a tied lm_head or another tensor; use "
            "transformers"
        )
