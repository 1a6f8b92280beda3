"""What a HuggingFace folder contains and whether it can be converted; reads config.json and headers only."""

import dataclasses
from pathlib import Path

from checkpoints_convert.convert import parameter_dtype
from checkpoints_convert.hf_config import CONFIG, read_config
from checkpoints_convert.hub import SAFE_PATTERNS, TORCH_PATTERNS, locate
from checkpoints_convert.rules import make_plan
from checkpoints_convert.weights_io import open_weights
from polarjax.configs import ModelConfig
from polarjax.errors import PolarjaxError
from polarjax.storage.atomic import absolute
from polarjax.storage.dtypes import check_dtype
from polarjax.types import DTypeLike
from polarjax.types import Path as PathLike


@dataclasses.dataclass(frozen=True)
class Description:
    """What a HuggingFace checkpoint is.

    Attributes:
      path: its folder.
      model_type: the family; None if unsupported.
      config: the model's configuration; None if unsupported.
      files: names of the weights files; empty if there are none (a hub model that was not downloaded).
      tensors: how many tensors become parameters; None without readable weights.
      num_bytes: their size in the source; None without readable weights.
      dtype: the parameters' dtype after conversion; None without readable weights.
      refused: why it cannot be converted, as `convert_checkpoint` would raise it; empty if it can.
    """

    path: Path
    model_type: str | None = None
    config: ModelConfig | None = None
    files: tuple[str, ...] = ()
    tensors: int | None = None
    num_bytes: int | None = None
    dtype: str | None = None
    refused: tuple[PolarjaxError, ...] = ()


def describe_checkpoint(
    src: PathLike, *, revision: str | None = None, dtype: DTypeLike | None = None
) -> Description:
    """Describes a HuggingFace checkpoint without reading its weights (only conversion finds NaN).

    Args:
      src: a folder, or the id of a model on the hub; only its config.json is downloaded.
      revision: branch, tag or commit of a model on the hub.
      dtype: the parameters' dtype after conversion; None keeps the source's.

    Raises:
      InputError: no parameter can have this `dtype`.
      CheckpointError: there is no such folder or model, or it has no config.json.
    """
    dtype = None if dtype is None else check_dtype(dtype)
    source = locate(src, revision=revision, weights=False)
    found = Description(source)
    try:
        family, config, _, named = read_config(source)
        found = dataclasses.replace(found, model_type=family.model_type, config=config)
        patterns = (*SAFE_PATTERNS, *TORCH_PATTERNS) if named is None else (named,)
        here = any(any(source.glob(each)) for each in patterns)
        if not here and source != absolute(src):
            return found
        tensors = open_weights(source, named)
        files = tuple(sorted({tensor.file.name for tensor in tensors.values()}))
        found = dataclasses.replace(found, files=files)
        plan = make_plan(family, config, {name: each.shape for name, each in tensors.items()}, where=source)
        used = [tensors[step.source] for step in plan.steps]
        return dataclasses.replace(
            found,
            tensors=len(used),
            num_bytes=sum(tensor.num_bytes for tensor in used),
            dtype=parameter_dtype(dtype, used, source).name,
        )
    except PolarjaxError as error:
        if not (source / CONFIG).is_file():
            raise
        return dataclasses.replace(found, refused=(error,))
