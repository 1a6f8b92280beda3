"""Options of `tune`, with their checks. No JAX, so that help can show the defaults."""

import dataclasses
import math
from typing import Any, Literal, get_args

from polarjax.errors import InputError
from polarjax.numeric import check_flags, items, make_plain, shown, whole_number
from polarjax.storage.dtypes import check_dtype

Subset = Literal["all", "attention", "out", "bias", "routers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How a model is healed; see `polarjax.sparsity.tune`.

    Attributes:
      tokens: stop after this many tokens of text; None means no such limit. The result depends on the seed alone.
      minutes: stop after this many minutes of training; None means no such limit.
      batch_size: windows per forward pass.
      accumulate: forward passes per step of the optimizer.
      densities: range of the fraction of groups kept; each window draws a number of groups from those that plans keep at
        these densities (rounded down, at least 1).
      dense_share: fraction of the windows that keep all groups, which preserves the dense model.
      train: what changes besides the routers: "all" parameters, "attention", the "out" projections of attention,
        "bias" (biases and the scales of norms), or only the "routers".
      learning_rate, router_learning_rate: Adam's, at their highest.
      mean_learning_rate: that of the mean outputs; None means `router_learning_rate`.
      router_weight: weight of the routers' own loss, `share_loss`, beside what they learn from the divergence.
      router_width: units of a hidden layer that group routers without one get; 0 leaves them as they are.
      warmup: steps until the learning rates are at their highest; they then fall as a cosine.
      clip: largest norm of the gradient of the model, and of that of the routers.
      dtype: dtype of the passes; None is bfloat16 on a GPU and float32 on a CPU. Trained values are float32.
      remat: compute each layer twice and keep less in memory.
      activation: "relu" turns the student's activation into it; None keeps the model's.
      l1: weight of the penalty on active neurons of a ReLU student, see `polarjax.sparsity.distillation.losses`; 0 has
        none. The same value suits models of any size: the penalty is between 0 and 1, and the divergence in nats.
      blend: how far the result goes from the first weights to the trained ones, above 0 and at most 1 (Wortsman et al.
        2022): less than 1 stays closer to the dense model.
      save_minutes: how often the state is saved.
    """

    tokens: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    densities: tuple[float, float] = (1 / 3, 2 / 3)
    dense_share: float = 0.25
    train: Subset = "all"
    learning_rate: float = 1e-4
    router_learning_rate: float = 5e-4
    mean_learning_rate: float | None = None
    router_weight: float = 0.1
    router_width: int = 128
    warmup: int = 30
    clip: float = 1.0
    dtype: str | None = None
    remat: bool = True
    activation: Literal["relu"] | None = None
    l1: float = 0.0
    blend: float = 1.0
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        whole = ("batch_size", "accumulate", "warmup")
        positive = ["learning_rate", "router_learning_rate", "clip", "save_minutes"]
        positive += ["mean_learning_rate"] if self.mean_learning_rate is not None else []
        make_plain(
            self,
            *whole,
            *positive,
            "tokens",
            "minutes",
            "dense_share",
            "router_weight",
            "router_width",
            "remat",
            "l1",
            "blend",
        )
        check_flags("TuneOptions", remat=self.remat)
        for name in (*whole, *(["tokens"] if self.tokens is not None else [])):
            whole_number(getattr(self, name), name, where="TuneOptions")
        whole_number(self.router_width, "router_width", where="TuneOptions", least=0)
        for name in (*positive, *(["minutes"] if self.minutes is not None else [])):
            _check_range(name, getattr(self, name), 0, math.inf, "above 0")
        for name in ("router_weight", "l1"):
            _check_range(name, getattr(self, name), -1e-300, math.inf, "0 or more")
        _check_range("dense_share", self.dense_share, -1e-300, 1, "at least 0 and below 1")
        _check_range("blend", self.blend, 0, 1 + 1e-12, "above 0 and at most 1")
        if self.tokens is None and self.minutes is None:
            hint = "pass tokens (--tokens) or minutes (--minutes)"
            raise InputError("nothing says when to stop", where="TuneOptions", hint=hint)
        if self.train not in get_args(Subset):
            expected = " | ".join(get_args(Subset))
            hint = "leave it out to train all"
            raise InputError(
                "no such part of a model", where="train", got=shown(self.train), expected=expected, hint=hint
            )
        if self.activation not in (None, "relu"):
            got, hint = shown(self.activation), "leave it out to keep the model's"
            raise InputError("not an activation to tune to", got=got, expected="relu", hint=hint)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", check_dtype(self.dtype, where="TuneOptions: dtype").name)
        object.__setattr__(self, "densities", _as_range(self.densities))

    @property
    def learning_rates(self) -> tuple[float, float, float]:
        """Those of the model, the routers and the means, at their highest."""
        of_means = self.router_learning_rate if self.mean_learning_rate is None else self.mean_learning_rate
        return self.learning_rate, self.router_learning_rate, of_means

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self) | {"densities": list(self.densities)}


def _check_range(name: str, value: Any, above: float, below: float, expected: str) -> None:
    if type(value) not in (int, float) or not above < value < below:
        hint = f"pass for example {name}={getattr(TuneOptions, name) or 1}"
        raise InputError(
            f"{name} is not usable", where="TuneOptions", got=shown(value), expected=expected, hint=hint
        )


def _as_range(densities: Any) -> tuple[float, float]:
    numbers = items(densities) or ()
    if not (
        len(numbers) == 2
        and all(type(each) in (int, float) for each in numbers)
        and 0 < numbers[0] <= numbers[1] <= 1
    ):
        raise InputError(
            "not a range of densities",
            where="densities",
            got=repr(densities)[:80],
            expected="two fractions of groups, above 0 and at most 1, the smaller one first",
            hint="pass for example (0.33, 0.67)",
        )
    return float(numbers[0]), float(numbers[1])
