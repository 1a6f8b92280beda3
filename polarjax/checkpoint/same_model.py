"""Whether the processes of many hosts have the same model and mesh."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from polarjax.checkpoint.learned import PLANS
from polarjax.checkpoint.manifest import ROUTERS
from polarjax.distributed.start import group
from polarjax.errors import InputError
from polarjax.model.decoder import Decoder
from polarjax.model.parameters import fingerprint
from polarjax.storage.fingerprint import short
from polarjax.storage.record import digest, digests, files


def agree_on_model(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Returns when all processes have called this with the same model: weights, tokenizer, routers and plans.

    Raises:
      InputError: they have different ones; every process raises it.
    """
    hosts = group()
    if hosts is None:
        return
    weights = manifest.get("fingerprint")  # earlier versions did not record it
    about = {
        "their models": short(str(weights)) if weights else _sum(manifest["params"]),
        "their model's config.json": _file(folder / "config.json"),
        "their tokenizers": _sum(digests(folder / "tokenizer", files(folder / "tokenizer"))),
        "their routers": _file(folder / ROUTERS / "manifest.json"),
        "their plans": _file(folder / PLANS),
    }
    hosts.agree(about, hint="copy one model directory to every machine")


def agree_on_mesh(mesh: jax.sharding.Mesh, attention: str, model: Decoder | None = None) -> None:
    """Returns when all processes have called this for the same mesh, and for a `model` with the same fingerprint.

    Raises:
      InputError: they differ, and every process raises it; or the mesh has devices of some processes only.
    """
    hosts = group()
    if hosts is None:
        return
    owners = sorted({device.process_index for device in mesh.devices.flat})
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    where = "its own devices" if owners == [hosts.process_id] else f"devices of processes {owners}"
    about = {"their meshes": f"{sizes} of {where}", "their attention": attention}
    ids = [] if len(owners) == 1 else [device.id for device in mesh.devices.flat]
    about["the order of their devices"] = ", ".join(map(str, ids))
    about["their models"] = "" if model is None else short(fingerprint(model))
    every = f"all {jax.device_count()} devices of all processes"
    hosts.agree(about, hint=f"make the same mesh of the same model everywhere, of {every}")
    if len(owners) not in (1, hosts.count):
        got = f"{where} of {hosts.count}"
        raise InputError("the mesh leaves out some processes", where="mesh", got=got, hint=f"use {every}")


def _file(path: Path) -> str:
    return digest(path.open("rb"))["sha256"][:16] if path.is_file() else "none"


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
