"""Loads a checkpoint, ready to run."""

from __future__ import annotations

import os

from torch import nn

from dybit.models import checkpoint
from dybit.runtime.fuse import Example, fuse


def load(path: str | os.PathLike[str], model: nn.Module, *, fused: bool | Example = False) -> nn.Module:
    """Loads a checkpoint into a fresh floating-point model of the same architecture, in place.

    Needs no calibration data. The outputs are those of the saved model, bit for bit.

    Args:
        path: The directory that :func:`dybit.save` wrote.
        model: The model. Its values do not matter. It is not changed if the checkpoint does not fit.
        fused: An example of the inputs, to fuse the model with (:func:`dybit.fuse`); True to fuse it without one.

    Returns:
        The same model, in evaluation mode, or the fused one.

    Raises:
        CheckpointError: The directory is missing, truncated, not written by dybit, of another version, or does not fit
            the model.
        DyBitError: The model is already quantized, or cannot be fused.
    """
    loaded = checkpoint.load(path, model)
    if isinstance(fused, bool):
        return fuse(loaded) if fused else loaded
    return fuse(loaded, fused)
