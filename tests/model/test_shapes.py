"""The table of parameters says of every kind of decoder what it has, in the order in which JAX walks it."""

import jax
import pytest
from flax import nnx

import polarjax as pj
from polarjax.model.parameters import abstract, parameters
from polarjax.model.shapes import shapes
from tests.model import zoo


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_table_lists_the_parameters_of_the_decoder(name):
    config = zoo.CONFIGS[name]
    made = {path: leaf.shape for path, leaf in parameters(abstract(config)).items()}
    assert list(shapes(config).items()) == list(made.items())


@pytest.mark.parametrize("name", ["opt-350m", "qk-norm"])
def test_a_decoder_without_random_numbers_is_the_shape_of_one_with(name):
    config = zoo.CONFIGS[name]
    made = nnx.eval_shape(lambda: pj.Decoder(config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(abstract(config)) == jax.tree.structure(made)
    assert jax.tree.leaves(abstract(config)) == jax.tree.leaves(made)
