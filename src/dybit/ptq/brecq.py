"""BRECQ: learns the rounding of all layers of a block together, by the error of the block's output.

Blocks are what repeats in a model: the children of its lists and sequences that hold several quantized layers, such as
residual blocks and transformer layers. Layers outside of blocks are rounded one by one, as in AdaRound. Must not know
how scales were chosen first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.fidelity import output_tensor
from dybit.layers import Quantized
from dybit.ptq.learning import learn_
from dybit.ptq.lockstep import Call, Progress, correctable, walk
from dybit.ptq.reconstruct import round_layer_

_STEPS = 200
_SEED = 0x0DB17


def brecq_(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> nn.Module:
    """Learns, block by block, which of its two neighbouring codes every weight takes, with gains and biases.

    Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021. Choices are
    learned with the straight-through estimator from where they are: run ``adaround_`` first. A block whose output did
    not come closer to the reference's is left as it was.

    Args:
        model: A quantized model, changed in place.
        reference: The same model in floating point, batch norms folded as in ``model``.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
            A step of learning takes one of them.
        progress: Called with (done, total, text) before every block or layer and after the last.

    Returns:
        The same model.

    Raises:
        DyBitError: There is no batch, one does not fit, an output is not finite, or the models do not match.
    """
    layers = correctable(model, reference)
    blocks = find_blocks(model, layers)
    inside = {name for names in blocks.values() for name in names}
    generator = torch.Generator().manual_seed(_SEED)

    def visit(name: str, calls: list[Call], originals: list[Call]) -> None:
        original = reference.get_submodule(name)
        if name not in blocks:
            round_layer_(name, layers[name], original, calls, originals, generator)
            return
        targets = [output_tensor(original.forward(*call.args, **call.kwargs)).float() for call in originals]
        parts = {part: (layers[part], reference.get_submodule(part)) for part in blocks[name]}
        _learn(name, model.get_submodule(name), parts, calls, targets, generator)

    walk(model, reference, [*blocks, *(name for name in layers if name not in inside)], batches, visit, progress)
    return model


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Finds the blocks of a model: the innermost children of lists and sequences that hold several of some layers.

    Args:
        model: The model.
        names: The qualified names of the layers.

    Returns:
        The layers of every block by its name.
    """
    known = list(names)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for child, _ in module.named_children():
                path = f"{name}.{child}" if name else child
                inside = [layer for layer in known if layer.startswith(f"{path}.")]
                if len(inside) > 1:
                    found[path] = inside
    return {path: inside for path, inside in found.items() if not any(o.startswith(f"{path}.") for o in found)}


def _learn(
    name: str,
    block: nn.Module,
    parts: Mapping[str, tuple[Quantized, nn.Module]],
    calls: list[Call],
    targets: list[Tensor],
    generator: torch.Generator,
) -> None:
    """Learns the rounding of one block."""
    power = sum(float((target - target.mean()).square().mean()) for target in targets) / len(targets)
    before = _error(block, calls, targets)
    if not before < float("inf"):
        raise DyBitError(f"calibration gives block {name!r} outputs with NaN or infinity")
    if not power or not before:
        return

    def loss(index: int) -> Tensor:
        output = output_tensor(block.forward(*calls[index].args, **calls[index].kwargs))
        return (output.float() - targets[index]).square().mean() / power

    def error() -> float:
        return _error(block, calls, targets)

    learn_(parts.values(), loss, len(calls), error, steps=_STEPS, generator=generator)


def _error(block: nn.Module, calls: list[Call], targets: list[Tensor]) -> float:
    """The mean squared error of a block's outputs."""
    outputs = (output_tensor(block.forward(*call.args, **call.kwargs)).float() for call in calls)
    return sum(float((y - target).square().mean()) for y, target in zip(outputs, targets, strict=True)) / len(calls)
