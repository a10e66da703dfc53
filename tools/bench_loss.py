"""The loss for tools/bench.py: ours, the naive form, TRL's and Liger's. And how time and memory
are measured.
"""

import ctypes
import time
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import opsd
from model import response_hidden
from rollout import Rollout
from tools.memory import qwen3_config


def random_rollouts(count, prompt, response, vocabulary):
    """Of random ids; the teacher's prompt is twice as long."""
    rollouts = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (2 * prompt + response,)).tolist()
        r = Rollout(None, ids[prompt : 2 * prompt], ids[2 * prompt :], outcome="correct")
        r.teacher_row = [ids[: 2 * prompt], r.response_ids]
        rollouts.append(r)
    return rollouts


# ------------------------------------------------------------------------------------------------
# Time and memory


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


# ------------------------------------------------------------------------------------------------
# The loss. Axes: R response tokens, D width, V vocabulary. A model without layers: its body is an
# embedding and a norm. A variant is a function (student, teacher, rollouts) that adds the gradient
# of the mean reverse KL over all tokens to the student's.


def head_only_model(vocabulary, width, dtype):
    config = qwen3_config(width, 8, 0, 1, 1, False, vocabulary, 8)
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


def trl_sdft(student, teacher, rollouts):
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    s, t = full_logits(student, teacher, rollouts)
    compute_full_logit_self_distillation_loss(s, t, distillation_alpha=1.0).mean().backward()


def trl_gkd(student, teacher, rollouts):
    from trl.experimental.gkd import GKDTrainer

    s, t = full_logits(student, teacher, rollouts)
    (GKDTrainer.generalized_jsd_loss(s, t, beta=1, reduction="sum") / len(s)).backward()


def liger(student, teacher, rollouts):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    s, t = hidden_states(student, teacher, rollouts)
    fused = LigerFusedLinearJSD(jsd_beta=1.0)  # reverse KL
    fused(s, student.lm_head.weight, t, teacher.lm_head.weight, None).backward()


LOSSES = dict(naive=naive, ours=ours, trl_sdft=trl_sdft, trl_gkd=trl_gkd, liger=liger)


def measure_loss(variant, *, tokens, vocabulary, width, dtype, device):
    """Memory of one pass above what was held before, time of the next."""
    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.manual_seed(0)
    student, teacher = (head_only_model(vocabulary, width, dtype).to(device) for _ in range(2))
    teacher.requires_grad_(False)

    def work(count=tokens):
        torch.manual_seed(count)
        student.zero_grad(set_to_none=False)
        LOSSES[variant](student, teacher, random_rollouts(1, 1, count, 1000))

    work(64)
    held = begin_peak(device)
    work()
    memory, seconds = peak_since(device) - held, seconds_of(work, device)
    gradient = student.lm_head.weight.grad.float().norm().item()
    return dict(seconds=seconds, memory=memory, gradient=gradient)
