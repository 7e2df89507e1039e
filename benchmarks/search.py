"""Mixed precision: the search against uniform recipes and the greedy loop of the DyBit paper, at equal cost.

For every uniform recipe, the search and the greedy loop (on the same sensitivities, and on the RMSE that the paper
uses) get its cost as their limit. All recipes are then applied to the real model. Errors are measured on data that was
not calibrated on. ``mnist1d`` is a small convolutional network, trained in the script (seed 0); points are of its
accuracy.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import Column, Results, parser
from torch import nn

from dybit import AcceleratorCost, MaxDrop, SizeCost
from dybit import demo as demos
from dybit.errors import DyBitError
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.cost import cost_table
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.problem import Problem
from dybit.mixed_precision.sensitivity import measure
from dybit.mixed_precision.trial import Trial

ACCELERATOR = "8/8,6/6,4/8,4/4,2/8,2/4,2/2"
SIZE = "8,6,5,4,3,2"
CONTESTANTS = {"uniform": "uniform", "greedy_rmse": "greedy, RMSE", "greedy": "greedy", "search": "search"}
COLUMNS = (
    Column("model", "model"),
    Column("cost", "cost"),
    Column("equal_to", "equal to"),
    Column("gain", "times cheaper than FP32", 2, "×"),
    *(Column(name, f"error, {title}", 5) for name, title in CONTESTANTS.items()),
    *(Column(f"{name}_points", f"points, {title}", 2) for name, title in CONTESTANTS.items()),
    Column("solve_seconds", "solved in, s", 2),
)


class Signals(nn.Sequential):
    """A convolutional network for MNIST-1D, of shape (batch, 40)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 40)),
            nn.Conv1d(1, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Conv1d(32, 64, 5, stride=2, padding=2), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Conv1d(64, 64, 3, padding=1), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(640, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


def mnist1d() -> tuple[nn.Module, list[Any], list[Any], Callable[[nn.Module], float]]:
    x, y, test_x, test_y = demos.mnist1d()
    torch.manual_seed(0)
    model = Signals()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=40 * 40)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            noisy = x[rows].roll(int(torch.randint(-2, 3, ())), 1) + 0.05 * torch.randn(len(rows), 40)
            nn.functional.cross_entropy(model(noisy), y[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            return 100.0 * float((candidate(test_x).argmax(1) == test_y).float().mean())

    return model.eval(), list(x[:512].split(128)), list(test_x.split(250)), accuracy


def load(name: str, batches: int) -> tuple[nn.Module, list[Any], list[Any], Callable[[nn.Module], float] | None]:
    """Model, calibration batches, evaluation batches, and its score if it has one."""
    if name == "mnist1d":
        return mnist1d()
    kinds: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[Any]], dict[str, int]]] = {
        "minilm": (demos.minilm, demos.minilm_batches, {}),
        "efficientnet_lite0": (demos.efficientnet_lite0, demos.image_batches, {}),
        "smollm2": (demos.smollm2, demos.smollm2_batches, {"length": 256}),
    }
    model, data, more = kinds[name]
    splits = (data(split=split, batches=batches, **more) for split in ("calibration", "evaluation"))
    return model(), *splits, None  # type: ignore[return-value]


def names_of(words: list[str], against: list[str] | None) -> set[str]:
    """The names of the uniform recipes to compare with: those of some candidates (``4/8`` or ``W4A8``), or all."""
    named = zip((candidate.name for candidate in as_candidates(words)), words, strict=True)
    found = {name for name, word in named if not against or {name, word} & set(against)}
    if not found:
        raise DyBitError(f"--against must name candidates, among {', '.join(words)}, not {', '.join(against or [])}")
    return found


def run(options: argparse.Namespace, name: str, results: Results) -> None:
    """All recipes of one model."""
    model, calibration, evaluation, score = load(name, options.batches)
    cost = AcceleratorCost() if options.cost == "accelerator" else SizeCost()
    words = options.candidates or (ACCELERATOR if options.cost == "accelerator" else SIZE)
    subject = Subject(model, calibration)
    if options.cost == "accelerator":  # the width of a table changes no time
        for layer in [n for n in subject.layers if n in subject.embeddings and not subject.ties[n]]:
            del subject.layers[layer], subject.ties[layer]
    candidates = as_candidates(words.split(","))
    chosen = names_of(words.split(","), options.against)

    def errors(estimate: str) -> dict[str, list[float]]:
        return measure(subject, candidates, estimate, workers=options.workers, cache=options.cache, progress=progress)  # type: ignore[arg-type]

    tables = (cost_table(cost, subject, candidates),)
    problem = Problem(candidates, tuple(subject.groups()), errors(options.sensitivity), tables, subject.embeddings)
    by_rmse = replace(problem, errors=errors("rmse")) if "greedy_rmse" in options.contestants else problem
    trial = Trial(model, subject, problem, (MaxDrop(1e9, score),) if score else (), evaluation, progress)
    results.fact(f"Unit of the errors, {name}", trial.judge.unit)
    for index, candidate in enumerate(problem.candidates):
        key = {"model": name, "cost": options.cost, "equal_to": candidate.name}
        if candidate.name not in chosen or results.has(**key):
            continue
        uniform = problem.uniform(index)
        limit = problem.main.total(uniform)
        begin = time.perf_counter()
        best = problem.solve({problem.main.name: limit * (1 + 1e-12)})
        row: dict[str, Any] = {"gain": problem.main.base / limit, "solve_seconds": time.perf_counter() - begin}
        choices = {
            "uniform": uniform,
            "greedy_rmse": by_rmse.greedy(problem.main.name, limit),
            "greedy": problem.greedy(problem.main.name, limit),
            "search": best,
        }
        for kind, choice in choices.items():
            if choice is not None and kind in options.contestants:
                point = trial.measure(choice, kind)
                row |= {kind: point.error, f"{kind}_points": None if point.drop is None else -point.drop}
        results.add(**key, **row)


def progress(done: int, total: int, text: str) -> None:
    """Shows how far a long step is, on stderr."""
    print(f"\r{done}/{total} {text:60.60}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument(
        "models", nargs="*", default=["mnist1d"], help="among mnist1d, minilm, efficientnet_lite0, smollm2"
    )
    reader.add_argument("--cost", choices=["accelerator", "size"], default="accelerator")
    reader.add_argument("--candidates", help="pairs or widths, separated by commas")
    reader.add_argument("--against", nargs="+", help="only these uniform recipes, such as 4/8")
    reader.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    reader.add_argument("--sensitivity", default="kl")
    reader.add_argument("--batches", type=int, default=2)
    reader.add_argument("--workers", type=int, default=1)
    reader.add_argument("--cache", type=Path)
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    with Results(__file__, __doc__, COLUMNS, options) as results:
        for name in options.models:
            run(options, name, results)


if __name__ == "__main__":
    main()
