"""What several verbs read alike: seeds, sizes, a model directory with its tokenizer, texts cut into token windows."""

from typing import TYPE_CHECKING

from polarjax.errors import InputError

if TYPE_CHECKING:
    from polarjax.types import Array, Key

MOST_GIGABYTES = 1e9  # more than any device or disk has
SEEDS = range(-(2**63), 2**63)  # what JAX takes


def random_key(seed: int) -> "Key[Array, '']":
    """The random key of `--seed`; raises `InputError` if JAX has none for it."""
    if seed not in SEEDS:
        expected = f"{SEEDS[0]} to {SEEDS[-1]}"
        raise InputError("no such seed", where="--seed", got=seed, expected=expected, hint="give 0, 1, 2, …")
    import jax

    return jax.random.key(seed)


def bytes_of(gigabytes: float, option: str) -> int:
    """How many bytes the number given for `option` is; raises `InputError` if it is no size."""
    if not 0 <= gigabytes <= MOST_GIGABYTES:  # NaN is neither
        expected = f"gigabytes, at most {MOST_GIGABYTES:,.0f}"
        raise InputError(
            "not a size", where=option, got=gigabytes, expected=expected, hint="give a number such as 5"
        )
    return int(gigabytes * 1e9)
