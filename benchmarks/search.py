"""Mixed recipes against uniform ones and the paper's greedy loop, at equal cost, on real weights.

    python benchmarks/search.py minilm [--cost accelerator|size] [--against W4A8,W4A4] [--sensitivity kl] [--json FILE]

For every uniform recipe, the search and the greedy loop (on the same sensitivities, and on the RMSE of the DyBit paper)
get its cost as their limit. All recipes are then applied to the real model, and their errors measured on data that was
not calibrated on. ``mnist1d`` is a small convolutional network, trained here (seed 0), and has a true accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dybit import AcceleratorCost, MaxDrop, SizeCost
from dybit import demo as demos
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.cost import cost_table
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.problem import Problem
from dybit.mixed_precision.sensitivity import measure
from dybit.mixed_precision.trial import Point, Trial

ACCELERATOR = "8/8,6/6,4/8,4/4,2/8,2/4,2/2"
SIZE = "8,6,5,4,3,2"


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


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All recipes of one model."""
    model, calibration, evaluation, score = load(options.model, options.batches)
    cost = AcceleratorCost() if options.cost == "accelerator" else SizeCost()
    words = options.candidates or (ACCELERATOR if options.cost == "accelerator" else SIZE)
    last = [0.0]

    def progress(done: int, total: int, text: str) -> None:
        if time.time() - last[0] > 20:
            last[0] = time.time()
            print(f"  {done}/{total} {text}", flush=True)

    start, processor = time.time(), time.process_time()
    subject = Subject(model, calibration)
    if options.cost == "accelerator":  # the width of a table changes no time
        for name in [n for n in subject.layers if n in subject.embeddings and not subject.ties[n]]:
            del subject.layers[name], subject.ties[name]
    candidates = as_candidates(words.split(","))

    def errors(estimate: str) -> dict[str, list[float]]:
        return measure(subject, candidates, estimate, workers=options.workers, cache=options.cache, progress=progress)  # type: ignore[arg-type]

    tables = (cost_table(cost, subject, candidates),)
    groups = tuple(subject.groups())
    problem = Problem(candidates, groups, errors(options.sensitivity), tables, subject.embeddings)
    timing = {"seconds": time.time() - start, "cpu_seconds": time.process_time() - processor}
    contestants = options.contestants.split(",")
    by_rmse = replace(problem, errors=errors("rmse")) if "greedy_rmse" in contestants else problem
    trial = Trial(model, subject, problem, (MaxDrop(1e9, score),) if score else (), evaluation, progress)
    rows = []
    print(f"| equal to | {options.cost} × | uniform | greedy, RMSE | greedy | search |\n" + "|---" * 6 + "|")
    for index, candidate in enumerate(problem.candidates):
        if options.against and candidate.name not in options.against.split(","):
            continue
        uniform = problem.uniform(index)
        limit = problem.main.total(uniform)
        begin = time.perf_counter()
        best = problem.solve({problem.main.name: limit * (1 + 1e-12)})
        solving = time.perf_counter() - begin
        choices = {
            "uniform": uniform,
            "greedy_rmse": by_rmse.greedy(problem.main.name, limit),
            "greedy": problem.greedy(problem.main.name, limit),
            "search": best,
        }
        points = {k: trial.measure(c, k) for k, c in choices.items() if c is not None and k in contestants}
        rows.append({"equal_to": candidate.name, "solve_seconds": solving, **{k: row(p) for k, p in points.items()}})
        cells = [cell(points.get(name)) for name in choices]
        print(f"| {candidate.name} | {problem.main.base / limit:.2f} | {' | '.join(cells)} |", flush=True)
    return {"model": options.model, "unit": trial.judge.unit, "score": score and score(model), **timing, "rows": rows}


def row(point: Point) -> dict[str, Any]:
    return {"error": point.error, "estimated": point.estimated_error, "drop": point.drop, "speedups": point.speedups}


def cell(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.error:.4g}" + (f" ({-point.drop:+.1f} points)" if point.drop is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["mnist1d", "minilm", "efficientnet_lite0", "smollm2"])
    parser.add_argument("--cost", choices=["accelerator", "size"], default="accelerator")
    parser.add_argument("--candidates")
    parser.add_argument("--against", help="only these uniform recipes")
    parser.add_argument("--contestants", default="uniform,greedy_rmse,greedy,search")
    parser.add_argument("--sensitivity", default="kl")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    result = run(options)
    print({key: value for key, value in result.items() if key != "rows"})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
