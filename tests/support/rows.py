"""FP32 rows for the functions of the extension: addresses, strides, and the same on every instruction set."""

import numpy as np
import torch

from dybit.kernels import extension
from kernels import ISAS


def place(tensor):
    """The address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def at(tensor):
    """The address of a tensor and the stride of its rows."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def strided(rng, rows, columns, spare=0, size=1.0):
    """Random rows with unused numbers between them."""
    whole = rng.standard_normal((rows, columns + spare)) * size
    return torch.from_numpy(whole.astype(np.float32))[:, :columns]


def on_all(call):
    """The results of a function on every instruction set: arrays, which must be the same bits."""
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append([np.asarray(result) for result in call(extension.load())])
    for isa, found in zip(ISAS, results, strict=True):
        for a, b in zip(found, results[0], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=isa)
    return results[0]
