"""Reads integer ONNX models: the weights of DequantizeLinear and MatMulNBits as codes of dybit, value for value.

Only weights are read: how inputs are rounded stays with the ONNX file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch

import onnx
from dybit.errors import CheckpointError, DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.formats.scaling import Granularity
from dybit.interchange.imported import Imported
from dybit.kernels.packed_codes import pack
from dybit.onnx.graph import Array
from dybit.onnx.weights import MICROSOFT
from dybit.safe_files import check_regular
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_SIGNED = {"int2": 2, "int4": 4, "int8": 8}
_UNSIGNED = {"uint2": 2, "uint4": 4, "uint8": 8}
# What tools append to the name of a weight when they quantize it.
_SUFFIX = re.compile(r"([._](quantized|quant|int8|int8_t|4bit|8bit|(DQ_)?Q[248]G?))+$")
_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul")


def read(path: str | os.PathLike[str]) -> Imported:
    """Reads the quantized weights of an ONNX model, where dybit has exactly their values.

    Integers that are symmetric around zero become DyBit's ``max_run=1`` (``s8r1``, ``s4r1``); those that use the most
    negative integer ``int8full`` or ``int4full``; those with zero points of their own ``int4asym``.

    Args:
        path: A file with weights in DequantizeLinear (INT2 to INT8 and unsigned, by tensor, channel or block) or in
            ONNX Runtime's MatMulNBits (2, 4 or 8 bits).

    Raises:
        CheckpointError: The file is missing, truncated, no ONNX, or contradicts itself.
        DyBitError: It has no such weight, or one whose values dybit cannot hold exactly; the message says which.
    """
    check_regular(path, CheckpointError)
    try:
        proto = onnx.load(os.fspath(path))
        onnx.checker.check_model(proto)
        return _read(ir.from_proto(proto).graph)
    except DyBitError as error:
        raise type(error)(f"{str(path)!r}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file breaks wherever it likes: in protobuf, the checker or NumPy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{str(path)!r} is not a valid ONNX model: {reason}") from None


def _read(graph: ir.Graph) -> Imported:
    found = Imported()
    used: set[str] = set()
    inputs = 0
    for node in graph:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            _put(found, _product_name(node), _product(node))
        elif node.op_type == "DequantizeLinear" and _array(node.inputs[0]) is not None:
            layout = _layout(node)
            if layout is not None:
                _put(found, _name(node, node.inputs[0]), _dequantized(node, *layout))
        else:
            inputs += node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")
            continue
        used |= {value.name or "" for value in node.inputs if value is not None}
    if not found.weights:
        kinds = sorted({node.op_type for node in graph} & set(_OPERATORS))
        hint = f"; it has {', '.join(kinds)}, which are not read: quantize to QDQ instead" if kinds else ""
        raise DyBitError(f"the model has no weight in DequantizeLinear or MatMulNBits{hint}")
    for name, value in graph.initializers.items():
        array = _array(value)
        if name not in used and array is not None and array.ndim and array.dtype.kind in "fi":
            found.tensors[name] = torch.from_numpy(np.array(array))
    return Imported(found.weights, found.tensors, inputs)


def _put(found: Imported, name: str, weight: QuantizedTensor) -> None:
    known = found.weights.get(name)
    if known is not None and not (known.spec == weight.spec and torch.equal(known.packed, weight.packed)):
        raise DyBitError(f"the model has two different weights of the name {name!r}")
    found.weights[name] = weight


def _array(value: ir.Value | None) -> Array | None:
    """The contents of an initializer, or None for what is computed."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def _needed(node: ir.Node, index: int, what: str) -> Array:
    array = _array(node.inputs[index]) if index < len(node.inputs) else None
    if array is None:
        raise DyBitError(f"{what} of node {node.name!r} must be an initializer")
    return array


def _name(node: ir.Node, value: ir.Value | None) -> str:
    """The qualified name of a weight: that of the initializer, or of the node where exporters made that up."""
    name = _SUFFIX.sub("", (value.name if value is not None else "") or "")
    if not name or "::" in name:
        name = (node.name or "weight").strip("/").replace("/", ".")
        name = name.removesuffix(".MatMul").removesuffix(".Gemm").removesuffix(".Conv")
    return name if name == "weight" or name.endswith(".weight") else f"{name}.weight"


def _product_name(node: ir.Node) -> str:
    name = _name(node, node.inputs[1])
    return re.sub(r"\.MatMul(?=\.weight$)", "", name)


