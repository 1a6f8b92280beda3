"""Keeps transformers from importing PyTorch, which takes seconds and which tokenizers don't use.

If PyTorch is installed, some transformers modules import it when they are imported.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def torch_on_use() -> Iterator[None]:
    """In the block, `import torch` gives a stand-in that loads the real module on first use, even after the block.

    Does nothing if PyTorch is already imported or not installed. After the block, `import torch` gives the real module.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    stand_in = _StandIn("torch")
    stand_in.__spec__ = spec  # transformers checks for it
    sys.modules["torch"] = stand_in
    try:
        yield
    finally:
        if sys.modules.get("torch") is stand_in:
            del sys.modules["torch"]


class _StandIn(ModuleType):
    """Stands in for `torch` until an attribute is used; then the real module replaces it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        torch = importlib.import_module("torch")
        for holder in [each for key, each in list(sys.modules.items()) if key.startswith("transformers.")]:
            if getattr(holder, "__dict__", {}).get("torch") is self:
                holder.__dict__["torch"] = torch
        return getattr(torch, name)
