"""Plans the quantization of files: which tensors become weights of which layers, and how each is stored."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dybit.errors import DyBitError
from dybit.layers.input_spec import InputSpec
from dybit.models.coverage import Coverage, Left
from dybit.models.plan import weight_spec
from dybit.models.streaming import Job, Text
from dybit.models.tensor_files import FLOATS, Stored
from dybit.recipe import LayerRecipe, Recipe

_WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# A file has no layers, so embedding tables are recognized by name.
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|emb)([._]|$)")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class FilePlan:
    """The arguments of :func:`dybit.models.streaming.quantize_files`.

    Attributes:
        coverage: How much of the model is quantized.
        jobs: By key: how a tensor is quantized.
        entries: By layer: its entry in the manifest.
        names: The new names of tensors, by key.
        shared: From the keys of tied tensors to the keys under which they are stored.
        extra: Further files by name.
    """

    coverage: Coverage
    jobs: dict[str, Job] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Text | Path] = field(default_factory=dict)

    def add(
        self, layer: str, kind: str, name: str, key: str, stored: Stored, job: Job, inputs: InputSpec | None = None
    ) -> None:
        """Adds a weight of a layer, or some rows of one.

        Args:
            layer: The name of the layer.
            kind: Its class, for information.
            name: The name of the weight in the layer.
            key: The key of the tensor.
            stored: The tensor.
            job: How it is quantized.
            inputs: How the inputs of the layer are rounded.
        """
        self.jobs[key] = job
        entry = {
            "kind": kind,
            "dtype": _DTYPES[stored.dtype],
            "weights": {},
            "input": inputs.to_dict() if inputs else None,
        }
        self.entries.setdefault(layer, entry)["weights"][name] = job.spec.to_dict()


def plan_names(path: str, source: Mapping[str, Stored], recipe: Recipe) -> FilePlan:
    """Plans files without a model: quantizes floating-point tensors of 2 to 5 dimensions named ``weight``.

    Args:
        path: The file, for errors.
        source: Its tensors.
        recipe: The recipe, without activations.

    Raises:
        DyBitError: The recipe has activations or a rule that matches nothing, or there is no such tensor.
    """
    if recipe.activations is not None:
        raise DyBitError(f"activations={recipe.activations!r} need a model that can be run, not the file {path!r}")
    layers: dict[str, list[str]] = {}
    for key, stored in source.items():
        layer, _, name = key.rpartition(".")
        if name in _WEIGHT_NAMES and stored.dtype in FLOATS and 2 <= len(stored.shape) <= 5 and stored.nbytes:
            layers.setdefault(layer, []).append(key)
    if not layers:
        raise DyBitError(f"{path!r} has no floating-point tensor of 2 to 5 dimensions named *.weight")
    recipe.check_names(layers, source)
    kept = {name for name in layers if _layer_recipe(recipe, name).weight_family is None}
    plan = FilePlan(_coverage(source, layers, recipe, kept))
    for layer, keys in layers.items():
        how = _layer_recipe(recipe, layer)
        for key in keys if layer not in kept else ():
            job = Job(weight_spec(how, source[key].shape), how.method, how.percentile)
            plan.add(layer, "weight", key.rpartition(".")[2], key, source[key], job)
    return plan


def _layer_recipe(recipe: Recipe, layer: str) -> LayerRecipe:
    """Returns the recipe of a layer of which only the name is known."""
    return recipe.layer(layer, "embedding" if _EMBEDDING.search(layer) else "linear") or LayerRecipe(weights=None)


def _coverage(
    source: Mapping[str, Stored], layers: Mapping[str, list[str]], recipe: Recipe, kept: Collection[str]
) -> Coverage:
    """Measures how much of the files is quantized."""
    named = {key: layer for layer, keys in layers.items() for key in keys}
    quantized, left = 0, []
    for key, stored in source.items():
        count = math.prod(stored.shape)
        if key in named and named[key] not in kept:
            quantized += count
        elif key in named:
            left.append(Left(named[key], "weight", count, "the recipe keeps these weights", True))
        elif stored.dtype in FLOATS and sum(size > 1 for size in stored.shape) > 1 and "bias" not in key:
            rule = recipe.keeps(key)
            reason = "not named as a weight" if rule is None else f"rule {rule!r}"
            left.append(Left(key, "tensor", count, reason, rule is not None))
    return Coverage.of(quantized, left)
