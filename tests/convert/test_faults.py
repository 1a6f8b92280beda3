"""Faults of checkpoints and of the disk, by their numbers in FAULTS: which test shows that each is survived.

Here are the tests of whole conversions; those of one reader lie beside the reader's other tests.
"""

import ast
import collections
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import polarjax as pj
from checkpoints_convert import config_from_hf, convert_checkpoint, export_checkpoint
from checkpoints_convert.weights_io import INDEX, SINGLE, TORCH_INDEX
from polarjax.model.parameters import parameters
from tests.convert import hf_models
from tests.convert.test_convert_cli import run
from tests.one_line import refuses

TESTS = Path(__file__).parents[1]
FAULTS = {
    "1 index out of the folder": [
        "convert/test_weights_io.py::test_index_out_of_the_folder",
        "convert/test_weights_io.py::test_link_out_of_the_folder",
        "convert/test_faults.py::test_fault_01_an_index_of_bin_files_out_of_the_folder",
    ],
    "2 a listed shard is missing": ["convert/test_weights_io.py::test_missing_shard"],
    "3 shards and index disagree": [
        "convert/test_weights_io.py::test_tensor_not_in_its_shard",
        "convert/test_weights_io.py::test_tensor_in_two_shards",
        "convert/test_weights_io.py::test_tensor_not_in_the_index",
    ],
    "4 truncated, trailing bytes, holes, overlaps": [
        "convert/test_weights_io.py::test_truncated",
        "convert/test_weights_io.py::test_trailing_bytes",
        "convert/test_weights_io.py::test_invalid_headers",
        "convert/test_torch_files.py::test_fault_04_truncated",
    ],
    "5 pointers and web pages": [
        "convert/test_weights_io.py::test_what_is_not_weights_at_all",
        "convert/test_torch_files.py::test_fault_05_and_06_what_is_not_weights_at_all",
    ],
    "6 empty files, folders and pipes": [
        "convert/test_weights_io.py::test_folder_instead_of_file",
        "convert/test_faults.py::test_fault_06_a_pipe_is_not_waited_for",
    ],
    "7 doubled keys": [
        "convert/test_weights_io.py::test_doubled_key_in_a_header",
        "convert/test_hf_config.py::test_unreadable_files",
    ],
    "8 pickles that run code": [
        "convert/test_torch_files.py::test_fault_08_a_pickle_that_runs_code_is_refused_and_not_run"
    ],
    "9 old formats and whole modules": [
        "convert/test_torch_files.py::test_fault_09_files_of_the_old_format_and_whole_modules"
    ],
    "10 tensors beyond their storage, archives": [
        "convert/test_torch_files.py::test_fault_10_tensors_beyond_their_storage",
        "convert/test_torch_files.py::test_fault_10_malformed_archives",
    ],
    "11 transposed arrays on export": [
        "convert/test_export.py::test_fault_11_transposed_parameters_are_written_in_rows"
    ],
    "12 dtypes and quantized checkpoints": [
        "convert/test_convert.py::test_bits_are_kept",
        "convert/test_weights_io.py::test_other_dtypes_are_refused_when_they_are_needed",
        "convert/test_torch_files.py::test_fault_12_other_dtypes_are_refused_when_they_are_needed",
        "convert/test_rules.py::test_quantized_tensors_are_called_so",
    ],
    "13 configs that are wrong": [
        "convert/test_hf_config.py::test_refused_by_name",
        "convert/test_hf_config.py::test_unreadable_files",
    ],
    "14 old and new spelling": [
        "convert/test_hf_config.py::test_llama3_both_spellings",
        "convert/test_faults.py::test_fault_14_old_and_new_spelling_give_the_identical_model",
    ],
    "15 other RoPE": ["convert/test_hf_config.py::test_refused_by_name"],
    "16 missing, extra, mis-shaped tensors": [
        "convert/test_rules.py::test_one_report_of_all_faults",
        "convert/test_rules.py::test_a_report_names_ten_of_many",
        "convert/test_rules.py::test_rotary_buffers_are_skipped",
        "convert/test_convert.py::test_padded_vocabulary_must_be_in_the_config",
        "convert/test_faults.py::test_fault_16_a_padded_vocabulary_that_the_config_knows",
    ],
    "17 explicit and absent heads": [
        "convert/test_convert.py::test_explicit_head_of_a_tied_model",
        "convert/test_rules.py::test_a_head_is_required_unless_tied",
        "convert/test_faults.py::test_fault_17_an_absent_head_of_an_untied_model",
    ],
    "18 OPT's prefixes, OPT-350m, position offset": [
        "convert/test_faults.py::test_fault_18_prefixes_give_the_identical_model",
        "model/test_hf_parity.py::test_logits_of_a_ragged_batch",
    ],
    "19 NaN and infinity": [
        "convert/test_convert.py::test_nonfinite_weights",
        "convert/test_convert.py::test_overflow_of_a_narrower_dtype",
        "generation/test_stream.py::test_fault_19_a_row_that_fails_is_marked",
    ],
    "25 interruptions and full disks": [
        "convert/test_convert.py::test_interrupted",
        "convert/test_convert.py::test_killed",
        "convert/test_convert.py::test_disk_fails_at_the_end",
        "convert/test_convert.py::test_source_is_untouched",
        "convert/test_export.py::test_an_interruption_leaves_nothing",
        "convert/test_faults.py::test_fault_25_a_disk_that_fills_up_at_any_point",
        "convert/test_faults.py::test_fault_25_a_disk_without_room_is_refused_before_any_work",
    ],
    "26 outputs": [
        "convert/test_convert.py::test_output_exists",
        "convert/test_convert.py::test_output_within_the_source_and_the_reverse",
        "convert/test_convert.py::test_relative_paths_spaces_and_letters",
        "convert/test_convert.py::test_output_cannot_be_written",
    ],
    "27 damage to a model directory": [
        "checkpoint/test_checkpoint.py::test_every_damaged_file_is_found",
        "checkpoint/test_checkpoint.py::test_missing_parts",
        "checkpoint/test_checkpoint.py::test_another_format_is_refused",
        "convert/test_faults.py::test_fault_27_a_byte_of_a_converted_model_flips",
    ],
    "28 little memory": [
        "convert/test_memory.py::test_fault_28_a_checkpoint_in_three_tensors_of_memory",
        "cli/test_out_of_memory.py::test_fault_28_the_memory_really_runs_out",
        "cli/test_out_of_memory.py::test_fault_28_largest_fitting_batch_is_reported",
    ],
    "32 tokenizers without settings": [
        "convert/test_convert.py::test_tokenizer_without_settings_is_completed_and_reported",
        "text/test_tokenizer_files.py::test_opt_folder_without_settings_is_completed",
        "text/test_tokenizer_files.py::test_bare_sentencepiece_model_is_completed",
        "text/test_tokenizer_files.py::test_completed_sentencepiece_model_matches_sentencepiece",
        "text/test_tokenizer_files.py::test_without_sentencepiece_loading_names_the_package",
        "text/test_tokenizer_files.py::test_llama_tokenizer_without_settings_gets_special_tokens",
        "text/test_tokenizer_files.py::test_ids_beyond_the_model_are_reported",
    ],
    "33 remote code": [
        "text/test_tokenizer_files.py::test_remote_code_is_named_and_never_run",
        "convert/test_faults.py::test_fault_33_code_is_never_run",
        "convert/test_export.py::test_fault_33_code_of_the_source_is_not_passed_on",
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    for place in FAULTS[fault]:
        file, _, name = place.partition("::")
        body = ast.parse((TESTS / file).read_text()).body
        (test,) = [each for each in body if isinstance(each, ast.FunctionDef) and each.name == name] or [None]
        assert test is not None, place
        assert not any(
            word in ast.unparse(test) for word in ("pytest.skip", "mark.skip", "importorskip", "xfail")
        ), place


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that are in order."""
    folder = tmp_path_factory.mktemp("plain")
    for name in ("opt", "llama3-gqa", "opt-350m"):
        hf_models.save(name, folder / name)
    return {path.name: path for path in folder.iterdir()}


def spoilt(plain: dict[str, Path], name: str, folder: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(plain[name], folder / "hf"))


def change_config(folder: Path, *without: str, **changes) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if key not in without}))


def converted(source: Path, out: Path) -> tuple[pj.ModelConfig, dict[str, np.ndarray]]:
    model = pj.load(convert_checkpoint(source, out).path).model
    return model.config, {name: np.asarray(array) for name, array in parameters(model).items()}


def assert_identical(one: Path, two: Path, folder: Path) -> None:
    """Two checkpoints become the same model, to the bit."""
    config, arrays = converted(one, folder / "one")
    other_config, others = converted(two, folder / "two")
    assert config == other_config
    assert arrays.keys() == others.keys()
    assert all(array.tobytes() == others[name].tobytes() for name, array in arrays.items())


def test_fault_01_an_index_of_bin_files_out_of_the_folder(plain, tmp_path):
    source = spoilt(plain, "opt", tmp_path)
    (source / SINGLE).unlink()
    for place in ("../x.bin", "/etc/passwd", "a/b.bin"):
        (source / TORCH_INDEX).write_text(json.dumps({"weight_map": {"a": place}}))
        with refuses(pj.CheckpointError, f"outside its folder; got '{place}'"):
            convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json"])
def test_fault_06_a_pipe_is_not_waited_for(plain, tmp_path, name):
    source = spoilt(plain, "opt", tmp_path)
    for each in (SINGLE, name):  # an index is looked for where there is no single file
        (source / each).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(pj.CheckpointError):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fault_14_old_and_new_spelling_give_the_identical_model(plain, tmp_path):
    """rope_theta, rope_scaling with "type", torch_dtype; and rope_parameters, dtype."""
    source = spoilt(plain, "llama3-gqa", tmp_path)
    data = json.loads((source / "config.json").read_text())
    scaling = dict(data["rope_parameters"])
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    change_config(
        source, "rope_parameters", "dtype", rope_theta=theta, rope_scaling=scaling, torch_dtype="float32"
    )
    assert config_from_hf(source).rope == config_from_hf(plain["llama3-gqa"]).rope
    assert_identical(source, plain["llama3-gqa"], tmp_path)


def test_fault_16_a_padded_vocabulary_that_the_config_knows(plain, tmp_path):
    """Rows beyond the tokenizer's are the model's all the same."""
    source = spoilt(plain, "opt", tmp_path)
    arrays = load_file(source / SINGLE)
    table = arrays["model.decoder.embed_tokens.weight"]
    arrays["model.decoder.embed_tokens.weight"] = np.concatenate([table, np.zeros((3, 24), np.float32)])
    save_file(arrays, source / SINGLE)
    change_config(source, vocab_size=64)
    config, ours = converted(source, tmp_path / "out")
    assert config.vocab_size == 64
    np.testing.assert_array_equal(ours["embed.tokens"][:61], table)
    assert not ours["embed.tokens"][61:].any()


def test_fault_17_an_absent_head_of_an_untied_model(plain, tmp_path):
    source = spoilt(plain, "llama3-gqa", tmp_path)
    arrays = load_file(source / SINGLE)
    del arrays["lm_head.weight"]
    save_file(arrays, source / SINGLE)
    with refuses(pj.CheckpointError, "1 missing: lm_head.weight. Hint: set tie_word_embeddings to true"):
        convert_checkpoint(source, tmp_path / "out")
    change_config(source, tie_word_embeddings=True)
    assert convert_checkpoint(source, tmp_path / "out").config.tie_embeddings


@pytest.mark.parametrize(
    ("name", "long", "short"),
    [
        ("opt", "model.decoder.", "decoder."),
        ("opt-350m", "model.decoder.", "decoder."),
        ("llama3-gqa", "model.", ""),
    ],
)
def test_fault_18_prefixes_give_the_identical_model(plain, tmp_path, name, long, short):
    """And what Metaseq left behind in old files of OPT is skipped."""
    source = spoilt(plain, name, tmp_path)
    arrays = {
        short + key.removeprefix(long) if key.startswith(long) else key: array
        for key, array in load_file(source / SINGLE).items()
    }
    if name.startswith("opt"):
        arrays["decoder.version"] = np.array([3.0], np.float32)
    save_file(arrays, source / SINGLE)
    assert_identical(source, plain[name], tmp_path)


FULL = """if True:
    import resource, signal, sys
    from checkpoints_convert import convert_checkpoint
    import polarjax
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in map(int, sys.argv[3:]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            convert_checkpoint(*sys.argv[1:3])
        except polarjax.CheckpointError as error:
            print(size, error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(convert_checkpoint(*sys.argv[1:3]).tensors, "tensors")
"""


def test_fault_25_a_disk_that_fills_up_at_any_point(plain, tmp_path):
    """No file may grow beyond so many bytes: one line each time, nothing left; with room again it succeeds."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    sizes = [
        "0",
        "100",
        "300",
        "1000",
        "4000",
        "8000",
    ]  # the smallest of the large files always has 8860 bytes
    command = [sys.executable, "-c", FULL, plain["opt"], tmp_path / "out", *sizes]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *refusals, last = done.stdout.splitlines()
    assert [line.split()[0] for line in refusals] == sizes, done.stdout
    assert all("cannot write here; got File too large. Hint: make room" in line for line in refusals)
    assert done.stderr == "", "nothing of what orbax has to say about it"
    assert last == "52 tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["out", "new/out"])
def test_fault_25_a_disk_without_room_is_refused_before_any_work(plain, tmp_path, monkeypatch, place):
    disk = collections.namedtuple("disk", "free")
    done = convert_checkpoint(plain["opt"], tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk(done.num_bytes - 1))
    with refuses(
        pj.CheckpointError, "out: the disk has too little room; got 0.00 GB, expected at least 0.00 GB"
    ):
        convert_checkpoint(plain["opt"], tmp_path / place)
    with refuses(pj.CheckpointError, "too little room"):
        export_checkpoint(tmp_path / "model", tmp_path / place)
    with refuses(pj.CheckpointError, "too little room"):
        convert_checkpoint(plain["opt"], tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert convert_checkpoint(plain["opt"], tmp_path / place, dtype="bfloat16").dtype == "bfloat16"


def test_fault_27_a_byte_of_a_converted_model_flips(plain, tmp_path):
    """The checksums that were taken while it was written hold for what lies there in the end."""
    folder = convert_checkpoint(plain["opt"], tmp_path / "out").path
    pj.load(folder)
    for file in sorted(path for path in (folder / "params").rglob("*") if path.stat().st_size > 1000):
        if file.is_file():
            data = file.read_bytes()
            file.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
            with refuses(pj.CheckpointError, f"files have changed.*{file.name}"):
                pj.load(folder)
            file.write_bytes(data)
    pj.load(folder)


def test_fault_33_code_is_never_run(plain, tmp_path, capsys):
    """Of a model it is refused, of a tokenizer noted."""
    source = spoilt(plain, "opt", tmp_path)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(source, auto_map={"AutoModelForCausalLM": "evil.Model"})
    code, _, told = run(capsys, "convert", source, tmp_path / "out")
    assert code == 2
    assert "its own code, which polarjax never runs; got auto_map" in told
    change_config(source, auto_map={"AutoTokenizer": "evil.Tokenizer"})
    code, out, _ = run(capsys, "convert", source, tmp_path / "out")
    assert code == 0
    assert "config.json asks for its own code (auto_map), which is never run" in out
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").rglob("*.py"))
