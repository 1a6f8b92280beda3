"""Finds the source: a folder, or a HuggingFace hub model in the local cache, downloaded if needed."""

import re
from pathlib import Path

from checkpoints_convert.hf_config import CONFIG, read_config
from checkpoints_convert.weights_io import read_index
from polarjax.errors import CheckpointError, InputError
from polarjax.numeric import shown
from polarjax.storage.atomic import absolute
from polarjax.types import Path as PathLike

SAFE_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(source: PathLike, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint. A hub id is downloaded: config first, then safetensors, or .bin files if it has none.

    With HF_HUB_OFFLINE=1 nothing is downloaded; the cache must have the model.

    Args:
      source: a folder, or an id on the hub such as "facebook/opt-125m". A path that exists is taken as a folder.
      revision: a branch, tag or commit of the hub; None is its main branch.
      weights: whether to download weights and tokenizer too; if not, the folder may only have config.json.

    Raises:
      InputError: `revision` is not a text, or is given for a folder.
      CheckpointError: the model is neither on the hub nor in the cache, or the download failed.
      UnsupportedConfigError: its config.json is not supported; no weights are downloaded then.
    """
    folder = absolute(source)
    if not isinstance(revision, str | None):
        hint = "give a branch, a tag or a commit"
        raise InputError("not a revision", where="revision", got=shown(revision), hint=hint)
    if folder.exists() or not _ID.fullmatch(str(source)):
        if revision is not None:
            hint = "leave the revision out, or give an id such as org/name"
            raise InputError("a folder has no revisions", where=folder, got=revision, hint=hint)
        return folder
    snapshot = _fetch(str(source), revision, (CONFIG,))
    if not weights:
        return snapshot
    from polarjax.text.tokenizer_files import FILES as TOKENIZER_FILES  # imports JAX

    named, commit = read_config(snapshot).weights, snapshot.name
    fetch = lambda *names: _fetch(str(source), commit, (CONFIG, *TOKENIZER_FILES, *names))
    if named is not None:
        snapshot = fetch(named)
        if named.endswith(".index.json") and (snapshot / named).is_file():
            snapshot = fetch(named, *sorted(set(read_index(snapshot / named).values())))
        return snapshot
    snapshot = fetch(*SAFE_PATTERNS)
    return snapshot if any(snapshot.glob("*.safetensors")) else fetch(*TORCH_PATTERNS)


def _fetch(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        hint = "request access on its hub page, then log in: hf auth login"
        raise CheckpointError("this model is gated", where=model, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name; if the model is private, log in: hf auth login"
        raise CheckpointError("neither a folder nor a model on the hub", where=model, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        hint = "give a branch, a tag or a commit"
        raise CheckpointError("no such revision", where=model, got=revision, hint=hint) from error
    except errors.LocalEntryNotFoundError as error:
        raise _absent(model, revision, offline=hub.constants.HF_HUB_OFFLINE) from error
    except (OSError, errors.HFValidationError) as error:
        got = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError("the hub refused this model", where=model, got=got) from error
    except errors.HTTPError as error:  # of its HTTP client; not an OSError
        got = f"{type(error).__name__}: {error}"[:200]
        hint = "check the network and its proxy, or give the folder of the model"
        raise CheckpointError("the hub cannot be reached", where=model, got=got, hint=hint) from error


def _absent(model: str, revision: str | None, *, offline: bool) -> CheckpointError:
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    at = "" if revision is None else f" at {revision[:12]}"
    hint = "unset HF_HUB_OFFLINE" if offline else "connect to the network"
    return CheckpointError(
        f"not a folder, not complete in the hub cache{at}, and {why}",
        where=model,
        hint=f"{hint}, or give the folder of the model",
    )
