"""Models by their id on the hub: from a cache made here, or from a stand-in for the download; never the network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from checkpoints_convert.hub import locate
from tests.convert import hf_models, test_torch_files
from tests.one_line import refuses

ROOT = Path(__file__).parents[2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "hf"
    hf_models.save("llama-gqa", folder)
    for name in TOKENIZER:
        shutil.copy(ROOT / "polarjax" / "assets" / "llama-6m" / name, folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, which is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(cache: Path, model: str, folder: Path) -> Path:
    """Lays a folder into the cache as the hub's library does: blobs, and links to them under the commit."""
    place = cache / f"models--{model.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, place / "blobs" / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model(plain, cache, tmp_path, revision):
    put(cache, "org/tiny.model-1", plain)
    done = convert_checkpoint("org/tiny.model-1", tmp_path / "out", revision=revision)
    expected = convert_checkpoint(plain, tmp_path / "expected")
    assert (done.config, done.copied) == (expected.config, expected.copied)
    assert set(done.copied) == set(TOKENIZER)
    assert done.num_bytes == expected.num_bytes


def test_a_cached_model_of_bin_files(cache, tmp_path):
    test_torch_files.save_bins(hf_models.make("opt"), tmp_path / "bins", shards=2)
    put(cache, "org/bins", tmp_path / "bins")
    assert convert_checkpoint("org/bins", tmp_path / "out").model_type == "opt"


@pytest.mark.parametrize(("model", "revision"), [("org/other", None), ("org/tiny", "v2")])
def test_offline_and_not_cached(plain, cache, tmp_path, model, revision):
    put(cache, "org/tiny", plain)
    pattern = f"^{model}: not a folder, not complete in the hub cache.*HF_HUB_OFFLINE is set. Hint: unset"
    with refuses(pj.CheckpointError, pattern):
        convert_checkpoint(model, tmp_path / "out", revision=revision)
    assert not (tmp_path / "out").exists()


def test_a_cache_without_all_weights(plain, cache, tmp_path):
    snapshot = put(cache, "org/tiny", plain)
    (snapshot / "model.safetensors").unlink()
    with refuses(pj.CheckpointError, "no weights"):
        convert_checkpoint("org/tiny", tmp_path / "out")


def test_a_folder_comes_before_an_id(plain, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain, "org/tiny")
    assert locate("org/tiny") == tmp_path / "org" / "tiny"
    with refuses(pj.InputError, "a folder has no revisions; got main"):
        locate("org/tiny", revision="main")


@pytest.mark.parametrize("source", ["/org/tiny", "./org/tiny", "tiny", "a/b/c", "../tiny"])
def test_what_is_no_id_is_a_folder(source, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(pj.CheckpointError, "no such folder"):
        convert_checkpoint(source, tmp_path / "out")


class Hub:
    """Stands in for the download: copies from a folder what is asked for, and remembers what that was."""

    def __init__(self, folder: Path, target: Path):
        self.folder, self.target = folder, target
        self.asked: list[tuple[str | None, list[str]]] = []

    def __call__(self, model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((revision, allow_patterns))
        self.target.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in self.folder.glob(pattern):
                shutil.copy(file, self.target)
        return str(self.target)


def test_only_what_is_needed_is_fetched_of_one_commit(plain, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(plain, tmp_path / "hf"))
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "evil.py", "tf_model.h5"):
        (folder / name).write_text("not needed")
    hub = Hub(folder, tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    convert_checkpoint("org/tiny", tmp_path / "out", revision="v1")
    assert [revision for revision, _ in hub.asked] == ["v1", COMMIT]
    assert hub.asked[0][1] == ["config.json"]
    fetched = {path.name for path in hub.target.iterdir()}
    assert fetched == {"config.json", "model.safetensors", *TOKENIZER}


@pytest.mark.parametrize("value", ["a.safetensors", "a.safetensors.index.json"])
def test_only_the_weights_that_config_json_names_are_fetched(plain, tmp_path, monkeypatch, value):
    folder = Path(shutil.copytree(plain, tmp_path / "hf"))
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"transformers_weights": value}))
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    places = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hub = Hub(folder, tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    convert_checkpoint("org/tiny", tmp_path / "out")
    assert {path.name for path in hub.target.iterdir()} == {"config.json", "a.safetensors", value, *TOKENIZER}


def test_no_weights_are_fetched_for_a_config_that_is_refused(tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    hub = Hub(tmp_path / "hf", tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with refuses(pj.UnsupportedConfigError, "unsupported model_type"):
        convert_checkpoint("org/tiny", tmp_path / "out")
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        (errors.RepositoryNotFoundError, "neither a folder nor a model on the hub.*hf auth login"),
        (errors.GatedRepoError, "gated.*hf auth login"),
        (errors.RevisionNotFoundError, "no such revision; got v7"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached. Hint: connect"),
        (errors.HTTPError, "the hub cannot be reached; got HTTPError.*Hint: check the network and its proxy"),
    ],
)
def test_refusals_of_the_hub_are_one_line(tmp_path, monkeypatch, kind, pattern):
    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with refuses(pj.CheckpointError, f"^org/tiny: .*{pattern}"):
        convert_checkpoint("org/tiny", tmp_path / "out", revision="v7")
