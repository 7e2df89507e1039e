"""The directory of a search: recipes, and ``search.json`` with everything for a report.

The schema is in docs/search.md.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dybit.errors import DyBitError
from dybit.layers.kinds import transposed, weight_names
from dybit.mixed_precision.cost import CostTable
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.other_formats import compare
from dybit.mixed_precision.search import Result
from dybit.mixed_precision.trial import Point
from dybit.models.coverage import measure
from dybit.models.plan import plan_layers, quantized_names
from dybit.recipe import LayerRecipe
from dybit.safe_files import read_json, write_json

SCHEMA_VERSION = 1
DOCUMENT, RECIPE, FRONT = "search.json", "recipe.json", "pareto"
_BINS = 96
_REACH = 4.0  # range of histograms, in root mean squares of a channel


def check_target(path: str | os.PathLike[str]) -> None:
    """Checks, before any work, that a directory is new, empty, or of an earlier search.

    Raises:
        DyBitError: It holds something else.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise DyBitError(f"{str(path)!r} is a file, and a search needs a directory")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DOCUMENT).is_file():
        raise DyBitError(f"{str(path)!r} is not empty and was not left by a search")


def write_run(
    result: Result, path: str | os.PathLike[str], *, model: str = "model", command: Sequence[str] | None = None
) -> Path:
    """Writes ``recipe.json``, the front's recipes in ``pareto/``, and last ``search.json``.

    Args:
        result: The result of the search.
        path: The directory. An earlier run in it is replaced.
        model: The name of the model.
        command: The words of the command line, if any.

    Returns:
        The directory.

    Raises:
        DyBitError: It holds something else, or cannot be written.
    """
    check_target(path)
    folder = Path(path)
    shutil.rmtree(folder / FRONT, ignore_errors=True)
    (folder / DOCUMENT).unlink(missing_ok=True)
    write_json(folder / RECIPE, result.recipe.to_dict())
    front = []
    for index, point in enumerate(result.pareto, 1):
        name = f"{FRONT}/{index:02d}.json"
        write_json(folder / name, point.recipe.to_dict())
        front.append(_point(point) | {"recipe": name})
    document = {
        "version": SCHEMA_VERSION,
        "model": model,
        "command": list(command) if command is not None else None,
        "kind": "shapes" if result.subject is None else "model",
        "sensitivity": result.sensitivity,
        "error_unit": result.error_unit,
        "constraints": [
            {"kind": type(c).__name__}
            | {f.name: getattr(c, f.name) for f in fields(c) if not callable(getattr(c, f.name))}
            for c in result.constraints
        ],
        "candidates": [
            {"name": c.name, "weights": c.weights, "activations": c.activations, "bits": list(c.bits)}
            for c in result.problem.candidates
        ],
        "costs": [_cost(table) for table in result.problem.tables],
        "groups": [list(group) for group in result.problem.groups],
        "layers": _layers(result),
        "rivals": _rivals(result),
        "result": _point(result.point) | {"recipe": RECIPE},
        "coverage": _coverage(result),
        "history": [_point(point) for point in result.history],
        "uniform": [_point(point) for point in result.uniform],
        "greedy": None if result.greedy is None else _point(result.greedy),
        "pareto": front,
    }
    write_json(folder / DOCUMENT, document)
    return folder


def _cost(table: CostTable) -> dict[str, Any]:
    names = ("name", "unit", "per_second", "base", "base_name", "fixed", "note")
    return {name: getattr(table, name) for name in names}


def _point(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "choice": dict(point.choice),
        "estimated_error": point.estimated_error,
        "error": None if point.error is None else _finite(point.error),
        "drop": point.drop,
        "costs": dict(point.costs),
        "speedups": dict(point.speedups),
        "measured": dict(point.measured),
    }


def _layers(result: Result) -> list[dict[str, Any]]:
    problem, subject = result.problem, result.subject
    rows = []
    for index, group in enumerate(problem.groups):
        for name in group:
            row: dict[str, Any] = {
                "name": name,
                "group": index,
                "chosen": result.point.choice[name],
                "errors": list(problem.errors[name]),
                "costs": {t.name: [_finite(cost) for cost in t.layers[name]] for t in problem.tables},
                "details": {t.name: [dict(d) for d in t.details[name]] for t in problem.tables if t.details},
            }
            rows.append(row | (_about(result, subject, name) if subject else {}))
    order = {name: index for index, name in enumerate(problem.errors)}
    return sorted(rows, key=lambda row: order[row["name"]])


