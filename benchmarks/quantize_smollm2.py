"""Time and peak memory of quantizing SmolLM2-135M to 4 bits with all nine variants, embeddings included.

Memory is what the process holds beyond the model itself, sampled every few milliseconds. The bound is twice the largest
tensor of the model.
"""

from __future__ import annotations

import threading
import time

import psutil
from results import Column, Results, parser

from dybit import Recipe, quantize_
from dybit.demo import smollm2

COLUMNS = (
    Column("group_size", "weights that share a scale"),
    Column("weights", "weights, 10⁶", 1),
    Column("seconds", "s", 1),
    Column("cpu_seconds", "CPU, s", 1),
    Column("peak", "peak beyond the model, MB", 1),
    Column("bound", "bound, MB", 1),
)


class PeakMemory:
    """Watches the resident memory of this process from a thread: ``with PeakMemory() as peak: ...; peak.bytes``."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._base = self._process.memory_info().rss
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._base)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--group-size", type=int, help="weights that share a scale; default: an output channel's")
    options = reader.parse_args()
    recipe = Recipe(weights=4, embeddings=4, variants="all", group_size=options.group_size)
    with Results(__file__, __doc__, COLUMNS, options, {"W4": recipe}) as results:
        if results.rows:
            return
        model = smollm2()
        weights = sum(parameter.numel() for parameter in model.parameters())
        largest = max(parameter.nbytes for parameter in model.parameters())
        start, cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as peak:
            quantize_(model, recipe)
        results.add(
            group_size=options.group_size or "output channel",
            weights=weights / 1e6,
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            peak=peak.bytes / 1e6,
            bound=2 * largest / 1e6,
        )


if __name__ == "__main__":
    main()
