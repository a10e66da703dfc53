"""Changes of a pretrained model's branches seed by seed, all seeds on the same problems."""

import numpy as np

from lab.results import branch_of, change, evaluations, mean_interval
from metrics import interval, paired_bootstrap
from run import fail
from tools import markdown


def changes_of(responses, seed):
    """{branch: {accuracy, length: (estimate, draws of it)}}: a seed's changes against its first
    model, and those of the incorrect or gated branches against the correct or ungated ones.

    Bootstraps of equally many problems draw the same ones: draws of seeds can be averaged.
    """
    sums = {}  # what metrics.per_problem returns
    for model in responses["models"]:
        right, lengths = np.array(model["reasons"]) == "correct", np.array(model["lengths"])
        parts = right, lengths, np.ones_like(lengths)  # (problems, samples) each
        sums[branch_of(model["name"], seed)] = [part.sum(1) for part in parts]
    first, *others = sums
    changes = {branch: paired_bootstrap(sums[first], sums[branch]) for branch in others}
    for branch in others:
        for which, against in (("incorrect", "correct"), ("agreement", "all")):
            if which in branch:
                pair = sums[branch.replace(which, against)], sums[branch]
                changes[f"{branch} against {against}"] = paired_bootstrap(*pair)
    return changes


def seeds_table(part, seeds):
    """Changes of the branches with their 95% interval over problems, a column a seed; of several
    seeds, on the same problems, also their mean with that over seeds and that over problems.
    """
    found = [file["responses"]["test"] for file in evaluations(part, seeds)]
    if any(responses["questions"] != found[0]["questions"] for responses in found):
        fail(f"evaluations of {part}: seeds {' '.join(seeds)} have other problems")
    found = [changes_of(*pair) for pair in zip(found, seeds, strict=True)]
    header = ["branch", "change", *(f"seed {seed}" for seed in seeds)]
    header += ["mean, over seeds", "mean, over problems"] if len(seeds) > 1 else []
    rows = []
    for branch in found[0]:
        for key, unit in (("accuracy", "points"), ("length", "%")):
            pairs = [changes[branch][key] for changes in found]
            cells = [interval(*pair) for pair in pairs]
            if len(seeds) > 1:
                estimates, draws = zip(*pairs, strict=True)
                cells.append(mean_interval(estimates))
                cells.append(interval(np.mean(estimates), np.mean(draws, 0)))
            name = branch if key == "accuracy" else ""
            rows.append([name, f"{key}, {unit}", *map(change, cells)])
    return markdown(header, rows)
