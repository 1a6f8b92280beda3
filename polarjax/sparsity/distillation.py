"""Healing by distillation: the dense model teaches the model that skips groups. One training step, jitted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polarjax.configs import ModelConfig
from polarjax.model.blocks import logits
from polarjax.model.stacked import StackedDecoder, hidden_states
from polarjax.selection.masking import Gating, StackedRouters
from polarjax.selection.means import Importance
from polarjax.selection.routers import LayerRouter
from polarjax.sparsity.objectives import share_loss
from polarjax.types import Array, Bool, Float, Int, Num

type Arrays = dict[str, Array]

CHUNK = 2048  # tokens whose logits are in memory at once


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a step computes; static under `jax.jit`.

    Attributes:
      config: the student's configuration.
      teacher: the teacher's; they differ at most in the activation.
      importance: what routers learn to rank.
      dtype: dtype of the forward and backward passes.
      router_weight: weight of the routers' own loss, beside what they learn from the divergence.
      l1: weight of the penalty on active neurons.
      remat: compute each layer again in the backward pass.
      clip: largest norm of the gradients of the model, and of those of the routers.
    """

    config: ModelConfig
    teacher: ModelConfig
    importance: Importance
    dtype: Any
    router_weight: float
    l1: float
    remat: bool
    clip: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TuneState:
    """Everything that training changes: float32 masters, and the optimizer's moments.

    Attributes:
      model: trained parameters, as `stack_parameters` names them.
      routers: the group routers' arrays [L ...], as `LayerRouter` names them.
      moments: the optimizer's state for the model and for the routers.
      step: steps done, int32.
    """

    model: Arrays
    routers: Arrays
    moments: Any
    step: Int[Array, ""]


def optimizer(spec: Distillation) -> optax.GradientTransformation:
    """Adam without its learning rate; the model and the routers each have their own state of it."""
    return optax.chain(optax.clip_by_global_norm(spec.clip), optax.scale_by_adam(b1=0.9, b2=0.95))


def start(spec: Distillation, model: Arrays, routers: Arrays) -> TuneState:
    """The state before the first step."""
    adam = optimizer(spec)
    return TuneState(model, routers, (adam.init(model), adam.init(routers)), jnp.zeros((), jnp.int32))


def student(spec: Distillation, trained: Arrays, teacher: Arrays) -> StackedDecoder:
    """The student in the computing dtype: its trained parameters, and the teacher's where it has none of its own."""
    cast = {name: value.astype(spec.dtype) for name, value in (teacher | trained).items()}
    return StackedDecoder.of(spec.config, cast)


def selector(spec: Distillation, routers: Arrays) -> StackedRouters:
    """The group routers being trained."""
    return StackedRouters(_layers(routers), spec.importance)


def _layers(routers: Arrays) -> LayerRouter:
    """The group routers of all layers, arrays [L ...]."""
    return LayerRouter(w_in=None, w_out=None, **routers)


