"""Traces a quantized model to an ONNX graph in which placeholders stand for what dybit does.

There are four, of the domain ``dybit``, each with the qualified
name of its ``layer``: ``Weight`` (no input), ``Linear`` (without bias), ``Embedding`` and ``Round``.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dybit.errors import DyBitError
from dybit.layers.forwards import QuantizedConv, QuantizedEmbedding, QuantizedLinear
from dybit.layers.patched_forward import follow_class_
from dybit.layers.quantized import Quantized, original_class, quantized_layers
from dybit.models.running import evaluating, run_batch

DOMAIN = "dybit"
PREFIX = "model."  # of the names of parameters in a captured graph
Axes = tuple[dict[int, str], ...]
WEIGHT, LINEAR, EMBEDDING, ROUND = "Weight", "Linear", "Embedding", "Round"


def capture(model: nn.Module, batches: Sequence[Any], opset: int) -> ir.Model:
    """Traces a quantized model, in evaluation mode.

    The first dimension of every input is dynamic, the second one of integers (the length of a text), and every other
    that differs between batches; if the model does not allow that, the length is not, or none is.

    Args:
        model: Of which some layers are quantized; on the CPU. It is left as it was.
        batches: Inputs as in :func:`dybit.quantize_`; the first one is traced.
        opset: The ONNX opset.

    Raises:
        DyBitError: torch cannot export the model; the message says why.
    """
    failed: DyBitError | None = None
    whole = widened(batches[0])
    calls = [tensors(batch) for batch in batches]
    with evaluating(model):
        outputs = _output_names(run_batch(model, batches[0], "the first batch"))
    for batch, axes in ((whole, _axes(calls, texts=True)), (whole, _axes(calls, texts=False)), (batches[0], None)):
        with _placeholders(model), _quiet():
            try:
                return _trace(model, batch, axes, outputs, opset)
            except DyBitError as error:
                failed = failed or error
    assert failed is not None
    raise failed


def _trace(model: nn.Module, batch: Any, axes: Axes | None, outputs: list[str], opset: int) -> ir.Model:  # noqa: ANN401
    try:
        program = torch.onnx.export(
            _Flat(model, batch),
            tuple(x.clone() for x in tensors(batch)),  # torch marks tensors as dynamic, also for the next attempt
            input_names=_input_names(model, batch),
            output_names=outputs,
            dynamic_shapes=(axes,) if axes else None,
            dynamo=True,
            opset_version=opset,
            verbose=False,
        )
    except Exception as error:  # torch raises whatever the model's own code does
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise DyBitError(f"model {type(model).__name__} cannot be exported by torch.onnx: {reason}") from error
    assert program is not None
    return program.model


class _Flat(nn.Module):
    """A model as a function from tensors to tensors, whatever its own arguments and results are."""

    def __init__(self, model: nn.Module, batch: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        self._leaves, self._spec = pytree.tree_flatten(arguments(batch))
        self.eval()

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Calls the model."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(x, Tensor) else x for x in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return [x for x in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(x, Tensor)]


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """The positional and the named arguments of a batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def widened(batch: Any) -> Any:  # noqa: ANN401
    """A batch whose first dimension is at least 2: torch takes a dimension of 1 for a constant."""
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x, batch)


def _input_names(model: nn.Module, batch: Any) -> list[str]:  # noqa: ANN401
    """A name for every tensor of a batch: that of its parameter in forward."""
    # The class's own signature, not that of the mixin of quantized layers.
    forward = original_class(model).forward if isinstance(model, Quantized) else type(model).forward
    args, kwargs = arguments(batch)
    try:
        bound = dict(list(inspect.signature(forward).bind(model, *args, **kwargs).arguments.items())[1:])
    except TypeError:
        bound = {"input": (args, kwargs)}
    return _names(bound, "input")


def _output_names(result: Any) -> list[str]:  # noqa: ANN401
    """A name for every tensor of a result: its key in a mapping, else its number."""
    names = _names(result, "output")
    if not names:
        raise DyBitError(f"the model's output holds no tensor but is a {type(result).__name__}")
    return names


