"""Speed and peak memory of quantizing a large safetensors file piece by piece.

The file has BF16 matrices of 4096 × 14336, as a large language model has. Every eighth of them is random; the others
are holes in a sparse file, which take no space on the disk and read fast. Scales are in groups of 64. The bound of the
memory is three times the largest tensor and 300 MB. For comparison the same bytes are read once and thrown away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import tempfile
import time
from pathlib import Path

import torch
from quantize_smollm2 import PeakMemory
from results import Column, Results, parser

from dybit.models.streaming import Job, quantize_files
from dybit.models.tensor_files import read_source
from dybit.tensors.quantized_tensor import TensorSpec

SHAPE = (4096, 14336)
COLUMNS = (
    Column("format", "format"),
    Column("method", "scales"),
    Column("read", "file, GB"),
    Column("written", "written, GB"),
    Column("seconds", "s", 1),
    Column("cpu_seconds", "CPU, s", 1),
    Column("rate", "MB/s", 0),
    Column("reading", "reading alone, MB/s", 0),
    Column("peak", "peak, MB", 0),
    Column("bound", "bound, MB", 0),
)


def write(file: Path, count: int) -> None:
    """Writes the sparse file."""
    size = 2 * SHAPE[0] * SHAPE[1]
    item = {"dtype": "BF16", "shape": list(SHAPE)}
    header = {f"{i}.weight": {**item, "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + count * size)
        for i in range(0, count, 8):
            stream.seek(8 + len(text) + i * size)
            stream.write(torch.randn(SHAPE).bfloat16().view(torch.uint8).numpy().tobytes())


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--gigabytes", type=float, default=2.0)
    reader.add_argument("--methods", nargs="+", default=["absmax"], choices=["absmax", "mse"])
    reader.add_argument("--formats", nargs="+", default=["dybit4spare", "s4r3"], help="families or single formats")
    reader.add_argument("--workers", type=int, default=0, help="threads; 0: one a processor")
    reader.add_argument("--folder", type=Path, help="of the files; default: a temporary directory")
    options = reader.parse_args()
    count = max(1, round(options.gigabytes * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
    with (
        Results(__file__, __doc__, COLUMNS, options) as results,
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
    ):
        write(Path(folder) / "model.safetensors", count)
        for form, method in itertools.product(options.formats, options.methods):
            if not results.has(format=form, method=method):
                row = measure(Path(folder), TensorSpec(form, SHAPE, "group", 64, choice="group"), method, options)
                results.add(format=form, method=method, **row)


def measure(folder: Path, spec: TensorSpec, method: str, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one format."""
    file, out = folder / "model.safetensors", folder / f"{spec.family}-{method}"
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    reading = time.perf_counter() - start
    source = read_source(file)
    start, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        quantize_files(source, {key: Job(spec, method) for key in source}, out, {}, workers=options.workers)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = file.stat().st_size
    return {
        "read": size / 1e9,
        "written": (out / "model.safetensors").stat().st_size / 1e9,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rate": size / seconds / 1e6,
        "reading": size / reading / 1e6,
        "peak": peak.bytes / 1e6,
        "bound": (3 * 2 * SHAPE[0] * SHAPE[1] + 300e6) / 1e6,
    }


if __name__ == "__main__":
    main()
