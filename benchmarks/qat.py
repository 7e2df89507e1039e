"""Quantization-aware training of small classifiers with every format: accuracy, paired by seed, and time per step.

Run ``python benchmarks/qat.py``; it needs scikit-learn and mnist1d. A seed gives one network trained in FP32, from
which every format starts, with the same batches in the same order; the first and the last layer have 8 bits (plain
DyBit, chosen) in all of them. Results are appended to a file as JSON lines; what is in there is not run again.
``--report`` prints the tables only, ``--overhead`` the time of a training step against FP32.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from dybit import Recipe, prepare_qat_
from dybit.demo.classifiers import DigitCNN, DigitViT, SignalCNN
from dybit.demo.toy import Labelled, digits, mnist1d
from dybit.qat.prepare import BatchNorm

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


def run(
    network: str, name: str, bits: int, seed: int, data: Labelled, folder: Path, batch_norm: BatchNorm
) -> dict[str, object]:
    """One training; returns the line of results."""
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
    figures = {"fp32": exact, "rounded": before, "trained": accuracy(model, data), "seconds": round(seconds, 2)}
    return {"network": network, "format": name, "bits": bits, "seed": seed, **figures}


def read(file: Path) -> dict[tuple[str, str, int, int], dict[str, float]]:
    """Results by configuration."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line]
    return {(row["network"], row["format"], row["bits"], row["seed"]): row for row in rows}


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """All configurations, seed by seed, so that a study that is stopped early has whole seeds."""
    for network in options.networks:
        for seed in options.seeds:
            for bits in options.bits:
                for name in options.formats:
                    if (name, bits) not in MISSING:
                        yield network, name, bits, seed


def report(file: Path) -> None:
    """Means, and paired differences to DyBit with their standard errors."""
    rows = read(file)
    for network in dict.fromkeys(key[0] for key in rows):
        exact = {key[3]: row["fp32"] for key, row in rows.items() if key[0] == network}
        widths = sorted({key[2] for key in rows if key[0] == network}, reverse=True)
        print(f"\n{network}: FP32 {statistics.mean(exact.values()):.2f}, {len(exact)} seeds\n")
        print("| format | " + " | ".join(f"{b} bits | DyBit − it" for b in widths) + " |")
        print("|---" * (1 + 2 * len(widths)) + "|")
        for name in FORMATS:
            print(f"| {name} | " + " | ".join(_cell(rows, network, name, bits) for bits in widths) + " |")
    print(f"\n{len(rows)} trainings, {sum(row['seconds'] for row in rows.values()) / 60:.0f} minutes of one core")


def _cell(rows: dict[tuple[str, str, int, int], dict[str, float]], network: str, name: str, bits: int) -> str:
    mine = {key[3]: row["trained"] for key, row in rows.items() if key[:3] == (network, name, bits)}
    ours = {key[3]: row["trained"] for key, row in rows.items() if key[:3] == (network, "dybit", bits)}
    differences = [ours[seed] - mine[seed] for seed in mine if seed in ours]
    if len(differences) < 2:
        return " | "
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = f"{statistics.mean(mine.values()):.2f} ± {statistics.stdev(mine.values()):.2f}"
    return f"{mean} | {'' if name == 'dybit' else f'{statistics.mean(differences):+.2f} ± {error:.2f}'}"


def encoder() -> nn.Module:
    """Two transformer layers of 256 features and a classifier: (batch, 64) to logits (batch, 10)."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    stem = [nn.Unflatten(1, (64, 1)), nn.Linear(1, 256)]
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(*stem, layers, nn.AvgPool2d((64, 1)), nn.Flatten(), nn.Linear(256, 10))


def overhead() -> None:
    """Time of one training step against FP32: medians of interleaved steps, in process time."""
    networks = {
        "cnn, 12 channels": (lambda: SignalCNN(12), torch.randn(BATCH, 40)),
        "cnn, 64 channels": (lambda: SignalCNN(64), torch.randn(BATCH, 40)),
        "vit, 32 features": (DigitViT, torch.randn(BATCH, 64)),
        "encoder, 256 features": (encoder, torch.randn(16, 64)),
    }
    print("| network | FP32, ms | W4A4 | W2A2 | INT4, both | W4 only |\n|---|---|---|---|---|---|")
    recipes = (Recipe(weights=4, activations=4), Recipe(weights=2, activations=2))
    recipes += (Recipe(weights="int4", activations="int4"), Recipe(weights=4))
    for network, (make, x) in networks.items():
        y, exact = torch.randint(0, 10, (len(x),)), make()
        models = [exact, *(prepare_qat_(copy.deepcopy(exact), recipe, [x]) for recipe in recipes)]
        steps = [_stepper(model, x, y) for model in models]
        times: list[list[float]] = [[] for _ in models]
        for round_ in range(40):
            for step, mine in zip(steps, times, strict=True):
                begin = time.process_time()
                step()
                if round_ >= 10:
                    mine.append((time.process_time() - begin) * 1e3)
        medians = [statistics.median(mine) for mine in times]
        cells = [f"{medians[0]:.2f}"] + [f"{median:.2f} ({median / medians[0]:.2f}×)" for median in medians[1:]]
        print(f"| {network} | " + " | ".join(cells) + " |")


def _stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--results", type=Path, default=Path("build/qat"), help="folder of results and FP32 networks")
    parser.add_argument("--batch-norm", choices=("keep", "fold"), default="keep", help="takes a folder of its own")
    parser.add_argument("--report", action="store_true", help="print the tables only")
    parser.add_argument("--overhead", action="store_true", help="measure the time of a step only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.overhead:
        overhead()
        return
    file = options.results / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    data: dict[tuple[str, int], Labelled] = {}
    todo = [] if options.report else [key for key in wanted(options) if key not in read(file)]
    for done, (network, name, bits, seed) in enumerate(todo, start=1):
        if (network, seed) not in data:
            data = {(network, seed): NETWORKS[network][1](seed)}
        row = run(network, name, bits, seed, data[network, seed], options.results, options.batch_norm)
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{done}/{len(todo)} {network} {name} {bits} bits, seed {seed}: {row['trained']:.2f}", flush=True)
    report(file)


if __name__ == "__main__":
    main()
