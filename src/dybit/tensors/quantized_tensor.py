"""A weight as packed codes, scales and codebook choices: what a layer holds and a checkpoint stores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.formats.packing import packed_size
from dybit.formats.scaling import GRANULARITIES, SCALE_TYPES, Granularity, ScaleType
from dybit.kernels.code_operators import dequantize
from dybit.kernels.packed_codes import unpack
from dybit.kernels.transforms import outside_transforms
from dybit.tensors.float8 import picklable, restored
from dybit.tensors.scale_types import SCALE_DTYPES, read_scales

_MAX_ELEMENTS = 1 << 40
# Families that have grown since the first version, and their number of members then.
_FIRST_MEMBERS = {"dybit2": 2}
_OPTIONAL = {"row_dims", "members"}  # of the stored fields


@dataclass(frozen=True)
class TensorSpec:
    """How a weight is stored. All shapes follow from it, so a loader can prepare buffers without the data.

    Args:
        family: Name of the format family (see :func:`dybit.formats.catalogue.family`).
        shape: Shape of the floating-point weight.
        granularity: What shares a scale: the tensor, a channel or a group.
        group_size: Columns in a group for ``granularity="group"``, else None.
        scale: Type of the scales.
        choice: What shares a codebook: the tensor, a channel or a group.
        transposed: 0 if the first dimension of the weight is output channels. Else the number of channel groups of a
            weight of shape (in, out / groups, …), as in transposed convolutions and transformers' ``Conv1D``.
        row_dims: Leading dimensions that count output channels: 1, or 2 for the matrices of several experts in one
            weight of shape (experts, out, in); with ``transposed=1``, of shape (experts, in, out).
        members: The number of codebooks that choices refer to, counted from the family's first. It is smaller than the
            family for weights stored by an earlier dybit whose family was smaller. 0 means all, and all become 0.

    Attributes:
        bits: Width of a code.
        choice_bits: Bits of a choice, 0 for a family of one.
        rows: Output channels.
        columns: Weights of one output channel.
        key: The fields as JSON text, which operators take as the spec.

    Raises:
        DyBitError: A field is out of range or does not fit the others.
    """

    family: str
    shape: tuple[int, ...]
    granularity: Granularity = "channel"
    group_size: int | None = None
    scale: ScaleType = "fp32"
    choice: Granularity = "channel"
    transposed: int = 0
    row_dims: int = 1
    members: int = 0
    # Plain attributes instead of properties that look up the family: torch.compile reads them.
    bits: int = field(init=False, compare=False, repr=False)
    choice_bits: int = field(init=False, compare=False, repr=False)
    rows: int = field(init=False, compare=False, repr=False)
    columns: int = field(init=False, compare=False, repr=False)
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the fields, which may come from a file."""
        size = len(catalogue.family(self.family).books)
        if isinstance(self.members, bool) or not isinstance(self.members, int) or not 0 <= self.members <= size:
            raise DyBitError(f"members must be 0 to the {size} codebooks of {self.family}, not {self.members!r}")
        object.__setattr__(self, "members", self.members % size)
        object.__setattr__(self, "bits", self.formats.bits)
        object.__setattr__(self, "choice_bits", self.formats.choice_bits)
        object.__setattr__(self, "key", json.dumps(self.to_dict()))
        positive = all(isinstance(n, int) and n > 0 for n in self.shape)
        if not isinstance(self.shape, tuple) or not positive or not 2 <= len(self.shape) <= 5:
            raise DyBitError(f"shape must be 2 to 5 positive integers, not {self.shape!r}")
        if math.prod(self.shape) > _MAX_ELEMENTS:
            raise DyBitError(f"shape {self.shape} has more than {_MAX_ELEMENTS} elements")
        if self.scale not in SCALE_TYPES:
            raise DyBitError(f"scale must be one of {', '.join(SCALE_TYPES)}, not {self.scale!r}")
        if self.granularity not in GRANULARITIES or self.choice not in GRANULARITIES:
            raise DyBitError(
                f"granularity and choice must be one of {', '.join(GRANULARITIES)}, "
                f"not {self.granularity!r} and {self.choice!r}"
            )
        grouped = isinstance(self.group_size, int) and self.group_size > 0
        if (self.granularity == "group") != grouped or (self.group_size is not None and not grouped):
            raise DyBitError(f"group_size={self.group_size!r} does not fit granularity={self.granularity!r}")
        if not isinstance(self.transposed, int) or self.transposed < 0:
            raise DyBitError(f"transposed must be an integer of at least 0, not {self.transposed!r}")
        if self.transposed and self.shape[0] % self.transposed:
            raise DyBitError(f"transposed={self.transposed} does not divide the first dimension of shape {self.shape}")
        stacked = self.row_dims == 2 and len(self.shape) == 3 and self.transposed <= 1
        if not isinstance(self.row_dims, int) or not (stacked or self.row_dims == 1):
            raise DyBitError(
                f"row_dims must be 1, or 2 for a weight of three dimensions and no channel groups, not "
                f"{self.row_dims!r} with shape {self.shape} and transposed={self.transposed}"
            )
        rows = math.prod(self.shape[: self.row_dims])
        if self.transposed:
            rows = self.shape[0] * self.shape[2] if stacked else self.shape[1] * self.transposed
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", math.prod(self.shape) // self.rows)

    @property
    def formats(self) -> Family:
        """The family, reduced to its first ``members``."""
        family = catalogue.family(self.family)
        return replace(family, books=family.books[: self.members]) if self.members else family

    @property
    def groups(self) -> int:
        """Groups in a row; 1 unless ``granularity="group"``."""
        return math.ceil(self.columns / self.group_size) if self.group_size else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of packed codes."""
        return packed_size(self.columns, self.bits, self.group_size)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the packed codes: (rows, groups, bytes), or (rows, 1, bytes) if the last group is shorter.

        If the floating-point weight has three dimensions, another dimension of size 1 follows. The packed codes never
        have the rank of their weight, so they cannot be loaded in its place by mistake.
        """
        even = not self.group_size or self.columns % self.group_size == 0
        groups = self.groups if even else 1
        shape = (self.rows, groups, self.row_bytes // groups)
        return (*shape, 1) if len(self.shape) == 3 else shape

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the scales: (1, 1), (rows, 1) or (rows, groups)."""
        return self.unit_shape(self.granularity)

    @property
    def choice_shape(self) -> tuple[int, int] | None:
        """Shape of the packed choices, ``family.choice_bits`` bits per unit; None for a family of one."""
        bits = self.choice_bits
        if not bits:
            return None
        rows, units = self.unit_shape(self.choice)
        # Choices of channels are packed together; choices of groups are packed row by row.
        return (1, packed_size(rows, bits)) if units == 1 else (rows, packed_size(units, bits))

    @property
    def scale_dtype(self) -> torch.dtype:
        """Storage type of the scales. A power of two is stored as a sign and seven bits of exponent, biased by 64."""
        return SCALE_DTYPES[self.scale]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and choices."""
        size = self.rows * self.row_bytes + math.prod(self.scale_shape) * self.scale_dtype.itemsize
        return size + math.prod(self.choice_shape or (0,)) + (4 if self.scale == "e4m3" else 0)

    def unit_shape(self, granularity: Granularity) -> tuple[int, int]:
        """Rows and columns of a table with one entry for each tensor, channel or group."""
        return {"tensor": (1, 1), "channel": (self.rows, 1), "group": (self.rows, self.groups)}[granularity]

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix, shape and dtype of every stored tensor; the suffix of the packed codes is empty."""
        table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "": (self.packed_shape, torch.uint8),
            "_scale": (self.scale_shape, self.scale_dtype),
        }
        if self.choice_shape:
            table["_choice"] = (self.choice_shape, torch.uint8)
        if self.scale == "e4m3":
            table["_tensor_scale"] = ((1,), torch.float32)
        return table

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Reshapes the floating-point weight to (rows, columns), as a view if possible."""
        if not self.transposed:
            return weight.reshape(self.rows, self.columns)
        if self.row_dims == 2:
            return weight.transpose(1, 2).reshape(self.rows, self.columns)
        by_group: Tensor = weight.unflatten(0, (self.transposed, -1))
        return by_group.transpose(1, 2).reshape(self.rows, self.columns)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        if not self.transposed:
            return matrix.view(self.shape)
        if self.row_dims == 2:
            return matrix.view(self.shape[0], self.shape[2], self.shape[1]).transpose(1, 2).contiguous()
        rest = (self.shape[0] // self.transposed, *self.shape[2:])
        # Contiguous, since the layout determines the order of summation in a matrix product.
        return matrix.view(self.transposed, self.shape[1], *rest).transpose(1, 2).reshape(self.shape).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values. Fields that earlier versions do not know are left out if possible.

        These are ``row_dims`` if it is 1, and ``members`` if it is the family's first number of members.
        """
        values = {name: getattr(self, name) for name in _stored_fields()} | {"shape": list(self.shape)}
        if self.row_dims == 1:
            del values["row_dims"]
        if self.members == first_members(self.family):
            del values["members"]
        else:
            values["members"] = len(self.formats.books)
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Reads the result of :meth:`to_dict`.

        Raises:
            DyBitError: A field is missing, unknown or bad.
        """
        known, free = set(_stored_fields()) - _OPTIONAL, set(data) - _OPTIONAL if isinstance(data, Mapping) else None
        if free != known or not isinstance(data["shape"], list):
            raise DyBitError(f"a stored weight must have the fields {', '.join(sorted(known))}, not {data!r:.200}")
        return cls(**{"members": first_members(data["family"]), **data, "shape": tuple(data["shape"])})


def first_members(family: object) -> int:
    """Returns the ``members`` of a stored weight that does not give them."""
    return _FIRST_MEMBERS.get(family, 0) if isinstance(family, str) else 0


def _stored_fields() -> list[str]:
    return [item.name for item in fields(TensorSpec) if item.init]


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight: ``scale · value(code)``.

    Attributes:
        spec: How it is stored.
        packed: Codes, uint8 of shape ``spec.packed_shape``.
        scale: Stored scales, of shape ``spec.scale_shape`` and type ``spec.scale_dtype``.
        choice: Packed indices of the codebooks, uint8 of shape ``spec.choice_shape``, or None.
        tensor_scale: The factor of E4M3 scales, float32 of shape (1,), or None.
    """

    spec: TensorSpec
    packed: Tensor
    scale: Tensor
    choice: Tensor | None = None
    tensor_scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: picklable(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: restored(value) for name, value in state.items()})

    def buffers(self) -> dict[str, Tensor]:
        """The stored tensors by the suffixes of :meth:`TensorSpec.buffers`."""
        return {suffix: tensor for suffix, tensor in self.parts().items() if tensor is not None}

    def parts(self) -> dict[str, Tensor | None]:
        """The same, with None for tensors that are not stored."""
        return {
            "": self.packed,
            "_scale": self.scale,
            "_choice": self.choice,
            "_tensor_scale": self.tensor_scale,
        }

    def scales(self, index: Tensor | None = None) -> Tensor:
        """Returns the scales as numbers: float32 of shape ``spec.scale_shape``, or those of some rows."""
        stored = self.scale if index is None or self.scale.shape[0] == 1 else self.scale.index_select(0, index)
        return read_scales(stored, self.spec.scale, self.tensor_scale)

    def choices(self, index: Tensor | None = None) -> Tensor | None:
        """Returns the index of the codebook of every unit: uint8 of shape (1, 1), (rows, 1) or (rows, groups), or None.

        Args:
            index: Rows to look up, int64 of shape (n,); None for all. Without effect if one choice serves all rows.
        """
        if self.choice is None:
            return None
        rows, units = self.spec.unit_shape(self.spec.choice)
        bits = self.spec.choice_bits
        if units > 1:
            return unpack(self.choice if index is None else self.choice.index_select(0, index), units, bits)
        if index is None or rows == 1:
            return unpack(self.choice, rows, bits).reshape(rows, 1)
        first = index * bits  # choices of all rows are packed together; one can span two bytes
        low, shift = first // 8, first % 8
        flat = self.choice.reshape(-1)
        high = (low + 1).clamp(max=flat.shape[0] - 1)
        word = flat.index_select(0, low).to(torch.int32) | flat.index_select(0, high).to(torch.int32) << 8
        return ((word >> shift) & ((1 << bits) - 1)).to(torch.uint8).reshape(-1, 1)

    def codes(self) -> Tensor:
        """Returns the codes: uint8 of shape (rows, columns)."""
        flat = self.packed.reshape(self.spec.rows, self.spec.row_bytes)
        return unpack(flat, self.spec.columns, self.spec.bits, self.spec.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the values of the codes: of shape ``spec.shape``, computed in float32."""
        spec = self.spec
        with outside_transforms():
            matrix = dequantize(
                self.packed.reshape(spec.rows, spec.row_bytes),
                self.scales(),
                self.choices(),
                spec.family,
                spec.columns,
                spec.bits,
                spec.group_size or 0,
            )
            return spec.from_matrix(matrix).to(dtype)
