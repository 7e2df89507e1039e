"""Time of one step of quantization-aware training against FP32.

The networks take turns in one process. Times are medians of the processor time of one thread; ratios say how many times
as long as FP32 a step takes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from results import Column, Results, parser
from torch import Tensor, nn
from torch.nn import functional

from dybit import Recipe, prepare_qat_
from dybit.demo.classifiers import DigitViT, SignalCNN
from qat import BATCH

RECIPES = {
    "W4A4": Recipe(weights=4, activations=4),
    "W2A2": Recipe(weights=2, activations=2),
    "INT4": Recipe(weights="int4", activations="int4"),
    "W4": Recipe(weights=4),
}
COLUMNS = (
    Column("network", "network"),
    Column("fp32_ms", "FP32, ms"),
    *(Column(name, name, 2, "×") for name in RECIPES),
)


def encoder() -> nn.Module:
    """Two transformer layers of 256 features and a classifier: (batch, 64) to logits (batch, 10)."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    stem = [nn.Unflatten(1, (64, 1)), nn.Linear(1, 256)]
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(*stem, layers, nn.AvgPool2d((64, 1)), nn.Flatten(), nn.Linear(256, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn, 12 channels": (lambda: SignalCNN(12), (BATCH, 40)),
    "cnn, 64 channels": (lambda: SignalCNN(64), (BATCH, 40)),
    "vit, 32 features": (DigitViT, (BATCH, 64)),
    "encoder, 256 features": (encoder, (16, 64)),
}


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A function that trains a model by one step."""
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of FP32, and how many times as long each recipe takes."""
    torch.manual_seed(0)
    x, exact = torch.randn(shape), make()
    y = torch.randint(0, 10, (len(x),))
    models = {name: prepare_qat_(copy.deepcopy(exact), recipe, [x]) for name, recipe in RECIPES.items()}
    steps = {name: stepper(model, x, y) for name, model in {"fp32": exact, **models}.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + rounds // 3):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if turn >= rounds // 3:  # codebooks are chosen in the first steps
                times[name].append((time.process_time() - begin) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"fp32_ms": medians["fp32"], **{name: medians[name] / medians["fp32"] for name in RECIPES}}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--rounds", type=int, default=30)
    options = reader.parse_args()
    torch.set_num_threads(1)
    with Results(__file__, __doc__, COLUMNS, options, RECIPES) as results:
        for name, (make, shape) in NETWORKS.items():
            if not results.has(network=name):
                results.add(network=name, **measure(make, shape, options.rounds))


if __name__ == "__main__":
    main()
