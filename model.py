"""The model: loading and saving, rows of token ids -> hidden states, the backward pass, the step.

Axes: B rows, T tokens of a row, D width, V vocabulary, R response tokens of a micro-batch,
C those of a chunk, P those of a piece.
"""

import copy
import functools
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import ranks
from ranks import device_of, open_head
from run import fail, one_line, write_whole

CLIP = 1.0  # gradient norm, the paper's

# Logits of each model that exist at once, and those whose loss is computed at once. On a CPU a
# piece fits the cache; on a GPU each costs kernel launches, so there they are few.
CHUNK = {"cpu": 64e6, "cuda": 256e6}
PIECE = {"cpu": 1e6, "cuda": 64e6}
# Where the loss is compiled, torch.compile's options: with the default ones inductor would write
# log S - log T to memory in float32, and read it again.
COMPILE = {"cuda": dict(options={"realize_reads_threshold": 100})}

# ------------------------------------------------------------------------------------------------
# Loading and saving


TEXT = "one two  three\n\n40 + 2? мир"  # must come back from a tokenizer, and out of a template


def load_tokenizer(path):
    """The tokenizer of a Hugging Face directory or id; no remote code."""
    owner = path.split("/")[0]
    if not os.path.isdir(path) and (path.count("/") != 1 or owner == "." or os.path.isdir(owner)):
        fail(f"--model {path}: no such directory (a Hugging Face id has the form owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        fail(f"--model {path}: {one_line(error, 300)}")
    # transformers rebuilds some tokenizers by the class that their configuration names.
    back = tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids).strip()
    if back != TEXT:
        wrong = "a wrong tokenizer_class in tokenizer_config.json?"
        fail(f"--model {path}: its tokenizer changes text, {TEXT!r} to {back!r} ({wrong})")
    try:
        prompt = tokenizer.decode(data.chat_ids(tokenizer, TEXT, True))
    except Exception as error:  # templates are programs, and may raise what they like
        kind = type(error).__name__
        fail(f"--model {path}: its chat template fails on a user turn ({kind}: {one_line(error)})")
    if TEXT not in prompt:
        fail(f"--model {path}: its chat template drops the user's text, or changes it: {prompt!r}")
    return tokenizer


