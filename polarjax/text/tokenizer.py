"""A thin wrapper around a HuggingFace tokenizer: text to right-padded batches and back."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.errors import CheckpointError, InputError
from polarjax.generation.settings import GenerationSettings
from polarjax.storage.atomic import read_json
from polarjax.text import decoding
from polarjax.text.models_listed_once import models_listed_once
from polarjax.text.sentencepiece_model import is_tiktoken, use_sentencepiece_rules
from polarjax.text.torch_on_use import torch_on_use
from polarjax.types import Int32

SENTENCEPIECE = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
VOCABULARY_FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")
"""A folder with one of these has a tokenizer."""


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def only_sentencepiece(folder: Path) -> bool:
    """Whether the only vocabulary in `folder` is a SentencePiece model."""
    return [name for name in VOCABULARY_FILES if (folder / name).is_file()] == [SENTENCEPIECE]


def can_read_sentencepiece() -> bool:
    """Whether the libraries of the extra `sentencepiece` are installed; without them, transformers' error misleads."""
    return all(_installed(name) for name in ("sentencepiece", "google.protobuf"))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      folder: the folder of its files.
      hf: the transformers tokenizer.
      generation: settings of generation_config.json; without one, only `eos_id` as stop id.
    """

    folder: Path
    hf: Any
    generation: GenerationSettings

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, model_type: str | None = None) -> "Tokenizer":
        """Reads a folder of HuggingFace tokenizer files; runs no code from it and doesn't use the network.

        Args:
          folder: the folder of the tokenizer's files.
          model_type: the HuggingFace family, from which transformers picks a class if the files name none.

        Raises:
          CheckpointError: the folder has no tokenizer, transformers cannot read it, or generation_config.json is bad.
        """
        path = Path(os.path.abspath(folder))
        if not has_tokenizer(path):
            expected = f"one of {', '.join(VOCABULARY_FILES)}"
            hint = "copy the tokenizer's files there"
            raise CheckpointError("no tokenizer", where=path, expected=expected, hint=hint)
        if only_sentencepiece(path) and is_tiktoken(path / SENTENCEPIECE):
            raise CheckpointError(
                "this is a tiktoken vocabulary, not a SentencePiece model",
                where=path / SENTENCEPIECE,
                hint="add tokenizer.json, from a copy of this model that has it",
            )
        if only_sentencepiece(path) and not can_read_sentencepiece():
            raise CheckpointError(
                "tokenizer.model needs the libraries sentencepiece and protobuf",
                where=path,
                hint="pip install 'polarjax[sentencepiece]'",
            )
        with _quiet(), torch_on_use():
            hf = _from_transformers(path, model_type)
        if only_sentencepiece(path):
            said = (
                read_json(path / SETTINGS, hint="download the file again")
                if (path / SETTINGS).is_file()
                else {}
            )
            use_sentencepiece_rules(hf, path / SENTENCEPIECE, said)
        return cls(path, hf, GenerationSettings.read(path, eos_id=hf.eos_token_id))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's V may be larger."""
        return len(self.hf)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self.hf.bos_token_id

    @property
    def bos_is_optional(self) -> bool:
        """Whether prompts come with and without BOS: there is one, as chats begin with it, but encoding adds none."""
        return self.bos_id is not None and self.hf.encode("a", verbose=False)[:1] != [self.bos_id]

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self.hf.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id used for padding; any id would do, because lengths are kept."""
        ids = (self.hf.pad_token_id, self.hf.eos_token_id, 0)
        return next(each for each in ids if each is not None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: those of generation_config.json, otherwise `eos_id`."""
        return self.generation.stop_ids

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without added tokens; fast tokenizers work on several texts at once."""
        return self.hf(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

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
                "no texts to encode",
                where="Tokenizer.encode",
                got=repr(texts),
                expected="a list of texts",
                hint="pass [text]",
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not _is_unicode(text):
                got = f"{text!r:.40} at index {i}"
                raise InputError("not a text", where="Tokenizer.encode", got=got, hint="pass Unicode texts")
        rows = [self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False) for text in texts]
        empty = [i for i, row in enumerate(rows) if not row]
        if empty:
            got = f"an empty text at index {empty[0]}"
            raise InputError("a prompt needs at least one token", got=got, hint="leave out empty prompts")
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), lengths.max()), self.pad_id, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens, lengths

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation through the model's chat template, up to where the model answers.

        Args:
          messages: each with the texts `role` ("system", "user", "assistant") and `content`.

        Raises:
          InputError: the tokenizer has no chat template, or its template refuses the messages.
        """
        self.check_chat_template()
        if not _is_unicode("".join(map(written, messages))):
            raise InputError("not a text", where="Tokenizer.encode_chat", hint="pass Unicode texts")
        options = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
        ids = self._apply_template(messages, add_generation_prompt=True, **options)
        if not ids:
            raise InputError(
                "the chat template returned no tokens for the messages", hint="write at least one message"
            )
        return list(ids)

    def chat_text(self, messages: Sequence[Mapping[str, str]], **arguments: Any) -> str:
        """The text of a conversation; if the template refuses its system messages, without them, as lm-eval has it.

        Args:
          messages: each with the texts `role` and `content`.
          arguments: of transformers' `apply_chat_template`.

        Raises:
          InputError: the tokenizer has no chat template, or its template refuses the messages.
        """
        self.check_chat_template()
        rest = [each for each in messages if each["role"] != "system"]
        try:
            return self._apply_template(messages, tokenize=False, **arguments)
        except InputError:
            if len(rest) == len(messages):
                raise
        return self._apply_template(rest, tokenize=False, **arguments)

    def _apply_template(self, messages: Sequence[Mapping[str, str]], **arguments: Any) -> Any:
        try:
            return self.hf.apply_chat_template([dict(each) for each in messages], **arguments)
        except Exception as error:  # a template may raise anything
            hint = "write the messages as the model's template expects"
            raise InputError(
                "the chat template refuses the messages", got=_first(error), hint=hint
            ) from error

    def check_chat_template(self) -> None:
        """Raises `InputError` if the tokenizer has no chat template that can be used."""
        if not self.hf.chat_template:
            hint = "write the prompt as one text (without --chat), or use a chat model"
            raise InputError("the tokenizer has no chat template", where=self.folder, hint=hint)
        if not _installed("jinja2"):
            raise InputError(
                "a chat template needs the library jinja2", where=self.folder, hint="pip install jinja2"
            )
        templates = self.hf.chat_template
        if isinstance(templates, Mapping) and "default" not in templates:
            raise InputError(
                "the tokenizer has several chat templates, none named default",
                where=self.folder,
                got=", ".join(map(str, templates)) or "an empty list",
                hint="name the one to use default: in chat_template of tokenizer_config.json, or as "
                "chat_template.jinja",
            )

    def special_id(self, text: str) -> int | None:
        """The id of a special token that reads `text`; None if there is none."""
        tokens = self.hf.added_tokens_decoder.items()
        return next((i for i, token in tokens if token.content == text and token.special), None)

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
            decoding.decode(self.hf, row[:end].tolist(), skip_special_tokens=skip_special_tokens)
            for row, end in zip(rows, ends, strict=True)
        ]

    @functools.cached_property
    def silent_ids(self) -> frozenset[int]:
        """Ids that `decode_ids` leaves out before it decodes the others; none where they may change others' text."""
        return decoding.special_ids(self.hf)

    def decode_ids(self, ids: Sequence[int]) -> str:
        """The text of one sequence, without special tokens."""
        return decoding.decode(self.hf, ids, skip_special_tokens=True)


