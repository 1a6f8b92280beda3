"""Tiny models, one for every kind of decoder, with no parameter left at its trivial value."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.model.taps import Taps, TapSpec
from polarjax.selection.routers import Routers, init_routers
from polarjax.selection.selectors import Static

VOCAB = 61
POSITIONS = 48
WIDTH = 14

_LLAMA = pj.ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=24,
    d_ff=40,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_positions=POSITIONS,
    rope=pj.RopeConfig(),
)
_OPT = dataclasses.replace(
    _LLAMA,
    norm="layer",
    norm_bias=True,
    activation="relu",
    gated_mlp=False,
    mlp_bias=True,
    qkv_bias=True,
    out_bias=True,
    positions="learned",
    position_offset=2,
    rope=None,
    tie_embeddings=True,
)
_LLAMA3 = pj.RopeConfig(
    theta=500.0, scaling="llama3", factor=4.0, high_freq_factor=3.0, original_max_positions=12
)

# Of the kinds that differ within a layer only, one layer: each more is compiled again in every program.
CONFIGS: dict[str, pj.ModelConfig] = {
    "opt": _OPT,
    "opt-350m": dataclasses.replace(_OPT, num_layers=1, norm_position="post", final_norm=False, embed_dim=16),
    "llama-mha": _LLAMA,
    "llama-gqa": dataclasses.replace(_LLAMA, num_kv_heads=2, rope=_LLAMA3),
    "llama-mqa": dataclasses.replace(_LLAMA, num_layers=1, num_kv_heads=1, tie_embeddings=True),
    "fatrelu-gated": dataclasses.replace(
        _LLAMA, num_kv_heads=2, activation="relu", activation_threshold=0.02, mlp_bias=True
    ),
    "qkv-bias": dataclasses.replace(
        _LLAMA, num_layers=1, num_kv_heads=2, qkv_bias=True, rope=pj.RopeConfig(scaling="linear", factor=3.0)
    ),
    "qk-norm": dataclasses.replace(_LLAMA, num_layers=1, num_kv_heads=2, qk_norm=True, head_dim=10),
    "window": dataclasses.replace(_LLAMA, num_kv_heads=2, sliding_window=(3, None), activation="gelu"),
}
DTYPES = ("float32", "bfloat16")
WIDE_ROUTERS = ("llama-gqa", "opt-350m", "fatrelu-gated")
RELU = tuple(name for name, config in CONFIGS.items() if config.neuron_sparsity)

# Most of the tests' time is compilation, and each program runs a few times only.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
prefill = jit(pj.prefill)
_decode_step = jit(pj.decode_step)
_forward = jit(functools.partial(pj.forward, taps=TapSpec()))


def forward(
    model: pj.Decoder, tokens, lengths, *, sparsity: pj.Sparsity | None = None
) -> tuple[jax.Array, Taps]:
    """Logits and all taps, always at width `WIDTH`, so that a model is compiled once for all tests."""
    tokens = jnp.pad(tokens, ((0, 0), (0, WIDTH - tokens.shape[1])))
    return _forward(model, tokens, lengths, sparsity=sparsity)


def decode_step(
    model: pj.Decoder, token, cache: pj.KVCache, *, sparsity: pj.Sparsity | None = None
) -> tuple[jax.Array, pj.KVCache]:
    """As `pj.decode_step`, compiled; naming `sparsity` in every call makes dense calls share one program."""
    return _decode_step(model, token, cache, sparsity=sparsity)


@functools.cache
def model(name: str, dtype: str = "float32") -> pj.Decoder:
    """The decoder of `CONFIGS[name]`; the bfloat16 one is the float32 one, rounded."""
    random = np.random.default_rng(1)
    shapes = parameters(abstract(CONFIGS[name]))
    made = {path: _draw(random, path, shape.shape) for path, shape in shapes.items()}
    return with_parameters(CONFIGS[name], {path: on_device(value, dtype) for path, value in made.items()})


def on_device(value: np.ndarray, dtype: str = "float32") -> jax.Array:
    """The array rounded to float32, then to `dtype`, by NumPy: `jnp.asarray` compiles a program for every shape."""
    return jax.device_put(np.asarray(value).astype("float32").astype(dtype))


def shortened(name: str, positions: int) -> pj.Decoder:
    """The model of `CONFIGS[name]` with fewer positions, else the same."""
    config = dataclasses.replace(CONFIGS[name], max_positions=positions)
    expected = parameters(abstract(config))
    flat = {path: value[: expected[path].shape[0]] for path, value in parameters(model(name)).items()}
    return with_parameters(config, flat)


def _draw(random: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = random.normal(size=shape)
    kind = path.rsplit(".", 1)[1]
    if kind == "scale":
        return 1 + 0.1 * noise
    if kind.startswith("b"):
        return 0.1 * noise
    return noise * _LLAMA.d_model**-0.5


@functools.cache
def batch(rows: int = 3, width: int = 9, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Random prompts [rows width] and their lengths, which differ; the first row is full, the last has one."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (rows, width))
    lengths = np.linspace(width, 1, rows).round() if rows > 1 else np.array([width])
    return jax.device_put((tokens.astype("int32"), lengths.astype("int32")))


def empty_cache(model: pj.Decoder, batch_size: int, capacity: int = 24) -> pj.KVCache:
    """A cache without a position filled."""
    return pj.init_cache(model.config, batch_size=batch_size, capacity=capacity, dtype=model.dtype)


def everything(config: pj.ModelConfig) -> pj.SparsityPlan:
    """Density 1.0: all neurons and all groups of every layer, by index."""
    layers = config.num_layers
    return pj.SparsityPlan((config.d_ff,) * layers, (config.num_kv_heads,) * layers)


@functools.cache
def routers(name: str, dtype: str = "float32") -> Routers:
    """Untrained routers that tell neurons and groups apart by chance; with a hidden layer for a model of each kind."""
    random = np.random.default_rng(2)
    draw = lambda leaf: on_device(random.normal(size=leaf.shape) * leaf.shape[0] ** -0.5, dtype)
    make = functools.partial(init_routers, CONFIGS[name], neurons=True, width=3 * (name in WIDE_ROUTERS))
    return jax.tree.map(draw, jax.eval_shape(make, jax.random.key(0)))


@functools.cache
def static(name: str) -> Static:
    """The same arbitrary selection for every token."""
    config, random = CONFIGS[name], np.random.default_rng(4)
    groups = random.uniform(size=(config.num_layers, config.num_kv_heads))
    neurons = random.uniform(size=(config.num_layers, config.d_ff))
    return Static(on_device(groups), on_device(neurons))


def half(config: pj.ModelConfig) -> pj.SparsityPlan:
    """Half of all neurons and groups in every layer."""
    layers = config.num_layers
    return pj.SparsityPlan((config.d_ff // 2,) * layers, (max(1, config.num_kv_heads // 2),) * layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerRow:
    """A selector with fixed scores: groups [L B K] that differ between the sequences, neurons [L F]."""

    groups: jax.Array
    neurons: jax.Array

    def group_scores(self, layer, x, *, norms=None):
        """One row of scores for each sequence."""
        return self.groups[layer]

    def neuron_scores(self, layer, x, *, activity=None):
        """The same scores for all."""
        return jnp.broadcast_to(self.neurons[layer][None], (x.shape[0], self.neurons.shape[1]))

    def check(self, config):
        """Fits the tests."""


@functools.cache
def per_row(name: str, rows: int = 3) -> pj.Sparsity:
    """Half of all neurons and groups, the groups different in each of the rows, whatever the tokens."""
    config, random = CONFIGS[name], np.random.default_rng(5)
    groups = random.uniform(size=(config.num_layers, rows, config.num_kv_heads))
    neurons = random.uniform(size=(config.num_layers, config.d_ff))
    return pj.Sparsity(PerRow(on_device(groups), on_device(neurons)), half(config))


def with_parameter(model: pj.Decoder, name: str, value: jax.Array) -> pj.Decoder:
    """The model with another value of one parameter."""
    return with_parameters(model.config, parameters(model) | {name: value})


def with_rows(model: pj.Decoder, name: str, rows, value: float) -> pj.Decoder:
    """The model with `value` written into rows of the parameter `name`."""
    new = np.array(parameters(model)[name])
    new[rows] = value
    return with_parameter(model, name, jax.device_put(new))
