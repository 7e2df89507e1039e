"""Programs: a layer's codes laid out in the accelerator's memories, and what must come out, in NumPy.

Convolutions come as matrices: im2col is the loader's work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dybit.accelerator.config import Config
from dybit.accelerator.datapath import FIELD_BITS, Mode, mode
from dybit.accelerator.mapping import Mapping, compute_cycles
from dybit.errors import DyBitError
from dybit.formats.format import Format
from dybit.rtl.model import Integers, Requantizer, Variant, check_output, encode, pack_fields, scaled, widen


@dataclass(frozen=True, eq=False)
class Program:
    """One layer for the hardware: ``passes`` independent products of an (M, K) by a (K, N) matrix.

    Args:
        config: The accelerator.
        activations: Codes, integers of shape (passes, M, K).
        activation_format: Their format; it must have a zero, which fills the last fold along K.
        weights: Codes, integers of shape (passes, K, N).
        weight_formats: Their format for every output channel, passes · N of them, of one width.
        requantizers: Bias, multiplier and shift of every output channel, passes · N of them.
        output_format: Format of the outputs, mid-tread without a spare level.
        relu: Whether negative outputs become zero.
        tile: Rows that are streamed at a time; as many as the partial sums allow if None.

    Raises:
        DyBitError: Shapes do not agree, a code is out of range, or the layer does not fit the memories.
    """

    config: Config
    activations: Integers
    activation_format: Format
    weights: Integers
    weight_formats: tuple[Format, ...]
    requantizers: tuple[Requantizer, ...]
    output_format: Format
    relu: bool = False
    tile: int | None = None

    def __post_init__(self) -> None:
        """Checks shapes, formats and what must fit."""
        if self.activations.ndim != 3 or self.weights.ndim != 3:
            raise DyBitError(f"operands must be (passes, M, K) and (passes, K, N), not {self._shapes}")
        if self.activations.shape[0] != self.weights.shape[0] or self.activations.shape[2] != self.weights.shape[1]:
            raise DyBitError(f"operands must agree in passes and K, not {self._shapes}")
        if self.activation_format.midrise:
            raise DyBitError(f"activation_format must have a zero to pad with, {self.activation_format} has none")
        channels = self.passes * self.n
        if len(self.weight_formats) != channels or len(self.requantizers) != channels:
            given = (len(self.weight_formats), len(self.requantizers))
            raise DyBitError(f"formats and requantizers must be one for each of {channels} channels, not {given}")
        if len({fmt.bits for fmt in self.weight_formats}) != 1 or not all(fmt.signed for fmt in self.weight_formats):
            raise DyBitError(
                f"weight_formats must be signed and of one width, not {set(map(str, self.weight_formats))}"
            )
        check_output(self.output_format)
        for name, codes, bits in (
            ("activations", self.activations, self.activation_format.bits),
            ("weights", self.weights, self.weight_formats[0].bits),
        ):
            if codes.size == 0 or codes.min() < 0 or codes.max() >= 1 << bits:
                raise DyBitError(f"{name} must be codes of {bits} bits, not {codes.shape} in another range")
        self._check_fit()

    def _check_fit(self) -> None:
        """The layer must fit the memories. Cut larger layers before loading them."""
        config = self.config
        needs = {
            "activation_sram": self.passes * self.k_folds * self.m * config.rows,
            "weight_sram": self.weight_words * config.columns * FIELD_BITS // config.narrowest,
        }
        for name, need in needs.items():
            if need > getattr(config, name):
                raise DyBitError(f"{name} must hold the {need} bytes of the layer, not {getattr(config, name)}")
        if not 1 <= self.tile_rows <= config.sum_rows:
            raise DyBitError(f"tile must be 1 to the {config.sum_rows} rows of partial sums, not {self.tile}")
        if self.k > config.reduction:
            raise DyBitError(
                f"reduction must be at least the {self.k} products that are summed, not {config.reduction}"
            )

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.activations.shape, self.weights.shape

    @property
    def passes(self) -> int:
        """Independent products."""
        return int(self.activations.shape[0])

    @property
    def m(self) -> int:
        """Rows of the input."""
        return int(self.activations.shape[1])

    @property
    def k(self) -> int:
        """Products summed into one output."""
        return int(self.activations.shape[2])

    @property
    def n(self) -> int:
        """Output channels of a pass."""
        return int(self.weights.shape[2])

    @property
    def mode(self) -> Mode:
        """The width pair."""
        return mode(self.weight_formats[0].bits, self.activation_format.bits, self.config.narrowest)

    @property
    def k_folds(self) -> int:
        """Folds along K."""
        return math.ceil(self.k / self.config.tile(self.mode)[0])

    @property
    def n_folds(self) -> int:
        """Folds along N in one pass."""
        return math.ceil(self.n / self.config.tile(self.mode)[1])

    @property
    def tile_rows(self) -> int:
        """Rows streamed at a time."""
        return min(self.m, self.config.sum_rows) if self.tile is None else min(self.tile, self.m)

    @property
    def weight_words(self) -> int:
        """Words in each bank of weights."""
        return self.passes * self.n_folds * self.k_folds * self.config.rows

    @property
    def variant(self) -> Variant:
        """The controls of the activation decoders."""
        return widen(self.activation_format, self.mode.activation_bits)[1]

    def activation_banks(self) -> Integers:
        """Returns the fields of every row's bank, (rows, passes · k_folds · M): by pass, K fold and input row."""
        fused, rows = self.mode, self.config.rows
        wide = widen(self.activation_format, fused.activation_bits)[0][self.activations]
        padded = np.zeros((self.passes, self.m, self.k_folds * rows * fused.activations), dtype=np.int64)
        padded[..., : self.k] = wide
        fields = pack_fields(
            padded.reshape(self.passes, self.m, self.k_folds, rows, fused.activations), fused.activation_bits
        )
        return fields.transpose(3, 0, 2, 1).reshape(rows, -1)

    def weight_banks(self) -> Integers:
        """Returns the words of every column's bank, (columns, weight_words): by pass, N fold, K fold, array row."""
        fused, rows, columns = self.mode, self.config.rows, self.config.columns
        k_size, n_size = self.config.tile(fused)
        padded = np.zeros((self.passes, self.k_folds * k_size, self.n_folds * n_size), dtype=np.int64)
        for channel, fmt in enumerate(self.weight_formats):
            turn, n = divmod(channel, self.n)
            padded[turn, : self.k, n] = widen(fmt, fused.weight_bits)[0][self.weights[turn, :, n]]
        # (pass, k fold, row, activation, n fold, column, lane)
        parts = padded.reshape(self.passes, self.k_folds, rows, fused.activations, self.n_folds, columns, fused.lanes)
        parts = parts.transpose(5, 0, 4, 1, 2, 3, 6).reshape(columns, self.weight_words, fused.macs)
        return pack_fields(parts, fused.weight_bits)

    def channels(self) -> list[list[list[int | None]]]:
        """Returns which output channel each lane makes: [column][pass · n_folds + fold][lane], None beyond the last."""
        fused, columns = self.mode, self.config.columns
        size = self.config.tile(fused)[1]
        table = []
        for column in range(columns):
            folds: list[list[int | None]] = []
            for turn in range(self.passes):
                for fold in range(self.n_folds):
                    numbers = [fold * size + column * fused.lanes + lane for lane in range(fused.lanes)]
                    folds.append([turn * self.n + n if n < self.n else None for n in numbers])
            table.append(folds)
        return table

    @cached_property
    def sums(self) -> Integers:
        """The partial sums that the hardware must arrive at: (passes, M, N), in units of the datapath."""
        fused = self.mode
        left = scaled(self.activation_format, fused.activation_bits)[self.activations]
        right = np.empty(self.weights.shape, dtype=np.int64)
        for channel, fmt in enumerate(self.weight_formats):
            turn, n = divmod(channel, self.n)
            right[turn, :, n] = scaled(fmt, fused.weight_bits)[self.weights[turn, :, n]]
        return left @ right

    @cached_property
    def outputs(self) -> NDArray[np.uint8]:
        """The codes that the hardware must put out: (passes, M, N)."""
        codes = np.empty(self.sums.shape, dtype=np.uint8)
        for channel, requantizer in enumerate(self.requantizers):
            turn, n = divmod(channel, self.n)
            codes[turn, :, n] = encode(self.sums[turn, :, n], requantizer, self.output_format, self.relu)
        return codes

    @property
    def cycles(self) -> int:
        """Cycles from start to last output, by the formula of the simulator."""
        mapping = Mapping(self.m, self.passes, self.k_folds, self.n_folds, 1)
        return compute_cycles(mapping, self.mode, self.config, math.ceil(self.m / self.tile_rows))


