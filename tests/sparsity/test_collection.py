"""Recorded activations: what they hold, how large they are, how they are cut short, and what is refused."""

import dataclasses
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import polarjax as pj
from bench.models import LLAMA_2_7B, OPT_6_7B
from polarjax.model import attention, prompt_attention
from polarjax.model.taps import TapSpec, pack, unpack
from polarjax.sparsity import collect, collection
from polarjax.sparsity.activations import open_activations, row_bytes
from polarjax.sparsity.collection import (
    MEAN_WINDOWS,
    fingerprint,
    kept_positions,
    split_windows,
    windows_for_means,
)
from polarjax.sparsity.options import CollectOptions
from tests.model import zoo
from tests.one_line import refuses
from tests.tolerances import assert_close

MEANS = 4 * 2 * 4 * 24  # bytes of the mean outputs
WINDOW = 4 * 12 + 1  # bytes of a window and its part
ODD = dataclasses.replace(zoo.CONFIGS["opt"], d_ff=43)  # the last byte of packed activity is not full


def odd_model(dtype: str = "float32", seed: int = 0) -> pj.Decoder:
    return pj.Decoder(ODD, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype))


def windows(count: int = 5, length: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, zoo.VOCAB, (count, length), np.int32)


def taps_of(model: pj.Decoder, tokens: np.ndarray):
    lengths = jnp.full(len(tokens), tokens.shape[1])
    return jax.jit(pj.forward, static_argnames="taps")(model, tokens, lengths, taps=TapSpec())[1]


def bits(packed: np.ndarray, count: int) -> np.ndarray:
    return np.unpackbits(packed, axis=-1, count=count)


