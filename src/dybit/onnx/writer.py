"""Exports a quantized model to ONNX, checked against it: presets say how each layer is expressed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.layers.forwards import QuantizedLinear
from dybit.layers.kinds import RECURRENT, is_experts
from dybit.layers.quantized import Quantized, original_class, quantized_layers
from dybit.onnx import PRESETS, capture, rounding, weights
from dybit.onnx.graph import Builder, data_type
from dybit.onnx.verify import Check, verify
from dybit.safe_files import write_file
from dybit.tensors.quantized_tensor import QuantizedTensor

_EXACT, _ROUNDED = 1e-4, 1e-1  # bounds of the largest difference, where nothing and where inputs are rounded
_LIMIT = 2_000_000_000  # bytes that a protobuf can hold, a little less than 2^31


@dataclass(frozen=True)
class Exported:
    """The file that :func:`export` wrote.

    Attributes:
        path: The file.
        preset: Its preset.
        nbytes: Its size.
        inputs: Its inputs with their shapes, such as ``"x [batch, 64]"``.
        stored: How many weights are stored in which way.
        check: How its outputs compare with the model's.
    """

    path: Path
    preset: str
    nbytes: int
    inputs: tuple[str, ...]
    stored: dict[str, int]
    check: Check


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Sequence[Any],
    *,
    preset: str = "portable",
    bound: float | None = None,
) -> Exported:
    """Writes a quantized model as ONNX and checks that a runtime computes what the model does.

    ``portable``: codes of 2, 4 or 8 bits, which a Gather looks up in a table and a Mul scales: exact, small, and folded
    by ONNX Runtime when it loads the file; inputs are rounded by a table too. ``fast-cpu``: weights that are integers
    of 8 bits at some scale become ONNX Runtime's MatMulNBits, which rounds inputs to 8 bits as it goes, or int8 between
    QuantizeLinear and DequantizeLinear where the model's own inputs are integers; all else as ``portable``. ``fp4``:
    weights of E2M1 values (``s4r2``, ``e2m1``, ``mxfp4``, ``nvfp4``) become FLOAT4E2M1; all else as ``portable``.

    Args:
        model: A model that :func:`dybit.quantize_` or :func:`dybit.load` returned, on the CPU. It is left as it was.
        path: The file, written when all went well.
        batches: Inputs as for calibration. The model is traced and compared on the first batch. Dynamic are the first
            dimension, those that differ between batches, and the length of texts, as far as the model allows.
        preset: One of the three.
        bound: The largest difference of outputs from the model's that is accepted, as a share of the largest magnitude
            of an output. None means 1e-4, or 1e-1 where inputs are rounded: a sum that differs in its last bit may
            be rounded to the next code, and layer by layer more of them are.

    Raises:
        DyBitError: The preset is unknown or does not apply, the model has no quantized layer, torch cannot export it,
            the file would be larger than 2 GB or cannot be written, or the difference is over the bound.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> x = torch.randn(2, 8)
        >>> export(dybit.quantize_(model, dybit.Recipe(weights=4)), "model.onnx", [x]).stored  # doctest: +SKIP
        {'4-bit codes': 1}
    """
    layers = _check_arguments(model, batches, preset, bound)
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        what = "is a directory" if target.is_dir() else "is in no existing directory"
        raise DyBitError(f"path {str(path)!r} cannot be written: it {what}")
    opset, version = _opset(layers, preset)
    captured = capture.capture(model, batches, opset)
    writer = _Writer(captured.graph, layers, preset)
    for graph in (captured.graph, *captured.graph.subgraphs()):
        for node in list(graph):
            if node.domain == capture.DOMAIN:
                writer.replace(graph, node)
    _finish(captured, version, uses_microsoft=bool(writer.stored["MatMulNBits"]))
    size = sum(value.const_value.nbytes for value in captured.graph.initializers.values() if value.const_value)
    if size > _LIMIT:
        raise DyBitError(f"path {str(path)!r}: the file would have {size:,} bytes, and ONNX holds 2 GB in one file")
    data = ir.to_proto(captured).SerializeToString()
    check = verify(data, model, batches[0], runtime=not writer.stored["FLOAT4E2M1"])
    limit = bound if bound is not None else _ROUNDED if writer.rounds else _EXACT
    if not check.difference <= limit:
        raise DyBitError(
            f"{check.runtime} differs from the model by {check.difference:.2g} of the largest output, over the bound "
            f"of {limit:.2g} for preset {preset!r}; {str(path)!r} was not written"
        )
    _write(target, data)
    inputs = tuple(_described(value) for value in captured.graph.inputs)
    return Exported(target, preset, len(data), inputs, dict(writer.stored), check)


def _described(value: ir.Value) -> str:
    return f"{value.name} [{', '.join(str(getattr(n, 'value', n)) for n in value.shape or ())}]"


def _check_arguments(
    model: nn.Module, batches: Sequence[Any], preset: str, bound: float | None
) -> dict[str, Quantized]:
    if preset not in PRESETS:
        raise DyBitError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    if bound is not None and not bound >= 0:
        raise DyBitError(f"bound must be a number of at least 0, not {bound!r}")
    if not isinstance(model, nn.Module) or not quantized_layers(model):
        raise DyBitError(f"model must be a torch.nn.Module with quantized layers, not {type(model).__name__}")
    if isinstance(batches, torch.Tensor | dict | str) or not len(batches):
        raise DyBitError(f"batches must be a list of at least one batch, not {type(batches).__name__}")
    away = next((t for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"), None)
    if away is not None:
        raise DyBitError(f"model must be on the CPU to be exported, not on {away.device}")
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if reason := _no_counterpart(layer):
            kind = original_class(layer).__name__
            raise DyBitError(f"layer {name!r}, a {kind} {reason}, cannot be exported to ONNX: a rule keeps it as it is")
    held = [layer.quantized_tensor(key) for layer in layers.values() for key in layer.weight_specs]
    if preset == "fp4" and not any(weights.is_e2m1(weight) for weight in held):
        raise DyBitError("preset 'fp4' needs a weight of E2M1 values, such as weights='s4r2' gives; the model has none")
    return layers


def _no_counterpart(layer: Quantized) -> str:
    """What ONNX has nothing for, or its runtime fails at; empty for a layer that can be exported."""
    if isinstance(layer, nn.EmbeddingBag):
        return "with quantized weights"
    if is_experts(layer):
        return "of experts with quantized weights"
    if isinstance(layer, RECURRENT) and layer.input_spec is not None:
        return "with rounded inputs"
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return "with projections"
    return ""


def _opset(layers: dict[str, Quantized], preset: str) -> tuple[int, int]:
    """The opset and the version of ONNX that the types in use need."""
    widths = {spec.bits for layer in layers.values() for spec in layer.weight_specs.values()}
    if 2 in widths:
        return 25, 13
    return (23, 11) if preset == "fp4" else (21, 10)


class _Writer:
    """Puts ONNX in the place of placeholders.

    Attributes:
        stored: How many weights are stored in which way.
        rounds: Whether any inputs are rounded.
    """

    def __init__(self, graph: ir.Graph, layers: dict[str, Quantized], preset: str) -> None:
        self.stored: Counter[str] = Counter()
        self.rounds = False
        self._graph, self._layers, self._preset = graph, layers, preset
        self._build = Builder(graph)
        self._names: dict[int, str] = {}
        self._seen: set[tuple[str, str]] = set()

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        """Replaces one placeholder."""
        name = node.attributes["layer"].as_string()
        layer = self._layers[name]
        kinds: dict[str, Callable[[ir.Node, Quantized, str], ir.Value]] = {
            capture.WEIGHT: self._weight,
            capture.LINEAR: self._linear,
            capture.EMBEDDING: self._embedding,
            capture.ROUND: self._round,
        }
        old = node.outputs[0]
        new = kinds[node.op_type](node, layer, name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], self._build.take(), [old], [new])

    def _name(self, weight: QuantizedTensor, wanted: str) -> str:
        """The name of a weight; that of the first one for those tied to it."""
        return self._names.setdefault(id(weight.packed), wanted)

    def _count(self, kind: str, name: str) -> None:
        if (kind, name) not in self._seen:
            self._seen.add((kind, name))
            self.stored[kind] += 1

    def _weight(self, node: ir.Node, layer: Quantized, place: str) -> ir.Value:
        key = node.attributes["weight"].as_string()
        weight = layer.quantized_tensor(key)
        name = self._name(weight, f"{place}.{key}".lstrip("."))
        whole = self._integers(layer)
        if whole is not None:
            self._count("int8", name)
            value = weights.integer_kernel(self._build, whole, weight.spec, name)
        else:
            value = weights.from_matrix(self._build, self._matrix(weight, name), weight.spec)
        return self._typed(value, layer.float_dtype)

    def _integers(self, layer: Quantized) -> weights.Integers | None:
        """The weight of a linear layer or convolution, where preset, inputs and scales call for int8 throughout.

        Only there are inputs rounded by QuantizeLinear: where it meets a weight in floating point, ONNX Runtime rounds
        that to 8 bits too, without being asked.
        """
        plain = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, QuantizedLinear))
        if self._preset != "fast-cpu" or not plain or not layer.weight_specs or not rounding.is_integer(layer):
            return None
        weight = layer.quantized_tensor()
        return weights.integers(weight) if weight.spec.groups == 1 else None

    def _matrix(self, weight: QuantizedTensor, name: str) -> ir.Value:
        """(rows, columns) in float32."""
        if self._preset == "fp4" and weights.is_e2m1(weight):
            self._count("FLOAT4E2M1", name)
            return weights.e2m1_matrix(self._build, weight, name)
        self._count(f"{weight.spec.bits}-bit codes", name)
        return weights.table_matrix(self._build, weight, name)

    def _linear(self, node: ir.Node, layer: Quantized, place: str) -> ir.Value:
        x, weight = cast(ir.Value, node.inputs[0]), layer.quantized_tensor()
        name = self._name(weight, f"{place}.weight".lstrip("."))
        if self._preset == "fast-cpu" and x.dtype == ir.DataType.FLOAT:
            whole = self._integers(layer)
            if whole is not None:
                self._count("int8", name)
                return self._build.op("MatMul", x, weights.integer_matrix(self._build, whole, name))
            whole = weights.integers(weight)
            y = whole and weights.integer_product(self._build, x, whole, name)
            if y is not None:
                self._count("MatMulNBits", name)
                self.rounds = True
                return y
        matrix = self._build.op("Transpose", self._matrix(weight, name), perm=[1, 0])
        kind = x.dtype or ir.DataType.FLOAT
        return self._build.op("MatMul", x, matrix if kind == ir.DataType.FLOAT else self._build.cast(matrix, kind))

    def _embedding(self, node: ir.Node, layer: Quantized, place: str) -> ir.Value:
        index, weight = cast(ir.Value, node.inputs[0]), layer.quantized_tensor()
        name = self._name(weight, f"{place}.weight".lstrip("."))
        rank = len(node.outputs[0].shape or ()) - 1
        if self._preset == "fp4" and weights.is_e2m1(weight):
            rows = self._build.op("Gather", self._matrix(weight, name), index)
        else:
            self._count(f"{weight.spec.bits}-bit codes", name)
            rows = weights.table_rows(self._build, weight, name, index, rank)
        return self._typed(rows, layer.float_dtype)

    def _round(self, node: ir.Node, layer: Quantized, place: str) -> ir.Value:
        x = cast(ir.Value, node.inputs[0])
        self.rounds = True
        kind, rank = x.dtype or ir.DataType.FLOAT, len(node.outputs[0].shape or ())
        wide = x
        if kind != ir.DataType.FLOAT:
            wide = self._build.cast(x, ir.DataType.FLOAT)
            wide.shape = x.shape
        if kind == ir.DataType.FLOAT and self._integers(layer) is not None:
            y = rounding.integer_round(self._build, wide, layer)
        else:
            y = rounding.table_round(self._build, wide, layer, rank)
        return y if kind == ir.DataType.FLOAT else self._build.cast(y, kind)

    def _typed(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        kind = data_type(str(dtype).removeprefix("torch."))
        return value if kind == ir.DataType.FLOAT else self._build.cast(value, kind)


def _finish(model: ir.Model, version: int, uses_microsoft: bool) -> None:
    """Drops what only the exporter needs to know, and says which operators are in use."""
    model.opset_imports.pop(capture.DOMAIN, None)
    if uses_microsoft:
        model.opset_imports[weights.MICROSOFT] = 1
    model.ir_version = version
    model.producer_name, model.producer_version = "dybit", None
    model.metadata_props.clear()
    for name in [name for name in model.graph.initializers if name.startswith(capture.PREFIX)]:
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix(capture.PREFIX)
        model.graph.initializers.add(value)
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _write(path: Path, data: bytes) -> None:
    """Writes a file atomically: it is complete or it is not there."""
    try:
        write_file(path, data)
    except OSError as error:
        raise DyBitError(f"path {str(path)!r} cannot be written: {error.strerror}") from None
