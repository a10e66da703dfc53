"""Tools beside the method, run as `python -m tools.NAME` in the repository root."""

import gzip
import json


def open_text(path):
    """A text file to read, as it is or compressed (its name ends in .gz)."""
    return gzip.open(path, "rt") if path.endswith(".gz") else open(path)


def read_json(path):
    with open_text(path) as stream:
        return json.load(stream)


def markdown(header, rows):
    """A Markdown table of cells that are text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