def divergence(
    teacher: StackedDecoder,
    of_teacher: Float[Array, "B T D"],
    learner: StackedDecoder,
    of_learner: Float[Array, "B T D"],
) -> Float[Array, "B T"]:
    """KL(teacher ‖ student) of the next token at each position, in nats; logits of `CHUNK` tokens at a time."""

    @jax.checkpoint
    def one(pair):
        log_p = jax.nn.log_softmax(logits(teacher, pair[0]), -1)
        log_q = jax.nn.log_softmax(logits(learner, pair[1]), -1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

    return by_tokens(one, of_teacher, of_learner)


def by_tokens(
    of_tokens: Callable[..., Float[Array, "B t"]], *rows: Num[Array, "B T ..."]
) -> Float[Array, "B T"]:
    """Applies a function of a tuple of arrays [B t ...] to a few tokens of every row at a time, about `CHUNK` in all.

    Every piece has all rows, so that devices which share the rows all have work.
    """
    B, T = rows[0].shape[:2]
    pieces = next(
        count for count in range(1, T + 1) if T % count == 0 and (CHUNK * count >= B * T or count == T)
    )
    cut = lambda x: jnp.moveaxis(x.reshape(B, pieces, T // pieces, *x.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(of_tokens, tuple(map(cut, rows))), 0, 1).reshape(B, T)


def router_loss(
    routers: Arrays, inputs: Float[Array, "L B T D"], importance: Float[Array, "L B T K"]
) -> Float[Array, ""]:
    """`share_loss` of the scores, the mean over all layers."""
    inputs, importance = jax.lax.stop_gradient((inputs, importance))
    scores = jax.vmap(LayerRouter.group_scores)(_layers(routers), inputs)
    return share_loss(scores, importance)


def losses(
    spec: Distillation,
    trained: tuple[Arrays, Arrays],
    teacher: Arrays,
    tokens: Int[Array, "b T"],
    counts: Int[Array, "L b"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of one batch and its parts: the divergence of dense and of sparse rows, the routers' loss, and the
    fraction of active neurons in each layer [L].

    The penalty on active neurons is `spec.l1` times the mean over tokens and layers of mean|a| / sqrt(mean a²), with
    the means over a layer's neurons and a the activation's output before it is multiplied by `up`; see
    `polarjax.model.mlp.usage`. ProSparse (arXiv 2402.13516) and arXiv 2603.23198 train ReLU models with an L1 penalty;
    divided by the root mean square, it is the same for all scales and widths and isn't lowered by smaller a's.

    `trained` holds parameters of the model and the routers; the student's others are the teacher's.
    """
    model, routers = trained
    guide = StackedDecoder.of(spec.teacher, teacher)
    learner = student(spec, model, teacher)
    masking = Gating(selector(spec, routers), counts)
    x, records = hidden_states(learner, tokens, masking=masking, remat=spec.remat)
    target = jax.lax.stop_gradient(hidden_states(guide, tokens)[0])
    each = jnp.mean(divergence(guide, target, learner, x), -1)
    of_routers = router_loss(routers, records.inputs, records.importance)
    dense = jnp.all(counts == spec.config.num_kv_heads, 0)
    parts = {"dense": _mean(each, dense), "sparse": _mean(each, ~dense), "routers": of_routers}
    total = jnp.mean(each) + spec.router_weight * of_routers
    if spec.l1:
        total = total + spec.l1 * jnp.mean(records.l1)
    return total, parts | {"neurons": records.active}


def _mean(values: Float[Array, "b"], chosen: Bool[Array, "b"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(jnp.sum(chosen, dtype=jnp.float32), 1)


def step(
    spec: Distillation,
    state: TuneState,
    teacher: Arrays,
    tokens: Int[Array, "a b T"],
    counts: Int[Array, "a L b"],
    rates: Float[Array, "3"],
) -> tuple[TuneState, dict[str, Array]]:
    """One step of the optimizers on the mean gradient of `a` batches; for `jax.jit`.

    Args:
      spec: what to compute.
      state: the masters and moments; to be donated.
      teacher: the teacher's parameters, and so those of the student that aren't trained.
      tokens: int32 [a b T].
      counts: groups kept in each layer of each row [a L b].
      rates: learning rates of the model, of the routers, and of the mean outputs.

    Returns:
      the next state (the same one if the loss or a gradient isn't finite), and the parts of the loss, with `finite`.
    """
    loss = lambda trained, tokens, counts: losses(spec, trained, teacher, tokens, counts)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        (_, parts), grads = gradient((state.model, state.routers), *batch)
        return jax.tree.map(jnp.add, total, (grads, parts)), None

    zeros = jax.tree.map(jnp.zeros_like, (state.model, state.routers))
    parts = dict.fromkeys(("dense", "sparse", "routers"), jnp.zeros(()))
    parts |= {"neurons": jnp.zeros(spec.config.num_layers)}
    (grads, parts), _ = jax.lax.scan(add, (zeros, parts), (tokens, counts))
    grads, parts = jax.tree.map(lambda total: total / tokens.shape[0], (grads, parts))
    finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((grads, parts))]))
    adam = optimizer(spec)
    of_routers = dict.fromkeys(state.routers, rates[1])
    by_name = (
        dict.fromkeys(state.model, rates[0]),
        of_routers | ({"mean": rates[2]} if "mean" in of_routers else {}),
    )
    updates = zip(grads, state.moments, (state.model, state.routers), by_name, strict=True)
    model, routers = (_updated(adam, *update) for update in updates)
    after = TuneState(model[0], routers[0], (model[1], routers[1]), state.step + 1)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state), parts | {
        "finite": finite
    }


def _updated(
    adam: optax.GradientTransformation, gradients: Arrays, moments: Any, values: Arrays, rates: Arrays
) -> tuple[Arrays, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        change, moments = adam.update(gradients, moments, values)
    return jax.tree.map(lambda value, by, rate: value - rate * by, values, change, rates), moments
