"""What every stage does the same way: flags of a run, errors, devices, model loading, run directories, the log.

Nothing of the method is in here. Imports of torch and transformers are late, so that `--help` and a wrong flag answer at once.
"""

import argparse
import glob
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib

import ranks

HERE = os.path.dirname(os.path.abspath(__file__))


def fail(message):
    """One line on stderr that names the flag or the file, and exit code 2. Under torchrun this ends the other ranks, too."""
    print(
        f"rank {ranks.rank_and_world()[0]}: " * ("WORLD_SIZE" in os.environ) + f"error: {message}",
        file=sys.stderr,
    )
    raise SystemExit(2)


def make_parser(doc):
    """A parser whose --help shows the script's docstring as written, defaults included."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)


def add_run_flags(
    parser, resume_every=0, out="run directory (else a fresh numbered one under runs/)"
):
    group = parser.add_argument_group("run")
    group.add_argument("--out", help=out)
    group.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    if resume_every:
        group.add_argument(
            "--resume",
            action="store_true",
            help="go on with the run in --out from its newest whole state; the other flags as before",
        )
        group.add_argument(
            "--state-every",
            type=int,
            default=resume_every,
            help="steps between states for --resume, the newest two of which are kept until the run ends; 0 = none",
        )
        group.add_argument(
            "--dry-run",
            action="store_true",
            help="print the prompts and an estimate of the memory, load no weights, write nothing, and stop",
        )
        group.add_argument(
            "--checkpointing",
            action="store_true",
            help="compute activations again in the backward pass: less memory, about a third slower",
        )
        group.add_argument(
            "--offload",
            action="store_true",
            help="under torchrun: weights, gradients and optimizer state rest in host memory; far less memory on the card, much slower",
        )
    group.add_argument(
        "--seed", type=int, default=0, help="fixes problems, sampling and initial weights"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the computation; auto = bfloat16 on CUDA, float32 on a CPU. Trained weights, their gradients and optimizer are always float32",
    )
    group.add_argument(
        "--threads", type=int, default=0, help="CPU threads of torch; 0 = torch's own choice"
    )


def positive(parser, args, *names):
    """Refuses flags that must be above zero, by name."""
    for name in names:
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")


def set_up(args):
    """Threads, seed, device and, under torchrun, the other ranks; returns the device and settles --dtype. The first second of every script. No numeric flag may be negative."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value < 0:
            fail(f"--{name.replace('_', '-')} {value}: must not be negative")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:  # under torchrun on this rank's own card: a touch takes memory on it
        torch.empty(
            1,
            device=f"cuda:{os.environ['LOCAL_RANK']}"
            if "WORLD_SIZE" in os.environ and name == "cuda"
            else name,
        )
    except Exception as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0][:150]}")
    device = torch.device(name)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        if device.index is not None:
            fail(
                f"--device {args.device}: under torchrun every rank takes a card of its own; give --device cuda"
            )
        return ranks.start(device)
    if getattr(args, "offload", False):
        fail("--offload: needs torchrun, also on one card (torchrun --nproc-per-node 1)")
    return device


def load_tokenizer(path):
    """(configuration, tokenizer) of a Hugging Face directory or id, no remote code. Ends the program if it cannot."""
    if not os.path.isdir(path) and path.count("/") != 1:
        fail(f"--model {path}: no such directory (a Hugging Face id has the form owner/name)")
    from transformers import AutoConfig, AutoTokenizer

    try:
        config, tokenizer = (
            AutoConfig.from_pretrained(path, trust_remote_code=False),
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        )
    except Exception as error:
        fail(f"--model {path}: {' '.join(str(error).split())[:300]}")
    if tokenizer.chat_template is None:
        fail(f"--model {path}: its tokenizer has no chat template")
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, enable_thinking=True
        )
    except Exception as error:  # templates are programs, and may raise what they like
        fail(
            f"--model {path}: its chat template fails on a plain user turn ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
        )
    return config, tokenizer


def load_model(path, device, dtype="float32"):
    """(model, tokenizer) of a Hugging Face directory or id, safetensors only, no remote code. Ends the program if it cannot."""
    import torch
    from transformers import AutoModelForCausalLM

    _, tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # a wrong id, no network, pickle-only weights, custom code: one line is enough
        fail(f"--model {path}: {' '.join(str(error).split())[:300]}")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # often a temperature without do_sample: it loads, but could not be saved
        model.generation_config.do_sample = True
    if stop_ids(model, tokenizer) == []:
        fail(
            f"--model {path}: neither generation config nor tokenizer names an end-of-sequence token"
        )
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            fail(f"--model {path}: {name} holds values that are not finite")
    model.to(device).eval()  # eval for the whole run: no dropout, in the student or the teacher
    check_head(model)
    return model, tokenizer


