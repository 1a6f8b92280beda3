"""Whole conversions: what they write, what they refuse, and that they are there whole or not at all."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import polarjax as pj
from checkpoints_convert import convert, convert_checkpoint
from checkpoints_convert.convert import all_finite
from checkpoints_convert.weights_io import SINGLE
from polarjax.cli.convert import convert as verb
from polarjax.model.parameters import parameters
from polarjax.storage import atomic as storage
from tests.convert import hf_models
from tests.one_line import refuses
from tests.text.hf_tokenizers import byte_fallback
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HuggingFace folders by name, dtype and whether they are sharded, written once."""
    made: dict[tuple, Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
        key = (name, dtype, shards)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf") / name
            hf_models.save(name, made[key], dtype=dtype, shards=shards)
        return made[key]

    return folder


@pytest.fixture
def source(folders, tmp_path):
    """A copy of a folder that may be spoilt."""
    return Path(shutil.copytree(folders("llama-gqa"), tmp_path / "hf"))


def edit_weights(folder: Path, change) -> None:
    arrays = load_file(folder / SINGLE)
    change(arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / SINGLE)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_refused(source: Path, out: Path, *words: str, **options) -> None:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(pj.PolarjaxError) as error:
        convert_checkpoint(source, out, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in out.parent.iterdir()) == before


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_bits_are_kept(folders, tmp_path, name, dtype, shards):
    """Every source tensor, turned back by torch alone, has the bits of its parameter."""
    source = folders(name, dtype, shards)
    done = convert_checkpoint(source, tmp_path / "out")
    model = pj.load(done.path).model
    ours = parameters(model)
    state = hf_models.make(name, dtype).state_dict()
    assert (
        {array.dtype.name for array in ours.values()} == {str(dtype).removeprefix("torch.")} == {done.dtype}
    )
    layer, head = ("model.decoder.layers.1", "fc2") if name == "opt" else ("model.layers.1", "mlp.down_proj")
    K, G, H = model.config.num_kv_heads, model.config.q_per_group, model.config.head_dim
    expected = {
        "layers.1.attn.wq": state[f"{layer}.self_attn.q_proj.weight"].T.reshape(-1, K, G, H),
        "layers.1.attn.wv": state[f"{layer}.self_attn.v_proj.weight"].T.reshape(-1, K, H),
        "layers.1.mlp.w_down": state[f"{layer}.{head}.weight"].T,
    }
    for key, tensor in expected.items():
        bits = tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
        np.testing.assert_array_equal(np.asarray(ours[key]).view(bits.dtype), bits)
    assert done.tensors == len(ours)
    assert done.num_bytes == sum(array.nbytes for array in ours.values())


def test_torch_is_not_needed(folders, tmp_path):
    code = """if True:
        import sys
        sys.modules["torch"] = sys.modules["transformers"] = None
        from checkpoints_convert import convert_checkpoint
        import polarjax
        polarjax.load(convert_checkpoint(*sys.argv[1:]).path)
    """
    arguments = [sys.executable, "-c", code, folders("opt"), tmp_path / "out"]
    subprocess.run(arguments, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_dtype_can_be_chosen(folders, tmp_path):
    done = convert_checkpoint(folders("llama-gqa"), tmp_path / "out", dtype="bfloat16")
    kept = convert_checkpoint(folders("llama-gqa"), tmp_path / "kept")
    ours, exact = parameters(pj.load(done.path).model), parameters(pj.load(kept.path).model)
    for name, array in ours.items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, exact[name].astype(jnp.bfloat16))


def test_unusable_dtype(source, tmp_path):
    assert_refused(source, tmp_path / "out", "unusable dtype", "int8", dtype="int8")


def test_several_dtypes_need_a_choice(source, tmp_path):
    def change(arrays):
        arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float16)

    edit_weights(source, change)
    assert_refused(source, tmp_path / "out", "several dtypes", "1 of float16", "--dtype")
    assert convert_checkpoint(source, tmp_path / "out", dtype="float32").dtype == "float32"


