"""`polarjax eval harness`: tasks of lm-evaluation-harness, by name or from local files."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from polarjax.cli.decoding_options import Attention, HeadDensity, Mesh
from polarjax.cli.inputs import check_dense, placement
from polarjax.errors import InputError

FewShot = Annotated[int | None, typer.Option(help="Examples in each prompt; default: the task's.")]
Protocol = Annotated[
    str, typer.Option(help="masked: sparse at every token; decode: after the context, as in generation.")
]


def harness(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    tasks: Annotated[
        list[str],
        typer.Option(help="YAML file of a task, or name of one of lm-eval's; may be given several times."),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data of task files; default: the task file's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task; default: all.")] = None,
    few_shot: FewShot = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    head_density: HeadDensity = None,
    dense: Annotated[bool, typer.Option("--dense", help="Evaluate the dense model.")] = False,
    protocol: Protocol = "masked",
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences that run together; default: by their length.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype to compute in; default: as stored.")] = None,
    mesh: Mesh = None,
    attention: Attention = None,
    seed: Annotated[int, typer.Option(help="Random seed of the examples in prompts and of drawn texts.")] = 0,
    samples: Annotated[
        Path | None, typer.Option(help="File to write each item's answer to, one JSON object a line.")
    ] = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-evaluation-harness: sparse if it has routers and plans, otherwise dense."""
    from polarjax.checkpoint.loading import load_with_tokenizer
    from polarjax.evaluation.checks import Mode, check_mode
    from polarjax.evaluation.harness import HarnessLM
    from polarjax.evaluation.harness_tasks import load_tasks, run_tasks, summary

    check_dense(dense, head_density)
    check_mode(protocol, where="--protocol")
    _check_counts(limit, few_shot)
    if samples is not None:
        _check_new(samples)
    loaded = load_tasks(tasks, data=data)
    lm = HarnessLM(
        load_with_tokenizer(folder, dtype, **placement(mesh, attention))[0],
        sparsity=None if dense else "auto",
        head_density=head_density,
        mode=cast("Mode", protocol),
        batch_size="auto" if batch_size is None else batch_size,
        seed=seed,
    )
    results = run_tasks(
        lm,
        loaded,
        few_shot=few_shot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_random_seed=seed,
        log_samples=samples is not None,
    )
    made = {"model": folder, **lm.get_model_info(), "tasks": summary(results)}
    _print(made)
    if samples is not None:
        _write_samples(samples, results["samples"])
    return made


def _check_counts(limit: int | None, few_shot: int | None) -> None:
    """Raises `InputError` unless the numbers of items and examples make sense."""
    from polarjax.numeric import whole_number

    for name, value, least in (("--limit", limit, 1), ("--few-shot", few_shot, 0)):
        if value is not None:
            whole_number(value, name, where="eval harness", least=least)


def _check_new(file: Path) -> None:
    """Raises `PolarjaxError` if the file can't be written, before anything is measured."""
    from polarjax.storage.atomic import absolute, check_writable

    if file.exists():
        raise InputError("the file exists", where=file, hint="give --samples a new name")
    check_writable(absolute(file).parent)


def _print(made: dict[str, Any]) -> None:
    density = made["density"]
    print(
        "dense"
        if density is None
        else "keeping {neurons:.0%} of neurons, {groups:.0%} of heads".format(**density)
        + ("" if made["protocol"] == "masked" else ", after the contexts")
    )
    for task, metrics in made["tasks"].items():
        values = {key: value for key, value in metrics.items() if isinstance(value, float)}
        shown = ", ".join(
            f"{key} {value:.4f} ± {values[_error_of(key)]:.4f}"
            if _error_of(key) in values
            else f"{key} {value:.4f}"
            for key, value in values.items()
            if "_stderr" not in key
        )
        print(f"{task} ({metrics['items']} items, {metrics['few_shot']}-shot): {shown}")


def _error_of(key: str) -> str:
    """The name of a metric's standard error; a filter's name stays at the end: "exact_match,strict-match"."""
    metric, *filtered = key.split(",", 1)
    return ",".join([f"{metric}_stderr", *filtered])


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """One line an item and filter of the task: their names, the target, what the model answered, and its metrics."""
    from polarjax.storage.atomic import atomic_file

    rows = [
        {"task": task, "item": each["doc_id"], "filter": each["filter"]}
        | {"target": each["target"], "answers": each["filtered_resps"]}
        | {metric: each[metric] for metric in each["metrics"]}
        for task, items in samples.items()
        for each in items
    ]
    with atomic_file(path) as stream:
        stream.writelines(json.dumps(row, default=str) + "\n" for row in rows)
