"""Reading the keys of a HuggingFace config.json.

We read the keys that the family's class in transformers reads. Other keys can't change its result: they are ignored,
with a note, unless they say that the weights mean something else; those are refused by name (`foreign_weights`).
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from polarjax.configs import RopeConfig
from polarjax.errors import UnsupportedConfigError

HARMLESS = frozenset(
    """
    model_type architectures auto_map transformers_version torch_dtype dtype use_cache name_or_path
    _name_or_path _commit_hash attn_implementation _attn_implementation _attn_implementation_autoset
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix tokenizer_class
    initializer_range init_std attention_dropout activation_dropout hidden_dropout dropout layerdrop
    resid_pdrop embd_pdrop classifier_dropout pretraining_tp unsloth_fixed unsloth_version
    output_attentions output_hidden_states return_dict gradient_checkpointing use_bfloat16 tf_legacy_loss
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens max_length min_length max_new_tokens do_sample early_stopping
    num_beams num_beam_groups diversity_penalty max_sequence_length is_llama_config transformers.js_config
    _flash_attn_2_enabled
    """.split()
)
"""Keys that don't affect the logits of a trained model: names, training, token ids, generation defaults."""

DEFAULTS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),
    "learned_embeddings": (True,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "scale_embeddings": (False,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_mrope": (False,),
}
"""Keys that no family reads, and the values for which no note is given."""

FATRELU = "fatrelu"
"""ReLU with a threshold, in ProSparse's spelling; transformers itself does not know it."""
_PROSPARSE = "if these are the weights of a ProSparse model, set model_type to sparsellama"
ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    },
}  # fmt: skip
type Activation = Literal["relu", "silu", "gelu"]

_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu"}
_REQUIRED = object()

MOST, MOST_LAYERS, MOST_NUMBER = 2**31 - 1, 10_000, 1e30
"""Upper bounds, so that a damaged config.json is refused before memory is allocated."""


