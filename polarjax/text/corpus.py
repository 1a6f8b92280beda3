"""Text and token windows: reading files, the standard library as a corpus, cutting token streams."""

import hashlib
import lzma
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from polarjax.errors import InputError
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Int

Split = Literal["train", "calibration", "evaluation"]

DOCUMENT_SEPARATOR = "\f"
SKIPPED_NAMES = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings", "entities")
)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file or pipe; a name ending in `.xz` is unpacked. Form feeds separate documents.

    Raises InputError for a file that is missing, a directory or device, not UTF-8, damaged or empty.
    """
    path = Path(path)
    hint = "give a UTF-8 text file (.txt or .txt.xz)"
    try:
        if (got := _unreadable(path)) is not None:
            raise InputError("cannot read the text", where=str(path), got=got, hint=hint)
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except lzma.LZMAError as error:
        hint = "copy the file again"
        raise InputError("damaged .xz file", where=str(path), got=str(error), hint=hint) from error
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError("the text is not UTF-8", where=str(path), got=got, hint=hint) from error
    except OSError as error:
        raise InputError("cannot read the text", where=str(path), got=error.strerror, hint=hint) from error
    if not text.strip():
        raise InputError("the text is empty", where=str(path), got=f"{len(raw)} bytes", hint=hint)
    return text


def _unreadable(path: Path) -> str | None:
    """What stands at `path` if no text can be read from it; a terminal is read to its end, like a pipe."""
    if path.is_dir():
        return "a directory"
    if not path.exists():
        return "no such file"
    if path.is_block_device() or (path.is_char_device() and not _is_terminal(path)):
        return "a device"
    return None


def _is_terminal(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.isatty()


def split_of(module: str) -> Split:
    """The split a standard-library module belongs to: 80 % train, 10 % calibration, 10 % evaluation.

    It hangs on the dotted name alone, so a module stays in its split on every Python version.
    """
    bucket = hashlib.sha256(module.encode()).digest()[0] * 10 // 256
    return ("calibration", "evaluation")[bucket] if bucket < 2 else "train"


def standard_library_documents(split: Split, library: str | Path | None = None) -> dict[str, str]:
    """Dotted module name -> source of the running Python's standard-library modules in `split`.

    Tests, bundled applications and tables are left out, as is whatever cannot be imported by name.
    `library` overrides the folder searched.
    Raises InputError for an unknown split or a library without sources.
    """
    if split not in get_args(Split):
        raise InputError("no such split", got=repr(split), expected=" | ".join(get_args(Split)))
    root = Path(library or sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"))
    modules = {name: path for path in paths if (name := _module_name(path.relative_to(root)))}
    sources = {name: path.read_text("utf-8") for name, path in modules.items() if split_of(name) == split}
    found = {name: text for name, text in sources.items() if text.strip()}
    if not found:
        raise InputError(
            "the Python standard library has no sources to read",
            where=str(root),
            got=f"{len(modules)} modules",
            hint="use a Python installation that ships its .py files",
        )
    return found


def standard_library_text(split: Split) -> str:
    """The sources of `split` (see `standard_library_documents`) as one text, separated by form feeds."""
    documents = standard_library_documents(split).values()
    return DOCUMENT_SEPARATOR.join(text.replace(DOCUMENT_SEPARATOR, "") for text in documents)


def token_stream(text: str, encode: Callable[[str], Sequence[int]], *, separator: int | None) -> np.ndarray:
    """All documents of `text` as one int32 stream; `separator` (the BOS id; None = nothing) precedes each.

    `encode` turns a document into token ids without adding special tokens.
    """
    head = [] if separator is None else [separator]
    documents = filter(str.strip, text.split(DOCUMENT_SEPARATOR))
    parts = [np.asarray([*head, *encode(document)], np.int32) for document in documents]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def windows(
    tokens: Sequence[int] | np.ndarray,
    length: int,
    *,
    first: int | None = None,
    at_least: int = 1,
    source: str = "the text",
) -> np.ndarray:
    """Consecutive, non-overlapping windows [n length] int32 of a token stream; the short tail is dropped.

    With `first` (a BOS id) each window is that token followed by length - 1 tokens of the stream.
    Raises InputError when fewer than `at_least` windows come out; it names `source` and the tokens got and needed.
    """
    taken = length if first is None else length - 1
    if taken < 1:
        raise InputError("the window is too short", got=f"length {length}", expected="room for a token")
    stream = np.asarray(tokens, np.int32)
    count = len(stream) // taken
    if count < at_least:
        raise InputError(
            "the text is too short",
            where=source,
            got=f"{len(stream)} tokens",
            expected=f"at least {at_least * taken} tokens ({at_least} windows of {taken})",
            hint="give a longer text or a smaller window",
        )
    rows = stream[: count * taken].reshape(count, taken)
    if first is None:
        return rows
    return np.concatenate([np.full((count, 1), first, np.int32), rows], axis=1)


def _module_name(relative: Path) -> str | None:
    """`email/message.py` -> `email.message`, `json/__init__.py` -> `json`; None for what is left out."""
    parts = relative.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if not parts or not all(part.isidentifier() for part in parts) or not SKIPPED_NAMES.isdisjoint(parts):
        return None
    return ".".join(parts)


def text_windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, *, most: int | None = None, source: str
) -> Int[np.ndarray, "n T"]:
    """Windows of `length` tokens of all `texts`, each begun by BOS where the tokenizer has one.

    Args:
      texts: documents, or several separated by form feeds.
      tokenizer: of the model.
      length: T, BOS included.
      most: at most so many windows, evenly spread over the text; None takes all.
      source: what an error calls the texts.

    Raises:
      InputError: the text does not fill one window, or `length` or `most` is too small.
    """
    if most is not None and most < 1:
        raise InputError("no window is left", where=source, got=most, expected="at least 1 window")
    encode = lambda text: tokenizer.hf.encode(text, add_special_tokens=False, verbose=False)
    stream = token_stream(DOCUMENT_SEPARATOR.join(texts), encode, separator=tokenizer.bos_id)
    rows = windows(stream, length, first=tokenizer.bos_id, source=source)
    if most is None or len(rows) <= most:
        return rows
    return rows[np.arange(most) * len(rows) // most]
