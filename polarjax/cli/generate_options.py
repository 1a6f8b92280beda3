"""The options of `polarjax generate`, as the files that carry it out get them."""

import dataclasses
from pathlib import Path
from typing import Any

_STANDARD_OUTPUT = tuple(map(Path, ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The parameters of `generate`, with the same names; an output that is named /dev/stdout is `-`."""

    folder: Path
    prompt: list[str] | None
    prompts: Path | None
    output: Path | None
    overwrite: bool
    resume: bool
    slots: int | None
    capacity: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    greedy: bool
    stop: list[str] | None
    stop_id: list[int] | None
    num_return_sequences: int
    logprobs: int | None
    seed: int
    chat: bool
    system: str | None
    stream: bool
    dense: bool
    head_density: float | None
    dtype: str | None
    mesh: str | None
    attention: str | None
    timed: bool

    def __post_init__(self) -> None:
        if self.output in _STANDARD_OUTPUT:  # may be a file by now, in which messages would overwrite lines
            object.__setattr__(self, "output", Path("-"))

    @property
    def drawing(self) -> dict[str, Any]:
        """The sampling options: arguments of `GenerationSettings.with_flags`."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}