class ConfigReader:
    """The keys of one config.json; remembers which were read.

    Args:
      data: the parsed file.
      where: the file, for errors.
    """

    def __init__(self, data: Mapping[str, Any], where: object):
        self._data = data
        self._where = where
        self._used: set[str] = set()
        self._ignored: list[str] = []

    def get(self, key: str, default: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of `key`, or the default where the key is absent or null; raises if it has another type."""
        self._used.add(key)
        value = self._data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.refuse(key, "a key is missing", None, expected, "download config.json again")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(key, "a value of the wrong type", value, expected, "correct config.json")
        return value

    def has(self, key: str) -> bool:
        """Whether the key is present, even as null."""
        return key in self._data

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; without a default, the key must be there."""
        value = self.optional_size(key, _REQUIRED if default is None else default)
        return cast(int, value)

    def optional_size(self, key: str, default: Any = None) -> int | None:
        """A positive whole number, or the default."""
        value = self.get(key, default, int, "a positive whole number")
        most = MOST_LAYERS if key == "num_hidden_layers" else MOST
        if value is not None and not 0 < value <= most:
            expected = f"a whole number from 1 to {most}"
            raise self.refuse(key, "a value out of range", value, expected, "correct config.json")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number, zero included."""
        value = self.get(key, default, int, "a whole number")
        if not 0 <= value <= MOST:
            expected = f"a whole number from 0 to {MOST}"
            raise self.refuse(key, "a value out of range", value, expected, "correct config.json")
        return value

    def layer_types(self) -> list[str] | None:
        """The kind of attention of each layer; None if config.json doesn't list it."""
        kinds = self.get("layer_types", None, list, "a list")
        if kinds is None:
            return None
        known = ("full_attention", "sliding_attention")
        kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]  # the older name
        layers = self.size("num_hidden_layers")
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            expected = f"{' or '.join(known)} for each of the {layers} layers"
            raise self.refuse("layer_types", "an unsupported list", kinds, expected, "correct config.json")
        return kinds

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.get(key, default, (int, float), "a positive number")
        if not 0 < value <= MOST_NUMBER:
            expected = f"a positive number up to {MOST_NUMBER:g}"
            raise self.refuse(key, "a value out of range", value, expected, "correct config.json")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self.get(key, default, bool, "true or false")

    def activation(self, key: str, default: str) -> Activation:
        """The activation function, under our name for it."""
        value = self.get(key, default, str, "a name")
        if value not in _ACTIVATIONS:
            expected = ", ".join(sorted(_ACTIVATIONS))
            hint = _PROSPARSE if value == FATRELU else "use a model with one of these"
            raise self.refuse(key, "an unsupported activation", value, expected, hint)
        return _ACTIVATIONS[value]

    def threshold(self, key: str) -> float:
        """What a pre-activation must exceed: a number, 0 or more; 0 where the key is absent."""
        value = self.get(key, 0.0, (int, float), "a number, zero or more")
        if not 0 <= value <= MOST_NUMBER:
            expected = f"a number from 0 to {MOST_NUMBER:g}"
            raise self.refuse(key, "a value out of range", value, expected, "correct config.json")
        return float(value)

    def ignore(self, key: str) -> None:
        """Marks `key` as read, although it has no effect."""
        self._used.add(key)

    def rope(self, max_positions: int) -> RopeConfig:
        """The rotary embedding, from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
        theta = self.number("rope_theta", 10_000.0)
        read = {
            key: self._rope(key, theta, max_positions)
            for key in ("rope_scaling", "rope_parameters")
            if self.get(key, {}, dict, "an object")
        }
        if len(read) == 2 and read["rope_scaling"] != read["rope_parameters"]:
            old, new = (self._data[key] for key in read)
            hint = "keep one of the two"
            raise self.refuse("rope_scaling", "rope_scaling and rope_parameters disagree", old, new, hint)
        return next(iter(read.values()), RopeConfig(theta=theta))

    def _rope(self, key: str, theta: float, max_positions: int) -> RopeConfig:
        """Reads `rope_scaling` or `rope_parameters`; missing values come from the keys beside it."""
        inner = ConfigReader(self._data[key], f"{self._where} ({key})")
        inner.only("partial_rotary_factor", 1, "only full rotary embedding is supported")
        for name, value in inner._data.items():
            if isinstance(value, Mapping):
                hint = "use a model whose layers share one RoPE"
                raise inner.refuse(name, "separate RoPE settings per layer type", value, None, hint)
        kind = inner._rope_type()
        factors = {
            name: inner.number(name, cast(Any, _REQUIRED))
            for name in ("factor", "low_freq_factor", "high_freq_factor")
            if name in ROPE_KEYS[kind]
        }
        if kind == "llama3":
            beside = self.size(ORIGINAL, inner.size(ORIGINAL, max_positions))  # the outer key overrides
            factors["original_max_positions"] = beside
        theta = inner.number("rope_theta", theta)
        self._ignored += [f"{key}.{name}" for name in inner.ignored()]
        scaling = None if kind == "default" else kind
        return RopeConfig(theta=theta, scaling=cast(Any, scaling), **cast(Any, factors))

    def _rope_type(self) -> str:
        kinds = {self.get(key, None, str, "a name") for key in ("rope_type", "type")} - {None}
        kind = kinds.pop() if len(kinds) == 1 else ("default" if not kinds else f"{sorted(kinds)}")
        if kind not in ROPE_KEYS:
            hint = "use a model with one of these"
            raise self.refuse("rope_type", "an unsupported RoPE", kind, ", ".join(ROPE_KEYS), hint)
        return kind

    def ignored(self) -> tuple[str, ...]:
        """The keys that nothing has read and that deserve a note; null counts as absent."""
        others = self._data.keys() - self._used - HARMLESS
        named = [
            key
            for key in others
            if self._data[key] is not None and self._data[key] not in DEFAULTS.get(key, ())
        ]
        return tuple(sorted([*named, *self._ignored]))

    def unread(self) -> dict[str, Any]:
        """The keys that nothing has read, with their values; null counts as absent."""
        return {
            key: value for key, value in self._data.items() if key not in self._used and value is not None
        }

    def only(self, key: str, value: Any, hint: str) -> None:
        """Raises unless `key` is absent or has the one `value` that polarjax knows."""
        self._used.add(key)
        if self._data.get(key) not in (None, value):
            raise self.refuse(key, "an unsupported value", self._data[key], repr(value), hint)

    def refuse(self, key: str, what: str, got: object, expected: object, hint: str) -> UnsupportedConfigError:
        """The error that names the key and its value."""
        shown = None if got is None else f"{key} = {repr(got)[:100]}"
        what = what if got is not None else f"{what}: {key}"
        return UnsupportedConfigError(what, where=self._where, got=shown, expected=expected, hint=hint)
