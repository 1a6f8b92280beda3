"""Many hosts: processes that find each other, agree on what they run, and end together."""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.distributed.start import initialize
else:
    __getattr__, __dir__ = lazy_names(__name__, {"polarjax.distributed.start": "initialize"})

__all__ = ["initialize"]
