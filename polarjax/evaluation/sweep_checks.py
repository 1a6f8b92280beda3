"""Checks of the arguments of a sweep, and the selectors that they name."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from polarjax.checkpoint.bundle import Bundle
from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.evaluation.parting import GreedyOptions
from polarjax.generation.checks import random_key
from polarjax.model.checks import check_room
from polarjax.model.decoder import Decoder
from polarjax.numeric import check_type, items, shown, whole_number
from polarjax.selection.plans import check_density
from polarjax.selection.selectors import Oracle, Random, Selector, Static

PROTOCOLS = ("masked", "decode")
SELECTORS = ("router", "oracle", "random", "static")
NEURONS = ("plan", "dense")
DEFAULT_BATCH = 8
MASK_ONLY = (Oracle, Random)
"""Selectors that need what a decoding step skips, and hence can't decode."""


def as_bundle(model: Any) -> Bundle:
    """The bundle, or one with this model alone; raises `InputError` for anything else."""
    if isinstance(model, Decoder):
        return Bundle(model)
    return check_type(model, Bundle, where="sweep", hint="pass pj.load(folder), or a Decoder")


def check_choices(name: str, given: Any, known: Sequence[str]) -> tuple[str, ...]:
    """`given` without repetitions; raises `InputError` unless all are `known` and there is one."""
    chosen = tuple(dict.fromkeys(_several(name, given)))
    wrong = [each for each in chosen if each not in known]
    if wrong or not chosen:
        raise InputError(
            f"no such choice of {name}" if wrong else f"no {name} given",
            where=name,
            got=repr(wrong[0]) if wrong else "none",
            expected=", ".join(known),
            hint=f"choose from {', '.join(known)}",
        )
    return chosen


def check_batch_sizes(given: Any, num_windows: int) -> tuple[int, ...]:
    """Batch sizes as integers; raises `InputError` if one isn't, or is larger than the number of windows."""
    if given is None:
        return (min(DEFAULT_BATCH, num_windows),)
    sizes = tuple(
        dict.fromkeys(
            whole_number(each, "batch_sizes", where="sweep") for each in _several("batch_sizes", given)
        )
    )
    if not sizes:
        raise InputError(
            "no batch size to decode at", where="batch_sizes", hint="give one, or only protocol masked"
        )
    if max(sizes) > num_windows:
        raise InputError(
            "too few windows to decode together",
            where="batch_sizes",
            got=f"batch size {max(sizes)}, {num_windows} windows",
            expected=f"at most {num_windows}",
            hint="use more text, shorter windows or a smaller batch size",
        )
    return sizes


def check_densities(given: Any, bundle: Bundle) -> tuple[float, ...]:
    """Densities without repetitions; None is the calibrated one.

    Raises:
      SparsityError: one is not above 0 and at most 1, or is None and there are no plans.
      InputError: there is none.
    """
    densities = []
    for each in _several("densities", given):
        if each is None:
            bundle.require("plans", where="densities")
            each = bundle.plans.head_density  # pyrefly: ignore[missing-attribute]
        densities.append(check_density(each, where="densities"))
    if not densities:
        raise InputError("no density to measure", where="densities", hint="give for example 0.5")
    return tuple(dict.fromkeys(densities))


def check_dense_layers(given: Any, config: ModelConfig) -> tuple[int, ...]:
    """Numbers of layers; raises `InputError` for one that the model doesn't have."""
    layers = tuple(_several("dense_layers", given))
    wrong = [each for each in layers if type(each) is not int or not 0 <= each < config.num_layers]
    if wrong:
        raise InputError(
            "no such layer",
            where="dense_layers",
            got=repr(wrong[0]),
            expected=f"numbers from 0 to {config.num_layers - 1}",
            hint="give for example 0",
        )
    return layers


