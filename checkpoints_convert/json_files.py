"""Reading JSON objects from untrusted files."""

import json
from pathlib import Path
from typing import Any

from polarjax.errors import CheckpointError

FILE_NAME = r"\w[\w. +=-]*"
"""Pattern of the plain names that a file may give other files beside it."""


def read_json(file: Path, *, last_wins: bool = False) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` if the file holds anything else.

    Args:
      file: the file to read.
      last_wins: whether a key may occur twice; the last value wins, as in transformers.
    """
    hint = "download the file again"
    if not file.is_file():
        raise CheckpointError("not a file", where=file, hint=hint)
    try:
        data = parse_json(file.read_bytes(), last_wins=last_wins)
    except (OSError, ValueError) as error:
        raise CheckpointError("not readable as JSON", where=file, got=str(error)[:200], hint=hint) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=file, got=type(data).__name__, hint=hint)
    return data


def parse_json(text: bytes, *, last_wins: bool = False) -> Any:
    """Like `json.loads`, but raises `ValueError` if nested too deeply and, unless `last_wins`, for duplicate keys."""
    try:
        return json.loads(text, object_pairs_hook=dict if last_wins else _unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return data
