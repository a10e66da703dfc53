"""Several ranks: what is different when torchrun starts a script N times. On one rank every function here returns what it was given.

1. Problems, written contexts and gradings are dealt out (`share`) and brought together again (`gather`). Every rank then knows all rollouts of
   the step, so filters, denominators and metrics are computed as on one rank, by every rank alike.
2. Weights, gradients and optimizer state are cut into N pieces by FSDP2 (`prepare`): a block's weights are whole only while it computes.
   The losses start from hidden states and call the head once a chunk, so its weights are gathered once a micro-batch (`open_head`).
3. Ranks meet in collectives, which all must enter equally often and in one order: what a rank does may depend on what all know, never on its
   own share. Where shares differ, a rank runs along with nothing to do (see common.deal).

Run: two ranks of gloo on CPUs. Not run: CUDA with NCCL, several machines.
"""

import os
import sys
import types
from itertools import zip_longest

joined = False  # not torch.distributed.is_initialized(): an engine of vLLM in this process initialises it as well


def distributed():
    """Whether torchrun started this process, also if it is the only one: the model is then in pieces, be it a single one."""
    return joined


def rank_and_world():
    """(this rank's number, how many there are): (0, 1) without torchrun."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)


def start(device):
    """Joins the other ranks and returns this rank's device. Only rank 0 keeps its standard output; errors are printed by every rank."""
    import datetime
    import torch
    import torch.distributed as dist

    global joined
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # the time that one rank may sample, or wait for one that does; a rank that dies is noticed at once
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(hours=3),
        )
    joined = True
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device


def stop():
    """The end of a script: without it NCCL complains."""
    global joined
    if joined:
        import torch.distributed as dist

        dist.destroy_process_group()
        joined = False


def share(items):
    """This rank's part of a list that every rank knows."""
    rank, world = rank_and_world()
    return items[rank::world]


def gather(items):
    """The whole list from every rank's `share`, in the order before sharing; lists of any other lengths in turns. Every rank must call it; the items are pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return items
    import torch.distributed as dist

    shares = [None] * world
    dist.all_gather_object(shares, items)
    nothing = object()
    return [
        item
        for turn in zip_longest(*shares, fillvalue=nothing)
        for item in turn
        if item is not nothing
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in pieces


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def device_of(model):
    """Where the model computes; with --offload its weights are elsewhere."""
    import torch

    weight = next(model.parameters())
    return torch.device(weight.device_mesh.device_type) if is_sharded(weight) else weight.device


def full(tensor):
    """The whole of a tensor of which each rank may hold a piece. Every rank must ask for it at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state(state):
    """The same for all tensors in a state dict of a model or an optimizer, on the CPU: rank 0 gets them, the others None instead."""
    if not distributed():
        return state
    import torch
    from torch.utils._pytree import tree_map_only

    keep = lambda whole: whole.detach().cpu() if rank_and_world()[0] == 0 else None
    return tree_map_only(torch.Tensor, lambda tensor: keep(full(tensor)), state)


def piece(value, like):
    """The piece of a whole tensor that this rank holds of `like`."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    rank, world = rank_and_world()
    pieces = value.chunk(
        world
    )  # along the first axis, as FSDP2 cuts; fewer than ranks where it is short
    mine = (pieces[rank] if rank < len(pieces) else value[:0]).clone().to(like.to_local().device)
    return DTensor.from_local(
        mine,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def load_full_state(model, state):
    """load_state_dict of a state that `full_state` made, on any number of ranks."""
    import torch

    own = model.state_dict()
    assert own.keys() == state.keys()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(piece(state[name], tensor))


def load_full_optimizer(optimizer, state):
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    cut = lambda value, like: (
        piece(value, like) if value.shape == like.shape else value
    )  # moments; the step counter is a number
    optimizer.load_state_dict(
        dict(
            state,
            state={
                i: {name: cut(value, weights[i]) for name, value in row.items()}
                for i, row in state["state"].items()
            },
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# A model that trains, or teaches


def load_device(device):
    """Where to load a model that `prepare` gets next: several ranks cut it up in host memory and move the pieces."""
    import torch

    return torch.device("cpu") if distributed() else device


def recomputed(block, *args, **kwargs):
    """The forward of a block whose activations are computed again in the backward pass. Sampling, without gradients, is as before.

    Not transformers' gradient_checkpointing_enable: it acts on layers in training mode only, and these then drop their key-value cache in sampling.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(
        type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


def prepare(model, args, device, low=False):
    """Readies a loaded float32 model for training or teaching, in place: recomputation, computation dtype, pieces. Before the optimizer is made.

    --dtype bfloat16 leaves the weights float32 and computes in bfloat16: by autocast on one rank, by FSDP2's mixed precision on several.
    low: the weights are frozen or overwritten, never added to, so they are stored in the computation dtype.
    """
    import torch

    body, head, dtype = model.base_model, model.get_output_embeddings(), getattr(torch, args.dtype)
    blocks = [
        module
        for module in body.modules()
        if type(module).__name__ in (model._no_split_modules or ())
    ]
    if args.checkpointing:
        for block in blocks:
            block.forward = types.MethodType(
                recomputed, block
            )  # a bound method, so that a deep copy has one of its own
    if not distributed():
        if dtype != torch.float32:
            for module in (body, head):
                module.forward = types.MethodType(
                    torch.autocast(device.type, dtype)(type(module).forward), module
                )
            for module in (
                body.modules() if low else ()
            ):  # autocast rounds no others, and a teacher must compute as its student
                if isinstance(module, torch.nn.Linear):
                    module.to(dtype)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    for weight in (
        model.parameters() if low else ()
    ):  # not model.to: the frequencies of rotary embeddings stay float32
        weight.data = weight.data.to(dtype)
    settings = dict(
        mesh=init_device_mesh(device.type, (rank_and_world()[1],)),
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if args.offload
        else OffloadPolicy(),
    )
    embedding = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = None  # or it would be cut twice
    for module in (*blocks, body, *([head] if list(head.parameters()) else [])):
        fully_shard(module, **settings)
    if tied:
        head.weight = embedding.weight  # now the piece; FSDP2 makes whole only the embedding's
    for module in model.modules():
        if isinstance(
            module, FSDPModule
        ):  # sum gradients over ranks: the weights of the loss have the denominator
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def open_head(model):
    """(head, hand_back): the function from hidden states (.., D) to logits (.., V), and what to call after its last backward pass.

    On one rank these are the model's head and nothing. On several the head's weights are gathered here, once for all chunks of a micro-batch;
    gradients add up in the gathered copy, and hand_back sums them over the ranks into each one's piece.
    """
    import torch
    import torch.nn.functional as F

    head = model.get_output_embeddings()
    if not is_sharded(head.weight):
        return head, lambda: None
    from torch.distributed.tensor import Partial

    weights = [weight for weight in (head.weight, head.bias) if weight is not None]
    gathered = [
        weight.to(device_of(model)).full_tensor(grad_placements=[Partial()]) for weight in weights
    ]  # (V, D), (V,)
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in gathered]

    def hand_back():
        torch.autograd.backward(gathered, [leaf.grad for leaf in leaves])
        gathered.clear(), leaves.clear()  # the body's backward pass has the memory

    return lambda hidden: F.linear(hidden, *(leaf.to(hidden.dtype) for leaf in leaves)), hand_back
