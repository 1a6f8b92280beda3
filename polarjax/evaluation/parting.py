"""How long greedy texts of the sparse model stay equal to those of the dense model."""

import dataclasses
from typing import Any

import jax
import numpy as np

from polarjax.errors import not_finite
from polarjax.evaluation.estimates import ratio
from polarjax.evaluation.paired import batches
from polarjax.generation.generate import generate
from polarjax.model.decoder import Decoder
from polarjax.model.readable import fetched
from polarjax.numeric import spread
from polarjax.selection.selectors import Sparsity
from polarjax.types import Int


@dataclasses.dataclass(frozen=True)
class GreedyOptions:
    """What is generated to see where texts part.

    Attributes:
      prompts: number of prompts, cut from the starts of windows spread over the text; at least a batch is used.
      prompt_tokens: tokens of each prompt, BOS included.
      new_tokens: tokens generated; texts that are still equal then are counted with this number ("censored").
    """

    prompts: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 64


def prompts_of(
    windows: Int[np.ndarray, "n T"], options: GreedyOptions, batch_size: int
) -> Int[np.ndarray, "m P"]:
    """The starts of m windows, spread evenly; m is `prompts`, at least `batch_size` and at most n."""
    return windows[spread(len(windows), max(options.prompts, batch_size)), : options.prompt_tokens]


def greedy_texts(
    model: Decoder,
    prompts: Int[np.ndarray, "m P"],
    sparsity: Sparsity | None,
    *,
    batch_size: int,
    new_tokens: int,
) -> Int[np.ndarray, "m new"]:
    """The greedy continuation of each prompt by `generate`, in full batches; nothing ends it early."""
    made = np.zeros((len(prompts), new_tokens), np.int32)
    for index, count in batches(len(prompts), batch_size):
        lengths = np.full(batch_size, prompts.shape[1], np.int32)
        result = generate(
            model,
            jax.device_put(prompts[index]),
            jax.device_put(lengths),
            max_new_tokens=new_tokens,
            sparsity=sparsity,
        )
        tokens, failed = fetched((result.tokens, result.failed))
        if failed.any():
            raise not_finite("greedy texts", f"{int(failed.sum())} of {batch_size} sequences")
        made[index[:count]] = tokens[:count]
    return made


def parting(dense: Int[np.ndarray, "m new"], sparse: Int[np.ndarray, "m new"]) -> dict[str, Any]:
    """Equal tokens before two texts part: median, mean with its error, and how many never part within M tokens."""
    most = dense.shape[1]
    differ = np.concatenate([dense != sparse, np.ones((len(dense), 1), bool)], 1)
    equal = np.argmax(differ, 1)
    return {
        "median": float(np.median(equal)),
        "mean": ratio(equal.astype(np.float64), np.ones(len(equal), np.int64)),
        "censored": int(np.sum(equal == most)),
        "prompts": len(equal),
        "most": most,
    }
