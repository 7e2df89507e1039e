"""Exported models in ONNX Runtime: size, difference from torch, and time against the FP32 model in ONNX Runtime.

Run ``python benchmarks/onnx_export.py`` (``--help`` for options) with the extras ``demo`` and ``onnx``. Every width is
exported under every preset that applies; ``fp4`` has no time, since ONNX Runtime's CPU provider does not run it. Times
are medians of the processor time of one thread, on one sample and on one batch, with FP32 measured beside each file in
alternation.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

import dybit
from dybit import demo
from dybit.errors import DyBitError
from dybit.onnx import capture, export

Make = Callable[[], tuple[nn.Module, list[Any]]]


def mlp() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16)]
    return nn.Sequential(*layers).eval(), [torch.randn(16, 256) for _ in range(4)]


def minilm() -> tuple[nn.Module, list[Any]]:
    return demo.minilm(), demo.minilm_batches(batch_size=4, batches=4)


def efficientnet_lite0() -> tuple[nn.Module, list[Any]]:
    return demo.efficientnet_lite0(), demo.image_batches(batch_size=2, batches=2)


MODELS: dict[str, Make] = {"MLP": mlp, "MiniLM": minilm, "EfficientNet-Lite0": efficientnet_lite0}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(what is quantized, preset, recipe)."""
    plain = [
        (f"W{bits}", preset, {"weights": bits, "embeddings": bits})
        for bits in (2, 3, 4, 8)
        for preset in ("portable", "fast-cpu")
    ]
    integer = {"activations": "int8", "activation_offset": False}
    return [
        *plain,
        ("W8 integer", "fast-cpu", {"weights": "s8r1", "embeddings": 8}),
        ("W4A8 integer", "portable", {"weights": 4, "embeddings": 4, **integer}),
        ("W4A8 integer", "fast-cpu", {"weights": 4, "embeddings": 4, **integer}),
        ("W4 s4r2", "fp4", {"weights": "s4r2", "embeddings": "s4r2"}),
    ]


def session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def milliseconds(contestants: list[onnxruntime.InferenceSession], batch: Any, seconds: float) -> list[float]:
    """Medians of the thread's processor time, in alternation."""
    arrays = [x.numpy() for x in torch.utils._pytree.tree_leaves(capture.arguments(batch))]
    feeds = [dict(zip([i.name for i in s.get_inputs()], arrays, strict=True)) for s in contestants]
    times: list[list[float]] = [[] for _ in contestants]
    start = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - start < seconds:
        for i, contestant in enumerate(contestants):
            begin = time.thread_time()
            contestant.run(None, feeds[i])
            times[i].append((time.thread_time() - begin) * 1e3)
    return [statistics.median(values[1:]) for values in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| model | quantized | preset | stored as | MB | of FP32 | largest difference "
          "| ms, 1 sample | × faster than FP32 | ms, batch | × faster |")  # fmt: skip
    print("|---" * 11 + "|")
    for name in options.models:
        model, batches = MODELS[name]()
        reference = ir.to_proto(capture.capture(model, batches, 21)).SerializeToString()
        fp32 = sum(4 * t.numel() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
        base = session(reference)
        for what, preset, recipe in cases():
            quantized = copy.deepcopy(model)
            dybit.quantize_(quantized, dybit.Recipe(**recipe), calibration=batches)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    done = export(quantized, Path(folder) / "m.onnx", batches[:1], preset=preset)
                except DyBitError as error:
                    print(f"| {name} | {what} | {preset} | {error} | | | | | | | |", flush=True)
                    continue
                data = done.path.read_bytes()
            ms: list[list[float]] = []
            if preset != "fp4":
                pair = [session(data), base]
                one = torch.utils._pytree.tree_map(lambda x: x[:1], batches[0])
                ms = [milliseconds(pair, batch, options.seconds) for batch in (one, batches[0])]
            stored = ", ".join(f"{n} × {kind}" for kind, n in done.stored.items())
            speed = " | ".join(f"{own:.2f} | {other / own:.2f}" for own, other in ms) or "– | – | – | –"
            print(f"| {name} | {what} | {preset} | {stored} | {done.nbytes / 1e6:.2f} | {done.nbytes / fp32:.3f} | "
                  f"{done.check.difference:.1e} | {speed} |", flush=True)  # fmt: skip
            rows.append({"model": name, "case": what, "preset": preset, "nbytes": done.nbytes, "fp32": fp32,
                         "difference": done.check.difference, "rms": done.check.error, "ms": ms})  # fmt: skip
    if options.json:
        versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps(versions | {"results": rows}, indent=1))


if __name__ == "__main__":
    main()
