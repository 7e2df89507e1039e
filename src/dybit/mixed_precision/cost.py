"""Costs of every layer at every candidate, in bytes, seconds or cycles, as tables that add up.

Implement :class:`ShapeCost` for other machines.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.kinds import transposed, weight_names
from dybit.measure.timing import compare, machine
from dybit.measure.trace import trace
from dybit.mixed_precision.candidate import Candidate
from dybit.mixed_precision.measured_model import Subject
from dybit.models.running import Progress, run_batch
from dybit.recipe import LayerRecipe
from dybit.safe_files import cache_directory, read_json, write_json
from dybit.tensors.quantized_tensor import TensorSpec
from dybit.workloads.workload import Layer, Workload


@dataclass(frozen=True)
class CostTable:
    """The cost of every layer at every candidate. A model costs the sum of its layers plus ``fixed``.

    Attributes:
        name: Of the cost: ``size``, ``cpu``, ``accelerator``.
        unit: ``bytes``, ``seconds`` or ``cycles``.
        layers: Costs in the order of the candidates, by layer; infinite if a candidate cannot run.
        fixed: The part of the cost that does not depend on the choice.
        base: The cost of the model to which speedups are relative.
        base_name: The name of that model.
        details: More about every layer and candidate, by layer; may be empty.
        per_second: Units per second; None if the cost is not a time.
        note: A sentence on costs that the figures leave out, or empty.
    """

    name: str
    unit: str
    layers: Mapping[str, tuple[float, ...]]
    fixed: float
    base: float
    base_name: str
    details: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    per_second: float | None = None
    note: str = ""

    def total(self, choice: Mapping[str, int]) -> float:
        """Returns the cost of a model whose layers take the candidates of these indices."""
        return self.fixed + sum(self.layers[name][index] for name, index in choice.items())


@runtime_checkable
class Cost(Protocol):
    """Protocol: makes a table for a model."""

    name: str

    def table(self, subject: Subject, candidates: Sequence[Candidate], progress: Progress | None = None) -> CostTable:
        """Measures or computes the cost of every layer and candidate."""
        ...


@runtime_checkable
class ShapeCost(Protocol):
    """Protocol: knows the cost of a layer from its shape and its widths, such as an accelerator.

    Attributes:
        base: Bits of weights and activations of the model to which speedups are relative. Products without candidates,
            such as those of two activations, also run at these widths.
    """

    name: str
    unit: str
    base: tuple[int, int]
    base_name: str

    @property
    def per_second(self) -> float | None:
        """Units per second; None if the cost is not a time."""
        ...

    def shape(self, layer: Layer, weights: int, activations: int) -> Mapping[str, Any]:
        """Returns the ``cost`` of a layer, and optional details."""
        ...


def cost_table(
    cost: Cost | ShapeCost, subject: Subject, candidates: Sequence[Candidate], progress: Progress | None = None
) -> CostTable:
    """Makes the table of either kind of cost.

    Raises:
        DyBitError: ``cost`` is neither.
    """
    if isinstance(cost, Cost):
        return cost.table(subject, candidates, progress)
    if isinstance(cost, ShapeCost):
        return shape_table(cost, traced(subject), candidates, subject.layers, subject.ties)
    raise DyBitError(f"cost must be SizeCost(), CpuCost(), AcceleratorCost() or the like, not {cost!r:.100}")


def traced(subject: Subject) -> Workload:
    """Traces a subject's model on its first batch."""
    batch = subject.batches[0]
    named = batch if isinstance(batch, Mapping) else {}
    inputs = () if named else batch if isinstance(batch, tuple | list) else (batch,)
    return trace(subject.model, *inputs, **named)


def shape_table(
    cost: ShapeCost,
    workload: Workload,
    candidates: Sequence[Candidate],
    names: Sequence[str] | Mapping[str, object],
    ties: Mapping[str, Sequence[str]] | None = None,
) -> CostTable:
    """Makes the table of a cost by shape. A layer that runs n times costs n times as much.

    Args:
        cost: The cost.
        workload: The shapes. The second use of a layer is called ``name#2``.
        candidates: The candidates.
        names: The layers of the search.
        ties: Layers tied to them.
    """
    owners = {one: name for name in names for one in (name, *(ties or {}).get(name, ()))}
    layers = {name: [0.0] * len(candidates) for name in names}
    details: dict[str, list[dict[str, Any]]] = {name: [{} for _ in candidates] for name in names}
    fixed = base = 0.0
    for layer in workload:
        at_base = float(cost.shape(layer, *cost.base)["cost"])
        base += at_base
        owner = owners.get(layer.name.partition("#")[0])
        if owner is None:
            fixed += at_base
            continue
        for index, candidate in enumerate(candidates):
            weights, activations = candidate.bits
            if weights is None or activations is None:
                layers[owner][index] = math.inf
                continue
            told = dict(cost.shape(layer, weights, activations))
            layers[owner][index] += float(told.pop("cost"))
            details[owner][index] = details[owner][index] or told
    return CostTable(
        cost.name,
        cost.unit,
        {name: tuple(row) for name, row in layers.items()},
        fixed,
        base,
        cost.base_name,
        {name: tuple(row) for name, row in details.items()},
        cost.per_second,
        "products and convolutions only: no softmax, normalisation, pooling or additions",
    )