def _layout(node: ir.Node) -> tuple[str, int] | None:
    """Returns the use of a dequantized initializer; None if it is no weight.

    ``rows`` (output channels first), ``columns``, or ``transposed`` with the number of channel groups.
    """
    uses = [(use.node, use.idx) for use in node.outputs[0].uses()]
    swapped = False
    while len(uses) == 1 and uses[0][0].op_type == "Transpose":
        if uses[0][0].outputs[0].shape is not None and len(uses[0][0].outputs[0].shape) > 2:
            return None
        swapped = not swapped
        uses = [(use.node, use.idx) for use in uses[0][0].outputs[0].uses()]
    if not uses:
        return None
    user, index = uses[0]
    if user.op_type == "ConvTranspose" and index == 1:
        return "transposed", user.attributes.get_int("group", 1)
    if (user.op_type == "Conv" and index == 1) or (user.op_type == "Gather" and index == 0):
        return "rows", 0
    if user.op_type in ("MatMul", "Gemm") and index == 1:
        columns_first = user.op_type == "MatMul" or not user.attributes.get_int("transB", 0)
        return ("columns" if columns_first != swapped else "rows"), 0
    return None


def _dequantized(node: ir.Node, layout: str, groups: int) -> QuantizedTensor:
    """The weight of a DequantizeLinear."""
    values, zero_bits = _integers(node)
    scale = _needed(node, 1, "the scale").astype(np.float32)
    zero = _array(node.inputs[2]) if len(node.inputs) > 2 else None
    zero = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    if values.ndim < 2 or zero.shape != scale.shape:
        raise DyBitError(
            f"node {node.name!r} has values of shape {values.shape}, scales {scale.shape}, zero points {zero.shape}"
        )
    axis = node.attributes.get_int("axis", 1) % values.ndim
    block = node.attributes.get_int("block_size", 0)
    if layout == "columns":
        values, axis = values.T, 1 - axis
        scale, zero = (a.T if a.ndim == 2 else a for a in (scale, zero))
    if scale.size == 1:
        granularity: Granularity = "tensor"
        scale, zero = scale.reshape(1, 1), zero.reshape(1, 1)
    elif block and values.ndim == 2 and axis == 1 and scale.ndim == 2:
        granularity = "group"
    elif scale.ndim == 1 and axis == int(layout == "transposed" and groups == 1) and scale.size == values.shape[axis]:
        granularity = "channel"
        scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    else:
        raise DyBitError(
            f"node {node.name!r} has scales of shape {scale.shape} along dimension {axis} of a weight {values.shape}; "
            "dybit has scales by tensor, output channel or group of inputs"
        )
    return _encode(node.name or "", values, scale, zero, zero_bits, granularity, block or None, groups)


def _integers(node: ir.Node) -> tuple[Array, int]:
    """The integers of a DequantizeLinear, and their width, negative for unsigned ones."""
    array = _needed(node, 0, "the weight")
    kind = array.dtype.name
    if kind not in _SIGNED and kind not in _UNSIGNED:
        raise DyBitError(f"node {node.name!r} has a weight of type {kind}; only integers of 2, 4 and 8 bits are read")
    return array.astype(np.int64), _SIGNED.get(kind) or -_UNSIGNED[kind]


