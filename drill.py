"""A fault drill: short runs of every stage are killed, starved of disk and fed damaged files, resumed each time, and must end as if nothing had happened.

1. kill -9 at random moments, and while a state or the model is being written; each time `--resume`. In the end weights and logs must
   equal, bit for bit and apart from times, those of a run that nobody disturbed.
2. A file size limit (`ulimit -f`, a disk that is full): one clear line, exit code 2, the states that are there stay whole; then `--resume`.
3. The newest state emptied, cut, and with one bit flipped; metrics.jsonl cut in the middle of a line: `--resume` says so and goes on from the one before.

    python drill.py                     # about ten minutes; prints what was injected and survived, exit code 1 if anything was lost
"""

import argparse
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib

from common import HERE

COMMON = ["--threads", "1", "--state-every", "1", "--seed", "3"]
STAGES = dict(
    sft=["--steps", "40", "--batch", "8"],
    rlvr=["--steps", "8", "--batch", "4", "--hard", "1", "--eval-problems", "16"],
    opsd=[
        "--steps",
        "8",
        "--batch",
        "16",
        "--filter",
        "all",
        "--teacher",
        "ema",
        "--eval-problems",
        "16",
        "--kl-by-position",
        "8",
    ],
)


def start(stage, out, *flags, limit=None):
    command = [
        sys.executable,
        os.path.join(HERE, stage + ".py"),
        *STAGES[stage],
        *COMMON,
        "--out",
        out,
        *flags,
    ]
    if limit:
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "_", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE
    )


def finish(process):
    out, error = process.communicate()
    return process.returncode, out, error


def result(out):
    """What a run left behind: checksum of the weights and the logs without times; None if it did not end."""
    if not os.path.exists(os.path.join(out, "model.safetensors")):
        return None
    logs = {}
    for path in sorted(glob.glob(os.path.join(out, "*.jsonl"))):
        rows = [json.loads(line) for line in open(path)]
        logs[os.path.basename(path)] = [
            {k: v for k, v in row.items() if "second" not in k and "memory" not in k}
            for row in rows
            if "args" not in row
        ]
    return zlib.crc32(open(os.path.join(out, "model.safetensors"), "rb").read()), logs


def states(out):
    return sorted(glob.glob(os.path.join(out, "state-*")))


def resume_flags(out):
    return ["--resume"] if os.path.exists(os.path.join(out, "metrics.jsonl")) else ["--overwrite"]


def kill(stage, out, moment, seconds, rng):
    """Starts or resumes the run and kills it at a random moment, or as soon as a file is being written. Returns whether it was still running."""
    process = start(stage, out, *resume_flags(out))
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="a stage, a quarter of them inside a save"
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    args = parser.parse_args()
    rng, failures, counts = random.Random(0), [], dict(kills=0, full_disks=0, damaged=0)

    def check(condition, what):
        if not condition:
            failures.append(what)
            print("LOST:", what)

    for stage in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            whole, out = os.path.join(folder, "whole"), os.path.join(folder, "out")
            before = time.time()
            code, _, error = finish(start(stage, whole))
            check(code == 0, f"{stage}: the undisturbed run failed: {error[-300:]}")
            seconds = time.time() - before
            # 1. kills: the run is begun anew whenever it gets to its end before the last of them
            done = 0
            while done < args.kills:
                if os.path.exists(os.path.join(out, "model.safetensors")) and not states(out):
                    check(
                        result(out) == result(whole),
                        f"{stage}: a run with {done} kills ended differently",
                    )
                    subprocess.run(["rm", "-r", out], check=True)
                done += kill(stage, out, "saving" if done % 4 == 3 else "random", seconds, rng)
            code, _, error = (
                finish(start(stage, out, *resume_flags(out)))
                if states(out) or not os.path.exists(os.path.join(out, "model.safetensors"))
                else (0, "", "")
            )
            check(code == 0, f"{stage}: resuming after {done} kills failed: {error[-300:]}")
            check(
                result(out) == result(whole), f"{stage}: a run with {done} kills ended differently"
            )
            counts["kills"] += done
            # 2. a full disk, while the first state is written and while a log is
            for limit in (1, 2000):
                subprocess.run(["rm", "-rf", out], check=True)
                code, _, error = finish(start(stage, out, limit=limit))
                check(
                    code == 2 and error.count("\n") == 1 and error.startswith("error: "),
                    f"{stage}: full disk, exit {code}: {error[-300:]}",
                )
                code, _, error = finish(start(stage, out, *resume_flags(out)))
                check(
                    code == 0 and result(out) == result(whole),
                    f"{stage}: resuming after a full disk: {error[-300:]}",
                )
                counts["full_disks"] += 1
            # 3. damaged files
            for damage in (
                lambda c: b"",
                lambda c: c[: len(c) // 2],
                lambda c: c[: len(c) // 3] + bytes([c[len(c) // 3] ^ 1]) + c[len(c) // 3 + 1 :],
            ):
                subprocess.run(["rm", "-rf", out], check=True)
                process = start(stage, out)
                while len(states(out)) < 2 and process.poll() is None:
                    time.sleep(0.002)
                process.kill(), finish(process)
                newest = states(out)[-1]
                content = open(newest, "rb").read()
                open(newest, "wb").write(damage(content))
                log = os.path.join(out, "metrics.jsonl")
                open(log, "r+b").truncate(os.path.getsize(log) - 20)
                code, said, error = finish(start(stage, out, "--resume"))
                check(
                    code == 0
                    and f"{os.path.basename(newest)} is damaged" in said
                    and result(out) == result(whole),
                    f"{stage}: resuming from a damaged state: {error[-300:]}",
                )
                counts["damaged"] += 1
            print(f"{stage}: undisturbed {seconds:.0f} s; so far {counts}", flush=True)
    print(
        f"{sum(counts.values())} faults injected ({counts['kills']} kills, {counts['full_disks']} full disks, {counts['damaged']} damaged states and logs), {len(failures)} not survived"
    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
