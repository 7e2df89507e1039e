"""Calls of layers under torch.fx, where they are nodes of the graph: what they compute on codes cannot be traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.fx
from torch import nn


def tracer_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.fx.proxy.TracerBase | None:
    """The tracer of torch.fx that a call is traced by, or None."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.fx.Proxy):
            return x.tracer
    return None


def call_leaf(tracer: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Records the call of a layer as one node, whatever modules the tracer takes for leaves."""
    state = vars(tracer)
    before = dict(state)
    state["is_leaf_module"] = lambda *_: True
    try:
        return tracer.call_module(layer, layer.forward, args, kwargs)
    finally:
        del state["is_leaf_module"]
        if "is_leaf_module" in before:
            state["is_leaf_module"] = before["is_leaf_module"]
