"""Tools beside the method, run as `python -m tools.NAME` in the repository root."""


def markdown(header, rows):
    """A Markdown table of cells that are text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
