"""Quantization-aware training of small classifiers, format by format: test accuracy, paired by seed.

A seed gives one network trained in FP32. Every format starts from it, with the same batches in the same order. The
first and the last layer have 8 bits in all formats. The difference is DyBit's accuracy less the format's, the mean over
seeds with its standard error. ``±`` behind an accuracy is the standard deviation over seeds. Seconds are of one core,
for one training.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from results import Column, Results, parser
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from dybit import Recipe, prepare_qat_
from dybit.demo.classifiers import DigitCNN, DigitViT, SignalCNN
from dybit.demo.toy import Labelled, digits, mnist1d
from dybit.qat.prepare import BatchNorm

COLUMNS = (
    Column("network", "network"),
    Column("bits", "bits"),
    Column("format", "format"),
    Column("fp32", "FP32", 2, " %"),
    Column("trained", "accuracy", 2, " %"),
    Column("difference", "DyBit − it", 2),
    Column("seconds", "s", 1),
)
Rows = list[dict[str, Any]]
BATCH = 100
LEARNING_RATE = 1e-3  # of quantization-aware training, by Adam, falling to zero as a cosine


def signals(seed: int) -> Labelled:
    """MNIST-1D: 4,000 signals to train on and 6,000 to test with, the same for every seed."""
    return mnist1d(10000, 0.4)


def halves(seed: int) -> Labelled:
    """scikit-learn's digits: for every seed another 1,000 to train on, and the other 797 to test with."""
    train_x, train_y, test_x, test_y = digits()
    x, y = torch.cat([train_x, test_x]), torch.cat([train_y, test_y])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[:1000], y[:1000], x[1000:], y[1000:]


# name: model, data, epochs in FP32, epochs of quantization-aware training, layers that keep 8 bits
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Labelled], int, int, tuple[str, str]]] = {
    "cnn": (lambda: SignalCNN(12), signals, 20, 8, ("features.0", "head")),
    "digits": (lambda: DigitCNN(8), halves, 30, 15, ("features.0", "head")),
    "vit": (lambda: DigitViT(), halves, 60, 20, ("embed", "head")),
}
# name: weights and activations by width. Inputs that are never negative take the unsigned form of the format.
FORMATS: dict[str, Callable[[int], tuple[int | str, int | str]]] = {
    "dybit": lambda b: (b, b),  # as prepare_qat_ chooses: mid-rise variants at 2 and 3 bits, spare ones at 4
    "dybit-all": lambda b: (f"dybit{b}", b),
    "dybit-midrise": lambda b: (f"dybit{b}mid", b),
    "dybit-spare": lambda b: (f"dybit{b}spare", b),
    "dybit-plain": lambda b: (f"dybit{b}plain", b),
    "dybit-full": lambda b: (f"s{b}", f"s{b}"),
    "int": lambda b: (f"int{b}", f"int{b}"),
    "int-full": lambda b: (f"int{b}full", f"int{b}"),
    "pot": lambda b: (f"pot{b}", f"pot{b}"),
    "apot": lambda b: (f"apot{b}", f"apot{b}"),
    "ant": lambda b: (f"ant{b}", f"ant{b}"),
    "nf": lambda b: (f"nf{b}", f"int{b}"),
    "e2m1": lambda b: ("e2m1", "ue2m2"),
}
# What is the row of dybit already, or does not exist: APoT has no second term at 2 bits.
MISSING = {("dybit-midrise", 2), ("dybit-midrise", 3), ("dybit-spare", 4)}
MISSING |= {("apot", 2), ("ant", 2), ("e2m1", 2), ("e2m1", 3)}


def train(model: nn.Module, data: Labelled, epochs: int, rate: float, seed: int) -> None:
    """Trains by Adam with a falling rate."""
    x, y = data[:2]
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for part in order[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Percent of the test set."""
    return float((model(data[2]).argmax(1) == data[3]).float().mean()) * 100


def start(network: str, seed: int, data: Labelled, folder: Path) -> nn.Module:
    """The FP32 network of a seed, trained at first use."""
    make, _, epochs, _, _ = NETWORKS[network]
    torch.manual_seed(seed)
    model, file = make(), folder / f"{network}-{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    train(model, data, epochs, 3e-3, seed)
    save_file(model.state_dict(), file)
    return model


def recipe(network: str, name: str, bits: int) -> Recipe:
    """The recipe of a format: 8 bits in the first and the last layer."""
    weights, activations = FORMATS[name](bits)
    ends = {layer: {"weights": 8, "activations": 8} for layer in NETWORKS[network][4]}
    signed = {"*.self_attn*": {"activations": "e2m1"}, "*.linear1": {"activations": "e2m1"}}
    return Recipe(
        weights=weights,
        activations=activations,
        rules={**ends, **(signed if name == "e2m1" and network == "vit" else {})},
    )


def run(network: str, name: str, bits: int, seed: int, folder: Path, batch_norm: BatchNorm) -> dict[str, float]:
    """One training: accuracy in FP32, after rounding and after training in percent, and seconds."""
    data = NETWORKS[network][1](seed)
    model = start(network, seed, data, folder)
    exact = accuracy(model, data)
    begin = time.process_time()
    epochs = NETWORKS[network][3]
    frozen = epochs * (len(data[0]) // BATCH) // 2  # codebooks may change in the first half of the training
    prepare_qat_(
        model,
        recipe(network, name, bits),
        [data[0][:500]],
        batch_norm=batch_norm,
        refresh_every=40,
        freeze_after=frozen,
    )
    before = accuracy(model, data)
    train(model, data, epochs, LEARNING_RATE, seed)
    seconds = time.process_time() - begin
    return {"fp32": exact, "rounded": before, "trained": accuracy(model, data), "seconds": seconds}


def measure(network: str, name: str, bits: int, options: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """The row of one format: means over all seeds, and the figures of each seed."""
    runs = {}
    for seed in options.seeds:
        runs[str(seed)] = run(network, name, bits, seed, options.folder, options.batch_norm)
    trained = [figures["trained"] for figures in runs.values()]
    row = {
        "fp32": statistics.mean(figures["fp32"] for figures in runs.values()),
        "trained": [statistics.mean(trained), statistics.stdev(trained) if len(trained) > 1 else 0.0],
        "seconds": statistics.mean(figures["seconds"] for figures in runs.values()),
        "runs": runs,
    }
    ours = next(
        (row["runs"] for row in rows if (row["network"], row["bits"], row["format"]) == (network, bits, "dybit")), {}
    )
    return row | {"difference": paired([figures["trained"] for figures in ours.values()], trained)}


def paired(ours: Sequence[float], others: Sequence[float]) -> list[float] | None:
    """The mean difference of pairs and its standard error; None for fewer than two pairs."""
    if len(others) < 2 or len(ours) != len(others):
        return None
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    return [statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))]


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    reader.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    reader.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    reader.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    reader.add_argument("--folder", type=Path, default=Path("build/qat"), help="of the networks in FP32")
    reader.add_argument("--batch-norm", choices=("keep", "fold"), default="keep")
    options = reader.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    with Results(__file__, __doc__, COLUMNS, options) as results:
        for network, bits, name in itertools.product(options.networks, options.bits, options.formats):
            key = {"network": network, "bits": bits, "format": name}
            if (name, bits) not in MISSING and not results.has(**key):
                results.add(**key, **measure(network, name, bits, options, results.rows))


if __name__ == "__main__":
    main()