@dataclass(frozen=True)
class SizeCost:
    """Bytes of a checkpoint's tensors: codes, scales, choices, and tensors in FP32. Ratios are relative to FP32."""

    name = "size"

    def table(self, subject: Subject, candidates: Sequence[Candidate], progress: Progress | None = None) -> CostTable:
        """Computes the bytes of every layer; exact up to 4 bytes per layer whose inputs may have an offset."""
        distinct = {(t.data_ptr(), tuple(t.shape)): t for t in subject.model.state_dict().values()}
        rest = sum(tensor.nbytes for tensor in distinct.values())
        layers: dict[str, tuple[float, ...]] = {}
        for name, module in subject.layers.items():
            weights = {key: getattr(module, key) for key in weight_names(module)}
            rest -= sum(weight.nbytes for weight in weights.values())
            layers[name] = tuple(
                float(self._bytes(subject, name, weights, subject.layer_recipes(name, c)))
                + (subject.folded.get(name, 0) if c.weights is None else 0)
                for c in candidates
            )
        base = (
            rest
            + sum(subject.folded.values())
            + sum(getattr(m, k).numel() * 4 for m in subject.layers.values() for k in weight_names(m))
        )
        return CostTable("size", "bytes", layers, float(rest), float(base), "FP32")

    @staticmethod
    def _bytes(
        subject: Subject, name: str, weights: Mapping[str, Tensor], recipes: Mapping[str, LayerRecipe | None]
    ) -> int:
        inputs = 0
        for one, recipe in recipes.items():
            if recipe is not None and recipe.has_static_inputs and one not in subject.embeddings:
                inputs += 8 if recipe.activation_offset else 4
        first = recipes[name]
        if first is None or first.weight_family is None:
            return inputs + sum(weight.nbytes for weight in weights.values())
        return inputs + sum(stored(weight, first, subject.layers[name]).nbytes for weight in weights.values())


def stored(weight: Tensor, recipe: LayerRecipe, module: nn.Module) -> TensorSpec:
    """Returns how a recipe stores a weight."""
    family = recipe.weight_family
    assert family is not None
    return TensorSpec(
        family.name,
        tuple(weight.shape),
        recipe.scale_granularity,
        recipe.group_size,
        recipe.scale_type,
        recipe.variant_granularity or recipe.scale_granularity,
        transposed(module),
    )


@dataclass(frozen=True)
class CpuCost:
    """Seconds on this machine: every layer is timed alone at every candidate, the rest from the whole model.

    The cost of a layer is its time in FP32 times the measured ratio to FP32. Measurements are cached on disk by
    processor, instruction set, threads and shape. Speedups are relative to the whole model in FP32. Times are those of
    the first batch.

    Args:
        seconds: Approximate time to measure each layer.
        cache: Directory of measurements; None for the user's cache directory.
    """

    seconds: float = 0.4
    cache: str | os.PathLike[str] | None = None

    name = "cpu"

    def table(self, subject: Subject, candidates: Sequence[Candidate], progress: Progress | None = None) -> CostTable:
        """Measures every distinct layer, and the whole model.

        Raises:
            DyBitError: A measurement fails.
        """
        folder = Path(self.cache) if self.cache is not None else cache_directory() / "timing"
        inputs = subject.inputs
        layers: dict[str, tuple[float, ...]] = {}
        exact = 0.0
        for index, name in enumerate(subject.layers):
            if progress:
                progress(index, len(subject.layers), name)
            if name not in inputs:
                layers[name] = (0.0,) * len(candidates)
                continue
            own, ratios = self._layer(subject, name, candidates, folder)
            exact += own
            layers[name] = tuple(own * ratio for ratio in ratios)
        whole = compare({"model": partial(run_batch, subject.model, subject.batches[0])}, 6 * self.seconds)["model"]
        if progress:
            progress(len(subject.layers), len(subject.layers), "done")
        fixed = max(whole.median - exact, 0.0)
        return CostTable(
            "cpu", "seconds", layers, fixed, fixed + exact, "FP32", per_second=1.0, note=f"measured on {machine()}"
        )

    def _layer(
        self, subject: Subject, name: str, candidates: Sequence[Candidate], folder: Path
    ) -> tuple[float, list[float]]:
        """Returns the seconds of a layer in FP32, and the relative time of every candidate."""
        module, at = subject.layers[name], subject.inputs[name]
        recipes = [subject.layer_recipes(name, candidate)[name] for candidate in candidates]
        words = [
            asdict(machine()), type(module).__name__, module.extra_repr(), at.shape,
            [str(getattr(module, key).shape) for key in weight_names(module)],
            [recipe and asdict(recipe) for recipe in recipes],
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
        path = folder / f"{key}.json"
        try:
            known = read_json(path)
            own, ratios = float(known["seconds"]), [float(x) for x in known["shares"]]
            if own > 0 and len(ratios) == len(candidates) and all(x > 0 for x in ratios):
                return own, ratios
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: measure again
            pass
        runs = {"fp32": partial(module.forward, *at.args, **at.kwargs)}
        distinct = {recipe: str(index) for index, recipe in enumerate(recipes) if recipe is not None}
        for recipe, label in distinct.items():
            # The method for scales does not affect the time, and absolute maxima are the fastest to find.
            twin = subject.quantized(name, _quickly(recipe))
            runs[label] = partial(twin.forward, *at.args, **at.kwargs)
        times = compare(runs, self.seconds * len(runs))
        own = times["fp32"].median
        ratios = [1.0 if recipe is None else 1 / times[distinct[recipe]].ratio for recipe in recipes]
        write_json(path, {"machine": str(machine()), "layer": words[1:4], "seconds": own, "shares": ratios})
        return own, ratios


def _quickly(recipe: LayerRecipe) -> LayerRecipe:
    return replace(recipe, method="absmax", criterion="weight") if recipe.method == "mse" else recipe
