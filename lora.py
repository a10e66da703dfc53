"""LoRA (--lora RANK): small trained matrices beside each frozen linear layer of the body.

    y = W x + 2 B A x        W (out, in) frozen, A (RANK, in) at random, B (out, RANK) zero at first

PEFT puts them in: alpha is twice the rank, no dropout. W is stored in the computation's dtype, A, B
and AdamW in float32. The teacher is the same model with its adapters off; samplers and saved models
get plain weights, W + 2 B A.
"""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save

from ranks import full
from run import fail


def add_adapters(model, args):
    """Freezes a loaded model in place and adds adapters, the same ones on all ranks."""
    flag, body = f"--lora {args.lora}: {type(model).__name__}", model.base_model
    # A subclass, such as a router, has a forward of its own, which an adapter would not call.
    linear = [name for name, module in body.named_modules() if type(module) is torch.nn.Linear]
    if not linear:
        fail(f"{flag} has no torch.nn.Linear in its body")
    own = dict(task_type="CAUSAL_LM", base_model_name_or_path=args.model, target_modules=linear)
    config = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:  # a Mamba kernel reads weights past their layers
            fail(f"{flag} and PEFT: {error}")
    adapted = {name for name, module in body.named_modules() if isinstance(module, LoraLayer)}
    if lost := sorted(set(linear) - adapted):
        fail(f"{flag}: PEFT leaves out {lost[0]} and {len(lost) - 1} more")
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, args.dtype))
    model.lora_layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in model.lora_layers:
        layer.cast_input_dtype_enabled = False  # autocast and FSDP2 do that, and copy no inputs
    model.lora_scale = 2  # of B A: alpha / rank; that it is there says that there are adapters


class AdaptersOff:
    """A frozen teacher: `model` as it was loaded, for who reads its hidden states or weights."""

    lora_scale = 0

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def base_model(self, **inputs):
        for layer in self.lora_layers:
            # Not its enable_adapters: that changes requires_grad too, which FSDP2 reads once only.
            layer._disable_adapters = True
        outputs = self.model.base_model(**inputs)
        for layer in self.lora_layers:
            layer._disable_adapters = False
        return outputs


def merged(model, tensors):
    """See ranks.plain_tensors; numbers in float32."""
    for name, tensor in tensors.items():
        layer, adapted, last = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        weight = full(tensor.detach(), torch.float32 if tensor.is_floating_point() else None)
        if adapted and last == "weight":
            a, b = (full(tensors[f"{layer}.lora_{x}.default.weight"].detach()) for x in "AB")
            weight = weight + model.lora_scale * (b @ a)
        yield f"{layer}.{last}" if adapted else name, weight


def save_adapter(path, model, state):
    """Adds to a saved plain model what PeftModel.from_pretrained loads, from a whole state dict."""
    model.config.dtype = "float32"  # that of the file; the model in memory may have another
    model.config.save_pretrained(path)
    folder = Path(path, "adapter")
    model.peft_config["default"].save_pretrained(folder)
    names = [name for name in state if ".lora_" in name]
    adapter = {f"base_model.model.{n.replace('.default.', '.')}": state[n] for n in names}
    (folder / "adapter_model.safetensors").write_bytes(save(adapter))
