"""Packed weights of random codes, and memory for rounded inputs."""

import numpy as np
import torch

from dybit.formats import packing
from dybit.operators.input_rounding import input_format
from dybit.operators.packed_weight import PackedWeight
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec


def packed(rng, rows, columns, inputs="s8r1", group_size=None, input_group_size=0):
    spec = TensorSpec("dybit4", (rows, columns), "group" if group_size else "channel", group_size, "fp32")
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    codes = torch.from_numpy(packing.pack(codes, 4, group_size)).view(spec.packed_shape)
    scales = torch.from_numpy(rng.uniform(0.5, 2, spec.scale_shape).astype(np.float32))
    return PackedWeight(QuantizedTensor(spec, codes, scales, None), input_format(inputs), input_group_size)


def rounded_memory(weight, rows):
    """Memory for rounded rows, aligned to 64 bytes."""
    whole = torch.empty(weight.compiled.rounded_bytes(rows) + 64, dtype=torch.uint8)
    start = -whole.data_ptr() % 64
    return whole[start:]