def _names(tree: Any, fallback: str) -> list[str]:  # noqa: ANN401
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
            name = "_".join(word for word in words if word)
            names.append(name if name and not name[0].isdigit() else f"{fallback}_{name}".rstrip("_"))
    return names if len(set(names)) == len(names) else [f"{fallback}_{i}" for i in range(len(names))]


def tensors(batch: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """The tensors of a batch, in order."""
    return tuple(x for x in pytree.tree_leaves(arguments(batch)) if isinstance(x, Tensor))


def _axes(calls: Sequence[tuple[Tensor, ...]], texts: bool) -> Axes:
    """The names of the dynamic dimensions of every input; equal ones have one name.

    Args:
        calls: The inputs of every batch.
        texts: Whether the second dimension of integers is one.
    """
    alike = [call for call in calls if [x.ndim for x in call] == [x.ndim for x in calls[0]]]
    names: dict[tuple[int, ...], str] = {}
    result = []
    for parts in zip(*alike, strict=True):
        axes = {}
        for dim in range(parts[0].ndim):
            seen = (min(dim, 1), *(x.shape[dim] for x in parts))
            text = texts and dim == 1 and not parts[0].is_floating_point() and parts[0].shape[1] > 1
            if dim == 0 or text or len(set(seen[1:])) > 1:
                word = "length" if dim else "batch"
                count = sum(name.startswith(word) for name in names.values())
                axes[dim] = names.setdefault(seen, f"{word}_{count}" if count else word)
        result.append(axes)
    return tuple(result)


@contextmanager
def _placeholders(model: nn.Module) -> Iterator[None]:
    """Makes the quantized layers of a model speak placeholders, in evaluation mode."""
    layers = quantized_layers(model)
    before = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__class__ = _speaking(type(layer), name, tuple(layer.weight_specs))
            follow_class_(layer, before[name])
        with evaluating(model):
            yield
    finally:
        for name, layer in layers.items():
            spoke = type(layer)
            layer.__class__ = before[name]
            follow_class_(layer, spoke)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _speaking(cls: type[Quantized], layer: str, names: tuple[str, ...]) -> Any:  # noqa: ANN401
    """A class of the same layer whose weights, products and roundings are placeholders."""

    def round_input(self: Quantized, x: Tensor) -> Tensor:
        return x if self.input_spec is None else _symbol(ROUND, (x,), layer, x.dtype, x.shape)

    def linear(self: Quantized, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        x = self.round_input(x)
        y = _symbol(LINEAR, (x,), layer, x.dtype, (*x.shape[:-1], self.weight_specs["weight"].rows))
        bias = self.own_bias
        return y if bias is None else y + bias.to(x.dtype)

    def embedding(self: Quantized, input: Tensor) -> Tensor:
        shape = (*input.shape, self.weight_specs["weight"].columns)
        return _symbol(EMBEDDING, (input,), layer, self.float_dtype, shape)

    def weight(name: str) -> property:
        def read(self: Quantized) -> Tensor:
            return _symbol(WEIGHT, (), layer, self.float_dtype, self.weight_specs[name].shape, weight=name)

        return property(read)

    members: dict[str, Any] = {name: weight(name) for name in names} | {"round_input": round_input}
    if issubclass(cls, QuantizedLinear):
        members["forward"] = linear
    elif issubclass(cls, QuantizedEmbedding):
        members["forward"] = embedding
    elif issubclass(cls, QuantizedConv):
        members["forward"] = Quantized.forward  # the layer's own, with the placeholders
    return type(cls.__name__, (cls,), members)


def _symbol(
    op: str, inputs: tuple[Tensor, ...], layer: str, dtype: torch.dtype, shape: Sequence[Any], **attributes: str
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}", inputs, {"layer": layer, **attributes}, dtype=dtype, shape=shape, version=1
    )
