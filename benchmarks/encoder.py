"""The sentence encoder MiniLM-L6 as a whole: FP32 against packed W4A8, paired and interleaved.

Run ``python benchmarks/encoder.py``; it needs the demo's models. Weights have 4 bits in groups of 128 and inputs 8 bits
(integers, dynamic per token); embeddings stay in FP32. Attention and norms are torch's own on all sides; in ``fused``
(``dybit.fuse``) GELU is computed by the layer before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from dybit import Recipe, fuse, quantize_
from dybit.demo.sentences import minilm
from dybit.operators import packed_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    exact = minilm().eval()
    recipe = Recipe(
        weights=4, activations="int8", group_size=128, activation_mode="dynamic", method="absmax", embeddings=None
    )
    quantized = quantize_(copy.deepcopy(exact), recipe)
    models = {"fp32": exact, "dybit": quantized, "fused": fuse(quantized)}
    results = []
    print(f"{packed_weight.isa()}\n\n| batch | threads | FP32 ms | dybit ms | times faster | fused ms | times faster |")
    print("|---|---|---|---|---|---|---|")
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for batch in (1, 32):
            ids = torch.randint(1000, 20000, (batch, 128), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            times: dict[str, list[float]] = {name: [] for name in models}
            order, shuffle, start = list(models), random.Random(0), time.perf_counter()
            with torch.inference_mode():
                for model in models.values():
                    model(ids, mask)
                while len(times["fp32"]) < 5 or time.perf_counter() - start < options.seconds:
                    shuffle.shuffle(order)
                    for name in order:
                        begin = time.perf_counter()
                        models[name](ids, mask)
                        times[name].append((time.perf_counter() - begin) * 1e3)
            median = {name: statistics.median(value) for name, value in times.items()}
            ratios, row = {}, f"| {batch}×128 | {threads} | {median['fp32']:.1f} |"
            for name in ("dybit", "fused"):
                low, middle, high = ratios[name] = np.percentile(np.divide(times["fp32"], times[name]), [25, 50, 75])
                row += f" {median[name]:.1f} | {middle:.2f}× ({low:.2f} to {high:.2f}) |"
            results.append(
                {"batch": batch, "threads": threads, "ms": median, "ratio": {k: list(v) for k, v in ratios.items()}}
            )
            print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"isa": packed_weight.isa(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
