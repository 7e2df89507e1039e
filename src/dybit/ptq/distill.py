"""Learns the rounding of a whole model at once, by how far its outputs are from those of the original.

Must not know how scales and codes were chosen first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dybit.calibrate import run_batch
from dybit.errors import DyBitError
from dybit.fidelity import guess_kind, output_tensor
from dybit.ptq.learning import learn_
from dybit.ptq.lockstep import Progress, correctable

_STEPS = 400
_SEED = 0x0DB17


def distill_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    """Learns which of its two neighbouring codes every weight takes, with gains and biases, by the model's outputs.

    As block reconstruction (Li et al., "BRECQ", ICLR 2021) with the whole model as one block and, for logits, the
    Kullback-Leibler divergence of predictions (Hinton et al., 2015) in place of squared errors: errors that cancel in
    later layers cost nothing, and those that decide the prediction cost most. Run ``adaround_`` first, and give it many
    batches: nothing but data keeps it from fitting the calibration set. A model that does not come closer is
    left as it was.

    Args:
        model: A quantized model, changed in place; it must run with gradients.
        reference: The same model in floating point, batch norms folded as in ``model``.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments. A
            step of learning takes one of them; the outputs for all of them are in memory.
        progress: Called with (done, total, text) before every step and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: There is no batch, one does not fit, an output is not finite, or the models do not match.
    """
    data = list(batches)
    if not data:
        raise DyBitError("calibration yields no batch")
    layers = correctable(model, reference)
    training = [module for part in (model, reference) for module in part.modules() if module.training]
    model.eval()
    reference.eval()
    try:
        with torch.no_grad():
            raw = [run_batch(reference, batch, f"calibration batch {i}") for i, batch in enumerate(data)]
        targets = [output_tensor(output).float() for output in raw]
        if not all(bool(torch.isfinite(target).all()) for target in targets):
            raise DyBitError("calibration gives the original outputs with NaN or infinity")
        logits = guess_kind(targets[0], raw[0]) == "logits"
        power = sum(float((target - target.mean()).square().mean()) for target in targets) / len(targets)
        if not power:
            return model

        def loss(index: int) -> Tensor:
            output = output_tensor(run_batch(model, data[index], f"calibration batch {index}")).float()
            return _divergence(targets[index], output) if logits else (output - targets[index]).square().mean() / power

        def error() -> float:
            with torch.no_grad():
                return sum(float(loss(index)) for index in range(len(data))) / len(data)

        def step(done: int) -> None:
            if progress:
                progress(done, _STEPS, "distill")

        if not error() < float("inf"):
            raise DyBitError("calibration gives the quantized model outputs with NaN or infinity")
        parts = [(layer, reference.get_submodule(name)) for name, layer in layers.items()]
        generator = torch.Generator().manual_seed(_SEED)
        learn_(parts, loss, len(data), error, steps=_STEPS, generator=generator, progress=step)
        if progress:
            progress(_STEPS, _STEPS, "done")
    finally:
        for module in training:
            module.training = True
    return model


def _divergence(reference: Tensor, output: Tensor) -> Tensor:
    """Mean of KL(softmax(reference) ‖ softmax(output)) over all vectors, nats."""
    p, q = (x.reshape(-1, x.shape[-1]).log_softmax(-1) for x in (reference, output))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)
