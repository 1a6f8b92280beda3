"""The README's table of what is supported, found out by asking the code.

    python -m tests.convert.support

writes it into README.md, between its two marks.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.hf_config import interpret
from checkpoints_convert.weights_io import INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE
from polarjax.cli.inspect import supported
from polarjax.configs import ModelConfig
from polarjax.errors import UnsupportedConfigError
from polarjax.types import DTYPES

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- support, made by python -m tests.convert.support -->"
END = "<!-- end of support -->"

_SIZES = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_MORE = {"ffn_dim": 8}, {"intermediate_size": 8, "num_key_value_heads": 4}  # of OPT and of the others
_WINDOW = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, **_LLAMA3},
}
_REFUSED: dict[str, dict[str, Any]] = {
    "quantized checkpoints": {"quantization_config": {"bits": 4}, "quantization": {"bits": 4}},
    **{
        f"{kind} RoPE": {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
        for kind in ("yarn", "longrope", "dynamic")
    },
    "partial rotary embedding": {"partial_rotary_factor": 0.5},
    "models with code of their own (`auto_map`, but ProSparse's)": {"auto_map": {"AutoModel": "own.Model"}},
}
_NAMES = ("relu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "fatrelu")


def read(family: str, **changes: Any) -> ModelConfig | None:
    """The config of a family with these keys; None where it is refused."""
    known = _SIZES | _MORE[family != "opt"]
    reader = ConfigReader(known | changes, "config.json")
    try:
        config = interpret(FAMILIES[family], reader)
    except UnsupportedConfigError:
        return None
    return config


def row(family: str) -> list[str]:
    """One line of the table."""
    plain = read(family)
    if plain is None:
        raise AssertionError(f"the plain config of {family} is refused")
    act = "activation_function" if family == "opt" else "hidden_act"
    found = {name: config for name in _NAMES if (config := read(family, **{act: name}, **more(name)))}
    exact = [name for name, config in found.items() if "neurons" in skippable(config)]
    listed = ["full_attention", "sliding_attention"] * 2 if family == "ministral" else None
    windows = read(family, **_WINDOW, layer_types=listed)
    ropes = [kind for kind, more in _ROPES.items() if read(family, rope_scaling={"rope_type": kind, **more})]
    queries = [kind for kind, heads in (("MHA", 4), ("GQA", 2), ("MQA", 1)) if grouped(family, heads)]
    heads = [
        name for name, tied in (("tied", True), ("own", False)) if read(family, tie_word_embeddings=tied)
    ]
    skips = {name for kv in (4, 2) if (one := grouped(family, kv)) for name in skippable(one)}
    neurons = f"yes, with {' or '.join(exact)}" if exact else "no"
    return [
        f"`{family}`",
        FAMILIES[family].covers,
        ", ".join(queries),
        positions(plain, ropes),
        window(windows),
        ", ".join(heads),
        ", ".join(found) + (" (gated)" if plain.gated_mlp else ""),
        " or ".join(name for name in ("heads", "groups") if name in skips),
        neurons,
    ]


def more(activation: str) -> dict[str, Any]:
    """The keys that go with an activation's name."""
    return {"hidden_act_param": 0.01} if activation == "fatrelu" else {}


def grouped(family: str, kv_heads: int) -> ModelConfig | None:
    """The config with so many KV heads of 4, if the family has it."""
    config = read(family, num_key_value_heads=kv_heads) or read(family)
    return config if config is not None and config.num_kv_heads == kv_heads else None


def skippable(config: ModelConfig) -> set[str]:
    """What can be left out of a model, in the words of `polarjax inspect`."""
    return {name for name, why in supported(config).items() if why is None}


def positions(config: ModelConfig, ropes: Iterable[str]) -> str:
    """How positions are told."""
    return "learned" if config.positions == "learned" else f"RoPE: {', '.join(ropes)}"


def window(config: ModelConfig | None) -> str:
    """Whether attention can be cut off, and whether that can differ by layer."""
    if config is None or config.sliding_window is None:
        return "no"
    return "yes, by layer" if isinstance(config.sliding_window, tuple) else "yes"


def matrix() -> str:
    """The block of the README."""
    header = (
        "`model_type`", "models", "queries", "positions", "sliding window", "head", "activation",
        "skips attention", "skips neurons",
    )  # fmt: skip
    table = [list(header), ["---"] * len(header), *(row(family) for family in FAMILIES)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines += [
        "",
        f"Weights: `{SINGLE}`, or shards with `{INDEX}`; with the extra `torch` also",
        f"`{TORCH_SINGLE}`, or shards with `{TORCH_INDEX}`. Of {', '.join(DTYPES)}.",
        f"Refused by name: {', '.join(refused())}.",
    ]
    return "\n".join(lines)


def refused() -> list[str]:
    """What no family takes, but the code that a family stands for."""
    return [
        name
        for name, keys in _REFUSED.items()
        if all(
            read(family, **{key: value}) is None
            for family, rules in FAMILIES.items()
            for key, value in keys.items()
            if not (key == "auto_map" and rules.own_code)
        )
    ]


def block(text: str) -> str:
    """What the README says between its marks."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Writes the block into the README."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{matrix()}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
