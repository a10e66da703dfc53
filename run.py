"""A run: flags, one-line errors, device, threads, its directory, states, resuming, logs."""

import argparse
import fcntl
import gzip
import itertools
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import ranks
from flags import complaint

HERE = os.path.dirname(os.path.abspath(__file__))
LOGS = "metrics.jsonl", "samples.jsonl", "not_finite.jsonl", "kl_by_position.jsonl"
GIVE_UP = 10  # steps in a row without an update after which a run ends


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
        def _get_help_string(self, action):
            none = action.default in (None, []) or action.default is False
            return action.help if none else super()._get_help_string(action)

    def __init__(self, doc):
        form = dict(usage="%(prog)s FLAGS", formatter_class=self.Formatter)
        super().__init__(description=doc, allow_abbrev=False, **form)

    def error(self, message):
        fail(message.removeprefix("argument "))

    def parse_known_args(self, argv=None, namespace=None):
        """Ends the program at a flag that is given and wrong, or not read: see flags.py."""
        argv = sys.argv[1:] if argv is None else argv
        args, others = super().parse_known_args(argv, namespace)
        given = {word.partition("=")[0] for word in argv}
        for action in self._actions:
            for flag in given.intersection(action.option_strings):
                wrong = complaint(flag, getattr(args, action.dest), args, action.help or "")
                if wrong:
                    fail(wrong)
        return args, others


def tiny(name):
    """The committed embedded checkpoint tiny/NAME, relative to where the user is."""
    return os.path.relpath(os.path.join(HERE, "tiny", name))


