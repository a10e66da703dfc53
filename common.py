"""What every stage does the same way: flags of a run, errors, devices, model loading, run directories, the log.

Nothing of the method is in here. Imports of torch and transformers are late, so that `--help` and a wrong flag answer at once.
"""
import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def fail(message):
    """One line on stderr that names the flag or the file, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(doc):
    """A parser whose --help shows the script's docstring as written, defaults included."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)


def add_run_flags(parser, out="run directory (else a fresh numbered one under runs/)"):
    group = parser.add_argument_group("run")
    group.add_argument("--out", help=out)
    group.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    group.add_argument("--seed", type=int, default=0, help="fixes problems, sampling and initial weights")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the weights; auto = as saved")
    group.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 = torch's own choice")


def positive(parser, args, *names):
    """Refuses flags that must be above zero, by name."""
    for name in names:
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")


def set_up(args):
    """Threads, seed and device; returns the device. The first second of every script. No numeric flag may be negative."""
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
    try:
        torch.empty(1, device=name)
    except Exception as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0][:150]}")
    return torch.device(name)


def load_model(path, device, dtype="auto"):
    """(model, tokenizer) of a Hugging Face directory or id, safetensors only, no remote code. Ends the program if it cannot."""
    if not os.path.isdir(path) and path.count("/") != 1:
        fail(f"--model {path}: no such directory (a Hugging Face id has the form owner/name)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True)
    except Exception as error:                              # a wrong id, no network, pickle-only weights, custom code: one line is enough
        fail(f"--model {path}: {' '.join(str(error).split())[:300]}")
    if tokenizer.chat_template is None:
        fail(f"--model {path}: its tokenizer has no chat template")
    if stop_ids(model, tokenizer) == []:
        fail(f"--model {path}: neither generation config nor tokenizer names an end-of-sequence token")
    model.to(device).eval()                                 # eval for the whole run: no dropout, in the student or the teacher
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
        ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size                       # (1, T)
        logits = model(input_ids=ids).logits.float()                                                     # (1, T, V)
        head = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state).float()  # (1, T, V)
    if not torch.allclose(logits, head, rtol=1e-2, atol=1e-2):
        fail("--model: its logits are not lm_head(hidden states) (soft-capping or scaling of logits?), which the loss relies on")


def save_model(path, model, tokenizer):
    """Writes a plain Hugging Face directory. Each file appears whole or not at all: written under a temporary name, then renamed."""
    temporary = os.path.join(path, ".saving")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for name in sorted(os.listdir(temporary)):
        os.replace(os.path.join(temporary, name), os.path.join(path, name))
    os.rmdir(temporary)


def write_json(path, record):
    """Writes the file whole or not at all, its folder too if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".saving", "w") as stream:
        json.dump(record, stream)
    os.replace(path + ".saving", path)


def check_out(args):
    """Fails early if --out exists. Nothing is created yet: that is `Run`'s, after everything loaded."""
    if args.out and os.path.exists(args.out) and not args.overwrite:
        fail(f"--out {args.out}: exists already; choose another or add --overwrite")


class Run:
    """A run directory and its log: metrics.jsonl (line 0 the settings, then one line a step) and samples.jsonl."""

    def __init__(self, args, name):
        if args.out:
            os.makedirs(args.out, exist_ok=True)
        else:
            number = 1
            while True:                                     # mkdir decides who gets a number, should two runs start at once
                args.out = os.path.join("runs", f"{name}-{number:03d}")
                try:
                    os.makedirs(args.out)
                    break
                except FileExistsError:
                    number += 1
        self.path = args.out
        for stale in os.listdir(self.path):                 # with --overwrite: the logs of the run before
            if stale.endswith(".jsonl"):
                os.remove(os.path.join(self.path, stale))
        self.log("metrics", dict(script=os.path.basename(sys.argv[0]), args=vars(args), **provenance()))

    def log(self, file, record):
        with open(os.path.join(self.path, file + ".jsonl"), "a") as stream:
            stream.write(json.dumps(record) + "\n")


def provenance():
    """What a number needs to be repeated: versions, machine, commit."""
    import platform

    import torch
    import transformers
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                threads=torch.get_num_threads(), commit=commit or None, started=time.strftime("%Y-%m-%dT%H:%M:%S"))


def peak_memory(device):
    """Peak memory in MB: of the device where it is a GPU, else of this process."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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


def response_hidden(model, rows):
    """Hidden states that predict the response tokens of `rows`: (R, D), row after row.

    A row alternates ids that are given and ids that are scored: (prompt, response), or, where the teacher's copy has insertions,
    (prompt, response part, insertion, response part, ...). A scored token is predicted at the position before it. Padding stands on
    the right, where causal attention never looks, so it changes nothing; the mask comes from lengths, never from ids (pad may equal eos).
    """
    import torch
    width = max(sum(map(len, row)) for row in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)                               # (B, T)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)                              # (B, T)
    for i, row in enumerate(rows):
        flat = [token for piece in row for token in piece]
        scored = [number % 2 == 1 for number, piece in enumerate(row) for _ in piece]
        ids[i, :len(flat) - 1] = torch.tensor(flat[:-1])                                # the last token predicts nothing here
        mask[i, :len(flat) - 1] = torch.tensor(scored[1:])
    ids, mask = ids.to(model.device), mask.to(model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state         # (B, T, D)
    return hidden[mask]                                                                 # (R, D)


def response_targets(model, rows):
    """The scored ids of `rows` in the order of `response_hidden`: (R,)."""
    import torch
    return torch.tensor([token for row in rows for piece in row[1::2] for token in piece], device=model.device)
