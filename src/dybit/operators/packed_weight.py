"""Weights in the layout of the compiled kernels, for linear layers."""

from __future__ import annotations

import sys
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.scaling import Granularity
from dybit.kernels import extension
from dybit.kernels.arguments import address, choice_per_unit, per_unit
from dybit.kernels.packed_codes import pack
from dybit.operators.activations import activation_number
from dybit.operators.input_rounding import KEPT, InputFormat, InputRounding
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_F32, _ONE, _CPU = torch.float32, (1,), torch.device("cpu")
_MAX_BOOKS = 32
_MAX_SIGNIFICAND = 32767


@lru_cache(maxsize=256)
def _tables(family: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns significands (books, codes) int32 and steps (books,) float32; None if they do not fit 16 bits."""
    books = catalogue.family(family).books
    if len(books) > _MAX_BOOKS or not 2 <= books[0].bits <= 8:
        return None
    tables, steps = [], []
    for book in books:
        values = np.nan_to_num(book.values)
        step = next(
            (2.0**e for e in range(8, -25, -1) if np.array_equal(np.round(values / 2.0**e) * 2.0**e, values)), 0
        )
        if not step or np.abs(values / step).max() > _MAX_SIGNIFICAND:
            return None
        tables.append((values / step).astype(np.int32))
        steps.append(step)
    return np.stack(tables), np.array(steps, dtype=np.float32)


class Storage(IntEnum):
    """How the kernels store a weight (csrc/weight.h): codes of 2 to 4 bits, or significands of 8 or 16 bits.

    ``RUNS`` stores 16-bit significands as 8-bit indices.
    """

    CODES2 = 2
    CODES3 = 3
    CODES4 = 4
    BYTES = 8
    RUNS = 9
    WORDS = 16


class PackedWeight:
    """A weight in the layout of the kernels, for one format of inputs.

    Args:
        weight: The portable form, on the CPU.
        inputs: The format of the inputs. ``input_group_size`` consecutive inputs share a scale (0: a row).

    Raises:
        DyBitError: The kernels do not support the weight (see :func:`supports`), or a choice is out of range.
    """

    def __init__(self, weight: QuantizedTensor, inputs: InputFormat, input_group_size: int = 0) -> None:
        compiled, spec, tables = extension.load(), weight.spec, _tables(weight.spec.family)
        if compiled is None or tables is None:
            raise DyBitError(f"the kernels cannot hold a weight of family {spec.family!r}")
        # Kept alive during the call: the extension is given addresses.
        packed = weight.packed.contiguous()
        scale = weight.scales().contiguous()
        choice = weight.choices()
        choice = None if choice is None else choice.contiguous()
        if packed.numel() != spec.rows * spec.row_bytes or scale.shape != spec.scale_shape:
            raise DyBitError(f"weight must have {spec.packed_shape} codes and {spec.scale_shape} scales")
        books = len(tables[1])
        self._weight = compiled.PackedWeight(
            address("packed", packed.view(-1), torch.uint8, (spec.rows * spec.row_bytes,)),
            spec.rows,
            spec.columns,
            spec.bits,
            spec.group_size or spec.columns,
            *per_unit("scale", scale, _F32, spec.rows, spec.groups),
            *choice_per_unit(choice, spec.rows, spec.groups, books),
            address("significands", torch.from_numpy(tables[0]), torch.int32, (books, 1 << spec.bits)),
            address("steps", torch.from_numpy(tables[1]), _F32, (books,)),
            books,
            inputs.magnitude_bits,
            inputs.max_run,
            inputs.signed,
            input_group_size or spec.columns,
        )
        self.shape = (spec.rows, spec.columns)
        self.inputs = inputs
        self.isa: str = self._weight.isa
        #: Up to so many rows, :meth:`linear` is faster than a product with the result of :meth:`dequantize`.
        self.most_rows = 1 if inputs.magnitude_bits == 0 and self.isa == "scalar" else sys.maxsize

    @property
    def compiled(self) -> Any:  # noqa: ANN401
        """The extension's own object."""
        return self._weight

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and choices in this layout."""
        return int(self._weight.nbytes)

    @property
    def storage(self) -> Storage:
        """How the weight is stored."""
        return Storage(self._weight.storage)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rounding: InputRounding = KEPT,
        activation: str = "",
    ) -> Tensor:
        """Multiplies rows of inputs by the weight.

        Inputs are rounded to significands at the static scale and offset, or at the dynamic scale
        ``max(|x|) / reach`` of every row or group. For every segment of columns (a part of one group whose sum fits 32
        bits, 4096 at most) the sum of the products of significands is an exact integer. It is converted to FP32 and
        multiplied by the scales; the segments are added in order with fused multiply-adds, then multiplied by the
        row's input scale, and the bias is added (csrc/weight.h). All paths agree bit for bit. Without rounding of
        inputs, products are summed in FP32; for several rows, in the order of the columns.

        Args:
            x: float32 of shape (rows, columns), contiguous. A row with NaN gives a row of NaN, and
                so does infinity at a dynamic scale; at a static one it saturates.
            bias: float32 of shape (weight rows,), contiguous, or None.
            rounding: Scale, offset and reach of the inputs. Format and group size are those that the weight was packed
                for.
            activation: One of :data:`dybit.operators.activations.ACTIVATIONS`, applied to the results while they are
                in the cache. It is within 2e-7 of the exact function, relative to results above 1
                (csrc/generic/activation.inc); torch is no closer.

        Returns:
            float32 of shape (rows, weight rows).

        Raises:
            DyBitError: A tensor has another type, shape, device or layout, or the activation is unknown.
        """
        return Product(self, bias, rounding).of(x, activation)

    def dequantize(self) -> Tensor:
        """Returns the values of the codes: float32 of shape (rows, columns)."""
        out = torch.empty(self.shape, dtype=_F32, device="cpu")
        self._weight.dequantize(address("out", out, _F32, self.shape), torch.get_num_threads())
        return out


class Product:
    """A weight with all other arguments of :meth:`PackedWeight.linear` but the inputs, checked once.

    Args:
        weight: The weight.
        bias: As for :meth:`PackedWeight.linear`. Do not move its memory, or that of the scales, afterwards.
        rounding: As for :meth:`PackedWeight.linear`.

    Raises:
        DyBitError: A tensor has another type, shape, device or layout, or the reach is not positive.
    """

    __slots__ = ("_kept", "given", "weight")

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, rounding: InputRounding = KEPT) -> None:
        reach, scale, factor = rounding.reach, rounding.scale, weight.inputs.factor
        if not reach > 0:
            raise DyBitError(f"reach must be positive, not {reach!r}")
        if scale is not None and factor != 1:
            scale = scale * factor
        self.weight = weight
        # The extension holds their addresses. A parameter may get other memory; its detached tensor does not.
        self._kept = (None if bias is None else bias.detach(), scale, rounding.offset)
        #: Arguments of the extension: its own object, addresses and reach.
        self.given = (
            weight.compiled,
            address("bias", bias, _F32, weight.shape[:1]),
            address("scale", scale, _F32, _ONE),
            address("offset", rounding.offset, _F32, _ONE),
            reach / factor,
        )

    def of(self, x: Tensor, activation: str = "") -> Tensor:
        """Multiplies rows of inputs: :meth:`PackedWeight.linear`."""
        y, results = _outputs(x, self.weight, self.weight)
        self.given[0].linear(*results, *self.given[1:], torch.get_num_threads(), activation_number(activation))
        return y


def feed_forward(
    x: Tensor, first: Product, down: Product, second: Product | None = None, activation: str = ""
) -> Tensor:
    """Returns ``down(activation(first(x)) · second(x))``, or ``down(activation(first(x)))`` if ``second`` is None.

    Computes a few hundred rows at a time, so that intermediate results stay in the cache. The bits are those of
    separate calls of :meth:`PackedWeight.linear`.

    Args:
        x: As for :meth:`PackedWeight.linear`.
        first: The product before the activation.
        down: The last product.
        second: Of the shape of ``first``, or None.
        activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.

    Returns:
        float32 of shape (rows, rows of the last weight).

    Raises:
        DyBitError: A tensor has another type, shape, device or layout, weights do not fit each other, or the activation
            is unknown.
    """
    y, results = _outputs(x, first.weight, down.weight)
    if down.weight.shape[1] != first.weight.shape[0]:
        raise DyBitError(f"down must have {first.weight.shape[0]} columns, but has shape {down.weight.shape}")
    if second is not None and second.weight.shape != first.weight.shape:
        raise DyBitError(f"second must have shape {first.weight.shape}, not {second.weight.shape}")
    hidden = [first.given] if second is None else [first.given, second.given]
    extension.load().feed_forward(  # type: ignore[union-attr]  # the weights were packed by it
        hidden, down.given, activation_number(activation), *results, torch.get_num_threads()
    )
    return y


def _outputs(x: Tensor, first: PackedWeight, last: PackedWeight) -> tuple[Tensor, tuple[int, int, int]]:
    """Allocates the results. Returns them and the address of x, its rows, and the address of the results."""
    rows = x.shape[0] if x.ndim == 2 else -1
    start = address("x", x, _F32, (rows, first.shape[1]))
    shape = (rows, last.shape[0])
    y = torch.empty(shape, dtype=_F32, device=_CPU)
    return y, (start, rows, address("y", y, _F32, shape))


def supports(family: str) -> bool:
    """Whether the kernels are installed and support a family: its values must be multiples of one step."""
    return extension.load() is not None and _tables(family) is not None


def significands(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Returns the significands of a weight with one scale per row, and the value of one unit of each row.

    Returns:
        float32 of shapes (rows, columns) and (rows,).

    Raises:
        DyBitError: The family's values are not multiples of one step.
    """
    tables = _tables(weight.spec.family)
    if tables is None:
        raise DyBitError(f"the kernels cannot hold a weight of family {weight.spec.family!r}")
    rows = weight.spec.rows
    given = weight.choices()
    choice = torch.zeros(rows, 1, dtype=torch.int64, device="cpu") if given is None else given.long().expand(rows, 1)
    values = torch.from_numpy(tables[0]).float()[choice, weight.codes().long()]
    steps = torch.from_numpy(tables[1])[choice[:, 0]]
    return values, (weight.scales().expand(rows, 1)[:, 0] * steps).contiguous()


def rows_of(spec: TensorSpec, rows: int) -> TensorSpec:
    """Returns the spec of some rows of a weight, with an FP32 scale and a choice for every unit."""
    granularity: Granularity = "group" if spec.group_size else "channel"
    return TensorSpec(spec.family, (rows, *spec.shape[1:]), granularity, spec.group_size, "fp32", granularity)


def pack_choices(choice: Tensor, spec: TensorSpec) -> Tensor:
    """Packs the choices of all units as a weight stores them."""
    return pack(choice.reshape(1, -1) if choice.shape[1] == 1 else choice, spec.choice_bits)


def take_rows(weight: QuantizedTensor, start: int, count: int, permuted: bool = False) -> QuantizedTensor:
    """Returns some rows of a weight that is not transposed.

    Args:
        weight: The weight.
        start: The first row.
        count: The number of rows.
        permuted: Whether to order the columns of a convolution by kernel position, then by channel.
    """
    spec = weight.spec
    if count == spec.rows and not permuted:
        return weight
    codes = weight.codes()[start : start + count]
    if permuted:
        codes = codes.view(count, spec.shape[1], -1).transpose(1, 2).reshape(count, spec.columns)
    scale, choice = weight.scales(), weight.choices()
    units = (count, spec.groups)
    part = rows_of(spec, count)
    return QuantizedTensor(
        part,
        pack(codes, spec.bits, spec.group_size).view(part.packed_shape),
        _some(scale, start, units),
        None if choice is None else pack_choices(_some(choice, start, units), part),
    )


def _some(units: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    """Returns the scales or choices of some rows, one for every group."""
    rows = units if units.shape[0] == 1 else units[start : start + shape[0]]
    return rows.expand(shape).contiguous()
