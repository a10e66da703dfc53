"""Several ranks: what differs when torchrun starts a script N times. On one rank nothing does.

1. Problems, written contexts and gradings are shared out (`share`) and brought together again
   (`gather`). Every rank then knows all rollouts of the step, so filters, denominators and metrics
   are computed as on one rank, by every rank alike.
2. Weights, gradients and optimizer state are sharded by FSDP2 (`prepare`): a block's weights are
   whole only while it computes. The losses start from hidden states and call the head once a
   chunk, so its weights are gathered once a micro-batch (`open_head`).
3. Ranks meet in collectives, which all must enter equally often and in one order: what a rank does
   may depend on what all know, never on its own share. Where shares differ, a rank runs along with
   nothing to do (see model.my_micro_batches).

Run: two ranks of gloo on CPUs. Not run: CUDA with NCCL, several machines.
"""

import datetime
import os
import sys
import types
from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint

joined = False  # not dist.is_initialized(): an engine of vLLM in this process initialises it too


def distributed():
    """Whether torchrun started this process, also as the only one: the model is then sharded."""
    return joined


def rank_and_world():
    """(this rank's number, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)


def join(device):
    """Joins the other ranks; returns this rank's device. Only rank 0 keeps its standard output."""
    global joined
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The time that one rank may sample, or wait for one that does; a death is noticed at once.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    joined = True
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """The end of a script: without it NCCL complains."""
    global joined
    if joined:
        dist.barrier()  # a rank that left while another still wrote could abort in its last moment
        if "vllm" not in sys.modules:  # its engine destroys all groups, and fails without them
            dist.destroy_process_group()
        joined = False


def share(items):
    """This rank's part of a list that every rank knows."""
    rank, world = rank_and_world()
    return items[rank::world]


def gather(items):
    """The whole list from every rank's `share`, in the order before sharing; every rank calls it.

    Lists of any other lengths come in turns. The items are pickled.
    """
    world = rank_and_world()[1]
    if world == 1:
        return items
    shares = [None] * world
    dist.all_gather_object(shares, items)
    nothing = object()
    turns = zip_longest(*shares, fillvalue=nothing)
    return [item for turn in turns for item in turn if item is not nothing]


# ------------------------------------------------------------------------------------------------
# Sharded tensors


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


def device_of(model):
    """Where the model computes; with --offload its weights are elsewhere."""
    weight = next(model.parameters())
    if is_sharded(weight):
        return torch.device(weight.device_mesh.device_type)
    return weight.device


def full(tensor, dtype=None):
    """The whole of a tensor that may be sharded, in `dtype`; all ranks ask at the same time."""
    tensor = tensor.to(dtype or tensor.dtype)
    if not is_sharded(tensor):
        return tensor
    # On the card also with --offload: in host memory gloo would gather.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def has_adapters(model):
    return hasattr(model, "lora_scale")


def plain_tensors(model, tensors, dtype=None):
    """(name, whole tensor) of a plain model from {name: tensor}, one by one; adapters merged."""
    if has_adapters(model):
        from lora import merged

        return merged(model, tensors)
    return ((name, full(tensor.detach(), dtype)) for name, tensor in tensors.items())


def full_state(model, optimizer=None, trained=False):
    """The whole state dict of a model, or of its optimizer, on the CPU: rank 0 gets it.

    A tied matrix stands in it once. trained: with --lora without the frozen weights.
    """
    options = states.StateDictOptions(
        full_state_dict=True,
        cpu_offload=distributed(),
        ignore_frozen_params=trained and has_adapters(model),
    )
    if optimizer:
        return states.get_optimizer_state_dict(model, optimizer, options=options)
    # Saved under every name of a tied matrix it could not be written as safetensors.
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    state = states.get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in state.items() if name in names}


def load_full_state(model, state, optimizer=None):
    """Loads what `full_state` made, on any number of ranks."""
    options = states.StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=distributed(),
        strict=not has_adapters(model),  # their states lack the frozen weights
    )
    if optimizer:
        states.set_optimizer_state_dict(model, optimizer, state, options=options)
    else:
        states.set_model_state_dict(model, state, options=options)


