"""The sizes of a device mesh, and what one of its devices holds of a model; computed without JAX."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any, Literal, get_args

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.numeric import make_plain, shown, whole_number

Attention = Literal["groups", "sequences"]
"""What the devices of a model axis divide in attention: the groups, or the sequences of the batch."""

DIVIDED = ("groups", "neurons", "vocab")
"""Logical axes of the parameters that the axis `model` divides."""

_EXAMPLE, _WHOLE = "data=1,model=4", "vocab=whole"


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of a mesh's axes.

    Attributes:
      data: devices that the sequences are divided over.
      model: devices that groups, neurons and vocabulary are divided over.
      attention: "groups": each of the `model` devices attends with its own groups; "sequences": with all groups, for
        its own sequences.
      divided: logical axes that the `model` devices divide; the others are whole on each.
    """

    data: int = 1
    model: int = 1
    attention: Attention = "groups"
    divided: tuple[str, ...] = DIVIDED

    def __post_init__(self) -> None:
        make_plain(self, "data", "model")
        for name in ("data", "model"):
            whole_number(getattr(self, name), name, where="mesh")
        if self.attention not in get_args(Attention):
            expected, hint = " | ".join(get_args(Attention)), "leave it out to divide the groups"
            raise InputError(
                "no such way to divide attention",
                where="attention",
                got=shown(self.attention),
                expected=expected,
                hint=hint,
            )

    @classmethod
    def parse(cls, text: str, *, attention: Attention = "groups", where: str = "--mesh") -> "MeshShape":
        """The mesh that "data=2,model=4" describes; an axis that is left out has size 1. "vocab=whole" leaves the
        vocabulary whole on every device."""
        sizes: dict[str, int] = {}
        given = text if isinstance(text, str) else ""  # from Python, where others take a mesh of devices
        parts = [re.sub(r"\s*=\s*", "=", part.strip()) for part in given.split(",")]
        divided = tuple(axis for axis in DIVIDED if axis != "vocab" or _WHOLE not in parts)
        for part in [part for part in parts if part != _WHOLE] or parts:
            found = re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part)
            if found is None or found[1] in sizes:
                raise InputError(
                    "not a mesh",
                    where=where,
                    got=shown(text),
                    expected=f"sizes of the axes data and model, and {_WHOLE} if wanted",
                    hint=f"give for example {_EXAMPLE}",
                )
            sizes[found[1]] = int(found[2])
        return cls(**sizes, attention=attention, divided=divided)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.model

    @property
    def batch_parts(self) -> int:
        """How many devices divide the sequences of a batch in attention."""
        return self.data * (self.model if self.attention == "sequences" else 1)

    def check(self, config: ModelConfig, *, where: str = "mesh", axes: Collection[str] | None = None) -> None:
        """Raises `InputError` unless the `model` axis divides the model's groups, neurons and vocabulary, or of these
        `axes`, those that are divided by default."""
        axes = self.divided if axes is None else axes
        sizes = {
            "groups": ("KV heads (groups)", config.num_kv_heads),
            "neurons": ("neurons", config.d_ff),
            "vocab": ("vocabulary entries", config.vocab_size),
        }
        sizes = {axis: sizes[axis] for axis in sizes if axis in axes}
        for axis, (name, size) in sizes.items():
            if size % self.model:
                usable = [n for n in range(1, 257) if not any(each % n for _, each in sizes.values())]
                whole = _whole_vocab(self.model) if axis == "vocab" else ""
                raise InputError(
                    f"{size:,} {name} can't be divided over the mesh axis model",
                    where=where,
                    got=f"model={self.model}",
                    expected=f"model={' | '.join(map(str, usable))}",
                    hint=f"use one of these sizes, and the axis data for the other devices{whole}",
                )

    def local(self, config: ModelConfig, *, axes: Collection[str] | None = None) -> ModelConfig:
        """The sizes that one device sees: its groups with their queries, its neurons, its part of the vocabulary; or of
        these `axes`, those that are divided by default."""
        axes = self.divided if axes is None else axes
        self.check(config, axes=axes)
        if self.model == 1:
            return config
        fields = {"groups": ("num_heads", "num_kv_heads"), "neurons": ("d_ff",), "vocab": ("vocab_size",)}
        names = [name for axis in axes for name in fields[axis]]
        return dataclasses.replace(config, **{name: getattr(config, name) // self.model for name in names})

    def rows(self, batch_size: Any, *, where: str = "mesh") -> int:
        """Sequences of a batch on one index of the axis `data`; raises `InputError` if they can't be divided evenly."""
        batch_size = whole_number(batch_size, "batch_size", where=where)
        parts = self.batch_parts
        if batch_size % parts:
            raise InputError(
                "the sequences can't be divided evenly over the devices",
                where=where,
                got=f"{batch_size} sequences over {parts} devices",
                expected=f"a multiple of {parts}",
                hint=f"use {-(-batch_size // parts) * parts}",
            )
        return batch_size // self.data


def _whole_vocab(model: int) -> str:
    rules = 'rules={"vocab": None}'
    return f"; or leave the vocabulary whole on each device: {rules}, or --mesh model={model},{_WHOLE}"


ONE_DEVICE = MeshShape()
