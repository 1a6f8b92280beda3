"""Heals a model: the dense model teaches itself, under the choices of its routers, which learn along with it."""

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.errors import CheckpointError
from polarjax.generation.checks import random_key
from polarjax.memory import memory_line, peak_memory
from polarjax.model.blocks import logits
from polarjax.model.checks import check_model, check_windows
from polarjax.model.decoder import Decoder
from polarjax.model.meshes import without_mesh
from polarjax.model.parameters import fingerprint, parameters, with_parameters
from polarjax.model.stacked import hidden_states, unstack_parameters
from polarjax.numeric import spread
from polarjax.progress import task, tell
from polarjax.selection.masking import Masking
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.sparsity.checks import check_options
from polarjax.sparsity.distillation import Arrays, Distillation, TuneState, by_tokens, selector, student
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.sparsity.tuning_batches import Batches
from polarjax.sparsity.tuning_checks import (
    check_devices,
    check_domains,
    check_finite,
    check_group_routers,
    check_layers,
    check_memory,
    check_shares,
    check_teacher,
)
from polarjax.sparsity.tuning_setup import Setup, blended, router_shardings, setup
from polarjax.sparsity.tuning_state import check_state, read_state, save_state, settings_of
from polarjax.storage.atomic import absolute
from polarjax.types import Array, Float, Int, Int32, Key

_LEAST_RATE = 0.02  # of the highest learning rate, at the end


