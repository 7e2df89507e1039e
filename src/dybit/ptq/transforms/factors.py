"""Moves factors of channels from the layer that produces the channels to the layers that read them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dybit.layers.kinds import channel_groups, transposed
from dybit.models.attachments import attach_
from dybit.ptq.transforms.links import Link


def scale_(model: nn.Module, link: Link, factor: Tensor) -> None:
    """Divides a producer's channels by factors and multiplies what reads them, in place.

    Args:
        model: The model the link was found in.
        link: The link. :func:`move_limit_` adjusts its limit.
        factor: Positive, of shape (channels,).
    """
    producer = model.get_submodule(link.producer)
    with torch.no_grad():
        for parameter in producer._parameters.values():
            if parameter is not None:
                rows = outputs_first(producer, parameter)
                rows.div_(factor.view(-1, *(1,) * (rows.ndim - 1)).to(rows.dtype))
        for name, index in link.readers.items():
            columns = inputs_first(model.get_submodule(name))
            spread = by_input(factor, index).view(*columns.shape[:2], *(1,) * (columns.ndim - 2))
            columns.mul_(spread.to(columns.dtype))


def move_limit_(model: nn.Module, link: Link, factor: Tensor) -> None:
    """Cuts a producer's channels, already divided by factors, where they were cut before, in place.

    The activation between (ReLU6) keeps its own limit, so every new limit has to be below that: all factors are first
    made at least one by a common one.
    """
    if link.limit is not None:
        common = factor.min()
        scale_(model, link, torch.full_like(factor, 1 / float(common)))
        attach_(model.get_submodule(link.producer), "limit_output", link.limit * common / factor)


def input_range(model: nn.Module, link: Link) -> Tensor:
    """The largest weight that reads each channel: float32 of shape (channels,), 0 where none does."""
    result = torch.zeros(link.channels, dtype=torch.float32, device="cpu")
    for name, index in link.readers.items():
        columns = inputs_first(model.get_submodule(name)).abs().flatten(2).amax(2).flatten().float()
        result = result.to(columns.device)
        result.scatter_reduce_(0, index[index >= 0], columns[index >= 0], "amax")
    return result


def by_input(factor: Tensor, index: Tensor) -> Tensor:
    """The factor of every input of a reader: shape (channels,) to (inputs,); 1 where the input is always zero."""
    return torch.where(index < 0, 1.0, factor[index.clamp(min=0)])


def outputs_first(module: nn.Module, parameter: Tensor) -> Tensor:
    """A view of a parameter of a layer or norm: (outputs, …)."""
    detached = parameter.detach()
    return detached.t() if detached.ndim > 1 and transposed(module) else detached


def inputs_first(module: nn.Module) -> Tensor:
    """A view of a layer's weight: (groups, inputs of a group, outputs of a group, …)."""
    weight = outputs_first(module, cast(Tensor, module.weight))
    return cast(Tensor, weight.unflatten(0, (channel_groups(module), -1))).transpose(1, 2)
