"""Speed and peak memory of quantizing a large safetensors file piece by piece.

    python benchmarks/stream.py [--gigabytes 8] [--method absmax] [--workers 2] [--folder DIR]

The file has BF16 matrices of 4096 × 14336, as a large language model has; every eighth of them is random, the others
are holes in a sparse file, so that it takes little room on the disk, and reads fast. For comparison, the same bytes are
read once and thrown away.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch
from quantize_smollm2 import PeakMemory

from dybit.models.streaming import Job, quantize_files, read_source
from dybit.tensors.quantized_tensor import TensorSpec

SHAPE = (4096, 14336)


def write(file: Path, count: int) -> int:
    """Writes the sparse file; returns the bytes of one matrix."""
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
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--method", default="absmax", choices=["absmax", "mse"])
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one a processor")
    parser.add_argument("--format", default="dybit4spare", help="a family, of which groups choose, or one format")
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "model.safetensors"
        count = max(1, round(options.gigabytes * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
        size = write(file, count)
        start = time.perf_counter()
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
        reading = time.perf_counter() - start
        source = read_source(file)
        jobs = {
            key: Job(TensorSpec(options.format, SHAPE, "group", 64, choice="group"), options.method) for key in source
        }
        start, cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as peak:
            quantize_files(source, jobs, Path(folder) / "out", {}, workers=options.workers)
        seconds = time.perf_counter() - start
        result = {
            "file_gigabytes": round(count * size / 1e9, 2),
            "written_gigabytes": round((Path(folder) / "out/model.safetensors").stat().st_size / 1e9, 2),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "megabytes_per_second": round(count * size / seconds / 1e6, 1),
            "reading_alone_megabytes_per_second": round(count * size / reading / 1e6, 1),
            "peak_megabytes": round(peak.bytes / 1e6, 1),
            "bound_megabytes": round((3 * size + 300e6) / 1e6, 1),
            "format": options.format,
            "method": options.method,
        }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
