"""Captures a model as a graph of torch's operators, and computes its shapes for given inputs.

``torch.export`` records the graph. Sizes of inputs stay free where the model allows it; a size of 0 or 1 is recorded as
such. At given inputs, a run on tensors without values gives the shape and the layout of every value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dybit.operators.dispatch import recording

_ATEN = torch.ops.aten
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)
#: Operators that check values and compute nothing.
CHECKS = (_ATEN._assert_tensor_metadata.default, _ATEN._assert_scalar.default, _ATEN.sym_constrain_range.default)
_PREFIX = "model."  # of names in the graph


class CaptureError(Exception):
    """A model cannot be captured, or a captured graph does not hold for some inputs."""


@dataclass(frozen=True)
class Capture:
    """A model as a graph.

    Attributes:
        module: The graph, with the parameters and buffers of the model as attributes.
        out_spec: The structure of the results.
        state: The parameters and buffers by the names of the graph's attributes.
    """

    module: fx.GraphModule
    out_spec: pytree.TreeSpec
    state: dict[str, Tensor]

    def names(self) -> list[str]:
        """Returns the names of the parameters and buffers in the model."""
        return [name.removeprefix(_PREFIX) for name in self.state]


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Captures a model as a graph of the tensors among its inputs. Other inputs are constants of the graph.

    Args:
        model: In evaluation mode.
        args: Example inputs, positional.
        kwargs: Example inputs by name.

    Raises:
        CaptureError: ``torch.export`` cannot record the model, or the model changes its inputs or its state.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # Copies, because a graph recorded for a view holds for views of the same kind alone.
    tensors = [x.detach().clone(memory_format=torch.contiguous_format) for x in leaves if isinstance(x, Tensor)]
    free = [{i: torch.export.Dim.AUTO for i, n in enumerate(x.shape) if n > 1} for x in tensors]
    try:
        with warnings.catch_warnings(), torch.no_grad(), recording():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _OfTensors(model, leaves, spec), tuple(tensors), dynamic_shapes=(tuple(free),), strict=False
            )
            module = program.module()
            if not _without_writes_(module):
                program = program.run_decompositions({})  # takes longer than the rest
                module = program.module()
    except Exception as error:  # tracing runs the model's own code, which fails in any way it likes
        raise CaptureError(_first_line(error)) from error
    signature = program.graph_signature
    if signature.user_inputs_to_mutate:
        raise CaptureError("the model writes to one of its inputs")
    for changed in signature.buffers_to_mutate.values():
        raise CaptureError(f"the model writes to {changed.removeprefix(_PREFIX)!r}")
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    state = {name: x for name in sorted(names) if isinstance(x := _attribute(module, name), Tensor)}
    return Capture(module, program.call_spec.out_spec, state)


def _without_writes_(module: fx.GraphModule) -> bool:
    """Replaces operators in place by those that return a new tensor.

    Returns:
        Whether no operator in place is left. One stays if another value that is used later shares the memory, or if
        parts of the graph are graphs of their own.
    """
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in module.graph.nodes):
        return False  # a part of the graph under another mode
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in order:
        for x in pytree.tree_leaves(node.meta.get("val")):  # several, of operators such as chunk
            if isinstance(x, Tensor):
                sharing.setdefault(x.untyped_storage()._cdata, []).append(node)
    for node in order:
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            continue
        given, fresh = node.all_input_nodes[:1], _fresh(node.target)
        if fresh is None or given != list(node.args[:1]):
            return False
        types = {x.meta["val"].dtype for x in (node, *node.all_input_nodes) if isinstance(x.meta.get("val"), Tensor)}
        before = [x for x in sharing[node.meta["val"].untyped_storage()._cdata] if order[x] < order[node]]
        later = [user for x in before if x is not given[0] for user in x.users if order[user] > order[node]]
        written = any(x.op != "call_function" for x in before) and fresh is not _ATEN.detach.default
        if len(types) > 1 or written or later:
            return False
        for user in [user for user in given[0].users if order[user] > order[node]]:
            user.replace_input_with(given[0], node)
        node.target = fresh
    module.graph.eliminate_dead_code(_is_kept)
    module.recompile()
    return True


def _is_kept(node: fx.Node) -> bool:
    """Whether a node stays if nothing uses it, such as a check."""
    return node.op != "call_function" or node.target in CHECKS


def _fresh(target: torch._ops.OpOverload) -> Any:  # noqa: ANN401
    """Returns the operator that computes what one does that only writes to its first argument; else None."""
    schema = target._schema
    name = schema.name.partition("::")[2]
    if not name.endswith("_") or name.endswith("__") or [x.is_write for x in schema.arguments].count(True) != 1:
        return None
    found = getattr(getattr(_ATEN, name[:-1], None), schema.overload_name or "default", None)
    return found if schema.arguments[0].is_write else None


class _OfTensors(nn.Module):
    """A model as a function of the tensors among its inputs."""

    def __init__(self, model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self._leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self._tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self._spec = spec

    def forward(self, *tensors: Tensor) -> Any:  # noqa: ANN401
        leaves = list(self._leaves)
        for i, x in zip(self._tensors, tensors, strict=True):
            leaves[i] = x
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _attribute(module: nn.Module, name: str) -> Any:  # noqa: ANN401
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


class Shapes(fx.Interpreter):
    """Runs a graph on tensors without values.

    Attributes:
        values: The value of every node: a fake tensor with the layout that it has in a program, or a plain value.

    Args:
        captured: The graph.
        prefer_last: Whether images are channels-last, as the kernels compute them.
    """

    def __init__(self, captured: Capture, prefer_last: bool = True) -> None:
        super().__init__(captured.module)
        self.values: dict[fx.Node, Any] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._last = prefer_last
        self._fakes: dict[str, Any] = {}

    def infer(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """Returns the value of every node for inputs of given shapes.

        Raises:
            CaptureError: The graph does not hold for these inputs.
        """
        try:
            with self._mode, torch.no_grad():
                super().run(*[self._fake(x) for x in inputs])
        except Exception as error:  # a guard, or any operator
            raise CaptureError(_first_line(error)) from error
        return self.values

    def _fake(self, x: Tensor) -> Tensor:
        fake = self._mode.from_tensor(x.detach(), static_shapes=True)
        layout = _LAYOUTS.get(x.ndim)
        if self._last and layout is not None and x.is_floating_point():
            return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if self._last else fake

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """Computes and records the value of a node."""
        result = self.values[n] = super().run_node(n)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Returns a parameter or buffer without values."""
        found = super().get_attr(target, args, kwargs)
        if not isinstance(found, Tensor):
            return found
        if target not in self._fakes:
            self._fakes[target] = self._mode.from_tensor(found.detach(), static_shapes=True)
        return self._fakes[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Computes one operator."""
        if target in CHECKS:
            return None
        if target in _VIEWS:  # layouts may differ from those that were recorded
            return _ATEN.reshape.default(*args)
        result = super().call_function(target, args, kwargs)
        if self._last and target is _ATEN.scaled_dot_product_attention.default:  # as the kernels compute it
            return torch.empty_like(result.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        return result


def shares_memory(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two tensors without values are views of the same memory."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
