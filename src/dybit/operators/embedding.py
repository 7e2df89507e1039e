"""The operator ``torch.ops.dybit.embedding``: looks up rows of a packed table and dequantizes only these."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels.codes import decode
from dybit.kernels.packed_codes import unpack
from dybit.operators.dispatch import check_values, read_spec
from dybit.tensors.quantized_tensor import QuantizedTensor

# index of any shape, int64 or int32. weight to tensor_scale: the buffers of a QuantizedTensor; spec: TensorSpec.key.
# Returns (*index shape, columns), float32.
SCHEMA = (
    "(Tensor index, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, str spec) "
    "-> Tensor"
)
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
