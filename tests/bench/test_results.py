"""The README's tables of speed are those that the files of results make, and pictures can be drawn of them."""

import json

import pytest

from bench import many_gpus, pictures, readme_tables, report, roofline
from bench.models import shape_of
from polarjax.model.mesh_shape import MeshShape

ROW = {"device": "a GPU", "jax": "1", "commit": "c", "copy_gbps": 1000.0, "bytes": 10**8}


def write(folder, name, *rows):
    folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))


def test_readme_holds_what_was_measured():
    readme = readme_tables.README.read_text(encoding="utf-8")
    made = readme_tables.spliced(readme, readme_tables.markdown())
    assert readme == made, (
        "run `python -m bench.readme_tables` and `python -m bench.roofline`, and commit both"
    )


def test_predictions_are_those_of_the_rows(monkeypatch, tmp_path):
    assert many_gpus.PAGE.read_text(encoding="utf-8") == many_gpus.page(), "run `python -m bench.many_gpus`"
    row = {
        "case": "opt-66b B64 S1920",
        "kind": "heads 0.3, neurons 0.49",
        "devices": 4,
        "data": 1,
        "model": 4,
    }
    row |= {"attention": "groups", "copy_gbps": 4271.0}
    step = many_gpus.Step(shape_of("opt-66b"), 64, MeshShape(model=4), sparse=True)
    write(tmp_path, "decode_mesh", row | {"ms_per_step": 1e3 * step.predicted(4271e9) / 1.25})
    monkeypatch.setattr(many_gpus, "MANY", tmp_path / "decode_mesh.jsonl")
    (found,) = many_gpus.compared()
    assert found[:4] == [row["case"], row["kind"], "a GPU", "data=1, model=4, by groups"]
    assert found[-1] == "+25 %"


def test_what_has_no_row_was_not_measured(tmp_path):
    case = "opt-6.7b B16 S1920 d1"
    failed = {"case": case, "kernel": "cudnn", "failed": "no cuDNN"}
    ours = {"case": case, "kernel": "mosaic", "time_us": 125.0, "pct_peak": 80.0, "same": ["opt-6.7b"]}
    write(tmp_path, "decode_attention", ours, failed)
    tables = readme_tables.markdown(tmp_path)
    assert "| OPT-6.7B, 16, 1,920 | 125 µs | 80 % | not measured | not measured | not measured |" in tables
    assert "(a GPU, jax 1, commit c, copies at 1,000 GB/s,\nbfloat16)" in tables
    for title in ("Selective MLP", "Selection of neurons", "Whole models"):
        _, section = tables.split(f"#### {title}\n")
        assert "(not measured on a GPU" in " ".join(section.partition("#### ")[0].split())


def test_latest_commit_supplies_the_row(tmp_path):
    case, same = "opt-6.7b B16 S3968 d1", ["opt-6.7b", "llama-2-7b"]
    old = {"case": case, "kernel": "mosaic", "time_us": 300.0, "pct_peak": 70.0, "same": same}
    write(tmp_path, "decode_attention", old, old | {"commit": "d", "time_us": 200.0})
    assert "| LLaMA-2-7B, 16, 3,968 | 200 µs | 70 % |" in readme_tables.attention(tmp_path)


def test_a_second_device_is_not_mixed_in(tmp_path):
    case = "opt-6.7b B16 S1920 d"
    dense = {"case": case + "1", "kernel": "mosaic", "time_us": 300.0, "pct_peak": 70.0}
    sparse = {"case": case + "0.3", "kernel": "mosaic", "time_us": 100.0, "pct_peak": 60.0}
    write(tmp_path, "decode_attention", dense, sparse, sparse | {"device": "another", "time_us": 200.0})
    table = readme_tables.attention(tmp_path)
    assert "| OPT-6.7B, 16, 1,920 | 300 µs | 70 % | 9 of 32: 60 %, 3.00 × |" in table
    assert "another" not in table
    points = [point for kind in roofline.series(tmp_path) for point in kind.points]
    assert len(points) == 2


def test_heuristic_is_shown_instead_of_the_best(tmp_path):
    dense = {"case": "opt-66b B16 d1", "kernel": "dense", "time_us": 300.0, "pct_peak": 90.0}
    ours = [
        {"case": "opt-66b B16 d0.1", "kernel": f"tile {i}", "time_us": time, "pct_peak": 60.0}
        for i, time in enumerate((60.0, 50.0))
    ]
    write(tmp_path, "sparse_mlp", dense, *ours)
    assert "| OPT-66B, 16 | 300 µs | 60 % | 5.00 × |" in readme_tables.mlp(tmp_path)
    (_, mlp) = roofline.series(tmp_path)
    assert mlp.points == ((10**8, 10**8 / 60e-6 / 1e12),)


