"""Reads a model directory (for the layout, see `polarjax.checkpoint.bundle`) onto a device, or onto a mesh of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from polarjax.checkpoint.bundle import Bundle, needed_tokenizer
from polarjax.checkpoint.group_order import in_group_order
from polarjax.checkpoint.learned import PLANS, ROUTERS, marked, plans_alone, read_plans, read_routers
from polarjax.checkpoint.manifest import (
    AGAIN,
    check_parameters,
    read_config,
    read_manifest,
    read_source_config,
)
from polarjax.checkpoint.same_model import agree_on_mesh, agree_on_model
from polarjax.model.layout import Layout
from polarjax.model.layout_checks import check_no_mesh
from polarjax.model.mesh_shape import Attention
from polarjax.model.parameters import abstract, fingerprint, with_parameters
from polarjax.sharding import layout_for, parameter_shardings
from polarjax.storage.array_reader import read_arrays
from polarjax.storage.atomic import absolute, reading
from polarjax.storage.dtypes import check_dtype
from polarjax.text.tokenizer import Tokenizer, has_tokenizer
from polarjax.types import DTypeLike


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str | None] | None = None,
    attention: Attention | None = None,
) -> Bundle:
    """Reads a model directory onto the default device, or onto a mesh: every device gets its own parts from the disk.

    Args:
      path: the directory.
      dtype: the parameters' dtype, "float32", "bfloat16" or "float16"; None keeps the stored one. Routers keep theirs.
      mesh, rules, attention: the devices and how the model lies on them, as in `shard`; no mesh is the default device.

    Raises:
      InputError: `dtype` is not one of these, or the mesh doesn't divide the model (see `shard`).
      CheckpointError: a part is missing or damaged, or was written by a newer polarjax.
      SparsityError: routers or plans are for another model or other weights.
    """
    if mesh is None:
        check_no_mesh(rules=rules, attention=attention)
        return _read(path, dtype, routers=True, plans=True)
    with reading(absolute(path)):
        plans = plans_alone(absolute(path))
    layout = layout_for(mesh, plans, rules=rules, attention=attention)
    agree_on_mesh(mesh, layout.attention)  # processes that read different parts would wait for each other
    return in_group_order(_read(path, dtype, routers=True, plans=True, layout=layout), layout)


def load_to_learn(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    routers: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str | None] | None = None,
    attention: Attention | None = None,
) -> Bundle:
    """`load` without the parts that are about to be replaced: the plans and, unless `routers`, the routers."""
    layout = None if mesh is None else layout_for(mesh, None, rules=rules, attention=attention)
    return _read(path, dtype, routers=routers, plans=False, layout=layout)


def _read(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None,
    *,
    routers: bool,
    plans: bool,
    layout: Layout | None = None,
) -> Bundle:
    dtype = None if dtype is None else check_dtype(dtype)
    folder = absolute(path)
    with reading(folder):
        return _bundle(folder, dtype, routers, plans, layout)


def _bundle(folder: Path, dtype: Any, routers: bool, plans: bool, layout: Layout | None) -> Bundle:
    manifest = read_manifest(folder)
    agree_on_model(folder, manifest)
    config = read_config(folder)
    check_parameters(manifest, config, folder)
    shardings = None if layout is None else parameter_shardings(abstract(config), layout)
    flat = read_arrays(folder / "params", manifest["params"], dtype=dtype, shardings=shardings, hint=AGAIN)
    model = with_parameters(config, flat, layout=layout)
    weights = fingerprint(model)
    tokenizer, kind = folder / "tokenizer", manifest["model_type"]
    stored = str(manifest.get("fingerprint") or weights)  # earlier versions did not record it
    found = read_routers(folder / ROUTERS, config, stored, layout) if routers else None
    table = read_plans(folder / PLANS, config, stored, found) if plans else None
    return Bundle(
        model=model,
        tokenizer=Tokenizer.load(tokenizer, model_type=kind) if has_tokenizer(tokenizer) else None,
        routers=marked(found, weights),
        plans=marked(table, weights),
        model_type=kind,
        source_config=read_source_config(folder),
        weights=weights,
    )


def load_with_tokenizer(
    folder: str | os.PathLike[str], dtype: str | None = None, *, to_learn: bool = False, **placement: Any
) -> tuple[Bundle, Tokenizer]:
    """Reads a model directory and its tokenizer; `to_learn` skips routers and plans, which will be replaced.

    `placement` is a mesh and what else `load` takes with it.

    Raises:
      CheckpointError: the directory is missing or damaged, or has no tokenizer.
      InputError: a decoder can't have this `dtype`, or the mesh doesn't divide it.
    """
    if dtype is not None:
        check_dtype(dtype, where="--dtype")
    bundle = (load_to_learn if to_learn else load)(folder, dtype=dtype, **placement)
    return bundle, needed_tokenizer(bundle, absolute(folder) / "tokenizer")
