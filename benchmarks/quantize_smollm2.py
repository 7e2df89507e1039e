"""Time and peak memory of quantizing SmolLM2-135M to 4 bits with all nine variants, embeddings included.

    python benchmarks/quantize_smollm2.py [--group-size 64] [--output result.json]

Memory is what the process holds beyond the model itself, sampled every few milliseconds; the bound is twice the model's
largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from pathlib import Path

import psutil
import torch

from dybit import Recipe, quantize_
from dybit.demo import smollm2


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
    """Runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, help="weights that share a scale; default: an output channel's")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    model = smollm2()
    weights = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    recipe = Recipe(weights=4, embeddings=4, variants="all", group_size=arguments.group_size)
    start, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        quantize_(model, recipe)
    result = {
        "recipe": recipe.to_dict(),
        "weights": weights,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_megabytes_beyond_model": round(peak.bytes / 1e6, 1),
        "largest_tensor_megabytes": round(largest / 1e6, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
