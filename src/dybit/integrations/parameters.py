"""What transformers asks the parameters of a model: how many they are, and their device and type."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from dybit.layers.kinds import is_embedding
from dybit.layers.quantized import quantized_layers


def count_codes_(model: Any) -> None:  # noqa: ANN401  # a PreTrainedModel
    """Has the models in a transformers model count quantized weights, and say device and type without parameters."""
    for module in model.modules():
        if hasattr(type(module), "num_parameters"):  # a PreTrainedModel, which cannot be imported this early
            module.num_parameters = MethodType(_num_parameters, module)
            if next(module.parameters(), None) is None:
                module.parameters = MethodType(_parameters, module)


def _num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:  # noqa: ANN401
    """As transformers' method of the name; every weight that is held as codes counts, tied ones once."""
    total = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return total
    sizes: dict[int, int] = {}
    tables: set[int] = set()
    for layer in quantized_layers(model).values():
        for name, spec in layer.weight_specs.items():
            identity = id(layer._buffers[name])
            sizes[identity] = spec.rows * spec.columns
            tables |= {identity} if is_embedding(layer) else set()
    return total + sum(size for identity, size in sizes.items() if not (exclude_embeddings and identity in tables))


def _parameters(model: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    """As ``nn.Module.parameters``, and the quantized weights where there is no other parameter."""
    own = list(type(model).parameters(model, recurse))
    yield from own or (
        getattr(layer, name) for layer in quantized_layers(model).values() for name in layer.weight_specs
    )
