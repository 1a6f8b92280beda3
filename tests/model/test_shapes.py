"""The table of parameters says of every kind of decoder what it has, in the order in which JAX walks it."""

import pytest

from polarjax.model.parameters import abstract, parameters
from polarjax.model.shapes import shapes
from tests.model import zoo


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_table_lists_the_parameters_of_the_decoder(name):
    config = zoo.CONFIGS[name]
    made = {path: leaf.shape for path, leaf in parameters(abstract(config)).items()}
    assert list(shapes(config).items()) == list(made.items())
