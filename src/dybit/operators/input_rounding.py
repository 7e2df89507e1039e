"""How the inputs of operators are rounded to codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from torch import Tensor

from dybit.formats import catalogue
from dybit.formats.codebook import Codebook
from dybit.formats.format import Format, variants
from dybit.kernels.code_operators import fake_quantize, fake_quantize_dynamic
from dybit.kernels.transforms import pass_gradients, transforming

_EXACT = 1e-5  # of the scale: FP32 rounds the product of scale and level


@dataclass(frozen=True, eq=False)
class InputRounding:
    """How the inputs of an operator are rounded to codes.

    Args:
        format: Name of a single format, or empty to keep the inputs as they are.
        scale: The static scale, float32 of shape (1,); None for dynamic scales.
        offset: The static offset, float32 of shape (1,), or None.
        reach: Dynamic scales map the largest magnitude to this value.
        group_size: Columns that share a dynamic scale; 0 for all.
    """

    format: str = ""
    scale: Tensor | None = None
    offset: Tensor | None = None
    reach: float = 1.0
    group_size: int = 0

    def round(self, x: Tensor) -> Tensor:
        """Rounds ``x`` to codes and returns their values, of its shape and type. Each row has its own dynamic scale."""
        if not self.format:
            return x
        if transforming():
            return pass_gradients(x, self._round(x.detach()))
        return self._round(x)

    def round_samples(self, x: Tensor) -> Tensor:
        """As :meth:`round`, for ``x`` whose first dimension counts samples: each has its own dynamic scale."""
        return self.round(x if self.scale is not None else x.flatten(1)).view(x.shape)

    def keeps_zero(self) -> bool:
        """Whether 0 is known to be the value of a code, as zero padding needs: always, unless there is an offset."""
        if self.scale is None or self.offset is None:
            return True
        if self.offset.is_meta or self.scale.is_meta:
            return False
        zero = fake_quantize(self.offset.detach().new_zeros(1), self.scale, self.offset, self.format)
        return abs(float(zero)) <= _EXACT * float(self.scale)

    def _round(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            return cast(Tensor, fake_quantize(x, self.scale, self.offset, self.format))
        return cast(Tensor, fake_quantize_dynamic(x, self.format, self.reach, self.group_size))


KEPT = InputRounding()


@dataclass(frozen=True)
class InputFormat:
    """A format of inputs in the kernels: a plain DyBit format, with its values times ``factor``.

    Attributes:
        magnitude_bits: 0 for inputs that are not rounded.
        max_run: Longest run.
        signed: Whether there are negative values.
        factor: A power of two that multiplies the scale. INT8 has values up to 127: it is DyBit with ``max_run=1``,
            whose values go up to 127/64, and factor 64.
    """

    magnitude_bits: int = 0
    max_run: int = 0
    signed: bool = True
    factor: float = 1.0


@lru_cache(maxsize=256)
def input_format(name: str) -> InputFormat | None:
    """Returns the input format of a name; None if the kernels cannot round to it. The empty name means no rounding."""
    if not name:
        return InputFormat()
    book = catalogue.family(name).books[0]
    for signed in (True, False):
        for known in variants(book.bits, signed) if book.bits > 1 else ():
            factor = _factor(book, known)
            if factor and not (known.midrise or known.spare):
                return InputFormat(known.magnitude_bits, known.max_run, signed, factor)
    return None


def _factor(book: Codebook, known: Format) -> float:
    """Returns the power of two by which the values of two codebooks differ; 0 if they differ otherwise."""
    if len(book.levels) != len(known.levels):
        return 0.0
    factor = float(book.levels[-1] / known.levels[-1])
    same = np.array_equal(book.levels, known.levels * factor) and np.array_equal(book.ties_up, known.ties_up)
    return factor if same and factor > 0 and np.frexp(factor)[0] == 0.5 else 0.0


def max_significand(inputs: InputFormat) -> int:
    """Returns the largest magnitude of a significand of inputs."""
    return ((2 << (inputs.magnitude_bits - inputs.max_run)) - 1) << (2 * inputs.max_run - 2)
