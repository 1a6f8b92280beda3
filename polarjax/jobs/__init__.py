"""Many prompts: lines of a file or rows of a data set as requests to an engine, and their answers."""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.jobs.ray_data import CompletePrompts
else:
    __getattr__, __dir__ = lazy_names(__name__, {"polarjax.jobs.ray_data": "CompletePrompts"})

__all__ = ["CompletePrompts"]
