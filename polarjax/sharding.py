"""Logical axis names of the parameters; to shard a model, write a table of rules from them to mesh axes."""

import jax
from flax import nnx

from polarjax.model.decoder import Decoder
from polarjax.model.parameters import parameters


def logical_axes(model: Decoder) -> dict[str, tuple[str, ...]]:
    """The logical name of every axis of every parameter, by dotted path; `model` may be abstract.

    Names: vocab, positions, table (a narrower embedding), embed, neurons, groups, queries, head.
    """
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return {name: leaf.get_metadata("axes") for name, leaf in zip(parameters(model), variables, strict=True)}
