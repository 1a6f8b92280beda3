"""One of several processes: computes over all devices until it is done, or ends as it is asked to."""

import os
import signal
import sys

from polarjax import distributed


def main(coordinator: str, processes: str, process_id: str, ending: str) -> None:
    """Gathers from all devices, up to 20 times; `ending` says who ends after 10, and how: "1 killed"."""
    distributed.initialize(coordinator, int(processes), int(process_id), timeout=8, start_timeout=60)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from polarjax.model.readable import fetched

    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    ones = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, PartitionSpec("model")))
    for i in range(20):
        if i == 10 and ending == f"{process_id} killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 10 and ending == f"{process_id} stops":
            print("stops now", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        print(f"{jax.device_count()} devices: {int(fetched(ones).sum())}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
