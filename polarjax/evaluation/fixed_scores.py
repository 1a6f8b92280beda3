"""The static selector: the same groups and neurons for every token, by their averages over a text."""

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.paired import masked_batch
from polarjax.model.checks import check_model, check_windows
from polarjax.model.decoder import Decoder, forward
from polarjax.model.meshes import on_any_mesh
from polarjax.model.readable import fetched
from polarjax.model.spread_checks import check_around
from polarjax.model.taps import TapSpec, unpack
from polarjax.progress import task
from polarjax.selection.selectors import Static
from polarjax.types import Int


def static_selector(model: Decoder, windows: Int[np.ndarray, "n T"]) -> Static:
    """Scores groups by their mean norm over a text, and a ReLU model's neurons by how often they are active.

    Use another text than the one that quality is measured on: a selector that has seen it is no baseline.

    Args:
      model: the decoder.
      windows: int32 [n T], all T tokens valid.

    Raises:
      InputError: the windows are not the model's tokens.
    """
    check_model(model, where="static_selector")
    check_around(model)
    windows = check_windows(windows, model.config)
    size = masked_batch(windows.shape, model.config.vocab_size)
    totals = None
    with task("static scores", len(windows), "windows") as advance:
        for start in range(0, len(windows), size):
            rows = windows[start : start + size]
            valid = np.arange(size) < len(rows)
            batch = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), 0)])
            means = fetched(_means(model, jax.device_put(batch), jax.device_put(valid)))
            share = len(rows) / len(windows)
            weighted = [None if each is None else each.astype(np.float64) * share for each in means]
            totals = weighted if totals is None else jax.tree.map(np.add, totals, weighted)
            advance(len(rows))
    return Static(*jax.device_put(jax.tree.map(np.float32, totals)))


@jax.jit
@on_any_mesh("tokens", lambda places: places.scalar)
def _means(model: Decoder, tokens, valid):
    """Mean norms [L K] and, of ReLU models, fractions of active neurons [L F] over the valid rows."""
    config = model.config
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    spec = TapSpec(inputs=False, activity=config.neuron_sparsity, norms=True, change=False)
    _, taps = forward(model, tokens, lengths, taps=spec)
    weight = valid.astype(jnp.float32) / jnp.sum(valid)
    mean = lambda rows: jnp.einsum("b,bn->n", weight, jnp.mean(rows.astype(jnp.float32), 1))
    groups = jnp.stack([mean(each) for each in taps.norms])  # pyrefly: ignore[missing-attribute]
    if not config.neuron_sparsity:
        return groups, None
    active = [mean(unpack(each, config.d_ff)) for each in taps.activity]  # pyrefly: ignore[missing-attribute]
    return groups, jnp.stack(active)
