"""Energy as a sum over events: how often things happen, times what the user says each costs.

There are no costs built in, since none were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dybit.accelerator.datapath import modes
from dybit.errors import DyBitError, check_keys

MEMORY_EVENTS = ("activation_sram_bit", "weight_sram_bit", "sum_sram_bit", "dram_bit")
EVENTS = tuple(f"mac_w{mode.weight_bits}a{mode.activation_bits}" for mode in modes()) + MEMORY_EVENTS


@dataclass(frozen=True)
class EnergyTable:
    """Costs of events in joules.

    Args:
        costs: Pairs of event and joules. The events are ``mac_w8a8`` … ``mac_w2a2`` (one multiply-accumulate in a
            mode) and one bit read or written in ``activation_sram_bit``, ``weight_sram_bit``, ``sum_sram_bit`` and
            ``dram_bit``.

    Raises:
        DyBitError: An event is unknown, or a cost is not a finite number of at least zero.
    """

    costs: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        """Checks the names and the costs."""
        check_keys("energy", dict(self.costs), EVENTS)
        for event, cost in self.costs:
            if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
                raise DyBitError(f"energy of {event} must be a finite number of at least 0 joules, not {cost!r}")

    @classmethod
    def of(cls, costs: Mapping[str, float]) -> EnergyTable:
        """Returns the table of a mapping from event to joules."""
        return cls(tuple(costs.items()))

    def total(self, counts: Mapping[str, int]) -> float:
        """Returns the joules of counted events.

        Raises:
            DyBitError: An event that happened has no cost.
        """
        costs = dict(self.costs)
        missing = [event for event, count in counts.items() if count and event not in costs]
        if missing:
            raise DyBitError(f"energy table has no cost for {missing[0]!r}, which happens {counts[missing[0]]} times")
        return sum(count * costs[event] for event, count in counts.items() if count)