def check_greedy(options: GreedyOptions | None, config: ModelConfig, length: int) -> None:
    """Raises `InputError` unless the prompts can be cut from windows of `length` and continued."""
    if options is None:
        return
    check_type(options, GreedyOptions, where="greedy", hint="pass GreedyOptions()")
    for name in ("prompts", "prompt_tokens", "new_tokens"):
        whole_number(getattr(options, name), name, where="greedy")
    if options.prompt_tokens > length:
        raise InputError(
            "the prompts are longer than the windows they are cut from",
            where="greedy",
            got=f"{options.prompt_tokens} tokens",
            expected=f"at most {length}",
            hint="shorten the prompts, or lengthen the windows",
        )
    check_room(config, options.prompt_tokens, options.new_tokens, where="greedy", option="new_tokens")


def check_given(plan_of: Any, static: Any, source: Any) -> None:
    """Raises `InputError` unless each of these arguments of `sweep` is None or what it should be."""
    if plan_of is not None and not callable(plan_of):
        hint = "pass a function of a density and a batch size that returns a SparsityPlan"
        raise InputError("not a function", where="plan_of", got=shown(plan_of), hint=hint)
    if static is not None:
        check_type(static, Static, where="static", hint="pass what static_selector returned")
    if source is not None:
        check_type(source, Mapping, where="source", hint="pass a mapping, such as {'path': 'model'}")


def find_selectors(
    bundle: Bundle, given: Iterable[str] | Mapping[str, Selector], static: Static | None, seed: int
) -> tuple[dict[str, Selector], list[str]]:
    """Selectors by name, and notes about those left out.

    Raises:
      InputError: a name is unknown, or only "static" is asked for without scores.
      SparsityError: there are no routers, or a selector is for another model.
    """
    notes: list[str] = []
    if isinstance(given, Mapping):
        found = {str(name): _checked_selector(str(name), each) for name, each in given.items()}
    else:
        asked = _several("selectors", given)
        names = list(check_choices("selectors", asked, SELECTORS)) if asked else []
        if "static" in names and static is None:
            what = "static needs scores from a text of its own (--static-text)"
            if len(names) == 1:
                raise InputError(what, where="selectors", hint="give --static-text FILE, or static=")
            names.remove("static")
            notes.append(f"{what}, and is left out")
        if "router" in names:
            bundle.require("routers", where="selectors")
        key = random_key(seed, where="seed")
        oracle = Oracle() if bundle.routers is None else Oracle.like(bundle.routers)
        every = {"router": bundle.routers, "oracle": oracle, "random": Random(key), "static": static}
        found = {name: every[name] for name in names}
        if any(mean is not None for mean in oracle.means) and set(names) & {"random", "static"}:
            notes.append("random and static leave zeros where router and oracle fill in mean outputs")
    for each in found.values():
        each.check(bundle.model.config)  # pyrefly: ignore[missing-attribute]
    return found, notes  # pyrefly: ignore[bad-return]


def can_decode(
    selectors: Mapping[str, Selector], protocols: Sequence[str]
) -> tuple[dict[str, Selector], list[str]]:
    """The selectors of protocol "decode", and notes about those that can't; raises `InputError` if none is left."""
    if "decode" not in protocols or not selectors:
        return {}, []
    masking = [name for name, each in selectors.items() if isinstance(each, MASK_ONLY)]
    able = {name: each for name, each in selectors.items() if name not in masking}
    if not able and "masked" not in protocols:
        raise InputError(
            "no selector can decode",
            where="selectors",
            got=", ".join(masking),
            expected="router or static",
            hint="add one, or use protocol masked",
        )
    be = "needs" if len(masking) == 1 else "need"
    note = f"{' and '.join(masking)} {be} what decoding skips, and can only be masked"
    return able, [note] if masking else []


def _checked_selector(name: str, given: Any) -> Selector:
    if isinstance(given, type) or not isinstance(given, Selector):
        raise SparsityError(
            "not a selector",
            where=f"selectors[{name!r}]",
            got=type(given).__name__,
            expected="Routers, or another Selector",
            hint="pass for example bundle.routers, or Oracle()",
        )
    return given


def _several(name: str, given: Any) -> list[Any]:
    """The items of a list, tuple or array, or a mapping's names; raises `InputError` for a single value or text."""
    found = items(list(given) if isinstance(given, Mapping | Set) else given)
    if found is None:
        raise InputError(
            f"{name} is not a sequence", where="sweep", got=shown(given), hint=f"pass {name}=[...]"
        )
    return list(found)