def stop_ids(model, tokenizer):
    """Every id that ends a response: a chat model often has several, and the base model's eos may not be the chat's."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def check_head(model):
    """Refuses a model whose logits are not lm_head(last hidden state): the losses here start from hidden states."""
    import torch

    with torch.no_grad():
        ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size  # (1, T)
        logits = model(input_ids=ids).logits.float()  # (1, T, V)
        head = model.get_output_embeddings()(
            model.base_model(input_ids=ids).last_hidden_state
        ).float()  # (1, T, V)
    if not torch.allclose(logits, head, rtol=1e-2, atol=1e-2):
        fail(
            "--model: its logits are not lm_head(hidden states) (soft-capping or scaling of logits?), which the loss relies on"
        )


def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: the file appears whole or not at all, also after a power cut."""
    temporary = os.path.join(os.path.dirname(path), ".saving-" + os.path.basename(path))
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        fail(f"{path}: cannot be written ({' '.join(str(error).split())[:150]})")


def save_model(path, model, tokenizer):
    """Writes a plain Hugging Face directory, in float32; each file appears whole or not at all. On several ranks all must call it, rank 0 writes."""
    temporary = os.path.join(path, ".saving")
    names = {
        name for name, _ in (*model.named_parameters(), *model.named_buffers())
    }  # a tied matrix once
    state = ranks.full_state(
        {name: tensor for name, tensor in model.state_dict().items() if name in names}
    )
    if ranks.rank_and_world()[0]:
        return
    try:
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"{path}: the model cannot be written ({' '.join(str(error).split())[:150]})")
    for name in sorted(os.listdir(temporary)):
        write_whole(
            os.path.join(path, name),
            lambda target: os.replace(os.path.join(temporary, name), target),
        )
    os.rmdir(temporary)


def write_json(path, record):
    """Writes the file whole or not at all, its folder too if need be. On several ranks rank 0 does."""
    if ranks.rank_and_world()[0]:
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_whole(path, lambda target: open(target, "w").write(json.dumps(record)))


def check_out(args):
    """Fails early if --out exists, or with --resume if there is nothing to resume. Nothing is created or deleted yet: that is `Run`'s, after everything loaded."""
    if getattr(args, "resume", False):
        if not args.out or not os.path.isfile(os.path.join(args.out, "metrics.jsonl")):
            fail(f"--resume: --out {args.out or '(missing)'} is not the directory of a run")
        if not find_states(args.out) and os.path.isfile(
            os.path.join(args.out, "model.safetensors")
        ):
            fail(f"--resume: the run in {args.out} is finished")
    elif args.out and os.path.exists(args.out) and not args.overwrite:
        fail(f"--out {args.out}: exists already; choose another or add --overwrite")
    elif args.out and os.path.isdir(args.out):
        names = set(os.listdir(args.out))
        if names and not names & {"metrics.jsonl", "model.safetensors"}:
            fail(f"--out {args.out} --overwrite: not the directory of a run")
        if os.path.realpath(args.out) == os.path.realpath(str(getattr(args, "model", ""))):
            fail(f"--out {args.out} --overwrite: is --model as well")


# A state holds everything that --resume needs, in one file: state-STEP-CHECKSUM.pt. The checksum in the name tells a damaged file.

HARMLESS = {
    "out",
    "overwrite",
    "resume",
    "state_every",
    "save_every",
    "eval_every",
    "give_up",
    "threads",
    "device",
    "micro_tokens",
    "teacher_tokens",
    "chunk",
    "sample_batch",
    "checkpointing",
    "offload",
    "dry_run",
    "vllm_memory",
    "vllm_eager",
}


def find_states(path):
    """File names, the newest first."""
    return sorted((name for name in os.listdir(path) if name.startswith("state-")), reverse=True)


def checksum(path):
    with open(path, "rb") as stream:
        value = 0
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


