"""How a model lies on a mesh: which of its axes are divided over which axis of the mesh."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polarjax.configs import ModelConfig
from polarjax.model.layout_checks import AXES, check_mesh, check_rules, check_sequences
from polarjax.model.mesh_shape import ONE_DEVICE, Attention, MeshShape

RULES: Mapping[str, str | None] = MappingProxyType({"vocab": "model", "neurons": "model", "groups": "model"})
"""Mesh axis of each logical axis of the parameters; axes that aren't named are whole on every device."""

ROUTER_AXES = MappingProxyType(
    {
        "w_in": ("embed", "rank"),
        "w_out": ("rank", "neurons"),
        "w_group": ("embed", "groups"),
        "b_group": ("groups",),
        "mean": ("groups", "embed"),
        "group_in": ("embed", "width"),
        "group_out": ("width", "groups"),
    }
)
"""Logical axes of the arrays of a `LayerRouter`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and how a model lies on it; static and hashable.

    Attributes:
      mesh: devices, with the axis `model` and, if wanted, `data`; its axes may be automatic or explicit.
      rules: mesh axis, "model" or None, of the logical axes vocab, neurons and groups; those left out are as in `RULES`.
      attention: "groups": each device attends with its own groups; "sequences": with all groups, for its own sequences.

    Raises:
      InputError: the mesh has other axes, or a rule can't be followed.
    """

    mesh: Mesh
    rules: Mapping[str, str | None] = RULES
    attention: Attention = "groups"

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        rules = dict(RULES) | check_rules(self.rules)
        divided = tuple(name for name, axis in rules.items() if axis is not None)
        axes = {name: self.mesh.shape.get(name, 1) for name in AXES}
        sizes = MeshShape(**axes, attention=self.attention, divided=divided)
        check_sequences(self.attention, rules)
        object.__setattr__(self, "rules", MappingProxyType(rules))
        object.__setattr__(self, "_sizes", sizes)

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules.items())), self.attention))

    @property
    def sizes(self) -> MeshShape:
        """Sizes of the mesh's axes."""
        return self._sizes

    @property
    def data(self) -> str | None:
        """The mesh axis that sequences are divided over; None if the mesh has none."""
        return "data" if "data" in self.mesh.axis_names else None

    def parts(self, axis: str) -> int:
        """How many parts a logical axis of the parameters is divided into."""
        return self.sizes.model if self.rules.get(axis) else 1

    @property
    def group_parts(self) -> int:
        """How many devices choose among groups of their own; 1 where each chooses among all, for its own sequences."""
        return self.parts("groups") if self.attention == "groups" else 1

    def check(self, config: ModelConfig) -> None:
        """Raises `InputError` unless the mesh divides the model's groups, neurons and vocabulary."""
        self.sizes.check(config)

    def local(self, config: ModelConfig) -> ModelConfig:
        """The sizes that one device computes with: of all groups, where it attends to its own sequences."""
        whole = ("groups",) if self.attention == "sequences" else ()
        return self.sizes.local(config, axes=[name for name in self.sizes.divided if name not in whole])

    def spec(self, axes: tuple[str, ...]) -> PartitionSpec:
        """Where a parameter with these logical axes lies."""
        return PartitionSpec(*(self.rules.get(axis) for axis in axes))

    def router_spec(self, name: str) -> PartitionSpec:
        """Where the array `name` of a `LayerRouter` lies: with its groups or neurons.

        The group routers are whole where attention is divided by sequences, since each device chooses among all groups.
        """
        axes = ROUTER_AXES[name]
        return PartitionSpec() if self.attention == "sequences" and "groups" in axes else self.spec(axes)

    def cache_spec(self) -> PartitionSpec:
        """Where keys and values [B K S H] lie."""
        if self.attention == "sequences":
            return PartitionSpec(tuple(filter(None, (self.data, "model"))))
        return PartitionSpec(self.data, self.rules["groups"])

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of an array that lies like this."""
        return NamedSharding(self.mesh, spec)


def mesh_of(model: Any) -> MeshShape:
    """Sizes of the mesh that a model lies on; of one device, if it has no layout."""
    return ONE_DEVICE if model.layout is None else model.layout.sizes


def axes_of(variable: Any) -> tuple[str, ...]:
    """Logical axes of a parameter in a `Decoder`."""
    return variable.get_metadata("axes")
