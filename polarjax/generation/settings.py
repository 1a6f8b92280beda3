"""A model's own generation settings: stop ids and sampling defaults from generation_config.json."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polarjax.errors import CheckpointError, InputError
from polarjax.generation.sampling import Categorical, Greedy, Sampler
from polarjax.generation.token_loop import is_token_id
from polarjax.numeric import LARGEST, make_plain, plain, shown
from polarjax.storage.atomic import read_json

GENERATION_CONFIG = "generation_config.json"
KNOWN = (
    "eos_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "stop_strings",
)

_TOP_K = 50  # transformers' default
_SILENT = frozenset(
    (
        "transformers_version _from_model_config _commit_hash _name_or_path bos_token_id pad_token_id "
        "decoder_start_token_id use_cache cache_implementation cache_config return_dict_in_generate "
        "output_attentions output_hidden_states output_scores output_logits trust_remote_code chat_format"
    ).split()
)
_WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "min_p": 0.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "max_length": 20,  # the default of transformers
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """A model's settings. `Bundle.complete`, `Engine` and the commands use those that nothing overrides; `generate`
    and `stream` use none.

    Attributes:
      stop_ids: ids that end a sequence.
      stop_strings: strings that end a sequence and are cut off.
      do_sample: whether tokens are drawn; otherwise the most likely one is taken.
      temperature: None is 1.
      top_k: None keeps all tokens.
      top_p: None keeps all tokens.
      repetition_penalty: 1 disables it; applies to greedy decoding too.
      max_new_tokens: None if the file doesn't set it.
      ignored: entries of the file that would change the text but that polarjax doesn't support.

    Raises:
      InputError: a value is out of its range.
    """

    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        make_plain(self, "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
        object.__setattr__(self, "stop_ids", tuple(map(plain, self.stop_ids)))
        for each in self.stop_ids:
            _check(is_token_id(each), "stop_ids", each, f"token ids, 0 to {LARGEST}")
        _check(isinstance(self.do_sample, bool), "do_sample", self.do_sample, "true or false")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            _check(value is None or type(value) in (int, float), name, value, "a number")
        penalty = self.repetition_penalty
        usable = type(penalty) in (int, float) and 0 < penalty < math.inf
        _check(usable, "repetition_penalty", penalty, "a number above 0")
        most = self.max_new_tokens
        _check(most is None or (type(most) is int and most > 0), "max_new_tokens", most, "at least 1")
        empty = next((each for each in self.stop_strings if not isinstance(each, str) or not each), None)
        _check(empty is None, "stop_strings", empty, "texts, none of them empty")
        if self.do_sample:
            Categorical(self._temperature, self.top_k, self.top_p)

    @property
    def sampler(self) -> Sampler:
        """`Greedy()` or the `Categorical` that the values ask for."""
        return Categorical(self._temperature, self.top_k, self.top_p) if self.do_sample else Greedy()

    def with_flags(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        greedy: bool = False,
    ) -> "GenerationSettings":
        """These settings with some replaced; a temperature, `top_k` (0: all tokens) or `top_p` means to draw.

        Raises:
          InputError: a value is out of its range, or one is combined with `greedy`.
        """
        given: dict[str, float | None] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {key: value for key, value in given.items() if value is not None}
        if greedy and given:
            hint = "drop one of them"
            raise InputError("greedy and sampling contradict each other", got=", ".join(given), hint=hint)
        do_sample = bool(given) or (self.do_sample and not greedy)
        if _is_zero(top_k):
            given["top_k"] = None
        if repetition_penalty is not None:
            given["repetition_penalty"] = repetition_penalty
        return dataclasses.replace(self, do_sample=do_sample, **given)

    def asked(self, given: Mapping[str, Any], check: Callable[[str, Any], object]) -> "GenerationSettings":
        """These settings with what a request gives, by the names of `with_flags`: a temperature of 0 draws nothing,
        whatever the request says about drawing.

        Args:
          given: the values.
          check: raises what is wrong with the value of a name; not called with a temperature of 0.

        Raises:
          InputError: a negative temperature, or these settings hold an unusable value that would now be used.
        """
        temperature: Any = given.get("temperature")
        number = type(temperature) in (int, float)
        if number and -math.inf < temperature < 0:
            got, hint = shown(temperature), "0 takes the most likely tokens"
            raise InputError("temperature is out of range", got=got, expected="at least 0", hint=hint)
        greedy = number and temperature == 0
        for name, value in given.items():
            if not (greedy and name == "temperature"):
                check(name, value)
        kept = ("repetition_penalty",) if greedy else tuple(given)
        return self.with_flags(greedy=greedy, **{name: given[name] for name in kept if name in given})

    @property
    def notes(self) -> tuple[str, ...]:
        """One line about ignored entries, if there are any."""
        if not self.ignored:
            return ()
        return (f"{GENERATION_CONFIG} has unsupported entries; ignored: {', '.join(self.ignored)}",)

    @property
    def _temperature(self) -> float:
        return 1.0 if self.temperature is None else self.temperature

    @classmethod
    def read(cls, folder: Path, *, eos_id: int | None = None) -> "GenerationSettings":
        """The settings in `folder`; `eos_id` is the stop id if the file is missing or names none.

        Raises:
          CheckpointError: generation_config.json is damaged, or a value in it is out of its range.
        """
        file = folder / GENERATION_CONFIG
        default = {} if eos_id is None else {"eos_token_id": eos_id}
        data = read_json(file, hint=_HINT) if file.is_file() else {}
        try:
            return cls.from_json(default | {key: value for key, value in data.items() if value is not None})
        except InputError as error:
            what = error.what.replace("stop_ids", "eos_token_id")  # its name in the file
            raise CheckpointError(
                what, where=file, got=error.got, expected=error.expected, hint=_HINT
            ) from error

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "GenerationSettings":
        """From the keys of generation_config.json; null is the same as leaving a key out, as is `top_k` 0.

        Raises:
          InputError: a value is out of its range.
        """
        given = {key: value for key, value in data.items() if value is not None}
        stop_ids, stop_strings = given.get("eos_token_id", []), given.get("stop_strings", [])
        do_sample = given.get("do_sample", False)
        top_k = given.get("top_k", _TOP_K if do_sample is True else None)
        return cls(
            stop_ids=tuple(stop_ids) if isinstance(stop_ids, list) else (stop_ids,),
            stop_strings=tuple(stop_strings) if isinstance(stop_strings, list) else (stop_strings,),
            do_sample=do_sample,
            temperature=given.get("temperature"),
            top_k=None if _is_zero(top_k) else top_k,
            top_p=given.get("top_p"),
            repetition_penalty=given.get("repetition_penalty", 1.0),
            max_new_tokens=given.get("max_new_tokens"),
            ignored=tuple(f"{key} {value}" for key, value in given.items() if _matters(key, value)),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back; `ignored` is lost."""
        return {
            "eos_token_id": list(self.stop_ids),
            "stop_strings": list(self.stop_strings),
            "do_sample": self.do_sample,
            "temperature": self.temperature,
            "top_k": 0 if self.top_k is None else self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_new_tokens,
        }


_HINT = "correct the file or remove it"


def _is_zero(top_k: Any) -> bool:
    """Whether `top_k` keeps all tokens; false and 0.0 are no whole numbers."""
    return type(plain(top_k)) is int and top_k == 0


def _matters(key: str, value: Any) -> bool:
    """Whether ignoring the entry may change the generated text."""
    return (
        key not in KNOWN and key not in _SILENT and value is not False and _WITHOUT_EFFECT.get(key) != value
    )


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise InputError(
            f"{name} is not usable",
            where="GenerationSettings",
            got=shown(got),
            expected=expected,
            hint="correct the value or omit it",
        )
