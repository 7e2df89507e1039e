"""Anonymous memory of calibrated quantization of a transformers model whose weights stay on the disk.

    python benchmarks/mapped.py [--layers 16] [--hidden 512] [--algorithm gptq]

A random Llama in FP32 is written, then loaded with ``from_pretrained``, which maps the file, and quantized block by
block. Pages of the file that the process has touched are not counted: they are the file's, and the system drops them
when it needs room. A model of one layer goes first, so that what is loaded and allocated once does not count either.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dybit


def anonymous() -> int:
    """Bytes of this process's memory that no file holds."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class PeakAnonymous(threading.Thread):
    """The most anonymous memory since the last reset, looked up every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        """Looks until the process ends."""
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)


def write(folder: Path, layers: int, hidden: int) -> None:
    """Writes a model."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def quantize(folder: Path, algorithm: str, peak: PeakAnonymous) -> dict[str, float]:
    """Loads and quantizes a model; returns megabytes and seconds."""
    size = (folder / "model.safetensors").stat().st_size
    batches = [torch.randint(0, 256, (1, 64)) for _ in range(2)]
    before = peak.bytes = anonymous()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = anonymous() - before
    dybit.quantize_(model, dybit.Recipe(weights=4, group_size=64), batches, algorithm=algorithm)
    seconds = time.perf_counter() - start
    codes = sum(buffer.nbytes for buffer in model.buffers())
    figures = {"weights": size, "codes": codes, "loading": loaded, "peak": peak.bytes - before}
    return {**{f"{name}_megabytes": round(n / 1e6, 1) for name, n in figures.items()}, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--algorithm", default="gptq", choices=["gptq", "rtn"])
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    peak = PeakAnonymous()
    peak.start()
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in (("warm", 1), ("model", options.layers)):
            # In a process of its own: memory that it frees would be used again here, and go uncounted.
            process = get_context("spawn").Process(target=write, args=(Path(folder) / name, layers, options.hidden))
            process.start()
            process.join()
        quantize(Path(folder) / "warm", options.algorithm, peak)
        result = quantize(Path(folder) / "model", options.algorithm, peak)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