def parts_of(model: pj.Decoder, layer: int, inputs: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The heads' norms [n K], and what each group adds to the layer's output [n K D], from the layer's inputs."""
    block, lengths = model.layers[layer].attn, jnp.full(len(inputs), inputs.shape[1])
    heads = prompt_attention.attend(*attention.project_qkv(block, inputs, None), lengths, window=None)
    heads = np.asarray(heads, np.float64).reshape(-1, *heads.shape[2:])
    added = np.einsum("nkgh,kghd->nkd", heads, np.asarray(block.wo[...], np.float64))
    return np.linalg.norm(heads.reshape(*heads.shape[:2], -1), axis=-1), added


@pytest.mark.parametrize(
    ("importance", "means", "dtype", "batch_size"),
    [
        ("norms", False, "float32", 5),
        ("norms", True, "bfloat16", 2),
        ("contributions", False, "bfloat16", 5),
        ("contributions", True, "float32", 2),
    ],
)
def test_recorded_arrays_equal_the_taps_of_forward(tmp_path, importance, means, dtype, batch_size):
    model, tokens = odd_model(dtype), windows()
    choice = {"importance": importance, "mean_outputs": means}
    activations = collect(model, tokens, tmp_path / "acts", batch_size=batch_size, **choice)
    assert activations.importance == importance and (activations.means is not None) == means
    rows, taps = activations.rows(), taps_of(model, tokens)
    inputs, norms = activations.router_inputs(rows), activations.records("norms", rows)
    packed = activations.records("activity", rows)
    assert inputs.dtype == jnp.dtype(dtype) and packed.shape == (2, 60, 6)
    for layer in range(2):
        expected = np.asarray(taps.activity[layer]).reshape(60, -1)
        assert_close(inputs[layer], np.asarray(taps.inputs[layer]).reshape(60, -1), "rounding")
        recorded, added = parts_of(model, layer, taps.inputs[layer])
        if activations.means is not None:
            mean = added[activations.part == 0].mean(0)
            assert_close(activations.means[layer], mean, "rounding", jnp.dtype(dtype))
            added -= mean
        recorded = recorded if importance == "norms" else np.linalg.norm(added, axis=-1)
        assert_close(norms[layer], recorded, "rounding", jnp.dtype(dtype))
        assert np.mean(bits(packed[layer], 43) != bits(expected, 43)) < 0.005
        change = np.asarray(taps.change[layer]).reshape(60)
        assert_close(activations.change[layer], change, "rounding", jnp.dtype(dtype))


def test_means_are_measured_on_few_training_windows_evenly_spread():
    tokens = np.repeat(np.arange(1000)[:, None], 12, 1)
    part = split_windows(1000, (0.2, 0.1))
    chosen = windows_for_means(tokens[part == 0])[:, 0]
    assert len(chosen) == MEAN_WINDOWS and not part[chosen].any()
    assert np.diff(chosen).min() > 0 and np.diff(chosen).max() < 40


def test_importance_is_the_mean_change_over_the_training_tokens(tmp_path):
    activations = collect(odd_model(), windows(10), tmp_path / "acts")
    train = activations.part == 0
    assert 0 < train.sum() < 120
    for layer, importance in enumerate(activations.attention_importance()):
        assert importance == pytest.approx(activations.change[layer][train].mean(), rel=1e-6)
    with pytest.raises(pj.SparsityError, match=r"hold no change.*polarjax collect"):
        dataclasses.replace(activations, change=None).attention_importance()


def test_a_model_that_is_not_relu_has_no_activity(tmp_path):
    activations = collect(zoo.model("llama-gqa"), windows(), tmp_path / "acts")
    assert activations.activity is None
    assert not (tmp_path / "acts" / "activity.npy").exists()
    with pytest.raises(pj.SparsityError, match="hold no activity"):
        activations.records("activity", activations.rows())


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    )
)
def test_packing_keeps_every_bit(rows):
    active = np.array(rows)
    packed = np.asarray(pack(jnp.asarray(active)))
    assert packed.shape == (len(rows), -(-active.shape[1] // 8))
    assert np.array_equal(np.asarray(unpack(jnp.asarray(packed), active.shape[1])), active)
    for row, of_row in zip(active, packed, strict=True):
        expected = [
            sum(bool(bit) << (7 - i) for i, bit in enumerate(row[j : j + 8])) for j in range(0, len(row), 8)
        ]
        assert of_row.tolist() == expected


def test_the_size_is_what_was_announced(tmp_path):
    activations = collect(odd_model("bfloat16"), windows(), tmp_path / "acts")
    stored = sum(np.load(file).nbytes for file in (tmp_path / "acts").glob("*.npy"))
    assert (
        stored
        == activations.num_tokens * row_bytes(ODD, "bfloat16") + MEANS + 5 * WINDOW
        == 60 * (2 * (24 * 2 + 6 + 4 * 4 + 4) + 1) + MEANS + 5 * WINDOW
        == collection.plan_recording(odd_model("bfloat16"), (5, 12), CollectOptions()).num_bytes
    )


def test_size_bound_is_enforced(tmp_path):
    needed = row_bytes(ODD, "float32") * 60 + MEANS + 5 * WINDOW
    message = rf"got {needed / 1e9:.3g} GB for 60 tokens, expected at most {(needed - 1) / 1e9:.3g} GB.*--max-gb.*--fit"
    with pytest.raises(pj.InputError, match=message):
        collect(odd_model(), windows(), tmp_path / "acts", max_bytes=needed - 1)
    assert list(tmp_path.iterdir()) == []


def test_fit_records_fewer_tokens_and_the_right_ones(tmp_path):
    model, tokens = odd_model(), windows(20)
    everything = collect(model, tokens, tmp_path / "all", batch_size=3)
    bound = 100 * row_bytes(ODD, "float32") + MEANS + 20 * WINDOW
    some = collect(model, tokens, tmp_path / "some", batch_size=3, max_bytes=bound, fit=True)
    assert some.num_tokens == 100
    kept = kept_positions(240, 1, 100, fit=True)
    assert np.array_equal(some.inputs, everything.inputs[:, kept])
    assert np.array_equal(some.activity, everything.activity[:, kept])
    assert np.array_equal(some.part, everything.part[kept])


@given(st.integers(64, 500), st.integers(64, 500))
def test_kept_positions_are_different_and_evenly_spread(offered, allowed):
    kept = kept_positions(offered, 1, allowed, fit=True)
    assert len(kept) == min(offered, allowed)
    edges = np.arange(len(kept) + 1) * offered // len(kept)
    assert np.all((edges[:-1] <= kept) & (kept < edges[1:]))


def test_kept_positions_do_not_beat_with_the_window():
    kept = kept_positions(64 * 1000, 1, 1000, fit=True)  # one a window of 64
    assert len(set((kept % 64).tolist())) == 64


def test_parts_are_whole_windows_of_the_sizes_asked_for(tmp_path):
    activations = collect(odd_model(), windows(40), tmp_path / "acts", held_out=(0.2, 0.1))
    by_window = activations.part.reshape(40, 12)
    assert np.all(by_window == by_window[:, :1])
    assert [np.sum(by_window[:, 0] == part) for part in range(3)] == [28, 8, 4]
    parts = [set(activations.rows(part).tolist()) for part in ("train", "validation", "test")]
    assert set.union(*parts) == set(range(480)) and sum(map(len, parts)) == 480


@pytest.mark.parametrize("held_out", [(0.0, 0.0), (0.05, 0.0)])
def test_a_part_that_is_not_asked_for_is_empty(held_out):
    part = split_windows(10, held_out)
    assert [np.sum(part == i) for i in (1, 2)] == [held_out[0] > 0, 0]


@pytest.mark.parametrize("held_out", [(-0.1, 0.1), (0.5, 0.5), (1.0, 0.0), (0.1, math.nan), (math.nan, 0.1)])
def test_unusable_fractions_are_refused(held_out):
    with refuses(pj.InputError, "unusable fractions"):
        split_windows(10, held_out)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(pj.InputError, match=r"too short to train on; got 2 windows, expected at least 3"):
        split_windows(2, (0.1, 0.1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device"), MemoryError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    taps, calls = collection._taps, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return taps(*args)

    monkeypatch.setattr(collection, "_taps", failing)
    with pytest.raises((KeyboardInterrupt, pj.CheckpointError, MemoryError)):
        collect(odd_model(), windows(), tmp_path / "acts", batch_size=1)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_our_folders(tmp_path):
    model = odd_model()
    collect(model, windows(), tmp_path / "acts")
    with pytest.raises(pj.CheckpointError, match="already exists"):
        collect(model, windows(7), tmp_path / "acts")
    assert collect(model, windows(7), tmp_path / "acts", overwrite=True).num_tokens == 84
    (tmp_path / "mine").mkdir()
    Path(tmp_path, "mine", "letter.txt").write_text("dear")
    with pytest.raises(pj.CheckpointError, match="overwriting is refused"):
        collect(model, windows(), tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((0, 5), int), "not token windows"),
        (np.zeros(5, int), "not token windows"),
        (np.zeros((2, 5)), "not token windows"),
        (np.zeros((3, 49), int), "got 49 tokens, expected at most 48"),
        (np.full((3, 5), 61), "row 0, token 0 is outside the vocabulary.*got 61, expected 0 to 60"),
        (np.full((3, 5), -1), "outside the vocabulary"),
    ],
)
def test_bad_windows_are_refused(tmp_path, tokens, message):
    with pytest.raises(pj.InputError, match=message):
        collect(odd_model(), tokens, tmp_path / "acts")
    assert list(tmp_path.iterdir()) == []


def test_activations_know_their_model(tmp_path):
    model = odd_model()
    activations = collect(model, windows(), tmp_path / "acts")
    activations.check(ODD, fingerprint(model))
    with pytest.raises(pj.SparsityError, match="another model; got weights"):
        activations.check(ODD, fingerprint(odd_model(seed=1)))
    with pytest.raises(pj.SparsityError, match="another model; got d_ff 43, expected 40"):
        activations.check(zoo.CONFIGS["opt"])


def spoil_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: spoil_meta(folder, format=1),
        lambda folder: spoil_meta(folder, tokens=59),
        lambda folder: spoil_meta(folder, importance="size"),
        lambda folder: (folder / "means.npy").unlink(),
        lambda folder: (folder / "windows.npy").unlink(),
        lambda folder: spoil_meta(folder, windows=[5, 13]),
        lambda folder: spoil_meta(folder, windows=60),
        lambda folder: spoil_meta(folder, dtype="float16"),
        lambda folder: spoil_meta(folder, dtype="float99"),
        lambda folder: (folder / "norms.npy").unlink(),
        lambda folder: (folder / "change.npy").unlink(),
        lambda folder: (folder / "inputs.npy").write_bytes((folder / "inputs.npy").read_bytes()[:-1]),
        lambda folder: np.save(folder / "activity.npy", np.zeros((2, 60, 6), np.int8)),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, spoil):
    collect(odd_model(), windows(), tmp_path / "acts")
    spoil(tmp_path / "acts")
    with pytest.raises(pj.InputError, match=r"acts: not a usable folder of activations.*polarjax collect"):
        open_activations(tmp_path / "acts")


@pytest.mark.parametrize(("version", "missing"), [(2, ("importance", "means", "windows")), (3, ("windows",))])
def test_a_folder_of_an_earlier_format_is_read(tmp_path, version, missing):
    collect(odd_model(), windows(), tmp_path / "acts", importance="norms", mean_outputs=False)
    meta = json.loads((tmp_path / "acts" / "meta.json").read_text())
    old = {name: value for name, value in meta.items() if name not in missing} | {"format": version}
    (tmp_path / "acts" / "meta.json").write_text(json.dumps(old))
    (tmp_path / "acts" / "windows.npy").unlink()
    activations = open_activations(tmp_path / "acts")
    assert (activations.importance, activations.means, activations.num_tokens) == ("norms", None, 60)
    with pytest.raises(pj.SparsityError, match=r"hold no text.*collect them again.*--refine-tokens 0"):
        activations.windows_of("train")


def test_the_text_is_kept_with_its_split(tmp_path):
    offered = windows(10)
    activations = collect(odd_model(), offered, tmp_path / "acts", held_out=(0.3, 0.1))
    parts = [activations.windows_of(part) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [6, 3, 1]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, offered))
    np.testing.assert_array_equal(offered[activations.window_part == 1], parts[1])
    np.testing.assert_array_equal(np.repeat(activations.window_part, offered.shape[1]), activations.part)


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    activations = collect(odd_model(), windows(), tmp_path / "acts")
    with pytest.raises(pj.InputError, match="no such part; got 'dev', expected train"):
        activations.rows("dev")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_windows_is_refused(tmp_path, batch_size):
    with pytest.raises(pj.InputError, match=f"batch_size is not usable; got {batch_size}"):
        collect(odd_model(), windows(), tmp_path / "acts", batch_size=batch_size)
    assert list(tmp_path.iterdir()) == []


