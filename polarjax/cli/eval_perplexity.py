"""`polarjax eval perplexity`: perplexity of a model on text, dense and sparse, over densities and selectors."""

from typing import Any

from polarjax.cli import evaluating as shared
from polarjax.cli.decoding_options import Attention, Mesh


def eval_perplexity(
    folder: shared.Folder,
    text: shared.Texts,
    densities: shared.Densities = None,
    selectors: shared.Selectors = "router",
    protocols: shared.Protocols = "masked,decode",
    batch_sizes: shared.BatchSizes = None,
    window: shared.Window = None,
    stride: shared.Stride = None,
    max_tokens: shared.MaxTokens = shared.MAX_TOKENS,
    context: shared.Context = 1,
    neurons: shared.Neurons = "plan",
    dense_layers: shared.DenseLayers = None,
    static_text: shared.StaticText = None,
    seed: shared.Seed = 0,
    dense: shared.Dense = False,
    dtype: shared.Dtype = None,
    mesh: Mesh = None,
    attention: Attention = None,
    report: shared.ReportFile = None,
    picture: shared.Picture = None,
    overwrite: shared.Overwrite = False,
) -> dict[str, Any]:
    """Measure perplexity on text, dense and sparse: with selection masked at every position, and as in decoding.

    Figures are per token, byte and word, with standard errors over windows; the increases are paired with dense.
    """
    return shared.run(shared.EvalOptions(**locals()), "perplexity")
