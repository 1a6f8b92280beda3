"""Training and evaluation texts: files, and the standard library as a corpus."""

import hashlib
import lzma
import sysconfig
from pathlib import Path
from typing import Literal, get_args

from polarjax.errors import InputError

Split = Literal["train", "calibration", "evaluation"]

DOCUMENT_SEPARATOR = "\f"
SKIPPED_NAMES = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings", "entities")
)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file or pipe; `.xz` files are decompressed. Form feeds separate documents.

    Raises InputError for a file that is missing, a directory or device, not UTF-8, damaged or empty.
    """
    path = Path(path)
    hint = "give a UTF-8 text file (.txt or .txt.xz)"
    try:
        if (got := unreadable(path)) is not None:
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


def unreadable(path: Path) -> str | None:
    """Why `path` can't be read as text, or None; a terminal is read to its end, like a pipe."""
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

    It depends only on the dotted name, so a module keeps its split across Python versions.
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
        names = get_args(Split)
        hint = f"pass for example {names[0]!r}"
        raise InputError("no such split", got=repr(split), expected=" | ".join(names), hint=hint)
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


def _module_name(relative: Path) -> str | None:
    """`email/message.py` -> `email.message`, `json/__init__.py` -> `json`; None for excluded files."""
    parts = relative.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if not parts or not all(part.isidentifier() for part in parts) or not SKIPPED_NAMES.isdisjoint(parts):
        return None
    return ".".join(parts)