def _coverage(result: Result) -> dict[str, Any] | None:
    """Returns how much of the model the recipe quantizes; None for shapes."""
    if result.subject is None:
        return None
    model, recipe = result.subject.model, result.recipe
    return measure(model, recipe, quantized_names(plan_layers(model, recipe))).to_dict()


def _rivals(result: Result) -> list[dict[str, Any]]:
    """Returns the error of the weights in other formats; empty for shapes."""
    subject = result.subject
    if subject is None:
        return []
    layers = []
    for name, chosen in result.point.choice.items():
        recipe = subject.layer_recipes(name, result.problem.candidates[chosen])[name]
        if recipe is not None:
            module = subject.layers[name]
            layers += [(getattr(module, key).detach(), recipe, transposed(module)) for key in weight_names(module)]
    return compare(layers)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _about(result: Result, subject: Subject, name: str) -> dict[str, Any]:
    """Returns facts about a layer that need a model."""
    module = subject.layers[name]
    chosen = result.problem.candidates[result.point.choice[name]]
    weights = [getattr(module, key) for key in weight_names(module)]
    return {
        "kind": type(module).__name__,
        "embedding": name in subject.embeddings,
        "tied": list(subject.ties[name]),
        "shape": [list(weight.shape) for weight in weights],
        "parameters": sum(weight.numel() for weight in weights),
        "histogram": histogram(subject, name, subject.layer_recipes(name, chosen)[name]),
    }


def histogram(subject: Subject, name: str, recipe: LayerRecipe | None) -> dict[str, Any]:
    """Returns a histogram of a layer's weights, each over the root mean square of its channel, and the chosen levels.

    Args:
        subject: The model.
        name: The layer.
        recipe: How it is quantized, or None.

    Returns:
        ``low`` and ``high``, the ends of the bins; ``counts``; and ``outside``, the share of weights beyond them. For
        quantized weights also ``format``, the codebook of most units; ``share``, their share; ``levels`` at the median
        of their scales; and ``sqnr`` of all weights in dB.
    """
    module = subject.layers[name]
    key = weight_names(module)[0]
    weight = getattr(module, key).detach().float()
    twin = subject.quantized(name, recipe) if recipe is not None and recipe.weight_family is not None else None
    stored = twin.quantized_tensor(key) if twin is not None else None
    matrix = stored.spec.to_matrix(weight) if stored else weight.flatten(1)
    spread = matrix.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    units = matrix / spread
    found: dict[str, Any] = {
        "low": -_REACH,
        "high": _REACH,
        "counts": [int(n) for n in torch.histc(units, _BINS, -_REACH, _REACH)],
        "outside": float((units.abs() > _REACH).double().mean()),
    }
    if stored is None:
        return found
    books, scales, choices = stored.spec.formats.books, stored.scales() / spread, stored.choices()
    picked = torch.zeros_like(scales) if choices is None else choices.expand(scales.shape).float()
    votes = torch.bincount(picked.flatten().long(), minlength=len(books))
    best = int(votes.argmax())
    step = float(scales[picked == best].median())
    noise = float((stored.dequantize().double() - weight.double()).square().sum())
    signal = float(weight.double().square().sum())
    return found | {
        "format": books[best].name,
        "share": float(votes[best] / votes.sum()),
        "levels": [float(level) * step for level in books[best].levels],
        "sqnr": 10 * math.log10(signal / noise) if noise and signal else None,
    }


def read_run(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Reads the ``search.json`` of a run.

    Raises:
        DyBitError: It is missing or of another version.
    """
    file = Path(path) / DOCUMENT
    try:
        document = read_json(file)
    except (OSError, DyBitError) as error:
        raise DyBitError(f"{str(path)!r} holds no {DOCUMENT} of a search: {error}") from None
    if not isinstance(document, dict) or document.get("version") != SCHEMA_VERSION:
        raise DyBitError(f"{str(file)!r} is not of version {SCHEMA_VERSION}")
    return document
