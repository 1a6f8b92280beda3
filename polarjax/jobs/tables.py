"""Batches of Ray Data as prompts, and answers as columns. All here are Arrow tables, which keep a column's type."""

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from polarjax.errors import InputError
from polarjax.text.prompt_files import ANSWERS, SETTINGS, PromptLine, line_of

ASKED = ("prompt", "messages", *SETTINGS)
"""Columns that say what is asked; all others are only repeated."""

_WHOLE = ("max_new_tokens", "top_k", "seed", "logprobs")

ROW = "row"
"""What errors call a row: its number in a batch would tell nothing."""


def as_table(batch: Any) -> Any:
    """A batch in any of Ray Data's formats as an Arrow table; raises `InputError` for anything else."""
    arrow = importlib.import_module("pyarrow")
    if isinstance(batch, arrow.Table):
        return batch
    if isinstance(batch, Mapping):
        return arrow.table({str(name): _column(arrow, values) for name, values in batch.items()})
    if type(batch).__module__.partition(".")[0] == "pandas":
        return arrow.Table.from_pandas(batch, preserve_index=False)
    raise InputError(
        "not a batch of rows",
        where="CompletePrompts",
        got=type(batch).__name__,
        expected="an Arrow table, a dict of columns or a pandas.DataFrame",
        hint='pass batch_format="pyarrow" to map_batches',
    )


def _column(arrow: Any, values: Any) -> Any:
    """A column as a NumPy array or a list; NaN stands for no value, as Ray Data has it."""
    numbers = hasattr(values, "dtype") and values.dtype != object and values.ndim == 1
    return arrow.array(values if numbers else list(values), from_pandas=True)


def check_columns(names: list[str]) -> None:
    """Raises `InputError` if there is no column of prompts."""
    if not {"prompt", "messages"} & set(names):
        raise InputError(
            "the rows have no prompts",
            where="CompletePrompts",
            got=f"columns {', '.join(names) or 'none'}",
            expected="a column prompt or messages",
            hint='rename the column with prompts: dataset.rename_columns({"text": "prompt"})',
        )


def lines_of(table: Any) -> Iterator[tuple[int, PromptLine]]:
    """Each row, and a number that is the same wherever the row runs: its prompt, settings and id give it."""
    about = [name for name in table.column_names if name in ASKED or name == "id"]
    for row in table.select(about).to_pylist():
        given = {name: _plain(name, value) for name, value in row.items() if value is not None}
        digest = hashlib.sha256(repr(sorted(given.items())).encode("utf-8", "backslashreplace")).digest()
        entry = {name: value for name, value in given.items() if name in ASKED}
        yield int.from_bytes(digest[:8], "little"), line_of(ROW, {}, entry)


def _plain(name: str, value: Any) -> Any:
    """A value as a line of JSON would have it."""
    if hasattr(value, "tolist"):  # a tensor, as Ray stores lists of one length
        value = value.tolist()
    if name in _WHOLE and isinstance(value, float) and value.is_integer():  # a column with missing numbers
        return int(value)
    return [_present(each) for each in value] if name == "messages" and isinstance(value, list) else value


def _present(message: Any) -> Any:
    """A message without the keys that only other messages of the column have."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if value is not None}


def with_answers(table: Any, outcomes: list[dict[str, Any]], *, logprobs: bool) -> Any:
    """The table with a column for each name in `ANSWERS`, of the same type in every batch.

    Args:
      table: n rows.
      outcomes: of each row, what the output adds to it.
      logprobs: whether completions have log-probabilities.
    """
    arrow = importlib.import_module("pyarrow")
    types = {"completions": arrow.list_(_completion_type(arrow, logprobs)), "error": arrow.string()}
    kept = table.drop_columns([name for name in ANSWERS if name in table.column_names])
    for name in ANSWERS:
        kept = kept.append_column(name, arrow.array([each.get(name) for each in outcomes], types[name]))
    return kept


def _completion_type(arrow: Any, logprobs: bool) -> Any:
    ids, values = arrow.list_(arrow.int64()), arrow.list_(arrow.float64())
    fields = [("text", arrow.string()), ("tokens", arrow.int64()), ("ending", arrow.string())]
    if logprobs:
        parts = [
            ("tokens", ids),
            ("chosen", values),
            ("ids", arrow.list_(ids)),
            ("best", arrow.list_(values)),
        ]
        fields.append(("logprobs", arrow.struct(parts)))
    return arrow.struct(fields)