def load_model(path, device, dtype="float32"):
    """(model, tokenizer) of a Hugging Face directory or id; safetensors only, no remote code.

    Ends the program at whatever would make it another model than the one that is named, or keep it
    from being saved.
    """
    tokenizer = load_tokenizer(path)
    options = dict(dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a wrong id, no network, pickled weights, code: one line is enough
        fail(f"--model {path}: {one_line(error, 300)}")
    # What the checkpoint lacks transformers fills in at random.
    others = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    lacks, extra = sorted({*found["missing_keys"], *others}), sorted(found["unexpected_keys"])
    unused = f"{len(extra)} weights are not used: {', '.join(extra[:3])}" if extra else ""
    if lacks:
        missing = f"{len(lacks)} weights are missing or of another shape: {', '.join(lacks[:3])}"
        fail(f"--model {path}: {'; '.join(filter(None, [missing, unused]))}")
    if extra:
        print(f"--model {path}: {unused}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            fail(f"--model {path}: {name} holds values that are not finite")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(tokenizer) > len(embedding.weight):
        has = f"{len(tokenizer)} tokens, the model {len(embedding.weight)}"
        fail(f"--model {path}: its tokenizer has {has}")
    # The file decides, not the configuration, which all copies are built from.
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = head.weight is embedding.weight
    stop = stop_ids(model, tokenizer)
    if not stop or stop[-1] >= len(embedding.weight):
        fail(f"--model {path}: its end-of-sequence tokens {stop} are none, or none of the model's")
    end = data.turn_end(tokenizer)
    if end not in (None, *stop):
        token = tokenizer.decode([end])
        print(f"--model {path}: its template ends a turn with {token}, at which it does not stop")
    model.to(device).eval()  # eval for the whole run: no dropout, in the student or the teacher
    check_head(path, model)
    check_saving(path, model, tokenizer)
    limit, short = context_limit(model.config)
    if short:
        print(f"--model {path}: rows of at most {limit} tokens, where its rotary embedding changes")
    return model, tokenizer


def context_limit(config):
    """(most tokens of a row or None, whether more would make rows depend on the longest one).

    The rotary embeddings `dynamic` and `longrope` change for the whole batch where its longest row
    passes the length of their first training.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            return part.get("original_max_position_embeddings") or limit, True
    return limit, False


def stop_ids(model, tokenizer):
    """Every id that ends a response: chat models have several; the base's eos may be another."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def check_head(path, model):
    """Refuses a model whose logits are not lm_head(last hidden state): the losses rely on it."""
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 0, 1):
            fail(f"--model {path}: logits that are capped or scaled ({name}) are not supported")
    ids = torch.arange(8, device=model.device)[None] % len(model.get_input_embeddings().weight)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()  # (1, T, V)
            hidden = model.base_model(input_ids=ids).last_hidden_state  # (1, T, D)
            ours = model.get_output_embeddings()(hidden).float()  # (1, T, V)
    except Exception as error:
        kind = type(error).__name__
        fail(f"--model {path}: does not run as a body and a head ({kind}: {one_line(error)})")
    if not torch.allclose(logits, ours, rtol=1e-2, atol=1e-2):
        fail(f"--model {path}: its logits are not lm_head(hidden states)")


def frozen_copy(model, args=None, device=None, low=True):
    """`model` as it is now, frozen: the teacher, or the start of --kl.

    args: of a run whose `model` is prepared, as the copy then is (low: see ranks.prepare). Several
    ranks load it anew: so each has one whole model at a time in host memory, not two.
    """
    if args and args.lora:
        from lora import AdaptersOff

        return AdaptersOff(model)
    anew = args and ranks.distributed()
    frozen = load_model(args.model, torch.device("cpu"))[0] if anew else copy.deepcopy(model)
    frozen.eval().requires_grad_(False)
    if args:
        ranks.prepare(frozen, args, device, low)
    return frozen


def check_saving(path, model, tokenizer):
    """Saves all but the weights, into nothing: better here than after the last step."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # often a temperature without do_sample: it loads, but could not be saved
        generation.do_sample = True
    for name in ("pad_token_id", "bos_token_id"):
        if (getattr(generation, name) or 0) < 0:
            setattr(generation, name, None)
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            for part in (model.config, generation, tokenizer):
                part.save_pretrained(nowhere)
    except Exception as error:
        fail(f"--model {path}: cannot be saved again: {one_line(error)}")


def save_model(path, model, tokenizer):
    """Writes a plain Hugging Face directory, in float32; each file whole or not at all.

    On several ranks all must call it, rank 0 writes.
    """
    temporary = os.path.join(path, ".saving")
    state = ranks.full_state(model)
    if ranks.rank_and_world()[0]:
        return
    try:
        plain = {name: tensor.cpu() for name, tensor in ranks.plain_tensors(model, state)}
        model.save_pretrained(temporary, state_dict=plain)
        tokenizer.save_pretrained(temporary)
        if ranks.has_adapters(model):
            from lora import save_adapter

            save_adapter(temporary, model, state)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"{path}: the model cannot be written ({one_line(error)})")
    umask = os.umask(0)
    os.umask(umask)
    for source in sorted(Path(temporary).iterdir()):
        target = os.path.join(path, source.name)
        if source.is_dir():  # named chat templates
            shutil.rmtree(target, ignore_errors=True)
            source.replace(target)
        else:
            source.chmod(0o666 & ~umask)  # safetensors writes files that others cannot read
            write_whole(target, source.replace)
    os.rmdir(temporary)


# ------------------------------------------------------------------------------------------------
# Micro-batches


def micro_batches(lengths, budget):
    """Groups of rows of similar length, each at most `budget` padded tokens, or a single row.

    Returns lists of row indices, the longest rows first, so that a run that does not fit in memory
    fails in its first group.
    """
    groups, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def my_micro_batches(lengths, budget):
    """Those of this rank, on one rank all: [(row indices, whether they count), ...].

    Rows are shared out by length, so that ranks have about equal work. A rank that gets fewer
    micro-batches than another runs its shortest row again instead, or if it has none the shortest
    of all, not counted, since all ranks must run equally many.
    """
    rank, world = ranks.rank_and_world()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares = [order[r::world] for r in range(world)]
    groups = []
    for rows in shares:
        own = micro_batches([lengths[i] for i in rows], budget)
        groups.append([[rows[i] for i in group] for group in own])
    missing = max(map(len, groups)) - len(groups[rank])
    idle = [((shares[rank] or order)[-1:], False)] * missing
    return [(group, True) for group in groups[rank]] + idle


# ------------------------------------------------------------------------------------------------
# Rows -> hidden states at the response positions


def response_hidden(model, rows):
    """Hidden states that predict the response tokens of `rows`: (R, D), row after row.

    A row alternates ids that are given and ids that are scored: (prompt, response), or, where the
    teacher's copy has insertions, (prompt, response part, insertion, response part, ...). A scored
    token is predicted at the position before it. Padding stands on the right, where causal
    attention never looks, so it changes nothing; the mask comes from lengths, never from ids (pad
    may equal eos).
    """
    width = max(sum(map(len, row)) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    scored = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        end = 0
        for number, part in enumerate(row):
            start, end = end, end + len(part)
            ids[i, start:end] = part
            scored[i, start:end] = number % 2
    device = device_of(model)
    ids = torch.from_numpy(ids[:, :-1]).to(device)  # (B, T): a last token predicts nothing here
    mask = torch.from_numpy(scored[:, 1:]).to(device)  # (B, T)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return hidden[mask]  # (R, D)


def slices(count, vocabulary, logits):
    """Slices of `count` tokens with at most `logits` logits each, or a single token."""
    size = max(1, int(logits) // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def chunks_of(hidden, model):
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return slices(len(hidden), vocabulary, CHUNK[hidden.device.type])


@torch.no_grad()
def response_logps(model, rows):
    """Yields (slice of the R response tokens, their log-probabilities (C, V)), chunk by chunk."""
    hidden, (head, _) = response_hidden(model, rows), open_head(model)  # (R, D)
    for chunk in chunks_of(hidden, model):
        yield chunk, torch.log_softmax(head(hidden[chunk]).float(), -1)


def sampled_logps(model, rows):
    """Log-probabilities of the response tokens: (R,), without gradient."""
    ids, parts = scored_ids(model, rows), []  # (R,)
    for chunk, logps in response_logps(model, rows):
        parts.append(logps.gather(-1, ids[chunk, None])[:, 0])  # (C,)
    return torch.cat(parts)


def scored_ids(model, rows):
    """The scored ids of `rows` in the order of `response_hidden`: (R,)."""
    ids = [token for row in rows for part in row[1::2] for token in part]
    return torch.tensor(ids, device=device_of(model))


# ------------------------------------------------------------------------------------------------
# The backward pass of all three losses, and the step


def backward_in_chunks(student, rows, token_loss, tokens, args, teacher=None, teacher_hidden=None):
    """Adds the gradient of the sum of a per-token loss to the student's: (loss, measures).

    rows: see response_hidden. tokens: a NamedTuple of what the loss knows of each response token,
    (R,) each or None. teacher_hidden: (R, D), the teacher's states at the same tokens.
    token_loss(student_logps (P, V), teacher_logps (P, V) or None, tokens, args) -> (losses (P,),
    {name: (P,)}), from log-probabilities in float32. Returns the loss, a scalar tensor, and the
    measures, {name: (R,)}.

    A full (R, V) tensor is 0.6 GB per 1,000 tokens at Qwen's vocabulary. So the head runs forward
    and backward chunk by chunk, which adds up gradients of the head and of the hidden states; those
    then go through the student's body together. Nothing is computed twice, and the gradient is that
    of the whole: the loss is a sum over tokens whose weights were fixed beforehand, so chunks share
    nothing but the weights of the head, in which their gradients add up.
    """
    hidden = response_hidden(student, rows)  # (R, D)
    head, close = open_head(student)
    teacher_head = open_head(teacher)[0] if teacher else None
    total, gradients, measures = torch.zeros((), device=hidden.device), [], {}
    for chunk in chunks_of(hidden, student):
        leaf = hidden[chunk].detach().requires_grad_()  # (C, D)
        logits = head(leaf)  # (C, V)
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden[chunk]) if teacher else None  # (C, V)
        # The gradient takes the place of the logits, piece by piece, so that a chunk exists once
        # for each model. That is legal: the backward pass of a linear layer reads its input and its
        # weight, never its output.
        buffer = logits.detach()  # the same memory: logits now, their gradient after the loop
        known = take(tokens, chunk)
        parts = differentiate(token_loss, buffer, teacher_logits, known, args)
        for piece, loss, measured in parts:
            place = slice(chunk.start + piece.start, chunk.start + piece.stop)  # among the R
            total += loss
            for name, values in measured.items():
                # Into one tensor: small ones that stay would split the heap between large ones.
                measures.setdefault(name, values.new_empty(len(hidden)))[place] = values
        logits.backward(buffer)
        gradients.append(leaf.grad)
    close()
    hidden.backward(torch.cat(gradients))
    return total, measures


def differentiate(token_loss, logits, teacher_logits, tokens, args):
    """Turns the logits (C, V) of a chunk into the gradient of its summed loss, in place.

    Yields of each piece (its slice, its summed loss, its measures). Autograd over a whole chunk
    would keep ten tensors of its size (log-probabilities, their exponentials, each one's gradient).
    Here they are freed piece by piece, and on a CPU a piece stays in the cache. Compiled, a chunk
    is one piece.
    """
    device = logits.device.type
    if device in COMPILE:
        for tensor in (logits, teacher_logits, *tokens):
            if tensor is not None:  # its rows differ from chunk to chunk, V never does
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            results = compiled(device)(token_loss, logits, teacher_logits, tokens, args)
            yield slice(0, len(logits)), *results
            return
        except TorchDynamoException as error:  # before anything was computed
            del COMPILE[device]
            print(f"the loss is not compiled, and slower: {one_line(error)}", flush=True)
    for piece in slices(*logits.shape, PIECE[device]):
        leaf = logits[piece].detach().requires_grad_()  # (P, V)
        teacher_part = None if teacher_logits is None else teacher_logits[piece]  # (P, V)
        known = take(tokens, piece)
        loss, measures = summed_loss(leaf, token_loss, teacher_part, known, args)
        logits[piece] = torch.autograd.grad(loss, leaf)[0]
        yield piece, loss.detach(), measures


@functools.cache
def compiled(device):
    """One graph of a chunk's loss and gradient, so that no float32 tensor of its size is kept."""

    def overwrite(token_loss, logits, *rest):
        own = torch.func.grad_and_value(summed_loss, has_aux=True)
        gradient, (loss, measures) = own(logits, token_loss, *rest)
        logits.copy_(gradient)
        return loss, measures

    return torch.compile(overwrite, fullgraph=True, **COMPILE[device])


def summed_loss(logits, token_loss, teacher_logits, tokens, args):
    student_logps, teacher_logps = torch.log_softmax(logits.float(), -1), None  # (P, V)
    if teacher_logits is not None:
        teacher_logps = torch.log_softmax(teacher_logits.float(), -1)  # (P, V)
    losses, measures = token_loss(student_logps, teacher_logps, tokens, args)
    return losses.sum(), measures


def take(tokens, piece):
    """The part of a NamedTuple of columns, some of which may be None."""
    return tokens._make(None if column is None else column[piece] for column in tokens)


def make_optimizer(model, args):
    """Of opsd.py and rlvr.py; at a constant rate."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)


def optimizer_step(model, optimizer):
    """(gradient norm before clipping, whether a step was taken): none where it is not finite.

    Gradients are cleared.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    norm = ranks.full(norm).item()  # over all ranks, so all agree
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return norm, finite
