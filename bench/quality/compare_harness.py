"""Compares polarjax with lm-evaluation-harness's own `hf` backend: the same weights, tasks and items, both in float32.

    python -m bench.quality.compare_harness HF_FOLDER MODEL_DIRECTORY --data FOLDER --limit 500

HF_FOLDER is a HuggingFace checkpoint, MODEL_DIRECTORY what `polarjax convert` made of it, and FOLDER has the data of the
tasks in bench/quality/tasks (or of those that --task names). Prints a row for each task and writes all of them to --out.
The exit code is 1 if a task doesn't pass: the same choice on at least 99.5 % of the items, and accuracies within half a
standard error. Needs polarjax[eval], torch and accelerate.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TASKS = Path(__file__).parent / "tasks"
SAME_CHOICES, ERRORS = (
    0.995,
    0.5,
)  # what passes: the share of items, and standard errors between the accuracies


def main() -> int:
    """Runs both backends and compares them; 0 if every task passes."""
    options = _options()
    import jax
    from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]

    from polarjax.evaluation import HarnessLM
    from polarjax.evaluation.harness_tasks import load_tasks, run_tasks

    jax.config.update("jax_default_matmul_precision", "highest")  # GPUs round float32 factors otherwise
    files = options.task or sorted(TASKS.glob("*.yaml"))
    backends = {
        "polarjax": lambda: HarnessLM(
            options.model, sparsity=None, dtype="float32", batch_size=options.batch_size
        ),
        "hf": lambda: HFLM(
            str(options.hf), dtype="float32", device=options.device, batch_size=options.hf_batch_size
        ),
    }
    found, seconds = {}, {}
    for name, make in backends.items():
        lm, tasks = make(), load_tasks(files, data=options.data)
        started = time.perf_counter()
        arguments = {"limit": options.limit, "log_samples": True, "few_shot": options.few_shot}
        found[name] = run_tasks(lm, tasks, **arguments)["samples"]
        seconds[name] = round(time.perf_counter() - started, 1)
    rows = [compared(task, found["polarjax"][task], items) for task, items in found["hf"].items()]
    report = {
        "model": str(options.model),
        "seconds": seconds,
        "versions": {name: version(name) for name in ("lm-eval", "torch", "transformers", "jax")},
        "tasks": rows,
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf", type=Path, metavar="HF_FOLDER")
    parser.add_argument("model", type=Path, metavar="MODEL_DIRECTORY")
    parser.add_argument("--task", type=Path, action="append", help="a task's YAML file; may be given again")
    parser.add_argument("--data", type=Path, help="folder of the tasks' data; default: that of their files")
    parser.add_argument("--limit", type=int, default=500, help="items per task")
    parser.add_argument("--few-shot", type=int, default=None)
    parser.add_argument("--batch-size", default="auto", help="of polarjax")
    parser.add_argument("--hf-batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="PyTorch's device: cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    return parser.parse_args()


def compared(task: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """One task's row: how far answers differ request by request, choices item by item, and accuracies."""
    pairs = list(zip(_by_item(ours), _by_item(theirs), strict=True))
    if [a["doc_hash"] for a, _ in pairs] != [b["doc_hash"] for _, b in pairs]:
        raise ValueError(f"{task}: the backends answered different items")
    requests = [each for a, b in pairs for each in zip(a["filtered_resps"], b["filtered_resps"], strict=True)]
    differences = [abs(float(a[0]) - float(b[0])) for a, b in requests]
    same = [_choice(a) == _choice(b) for a, b in pairs]
    accuracy, reference = (
        np.array([each["acc"] for each in side], float) for side in zip(*pairs, strict=True)
    )
    error = float(reference.std(ddof=1) / np.sqrt(len(reference)))
    difference = float(accuracy.mean() - reference.mean())
    return {
        "task": task,
        "items": len(pairs),
        "requests": len(requests),
        "largest_difference": max(differences),
        "other_greedy": sum(bool(a[1]) != bool(b[1]) for a, b in requests),
        "same_choices": float(np.mean(same)),
        "acc": float(accuracy.mean()),
        "hf_acc": float(reference.mean()),
        "hf_acc_stderr": error,
        "passed": bool(np.mean(same) >= SAME_CHOICES and abs(difference) <= ERRORS * error),
    }


def _by_item(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda each: each["doc_id"])


def _choice(sample: dict[str, Any]) -> Any:
    """The answer that counts: the likeliest choice, or whether the only continuation is the greedy one."""
    answers = sample["filtered_resps"]
    if len(answers) == 1:
        return bool(answers[0][1])
    return int(np.argmax([float(value) for value, _ in answers]))


if __name__ == "__main__":
    sys.exit(main())