PUBLISHED = 400_000  # tokens that the published routers learned from


@pytest.mark.parametrize(
    ("config", "whole", "passes", "most"),
    [(OPT_6_7B, 132.78, 5, 29.05), (LLAMA_2_7B, 106.55, 4, 26.64)],
)
def test_what_published_models_need_on_disk(config, whole, passes, most):
    """All layers of 400,000 tokens would be more than 100 GB; a few at a time are under 40."""
    model = types.SimpleNamespace(config=config, dtype=jnp.dtype(jnp.bfloat16))  # the weights are not read
    shape, options = (PUBLISHED // 500, 500), CollectOptions(mean_outputs=False)
    with refuses(pj.InputError, rf"larger than allowed; got {whole:.0f} GB.*--fit.*polarjax sparsify"):
        collection.plan_recording(model, shape, options)
    planned = collection.plan_recording(model, shape, options, in_parts=True)
    assert len(planned.part) == PUBLISHED and len(planned.parts) == passes
    assert sum(map(len, planned.parts)) == 32 and planned.num_bytes / 1e9 == pytest.approx(most, abs=0.01)
    assert f"up to {max(map(len, planned.parts))} of 32 layers, in {passes} passes" in str(planned)
    assert PUBLISHED * row_bytes(config, "bfloat16") / 1e9 == pytest.approx(whole, abs=0.02)
    fitted = collection.plan_recording(model, shape, dataclasses.replace(options, fit=True), in_parts=True)
    assert len(fitted.part) < PUBLISHED and len(fitted.parts) == 1


def test_layers_recorded_a_few_at_a_time_are_those_recorded_together(tmp_path):
    model, tokens = zoo.model("window"), windows()
    L, options = model.config.num_layers, CollectOptions()
    whole = collect(model, tokens, tmp_path / "all")
    recording = collection.plan_recording(model, tokens.shape, options)
    means = collection.means_of(model, tokens, recording, 8)
    for layers in collection.divided(L, 2):
        folder = tmp_path / str(layers.start)
        part = collection.record(model, tokens, recording, folder, layers=layers, means=means)
        assert part.config.num_layers == len(layers)
        for name in ("inputs", "norms", "change", "means"):
            expected = getattr(whole, name)[layers.start : layers.stop]
            assert_close(getattr(part, name), expected, "rounding")
        np.testing.assert_array_equal(part.part, whole.part)


def test_as_many_layers_a_pass_as_fit_evenly():
    assert [len(each) for each in collection.divided(32, 5)] == [7, 6, 7, 6, 6]
    assert list(collection.divided(3, 3)) == [range(1), range(1, 2), range(2, 3)]
