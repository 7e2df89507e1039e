"""Exported models in ONNX Runtime: size, difference from torch, and time against the FP32 model.

Every width is exported under every preset that applies. ``fp4`` has no time, since the CPU provider of ONNX Runtime
does not run it. Times are medians of the processor time of one thread, on one sample and on one batch, in turns with
the FP32 model in ONNX Runtime. Needs the extras ``demo`` and ``onnx``.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from results import Column, Results, parser
from torch import nn

import dybit
from dybit import demo
from dybit.errors import DyBitError
from dybit.onnx import capture, export

COLUMNS = (
    Column("model", "model"),
    Column("quantized", "quantized"),
    Column("preset", "preset"),
    Column("stored", "stored as"),
    Column("megabytes", "MB"),
    Column("share", "of FP32", 3),
    Column("difference", "largest difference", 7),
    Column("sample_ms", "one sample, ms"),
    Column("sample_ratio", "times as fast", 2, "×"),
    Column("batch_ms", "batch, ms"),
    Column("batch_ratio", "times as fast", 2, "×"),
)
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
    reader = parser(__doc__)
    reader.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    reader.add_argument("--seconds", type=float, default=2.0, help="of every measurement")
    options = reader.parse_args()
    torch.set_num_threads(1)
    recipes = {what: dybit.Recipe(**fields) for what, _, fields in cases()}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results:
        results.fact("ONNX Runtime", onnxruntime.__version__)
        for name in options.models:
            model, batches = MODELS[name]()
            exact = ir.to_proto(capture.capture(model, batches, 21)).SerializeToString()
            for what, preset, _ in cases():
                if not results.has(model=name, quantized=what, preset=preset):
                    row = measure(model, batches, recipes[what], preset, exact, options.seconds)
                    results.add(model=name, quantized=what, preset=preset, **row)


def measure(
    model: nn.Module, batches: list[Any], recipe: dybit.Recipe, preset: str, exact: bytes, seconds: float
) -> dict[str, Any]:
    """The cells of one exported model."""
    quantized = dybit.quantize_(copy.deepcopy(model), recipe, calibration=batches)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = export(quantized, Path(folder) / "m.onnx", batches[:1], preset=preset)
        except DyBitError as error:
            return {"stored": str(error)}
        data = done.path.read_bytes()
    fp32 = sum(4 * t.numel() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    row = {
        "stored": ", ".join(f"{count} × {kind}" for kind, count in done.stored.items()),
        "megabytes": done.nbytes / 1e6,
        "share": done.nbytes / fp32,
        "difference": done.check.difference,
    }
    if preset == "fp4":
        return row
    sample = torch.utils._pytree.tree_map(lambda x: x[:1], batches[0])
    for size, batch in {"sample": sample, "batch": batches[0]}.items():
        own, other = milliseconds([session(data), session(exact)], batch, seconds)
        row |= {f"{size}_ms": own, f"{size}_ratio": other / own}
    return row


if __name__ == "__main__":
    main()