def _product(node: ir.Node) -> QuantizedTensor:
    """The weight of a MatMulNBits."""
    bits = node.attributes.get_int("bits", 4)
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    block = node.attributes["block_size"].as_int()
    if bits not in (2, 4, 8) or block < 1 or rows < 1 or columns < 1:
        raise DyBitError(f"node {node.name!r} has bits={bits}, block_size={block}, N={rows}, K={columns}")
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise DyBitError(f"node {node.name!r} has its inputs reordered (g_idx), which dybit does not have")
    count = -(-columns // block)
    packed = _needed(node, 1, "the weight").astype(np.uint8)
    scale = _needed(node, 2, "the scale").astype(np.float32)
    if packed.size * 8 != rows * count * block * bits or scale.size != rows * count:
        raise DyBitError(
            f"node {node.name!r} has {packed.size} bytes and {scale.size} scales, which do not fit its shape"
        )
    codes = _unpacked(packed.reshape(rows, -1), bits)[:, :columns]
    zero = np.full((rows, count), 1 << (bits - 1), dtype=np.int64)
    stored = _array(node.inputs[3]) if len(node.inputs) > 3 else None
    if stored is not None and stored.dtype == np.uint8:
        zero = _unpacked(stored.reshape(rows, -1), bits)[:, :count]
    elif stored is not None:
        zero = stored.reshape(rows, count).astype(np.float64)
        if not np.array_equal(zero, np.round(zero)):
            raise DyBitError(
                f"node {node.name!r} has zero points that are not integers, which dybit cannot hold exactly"
            )
        zero = zero.astype(np.int64)
    scale = scale.reshape(rows, count)
    if (scale == scale[:, :1]).all() and (zero == zero[:, :1]).all():  # a channel's only scale, written block by block
        return _encode(node.name or "", codes, scale[:, :1], zero[:, :1], -bits, "channel", None, 0)
    return _encode(node.name or "", codes, scale, zero, -bits, "group", block, 0)


def _unpacked(packed: Array, bits: int) -> Array:
    """Bytes to codes, low bits first: (rows, bytes) to int64 (rows, codes)."""
    shifts = np.arange(0, 8, bits)
    return (packed[..., None] >> shifts & ((1 << bits) - 1)).reshape(packed.shape[0], -1).astype(np.int64)


def _encode(
    name: str,
    values: Array,
    scale: Array,
    zero: Array,
    width: int,
    granularity: Granularity,
    group_size: int | None,
    transposed: int,
) -> QuantizedTensor:
    """Integers with scales and zero points as a weight of dybit, exactly.

    Args:
        name: For errors.
        values: As stored, of the weight's shape.
        scale: float32 of the units' shape.
        zero: Integers of the same shape.
        width: Bits of a value, negative for unsigned ones.
        granularity: What shares a scale.
        group_size: Inputs that share a scale.
        transposed: As in :class:`dybit.tensors.quantized_tensor.TensorSpec`.
    """
    if not np.isfinite(scale).all() or (scale < 0).any():
        raise DyBitError(f"node {name!r} has a scale that is negative or not finite, which dybit does not have")
    spec = TensorSpec("s8r1", values.shape, granularity, group_size, "fp32", "tensor", transposed)
    if scale.shape != spec.scale_shape:
        raise DyBitError(f"node {name!r} has scales of shape {scale.shape}, where {spec.scale_shape} belong")
    matrix = spec.to_matrix(torch.from_numpy(values)).numpy()
    spread = np.repeat(zero, group_size or spec.columns, axis=1)[:, : spec.columns]
    numbers = matrix - spread
    for family, choices in _candidates(numbers, matrix, zero, abs(width)):
        found = _in_family(numbers, family, choices, spread)
        if found is None:
            continue
        codes, unit = found
        choice_of = granularity if choices is not None else "tensor"
        exact = TensorSpec(family.name, values.shape, granularity, group_size, "fp32", choice_of, transposed)
        packed = pack(torch.from_numpy(codes), exact.bits, group_size).view(exact.packed_shape)
        choice = None
        if choices is not None:
            index = torch.from_numpy(choices.astype(np.uint8))
            flat = index.reshape(1, -1) if index.shape[1] == 1 else index
            choice = pack(flat, exact.choice_bits)
        return QuantizedTensor(exact, packed, torch.from_numpy(scale / np.float32(unit)), choice)
    raise DyBitError(
        f"node {name!r} has integers from {numbers.min()} to {numbers.max()} after its zero points, which no format of "
        "dybit holds exactly"
    )


def _candidates(numbers: Array, stored: Array, zero: Array, bits: int) -> Iterator[tuple[Family, Array | None]]:
    """Families that may hold integers, from the plainest; those with zero points also need the choice of every unit."""
    for width in range(bits, 9):
        yield catalogue.family(f"s{width}r1"), None
        yield catalogue.family(f"int{width}full"), None
        if width == bits and bits <= 6 and stored.min() >= 0:
            yield catalogue.family(f"int{bits}asym"), zero


def _in_family(numbers: Array, family: Family, choices: Array | None, spread: Array) -> tuple[Array, float] | None:
    """The codes of integers, and the value of 1; None where the family lacks one of them."""
    if choices is not None:
        fits = choices.min() >= 0 and choices.max() < len(family.books)
        return ((numbers + spread).astype(np.uint8), 1.0) if fits else None
    book = family.books[0]
    unit = float(book.levels[book.levels > 0].min())
    values = numbers * unit
    if values.min() < book.levels[0] or values.max() > book.levels[-1]:
        return None
    return book.encode(values), unit
