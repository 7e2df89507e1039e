"""Nodes and initializers of an ONNX graph under construction."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dybit.errors import DyBitError

Array = NDArray[Any]


class Builder:
    """Collects nodes, and adds initializers to a graph, equal small ones once.

    Args:
        graph: Where the initializers go.

    Attributes:
        nodes: The nodes so far, in order; :meth:`take` empties it.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._small: dict[tuple[Any, ...], ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:  # noqa: ANN401
        """Adds a node with one output and returns that."""
        node = ir.node(kind, list(inputs), attributes or None, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def take(self) -> list[ir.Node]:
        """The nodes since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def constant(self, value: Any, dtype: Any = np.float32) -> ir.Value:  # noqa: ANN401
        """A small constant: a number, or a list of them."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._small:
            self._small[key] = self.initializer(f"dybit.constant_{len(self._small)}", array)
        return self._small[key]

    def initializer(self, name: str, array: Array) -> ir.Value:
        """An initializer; of the same name, the one that is there already."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Another type."""
        return self.op("Cast", value, to=int(dtype))

    def reshape(self, value: ir.Value, shape: list[int]) -> ir.Value:
        """Another shape; 0 keeps a dimension."""
        return self.op("Reshape", value, self.constant(shape, np.int64))

    def slice(self, value: ir.Value, axis: int, stop: int) -> ir.Value:
        """The first elements of an axis."""
        start, end, axes = (self.constant([n], np.int64) for n in (0, stop, axis))
        return self.op("Slice", value, start, end, axes)


def unsigned(codes: Array, bits: int) -> Array:
    """Codes in the smallest type that ONNX has for them: 2 bits, 4 bits or bytes."""
    if bits <= 2:
        return codes.astype(ml_dtypes.uint2)
    return codes.astype(ml_dtypes.uint4) if bits <= 4 else codes.astype(np.uint8)


def data_type(name: str) -> ir.DataType:
    """The ONNX type of a floating-point type of torch, by its name.

    Raises:
        DyBitError: There is none.
    """
    try:
        return {
            "float32": ir.DataType.FLOAT,
            "float16": ir.DataType.FLOAT16,
            "bfloat16": ir.DataType.BFLOAT16,
            "float64": ir.DataType.DOUBLE,
        }[name]
    except KeyError:
        raise DyBitError(f"weights of type {name!r} cannot be exported to ONNX") from None
