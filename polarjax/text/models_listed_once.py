"""Halves the work of importing a tokenizer class from transformers, which lists its models twice."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def models_listed_once() -> Iterator[None]:
    """In the block, importing `transformers.models` reuses the list that importing `transformers` made.

    Each list means reading thousands of files. transformers keeps the first one, but under the folder's path, and then
    asks for the path of the folder's `__init__.py`. Does nothing if `transformers.models` is already imported.
    """
    from transformers.utils import import_utils

    make_list: Any = getattr(import_utils, _NAME, None)
    if make_list is None or "transformers.models" in sys.modules:
        yield
        return

    def by_folder(path: str | Path) -> Any:
        path = Path(path)
        return make_list(path.parent if path.name == "__init__.py" else path)

    setattr(import_utils, _NAME, by_folder)
    try:
        yield
    finally:
        setattr(import_utils, _NAME, make_list)


_NAME = "create_import_structure_from_path"
