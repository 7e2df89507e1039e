"""Calls of layers under torch.fx: layers become nodes of the graph, since computations on codes cannot be traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.fx
from torch import nn


def tracer_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.fx.proxy.TracerBase | None:
    """Returns the torch.fx tracer of a call, or None."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.fx.Proxy):
            return x.tracer
    return None


def call_leaf(tracer: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Records the call of a layer as one node, even if the tracer does not treat the layer as a leaf."""
    state = vars(tracer)
    before = dict(state)
    state["is_leaf_module"] = lambda *_: True
    try:
        return tracer.call_module(layer, layer.forward, args, kwargs)
    finally:
        del state["is_leaf_module"]
        if "is_leaf_module" in before:
            state["is_leaf_module"] = before["is_leaf_module"]
