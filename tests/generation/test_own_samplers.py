"""Samplers of users that don't draw the ids of tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from tests.model import zoo
from tests.one_line import refuses

TOKENS, LENGTHS = zoo.batch()


def generate(sampler):
    return pj.generate(zoo.model("opt"), TOKENS, LENGTHS, max_new_tokens=2, sampler=sampler)


@dataclasses.dataclass(frozen=True)
class Always:
    """A sampler that returns the same thing whatever the logits are."""

    value: object
    shape: tuple[int, ...] = (3,)
    dtype: object = jnp.int32

    def __call__(self, logits, key):
        return jnp.full(self.shape, self.value, self.dtype)


@pytest.mark.parametrize(
    "sampler",
    [Always(3, ()), Always(3, (3, 1)), Always(0.5, (3,), jnp.float32)],
    ids=lambda each: str(each.shape),
)
def test_samplers_that_draw_no_ids(sampler):
    with pytest.raises(pj.PolarjaxError) as refused:
        generate(sampler)
    assert "\n" not in str(refused.value)


class Least(pj.Greedy):
    """A sampler that inherits from one of ours."""

    def __call__(self, logits, key=None):
        return jnp.argmin(logits, -1).astype(jnp.int32)


def test_samplers_that_inherit_draw_by_themselves():
    made, greedy = generate(Least()), generate(pj.Greedy())
    assert not np.asarray(made.failed).any()
    assert (np.asarray(made.tokens) != np.asarray(greedy.tokens)).all()
    engine = pj.Engine(pj.Bundle(zoo.model("opt")), slots=1, capacity=8)
    with refuses(pj.InputError, "a slot can't draw with this sampler"):
        engine.submit([1], max_new_tokens=2, sampler=Least())


@pytest.mark.parametrize("value", [1000, -5])
def test_ids_outside_the_vocabulary_fail_their_rows(value):
    made = generate(Always(value))
    assert np.asarray(made.failed).all()
