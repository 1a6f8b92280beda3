"""`polarjax eval agreement`: how often the sparse model predicts and writes what the dense one does."""

from typing import Annotated, Any

import typer

from polarjax.cli import evaluating as shared
from polarjax.cli.decoding_options import Attention, Mesh

Prompts = Annotated[int, typer.Option(help="Prompts cut from the text, to see where greedy texts part.")]
PromptTokens = Annotated[int, typer.Option(help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option(help="Tokens written greedily after each prompt.")]


def eval_agreement(
    folder: shared.Folder,
    text: shared.Texts,
    prompts: Prompts = 32,
    prompt_tokens: PromptTokens = 32,
    new_tokens: NewTokens = 64,
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
    dtype: shared.Dtype = None,
    mesh: Mesh = None,
    attention: Attention = None,
    report: shared.ReportFile = None,
    picture: shared.Picture = None,
    overwrite: shared.Overwrite = False,
) -> dict[str, Any]:
    """Measure how close sparse is to dense: KL divergence, same next token, and tokens until greedy texts part.

    Greedy texts are written in protocol decode, at each batch size.
    """
    given = locals()
    from polarjax.evaluation.parting import GreedyOptions

    greedy = GreedyOptions(*(given.pop(name) for name in ("prompts", "prompt_tokens", "new_tokens")))
    return shared.run(shared.EvalOptions(**given, dense=False), "agreement", greedy)
