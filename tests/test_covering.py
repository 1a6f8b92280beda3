"""The cases that stand for a whole product."""

import itertools

from tests.covering import covering_pairs


def pairs(cases):
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def test_every_pair_of_values_remains_in_fewer_cases():
    cases = list(itertools.product("abcdef", (1, 2, 3), (True, False)))
    few = covering_pairs(cases)
    assert pairs(few) == pairs(cases)
    assert len(few) == 18  # six letters times three numbers


def test_cases_that_are_no_product():
    cases = [
        {"x": 1, "y": 1, "z": 1},
        {"x": 1, "y": 1, "z": 2},
        {"x": 2, "y": 2, "z": 2},
        {"x": 1, "y": 1, "z": 2},
    ]
    assert covering_pairs(cases, lambda case: (case["x"], case["y"], case["z"])) == cases[:3]
    assert covering_pairs([]) == []
