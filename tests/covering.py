"""Fewer cases of a product: enough that every pair of values is still in one of them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def covering_pairs[Case](
    cases: Iterable[Case], values: Callable[[Case], Sequence[Any]] = lambda case: case
) -> list[Case]:
    """Few of `cases` that hold every pair of `values` that any of them holds, in their order.

    A fault that one value causes, or two together, is found by them as by all; which other values stand beside the
    two changes from case to case. At each turn the case that adds most pairs is taken, so the result is always the same.
    """
    cases = list(cases)
    pairs = [set(itertools.combinations(enumerate(values(case)), 2)) for case in cases]
    missing, taken = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        taken.add(best)
    return [cases[i] for i in sorted(taken)]
