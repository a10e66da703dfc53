"""LoRA (--lora RANK): small trained matrices beside each frozen linear layer of the body.

    y = W x + 2 B A x        W (out, in) frozen, A (RANK, in) at random, B (out, RANK) zero at first

1. PEFT puts them in: alpha is twice the rank, no dropout. The class of the model stays Hugging
   Face's. W is stored in the computation's dtype, A, B and AdamW in float32.
2. The frozen teacher of opsd.py and the start of rlvr.py's --kl are the same model with its
   adapters off (`AdaptersOff`): no second copy of anything.
3. Samplers and saved models get plain weights, W + 2 B A (`merged`).
"""

import os
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save

from ranks import full
from run import fail

SCALE = 2  # alpha / rank


def add_adapters(model, args):
    """Freezes a loaded model in place and adds adapters, with random numbers of their own."""
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not linear:
        fail(f"--lora {args.lora}: {type(model).__name__} has no linear layers that it knows")
    config = LoraConfig(
        r=args.lora,
        lora_alpha=SCALE * args.lora,
        target_modules=linear,
        task_type="CAUSAL_LM",
        base_model_name_or_path=args.model,
    )
    with torch.random.fork_rng(devices=[]):  # the same on all ranks
        torch.manual_seed(args.seed)
        inject_adapter_in_model(config, model)
    for layer in layers_of(model):
        layer.cast_input_dtype_enabled = False  # prepare sees to it, without copies of the inputs
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, args.dtype))
    model.lora_scale = SCALE  # that it is there tells others that this model has adapters


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class AdaptersOff:
    """`model` as it was before it had adapters, for whoever reads its hidden states or weights."""

    lora_scale = 0

    def __init__(self, model):
        self.model, self.layers = model, layers_of(model)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def base_model(self, **inputs):
        # Not layer.enable_adapters: it also switches requires_grad, which FSDP2 looks at only once.
        try:
            for layer in self.layers:
                layer._disable_adapters = True
            return self.model.base_model(**inputs)
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def merged(model, tensors):
    """(name, whole tensor) of a plain model from `tensors`, {name: tensor} of one with adapters,
    one by one; numbers in float32.
    """
    for name, tensor in tensors.items():
        layer, adapted, last = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        weight = full(tensor.detach())
        weight = weight.float() if weight.is_floating_point() else weight
        if adapted and last == "weight":
            a, b = (full(tensors[f"{layer}.lora_{x}.default.weight"].detach()) for x in "AB")
            weight = weight + model.lora_scale * (b @ a)
        yield f"{layer}.{last}" if adapted else name, weight


def save_adapter(path, model, state):
    """Adds to a saved plain model what PeftModel.from_pretrained loads, from a whole state dict."""
    model.config.dtype = "float32"  # that of the file; the model in memory may have another
    model.config.save_pretrained(path)
    model.peft_config["default"].save_pretrained(os.path.join(path, "adapter"))
    adapter = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor
        for name, tensor in state.items()
        if ".lora_" in name
    }
    Path(path, "adapter", "adapter_model.safetensors").write_bytes(save(adapter))
