"""Whole image classifiers: FP32 against packed W4A8, layer by layer and fused, paired and interleaved, 224×224.

Run ``python benchmarks/vision.py``; EfficientNet-Lite0 needs the demo's models, and ResNet-18 is defined here, with
random weights: speed does not depend on them. Weights have 4 bits with a scale and a variant for every
channel, inputs 8 bits (integers, static). Both sides run channels-last, batch norms folded.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dybit import Recipe, fuse, quantize_
from dybit.models.batch_norm import find_pairs, fold_
from dybit.operators import packed_weight


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.around = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to features."""
        y = torch.relu_(self.norm1(self.conv1(x)))
        return torch.relu_(self.norm2(self.conv2(y)) + self.around(x))


def resnet18() -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385), for 1000 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for out in (64, 128, 256, 512):
        layers += [Block(channels, out, 1 if out == 64 else 2), Block(out, out, 1)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def efficientnet() -> nn.Module:
    from dybit.demo.vision import efficientnet_lite0

    return efficientnet_lite0()


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": resnet18, "EfficientNet-Lite0": efficientnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of every measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    recipe = Recipe(weights=4, activations="int8", granularity="channel", method="absmax", activation_method="absmax")
    results = []
    print(
        f"{packed_weight.isa()}\n\n| model | batch | threads | FP32 ms | dybit ms | times faster "
        "| fused ms | times faster |\n|---|---|---|---|---|---|---|---|"
    )
    for name, make in MODELS.items():
        exact = make()
        fold_(exact, find_pairs(exact))
        exact = exact.to(memory_format=torch.channels_last)
        picture = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        picture = picture.to(memory_format=torch.channels_last)
        models = {"fp32": exact, "dybit": quantize_(copy.deepcopy(exact), recipe, calibration=[picture[:1]])}
        models["fused"] = fuse(models["dybit"])
        for threads in options.threads:
            torch.set_num_threads(threads)
            clock = time.thread_time if threads == 1 else time.perf_counter
            for batch in options.batch:
                x = picture[:batch].contiguous(memory_format=torch.channels_last)
                times: dict[str, list[float]] = {key: [] for key in models}
                order, shuffle, start = list(models), random.Random(0), time.perf_counter()
                with torch.inference_mode():
                    for model in models.values():
                        model(x)
                    while len(times["fp32"]) < 5 or time.perf_counter() - start < options.seconds:
                        shuffle.shuffle(order)
                        for key in order:
                            begin = clock()
                            models[key](x)
                            times[key].append((clock() - begin) * 1e3)
                ratios = {
                    key: np.percentile(np.divide(times["fp32"], times[key]), [25, 50, 75]).tolist() for key in models
                }
                median = {key: statistics.median(value) for key, value in times.items()}
                results.append({"model": name, "batch": batch, "threads": threads, "ms": median, "ratio": ratios})
                print(
                    f"| {name} | {batch} | {threads} | {median['fp32']:.1f} | "
                    + " | ".join(
                        f"{median[key]:.1f} | {middle:.2f}× ({lower:.2f} to {upper:.2f})"
                        for key, (lower, middle, upper) in ratios.items()
                        if key != "fp32"
                    )
                    + " |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"isa": packed_weight.isa(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
