"""The accelerator's parameters: one frozen object that the simulator computes with and the hardware is made from."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dybit.accelerator.datapath import CONTAINERS, FIELD_BITS, Mode, lane_bits, modes
from dybit.accelerator.energy import EnergyTable
from dybit.errors import DyBitError, check_keys
from dybit.safe_files import check_regular

SCHEDULES = ("jit", "scalesim")
FUSES = ("split", "together")


@dataclass(frozen=True)
class Config:
    """A weight-stationary systolic array with its memories.

    Args:
        rows: Rows of processing elements.
        columns: Columns of processing elements.
        activation_sram: Bytes of the double-buffered activation memory.
        weight_sram: Bytes of the double-buffered weight memory.
        sum_sram: Bytes of the memory for partial sums.
        dram_bytes_per_cycle: Bytes that DRAM moves in a cycle, both directions together.
        weight_port: Raw weight bits that a column takes in a cycle.
        frequency: Clock in hertz.
        narrowest: Narrowest container of the array: 2; 4 for processing elements without 2-bit lanes; 8 for elements
            that are not fused, where narrower codes save traffic only.
        reduction: Largest number of products summed into one output for which partial sums are exact.
        schedule: ``jit`` brings weights with the first activation; ``scalesim`` is SCALE-Sim's stall-free count.
        fuse: ``split`` gives narrow weights lanes of their own; ``together`` sums all lanes of a PE as BitFusion does.
        pack_depthwise: Whether groups of a convolution share the array block-diagonally.
        energy: Costs of events, or None. There are no defaults.

    Raises:
        DyBitError: A parameter is out of range, or a memory is too small for one tile.

    Example:
        >>> config = Config(rows=4, columns=4)
        >>> Config.from_toml(config.to_toml()) == config
        True
    """

    rows: int = 32
    columns: int = 32
    activation_sram: int = 256 * 1024
    weight_sram: int = 256 * 1024
    sum_sram: int = 256 * 1024
    dram_bytes_per_cycle: float = 32
    weight_port: int = 32
    frequency: float = 500e6
    narrowest: int = 2
    reduction: int = 8191
    schedule: str = "jit"
    fuse: str = "split"
    pack_depthwise: bool = True
    energy: EnergyTable | None = field(default=None)

    def __post_init__(self) -> None:
        """Checks every parameter, then whether one tile fits."""
        for name in ("rows", "columns", "activation_sram", "weight_sram", "sum_sram", "weight_port", "reduction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DyBitError(f"{name} must be a positive integer, not {value!r}")
        for name in ("dram_bytes_per_cycle", "frequency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise DyBitError(f"{name} must be a positive finite number, not {value!r}")
        for name, choices in (("schedule", SCHEDULES), ("fuse", FUSES), ("narrowest", CONTAINERS)):
            value = getattr(self, name)
            if value not in choices:
                raise DyBitError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        if not isinstance(self.pack_depthwise, bool):
            raise DyBitError(f"pack_depthwise must be true or false, not {self.pack_depthwise!r}")
        if self.energy is not None and not isinstance(self.energy, EnergyTable):
            raise DyBitError(f"energy must be an EnergyTable or None, not {self.energy!r}")
        self._check_memories()

    def _check_memories(self) -> None:
        """One tile of every operand must fit: half a double-buffered memory, or one row of partial sums."""
        weights = self.rows * self.columns * max(fused.weight_word for fused in modes(self.narrowest)) // 8
        smallest = {
            "activation_sram": (2 * self.rows * self._field_bytes, "two rows of activations"),
            "weight_sram": (2 * weights, "two tiles of weights"),
            "sum_sram": (math.ceil(self.columns * self.sum_word / 8), "one row of partial sums"),
        }
        for name, (need, what) in smallest.items():
            if getattr(self, name) < need:
                raise DyBitError(
                    f"{name} must hold {what}, {need} bytes for {self.rows} x {self.columns}, not {getattr(self, name)}"
                )

    @property
    def _field_bytes(self) -> int:
        """Activation bytes that a row takes in a cycle: lanes summed together take an activation each."""
        return 1 if self.fuse == "split" else FIELD_BITS // self.narrowest

    @property
    def sum_word(self) -> int:
        """Bits of one column's word of partial sums, all lanes."""
        return sum(lane_bits(self.reduction, self.narrowest))

    @property
    def sum_rows(self) -> int:
        """Rows of partial sums that the memory holds."""
        return self.sum_sram * 8 // (self.columns * self.sum_word)

    def tile(self, mode: Mode) -> tuple[int, int]:
        """Returns the K and N that the array covers in ``mode``."""
        if self.fuse == "split":
            return self.rows * mode.activations, self.columns * mode.lanes
        return self.rows * mode.macs, self.columns

    def to_toml(self) -> str:
        """Returns the parameters as TOML, the energy table last."""
        lines = [f"{f.name} = {_toml(getattr(self, f.name))}" for f in fields(self) if f.name != "energy"]
        if self.energy is not None:
            lines += ["", "[energy]", *(f"{name} = {cost!r}" for name, cost in self.energy.costs)]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Config:
        """Returns the parameters in a TOML document; those it leaves out keep their defaults.

        Raises:
            DyBitError: ``text`` is not TOML, a key is unknown (the message names the nearest), or a value is wrong.
        """
        try:
            document: dict[str, Any] = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise DyBitError(f"config is not TOML: {error}") from error
        check_keys("config", document, [f.name for f in fields(cls)])
        if "energy" in document:
            if not isinstance(document["energy"], dict):
                raise DyBitError(f"energy must be a table of costs, not {document['energy']!r}")
            document["energy"] = EnergyTable.of(document["energy"])
        return cls(**document)

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Returns the parameters in the TOML file at ``path``.

        Raises:
            DyBitError: The file cannot be read, or as :meth:`from_toml`.
        """
        try:
            text = check_regular(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DyBitError(f"config must be a readable TOML file, not {str(path)!r}: {error}") from error
        return cls.from_toml(text)


def _toml(value: object) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
