"""Anonymous memory of calibrated quantization of a transformers model whose weights stay on the disk.

A random Llama in FP32 is written, then loaded with ``from_pretrained``, which maps the file, and quantized block by
block. Pages of the file that the process has touched are not counted: the system drops them when it needs memory. A
model of one layer goes first, so that what is loaded and allocated once does not count either.
"""

from __future__ import annotations

import re
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from results import Column, Results, parser
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dybit

RECIPE = dybit.Recipe(weights=4, group_size=64)
COLUMNS = (
    Column("algorithm", "algorithm"),
    Column("layers", "layers"),
    Column("weights", "weights, MB", 1),
    Column("codes", "codes, MB", 1),
    Column("loading", "loading, MB", 1),
    Column("peak", "peak, MB", 1),
    Column("seconds", "s", 1),
)


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
    dybit.quantize_(model, RECIPE, batches, algorithm=algorithm)
    seconds = time.perf_counter() - start
    codes = sum(buffer.nbytes for buffer in model.buffers())
    figures = {"weights": size, "codes": codes, "loading": loaded, "peak": peak.bytes - before}
    return {**{name: count / 1e6 for name, count in figures.items()}, "seconds": seconds}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--layers", type=int, default=16)
    reader.add_argument("--hidden", type=int, default=512)
    reader.add_argument("--algorithms", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    options = reader.parse_args()
    transformers.logging.disable_progress_bar()
    peak = PeakAnonymous()
    peak.start()
    with Results(__file__, __doc__, COLUMNS, options, {"W4": RECIPE}) as results, TemporaryDirectory() as folder:
        for name, layers in (("warm", 1), ("model", options.layers)):
            # In a process of its own: memory that it frees would be used again here, and go uncounted.
            process = get_context("spawn").Process(target=write, args=(Path(folder) / name, layers, options.hidden))
            process.start()
            process.join()
        for algorithm in options.algorithms:
            if not results.has(algorithm=algorithm):
                quantize(Path(folder) / "warm", algorithm, peak)
                row = quantize(Path(folder) / "model", algorithm, peak)
                results.add(algorithm=algorithm, layers=options.layers, **row)


if __name__ == "__main__":
    main()