def add_run_flags(parser):
    """The flags of every script that loads a model."""
    add = parser.add_argument_group("run", "on which machine, and where it is written").add_argument
    add("--seed", type=int, default=0, help="fixes problems, sampling, new weights")
    devices = ["auto", "cpu", "cuda"]  # which card: CUDA_VISIBLE_DEVICES
    add("--device", default="auto", choices=devices, help="auto: cuda where there is a card")
    dtypes = ["auto", "float32", "bfloat16"]  # of the computation: trained weights are float32
    add("--dtype", default="auto", choices=dtypes, help="to compute in; auto: bfloat16 on CUDA")
    add("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    add("--overwrite", action="store_true", help="of --out: replace an existing one")
    return add


def add_training_flags(parser, steps, batch, lr, state_every):
    """The flags of every stage besides, with its defaults."""
    training = parser.add_argument_group("training", "how long, how fast, in how much memory")
    add = training.add_argument
    add("--steps", type=int, default=steps, help="updates, or batches of rollouts")
    add("--batch", type=int, default=batch, help="problems drawn a step")
    add("--lr", type=float, default=lr, help="learning rate of AdamW")
    add("--lora", type=int, default=0, help="rank of adapters to train; 0 = all weights")
    add("--micro-tokens", type=int, default=2048, help="padded tokens of a micro-batch")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--offload", action="store_true", help="under torchrun: weights rest in host memory; slow")
    add = add_run_flags(parser)
    add("--out", help="run directory; without it a new numbered one under runs/")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0 = the last only")
    add("--state-every", type=int, default=state_every, help="steps between states for --resume")
    add("--resume", action="store_true", help="go on with the run in --out; other flags as before")
    return training.add_argument


def set_up(args):
    """Threads, seed and, under torchrun, the other ranks; settles --dtype; returns the device."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape: > 0.1 s
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    cards, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    auto = "cuda" if cards else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    if device.type == "cuda" and local_rank >= cards:
        fail(f"--device {args.device}: needs CUDA device {local_rank}, {cards} are here")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if "WORLD_SIZE" in os.environ:
        return ranks.join(device)
    if getattr(args, "offload", False):
        fail("--offload: needs torchrun, also on one card (torchrun --nproc-per-node 1)")
    return device


def progress(items, what):
    """`items`, with a bar on a terminal and nothing elsewhere."""
    silent = ranks.rank_and_world()[0] > 0 or None  # None: tqdm looks for a terminal
    return tqdm(items, desc=what, leave=False, disable=silent)


def provenance():
    """What a number needs to be repeated: versions, machine, commit."""
    command = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True)
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        ranks=ranks.rank_and_world()[1],
        commit=git.stdout.strip() or None if git else None,
        started=time.strftime("%Y-%m-%dT%H:%M:%S"),
    )


def peak_memory(device):
    """Peak memory in MB, of the rank with most: of the card, or on a CPU of the process."""
    if device.type == "cuda":
        return max(ranks.gather([torch.cuda.max_memory_allocated(device) / 2**20]))
    return max(ranks.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))


# ------------------------------------------------------------------------------------------------
# Files


def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: whole or not at all, and synced."""
    temporary = os.path.join(os.path.dirname(path), ".saving-" + os.path.basename(path))
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    # torch turns a full disk, and a Ctrl-C while it writes, into a RuntimeError.
    except (OSError, RuntimeError, KeyboardInterrupt) as error:
        Path(temporary).unlink(missing_ok=True)
        reason = error.__context__ or error  # what torch met first
        if KeyboardInterrupt in (type(error), type(reason)):
            raise KeyboardInterrupt from None
        fail(f"{path}: cannot be written ({one_line(reason)})")


def write_file(path, content):
    """Writes bytes whole, the folder too if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_whole(path, lambda target: Path(target).write_bytes(content))


def write_json(path, record):
    """Writes the file, packed if its name ends in .gz; on several ranks rank 0 does."""
    text = json.dumps(record).encode()
    if not ranks.rank_and_world()[0]:
        write_file(path, gzip.compress(text) if path.endswith(".gz") else text)


def check_out(args, directory=True, name="out"):
    """Ends the program where --out cannot be written, or exists. Nothing is created yet."""
    out = vars(args)[name]
    if not out:
        return
    if os.path.lexists(out) and not args.overwrite:
        fail(f"--{name} {out}: exists already; choose another or add --overwrite")
    if not directory and (os.path.isdir(out) or out.endswith("/")):
        fail(f"--{name} {out}: is a directory, not a file")
    above = os.path.abspath(out if directory else os.path.join(out, ".."))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        fail(f"--{name} {out}: {above} is not a directory that can be written to")


def check_run_directory(args):
    """`check_out` for a run: with --overwrite only a run is replaced, with --resume gone on with.

    With --resume returns the newest whole state of the run, empty if there is none; ends the
    program where its settings were others, naming them.
    """
    names = set(os.listdir(args.out)) if args.out and os.path.isdir(args.out) else set()
    if not args.resume:
        check_out(args)
        if names and "metrics.jsonl" not in names:
            fail(f"--out {args.out} --overwrite: not the directory of a run")
        if names and os.path.realpath(args.out) == os.path.realpath(str(args.model)):
            fail(f"--out {args.out} --overwrite: is --model as well")
        return {}
    if "metrics.jsonl" not in names:
        fail(f"--resume: --out {args.out or '(missing)'} is not the directory of a run")
    state, before, now = load_state(args.out), {}, vars(args)
    log = os.path.join(args.out, "metrics.jsonl")
    with suppress(ValueError, KeyError, TypeError), open(log) as stream:
        before = dict(json.loads(stream.readline())["args"])  # unless line 0 is not whole
    saved = names & {"model.safetensors", "model.safetensors.index.json"}  # whole, or in shards
    done = state.get("step", args.steps if saved else 0)
    if done > args.steps or saved and done == args.steps:
        fail(f"--resume: {args.out} has done {done} steps; with its state and more it goes on")
    free = HARMLESS - ({"steps"} if "warmup" in now else set())  # sft.py's rates follow --steps
    others = [
        f"--{name.replace('_', '-')} {before.get(name)} then, {now.get(name)} now"
        for name in sorted({*before, *now} - free)
        if before and before.get(name) != now.get(name)
    ]
    if others:
        fail(f"--resume: the run in {args.out} is another experiment: {'; '.join(others)}")
    return state and dict(state, finished=bool(saved))


# ------------------------------------------------------------------------------------------------
# States: all that --resume needs in one file, state-STEP.pt, torch.save's zip with its checksums.
# Flags that may differ then; model and problems are told by their content, not by their names.
HARMLESS = {
    *("model", "data", "eval_data", "fields", "out", "overwrite", "resume"),
    *("steps", "state_every", "save_every", "eval_every", "vllm_memory", "vllm_eager"),
    *("threads", "device", "micro_tokens", "sample_batch", "checkpointing", "offload"),
    *("skip_unreadable", "unreadable"),
}


def find_states(path):
    """File names, the newest first."""
    return sorted((name for name in os.listdir(path) if name.startswith("state-")), reverse=True)


def load_state(path):
    """The newest state in the run directory `path` that is whole; empty if there is none."""
    for name in find_states(path):
        file = os.path.join(path, name)
        with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(file) as parts:
            if parts.testzip() is None:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                if "logs" not in state:
                    fail(f"--resume: {file} is of an older edition of this code")
                return state
        print(f"{file} is damaged: not used")
    return {}


def fingerprint(problems, model):
    """A number that tells other problems and other weights, by a sample of each tensor's values."""
    texts = [text for p in problems for text in (p.question, p.answer, p.solution, p.context)]
    number = zlib.crc32("\0".join(texts).encode())
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()[:: max(1, weight.numel() // 1000)].float().cpu()
        number = zlib.crc32(name.encode() + values.numpy().tobytes(), number)
    return number


class Run:
    """A run directory: its logs (metrics.jsonl: settings, then a line a step) and its states.

    On several ranks every one has a Run and calls its methods, and rank 0 alone writes. A context
    manager: Ctrl-C inside it ends the program with one line.
    """

    def __init__(self, args, name, identity, state):
        """identity: `fingerprint` of problems and first weights. state: what check_run_directory
        returned; fails where it is of another identity, or its run is still going on.
        """
        self.args, self.state, self.identity = args, state, identity
        self.first = ranks.rank_and_world()[0] == 0
        self.updates, self.skipped = state.get("updates", 0), state.get("skipped", 0)
        if state and state["identity"] != identity:
            fail(f"--resume: {args.out} was on other problems or began with another model")
        self.new, self.table = not args.out, ""
        if self.first:
            args.out = make_directory(args.out, name)
            self.lock = os.open(args.out, os.O_RDONLY)  # ends with the process
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"--out {args.out}: another run is writing there")
        self.path = args.out = ranks.gather([args.out])[0]
        if self.first and not state:  # with --overwrite the run before goes, no other file
            self.remove(*LOGS, "state-*", "model*.safetensors*", "adapter", "step-*", ".saving*")
            script = Path(sys.argv[0]).name
            self.log("metrics", dict(script=script, args=vars(args), **provenance()))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.first:
            os.close(self.lock)
        if kind and self.first and self.new and not self.updates + self.skipped:
            shutil.rmtree(self.path)  # a numbered directory of a run that never was
        elif kind is KeyboardInterrupt:
            goes_on = "goes on" if find_states(self.path) else "starts again"
            print(f"\ninterrupted; --out {self.path} --resume {goes_on}", file=sys.stderr)
            raise SystemExit(130) from None

    def write_card(self):
        """README.md, which the Hugging Face hub shows: where the model is from, and its table."""
        script, model = Path(sys.argv[0]).stem, self.args.model
        base = f"base_model: {model}\n" if model and not os.path.exists(model) else ""
        text = f"---\nlibrary_name: transformers\n{base}tags: [{script}, math, reasoning]\n---\n\n"
        text += f"Trained by `python {script}.py {shlex.join(sys.argv[1:])}`.\n"
        text += f"\n```\n{self.table}\n```\n" if self.table else ""
        write_file(os.path.join(self.path, "README.md"), text.encode())

    def remove(self, *patterns):
        for path in [path for pattern in patterns for path in Path(self.path).glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def log(self, file, record):
        """Adds a line to FILE.jsonl."""
        if not self.first:
            return
        try:
            with open(os.path.join(self.path, file + ".jsonl"), "a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"{self.path}: cannot write {file}.jsonl ({error})")

    def count_update(self, updated, nothing=""):
        """After each step. Ends the program after GIVE_UP steps in a row without an update.

        nothing: why the step had no loss; empty where its gradient was not finite.
        """
        self.updates += updated
        self.skipped = 0 if updated else self.skipped + 1
        if self.skipped == GIVE_UP:
            log = f"{self.path}/not_finite.jsonl"
            reason = nothing or f"loss or gradient not finite (see {log}; is --lr too high?)"
            reason += f", in the last of {GIVE_UP} steps in a row without an update"
            states = [int(name[6:-3]) for name in find_states(self.path)]
            fail(reason + (f"; --resume --steps {states[0]} saves that model" if states else ""))

    def save_state(self, step, model, optimizer, teacher=None, **rest):
        """Everything after `step` steps, and `rest`, if --state-every says so. Two are kept.

        teacher: one that follows the student.
        """
        every, last = self.args.state_every, step == self.args.steps
        if not every or step % every and not last:
            return
        state = dict(step=step, updates=self.updates, skipped=self.skipped, identity=self.identity)
        state.update(planned=self.state.get("planned", self.args.steps), **rest)
        state["model"] = ranks.full_state(model, trained=True)
        state["optimizer"] = ranks.full_state(model, optimizer)
        state["teacher"] = None if teacher is None else ranks.full_state(teacher)
        state["generator"] = torch.get_rng_state()
        state["logs"] = {log.name: log.stat().st_size for log in Path(self.path).glob("*.jsonl")}

        def write(target):
            with open(target, "wb") as stream:  # with a path a full disk would have no name
                torch.save(state, stream)

        if self.first:
            write_whole(os.path.join(self.path, f"state-{step:07d}.pt"), write)
            self.remove(*find_states(self.path)[2:])

    def resume(self, model, optimizer):
        """With --resume: loads the state into model and optimizer, cuts the logs back to its sizes.

        Returns the number of steps done.
        """
        step = self.state.get("step", 0)
        if self.state:
            ranks.load_full_state(model, self.state.pop("model"))  # and free its memory
            ranks.load_full_state(model, self.state.pop("optimizer"), optimizer)
            torch.set_rng_state(self.state["generator"])
        if self.state and self.first:
            self.remove(".saving*")  # what a crash left half-written
            for log in filter(Path.exists, (Path(self.path, name) for name in LOGS)):
                content, size = log.read_bytes(), self.state["logs"].get(log.name, 0)
                next_line = content[size:].partition(b"\n")[0]
                if self.state["finished"] and b'"evaluation"' in next_line:  # after the last step
                    size += len(next_line) + 1
                write_file(str(log), content[: content[:size].rfind(b"\n") + 1])  # whole lines
        if self.args.resume:
            print(f"resumed after step {step}" + ("" if self.state else " (no whole state)"))
        return step

    def finish(self, says=""):
        """The run is complete. Its last state stays: --resume with more --steps goes on with it."""
        if self.first:
            self.write_card()
            self.remove(*find_states(self.path)[1:])
        print(f"\n{says}run directory {self.path}: the trained model, its logs, its card")
        ranks.leave()


def make_directory(out, name):
    """Makes --out, or the first free runs/NAME-001, -002, ...; returns it."""
    for number in itertools.count(1):
        path = out or os.path.join("runs", f"{name}-{number:03d}")
        try:  # mkdir decides who gets a number, should two runs start at once
            os.makedirs(path, exist_ok=bool(out))
            return path
        except OSError as error:
            if out or not isinstance(error, FileExistsError):
                fail(f"--out {path}: {one_line(error)}")
