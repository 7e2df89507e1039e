"""Quantization-aware training: models whose weights and inputs are rounded as they train, with scales that learn.

Must not know files, optimizers or training loops.
"""

from dybit.qat.layers import Prepared, prepared_layers
from dybit.qat.model import convert_, distillation_loss, prepare_qat_

__all__ = ["Prepared", "convert_", "distillation_loss", "prepare_qat_", "prepared_layers"]
