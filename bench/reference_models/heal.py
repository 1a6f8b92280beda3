"""Heals the bundled OPT with `polarjax tune` and stores what that changed, as polarjax.demo.healed reads it."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.demo.healed import FILE, pack
from polarjax.text.corpus import standard_library_text

ASSET = FILE.parent / "opt-6m"
SPARSIFY = (
    "--max-tokens 262144 --epochs 6 --learning-rate 1e-3 --batch 256 --dense-attention important "
    "--budgets uniform"
)
TUNE = (
    "--train out --learning-rate 2e-3 --router-learning-rate 2e-3 --tokens 40000000 --batch 32 "
    "--least 0.375 --most 0.75"
)


def heal(novels: list[Path], work: Path) -> Path:
    """The healed model directory, made in the folder `work`."""
    work.mkdir(parents=True, exist_ok=True)
    code = work / "code.txt"
    code.write_text(standard_library_text("train"), encoding="utf-8")
    convert_checkpoint(ASSET, work / "plain", overwrite=True)
    texts = [word for text in (code, *novels) for word in ("--text", str(text))]
    for verb, options in (
        (("sparsify", work / "plain"), SPARSIFY),
        (("tune", work / "plain", work / "healed"), TUNE),
    ):
        subprocess.run(["polarjax", *map(str, verb), *texts, *options.split()], check=True)
    return work / "healed"


def main() -> None:
    """Heals, unless --healed names a directory that is, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--novels", type=Path, nargs="*", default=[], help="UTF-8 texts, each a domain of its own."
    )
    parser.add_argument("--work", type=Path, default=Path(".heal"), help="Folder for the model directories.")
    parser.add_argument("--healed", type=Path, help="A healed model directory; default: make it.")
    parser.add_argument("--out", type=Path, default=FILE, help="The file to write.")
    asked = parser.parse_args()
    bundle = pj.load(asked.healed or heal(asked.novels, asked.work))
    if bundle.routers is None:
        raise SystemExit(f"{asked.healed} has no routers")
    arrays: dict[str, Any] = pack(bundle.model, bundle.routers)
    np.savez_compressed(asked.out, **arrays)
    print(f"{asked.out}: {asked.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
