"""A thin wrapper of a HuggingFace tokenizer: text to right-padded batches and back."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.errors import CheckpointError, InputError
from polarjax.types import Int32

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of these has a tokenizer."""


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      folder: where its files lie.
      hf: the tokenizer of transformers.
      generation: what generation_config.json says; empty without one.
    """

    folder: Path
    hf: Any
    generation: dict[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a folder of HuggingFace tokenizer files; runs no code from it and asks no network.

        Raises:
          CheckpointError: the folder has no tokenizer, or transformers cannot read it.
        """
        path = Path(os.path.abspath(folder))
        if not has_tokenizer(path):
            expected = f"one of {', '.join(VOCABULARY_FILES)}"
            mend = "copy the tokenizer's files there"
            raise CheckpointError("no tokenizer", where=path, expected=expected, mend=mend)
        with _quiet():
            import transformers

            try:
                hf = transformers.AutoTokenizer.from_pretrained(
                    path, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
                mend = "copy the tokenizer's files again; tokenizer.model needs polarjax[sentencepiece]"
                raise CheckpointError(
                    "unreadable tokenizer", where=path, got=_first(error), mend=mend
                ) from error
        return cls(path, hf, _generation(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's V may be larger."""
        return len(self.hf)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self.hf.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self.hf.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id that fills up rows; what it is does not matter, because lengths are kept."""
        ids = (self.hf.pad_token_id, self.hf.eos_token_id, 0)
        return next(each for each in ids if each is not None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: those of generation_config.json, otherwise `eos_id`."""
        ids = self.generation.get("eos_token_id", self.eos_id)
        ids = ids if isinstance(ids, list) else [ids]
        return tuple(int(each) for each in ids if each is not None)

    def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]:
        """Token ids of each text, right-padded to the longest, and their true lengths.

        Args:
          texts: B texts.
          add_special_tokens: whether the tokenizer adds its beginning-of-text token, if it has one.

        Raises:
          InputError: there is no text, or a text has no tokens.
        """
        if isinstance(texts, str) or not texts:
            raise InputError(
                "no texts to encode", where="Tokenizer.encode", got=repr(texts), expected="a list of texts"
            )
        rows = [self.hf.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        empty = [i for i, row in enumerate(rows) if not row]
        if empty:
            got = f"an empty text at index {empty[0]}"
            raise InputError("a prompt needs at least one token", got=got, mend="leave out empty prompts")
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), lengths.max()), self.pad_id, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens, lengths

    def decode(
        self,
        tokens: Int32[np.ndarray, "B T"],
        lengths: Int32[np.ndarray, "B"] | None = None,
        *,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """The text of each row, or of its first `lengths` tokens."""
        rows = np.asarray(tokens)
        ends = [rows.shape[1]] * len(rows) if lengths is None else np.asarray(lengths).tolist()
        return [
            self.hf.decode(row[:end].tolist(), skip_special_tokens=skip_special_tokens)
            for row, end in zip(rows, ends, strict=True)
        ]


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        mend = "mend the file or remove it"
        raise CheckpointError("not readable as JSON", where=file, got=str(error), mend=mend) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            "not a generation config", where=file, got=type(data).__name__, expected="an object"
        )
    return data


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from announcing at import that PyTorch is not there."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
