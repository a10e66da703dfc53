"""What reproduce.sh left in lab/results/, and means over its pipelines with their intervals."""

import os

import numpy as np

from run import HERE
from tools import read_json

RESULTS = os.path.join(HERE, "lab", "results")
SEEDS = [str(seed) for seed in range(201, 209)]  # of the pipelines, trained until settled
# Those of the second edition, 40 steps each (commit c922497); the first FEW have more runs.
OLD_SEEDS = [str(seed) for seed in range(101, 109)]
FEW = 3
REAL_SEEDS = ["1", "2", "3"]  # of the pretrained model

# Two-sided 95% quantile of Student's t for n seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def evaluation(part, seed):
    return os.path.join(RESULTS, "evaluations", f"{part}-{seed}.json.gz")


def evaluations(part, seeds):
    return [read_json(evaluation(part, seed)) for seed in seeds]


def log_of(name):
    """The kept log of the run BRANCH-SEED."""
    return os.path.join(RESULTS, "metrics", f"{name}.jsonl.gz")


def branch_of(name, seed):
    """The branch of a name like runs/table/BRANCH-SEED; with "after N" of a checkpoint step-N, and
    "reading CONTEXT" where those stand.
    """
    model, *reading = name.split(" ", 1)
    run, _, step = model.partition("/step-")
    after = [f"after {step}"] if step else []
    return " ".join([os.path.basename(run).removesuffix(f"-{seed}"), *after, *reading])


def mean_interval(values):
    """(mean, low, high) over seeds; low and high are None for a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def mean(value, digits=1):
    return "" if value is None else f"{value[0]:.{digits}f}"


def change(value):
    if value is None:
        return ""
    interval = "" if value[1] is None else f" [{value[1]:+.1f}, {value[2]:+.1f}]"
    return f"{value[0]:+.1f}{interval}"


def both(accuracy, length):
    """A cell with a change of accuracy, points, and one of length, percent, without interval."""
    return f"{change(accuracy)}; {length[0]:+.0f}%"
