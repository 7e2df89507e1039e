"""Sensitivities on a Dask cluster: any executor does, and ``Client.get_executor()`` is one.

    pip install "dybit[search,dask,demo]"
    python examples/search_on_dask.py [tcp://scheduler:8786]

Without an address a cluster of two processes is started on this machine. Workers need dybit and the module that the
model comes from; each is sent the model once. Finished cells are kept in this machine's cache directory.
"""

import sys

import dybit
from dybit.demo import minilm, minilm_batches


def main() -> None:
    """Searches MiniLM for a speedup of 3 on the accelerator."""
    from distributed import Client, LocalCluster

    given = sys.argv[1] if len(sys.argv) > 1 else LocalCluster(n_workers=2, threads_per_worker=1)
    with Client(given) as client:
        result = dybit.search(
            minilm(),
            minilm_batches(batches=2),
            constraint=dybit.Speedup(3.0),
            cost=dybit.AcceleratorCost(),
            executor=client.get_executor(),
            progress=lambda done, total, text: print(f"{done}/{total} {text}", flush=True),
        )
    print(result.recipe.to_json())
    print(f"error {result.point.error:.4g} ({result.error_unit}), speedups {result.point.speedups}")


if __name__ == "__main__":
    main()