# ------------------------------------------------------------------------------------------------
# A model that trains, or teaches


def load_device(device):
    """Where to load a model that `prepare` gets next: several ranks shard it in host memory."""
    return torch.device("cpu") if distributed() else device


def blocks_of(model):
    names = model._no_split_modules or ()
    return [module for module in model.base_model.modules() if type(module).__name__ in names]


def recomputed(block, *args, **kwargs):
    """The forward of a block whose activations are computed again in the backward pass.

    Not transformers' gradient_checkpointing_enable: it acts on layers in training mode only, and
    these then drop their key-value cache in sampling, which is without gradients and as before.
    """
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    options = dict(use_reentrant=False, preserve_rng_state=False)
    return checkpoint(forward, block, *args, **options, **kwargs)


def prepare(model, args, device, low=False):
    """Readies a loaded float32 model in place: adapters, recomputation, computation dtype, shards.

    Call it before the optimizer is made. --dtype bfloat16 leaves the weights float32 and computes
    in bfloat16: by autocast on one rank, by FSDP2's mixed precision on several. low: the weights
    are frozen or overwritten, never added to, so they are stored in the computation dtype.
    """
    dtype = getattr(torch, args.dtype)
    if args.lora:
        from lora import add_adapters

        add_adapters(model, args)
    if args.checkpointing:
        for block in blocks_of(model):
            # A bound method, so that a deep copy has one of its own.
            block.forward = types.MethodType(recomputed, block)
    if distributed():
        shard_model(model, args, device, dtype, low)
    elif dtype != torch.float32:
        for module in (model.base_model, model.get_output_embeddings()):
            forward = torch.autocast(device.type, dtype)(type(module).forward)
            module.forward = types.MethodType(forward, module)
        for module in model.base_model.modules() if low else ():
            # Autocast rounds no others, and a teacher must compute as its student.
            if isinstance(module, torch.nn.Linear):
                module.to(dtype)


def shard_model(model, args, device, dtype, low):
    """FSDP2 for `prepare`: block by block, then the rest of the body, then the head."""
    for weight in model.parameters() if low else ():
        # Not model.to: the frequencies of rotary embeddings stay float32.
        weight.data = weight.data.to(dtype)
    offload = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    settings = dict(
        mesh=init_device_mesh(device.type, (rank_and_world()[1],)),
        reshard_after_forward=True,
        mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=offload if args.offload else fsdp.OffloadPolicy(),
    )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = None  # or it would be sharded twice
    for module in (*blocks_of(model), model.base_model):
        fsdp.fully_shard(module, **settings)
    if list(head.parameters()):
        fsdp.fully_shard(head, **settings)
    if tied:
        head.weight = embedding.weight  # now the shard; FSDP2 makes whole only the embedding's
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            # Sum gradients over ranks: the weights of the loss have the denominator.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def open_head(model):
    """(head, close): from hidden states (.., D) to logits (.., V); close after the last backward.

    On one rank these are the model's head and nothing. On several the head's weights are gathered
    here, once for all chunks of a micro-batch; gradients add up in the gathered copy, and `close`
    sums them over the ranks into each one's shard.
    """
    head = model.get_output_embeddings()
    if not is_sharded(head.weight):
        return head, lambda: None
    sharded = [weight for weight in (head.weight, head.bias) if weight is not None]
    gathered = [
        weight.to(device_of(model)).full_tensor(grad_placements=[Partial()]) for weight in sharded
    ]  # (V, D), (V,)
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in gathered]

    def project(hidden):
        return F.linear(hidden, *(leaf.to(hidden.dtype) for leaf in leaves))

    def close():
        if head.weight.requires_grad:
            torch.autograd.backward(gathered, [leaf.grad for leaf in leaves])
        gathered.clear()  # the body's backward pass has the memory
        leaves.clear()

    return project, close
