"""Keys of config.json that give the weights a meaning the family's class doesn't know."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints_convert.config_reader import FATRELU, ROPE_KEYS, ConfigReader

_ORIGINAL = "use the original weights"


class _Refusal(NamedTuple):
    """Keys that match `pattern` are refused, unless their value is `harmless`."""

    pattern: str
    harmless: Callable[[Any], bool]
    what: str
    hint: str


def _empty(value: Any) -> bool:
    return value in (False, "", "none", 0)


def _whole(value: Any) -> bool:
    return value == 1 and not isinstance(value, bool)


def _tokenizer_only(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(
        str(key).startswith(("AutoModel", "AutoConfig")) for key in value
    )


def _known_rope(value: Any) -> bool:
    kinds = {value.get(key) for key in ("rope_type", "type")} if isinstance(value, Mapping) else set()
    return all(kind is None or kind in ROPE_KEYS for kind in kinds if isinstance(kind, str | None))


_REFUSED = (
    _Refusal(
        r"quanti[sz]|^quant_|_quant$|^compression_config$|^load_in_[48]bit$|^(w|weight_)?bits$",
        _empty,
        "quantized weights",
        f"quantized checkpoints are unsupported; {_ORIGINAL}",
    ),
    _Refusal(
        r"^auto_map$",
        _tokenizer_only,
        "a model with its own code, which polarjax never runs",
        "use a model that transformers loads without trust_remote_code; if its code computes the same, remove "
        "auto_map from config.json",
    ),
    _Refusal(
        r"^hidden_act_param$|(act|relu)\w*_threshold$|^threshold_\w*(act|relu)",
        _empty,
        "an activation with a threshold",
        "if these are the weights of a ProSparse model, set model_type to sparsellama",
    ),
    _Refusal(
        r"^(hidden_act|activation_function)$",
        lambda value: value != FATRELU,
        "an activation with a threshold",
        "if these are the weights of a ProSparse model, set model_type to sparsellama",
    ),
    _Refusal(
        r"^(partial_rotary|rotary|rope)_(factor|pct|percent|percentage|fraction|ratio)$|^rotary_emb_fraction$",
        _whole,
        "an unsupported value",
        "only full rotary embedding is supported",
    ),
    _Refusal(
        r"^configuration_files$",
        lambda value: not value,
        "another file for some versions of transformers",
        "rename the file that is meant to config.json and remove this key",
    ),
    _Refusal(r"^rope_(scaling|parameters)$", _known_rope, "an unsupported RoPE", "use a model without it"),
)


def check_weights_are_plain(reader: ConfigReader) -> None:
    """Raises `UnsupportedConfigError` for a key that the family didn't read and that changes what the weights mean."""
    unread = reader.unread()
    for key in sorted(unread):
        for each in _REFUSED:
            if re.search(each.pattern, key) and not each.harmless(unread[key]):
                raise reader.refuse(key, each.what, unread[key], None, each.hint)