def test_tokenizer_files_are_copied(source, tmp_path):
    byte_fallback().save(str(source / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json", "evil.py"):
        (source / name).write_text("{}")
    done = convert_checkpoint(source, tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(done.copied) == copied
    assert {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()} == copied


def test_tokenizer_without_settings_is_completed_and_reported(source, tmp_path, capsys):
    byte_fallback(begin=False).save(str(source / "tokenizer.json"))
    done = verb(source, tmp_path / "out")
    note, _ = done["notes"]  # the other one is about the vocabulary of this small model
    assert "texts begin with <s>" in note
    assert note in capsys.readouterr().out.splitlines()
    tokenizer = pj.load(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode(["x"])[0][0, 0] == 1


def test_a_bad_tokenizer_is_refused_before_any_weight(source, tmp_path):
    (source / "tokenizer.json").write_text("{")
    with refuses(pj.CheckpointError, "hf/tokenizer.json"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_adds_up(folders, tmp_path):
    seen = []

    @contextlib.contextmanager
    def progress(description, total, unit):
        seen.append((total, unit))
        yield lambda steps, note="": seen.append(steps)

    convert_checkpoint(folders("opt"), tmp_path / "out", progress=progress)
    (total, unit), *steps = seen
    assert unit == "MB"
    assert sum(steps) == total == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights(source, tmp_path, value):
    def change(arrays):
        arrays["lm_head.weight"][3, 4] = value
        arrays["model.layers.1.mlp.up_proj.weight"][0, 0] = value

    edit_weights(source, change)
    words = "2 tensors hold NaN or infinity", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
    assert_refused(source, tmp_path / "out", *words, "--allow-nonfinite")
    assert convert_checkpoint(source, tmp_path / "out", allow_nonfinite=True).tensors == 30


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_tokenizer_overrides_bad_weights(source, tmp_path, monkeypatch, late):
    """Both are read at once; the rest of the weights is not read in vain."""
    fill, filled = convert._fill, []

    def copy_tokenizer(*_):
        time.sleep(0.5 if late else 0)
        raise pj.CheckpointError("a bad tokenizer")

    def slow_fill(*args, **options):
        time.sleep(0 if late else 0.02)
        filled.append(1)
        return fill(*args, **options)

    edit_weights(source, lambda arrays: arrays["lm_head.weight"].__setitem__((3, 4), np.nan))
    monkeypatch.setattr(convert.ModelWriter, "copy_tokenizer", copy_tokenizer)
    monkeypatch.setattr(convert, "_fill", slow_fill)
    assert_refused(source, tmp_path / "out", "a bad tokenizer")
    assert late or len(filled) < 30


def test_overflow_of_a_narrower_dtype(source, tmp_path):
    edit_weights(source, lambda arrays: arrays["lm_head.weight"].__setitem__((0, 0), 1e6))
    assert_refused(source, tmp_path / "out", "infinity as float16", "wider dtype", dtype="float16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype):
    largest = np.array(ml_dtypes.finfo(dtype).max, dtype)
    array = np.stack([largest, -largest, np.zeros((), dtype)] * 200_000)
    assert all_finite(array)
    for bad in (np.nan, np.inf, -np.inf):
        array[-1] = bad
        assert not all_finite(array)
    assert all_finite(array[:0])


def test_explicit_head_of_a_tied_model(folders, tmp_path):
    source = Path(shutil.copytree(folders("opt"), tmp_path / "hf"))
    table = "model.decoder.embed_tokens.weight"
    edit_weights(source, lambda arrays: arrays.update({"lm_head.weight": arrays[table].copy()}))
    assert convert_checkpoint(source, tmp_path / "out").skipped == ("lm_head.weight",)
    edit_weights(source, lambda arrays: arrays["lm_head.weight"].__setitem__((60, 23), 0.5))
    theirs = hf_models.transformers.AutoModelForCausalLM.from_pretrained(source)
    both = convert_checkpoint(source, tmp_path / "other")
    assert (both.config.tie_embeddings, both.skipped) == (False, ())
    assert "ties the head to the embeddings, but the two tensors differ" in both.notes[0]
    model = pj.load(both.path).model
    tokens = torch.arange(3, 13)[None]
    expected = theirs(tokens).logits.detach().numpy()
    logits, _ = pj.forward(model, jnp.asarray(tokens.numpy()), jnp.array([10]))
    assert_close(logits, expected, "parity")


def test_padded_vocabulary_must_be_in_the_config(source, tmp_path):
    edit_config(source, vocab_size=60)
    assert_refused(source, tmp_path / "out", "2 of the wrong shape", "[61, 24] instead of [60, 24]")


def test_quantized(source, tmp_path):
    edit_weights(source, lambda arrays: arrays.update({"lm_head.weight": np.zeros((61, 24), np.int8)}))
    assert_refused(source, tmp_path / "out", "unsupported dtype of lm_head.weight", "quantized")


def test_output_exists(source, tmp_path):
    first = convert_checkpoint(source, tmp_path / "out")
    assert_refused(source, tmp_path / "out", "already exists", "--overwrite")
    edit_config(source, rms_norm_eps=0.5)
    convert_checkpoint(source, tmp_path / "out", overwrite=True)
    assert pj.load(first.path).model.config.norm_eps == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_overwrite_keeps_what_is_not_a_model(source, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    assert_refused(source, tmp_path / "photos", "not written by polarjax", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


def test_failed_overwrite_keeps_the_old_model(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    edit_weights(source, lambda arrays: arrays["lm_head.weight"].__setitem__((0, 0), np.nan))
    assert_refused(source, tmp_path / "out", "NaN", overwrite=True)
    assert pj.load(tmp_path / "out").model.config.num_layers == 3


@pytest.mark.parametrize("inner", ["out", ".", ".."])
def test_output_within_the_source_and_the_reverse(source, inner):
    assert_refused(source, source / inner, "contain one another", overwrite=True)


def test_output_within_the_source_through_a_link(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    assert_refused(source, tmp_path / "link" / "out", "contain one another")


def test_relative_paths_spaces_and_letters(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source.rename("größe 模型")
    done = convert_checkpoint("größe 模型", "my [out]*/новая модель")
    assert done.path == tmp_path / "my [out]*" / "новая модель"
    assert pj.load("my [out]*/новая модель").model.config.num_layers == 3


def test_output_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pj.CheckpointError, match="cannot write here"):
        convert_checkpoint(source, tmp_path / "file" / "out")


def stop_at(monkeypatch, count: int, error: BaseException) -> None:
    """Makes reading the tensor number `count` raise."""
    left = iter(range(count))
    fill = convert._fill

    def stop(*args, **options):
        if next(left, None) is None:
            raise error
        return fill(*args, **options)

    monkeypatch.setattr(convert, "_fill", stop)


@pytest.mark.parametrize("count", [0, 1, 15, 29])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(1)], ids=repr)
def test_interrupted(source, tmp_path, monkeypatch, error, count):
    stop_at(monkeypatch, count, error)
    monkeypatch.setattr(convert, "new_model", small_batches(convert.new_model, monkeypatch))
    with pytest.raises(type(error)):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def small_batches(new_model, monkeypatch):
    """Lets arrays reach the disk early, so that an interruption finds some there."""
    monkeypatch.setattr("polarjax.storage.arrays.BATCH_BYTES", 1000)
    return new_model


@pytest.mark.parametrize("step", ["_flush", "_put"])
def test_disk_fails_at_the_end(source, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, step, fail)
    assert_refused(source, tmp_path / "out", "cannot write here", "No space left on device")


def test_file_size_limit(folders, tmp_path):
    """A disk that is full, as the system reports it."""
    code = """if True:
        import resource, signal, sys
        from checkpoints_convert import convert_checkpoint
        import polarjax
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        try:
            convert_checkpoint(*sys.argv[1:])
        except polarjax.CheckpointError as error:
            print(error)
    """
    arguments = [sys.executable, "-c", code, folders("opt"), tmp_path / "out"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1, done.stderr
    assert "cannot write" in done.stdout
    assert list(tmp_path.iterdir()) == []


HALTING = """if True:
    import itertools, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    from checkpoints_convert import convert
    import polarjax.storage.arrays
    from polarjax.cli.main import main
    polarjax.storage.arrays.BATCH_BYTES = 1000
    fill, calls = convert._fill, itertools.count()
    def halting(*args, **options):
        if next(calls) == 8:
            print("halted", flush=True)
            for _ in range(600):  # one long wait would miss a signal that comes just before it
                time.sleep(0.1)
        return fill(*args, **options)
    convert._fill = halting
    main(["convert", *sys.argv[1:]])
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed(folders, tmp_path, kill):
    arguments = [sys.executable, "-c", HALTING, folders("llama-gqa"), tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(arguments, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halted\n"
        unfinished = sorted(path.name for path in tmp_path.iterdir())
        temporary, lock = unfinished
        assert temporary.startswith(".out.polarjax-tmp-") and lock == f"{temporary}.lock"
        storage.remove_stale(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == unfinished, "still at work, so not stale"
        process.send_signal(kill)
        process.wait(60)
    assert process.returncode != 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (unfinished if kill == signal.SIGKILL else [])
    convert_checkpoint(folders("llama-gqa"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pj.load(tmp_path / "out").model.config.num_layers == 3


def test_source_is_untouched(source, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    convert_checkpoint(source, tmp_path / "out")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
