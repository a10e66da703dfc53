"""The loss for tools/bench.py: ours, the naive form, TRL's (pip install trl==1.16.0) and Liger's
(pip install liger-kernel; CUDA only). And how time, memory and a machine's rates are measured.
"""

import ctypes
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import opsd
from model import response_hidden
from rollout import Rollout
from tools.memory import qwen3_config


def begin_peak(device):
    """Sets the peak back to what is held now, and returns that, in MB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    return process_memory("VmRSS")


def peak_since(device):
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory("VmHWM")


def process_memory(key):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(key)) / 1024


def seconds_of(work, device):
    """CPU: of one pass; CUDA: the median of five, each waited for."""
    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(5 if device.type == "cuda" else 1):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return median(times)


def matrix_rate(d, wide, device, dtype=torch.float32):
    """Multiply-adds x 2 a second of a product of the model's own shape, (rows, d) by (d, wide), of
    2,048 rows (CUDA: 8,192): median of the last eight of ten.
    """
    rows = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(rows, d).to(device, dtype), torch.randn(d, wide).to(device, dtype)
    times = [seconds_of(lambda: torch.mm(a, b), device) for _ in range(10)]
    return 2 * rows * d * wide / median(times[2:])


def copy_rate(device):
    """Bytes read and written a second, by a copy of 1 GB (CPU: 0.2 GB)."""
    a = torch.ones(int(2.5e8 if device.type == "cuda" else 5e7), device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.nbytes / seconds_of(lambda: b.copy_(a), device)


class Traffic(TorchDispatchMode):
    """Counts what PyTorch computes within it: operators (`calls`; about one kernel each, views are
    none) and the bytes that they read and write, products aside. Other libraries' kernels do not
    pass here.
    """

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info]
        if any(not alias.is_write for alias in aliases) or name.startswith(("empty", "new_empty")):
            return out
        self.calls += 1
        if name not in ("mm", "addmm", "bmm", "matmul", "linear"):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            # An expanded tensor is read once.
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        return out


# ------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary. A model without layers: its body is an
# embedding and a norm. A variant is a function (student, teacher, rollouts) that adds the gradient
# of the mean reverse KL over all tokens to the student's.


def head_only_model(vocabulary, width, dtype):
    config = qwen3_config((width, 8, 0, 1, 1, False), vocabulary, 8)
    model = AutoModelForCausalLM.from_config(config)
    # Small: the rows use the first 1,000 ids only.
    model.model.embed_tokens = torch.nn.Embedding(1000, width).requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 2 / width**0.5)
    return model.to(dtype).eval()


def hidden_states(student, teacher, rollouts):
    """(R, D) of student and teacher."""
    with torch.no_grad():
        frozen = response_hidden(teacher, [r.teacher_row for r in rollouts])
    return response_hidden(student, [r.row for r in rollouts]), frozen


def full_logits(student, teacher, rollouts):
    """(R, V) of student and teacher."""
    s, t = hidden_states(student, teacher, rollouts)
    with torch.no_grad():
        t = teacher.lm_head(t)
    return student.lm_head(s), t


def ours(student, teacher, rollouts):
    for r in rollouts:
        r.weight = 1 / (len(rollouts) * len(r.response_ids))
    opsd.opsd_loss(student, teacher, rollouts, opsd.parse_args([]))


def naive(student, teacher, rollouts):
    s, t = full_logits(student, teacher, rollouts)
    t = F.log_softmax(t.float(), -1)
    s = F.log_softmax(s.float(), -1)
    (s.exp() * (s - t)).sum(-1).mean().backward()


def trl_logits(student, teacher, rollouts):
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    s, t = full_logits(student, teacher, rollouts)
    compute_full_logit_self_distillation_loss(s, t, distillation_alpha=1.0).mean().backward()


def trl_jsd(student, teacher, rollouts):
    from trl.experimental.gkd import GKDTrainer

    s, t = full_logits(student, teacher, rollouts)
    (GKDTrainer.generalized_jsd_loss(s, t, beta=1, reduction="sum") / len(s)).backward()


def liger(student, teacher, rollouts):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    s, t = hidden_states(student, teacher, rollouts)
    fused = LigerFusedLinearJSD(jsd_beta=1.0)  # reverse KL
    fused(s, student.lm_head.weight, t, teacher.lm_head.weight, None).backward()


LOSSES = {
    "ours": (ours, "ours: backward chunk by chunk"),
    "naive": (naive, "naive: full logits"),
    "trl_logits": (trl_logits, "TRL experimental.sdft, full_logits"),
    "trl_jsd": (trl_jsd, "TRL experimental.gkd, as the trainer of OPSD's authors"),
    "liger": (liger, "Liger fused linear JSD"),
}


def measure_loss(variant, *, tokens, vocabulary, width, dtype, device, bounds):
    """Memory of one pass above what was held before, time of the next; bounds: with those of
    `least_times`.
    """
    device, run = torch.device(device), LOSSES[variant][0]
    torch.manual_seed(0)
    student, teacher = (
        head_only_model(vocabulary, width, getattr(torch, dtype)).to(device) for _ in range(2)
    )
    teacher.requires_grad_(False)

    def work(count=tokens):
        torch.manual_seed(count)
        ids = torch.randint(1000, (count + 1,)).tolist()
        r = Rollout(None, ids[:1], ids[1:], outcome="correct", teacher_row=[ids[:1], ids[1:]])
        student.zero_grad(set_to_none=False)
        run(student, teacher, [r])

    work(64)
    held = begin_peak(device)
    work()
    memory, seconds = peak_since(device) - held, seconds_of(work, device)
    gradient = student.lm_head.weight.grad.float().norm().item()
    result = dict(seconds=seconds, memory=memory, gradient=gradient)
    if bounds:
        with Traffic() as traffic:
            work()
        result |= least_times(traffic, tokens, student.lm_head.weight)
    return result


def least_times(traffic, tokens, head):
    """Seconds that the machine's rates, measured here, allow for a loss of `tokens` tokens with a
    head (V, D). products: the head forward for student and teacher, and twice backward. traffic:
    the bytes that this variant moves. least: those of any that has logits in memory: both models'
    written and read once, the gradient written.
    """
    vocabulary, width = head.shape
    rate = matrix_rate(width, vocabulary, head.device, head.dtype)
    bandwidth = copy_rate(head.device)
    return dict(
        products=8 * tokens * vocabulary * width / rate,
        traffic=traffic.bytes / bandwidth,
        least=5 * tokens * vocabulary * head.element_size() / bandwidth,
        calls=traffic.calls,
        moved=traffic.bytes / (tokens * vocabulary),
        bandwidth=bandwidth / 1e9,
        gflops=rate / 1e9,
    )
