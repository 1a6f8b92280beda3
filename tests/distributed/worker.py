"""One of several processes: computes over all devices until it is done, or ends as it is asked to; or places a model."""

import os
import signal
import sys

from polarjax import distributed


def main(coordinator: str, processes: str, process_id: str, ending: str) -> None:
    """Gathers from all devices, up to 20 times; `ending` says who ends after 10, and how: "1 killed". With
    "places", does that instead."""
    distributed.initialize(coordinator, int(processes), int(process_id), timeout=8, start_timeout=60)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from polarjax.model.readable import fetched

    if ending == "places":
        places()
        return
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    ones = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, PartitionSpec("model")))
    for i in range(20):
        if i == 10 and ending == f"{process_id} killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 10 and ending == f"{process_id} stops":
            print("stops now", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        print(f"{jax.device_count()} devices: {int(fetched(ones).sum())}", flush=True)


def places() -> None:
    """Places a model whose plans assign groups to devices, and prints whether these then hold the same weights."""
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx

    import polarjax as pj
    from polarjax.model.readable import fetched
    from tests.model import zoo

    config = dataclasses.replace(zoo.CONFIGS["opt"], num_layers=6, vocab_size=64)
    L, K = config.num_layers, config.num_kv_heads
    rows, order = (((None,) * L,), ((1.0,) * L,)), (tuple(reversed(range(K))),) * L
    plans = pj.PlanTable(L, config.d_ff, K, (2,), *rows, group_shards=4, order=order)
    alone = pj.Bundle(pj.Decoder(config, rngs=nnx.Rngs(0)), plans=plans)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    spread = [pj.shard(alone, mesh) for _ in range(3)][-1]
    pairs = ((each.model.layers[-1].attn.wq[...], step) for each, step in ((alone, -1), (spread, 1)))
    one, many = (np.asarray(fetched(value))[:, ::step] for value, step in pairs)
    print(np.array_equal(one, many))


if __name__ == "__main__":
    main(*sys.argv[1:])
