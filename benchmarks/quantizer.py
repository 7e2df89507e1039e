"""Rounding and quantizing a matrix: kernels against plain torch.

Rounding is fake quantization, to FP32 again. Quantizing chooses scale and variant of every unit by least squared error
and packs the codes. Both sides take turns; times are the processor time of one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from results import Column, Results, parser

from dybit.kernels import extension
from dybit.kernels.code_operators import fake_quantize, fake_quantize_dynamic
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

COLUMNS = (
    Column("what", "what"),
    Column("rows", "rows"),
    Column("columns", "columns"),
    Column("kernels", "kernels, 10⁶ weights/s", 1),
    Column("torch", "torch, 10⁶ weights/s", 1),
    Column("ratio", "times as fast", 1, "×"),
)


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
    reader = parser(__doc__)
    reader.add_argument("--rounds", type=int, default=5)
    reader.add_argument("--rows", type=int, default=4096)
    reader.add_argument("--columns", type=int, default=4096)
    options = reader.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, one = torch.randn(options.rows, options.columns), torch.tensor([0.3])

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
    with Results(__file__, __doc__, COLUMNS, options) as results:
        for name, run in cases.items():
            if results.has(what=name):
                continue
            rounds = options.rounds if name.startswith("round") else max(1, options.rounds // 3)
            ours, plain = measure(run, rounds)
            results.add(
                what=name,
                rows=options.rows,
                columns=options.columns,
                kernels=x.numel() / statistics.median(ours) / 1e6,
                torch=x.numel() / statistics.median(plain) / 1e6,
                ratio=statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
            )


if __name__ == "__main__":
    main()
