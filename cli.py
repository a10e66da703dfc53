"""The command line: flags of a run, one-line errors, device and threads, what a run runs on."""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time

import torch
import transformers
from tqdm import tqdm

import ranks

HERE = os.path.dirname(os.path.abspath(__file__))


def fail(message):
    """One line on stderr that names the flag or the file, and exit code 2; ends all ranks."""
    rank = f"rank {ranks.rank_and_world()[0]}: " if "WORLD_SIZE" in os.environ else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    raise SystemExit(2)


def one_line(error, length=200):
    """The text of an exception without line breaks, at most `length` characters."""
    return " ".join(str(error).split())[:length]


# ------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """--help shows the script's docstring as written, and defaults; an error is one line."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        fail(message.removeprefix("argument "))

    def parse_args(self, argv=None):
        """Numbers must not be negative, and those of POSITIVE flags not zero."""
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            least = "above 0" if name in POSITIVE else "0 or more"
            if number and not (value > 0 or value == 0 and name not in POSITIVE):
                fail(f"--{name.replace('_', '-')} {value}: must be {least}")
        return args


TRACKERS = ("trackio", "wandb", "tensorboard")
POSITIVE = {
    *("steps", "batch", "lr", "micro_tokens", "max_new_tokens", "sample_batch", "context_tokens"),
    *("refresh", "updates", "problems", "samples"),
}


def tiny(name):
    """The committed embedded checkpoint tiny/NAME, relative to where the user is."""
    return os.path.relpath(os.path.join(HERE, "tiny", name))


def add_run_flags(parser):
    """The flags of every script that loads a model."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="fixes problems, sampling, new weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the computation; auto: bfloat16 on CUDA; trained weights are always float32",
    )
    add("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    add("--overwrite", action="store_true", help="replace an existing --out")
    return add


def add_training_flags(parser, steps, batch, lr, state_every):
    """The flags of every stage besides, with its defaults."""
    add = add_run_flags(parser)
    add("--out", help="run directory; without it a new numbered one under runs/")
    add("--resume", action="store_true", help="go on with the run in --out; other flags as before")
    add("--state-every", type=int, default=state_every, help="steps between states for --resume")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0 = the last only")
    add("--track", choices=TRACKERS, help="send metrics.jsonl's numbers there as well")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--offload", action="store_true", help="under torchrun: weights rest in host memory; slow")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=steps, help="updates, or batches of rollouts")
    add("--batch", type=int, default=batch, help="problems drawn a step")
    add("--lr", type=float, default=lr, help="learning rate of AdamW")
    add("--micro-tokens", type=int, default=2048, help="padded tokens of a micro-batch")
    return add


def set_up(args):
    """Threads, seed and, under torchrun, the other ranks; settles --dtype; returns the device."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torchrun = "WORLD_SIZE" in os.environ
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Under torchrun a rank touches its own card only: a touch takes memory.
    touched = f"cuda:{os.environ['LOCAL_RANK']}" if torchrun and name == "cuda" else name
    try:
        torch.empty(1, device=touched)
    except Exception as error:
        fail(f"--device {args.device}: {one_line(error)}")
    device = torch.device(name)
    if device.type == "cpu" and not args.threads and os.getloadavg()[0] > os.cpu_count():
        print("this machine is busy: --threads 1 may be many times faster")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if torchrun and device.index is not None:
        fail(
            f"--device {args.device}: under torchrun every rank takes a card of its own; give cuda"
        )
    if torchrun:
        return ranks.join(device)
    if getattr(args, "offload", False):
        fail("--offload: needs torchrun, also on one card (torchrun --nproc-per-node 1)")
    return device


def progress(items, what):
    """`items`, with a bar on a terminal and nothing elsewhere."""
    silent = True if ranks.rank_and_world()[0] else None  # None: tqdm looks for a terminal
    return tqdm(items, desc=what, leave=False, disable=silent)


def start(main):
    """Runs a script's main; Ctrl-C is one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


# ------------------------------------------------------------------------------------------------
# What a number needs to be repeated


def provenance():
    """Versions, machine, commit."""
    command = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
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
    """Peak memory in MB, of the rank with most: of the card, or on a CPU of the process."""
    if device.type == "cuda":
        return max(ranks.gather([torch.cuda.max_memory_allocated(device) / 2**20]))
    return max(ranks.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))
