#!/usr/bin/env bash
# What a card must show, in one command; meant to take less than ten minutes on an H100. Prints the
# benchmarks' tables, then a table of all parts; exit code 1 if one of them failed.
#     bash tools/gpu_check.sh               # needs one CUDA device, no network; uses vLLM if there
#     DEVICE=cpu bash tools/gpu_check.sh    # tries every command on a CPU, with tiny sizes
#     OUT=folder bash tools/gpu_check.sh    # keeps the logs and runs there
set -uo pipefail
cd "$(dirname "$0")/.."
export DEVICE=${DEVICE:-cuda} OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"

LOSS="--rounds 1"
STEP="--rounds 1"
RUN="--filter correct --backend transformers --overwrite --device $DEVICE"
SHORT="$RUN --filter all --steps 8 --state-every 2 --batch 16 --eval-problems 16"
if [ "$DEVICE" = cpu ]; then
    LOSS="--rounds 1 --model tiny --tokens 128 --threads 1"
    STEP="--rounds 1 --model tiny --tokens 600 --threads 1"
    RUN="$RUN --threads 1 --steps 2 --batch 16 --eval-problems 16"
    SHORT="$SHORT --threads 1 --max-new-tokens 40"
fi
ONE_RANK="python -m torch.distributed.run --standalone --nproc-per-node 1"

# With cuDNN's attention and without: seconds forward and backward at a new length and again, and
# the kernels that take longest.
ATTENTION='
import os, time
from statistics import median
import torch
from torch.profiler import profile

def attend(length):
    q = torch.randn(1, 16, length, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
    begun = time.time()
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    wait()
    return time.time() - begun

device = os.environ["DEVICE"]
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
for cudnn in (True, False):
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    attend(512)
    new, again = (median(attend(length) for length in range(1000, 1016)) for _ in range(2))
    with profile() as profiled:
        attend(1000)
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, by))
    names = ", ".join(event.key[:50] for event in events[:2])
    print(f"cuDNN {cudnn}: new length {new:.4f} s, again {again:.4f} s; {names}")
'

# Name, command: runs it, keeps its output in NAME.log, its exit code and seconds in parts.txt.
part() {
    local begun=$SECONDS code
    echo "== $1"
    "${@:2}" > "$OUT/$1.log" 2>&1
    code=$?
    case "$1" in attention | loss | step) cat "$OUT/$1.log" ;; *) tail -n 3 "$OUT/$1.log" ;; esac
    echo "$1 $code $((SECONDS - begun))" >> "$OUT/parts.txt"
}

# A run killed in its middle and resumed, and one that nobody disturbed.
kill_and_resume() {
    rm -rf "$OUT/killed"
    python opsd.py $SHORT --out "$OUT/killed" &
    local pid=$! looks=0
    until compgen -G "$OUT/killed/state-0000004.pt" > /dev/null || ((++looks > 4000)); do
        sleep 0.02
    done
    kill -9 $pid || return 1  # it should not have ended yet
    wait $pid
    timeout 600 python opsd.py ${SHORT/--overwrite/} --out "$OUT/killed" --resume || return 1
    timeout 600 python opsd.py $SHORT --out "$OUT/whole" || return 1
    python - "$OUT" << 'END'
import json
import sys

logs = []
for run in ("killed", "whole"):
    with open(f"{sys.argv[1]}/{run}/metrics.jsonl") as stream:
        logs.append([row["loss"] for row in map(json.loads, stream) if "loss" in row])
killed, whole = logs
gap = max(abs(a - b) / abs(b) for a, b in zip(killed, whole, strict=True))
print("losses bit for bit" if killed == whole else f"losses at most {gap:.1%} apart")
sys.exit(gap > 0.1)
END
}

rm -f "$OUT/parts.txt"
part attention timeout 600 python -c "$ATTENTION"
part loss timeout 600 python -m tools.bench loss --device "$DEVICE" $LOSS
part step timeout 600 python -m tools.bench step --device "$DEVICE" $STEP
part tests env CHECK_DEVICE="$DEVICE" timeout 600 python -m pytest -q -m cuda tests/test_cuda.py
part job timeout 600 python opsd.py $RUN --out "$OUT/job"
part job-torchrun timeout 600 $ONE_RANK opsd.py $RUN --out "$OUT/torchrun"
part kill-and-resume kill_and_resume
if [ "$DEVICE" = cuda ] && python -c "import vllm" 2> /dev/null; then  # ends while it sleeps
    VLLM="${RUN/transformers/vllm} --steps 2"
    part vllm timeout 600 python opsd.py $VLLM --out "$OUT/vllm"
    part vllm-torchrun timeout 600 $ONE_RANK opsd.py $VLLM --out "$OUT/vllm-torchrun"
fi

python - "$OUT" << 'END'
import json
import os
import sys

import torch
import transformers

out = sys.argv[1]


def last_line(name):
    with open(f"{out}/{name}.log") as stream:
        return (stream.read().strip().splitlines() or ["nothing was printed"])[-1].strip("= ")


def measured(name):
    """(text, whether something is missing that is installed and fits in memory)."""
    with open(f"{out}/{name}.log") as stream:
        lines = stream.read().splitlines()
    missing = [line for line in lines if "not measured" in line]
    rows = sum(line.startswith("| ") for line in lines)
    rows -= sum(line.startswith("|---") for line in lines)  # a header each
    expected = ("No module named", "memory")
    bad = any(not any(word in line for word in expected) for line in missing)
    return f"{rows} rows above, {len(missing)} not measured", bad or not rows


def changes(run):
    """Of accuracy and length, and the seconds of the steps."""
    path = f"{out}/{run}/metrics.jsonl"
    if not os.path.exists(path):
        return "no run"
    with open(path) as stream:
        rows = [json.loads(line) for line in stream]
    steps = [row for row in rows if "loss" in row]
    seconds = sum(row["sampling_seconds"] + row["training_seconds"] for row in steps)
    text = f"{len(steps)} steps in {seconds:.0f} s"
    for row in rows[-1].get("evaluation", ()):
        if (row["name"], row["group"]) == ("after", "all"):
            accuracy, length = row["change"]["accuracy"][0], row["change"]["length"][0]
            text += f", accuracy {accuracy:+.1f} points, length {length:+.1f}%"
    return text


results = {
    "loss": lambda: measured("loss")[0],
    "step": lambda: measured("step")[0],
    "job": lambda: changes("job"),
    "job-torchrun": lambda: changes("torchrun"),
}
cuda = os.environ["DEVICE"] == "cuda" and torch.cuda.is_available()
card = torch.cuda.get_device_name() if cuda else os.environ["DEVICE"]
print(f"\n{card}, torch {torch.__version__}, transformers {transformers.__version__}; logs: {out}\n")
print("| part | | seconds | result |\n|---|---|---|---|")
failed = False
with open(f"{out}/parts.txt") as stream:
    for line in stream:
        name, code, seconds = line.split()
        bad = code != "0" or name in ("loss", "step") and measured(name)[1]
        failed = failed or bad
        result = results.get(name, lambda name=name: last_line(name))()
        print(f"| {name} | {'FAILED' if bad else 'ok'} | {seconds} | {result} |")
sys.exit(failed)
END