def _from_transformers(folder: Path, model_type: str | None) -> Any:
    import transformers

    model_type = "llama" if model_type == "sparsellama" else model_type  # transformers doesn't know it
    try:
        with models_listed_once():
            hf = transformers.AutoTokenizer.from_pretrained(
                folder, config=_bare_config(model_type), local_files_only=True, trust_remote_code=False
            )
        _ = hf.eos_token_id  # looks the special tokens up  # pyrefly: ignore[missing-attribute]
        if decoding.is_bpe(hf):  # transformers would warn that it ignores the setting
            hf.clean_up_tokenization_spaces = False  # pyrefly: ignore[missing-attribute]
        return hf
    except Exception as error:  # the tokenizers library raises plain Exception
        what, got, hint = "unreadable tokenizer", _first(error), "copy the tokenizer's files again"
        if "trust_remote_code" in str(error):
            what, got = "the tokenizer asks for its own code (auto_map), which polarjax never runs", None
            hint = "use a model whose tokenizer transformers supports"
        if isinstance(error, RecursionError):
            what, got = "special tokens that are empty or unknown", _special_tokens(folder)
            hint = f"remove those that are empty from {SETTINGS} and special_tokens_map.json"
        raise CheckpointError(what, where=folder, got=got, hint=hint) from error


def _special_tokens(folder: Path) -> str:
    """The special tokens named in the settings."""
    files = [folder / name for name in ("special_tokens_map.json", SETTINGS)]
    data = [read_json(file, hint="download the file again") for file in files if file.is_file()]
    tokens = {key: value for each in data for key, value in each.items() if key.endswith("_token")}
    return ", ".join(f"{key} {value!r:.40}" for key, value in tokens.items() if not key.startswith("add_"))


def _bare_config(model_type: str | None) -> Any:
    """A config with only the family's name, enough to pick a tokenizer; the real class imports PyTorch."""
    from transformers import PreTrainedConfig
    from transformers.models.auto import configuration_auto

    names = configuration_auto.CONFIG_MAPPING_NAMES
    if model_type not in names:
        return None
    return type(names[model_type], (PreTrainedConfig,), {"model_type": model_type})()


def written(message: Mapping[str, str]) -> str:
    """The texts of a message that chat templates write."""
    texts = (message.get(key) for key in ("role", "name", "content"))
    return "".join(each for each in texts if isinstance(each, str))


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no tokenizer accepts."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _first(error: BaseException) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return next(iter(text.splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' warning at import that PyTorch is missing."""
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
