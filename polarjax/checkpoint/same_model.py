"""Whether the processes of many hosts have the same model directory, each on its own disk."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polarjax.checkpoint.learned import PLANS
from polarjax.checkpoint.manifest import ROUTERS
from polarjax.distributed.start import group
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


def _file(path: Path) -> str:
    return digest(path.open("rb"))["sha256"][:16] if path.is_file() else "none"


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
