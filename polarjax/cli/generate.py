"""`polarjax generate`: continue prompts with a model directory, dense or sparse."""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from polarjax.checkpoint import Bundle
from polarjax.cli.inputs import load_with_tokenizer
from polarjax.configs import ModelConfig
from polarjax.data import read_text
from polarjax.errors import InputError
from polarjax.generate import Generation
from polarjax.generate import generate as continue_prompts
from polarjax.sampling import Categorical, Greedy, Sampler
from polarjax.sparsity.plan import SparsityPlan
from polarjax.sparsity.select import Sparsity


def generate(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add to each prompt.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="Draw at this temperature, not greedily.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the nucleus of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="Skip nothing, even if there are routers.")] = False,
    head_density: Annotated[float | None, typer.Option(help="Fraction of heads (groups) to keep.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation; default: as stored.")] = None,
    timed: Annotated[bool, typer.Option("--timed", help="Run twice and time the compiled run.")] = False,
) -> dict[str, Any]:
    """Continue one or more prompts, all in one batch: sparse where the model has routers, dense otherwise."""
    if dense and head_density is not None:
        raise InputError("--dense and --head-density contradict each other", mend="give one of them")
    texts = _texts(prompt, prompts)
    sampler = _sampler(temperature, top_k, top_p)
    bundle, tokenizer = load_with_tokenizer(folder, dtype)
    tokens, lengths = tokenizer.encode(texts)
    sparsity = _sparsity(bundle, len(texts), dense, head_density)

    def run() -> Generation:
        made = continue_prompts(
            bundle.model,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            jax.random.key(seed),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            sparsity=sparsity,
        )
        return jax.block_until_ready(made)

    if timed:
        run()
    started = time.perf_counter()
    made = run()
    seconds = time.perf_counter() - started
    written = np.asarray(made.lengths)
    result = {
        "prompts": texts,
        "texts": tokenizer.decode(np.asarray(made.tokens), written),
        "tokens": written.tolist(),
        "stopped": np.asarray(made.stopped).tolist(),
        "seconds": seconds,
        "tokens_per_second": int(written.sum()) / seconds,
        "compilation_included": not timed,
        "density": None if sparsity is None else densities(sparsity.plan, bundle.model.config),
    }
    _print(result)
    return result


def densities(plan: SparsityPlan, config: ModelConfig) -> dict[str, float]:
    """Mean fraction over all layers of the neurons and the groups that `plan` keeps."""
    mean = lambda counts, full: float(np.mean([(count or full) / full for count in counts]))
    return {
        "neurons": mean(plan.neurons, config.d_ff),
        "groups": mean(plan.groups, config.num_kv_heads),
    }


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    lines = [] if prompts is None else [line for line in read_text(prompts).splitlines() if line.strip()]
    texts = [*(prompt or []), *lines]
    if not texts:
        raise InputError("no prompt", mend="give --prompt TEXT or --prompts FILE")
    return texts


def _sampler(temperature: float | None, top_k: int | None, top_p: float | None) -> Sampler:
    if temperature is None and top_k is None and top_p is None:
        return Greedy()
    return Categorical(1.0 if temperature is None else temperature, top_k, top_p)


def _sparsity(bundle: Bundle, batch_size: int, dense: bool, head_density: float | None) -> Sparsity | None:
    if dense:
        return None
    if head_density is None and (bundle.routers is None or bundle.plans is None):
        print("The model has no routers yet, so this is dense; polarjax sparsify learns them.")
        return None
    return bundle.sparsity(batch_size, head_density)


def _print(result: dict[str, Any]) -> None:
    for prompt, text in zip(result["prompts"], result["texts"], strict=True):
        print(f"\n--- {prompt}\n{prompt}{text}")
    density = result["density"]
    kept = (
        "dense"
        if density is None
        else "keeping {neurons:.0%} of neurons, {groups:.0%} of heads".format(**density)
    )
    note = ", compilation included" if result["compilation_included"] else ""
    total, seconds, rate = sum(result["tokens"]), result["seconds"], result["tokens_per_second"]
    print(f"\n{total} tokens in {seconds:.2f} s, {rate:.0f} tokens/s{note}; {kept}")
