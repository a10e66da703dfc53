"""Rows of a file or a data set: JSON lines, a JSON array, parquet, a Hugging Face data set id."""

import json
import math
import os
from decimal import Decimal

from cli import fail, one_line


def read_rows(path, split, flag="--data"):
    """Yields (place for error messages, row as a dict)."""
    is_json, is_parquet = path.endswith((".jsonl", ".json")), path.endswith(".parquet")
    if (is_json or is_parquet) and not os.path.isfile(path):
        fail(f"{flag} {path}: no such file")
    if is_json:
        yield from read_json(path)
        return
    if not is_parquet and (os.path.exists(path) or path.count("/") != 1):
        fail(f"{flag} {path}: not a .jsonl or .parquet file, nor a data set id (owner/name)")
    try:
        rows = read_parquet(path) if is_parquet else read_data_set(path, split)
    except Exception as error:  # a hub out of reach, a wrong id, a broken file: one line is enough
        fail(f"{flag} {path}: {type(error).__name__}: {one_line(error)}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def read_json(path):
    """Rows of a UTF-8 file, with or without a BOM: one JSON object a line, or one array of them."""
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        fail(f"{path}: UTF-16 or another wide encoding; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        where, wrong = f"{path}, line {number}", f"byte 0x{byte:02x} is not UTF-8 (latin-1?)"
        fail(f"{where}: {wrong}; save the file as UTF-8")
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            fail(f"{path}: begins like a JSON array, but is not JSON ({error})")
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # U+2028 may stand in a string
            try:
                rows += [(f"{path}, line {number}", json.loads(line))] if line.strip() else []
            except ValueError as error:
                fail(f"{path}, line {number}: not JSON ({error})")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: not a JSON object")
        yield where, row


def read_parquet(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def read_data_set(name, split):
    import datasets

    rows = datasets.load_dataset(*name.split(":", 1), split=split)
    if split is not None:
        return rows
    names = list(rows)
    return rows["train" if "train" in names or len(names) > 1 else names[0]]


def pick(row, field, candidates, where, flag, required=True):
    """The text of `field`, or of the first of `candidates` in the row.

    Numbers become plain decimals (1e-05 would be read as e - 5); NaN and infinity are a missing
    value, as an empty text is.
    """
    names = [field] if field else [name for name in candidates if name in row]
    value = row.get(names[0]) if names else None
    infinite = isinstance(value, float) and math.isinf(value)
    if value is None or infinite or str(value).strip().lower() in ("", "nan"):
        if required:
            wanted, has = field or " / ".join(candidates), ", ".join(map(str, row))
            fail(f"{where}: no {wanted} (name the field with {flag}; the row has {has})")
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        fail(f"{where}: field {names[0]} is {type(value).__name__}, not text or a number")
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
