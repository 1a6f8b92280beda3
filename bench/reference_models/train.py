"""Trains a bundled model: AdamW in float32 over bfloat16 compute, warm-up, constant rate, linear decay to zero.

The token streams stay on the device, a batch depends on the step number alone, and one jitted call runs many steps. The
same `--steps` and `--seed` repeat a run exactly; the log's last line has both.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.reference_models import corpus
from bench.reference_models.export_hf import save_weights
from bench.reference_models.models import MODELS
from polarjax.configs import ModelConfig
from polarjax.model.decoder import forward
from polarjax.model.parameters import abstract, parameters, with_parameters

type Flat = dict[str, jax.Array]
type State = tuple[Flat, optax.OptState]

STARTED = time.monotonic()
DEV_ROWS = 64  # windows at the end of each stream, never trained on
CLOSING_SECONDS = 6.0
SAVE_SECONDS = 45.0
UNPLANNED = 10**9  # steps, while the speed is being measured


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What defines a run besides the model and the number of steps."""

    batch: int = 128  # rows of max_positions tokens
    code_share: float = 0.3
    bos_share: float = 0.9  # rows that start with BOS, as prompts do; the others start mid-text
    peak_rate: float = 2.5e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    weight_decay: float = 0.1
    z_loss: float = 1e-4
    chunk: int = 50  # steps per jitted call
    seed: int = 0


def initial(config: ModelConfig, seed: int) -> Flat:
    """Initial float32 parameters: normal(0.03), residual outputs times (2 L) ** -0.5, unit scales, zero biases."""
    shapes = parameters(abstract(config))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        n: _initial(n, s.shape, k, config) for (n, s), k in zip(sorted(shapes.items()), keys, strict=True)
    }


def _initial(name: str, shape: tuple[int, ...], key: jax.Array, config: ModelConfig) -> jax.Array:
    leaf = name.split(".")[-1]
    if leaf == "scale":
        return jnp.ones(shape)
    if leaf.startswith("b"):
        return jnp.zeros(shape)
    residual = leaf in ("wo", "w_down")
    return 0.03 * jax.random.normal(key, shape) * ((2 * config.num_layers) ** -0.5 if residual else 1.0)


