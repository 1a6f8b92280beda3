"""What the tuner needs to tune the selective MLP: operands, candidates, how to run one and how to check its result."""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _device
from pallas_kernels.autotune import measure
from pallas_kernels.sparse_mlp import choice, reference
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic
from pallas_kernels.sparse_mlp.tiles import BATCHES, Tiles, candidates

SIZES = ("batch", "d_model", "neurons", "selected")


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """One call.

    Attributes:
      batch, d_model, neurons, selected: B, D, F and k.
      gated: SiLU with a gate; False: ReLU with a bias. Neither the activation nor its threshold changes the tiles.
      dtype: "bfloat16" or "float16".
      device: the device to measure it on.
    """

    batch: int
    d_model: int
    neurons: int
    selected: int
    gated: bool
    dtype: str
    device: _device.Device
    op = choice.OP

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in SIZES) < 1:
            sizes = ", ".join(f"{name} {getattr(self, name)}" for name in SIZES)
            raise ValueError(f"every size must be positive; got {sizes}")
        if self.batch > BATCHES[-1]:
            raise ValueError(
                f"batch must be at most {BATCHES[-1]}, larger ones run in pieces; got {self.batch}"
            )
        if self.selected > self.neurons:
            raise ValueError(
                f"selected must be at most neurons; got {self.selected}, expected 1..{self.neurons}"
            )
        if self.d_model % 128:
            raise NotImplementedError(f"needs a model width that is a multiple of 128; got {self.d_model}")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for name in SIZES:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, required=True)
        parser.add_argument("--gated", action="store_true", help="with a gate, as in LLaMA")

    @classmethod
    def of(cls, args: argparse.Namespace, device: _device.Device) -> "Mlp":
        """The call that the arguments describe; raises NotImplementedError or ValueError if the kernel cannot do it."""
        sizes = {name: getattr(args, name) for name in SIZES}
        return cls(**sizes, gated=args.gated, dtype=args.dtype, device=device)

    @property
    def shapes(self) -> dict[str, int]:
        return choice.shapes(self.batch, self.d_model, selected=self.selected, gated=self.gated)

    def stored(self, tiles: Tiles) -> dict[str, int]:
        return choice.stored(tiles)

    def candidates(self) -> list[Tiles]:
        """The heuristic's configuration first, then the others worth measuring."""
        return candidates(self.batch, self.d_model, self.device, selected=self.selected, gated=self.gated)

    @property
    def _activation(self) -> str:
        return "silu" if self.gated else "relu"

    @cached_property
    def weights(self) -> dict[str, jax.Array]:
        """Random weights, scaled so that results are no larger than inputs of order one."""
        keys, shape = iter(jax.random.split(jax.random.key(1), 3)), (self.neurons, self.d_model)

        def normal(shape: tuple[int, ...], scale: float) -> jax.Array:
            return jax.random.normal(next(keys), shape, self.dtype) * jnp.asarray(scale, self.dtype)

        made = {
            "w_up": normal(shape, self.d_model**-0.5),
            "w_down": normal(shape, (2 / self.selected) ** 0.5),
        }
        if self.gated:
            return made | {"w_gate": normal(shape, self.d_model**-0.5)}
        return made | {"b_up": normal(shape[:1], 0.1)}

    @cached_property
    def operands(self) -> tuple[jax.Array, list[tuple[jax.Array]]]:
        """x, and enough sorted selections that calls rotating through them miss the L2 cache; disjoint if possible."""
        rows = 3 if self.gated else 2
        count = measure.sets_needed(2 * rows * self.selected * self.d_model)
        rng, starts = np.random.default_rng(0), range(0, self.neurons - self.selected + 1, self.selected)
        pieces: list[np.ndarray] = []
        while len(pieces) < count:
            order = rng.permutation(self.neurons).astype(np.int32)
            pieces += [np.sort(order[first : first + self.selected]) for first in starts]
        x = jax.random.normal(jax.random.key(0), (self.batch, self.d_model), self.dtype)
        return x, [(jnp.asarray(piece),) for piece in pieces[:count]]

    @cached_property
    def want(self) -> np.ndarray:
        """The expected result of the first call."""
        x, sets = self.operands
        oracle = jax.jit(functools.partial(reference.reference, activation=self._activation))
        return np.asarray(oracle(x=x, index=sets[0][0], **self.weights), np.float64)

    def run(self, tiles: Tiles) -> Callable[[], Any]:
        options = {"activation": self._activation, "device": self.device, "tiles": tiles}
        x, sets = self.operands

        def call(x: jax.Array, index: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
            return mosaic.sparse_mlp(x, index=index, **weights, **options)

        return measure.chained(call, x, [(*one, self.weights) for one in sets])

    def right(self, results: Any) -> bool:
        return measure.near(results[0], self.want)