def test_selection_shows_the_devices_time(tmp_path):
    row = {"case": "opt-66b B64 d0.3", "kernel": "mosaic", "time_us": 9.0, "wall_us": 36.0}
    write(tmp_path, "selection", row, row | {"kernel": "xla", "time_us": 90.0})
    told = readme_tables.selection(tmp_path)
    assert "Device time" in told
    assert "| OPT-66B, 64 | not measured | 9.0 µs | 90.0 µs |" in told


@pytest.mark.parametrize("text", ["", readme_tables.BEGIN, readme_tables.END + readme_tables.BEGIN])
def test_a_readme_without_markers_is_an_error(text):
    with pytest.raises(ValueError, match="markers"):
        readme_tables.spliced(text, "tables")


def test_picture(tmp_path):
    path = tmp_path / "picture.png"
    roofline.draw(roofline.series(), path, roofline.title())
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 200_000
    assert roofline.PICTURE.stat().st_size < 200_000
    with pytest.raises(ValueError, match="no rows"):
        roofline.draw(roofline.series(tmp_path), path, "")


def test_steps_beside_pytorch(tmp_path):
    """Rows of another device are not compared; steps without any row are named before the table."""
    case = "opt-6.7b B16 S1920"
    ours = {"case": case, "kind": "dense", "ms_per_step": 8.0, "pct_of_floor": 87.5, "tokens_per_s": 2000.0}
    write(tmp_path, "decode", ours, ours | {"kind": "heads 0.5, neurons 0.4", "ms_per_step": 4.0})
    theirs = {"case": case, "kind": "torch", "ms_per_step": 9.0, "tokens_per_s": 1777.0, "torch": "2"}
    write(tmp_path, "torch", theirs, theirs | {"kind": "transformers", "ms_per_step": 16.0})
    line = "| OPT-6.7B, 16, 1,920 | heads 0.5, neurons 0.4 | 8.00 | 88 % | 4.00 | 88 % | 2,000 | 2.00 × | "
    table = readme_tables.steps(tmp_path)
    assert line + "9.00 | 1.12 × | 16.00 |" in table
    named = " ".join(table.split()).partition("Not measured at all: ")[2]
    assert named.startswith("OPT-6.7B at 1 and 64, LLaMA-2-7B at 1 and 16 and 48, ")
    assert "Mistral" not in table.partition("| --- |")[2]
    write(tmp_path, "torch", theirs | {"device": "another"})
    assert line + "not measured | not measured | not measured |" in readme_tables.steps(tmp_path)


def test_jobs_compare_with_static_batches(tmp_path):
    case = {"case": "llama-2-7b B64 R256"}
    engine = {"kind": "engine, dense", "seconds": 5.0, "tokens_per_s": 3000.0, "prompts_per_s": 12.0}
    engine |= {"rows_in_use_pct": None}  # no request waited
    static = {"kind": "static, dense", "seconds": 9.0, "tokens_per_s": 1500.0}
    lone = {"kind": "lone T512, dense", "first_token_ms": 20.0, "over_prefill": 1.2}
    serve = {"kind": "serve, dense", "seconds": 5.5, "tokens_per_s": 2850.0}
    write(tmp_path, "generate", *(case | row for row in (static, engine, lone, serve)))
    first = readme_tables.jobs(tmp_path).splitlines()[-1]  # no sparse engine was measured
    assert first.startswith("| LLaMA-2-7B, 64, 256 | dense | 3,000 | 12.0 | not measured | ")
    assert first.endswith("| 1,500 | 2.00 × | 0.95 × | 1.20 ×, not measured |")


def test_pictures_of_steps(tmp_path):
    draw = (pictures.draw_batches, pictures.draw_parts, pictures.draw_quality)
    assert not any(each(tmp_path) for each in draw)
    case = {"case": "llama-2-7b B16 S3968", "kind": "dense"}
    write(tmp_path, "decode", case | {"ms_per_step": 9.0, "tokens_per_s": 1777.0})
    write(tmp_path, "step_parts", case | {"total_ms": 3.0, "attention": 2.0, "head": 1.0})
    (bar,) = pictures.bars(
        report.read_jsonl(tmp_path / "step_parts.jsonl"), pictures.Results.read("decode", tmp_path)
    )
    assert (bar.parts, bar.whole) == ({"attention": 2.0, "head": 1.0}, 9.0)
    cost = {"model": "widened", "windows": 96, "what": "router", "protocol": "masked", "text": "novels_valid"}
    ours = {
        "stage": "polarjax tune --minutes 8.5 --blend 0.8 --router-width 256: 8.5 min",
        "kept": 5,
        "increase": 0.02,
    }
    write(
        tmp_path, "quality", *({**cost, **ours, **change} for change in ({}, {"kept": 4, "increase": 0.04}))
    )
    assert pictures.costs(report.read_jsonl(tmp_path / "quality.jsonl"), "novels_valid") == {
        "tune": [(4, 4.0), (5, 2.0)]
    }
    assert all(each(tmp_path) for each in draw)
    for name in (pictures.BATCH, pictures.STEP, pictures.QUALITY):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
