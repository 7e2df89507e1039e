"""The accelerator in numbers: its parameters and its cycle simulator."""

from dybit.accelerator.config import Config
from dybit.accelerator.energy import EnergyTable
from dybit.accelerator.simulate import Cost, LayerCost, layer_cost, simulate

__all__ = ["Config", "Cost", "EnergyTable", "LayerCost", "layer_cost", "simulate"]