class Run:
    """A run directory: its logs (metrics.jsonl: line 0 the settings, then one line a step; samples.jsonl) and its states.

    With --resume the directory is the one of the run before, and nothing in it changes until `resume` is called.
    On several ranks every one has a Run and calls its methods, and rank 0 alone writes.
    """

    def __init__(self, args, name):
        self.args, self.first = args, ranks.rank_and_world()[0] == 0
        if not self.first:
            pass
        elif args.out:
            os.makedirs(args.out, exist_ok=True)
        else:
            number = 1
            while True:  # mkdir decides who gets a number, should two runs start at once
                args.out = os.path.join("runs", f"{name}-{number:03d}")
                try:
                    os.makedirs(args.out)
                    break
                except FileExistsError:
                    number += 1
        self.path = args.out = ranks.gather([args.out])[0]
        if self.first and not args.resume:
            for pattern in (
                "metrics.jsonl",
                "samples.jsonl",
                "not_finite.jsonl",
                "kl_by_position.jsonl",
                "state-*",
                "model*.safetensors*",
                "step-*",
            ):
                for stale in glob.glob(
                    os.path.join(glob.escape(self.path), pattern)
                ):  # with --overwrite: the run before
                    shutil.rmtree(stale) if os.path.isdir(stale) else os.remove(stale)
            self.log_settings()

    def log_settings(self):
        self.log(
            "metrics",
            dict(script=os.path.basename(sys.argv[0]), args=vars(self.args), **provenance()),
        )

    def log(self, file, record):
        if not self.first:
            return
        try:
            with open(os.path.join(self.path, file + ".jsonl"), "a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"{self.path}: cannot write {file}.jsonl ({error})")

    def save_state(self, step, problems, model, optimizer, **rest):
        """Model, optimizer, generator, settings and `rest` after `step` steps, if --state-every says so. The newest two are kept."""
        if not self.args.state_every or step % self.args.state_every:
            return
        import torch

        state = dict(
            step=step,
            args=vars(self.args),
            problems=fingerprint(problems),
            model=ranks.full_state(model.state_dict()),
            optimizer=ranks.full_state(optimizer.state_dict()),
            generator=torch.get_rng_state(),
            **rest,
        )
        if not self.first:
            return
        unnamed = os.path.join(self.path, ".saving-state")
        write_whole(unnamed, lambda target: torch.save(state, target))
        os.replace(unnamed, os.path.join(self.path, f"state-{step:07d}-{checksum(unnamed)}.pt"))
        for name in find_states(self.path)[2:]:
            os.remove(os.path.join(self.path, name))

    def resume(self, problems, model, optimizer):
        """With --resume: loads the newest whole state into model and optimizer, cuts the logs back to its step, and returns it; else an empty dict.

        Ends the program where the settings or problems of that run were others, naming them.
        """
        if not self.args.resume:
            return {}
        import torch

        state = {}
        for name in find_states(self.path):
            if name == f"{name[:13]}-{checksum(os.path.join(self.path, name))}.pt":
                state = torch.load(
                    os.path.join(self.path, name),
                    map_location="cpu",
                    weights_only=True,
                    mmap=ranks.distributed(),
                )  # several ranks read one copy
                break
            print(f"{os.path.join(self.path, name)} is damaged: not used")
        before, now = state.get("args") or self.first_args(), vars(self.args)
        other = [
            f"--{key.replace('_', '-')} {before.get(key)} then, {now.get(key)} now"
            for key in sorted({*before, *now} - HARMLESS)
            if before and before.get(key) != now.get(key)
        ]
        if other:
            fail(f"--resume: the run in {self.path} is another experiment: {'; '.join(other)}")
        if state:
            if state["problems"] != fingerprint(problems):
                fail(f"--resume: the run in {self.path} was on other problems")
            ranks.load_full_state(model, state["model"])
            ranks.load_full_optimizer(optimizer, state["optimizer"])
            torch.set_rng_state(state["generator"])
        if self.first:
            for leftover in glob.glob(
                os.path.join(self.path, ".saving*")
            ):  # what a crash left half-written
                shutil.rmtree(leftover) if os.path.isdir(leftover) else os.remove(leftover)
            for log in glob.glob(os.path.join(self.path, "*.jsonl")):
                self.cut(log, state.get("step", 0))
            if not before:  # that run died before it had written a line
                self.log_settings()
        print(
            f"resumed after step {state.get('step', 0)}"
            + " (no whole state: from the start)" * (not state)
        )
        return state

    def first_args(self):
        """The settings in line 0 of the metrics, for a run that has no whole state; none where that line is not whole."""
        with open(os.path.join(self.path, "metrics.jsonl")) as stream:
            try:
                return json.loads(stream.readline())["args"]
            except (ValueError, KeyError):
                return {}

    @staticmethod
    def cut(path, step):
        """Drops the lines of a log that are later than `step`, and whatever a crash left half-written."""
        kept = []
        for line in open(path, "rb"):
            try:
                if line.endswith(b"\n") and json.loads(line).get("step", 0) <= step:
                    kept.append(line)
            except ValueError:
                continue
        write_whole(path, lambda target: open(target, "wb").writelines(kept))

    def finish(self):
        """The run is complete: its states are of no use any more."""
        for name in find_states(self.path) if self.first else ():
            os.remove(os.path.join(self.path, name))
        ranks.stop()


def fingerprint(problems):
    return zlib.crc32(
        "\0".join(text for p in problems for text in (p.question, p.answer, p.solution)).encode()
    )


def optimizer_step(model, optimizer, clip):
    """(gradient norm before clipping, whether a step was taken): none where the gradient is not finite. Gradients are cleared."""
    import torch

    norm = ranks.full(
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    ).item()  # over all ranks, so all agree
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return norm, finite


def provenance():
    """What a number needs to be repeated: versions, machine, commit."""
    import platform

    import torch
    import transformers

    try:
        commit = subprocess.run(
            ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git here
        commit = None
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        ranks=ranks.rank_and_world()[1],
        commit=commit or None,
        started=time.strftime("%Y-%m-%dT%H:%M:%S"),
    )


def peak_memory(device):
    """Peak memory in MB, of the rank that has most: of the device where it is a GPU, else of the process."""
    if device.type == "cuda":
        import torch

        return max(ranks.gather([torch.cuda.max_memory_allocated(device) / 2**20]))
    import resource

    return max(ranks.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of prompt and response ids -> hidden states at the response positions. Axes: B rows, T tokens, D width, R response tokens.


def micro_batches(lengths, budget):
    """Splits rows into groups of similar length with at most `budget` padded tokens each (always at least one row).

    Returns lists of row indices, the longest first, so that a run that does not fit in memory fails in its first group.
    """
    groups, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def deal(lengths, budget):
    """The micro-batches of this rank, on one rank all: [(row indices, whether they count), ...].

    Rows are dealt out by length, so that ranks have about equal work. One that gets fewer micro-batches than another runs its shortest row again
    instead, or if it has none the shortest of all, not counted, since all ranks must run equally many.
    """
    rank, world = ranks.rank_and_world()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    hands = [order[r::world] for r in range(world)]
    groups = [
        [[hand[i] for i in group] for group in micro_batches([lengths[i] for i in hand], budget)]
        for hand in hands
    ]
    missing = max(map(len, groups)) - len(groups[rank])
    return [(group, True) for group in groups[rank]] + [
        ((hands[rank] or order)[-1:], False)
    ] * missing


def response_hidden(model, rows):
    """Hidden states that predict the response tokens of `rows`: (R, D), row after row.

    A row alternates ids that are given and ids that are scored: (prompt, response), or, where the teacher's copy has insertions,
    (prompt, response part, insertion, response part, ...). A scored token is predicted at the position before it. Padding stands on
    the right, where causal attention never looks, so it changes nothing; the mask comes from lengths, never from ids (pad may equal eos).
    """
    import numpy as np
    import torch

    width = max(sum(map(len, row)) for row in rows)
    ids, scored = (
        np.zeros((len(rows), width), dtype=np.int64),
        np.zeros((len(rows), width), dtype=bool),
    )
    for i, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row):
            ids[i, start : start + len(piece)] = piece
            scored[i, start : start + len(piece)] = number % 2
            start += len(piece)
    ids = torch.from_numpy(ids[:, :-1]).to(
        ranks.device_of(model)
    )  # (B, T): the last token predicts nothing here
    mask = torch.from_numpy(scored[:, 1:]).to(ranks.device_of(model))  # (B, T)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return hidden[mask]  # (R, D)


def response_targets(model, rows):
    """The scored ids of `rows` in the order of `response_hidden`: (R,)."""
    import torch

    return torch.tensor(
        [token for row in rows for piece in row[1::2] for token in piece],
        device=ranks.device_of(model),
    )


def token_chunks(count, model, millions):
    """Slices of `count` tokens, each with at most `millions` million logits of this model's vocabulary (always at least one token)."""
    size = max(1, int(millions * 1e6) // model.get_output_embeddings().weight.shape[0])
    return [slice(start, start + size) for start in range(0, count, size)]
