"""What polarjax uses of transformers, for pyright alone: the package itself is 2,700 files, as much as all the rest."""

from os import PathLike
from typing import Any

class PreTrainedConfig: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        config: PreTrainedConfig | None = ...,
        local_files_only: bool = ...,
        trust_remote_code: bool = ...,
    ) -> Any: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *, dtype: Any = ...
    ) -> Any: ...
