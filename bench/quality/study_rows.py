"""The reports of `bench.quality.study` as rows of bench/results/quality.jsonl."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.quality.steps import recorded
from bench.report import append_jsonl, read_jsonl, table
from polarjax.selection.plans import groups_kept

GIVEN = ("model", "own_groups")  # models that weren't healed
LABEL = "SmolLM2-135M-Instruct (Q4_1)"
WIDENED = ", widened to 9 groups"
NAMES = {"code_evaluation": "standard_library_evaluation"}
COMPUTES = {"gpu": "bfloat16", "cpu": "float32", None: None}
COLUMNS = ("report", "text", "task", "what", "kept", "protocol", "batch", "perplexity", "increase", "acc")
Row = dict[str, Any]


def main(asked: argparse.Namespace) -> int:
    """Prints the rows as a table, and appends to `asked.out` those that aren't there; 1 if there are none."""
    labeled = list(rows(asked.work, asked.label))
    found = [row for _, row in labeled]
    if not found:
        print(f"no reports in {asked.work / 'reports'}")
        return 1
    print(table([row | {"report": name} for name, row in labeled], COLUMNS))
    if asked.out is not None:
        old = read_jsonl(asked.out) if asked.out.exists() else []
        new = [row for row in found if row not in old]
        append_jsonl(asked.out, new, {})
        print(f"{len(new)} of {len(found)} rows appended to {asked.out}")
    return 0


def rows(work: Path, label: str = LABEL) -> Iterator[tuple[str, Row]]:
    """A row for each number measured, with its question and model; what can't be read is left out with a line."""
    reports, steps = dict(_reports(work / "reports")), recorded(work)
    swept = {
        name: each for (question, name, *_), each in reports.items() if question not in ("tasks", "tune")
    }
    groups = next((each["model"]["groups"] for name, each in swept.items() if name != "own_groups"), None)
    unknown = {"device": None, "platform": None, "jax": None}
    head = next((_head(each["versions"]) for each in swept.values()), unknown)
    for (question, name, *rest), report in reports.items():
        step = "/".join((question, name, *rest))
        base = head | {"commit": steps.get(step, {}).get("commit")}
        base |= {"model": label if name == "own_groups" or label != LABEL else label + WIDENED}
        base |= {"stage": _stage(name, reports, steps)}
        if question == "tune":
            made = [base | _training(report, COMPUTES[base["platform"]])]
        elif question == "tasks":
            made = _tasks(rest[0], base, report, groups)
        else:
            made = _perplexities(base | _head(report["versions"]), report)
        yield from ((f"{question}/{name}", row) for row in made)


def _reports(folder: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each report with its question, model and what it measures."""
    for path in sorted(folder.rglob("*.json")):
        try:
            yield path.relative_to(folder).with_suffix("").parts, json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            print(f"{path} is left out: {error}")


def _head(versions: Row) -> Row:
    platform = "cpu" if versions["device"] == "cpu" else "gpu"
    return {"device": versions["device"], "platform": platform, "jax": versions["jax"]}


def _stage(name: str, reports: dict[tuple[str, ...], Any], steps: dict[str, Row]) -> str:
    """How the model was made."""
    step = f"sparsify/{name}" if name in GIVEN else f"tune/{name}"
    words = " ".join(("polarjax", step.split("/")[0], *steps.get(step, {}).get("options", [])))
    if name in GIVEN:
        return f"{words}, before healing"
    trained = reports.get(("tune", name))
    return (
        words
        if trained is None
        else f"{words}: {trained['seconds'] / 60:.1f} min, {trained['tokens']:,} tokens"
    )


def _training(report: Row, dtype: str | None) -> Row:
    """`dtype` is the one that tune computes in, unless it is told otherwise."""
    return {
        "what": "training",
        "dtype": dtype,
        "tokens": report["tokens"],
        "seconds": report["seconds"],
        "tokens_per_second": round(report["tokens_per_second"]),
        "planned_bytes": report["memory"]["total"],
        "peak_bytes": report["peak"],
    }


def _perplexities(base: Row, report: Row) -> Iterator[Row]:
    text = report["text"]
    name = Path(text["texts"][0]["name"]).name.split(".")[0]
    base = base | {"dtype": report["model"]["dtype"], "text": NAMES.get(name, name)}
    base |= {each: text[each] for each in ("windows", "window", "scored_tokens")}
    for dense in report["dense"]:
        found = dense["perplexity"]["token"]
        about = {"what": "dense", "protocol": dense["protocol"], "batch": dense["batch_size"]}
        yield base | about | {"perplexity": found["value"], "standard_error": found["standard_error"]}
    for row in report["rows"]:
        more = row["against_dense"]["increase"]["token"]
        yield base | {
            "what": row["selector"],
            "kept": _kept(row["plan"]["groups"]),
            "protocol": row["protocol"],
            "batch": row["batch_size"],
            "perplexity": row["sparse"]["perplexity"]["token"]["value"],
            "increase": more["value"],
            "standard_error_of_increase": more["standard_error"],
            "kl": row["kl"]["value"],
            "top1": row["top1"]["value"],
        }


def _kept(groups: list[int | None]) -> int | None:
    """The groups kept in every layer that skips; None if the layers differ."""
    counts = {count for count in groups if count is not None}
    return counts.pop() if len(counts) == 1 else None


def _tasks(variant: str, base: Row, report: Row, groups: int | None) -> Iterator[Row]:
    density, protocol, _ = variant.split("_", 2)
    kept = None if groups is None else groups_kept(float(density), groups)
    if density == "1" and base["stage"].endswith("before healing"):
        base = base | {"stage": "as it comes"}
    base = base | {"dtype": report["model_dtype"], "what": "task", "kept": kept, "protocol": protocol}
    for task, found in report["tasks"].items():
        yield base | {"task": task.removeprefix("local_")} | found
