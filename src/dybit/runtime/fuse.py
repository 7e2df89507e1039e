"""Fuses a quantized model for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.kernels import extension
from dybit.layers.quantized import is_fused
from dybit.runtime.capture import CaptureError
from dybit.runtime.image_fusion import fuse_layers
from dybit.runtime.program import FusedProgram

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

#: Fuse models of other libraries without an example; they return None for a model that they do not know.
fusers: list[Callable[[nn.Module], nn.Module | None]] = []


def fuse(model: nn.Module, example: Example | None = None) -> nn.Module:
    """Fuses a quantized model for inference.

    With an example, the model runs as one program of kernels on planned memory. ``torch.export`` captures it, which
    takes seconds. Convolutions and linear layers take up what follows them (addition, activation, clamp, rounding for
    the next layer), norms round their results once for all layers that use them, and attention runs in one pass.
    Operators that have no kernel are left to torch. ``report()`` of the result lists them with their share of the time.

    Convolutions with static inputs give the bits that they give in the model. Pooling, norms, attention and activations
    differ from torch's in the last bits, as torch's own do between machines and memory formats; a rounded value may
    then fall on the next code.

    A language model of transformers needs no example: one call of the kernels computes all layers, and ``generate``
    works as before (:data:`dybit.runtime.decoder.FAMILIES`). Logits differ from the model's by the order of sums.

    Without an example, or if the model cannot be captured, each layer of other models takes up what follows it
    (:func:`dybit.runtime.image_fusion.fuse_layers`), and the rest stays as it is.

    Args:
        model: A model after :func:`dybit.quantize_`, in evaluation mode. It is not changed; layers are shared with it.
        example: Inputs such as the model gets: a tensor, a tuple of positional arguments, or a mapping of arguments by
            name. Other sizes may follow. Sizes of 0 and 1 are captured on their own, when they first appear.

    Returns:
        A model with the signature of ``model``: a :class:`dybit.runtime.program.FusedProgram`, a decoder of the same
        class as ``model``, or as
        :func:`dybit.runtime.image_fusion.fuse_layers` returns it. It cannot be saved with :func:`dybit.save`; save
        ``model``.

    Raises:
        DyBitError: ``model`` is already fused, or ``example`` is of another type or does not fit the model's signature,
            or, without an example, ``torch.fx`` cannot trace it.

    Example:
        >>> fused = dybit.fuse(dybit.quantize_(model, recipe, calibration=batches), batches[0])  # doctest: +SKIP
    """
    if is_fused(model):
        raise DyBitError("model is already fused")
    if example is None:
        return next((found for fuser in fusers if (found := fuser(model)) is not None), None) or fuse_layers(model)
    args, kwargs = _arguments(example)
    if extension.load() is None:
        return fuse_layers(model)  # there are no kernels to run a program of
    try:
        return FusedProgram(model, args, kwargs)
    except CaptureError as error:
        warnings.warn(
            f"the model is fused layer by layer, since it cannot be captured: {error}", DyBitWarning, stacklevel=2
        )
        return fuse_layers(model)
    except TypeError as error:
        raise DyBitError(f"example does not fit the model: {error}") from error


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional arguments and arguments by name."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), {str(name): value for name, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise DyBitError(f"example must be a tensor, a tuple or a mapping, not {type(example).__name__}")
