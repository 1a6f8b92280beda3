"""What a run of tuning starts from: its arrays and where they are, its compiled step, and the memory it takes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from polarjax.memory import held_bytes, memory_limit, planned_memory, tree_bytes
from polarjax.model.decoder import Decoder
from polarjax.model.parameters import parameters
from polarjax.model.stacked import stacked_parameters
from polarjax.selection.masking import StackedRouters
from polarjax.selection.routers import LayerRouter, Routers, hidden_layer
from polarjax.sparsity.distillation import Arrays, Distillation, TuneState, start, step
from polarjax.sparsity.tune_options import Subset, TuneOptions

_GROUP_FIELDS = ("w_group", "b_group", "mean", "group_in", "group_out")
_SMALLER: tuple[Subset, ...] = ("attention", "out", "bias", "routers")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run's arrays are: the rows of a batch are divided over the devices, everything else is on all of them."""

    devices: tuple[Any, ...]

    @property
    def whole(self) -> Sharding:
        """Where arrays lie that every device has."""
        return self._sharding()

    def rows(self, axis: int) -> Sharding:
        """Where an array lies whose `axis` is the batch."""
        return self._sharding(*[None] * axis, "batch")

    def _sharding(self, *axes: str | None) -> Sharding:
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(Mesh(np.asarray(self.devices), ("batch",)), PartitionSpec(*axes))


def distillation(model: Decoder, routers: Routers, options: TuneOptions) -> Distillation:
    """What a step computes, for this model and these options."""
    config = model.config
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    activation = options.activation or config.activation
    return Distillation(
        dataclasses.replace(config, activation=activation),
        config,
        importance=routers.importance,
        dtype=jnp.dtype(dtype),
        router_weight=options.router_weight,
        l1=options.l1,
        remat=options.remat,
        clip=options.clip,
    )


def initial(spec: Distillation, train: Subset, flat: Arrays, routers: Arrays) -> tuple[TuneState, Arrays]:
    """The state before the first step, and the teacher: the parameters `flat`, stacked, in the computing dtype."""
    masters, teacher = {}, {}
    for name, value in stacked_parameters(flat):
        if trained_names([name], train):
            masters[name] = jnp.array(value, jnp.float32)
        teacher[name] = value.astype(spec.dtype)
    return start(spec, masters, jax.tree.map(jnp.array, routers)), teacher


def trained_names(names: Sequence[str], subset: Subset) -> list[str]:
    """Which of the stacked parameters `names` a subset trains."""
    last = lambda name: name.rsplit(".", 1)[1]
    chosen = {
        "all": lambda name: True,
        "attention": lambda name: name.startswith("layers.attn."),
        "out": lambda name: name in ("layers.attn.wo", "layers.attn.bo"),
        "bias": lambda name: last(name) in ("bias", "scale") or last(name).startswith("b"),
        "routers": lambda name: False,
    }[subset]
    return [name for name in names if chosen(name)]


def group_arrays(routers: Routers, width: int = 0) -> Arrays:
    """The group routers' arrays [L ...], float32; with a hidden layer of `width` units, which adds nothing yet, where
    they have none."""
    only = tuple(dataclasses.replace(layer, w_in=None, w_out=None) for layer in routers.layers)
    stacked: LayerRouter = StackedRouters.of(Routers(only)).layers
    found = {name: getattr(stacked, name) for name in _GROUP_FIELDS}
    arrays = {name: jnp.array(value, jnp.float32) for name, value in found.items() if value is not None}
    if width and "group_in" not in arrays:
        arrays |= hidden_layer(jax.random.key(0), width, arrays["w_group"].shape)
    return arrays


