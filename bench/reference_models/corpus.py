"""The training corpus of the bundled models: novels and Python sources, as documents and as token files."""

import argparse
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from polarjax.text.corpus import DOCUMENT_SEPARATOR, read_text, standard_library_documents

TRAIN_FILES = ("novels", "code")
BOS_ID = 1


def novels(path: Path) -> list[str]:
    """The documents in a text file, which are separated by form feeds."""
    return [text.strip() + "\n" for text in read_text(path).split(DOCUMENT_SEPARATOR) if text.strip()]


def code() -> list[str]:
    """The standard library's train split, then the sources of its `test` package, which is in no split."""
    library = list(standard_library_documents("train").values())
    return library + list(_test_package(Path(sysconfig.get_path("stdlib")) / "test"))


def _test_package(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # some files test other encodings
        if text.strip():
            yield text


def tokenize(tokenizer: Tokenizer, documents: list[str], bos: int) -> np.ndarray:
    """All documents as one uint16 stream, `bos` before each."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([bos, *e.ids], np.uint16) for e in encodings])


def write_stream(path: Path, stream: np.ndarray) -> None:
    """A uint16 stream, low bytes then high bytes (packs better), as .xz."""
    planes = np.stack([stream & 0xFF, stream >> 8]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(planes.tobytes(), preset=9))


def read_stream(path: Path) -> np.ndarray:
    """Inverse of `write_stream`."""
    low, high = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8).reshape(2, -1)
    return low.astype(np.uint16) | (high.astype(np.uint16) << 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--novels", type=Path, required=True, help="training text, form feeds between documents"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    for name, documents in zip(TRAIN_FILES, (novels(args.novels), code()), strict=True):
        stream = tokenize(tokenizer, documents, BOS_ID)
        file = args.out / f"{name}.u16.xz"
        write_stream(file, stream)
        size = sum(len(text.encode()) for text in documents)
        print(
            f"{name}: {len(documents)} documents, {size} bytes, {len(stream)} tokens, "
            f"{size / len(stream):.3f} bytes/token -> {file} ({file.stat().st_size} bytes)"
        )


if __name__ == "__main__":
    main()
