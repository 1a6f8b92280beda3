"""Rules from HuggingFace tensors to parameters, and the check that every tensor is used exactly once.

A rule's layout is written in the project's letters, for example `(K G H) D -> D K G H`: how the axes of the
source tensor split, and the order of ours. Ours are always a rotation of the source's, so export can invert a layout.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.tensor_names import HEAD, ROTARY_BUFFERS, check_tensors, not_needed, some
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError
from polarjax.model.shapes import shapes

_ROWS = 128  # per block that is transposed at once, so that it stays in cache
_PAD = 32  # elements of padding per row, so that the rows of a power-of-two width don't share cache sets


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a source tensor and of the parameter it becomes.

    Attributes:
      source: letters of each source axis, for example `("KGH", "D")`.
      target: letters of the parameter's axes, a rotation of the source's, for example `"DKGH"`.
    """

    source: tuple[str, ...]
    target: str

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Reads `"(K G H) D -> D K G H"`."""
        left, _, right = text.partition("->")
        groups = re.findall(r"\(([^)]*)\)|(\S)", left)
        layout = cls(tuple((many or one).replace(" ", "") for many, one in groups), right.replace(" ", ""))
        if "".join(layout.source[layout.turn :] + layout.source[: layout.turn]) != layout.target:
            raise ValueError(f"not a rotation of whole axes: {text}")
        return layout

    @property
    def turn(self) -> int:
        """How many source axes move to the end: 1 is a transpose, 0 keeps the order."""
        return next((i for i, axis in enumerate(self.source) if axis[0] == self.target[0]), 0)

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the source tensor, given the size of each letter."""
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.source)

    def place(self, rows: np.ndarray, start: int, out: np.ndarray) -> None:
        """Copies rows of the source matrix, starting at row `start`, into the parameter's memory `out` [size]."""
        rows, out = _bits(rows), _bits(out)
        if self.turn:
            _transpose(rows, out.reshape(rows.shape[1], -1)[:, start : start + len(rows)])
        else:
            out.reshape(-1, rows.shape[1])[start : start + len(rows)] = rows

    def to_source(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The source tensor of `shape` from the parameter."""
        return transposed(array.reshape(shape[::-1])) if self.turn else array.reshape(shape)


def transposed(array: np.ndarray) -> np.ndarray:
    """The transpose of a matrix as a contiguous copy."""
    out = np.empty(array.shape[::-1], array.dtype)
    _transpose(_bits(array), _bits(out))
    return out


def _transpose(array: np.ndarray, out: np.ndarray) -> None:
    """Writes the transpose of a matrix in blocks, several times faster than NumPy's copy."""
    rows, columns = array.shape
    block = np.empty((min(_ROWS, rows), columns + _PAD), array.dtype)[:, :columns]
    for row in range(0, rows, _ROWS):
        part = block[: rows - row]
        part[:] = array[row : row + _ROWS]
        out[:, row : row + _ROWS] = part.T


def _bits(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers, which NumPy copies faster than dtypes like bfloat16."""
    return array.view(f"u{array.itemsize}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which source tensor becomes which parameter; `{i}` in both names stands for the layer."""

    source: str
    target: str
    layout: Layout


def rules(table: str, *, source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Reads a table with the columns source name, parameter name and layout; the prefixes are prepended to the names."""
    rows = [line.split(None, 2) for line in table.strip().splitlines()]
    return tuple(Rule(source + row[0], target + row[1], Layout.parse(row[2])) for row in rows)


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything we need to know about one HuggingFace `model_type`.

    Attributes:
      model_type: its name in config.json.
      architecture: its class in transformers.
      covers: a few words on the published models with this type.
      read_config: makes the configuration from the keys of config.json.
      write_config: the inverse of `read_config`, if the family can express the configuration.
      rules: for every parameter that any model of the family has; unused ones are skipped.
      prefixes: pairs of a prefix that names may have on disk and its replacement in `rules`.
      buffers: pattern of computed tensors to skip, besides those of rotary embeddings.
      own_code: whether its models ship with their own code, which this family replaces.
    """

    model_type: str
    architecture: str
    covers: str
    read_config: Callable[[ConfigReader], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rules: tuple[Rule, ...]
    prefixes: tuple[tuple[str, str], ...]
    buffers: re.Pattern[str] | None = None
    own_code: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One tensor: from `source` (its name on disk) to the parameter `target` of `shape`."""

    source: str
    target: str
    shape: tuple[int, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion does.

    Attributes:
      steps: every parameter exactly once, from every source tensor that isn't skipped.
      equal: pairs of source tensors that must hold the same values (an explicit head of a tied model).
      skipped: source tensors that can be computed from the config.
      left_out: other source tensors that the language model does not need, such as a value head.
    """

    steps: tuple[Step, ...]
    equal: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...]
    left_out: tuple[str, ...]


HEAD_TARGET, TABLE_TARGET = "head.w", "embed.tokens"


def letter_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of a layout."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "E": config.embed_dim or config.d_model,
        "F": config.d_ff,
        "K": config.num_kv_heads,
        "G": config.q_per_group,
        "H": config.head_dim,
        "P": config.max_positions + config.position_offset,
    }


def expected_tensors(family: Family, config: ModelConfig) -> dict[str, Step]:
    """The steps that fill every parameter of `config`, keyed by source name in the rules.

    Raises:
      CheckpointError: the rules miss a parameter or fill one twice (a bug in the table).
    """
    wanted = shapes(config)
    steps = {step.source: step for step in _expand(family.rules, config.num_layers, wanted)}
    filled = sorted(step.target for step in steps.values())
    if filled != sorted(wanted):
        wrong = sorted({*wanted} ^ {*filled}) or [name for name in filled if filled.count(name) > 1]
        raise CheckpointError(f"the rules of {family.model_type} do not fit the config", got=some(wrong))
    return steps


def _expand(table: Sequence[Rule], layers: int, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[Step]:
    for rule in table:
        for i in range(layers) if "{i}" in rule.source else (0,):
            target = rule.target.format(i=i)
            if target in wanted:
                yield Step(rule.source.format(i=i), target, wanted[target], rule.layout)


def make_plan(
    family: Family, config: ModelConfig, found: Mapping[str, tuple[int, ...]], *, where: object
) -> ConversionPlan:
    """Matches the tensors of a checkpoint with the parameters of its config.

    A tied checkpoint may hold the embeddings, the head or both.

    Args:
      family: the rules to apply.
      config: the model's configuration.
      found: shape of every tensor of the checkpoint, by its name on disk.
      where: the checkpoint, for the message.

    Raises:
      CheckpointError: tensors are missing, unknown, duplicated or mis-shaped; one message lists them all.
    """
    expected = expected_tensors(family, config)
    names, doubled = _canonical(family, found)
    table = next(name for name, step in expected.items() if step.target == TABLE_TARGET)
    if config.tie_embeddings and table not in names and HEAD in names:
        names[table] = names.pop(HEAD)
    spare_head = config.tie_embeddings and HEAD in names
    skipped = {name for name in names if name not in expected and is_buffer(family, name)}
    missing = sorted(expected.keys() - names.keys())
    unknown = names.keys() - expected.keys() - skipped - {HEAD if spare_head else ""}
    left_out = not_needed(unknown, complete=not missing, head=HEAD in found)
    faults = {
        "missing": missing,
        "unknown": sorted(names[name] for name in unknown - left_out),
        "duplicated under another name": doubled,
        "of the wrong shape": _misshaped(expected, names, found, letter_sizes(config)),
    }
    check_tensors(where, found, faults, lambda name: _with_prefix(family, name))
    steps = tuple(dataclasses.replace(step, source=names[name]) for name, step in expected.items())
    equal = ((names[HEAD], names[table]),) if spare_head else ()
    skipped, left_out = (tuple(sorted(names[name] for name in each)) for each in (skipped, left_out))
    return ConversionPlan(steps, equal, skipped, left_out)


def is_buffer(family: Family, name: str) -> bool:
    """Whether a tensor can be computed from the config, so that skipping it loses nothing."""
    return bool(re.search(ROTARY_BUFFERS, name) or (family.buffers and family.buffers.search(name)))


def _misshaped(
    expected: Mapping[str, Step],
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
) -> list[str]:
    right = {name: step.layout.source_shape(sizes) for name, step in expected.items() if name in names}
    return [
        f"{names[name]} {list(found[names[name]])} instead of {list(shape)}"
        for name, shape in sorted(right.items())
        if tuple(found[names[name]]) != shape
    ]


def _canonical(family: Family, found: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """Names on disk, keyed by name in the rules; and the names on disk that map to the same one."""
    names: dict[str, str] = {}
    doubled = []
    for name in sorted(found):
        key = _with_prefix(family, name)
        if key in names:
            doubled += [names[key], name]
        names[key] = name
    return names, sorted(set(doubled))


def _with_prefix(family: Family, name: str) -> str:
    for found, meant in family.prefixes:
        if name.startswith(found):
            return meant + name.removeprefix(found)
    return name
