"""Paths that orbax and TensorStore take literally."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """A path to `folder` without characters that orbax (glob patterns) or TensorStore (backslash) treat specially."""
    if not set("*?[\\") & set(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "link")
        link.symlink_to(folder.parent, target_is_directory=True)
        yield str(link / folder.name)
