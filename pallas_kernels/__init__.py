"""Selective decode kernels for JAX: each operation in plain XLA and in Pallas for Hopper GPUs.

`sparse_decode_attention` attends over the selected KV groups of a cache, `sparse_mlp` computes the selected neurons of
an MLP, and `select_top_k` selects either from scores. These are pure and work in `jit`, `scan`, `vmap` and `shard_map`.
On a Hopper GPU, `implementation=None` uses the kernel ("mosaic") if it can do the call, otherwise plain XLA; a named
implementation runs or raises. `record_backends` lists the backend of each traced call and why others were rejected:

    with record_backends() as choices:
        jax.jit(step).lower(x)
    print(*choices, sep="\\n")  # sparse_mlp: xla (not mosaic: needs an NVIDIA Hopper GPU; got cpu)

"mosaic" can be lowered without a GPU (running it on a CPU raises JAX's own ValueError); `jax.export` must be told to
allow its custom call:

    allowed = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[allowed])(x)

On several Hopper GPUs of a process, `all_reduce_norm` sums over them what half a layer computed, adds it to the residual
stream and normalizes it, in one kernel; `connect` links the devices first. Elsewhere there is `jax.lax.psum`.

In profiles and compiled programs a call is named after its operation and backend, such as "sparse_mlp.mosaic".
"""

from pallas_kernels._dispatch import Choice, record_backends
from pallas_kernels.all_reduce_norm import Link, all_reduce_norm, connect
from pallas_kernels.decode_attention import sparse_decode_attention
from pallas_kernels.selection import select_top_k
from pallas_kernels.sparse_mlp import sparse_mlp

__all__ = [
    "Choice",
    "Link",
    "all_reduce_norm",
    "connect",
    "record_backends",
    "select_top_k",
    "sparse_decode_attention",
    "sparse_mlp",
]
