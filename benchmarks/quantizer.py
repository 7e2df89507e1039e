"""Rounding and quantizing by the kernels against plain torch: paired, interleaved, one thread's processor time.

Run ``python benchmarks/quantizer.py``. A matrix of 4096×4096 is rounded (fake quantization, to FP32 again) and
quantized (scale and variant of every unit by least squared error, codes packed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from dybit.kernels import extension
from dybit.kernels.code_operators import fake_quantize, fake_quantize_dynamic
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


def measure(run: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds by the kernels and by plain torch."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(2 * (rounds + 1)):
        with mock.patch.object(extension, "load", (lambda: None) if i % 2 else extension.load):
            begin = time.thread_time()
            run()
            if i > 1:  # the first makes the tables
                times[i % 2].append(time.thread_time() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, one = torch.randn(options.rows, 4096), torch.tensor([0.3])

    def quantizer(family: str, group: int | None) -> Callable[[], object]:
        granularity = "group" if group else "channel"
        spec = TensorSpec(family, tuple(x.shape), granularity, group, choice=granularity)
        return lambda: quantize(x, spec)

    cases: dict[str, Callable[[], object]] = {
        "round to s4, one scale": lambda: fake_quantize(x, one, None, "s4"),
        "round to s8, one scale": lambda: fake_quantize(x, one, None, "s8"),
        "round to nf4, one scale": lambda: fake_quantize(x, one, None, "nf4"),
        "round to s4, dynamic groups of 128": lambda: fake_quantize_dynamic(x, "s4", 4.0, 128),
        "quantize, dybit4, channels": quantizer("dybit4", None),
        "quantize, dybit4, groups of 128": quantizer("dybit4", 128),
        "quantize, dybit4, groups of 32": quantizer("dybit4", 32),
        "quantize, dybit8, channels": quantizer("dybit8", None),
    }
    results = []
    print(f"{extension.isa()}\n\n| what | kernels M/s | torch M/s | times faster |\n|---|---|---|---|")
    for name, run in cases.items():
        rounds = options.rounds if name.startswith("round") else max(1, options.rounds // 3)
        mine, plain = measure(run, rounds)
        ratio = statistics.median(b / a for a, b in zip(mine, plain, strict=True))
        speeds = [x.numel() / statistics.median(seconds) / 1e6 for seconds in (mine, plain)]
        results.append({"what": name, "million_per_second": speeds, "ratio": ratio})
        print(f"| {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratio:.1f}× |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"isa": extension.isa(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
