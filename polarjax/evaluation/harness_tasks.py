"""Runs tasks of lm-evaluation-harness, its own by name or local ones from files."""

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polarjax.errors import InputError, PolarjaxError
from polarjax.evaluation.harness_checks import lm_eval_module
from polarjax.storage.atomic import absolute

BOOTSTRAPS = 10_000  # resamples for the standard errors of metrics that aren't means
_FAULTS = (
    LookupError,
    ValueError,
    OSError,
    AssertionError,
    ImportError,
    TypeError,
    ArithmeticError,
)  # a task's own, as lm-eval raises them


def load_tasks(names: Sequence[str | os.PathLike[str]], *, data: Path | None = None) -> list[Any]:
    """lm-eval's task objects, with their data sets loaded; files need no network.

    Args:
      names: YAML files of tasks (a name with a folder or the ending .yaml), or names of lm-eval's own tasks or groups.
      data: folder of the files that a YAML file names in `data_files`, relative paths that is; None is the YAML's own.

    Raises:
      InputError: lm-eval isn't installed, there is no such task, or a file is missing or can't be read.
    """
    specs = [_config(Path(name), data) if _is_file(name) else str(name) for name in names]
    if not specs:
        raise InputError("no task to run", where="tasks", hint="name one, or the YAML file of one")
    manager = lm_eval_module("lm_eval.tasks").TaskManager(
        include_defaults=any(isinstance(each, str) for each in specs)
    )
    unknown = [each for each in specs if isinstance(each, str) and each not in manager.all_tasks]
    if unknown:
        hint = "lm-eval ls tasks lists its own; for a task of yours, name its .yaml file"
        raise InputError("no such task", where="tasks", got=", ".join(unknown), hint=hint)
    loaded: dict[str, Any] = {}
    for name, spec in zip(names, specs, strict=True):
        with _faults_of(f"task {name}"):
            found = manager.load([spec])["tasks"]
        twice = loaded.keys() & found.keys()
        if twice:
            raise InputError("a task is given twice", where="tasks", got=min(twice), hint="name it once")
        loaded |= found
    return list(loaded.values())


def run_tasks(
    lm: Any, tasks: Sequence[Any], *, few_shot: int | None = None, **options: Any
) -> dict[str, Any]:
    """lm-eval's results of running tasks.

    Args:
      lm: the model, such as a `HarnessLM`.
      tasks: task objects, as `load_tasks` returns them.
      few_shot: examples in each prompt; None leaves it to the task, and a task that says 0 keeps it.
      options: further arguments of lm-eval's `simple_evaluate`.

    Raises:
      InputError: a task doesn't fit its data, or the model refuses a request.
    """
    evaluator = lm_eval_module("lm_eval.evaluator")
    options = {"bootstrap_iters": BOOTSTRAPS, **options}
    with _faults_of("tasks"), _no_forks():
        return evaluator.simple_evaluate(model=lm, tasks=list(tasks), num_fewshot=few_shot, **options)


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each task's metrics with their standard errors, the number of items and of examples in the prompt.

    Metrics of the filter "none" lose its name: "acc", "acc_stderr"; others keep it: "exact_match,strict-match".
    """
    return {
        task: {
            "items": results["n-samples"][task]["effective"],
            "few_shot": results["n-shot"].get(task),
            **{
                key.removesuffix(",none"): None if value == "N/A" else value
                for key, value in metrics.items()
                if "," in key
            },
        }
        for task, metrics in results["results"].items()
        if task in results["n-samples"]
    }


def _is_file(name: str | os.PathLike[str]) -> bool:
    return not isinstance(name, str) or name.endswith((".yaml", ".yml")) or os.sep in name


def _config(path: Path, data: Path | None) -> dict[str, Any]:
    """A task file's content, with the paths of its data made absolute."""
    if not path.is_file():
        hint = "give the path of a task's YAML file, or the name of a task of lm-eval"
        raise InputError("no such task file", where=path, hint=hint)
    load_yaml = lm_eval_module("lm_eval.tasks._yaml_loader").load_yaml
    with _faults_of(str(path)):
        config = load_yaml(path)
    if not isinstance(config.get("task"), str):
        hint = "give the file of a single task; name the files of several one by one"
        raise InputError("not a task", where=path, expected="a file with the key task", hint=hint)
    arguments = config.get("dataset_kwargs") or {}
    if "data_files" in arguments:
        base = path.parent if data is None else data
        config["dataset_kwargs"] = arguments | {"data_files": _found(arguments["data_files"], base, path)}
    return config


def _found(files: Any, base: Path, task: Path) -> Any:
    """The paths in `data_files` made absolute, addresses as they are; raises `InputError` if one is missing or empty."""
    if isinstance(files, Mapping):
        return {key: _found(value, base, task) for key, value in files.items()}
    if isinstance(files, list):
        return [_found(each, base, task) for each in files]
    if "://" in str(files):
        return files
    path = absolute(base / str(files))
    found = glob.glob(str(path))
    if not any(map(os.path.getsize, found)):
        raise InputError(
            "the task's data is empty" if found else "the task's data is missing",
            where=task,
            got=f"{found[0]}, of 0 bytes" if found else f"no file {path}",
            hint="put it there, or name its folder (--data)",
        )
    return str(path)


@contextlib.contextmanager
def _faults_of(where: str) -> Iterator[None]:
    """Turns what lm-eval and its libraries raise about a task or its data into one line."""
    from jinja2 import TemplateError

    try:
        yield
    except PolarjaxError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, (*_FAULTS, TemplateError)) and library not in ("yaml", "datasets"):
            raise
        named = error.__cause__ if library == "datasets" and error.__cause__ is not None else error
        raise InputError(
            "lm-eval can't run this",
            where=where,
            got=f"{type(named).__name__}: {named!s:.300}",
            hint="correct the task's file or its data; lm-eval's own tasks need the network once",
        ) from error


@contextlib.contextmanager
def _no_forks() -> Iterator[None]:
    """Keeps lm-eval from forking processes for its bootstrap: forks of a process that runs JAX may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
