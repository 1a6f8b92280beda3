"""Reads and checks options that several verbs share: seeds, sizes, densities."""

from typing import TYPE_CHECKING, Any

from polarjax.errors import InputError

if TYPE_CHECKING:
    from polarjax.configs import ModelConfig
    from polarjax.types import Array, Key

UNITS = {"gigabytes": 10**9, "megabytes": 10**6}
MOST = 1e9  # of either: more than any device or disk has


def random_key(seed: int) -> "Key[Array, '']":
    """The random key of `--seed`; raises `InputError` if JAX has none for it."""
    from polarjax.generation import checks

    return checks.random_key(seed, where="--seed")


def window_length(window: int | None, config: "ModelConfig") -> int:
    """The tokens of each window for `--window`: by default 512, or as many as the model has positions."""
    return min(512, config.max_positions) if window is None else window


def bytes_of(size: float, option: str, unit: str = "gigabytes") -> int:
    """The bytes in so many of `UNITS`; raises `InputError`, naming `option`, if it is not a size."""
    if not 0 <= size <= MOST:  # NaN is neither
        expected = f"{unit}, at most {MOST:,.0f}"
        raise InputError(
            "not a size", where=option, got=size, expected=expected, hint="give a number such as 5"
        )
    return int(size * UNITS[unit])


def check_dense(dense: bool, density: object, *, option: str = "--head-density") -> None:
    """Raises `InputError` if `--dense` and a density are given."""
    if dense and density is not None:
        raise InputError(f"--dense and {option} contradict each other", hint="give one of them")


def check_goes_with(option: str, given: bool, other: str, there: bool) -> None:
    """Raises `InputError` if `option` is given without the `other` one, alone with which it means something."""
    if given and not there:
        raise InputError(f"{option} is for {other}", hint=f"give {other} too, or leave it out")


def placement(mesh: str | None, attention: str | None) -> dict[str, Any]:
    """The arguments of `pj.load` that `--mesh` and `--attention` ask for; none without `--mesh`."""
    check_goes_with("--attention", attention is not None, "--mesh", mesh is not None)
    if mesh is None:
        return {}
    from polarjax.sharding import described_mesh

    return {**described_mesh(mesh, where="--mesh"), "attention": attention}
