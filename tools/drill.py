"""A fault drill: short runs of every stage are killed, starved of disk and fed damaged files,
resumed each time, and must end as if nothing had happened.

1. kill -9 at random moments, and while a state or the model is being written; each time
   `--resume`. In the end weights and logs must equal, bit for bit and apart from times, those of a
   run that nobody disturbed.
2. A file size limit (`ulimit -f`, a disk that is full): one clear line, exit code 2, the states
   that are there stay whole; then `--resume`.
3. The newest state emptied, cut, and with one bit flipped; metrics.jsonl cut in the middle of a
   line: `--resume` says so and goes on from the one before.

    python -m tools.drill       # about ten minutes; says what was injected and what survived;
                                # exit code 1 if anything was lost
"""

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib

from cli import HERE, Parser, start

COMMON = "--threads 1 --state-every 1 --seed 3"
# Flags, --steps first.
STAGES = {
    "sft": "--steps 40 --batch 8",
    "rlvr": "--steps 8 --batch 4 --hard 1 --eval-problems 16",
    "opsd": "--steps 8 --batch 16 --filter all --teacher ema --eval-problems 16 --kl-by-position 8",
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=20, help="a stage, a quarter of them inside a save")
    add("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    return parser.parse_args(argv)


def launch(stage, out, *flags, limit=None):
    """The process of a run; `limit`: of a file's size, in KB."""
    script = os.path.join(HERE, stage + ".py")
    settings = f"{STAGES[stage]} {COMMON}".split()
    command = [sys.executable, script, *settings, "--out", out, *flags]
    if limit:
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "_", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=HERE)


def finish(process):
    out, error = process.communicate()
    return process.returncode, out, error


def finished(stage, out):
    """Whether the run is one that --resume refuses."""
    last = int(STAGES[stage].split()[1])
    saved = os.path.exists(os.path.join(out, "model.safetensors"))
    return saved and bool(glob.glob(os.path.join(out, f"state-{last:07d}-*")))


def result(out):
    """What a run left behind: checksum of the weights and the logs without times; None if it did
    not end.
    """
    if not os.path.exists(os.path.join(out, "model.safetensors")):
        return None
    logs = {}
    for path in sorted(glob.glob(os.path.join(out, "*.jsonl"))):
        with open(path) as stream:
            rows = [json.loads(line) for line in stream]
        logs[os.path.basename(path)] = [without_times(row) for row in rows if "args" not in row]
    with open(os.path.join(out, "model.safetensors"), "rb") as stream:
        return zlib.crc32(stream.read()), logs


def without_times(row):
    return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}


def states(out):
    return sorted(glob.glob(os.path.join(out, "state-*")))


def resume_flags(out):
    return ["--resume"] if os.path.exists(os.path.join(out, "metrics.jsonl")) else ["--overwrite"]


def kill(stage, out, moment, seconds, rng):
    """Starts or resumes the run and kills it at a random moment, or as soon as a file is being
    written. Returns whether it was still running.
    """
    process = launch(stage, out, *resume_flags(out))
    deadline = time.time() + (rng.uniform(0, seconds) if moment == "random" else 60)
    after = 0 if moment == "random" else rng.randrange(4)  # let some saves pass
    while time.time() < deadline and process.poll() is None:
        if moment == "saving" and glob.glob(os.path.join(out, ".saving*")):
            after -= 1
            if after < 0:
                break
        time.sleep(0.0005 if moment == "saving" else 0.02)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    finish(process)
    return running


DAMAGES = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one bit flipped": lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
}


def damage(out, change):
    """Changes the newest state and cuts the metrics in the middle of a line: the state's name."""
    newest = states(out)[-1]
    with open(newest, "rb") as stream:
        content = stream.read()
    with open(newest, "wb") as stream:
        stream.write(change(content))
    log = os.path.join(out, "metrics.jsonl")
    os.truncate(log, os.path.getsize(log) - 20)
    return os.path.basename(newest)


def drill(stage, kills, folder, counts, rng):
    """Injects every fault into one stage; returns a line for each that was not survived."""
    whole, out, lost = os.path.join(folder, "whole"), os.path.join(folder, "out"), []

    def check(condition, what, error=""):
        if not condition:
            lost.append(f"{stage}: {what}: {error[-300:]}")
            print("LOST:", lost[-1], flush=True)

    begun = time.time()
    code, _, error = finish(launch(stage, whole))
    check(code == 0, "the undisturbed run failed", error)
    seconds, expected, done = time.time() - begun, result(whole), 0

    # 1. Kills. The run is begun anew whenever it gets to its end before the last of them.
    while done < kills:
        if finished(stage, out):
            check(result(out) == expected, f"a run with {done} kills ended differently")
            shutil.rmtree(out)
        done += kill(stage, out, "saving" if done % 4 == 3 else "random", seconds, rng)
    if not finished(stage, out):
        code, _, error = finish(launch(stage, out, *resume_flags(out)))
        check(code == 0, f"resuming after {done} kills failed", error)
    check(result(out) == expected, f"a run with {done} kills ended differently")
    counts["kills"] += done

    # 2. A full disk, while the first state is written and while a log is.
    for limit in (1, 2000):
        shutil.rmtree(out, ignore_errors=True)
        code, _, error = finish(launch(stage, out, limit=limit))
        clear = code == 2 and error.count("\n") == 1 and error.startswith("error: ")
        check(clear, f"full disk, exit {code}", error)
        code, _, error = finish(launch(stage, out, *resume_flags(out)))
        check(code == 0 and result(out) == expected, "resuming after a full disk", error)
        counts["full disks"] += 1

    # 3. Damaged files.
    for name, change in DAMAGES.items():
        shutil.rmtree(out, ignore_errors=True)
        process = launch(stage, out)
        while len(states(out)) < 2 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        finish(process)
        newest = damage(out, change)
        code, said, error = finish(launch(stage, out, "--resume"))
        noticed = f"{newest} is damaged" in said
        same = code == 0 and result(out) == expected
        check(noticed and same, f"resuming from a state {name}", error)
        counts["damaged states and logs"] += 1
    print(f"{stage}: undisturbed {seconds:.0f} s; so far {counts}", flush=True)
    return lost


def main(argv=None):
    args = parse_args(argv)
    rng, lost = random.Random(0), []
    counts = {"kills": 0, "full disks": 0, "damaged states and logs": 0}
    for stage in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            lost += drill(stage, args.kills, folder, counts, rng)
    injected = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{sum(counts.values())} faults injected ({injected}), {len(lost)} not survived")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    start(main)