def random_program(
    config: Config, shape: Sequence[int], formats: tuple[Format, Sequence[Format], Format], seed: int, **options: object
) -> Program:
    """Returns a layer of random codes whose outputs spread over the output format.

    Args:
        config: The accelerator.
        shape: (passes, M, K, N).
        formats: Of activations; of weights, repeated over the output channels; of outputs.
        seed: Of the random numbers.
        **options: ``relu`` and ``tile`` of the program.
    """
    passes, m, k, n = shape
    activation, weights, output = formats
    rng = np.random.default_rng(seed)
    channels = passes * n
    spread = tuple(weights[i % len(weights)] for i in range(channels))
    x = rng.integers(0, 1 << activation.bits, (passes, m, k))
    w = rng.integers(0, 1 << weights[0].bits, (passes, k, n))
    plain = Program(
        config, x, activation, w, spread, (Requantizer(0, 1, 0),) * channels, output, **options  # type: ignore[arg-type]
    )  # fmt: skip
    largest = np.abs(plain.sums).max(axis=1).reshape(-1) + 1
    top = float(np.abs(output.values).max())
    requantizers = tuple(
        Requantizer.of(float(rng.uniform(0.5, 1.5) * top / size) * (-1) ** i, int(rng.integers(-size, size) // 4))
        for i, size in enumerate(largest.tolist())
    )
    return Program(config, x, activation, w, spread, requantizers, output, **options)  # type: ignore[arg-type]
