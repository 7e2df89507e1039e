"""Quantization-aware training on several processes: torchrun starts them, DistributedDataParallel keeps them together.

    pip install "dybit[demo]"
    torchrun --standalone --nproc_per_node 2 examples/train_distributed.py -o out

A network for MNIST-1D is trained in FP32, then with weights and inputs of 3 bits, both on all processes (gloo: no GPU
is needed). A prepared model is an ordinary one: its scales are parameters, so the gradients of all processes are
averaged, and what is chosen from data is in buffers, which every process takes from the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as group
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dybit
from dybit.demo import mnist1d
from dybit.demo.classifiers import SignalCNN


def train(model: nn.Module, data: TensorDataset, epochs: int, rate: float) -> None:
    """Trains on this process's share of the data, and averages gradients with the others."""
    sampler = DistributedSampler(data, seed=0, drop_last=True)
    loader = DataLoader(data, batch_size=50, sampler=sampler)
    wrapped = DistributedDataParallel(model)  # copies buffers at every pass, its default, which dybit relies on
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the test set."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Trains, converts, saves from the first process, and checks what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=[20, 8], help="in FP32, and with rounding")
    options = parser.parse_args()
    group.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = mnist1d()
    data = TensorDataset(train_x, train_y)

    model = SignalCNN()
    train(model, data, options.epochs[0], 3e-3)
    exact = accuracy(model, test_x, test_y)

    # The first and the last layer keep 8 bits, as is usual. Every process calibrates on the same batch.
    ends = {"weights": 8, "activations": 8}
    recipe = dybit.Recipe(weights=options.bits, activations=options.bits, rules={"features.0": ends, "head": ends})
    dybit.prepare_qat_(model, recipe, calibration=[train_x[:500]])
    rounded = accuracy(model, test_x, test_y)
    train(model, data, options.epochs[1], 1e-3)
    dybit.convert_(model)

    if group.get_rank() == 0:
        print(f"FP32 {exact:.1f} %, rounded to {options.bits} bits {rounded:.1f} %, ", end="")
        print(f"trained with {options.bits} bits {accuracy(model, test_x, test_y):.1f} %")
        dybit.save(model, options.output)
        again = dybit.load(options.output, SignalCNN())
        assert torch.equal(again(test_x), model(test_x)), "the checkpoint is another model"
        size = sum(file.stat().st_size for file in options.output.iterdir())
        print(f"{options.output}: {size} bytes, {4 * sum(p.numel() for p in SignalCNN().parameters())} in FP32")
    group.destroy_process_group()


if __name__ == "__main__":
    main()
