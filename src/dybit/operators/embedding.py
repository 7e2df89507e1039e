"""The operator ``torch.ops.dybit.embedding``: looks up rows of a packed table and dequantizes only these."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.arguments import address, choice_per_unit, kernels_for, per_unit
from dybit.kernels.codes import decode, values_by_code
from dybit.kernels.packed_codes import unpack
from dybit.operators.dispatch import check_values, read_spec, unwatched
from dybit.operators.packed_cache import LayerSnapshot
from dybit.tensors.quantized_tensor import QuantizedTensor

# index of any shape, int64 or int32. weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key.
# Returns (*index shape, columns), float32.
SCHEMA = (
    "(Tensor index, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, str spec) "
    "-> Tensor"
)
BAGS = ("sum", "mean", "max")  # numbered as in csrc/embedding.h
_memory = threading.local()
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")


def _embedding(
    index: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
) -> Tensor:
    table = read_spec(spec)
    rows = index.reshape(-1).long()
    packed = weight.reshape(table.rows, table.row_bytes)
    by_row = QuantizedTensor(table, packed, weight_scale, weight_choice, tensor_scale)
    if weight_scale.shape[0] > 1:  # select rows before converting the choices to numbers
        by_row = QuantizedTensor(table, packed, weight_scale.index_select(0, rows), weight_choice, tensor_scale)
    scale, choice = by_row.scales(), _choices(by_row, rows)
    chosen = packed.index_select(0, rows)
    out = decode(chosen, scale, choice, table.formats.books, table.columns, table.group_size)
    return out.view(*index.shape, table.columns)


def _choices(table: QuantizedTensor, rows: Tensor) -> Tensor | None:
    """Returns the choices of some rows. Unpacks only these rows if every row starts at a byte."""
    units = table.spec.unit_shape(table.spec.choice)
    if table.choice is None or units[0] == 1:
        return table.choices()
    if units[1] == 1:  # the choices of all rows are packed together
        return cast(Tensor, table.choices()).index_select(0, rows)
    return unpack(table.choice.index_select(0, rows), units[1], table.spec.choice_bits)


def _shape(index: Tensor, weight: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    return weight.new_empty(*index.shape, read_spec(rest[3]).columns, dtype=torch.float32)


_LIBRARY.define("embedding" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::embedding", _shape, lib=_LIBRARY)
_operator = torch.ops.dybit.embedding


def embedding(index: Tensor, weight: QuantizedTensor) -> Tensor:
    r"""Looks up rows of a packed table.

    Args:
        index: int64 or int32 of any shape, each a row.
        weight: The table, of shape (rows, columns).

    Returns:
        The values of the rows: float32 of shape (\*index.shape, columns).

    Raises:
        DyBitError: ``index`` has another type, or the table has no values.
        IndexError: An index is out of range.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise DyBitError(f"index must be int64 or int32, not {index.dtype}")
    check_values(weight.packed, index)
    return cast(
        Tensor,
        _operator(index, weight.packed, weight.scale, weight.choice, weight.tensor_scale, weight.spec.key),
    )


