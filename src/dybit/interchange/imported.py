"""Weights from other projects' files, as dybit holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dybit.recipe import Recipe
from dybit.tensors.quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class Imported:
    """The contents of a file, read.

    Attributes:
        weights: The quantized weights by qualified name, such as ``encoder.0.weight``.
        tensors: The other tensors of at least one dimension, by name.
        inputs: How many activations the file quantizes, which were left out.
    """

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: int = 0

    @property
    def recipe(self) -> Recipe:
        """The recipe that asks for the same formats, layer by layer; everything else in floating point."""
        rules: dict[str, dict[str, Any]] = {}
        for name, weight in self.weights.items():
            spec = weight.spec
            shared = {"group_size": spec.group_size} if spec.group_size else {"granularity": spec.granularity}
            rules[name.rpartition(".")[0]] = {"weights": spec.family, "scale": spec.scale, **shared}
        return Recipe(weights=None, embeddings=None, rules=rules)