def router_shardings(model: Decoder, router: LayerRouter) -> dict[str, Sharding]:
    """Where each array of a layer's group router lies, or would."""
    if model.layout is None:
        return dict.fromkeys(_GROUP_FIELDS, router.w_group.sharding)
    return {name: model.layout.sharding(model.layout.router_spec(name)) for name in _GROUP_FIELDS}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A step that may be run: everything about it that is known before any of its arrays is made.

    Attributes:
      spec: what the step computes.
      options: the run's options.
      flat: the model's parameters by dotted path.
      routers: the group routers' arrays [L ...].
      length: T, tokens of a window.
      placement: the devices.
    """

    spec: Distillation
    options: TuneOptions
    flat: Arrays
    routers: Arrays
    length: int
    placement: Placement

    @functools.cached_property
    def abstract(self) -> tuple[TuneState, Arrays]:
        """Shapes and dtypes of the state and the teacher."""
        return jax.eval_shape(
            functools.partial(initial, self.spec, self.options.train), self.flat, self.routers
        )

    @functools.cached_property
    def made(self) -> int:
        """Bytes of the arrays that the run makes; the teacher's that are the model's own don't count."""
        state, teacher = self.abstract
        same = {
            name for name in teacher.keys() & self.flat.keys() if self.flat[name].dtype == self.spec.dtype
        }
        return tree_bytes(state, [value for name, value in teacher.items() if name not in same])

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled step: (state, teacher, tokens, counts, rates) -> (state, parts of the loss)."""
        whole, options = self.placement.whole, self.options
        at = lambda sharding, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        everywhere = jax.tree.map(functools.partial(at, whole), self.abstract)
        a, b, layers = options.accumulate, options.batch_size, self.spec.config.num_layers
        tokens = jax.ShapeDtypeStruct((a, b, self.length), jnp.int32, sharding=self.placement.rows(1))
        counts = jax.ShapeDtypeStruct((a, layers, b), jnp.int32, sharding=self.placement.rows(2))
        rates = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=whole)
        return _jitted(self.spec, whole).lower(*everywhere, tokens, counts, rates).compile()

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        """Bytes that the run needs on each device, as the compiler planned them."""
        return planned_memory(self.compiled, made=self.made)

    def arrays(self) -> tuple[TuneState, Arrays]:
        """The state before the first step, and the teacher, on the devices."""
        return jax.device_put(
            initial(self.spec, self.options.train, self.flat, self.routers), self.placement.whole
        )

    def smaller(self) -> Iterator["Setup"]:
        """Runs that need less memory, the most similar ones first."""
        options, devices = self.options, len(self.placement.devices)
        batch, accumulate = options.batch_size, options.accumulate
        while batch % (2 * devices) == 0:
            batch, accumulate = batch // 2, accumulate * 2
            less = dataclasses.replace(options, batch_size=batch, accumulate=accumulate)
            yield dataclasses.replace(self, options=less)
        for train in _SMALLER[_SMALLER.index(options.train) + 1 if options.train in _SMALLER else 0 :]:
            yield dataclasses.replace(self, options=dataclasses.replace(options, train=train))

    @property
    def least(self) -> int:
        """Bytes that the run needs on each device at least: its arrays, gradients, tokens and the layers' inputs."""
        config, options = self.spec.config, self.options
        tokens = options.batch_size * self.length // len(self.placement.devices)
        inputs = config.num_layers * config.d_model * self.spec.dtype.itemsize
        batch = tokens * (4 * options.accumulate + inputs)
        return held_bytes() + self.made + tree_bytes(self.abstract[0].model) + batch

    def fits(self) -> bool:
        """Whether the device has the memory; compiles only if the arrays, gradients and a batch alone leave room."""
        limit = memory_limit()
        return limit is None or (self.least <= limit and self.memory["total"] <= limit)


@functools.cache
def _jitted(spec: Distillation, whole: Sharding) -> Any:
    return jax.jit(functools.partial(step, spec), donate_argnums=0, out_shardings=whole)


def setup(model: Decoder, routers: Routers, options: TuneOptions, length: int, devices: int) -> Setup:
    """The setup of a run on windows of `length` tokens and on so many local devices."""
    mine = sorted(model.embed.tokens[...].devices(), key=lambda device: device.id)
    others = [device for device in jax.local_devices() if device not in mine]
    placement = Placement(tuple([*mine, *others][:devices]))
    spec = distillation(model, routers, options)
    return Setup(
        spec, options, parameters(model), group_arrays(routers, options.router_width), length, placement
    )


def blended(trained: Arrays, model: Decoder, share: float) -> Arrays:
    """The weights that lie `share` of the way from the model's to the trained ones."""
    found = dict(trained)
    for name, first in stacked_parameters(parameters(model)) if share < 1 else ():
        if name in trained:
            first = jax.device_put(first, trained[name].sharding).astype(jnp.float32)
            found[name] = first + share * (trained[name] - first)
    return found