class PreparedTable:
    """A table prepared for many look-ups.

    Args:
        weight: The table, of shape (rows, columns).

    Attributes:
        snapshot: Of the table.
        compiled: The extension's own table; None if it cannot read this one.
    """

    __slots__ = ("_columns", "_kept", "_weight", "compiled", "snapshot")

    def __init__(self, weight: QuantizedTensor) -> None:
        self._weight, self._columns = weight, weight.spec.columns
        self.snapshot = LayerSnapshot(weight)
        self._kept: tuple[Tensor | None, ...] = ()
        self.compiled = self._prepare(weight)

    def _prepare(self, weight: QuantizedTensor) -> Any:  # noqa: ANN401  # the extension's own class
        """Returns the table of the extension; None if scales or choices would have to be unpacked for all groups."""
        spec, books = weight.spec, weight.spec.formats.books
        compiled = kernels_for(weight.packed, weight.scale, weight.choice)
        if (
            compiled is None
            or spec.scale != "fp32"
            or (weight.choice is not None and spec.unit_shape(spec.choice)[1] > 1)
        ):
            return None
        packed, scale, choice = weight.packed, weight.scale.contiguous(), weight.choices()
        choice = None if choice is None else choice.contiguous()
        if not packed.is_contiguous() or not self._columns:
            return None
        values = values_by_code(books)
        self._kept = packed, scale, choice, values  # the extension holds their addresses
        return compiled.CodedTable(
            address("values", values, torch.float32, (len(books), 1 << spec.bits)),
            (spec.rows, spec.columns, min(spec.group_size or spec.columns, spec.columns)),
            spec.bits,
            address("packed", packed, torch.uint8, spec.packed_shape),
            per_unit("scale", scale, torch.float32, spec.rows, spec.groups),
            choice_per_unit(choice, spec.rows, spec.groups, len(books)),
            len(books),
        )

    def rows(self, index: Tensor) -> Tensor:
        """Looks up rows: :func:`embedding`."""
        if self.compiled is None or not self._takes(index):
            return embedding(index, self._weight)
        given = index.long().contiguous()
        y = torch.empty((*index.shape, self._columns), dtype=torch.float32, device="cpu")
        if self.compiled.look_up(_indices(given), address("y", y, torch.float32, y.shape), torch.get_num_threads()):
            return y
        return embedding(index, self._weight)  # which names the index that is no row

    def bags(self, index: Tensor, starts: Tensor | None, kind: str) -> Tensor | None:
        """Combines rows of bags.

        Args:
            index: Rows, of shape (bags, length), or (indices,) with ``starts``.
            starts: The first index of every bag, of shape (bags,), or None.
            kind: One of :data:`BAGS`.

        Returns:
            float32 of shape (bags, columns); zero for an empty bag. None if the kernels cannot compute it.
        """
        if self.compiled is None or not self._takes(index) or index.ndim != (2 if starts is None else 1):
            return None
        given, begin, bags, length = index.long().contiguous(), 0, index.shape[0], 0
        if starts is not None:
            if starts.ndim != 1 or not self._takes(starts):
                return None
            starts = starts.long().contiguous()
            bags = starts.shape[0]
            begin = address("starts", starts, torch.int64, (bags,))
        else:
            length = index.shape[1]
            if length == 0:  # torch refuses it
                return None
        y = torch.empty((bags, self._columns), dtype=torch.float32, device="cpu")
        to = address("y", y, torch.float32, y.shape)
        known = self.compiled.look_up_bags(
            _indices(given), begin, length, bags, BAGS.index(kind), to, torch.get_num_threads()
        )
        return y if known else None

    def values(self) -> Tensor | None:
        """Decodes all rows, to memory that the thread's next call overwrites.

        Returns:
            float32 of shape (rows, columns). None if the kernels cannot compute it.
        """
        if self.compiled is None:
            return None
        rows = self._weight.spec.rows
        memory: Tensor | None = getattr(_memory, "values", None)
        if memory is None or memory.numel() < rows * self._columns:
            with torch.inference_mode(False):
                memory = _memory.values = torch.empty(rows * self._columns, dtype=torch.float32, device="cpu")
        found = memory[: rows * self._columns].view(rows, self._columns)
        self.compiled.decode(address("values", found, torch.float32, found.shape), torch.get_num_threads())
        return found

    def _takes(self, index: Tensor) -> bool:
        """Whether the kernels can look up the rows, and the dispatcher can be bypassed."""
        return unwatched(index) and index.is_cpu and index.dtype in (torch.int64, torch.int32)


def _indices(index: Tensor) -> tuple[int, int]:
    """Returns the address of indices and their number."""
    return address("index", index, torch.int64, index.shape), index.numel()
