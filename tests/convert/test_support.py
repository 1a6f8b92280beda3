"""The README says of every family what the code does."""

from checkpoints_convert.families import FAMILIES
from tests.convert import hf_models, support


def test_the_readme_tells_what_the_code_supports():
    told = support.block(support.README.read_text("utf-8"))
    assert told == support.matrix(), "run: python -m tests.convert.support"


def test_support_table_and_parity_tests_cover_every_family():
    rows = {line.split("`")[1] for line in support.matrix().splitlines() if line.startswith("| `")}
    tested = {hf_models.named(f"{name}Config").model_type for name, _ in hf_models.MODELS.values()}
    assert rows - {"model_type"} == set(FAMILIES) == tested


def test_the_probe_is_not_blind():
    assert support.read("llama") is not None
    assert support.read("llama", hidden_act="gelu_new") is None
    assert support.row("opt")[2] == "MHA"
    assert len(support.refused()) == 6