@dataclasses.dataclass(frozen=True)
class TuneReport:
    """What a run of `tune` did.

    Attributes:
      steps, tokens: of the optimizer, and of text.
      seconds: time of training, without compilation and measuring.
      tokens_per_second: rate of training.
      memory: bytes that a step needs on each device with all that lives beside it, as planned before it ran.
      peak: most bytes that the process used on the device; None if the device doesn't say.
      before, after: held-out perplexity by groups kept, both with `TuneOptions.activation`; empty without windows.
      neurons: fraction of the neurons of each layer that a token activates, with all groups kept, after the training;
        on the held-out windows, without them on windows of the first step. Empty for models without ReLU.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    memory: dict[str, int]
    peak: int | None
    before: dict[int, float]
    after: dict[int, float]
    neurons: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)


@jax.transfer_guard("allow")  # it moves windows by design
def tune(
    model: Decoder,
    routers: Routers,
    domains: Sequence[Int[np.ndarray, "n T"]],
    key: Key[Array, ""] | int,
    *,
    options: TuneOptions,
    shares: Sequence[float] | None = None,
    held_out: Int[np.ndarray, "n T"] | None = None,
    dense_layers: tuple[int, ...] = (0,),
    budgets: tuple[tuple[int, ...], ...] = (),
    folder: Path | None = None,
    resume: bool = False,
    devices: int | None = None,
) -> tuple[Decoder, Routers, TuneReport]:
    """Trains a model to lose less when groups are skipped, by distillation from itself.

    In each window some number of groups is kept, drawn from `options.densities`, or all. The loss is the mean
    KL(dense model ‖ trained model) of the next token, plus the routers' own loss (`share_loss`). The routers choose
    the groups and learn from what their choices cost (`Gating`), too. Neuron routers and plans stay the old ones.

    Args:
      model: the dense model, which is the teacher and the start.
      routers: its group routers, where training starts.
      domains: windows of each kind of text, int [n T] of one length T.
      key: random key or seed.
      options: what to train, and when to stop.
      shares: how much of the training each domain is; None mixes them equally.
      held_out: windows [n T] to measure perplexity on, before and after.
      dense_layers: layers whose attention always keeps all groups.
      budgets: groups that each layer keeps instead, as in `PlanTable`; () keeps equally many in every other layer.
      folder: where the state is saved every `options.save_minutes`, at the end, and when training is interrupted or
        diverges; None saves nothing.
      resume: continue from the state in `folder`.
      devices: local devices to divide each batch over; None takes as many as divide `options.batch_size` evenly.

    Returns:
      The model and routers in the model's dtype, and what was done. Neuron routers are kept as they were.

    Raises:
      InputError: bad windows or options, or a step that doesn't fit the device's memory.
      SparsityError: routers for another model, or training that diverges.
      CheckpointError: no state to resume, or one of another run; or the state can't be saved, and an earlier one stays.
    """
    check_model(model, where="tune")
    options = check_options(options, TuneOptions, "options")
    check_teacher(model, options)
    check_group_routers(routers, model.config)
    layers = check_layers(dense_layers, budgets, model.config)
    domains = check_domains(domains, model.config)
    held_out = None if held_out is None else check_windows(held_out, model.config)
    parts, seed = check_shares(shares, domains), int(jax.random.bits(random_key(key), (), jnp.uint32))
    batches = Batches(domains, parts, model.config, options, layers, seed, budgets)
    with without_mesh():
        run = _Run.prepare(model, routers, batches, folder, check_devices(devices, options), resume=resume)
        before = run.measure(held_out)
        if resume:
            run.resume()
        run.train(model)
        return *run.result(model, routers), run.report(before, run.measure(held_out), held_out)


class _Run:
    """One training: the compiled step, the teacher, and the state, which changes."""

    def __init__(self, plan: Setup, batches: Batches, folder: Path | None, settings: dict[str, Any]):
        self._plan, self._batches = plan, batches
        self._folder, self._settings = folder, settings
        self._saved = 0  # step whose state is in the folder
        self.seconds = 0.0
        self.memory = plan.memory
        self._state, self._teacher = plan.arrays()

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        routers: Routers,
        batches: Batches,
        folder: Path | None,
        devices: int,
        *,
        resume: bool,
    ) -> "_Run":
        """Finds the state to resume, compiles a step, checks that it fits, and only then makes its arrays."""
        folder = None if folder is None else absolute(folder)
        settings = settings_of(model, routers, batches)
        if resume:
            check_state(folder, settings)
        plan = setup(model, routers, batches.options, batches.domains[0].shape[1], devices)
        check_memory(plan)
        tell(memory_line("a step of tuning", plan.memory))
        return cls(plan, batches, folder, settings)

    def resume(self) -> None:
        """Continues from the saved state."""
        if self._folder is not None:
            state, self.seconds = read_state(self._folder, self._state, self._settings)
            self._state = jax.device_put(state, self._plan.placement.whole)
            self._saved = self.steps

    @property
    def steps(self) -> int:
        """Steps done, in this process and before."""
        return int(self._state.step)

    def train(self, model: Decoder) -> None:
        """Runs steps until the limit, then blends; saves now and then, and when something stops it."""
        options, done = self._batches.options, self.steps
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        waiting: list[tuple[int, dict[str, Array]]] = []
        try:
            with task("tune", options.tokens, "tokens") as advance:
                if done:
                    advance(done * self._batches.tokens_per_step)
                while (fraction := self._fraction(done)) < 1:
                    waiting.append((done, self._step(done, fraction)))
                    done += 1
                    parts = self._settle(waiting, keep=2)
                    self.seconds = time.monotonic() - began
                    advance(self._batches.tokens_per_step, note=self._note(parts, done))
                    if self._folder is not None and time.monotonic() - saved > options.save_minutes * 60:
                        self._save()
                        began, saved = time.monotonic() - self.seconds, time.monotonic()
            self._settle(waiting, keep=0)
            self.seconds = time.monotonic() - began
        except BaseException as error:
            if not isinstance(error, CheckpointError):  # which is about saving
                self._save()
            raise
        try:
            self._save()
        except CheckpointError as error:  # the result may still find room elsewhere
            tell(f"the state after the last step is not saved: {error}")
        mixed = blended(self._state.model, model, options.blend)
        self._state = dataclasses.replace(self._state, model=mixed)

    def _fraction(self, done: int) -> float:
        """How much of the training is done; 1 or more ends it."""
        options = self._batches.options
        of_tokens = done * self._batches.tokens_per_step / options.tokens if options.tokens else 0.0
        of_time = self.seconds / (60 * options.minutes) if options.minutes else 0.0
        return max(of_tokens, of_time)

    def _step(self, done: int, fraction: float) -> dict[str, Array]:
        options = self._batches.options
        falling = _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * fraction)) / 2
        scale = min(1.0, (done + 1) / options.warmup) * falling
        rates = scale * np.asarray(options.learning_rates, np.float32)
        at = self._plan.placement
        batch = jax.device_put((*self._batches.of(done), rates), (at.rows(1), at.rows(2), at.whole))
        self._state, parts = self._plan.compiled(self._state, self._teacher, *batch)
        return parts

    def _settle(self, waiting: list[tuple[int, dict[str, Array]]], *, keep: int) -> dict[str, Any]:
        """Reads the results of all steps but the last `keep`, so that the device never waits for the host."""
        parts: dict[str, Any] = {}
        while len(waiting) > keep:
            number, found = waiting.pop(0)
            parts = jax.device_get(found)
            where = "" if self._folder is None else f" (--overwrite); the state before is in {self._folder}"
            check_finite(parts, number + 1, where)
        return parts

    def _note(self, parts: dict[str, Any], done: int) -> str:
        if not parts:
            return ""
        rate = done * self._batches.tokens_per_step / max(self.seconds, 1e-9)
        limit = self._batches.options.minutes
        left = "" if limit is None else f", {self.seconds / 60:.1f} of {limit:g} min"
        kl = f"KL dense {parts['dense']:.4f}, sparse {parts['sparse']:.4f}"
        active = parts["neurons"]
        neurons = f", neurons {active.min():.0%} to {active.max():.0%}, mean {active.mean():.1%}"
        return f"{kl}{neurons if self._plan.spec.config.neuron_sparsity else ''}, {rate:,.0f} tokens/s{left}"

    def _save(self) -> None:
        if self._folder is None or self.steps in (0, self._saved):
            return
        try:
            save_state(self._folder, self._state, self._settings, self.seconds)
        except CheckpointError as error:
            hint = "make room, and start again: nothing was saved before"
            if self._saved:
                hint = f"make room, and continue with --resume: the state after step {self._saved} is kept"
            about = {"where": error.where, "got": error.got, "expected": error.expected}
            raise CheckpointError(error.what, **about, hint=hint) from error
        self._saved = self.steps

    def measure(self, windows: Int32[np.ndarray, "n T"] | None) -> dict[int, float]:
        """Perplexity of `windows` by number of groups kept: all, the most, the middle and the least of the range."""
        if windows is None:
            return {}
        K, (least, most) = self._batches.config.num_kv_heads, self._batches.kept
        size = min(self._batches.options.batch_size, len(windows))
        found = {}
        for kept in sorted({K, most, (least + most) // 2, least}, reverse=True):
            counts = self._batches.counts(np.full(size, kept))
            nll = [
                _window_nll(
                    self._plan.spec,
                    self._state,
                    self._teacher,
                    *self._placed(windows[np.arange(at, at + size) % len(windows)], counts),
                )[0]
                for at in range(0, len(windows), size)  # the last batch is filled with repeats
            ]
            found[kept] = float(np.exp(np.concatenate(jax.device_get(nll))[: len(windows)].mean(dtype=float)))
        return found

    def _placed(self, tokens: Int32[np.ndarray, "b T"], counts: Int32[np.ndarray, "L b"]) -> Any:
        """Both on the devices, divided among them if they can be."""
        at = self._plan.placement
        even = len(tokens) % len(at.devices) == 0
        return jax.device_put((tokens, counts), (at.rows(0), at.rows(1)) if even else at.whole)

    def active(self, held_out: Int32[np.ndarray, "n T"] | None) -> tuple[float, ...]:
        """The fraction of active neurons in each layer, on at most a batch of windows; empty without ReLU."""
        if not self._plan.spec.config.neuron_sparsity:
            return ()
        windows = self._batches.of(0)[0][0] if held_out is None else held_out
        tokens = windows[spread(len(windows), self._batches.options.batch_size)]
        counts = self._batches.counts(np.full(len(tokens), self._batches.config.num_kv_heads))
        found = _window_nll(self._plan.spec, self._state, self._teacher, *self._placed(tokens, counts))[1]
        return tuple(np.asarray(jax.device_get(found), float).tolist())

    def report(
        self, before: dict[int, float], after: dict[int, float], held_out: Int32[np.ndarray, "n T"] | None
    ) -> TuneReport:
        """What was done, with the perplexities before and after it."""
        tokens = self.steps * self._batches.tokens_per_step
        rate = tokens / max(self.seconds, 1e-9)
        measured = (self.steps, tokens, self.seconds, rate, self.memory, peak_memory())
        return TuneReport(*measured, before, after, self.active(held_out))

    def result(self, model: Decoder, routers: Routers) -> tuple[Decoder, Routers]:
        """The trained model and routers, in the dtypes of the given ones."""
        old, L = parameters(model), model.config.num_layers
        flat = dict(old)
        for name, value in self._state.model.items():  # one by one, to have few of them twice
            flat |= unstack_parameters({name: value.astype(model.dtype)}, L)
        cast = {name: jax.device_put(value, old[name].sharding) for name, value in flat.items()}
        tuned = with_parameters(self._plan.spec.config, cast, layout=model.layout)
        dtype, stacked = routers.layers[0].w_group.dtype, self._state.routers.items()

        def layer_of(i: int, old: LayerRouter) -> LayerRouter:
            own = {name: value[i].astype(dtype) for name, value in stacked}
            at = router_shardings(model, old)
            return dataclasses.replace(old, **{name: jax.device_put(own[name], at[name]) for name in own})

        layers = tuple(layer_of(i, old) for i, old in enumerate(routers.layers))
        return tuned, dataclasses.replace(routers, layers=layers, weights=fingerprint(tuned))


@partial(jax.jit, static_argnums=0)
def _window_nll(
    spec: Distillation,
    state: TuneState,
    teacher: Arrays,
    tokens: Int[Array, "b T"],
    counts: Int[Array, "L b"],
) -> tuple[Float[Array, "b"], Float[Array, "L"]]:
    """Each window's mean negative log-likelihood of the tokens after its first, in nats; active neurons by layer."""
    model = student(spec, state.model, teacher)
    x, records = hidden_states(model, tokens, masking=Masking(selector(spec, state.routers), counts))

    def one(pair: tuple[Array, Array]) -> Array:
        found = logits(model, pair[0])
        return jax.nn.logsumexp(found, -1) - jnp.take_along_axis(found, pair[1][..., None], -1)[..., 0]

    return jnp.mean(by_tokens(one, x, jnp.roll(tokens, -1, 1))[:, :-1], 1), records.active
