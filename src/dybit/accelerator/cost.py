"""The accelerator as a cost for the search: cycles of a layer by its shape and widths.

It has the form of ``ShapeCost`` without importing it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dybit.accelerator.config import Config
from dybit.accelerator.simulate import Bits, layer_cost
from dybit.workloads.workload import Layer


@dataclass(frozen=True)
class AcceleratorCost:
    """Cycles on the accelerator, by the simulator; speedups are over 8-bit weights and activations on the same array.

    Layers in floating point cannot run on it. Attention products that no candidate is for run at 8 bits.

    Args:
        config: The accelerator.

    Example:
        >>> from dybit.workloads.networks import network
        >>> AcceleratorCost().shape(network("resnet18").layers[0], 4, 4)["bound"]
        'compute'
    """

    config: Config = field(default_factory=Config)

    name = "accelerator"
    unit = "cycles"
    base: Bits = (8, 8)
    base_name = "8/8 bits on the same array"

    @property
    def per_second(self) -> float:
        """Cycles in a second."""
        return self.config.frequency

    def shape(self, layer: Layer, weights: int, activations: int) -> dict[str, Any]:
        """Returns what a layer costs: ``cost`` in cycles, and what the cycles are made of.

        Args:
            layer: The layer's shape.
            weights: Bits of a weight code.
            activations: Bits of an activation code.
        """
        cost = layer_cost(layer, (weights, activations), self.config)
        return {
            "cost": cost.cycles,
            "bound": cost.bound,
            "compute_cycles": cost.compute_cycles,
            "memory_cycles": cost.memory_cycles,
            "traffic_bytes": cost.traffic.total,
            "utilization": round(cost.utilization, 6),
        }
