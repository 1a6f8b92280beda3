"""`polarjax eval perplexity`: perplexity of a model on text, dense and sparse, and how often the two agree."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polarjax.errors import InputError
from polarjax.selection.plans import densities

if TYPE_CHECKING:
    from polarjax.evaluation.checks import Mode
    from polarjax.evaluation.text_perplexity import Perplexity
    from polarjax.selection.selectors import Sparsity


def eval_perplexity(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    text: Annotated[
        list[Path], typer.Option(help="A UTF-8 text (.txt, .txt.xz); may be given several times.")
    ],
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: up to 512.")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens to score, spread evenly.")
    ] = 32_768,
    batch_size: Annotated[int, typer.Option(help="Windows per batch, also when decoding.")] = 8,
    context: Annotated[
        int, typer.Option(help="Tokens at the start of a window, read dense and not scored.")
    ] = 1,
    head_density: Annotated[float | None, typer.Option(help="Fraction of heads (groups) to keep.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Measure only the dense model.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Dtype to compute in; default: as stored.")] = None,
) -> dict[str, Any]:
    """Measure perplexity on text, dense and sparse: with selection masked at every position, and as in decoding."""
    from polarjax.checkpoint.bundle import load_with_tokenizer
    from polarjax.evaluation import agreement, perplexity
    from polarjax.text.corpus import read_text
    from polarjax.text.token_windows import scored_windows

    if dense and head_density is not None:
        raise InputError("--dense and --head-density contradict each other", hint="pass only one of them")
    texts = [read_text(path) for path in text]
    bundle, tokenizer = load_with_tokenizer(folder, dtype)
    length = min(512, bundle.model.config.max_positions) if window is None else window
    source = ", ".join(map(str, text))
    sparse: dict[Mode, Sparsity] = {}
    if not dense:  # fail here, before anything is measured
        sparse = {
            "masked": bundle.sparsity(1, head_density),
            "decode": bundle.sparsity(batch_size, head_density),
        }
        _check_context(context, length)
    windows = scored_windows(texts, tokenizer, length, most=max_tokens // max(length, 1), source=source)
    tokens, num_bytes = windows.tokens, windows.scored_bytes(context)
    options: dict[str, Any] = {"batch_size": batch_size, "context": context}
    measured = perplexity(bundle.model, tokens, scored=windows.scored, **options, description="dense")
    result: dict[str, Any] = {
        "windows": len(tokens),
        "window": length,
        **options,
        "scored_tokens": measured.tokens,
        "scored_bytes": num_bytes,
        "dense": _numbers(measured, num_bytes),
    }
    _print_dense(result)
    for mode, sparsity in sparse.items():
        common: dict[str, Any] = {"mode": mode, **options, "scored": windows.scored}
        common["description"] = f"sparse, {mode}"
        result[mode] = {
            "density": densities(sparsity.plan, bundle.model.config),
            **_numbers(perplexity(bundle.model, tokens, sparsity=sparsity, **common), num_bytes),
            **agreement(bundle.model, tokens, sparsity, **common).to_json(),
        }
        _print_sparse(mode, result)
    return result


def _check_context(context: int, length: int) -> None:
    """Raises `InputError` if mode "decode" would have no token to score."""
    from polarjax.evaluation.checks import largest_context

    largest = largest_context(length, "decode")
    if not 0 <= context <= largest:
        raise InputError(
            "no token is left to score",
            where="--context",
            got=f"{context} of {length} tokens",
            expected=f"0 to {largest}" if largest >= 0 else "a longer window",
            hint="lower --context or raise --window",
        )


def _numbers(measured: "Perplexity", num_bytes: int) -> dict[str, float]:
    return measured.to_json() | {"bits_per_byte": measured.bits_per_byte(num_bytes)}


def _print_dense(result: dict[str, Any]) -> None:
    print("{windows} windows of {window} tokens, {scored_tokens} tokens scored".format(**result))
    print("dense   perplexity {perplexity:8.3f}   {bits_per_byte:.3f} bits/byte".format(**result["dense"]))


def _print_sparse(mode: str, result: dict[str, Any]) -> None:
    row, base = result[mode], result["dense"]["perplexity"]
    change = row["perplexity"] / base - 1
    print(
        f"{mode}  perplexity {row['perplexity']:8.3f}   {row['bits_per_byte']:.3f} bits/byte   {change:+.1%}, "
        f"same next token {row['top1']:.1%}, KL {row['kl']:.4f} nats, "
        "keeping {neurons:.0%} of neurons, {groups:.0%} of heads".format(**row["density"])
    )