def loss_of(flat: Flat, rows: jax.Array, config: ModelConfig, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """(training loss, mean negative log-likelihood in nats) of rows [B T+1]; computes in bfloat16."""
    model = with_parameters(config, {n: v.astype(jnp.bfloat16) for n, v in flat.items()})
    inputs, targets = rows[:, :-1], rows[:, 1:]
    lengths = jnp.full(inputs.shape[:1], inputs.shape[1], jnp.int32)
    logits, _ = forward(model, inputs, lengths)
    partition = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = jnp.mean(partition - picked)
    return nll + z_loss * jnp.mean(partition**2), nll


def draw(streams: tuple[jax.Array, ...], key: jax.Array, length: int, recipe: Recipe) -> jax.Array:
    """A batch of rows int32 [B length] from random places of the two streams."""
    code = round(recipe.batch * recipe.code_share)
    rows = []
    for stream, count, part in zip(streams, (recipe.batch - code, code), jax.random.split(key), strict=True):
        place, opening = jax.random.split(part)
        start = jax.random.randint(place, (count, 1), 0, stream.shape[0] - length)
        row = stream[start + jnp.arange(length)[None]].astype(jnp.int32)
        bos = jax.random.bernoulli(opening, recipe.bos_share, (count,))
        rows.append(row.at[:, 0].set(jnp.where(bos, corpus.BOS_ID, row[:, 0])))
    return jnp.concatenate(rows)


def optimizer(flat: Flat, recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with unit learning rate; weight decay on matrices only (not embeddings, norms, biases)."""
    matrices = {name: name.rpartition(".")[2].startswith("w") for name in flat}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(recipe.weight_decay, matrices),
    )


def start(config: ModelConfig, recipe: Recipe) -> State:
    """Fresh parameters and optimizer state."""
    flat = initial(config, recipe.seed)
    return flat, optimizer(flat, recipe).init(flat)


def rate(step: jax.Array, total: jax.Array, recipe: Recipe) -> jax.Array:
    """Learning rate of `step` (from 0) of `total`."""
    rise = (step + 1) / recipe.warmup_steps
    fall = (total - step) / jnp.maximum(1.0, recipe.decay_share * total)
    return recipe.peak_rate * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames=("state",))
def run_chunk(
    state: State,
    streams: tuple[jax.Array, ...],
    step: jax.Array,
    total: jax.Array,
    *,
    config: ModelConfig,
    recipe: Recipe,
) -> tuple[State, jax.Array]:
    """`recipe.chunk` steps from `step` on; returns the state and the mean loss."""
    update = optimizer(state[0], recipe).update

    def body(carry: State, i: jax.Array) -> tuple[State, jax.Array]:
        flat, memory = carry
        key = jax.random.fold_in(jax.random.key(recipe.seed + 1), i)
        rows = draw(streams, key, config.max_positions + 1, recipe)
        gradient, nll = jax.grad(loss_of, has_aux=True)(flat, rows, config, recipe.z_loss)
        change, memory = update(gradient, memory, flat)
        scaled = jax.tree.map(lambda u: -rate(i, total, recipe) * u, change)
        return (cast(Flat, optax.apply_updates(flat, scaled)), memory), nll

    state, losses = jax.lax.scan(body, state, step + jnp.arange(recipe.chunk))
    return state, jnp.mean(losses)


@functools.partial(jax.jit, static_argnames="config")
def dev_loss(flat: Flat, rows: jax.Array, config: ModelConfig) -> jax.Array:
    """Mean negative log-likelihood of rows [n T+1], in nats."""
    return loss_of(flat, rows, config, 0.0)[1]


class Log:
    """Writes lines of JSON to a file and prints them."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def __call__(self, **values: object) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def cut_dev(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(the part to train on, the last DEV_ROWS windows [n length], each starting with BOS)."""
    size = DEV_ROWS * length
    rows = stream[-size:].reshape(DEV_ROWS, length).astype(np.int32)
    rows[:, 0] = corpus.BOS_ID
    return stream[:-size], rows


def prepare(streams: list[np.ndarray], length: int) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """The streams to train on and the dev windows by stream name, on the device."""
    kept, dev = zip(*(cut_dev(stream, length) for stream in streams), strict=True)
    named = dict(zip(corpus.TRAIN_FILES, dev, strict=True))
    return tuple(map(jnp.asarray, kept)), {name: jnp.asarray(rows) for name, rows in named.items()}


def steps_until(deadline: float, pace: float, recipe: Recipe) -> int:
    """Steps, in whole chunks, that fit before `deadline` (monotonic seconds) at `pace` seconds per step."""
    left = deadline - CLOSING_SECONDS - time.monotonic()
    return max(1, int(left / (1.01 * pace) / recipe.chunk)) * recipe.chunk


def train(
    config: ModelConfig,
    streams: list[np.ndarray],
    recipe: Recipe,
    out: Path,
    *,
    steps: int | None,
    deadline: float | None = None,
) -> None:
    """Runs `steps` (whole chunks), or as many as finish before `deadline`; writes weights and log to `out`."""
    log = Log(out / "log.jsonl")
    log(device=jax.devices()[0].device_kind, recipe=dataclasses.asdict(recipe), model=config.to_json())
    kept, dev = prepare(streams, config.max_positions + 1)
    state = start(config, recipe)
    arguments = (kept, jnp.int32(0), jnp.int32(0))
    compiled = run_chunk.lower(state, *arguments, config=config, recipe=recipe).compile()
    log(parameters=sum(v.size for v in state[0].values()), compiled_seconds=time.monotonic() - STARTED)

    total, step, saved, loss = steps, 0, time.monotonic(), np.nan
    while total is None or step < total:
        began = time.monotonic()
        state, mean = compiled(state, kept, jnp.int32(step), jnp.int32(total or UNPLANNED))
        loss = float(mean)
        pace = (time.monotonic() - began) / recipe.chunk
        step += recipe.chunk
        warm = step >= 2 * recipe.chunk  # the first chunk also warms up
        if total is None and deadline is not None and warm:
            total = step + steps_until(deadline, pace, recipe)
            log(total_steps=total, seconds_per_step=pace)
        if step % (10 * recipe.chunk) == 0 or step == total:
            scores = {f"dev_{n}": float(dev_loss(state[0], rows, config)) for n, rows in dev.items()}
            speed = round(recipe.batch * config.max_positions / pace)
            log(step=step, loss=loss, **scores, tokens_per_second=speed, seconds=time.monotonic() - STARTED)
        if not np.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss} at step {step}; the last saved weights are from an earlier step"
            )
        if time.monotonic() - saved > SAVE_SECONDS or step == total:
            save_weights(out / "model.safetensors", config, jax.device_get(state[0]))
            saved = time.monotonic()
    tokens = step * recipe.batch * config.max_positions
    log(done=True, steps=step, seed=recipe.seed, tokens=tokens, loss=loss, seconds=time.monotonic() - STARTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument(
        "--tokens", type=Path, required=True, help="folder of token files written by corpus.py"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors and log.jsonl")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="rounded up to whole chunks")
    length.add_argument("--minutes", type=float, help="wall time of the process, compilation included")
    for field in dataclasses.fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    args = parser.parse_args()
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    streams = [corpus.read_stream(args.tokens / f"{name}.u16.xz") for name in corpus.TRAIN_FILES]
    deadline = None if args.minutes is None else STARTED + 60 * args.minutes
    steps = None if args.steps is None else -(-args.steps // recipe.chunk) * recipe.chunk
    train(MODELS[args.model], streams, recipe, args.out, steps=steps, deadline=deadline)


if __name__ == "__main__":
    main()
