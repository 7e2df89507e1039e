"""The fused datapath in numbers: which width pairs run, how many codes share a field, how wide partial sums must be.

Shared by the simulator and by the hardware, so that the two cannot drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dybit.errors import DyBitError
from dybit.formats.format import MAX_BITS, MIN_BITS, variants

CONTAINERS = (2, 4, 8)
FIELD_BITS = 8  # raw activation bits that one row takes in a cycle

# Registers that the first operand passes until its encoded output appears.
PIPE_STAGES = {
    "sequence": 1,  # start → counters of the controller
    "address": 1,  # counters → address
    "read": 1,  # memory → raw fields
    "decode": 1,  # raw fields → significands
    "operands": 1,  # operand registers of the PE
    "product": 1,  # product register of the PE
    "sum": 1,  # partial-sum register of the PE
    "accumulate": 1,  # partial sums of all K folds
    "scale": 2,  # bias, multiplier
    "encode": 3,  # magnitude, shift and ReLU, encoder
}
# M + R + C count the first row of the input, of the array and the first column as one cycle each, but they add none.
PIPE = sum(PIPE_STAGES.values()) - 3


@dataclass(frozen=True)
class Mode:
    """How the array is fused for one layer.

    Attributes:
        weight_bits: Container of the weight codes: 2, 4 or 8.
        activation_bits: Container of the activation codes, at least ``weight_bits``.
    """

    weight_bits: int
    activation_bits: int

    @property
    def activations(self) -> int:
        """Activation codes in one 8-bit field."""
        return FIELD_BITS // self.activation_bits

    @property
    def lanes(self) -> int:
        """Partial sums, and so output channels, of one column."""
        return FIELD_BITS // self.weight_bits

    @property
    def macs(self) -> int:
        """Products that a PE makes in a cycle."""
        return self.activations * self.lanes

    @property
    def weight_word(self) -> int:
        """Raw weight bits that one PE holds."""
        return self.macs * self.weight_bits


def modes(narrowest: int = 2) -> tuple[Mode, ...]:
    """Returns the width pairs that run natively, widest first: weights no wider than activations."""
    widths = [width for width in reversed(CONTAINERS) if width >= narrowest]
    return tuple(Mode(w, a) for a in widths for w in widths if w <= a)


@cache
def mode(weight_bits: int, activation_bits: int, narrowest: int = 2) -> Mode:
    """Returns the mode in which a pair of code widths runs.

    A code rides in the next wider container, and an activation narrower than the weights is promoted to their
    container; both only append zeros to the code (docs/format.md, section 2).

    Args:
        weight_bits: Width of the weight codes, 2 to 8.
        activation_bits: Width of the activation codes, 2 to 8.
        narrowest: Narrowest container of the array: 2, 4 or 8.

    Raises:
        DyBitError: A width is not an integer from 2 to 8.
    """
    for name, bits in (("weight", weight_bits), ("activation", activation_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            pair = f"{weight_bits!r}/{activation_bits!r}"
            raise DyBitError(
                f"{name} bits of the pair {pair} must be an integer from {MIN_BITS} to {MAX_BITS}, not {bits!r}"
            )
    weight = next(width for width in CONTAINERS if width >= max(weight_bits, narrowest))
    activation = next(width for width in CONTAINERS if width >= max(activation_bits, weight))
    return Mode(weight, activation)


@cache
def largest_integer(bits: int, signed: bool) -> int:
    """Returns the largest magnitude that a code of a container has on the datapath, over all variants.

    The datapath's unit is 2^-(bits - 1) for every variant, signed or not, so that mid-rise needs no case of its own:
    half a mid-tread step of signed formats, the step itself of mid-rise and of unsigned ones.
    """
    return max(int(fmt.max_significand) * datapath_factor(signed, fmt.midrise) for fmt in variants(bits, signed))


def datapath_factor(signed: bool, midrise: bool) -> int:
    """Returns the datapath units in one significand unit of a format: 2 for signed mid-tread, else 1."""
    return 2 if signed and not midrise else 1


@cache
def lane_bits(terms: int, narrowest: int = 2) -> tuple[int, ...]:
    """Returns the two's-complement width of every partial-sum lane that is exact in the worst case.

    Args:
        terms: Products summed into one output channel.
        narrowest: Narrowest container of the array.

    Returns:
        Widths of lanes 0, 1, …: as many as the narrowest weights need.
    """
    return _worst_case({fused: terms for fused in modes(narrowest)}, narrowest)


@cache
def array_lane_bits(rows: int, narrowest: int = 2) -> tuple[int, ...]:
    """Returns the widths of the lanes inside an array, where a fold sums only as many products as there are rows.

    Args:
        rows: Rows of the array.
        narrowest: Narrowest container of the array.
    """
    return _worst_case({fused: rows * fused.activations for fused in modes(narrowest)}, narrowest)


def _worst_case(terms: dict[Mode, int], narrowest: int) -> tuple[int, ...]:
    """The widths that hold ``terms`` largest products in each mode."""
    widths = [0] * (FIELD_BITS // narrowest)
    for fused, count in terms.items():
        activation = max(largest_integer(fused.activation_bits, signed) for signed in (False, True))
        worst = activation * largest_integer(fused.weight_bits, True) * count
        for lane in range(fused.lanes):
            widths[lane] = max(widths[lane], worst.bit_length() + 1)
    return tuple(widths)
