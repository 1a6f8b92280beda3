"""JAX's persistent cache of compiled programs, in the user's cache folder: later runs don't compile again."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

OFF = "--no-compile-cache"


@contextlib.contextmanager
def compile_cache(wanted: bool = True) -> Iterator[None]:
    """Turns the cache on for the block, unless the user has configured JAX's own.

    Prints one line to standard error when it creates the folder, or when the folder can't be used; then runs without
    a cache.

    Args:
      wanted: False does nothing.
    """
    import jax

    config = jax.config
    if not wanted or not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir is not None:
        yield
        return
    folder = _usable()
    if folder is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache as cache

    config.update("jax_compilation_cache_dir", str(folder))
    cache.reset_cache()  # JAX remembers whether there was a cache when it first compiled
    try:
        yield
    finally:
        config.update("jax_compilation_cache_dir", None)
        cache.reset_cache()


def cache_folder() -> Path:
    """Folder of compiled programs: under XDG_CACHE_HOME, or the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore relative paths
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "polarjax" / "compiled"


def _usable() -> Path | None:
    """The folder, created if needed; None if it isn't writable."""
    try:
        folder = cache_folder()
        new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} can't be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        print(
            f"polarjax: compiled programs are not kept: {error}. Hint: set XDG_CACHE_HOME, or {OFF}",
            file=sys.stderr,
        )
        return None
    if new:
        print(
            f"polarjax: compiled programs are kept in {folder} for the next start; {OFF} keeps none",
            file=sys.stderr,
        )
    return folder
