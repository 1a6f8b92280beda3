"""Every axis of every parameter has a logical name, the same wherever it means the same."""

import pytest

from polarjax.model.parameters import abstract
from polarjax.model.shapes import shapes
from polarjax.sharding import logical_axes
from tests.model import zoo


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_axes_are_named_for_what_they_are(name):
    config = zoo.CONFIGS[name]
    sizes = {
        "vocab": {config.vocab_size},
        "embed": {config.d_model},
        "neurons": {config.d_ff},
        "groups": {config.num_kv_heads},
        "queries": {config.num_heads // config.num_kv_heads},
    }
    axes, expected = logical_axes(abstract(config)), shapes(config)
    assert axes.keys() == expected.keys()
    for name, names in axes.items():
        assert len(names) == len(expected[name])
        for axis, size in zip(names, expected[name], strict=True):
            assert size in sizes.get(axis, {size}), (name, axis)
    assert {axis for names in axes.values() for axis in names} <= {*sizes, "positions", "table", "head"}
