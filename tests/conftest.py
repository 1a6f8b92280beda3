"""Set-up of every test: JAX on the CPU and strict about shapes, no network, the GPU compiler within reach."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = os.environ.get("POLARJAX_TEST_PLATFORM", "cpu")
# Pallas's GPU interpreter runs a kernel's threads side by side on JAX's CPU threads, and they wait for each other: with
# as few as a small machine's processors they would wait forever.
os.environ["NPROC"] = "16"
# Programs that one worker, or a process that a test starts, has compiled serve the others and later runs: JAX finds them
# by all that they depend on. And no test writes into the user's cache folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Most of the tests' time is compilation, and each program runs a few times only: LLVM need not optimize them, a program
# need not be cut in pieces that are compiled side by side, and XLA's older emitter, which writes LLVM's language at once
# and not by way of MLIR, needs a third of the time. The demo's test asks for the defaults, because it computes a lot.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
)
os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "MPLBACKEND": "agg"}

_aot = str(Path(sys.prefix, "aot"))  # where `make test` puts the GPU compiler
if importlib.util.find_spec("jax_cuda13_plugin") is None and Path(_aot).is_dir():
    sys.path.insert(0, _aot)  # first, because torch brings a part of the same packages, without ptxas
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_aot, os.environ.get("PYTHONPATH")]))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(
    20_000, 50, 50
)  # tracing makes many objects that live long; looking for garbage took 6 % of the time
hypothesis.settings.register_profile("polarjax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("polarjax")


# Begun first, so that one worker doesn't end long after the other: the files that take longest, the longest first.
LONGEST = """
    demo/test_demo jobs/test_ray test_mesh test_switches sparsity/test_sparsify kernels/test_decode_attention
    sparsity/test_tuning test_readme kernels/test_sparse_mlp_aot engine/test_engine evaluation/test_sweep
    model/test_hf_parity kernels/test_sparse_mlp model/test_forward kernels/test_decoder generation/test_generate
    kernels/test_mesh_program cli/test_generate kernels/test_selection cli/test_answering checkpoint/test_checkpoint
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first."""
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


MOST_MAPS = 20_000  # of the 65530 memory maps that Linux gives a process; XLA crashes when it gets no more


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """Modules share compiled programs until those take too many memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
