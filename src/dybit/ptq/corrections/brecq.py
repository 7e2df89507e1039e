"""BRECQ: learns the rounding of all layers of a block together, by the error of the block's output.

Blocks are what repeats in a model: the children of its lists and sequences that hold several quantized layers, such as
residual blocks and transformer layers. Layers outside of blocks are rounded one by one, as in AdaRound.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.patched_forward import replaced_forwards
from dybit.layers.quantized import Quantized
from dybit.layers.swap import set_bias_
from dybit.models.running import Progress, output_tensor
from dybit.ptq.corrections.adaround import round_layer_, store_
from dybit.ptq.corrections.lockstep import Call, correctable, walk
from dybit.ptq.corrections.nearest_two import Candidates
from dybit.ptq.corrections.statistics import has_row_scales, stretch_

_STEPS = 200
_RATE = 0.003  # of choices, which go from 0 (down) to 1 (up)
_FINE_RATE = 0.001  # of gains and biases, relative to the spread of the outputs
_MARGIN = 0.1  # how far from a half a choice starts at least, so that it is not undone by the first steps
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
        targets = [output_tensor(call.repeat(original)).float() for call in originals]
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


class _Learner:
    """One layer while its rounding is learned: it runs as a floating-point layer whose weight is recomputed."""

    def __init__(self, layer: Quantized, original: nn.Module) -> None:
        self.layer = layer
        self.spec = layer.weight_specs["weight"]
        matrix = self.spec.to_matrix(original.get_parameter("weight").detach().float())
        self.candidates = Candidates.of(matrix, layer.quantized_tensor())
        self.up = self.candidates.now > self.candidates.other
        self.low = torch.minimum(self.candidates.now, self.candidates.other)
        self.span = (self.candidates.now - self.candidates.other).abs()
        share = self.candidates.share
        self.place = torch.where(self.up, share.clamp(min=0.5 + _MARGIN), share.clamp(max=0.5 - _MARGIN))
        self.gain = matrix.new_ones(self.spec.rows, 1)
        bias = layer._parameters.get("bias")
        self.bias = matrix.new_zeros(self.spec.rows) if bias is None else bias.detach().float().clone()
        self.stretching = has_row_scales(layer)
        self.proxy = copy.deepcopy(original).requires_grad_(False)
        for name in ("weight", "bias"):
            self.proxy._parameters.pop(name, None)

    def parameters(self) -> tuple[Tensor, list[Tensor]]:
        """The choices, and the finer parameters."""
        fine = [self.gain, self.bias] if self.stretching else [self.bias]
        for tensor in (self.place, *fine):
            tensor.requires_grad_()
        return self.place, fine

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the layer's own signature
        """Computes the layer, with gradients for the parameters."""
        # Rounded, with the gradient of what is rounded.
        choice = self.place + ((self.place >= 0.5).float() - self.place).detach()
        matrix = (self.low + choice * self.span) * self.candidates.scale * self.gain
        proxy: Any = self.proxy
        proxy.weight, proxy.bias = self.spec.from_matrix(matrix), self.bias
        args = tuple(self._round(x) if i == 0 else x for i, x in enumerate(args))
        return proxy(*args, **kwargs)

    def _round(self, x: Tensor) -> Tensor:
        """Rounds an input. Channels stay last if they are, which spares convolutions a third of their time."""
        spec = self.layer.input_spec
        if spec and spec.mode == "static" and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return self.layer.round_input(x.movedim(1, -1)).movedim(-1, 1)
        return self.layer.round_input(x)

    def store(self) -> None:
        """Gives the layer what was learned."""
        self.candidates.flip((self.place.detach() >= 0.5) != self.up)
        if self.stretching:
            stretch_(self.layer, self.gain.detach().flatten().double())
        store_(self.layer, self.candidates.now)
        set_bias_(self.layer, self.bias.detach())


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
    learners = [_Learner(*part) for part in parts.values()]
    laid = list(zip(calls, targets, strict=True))
    if all(isinstance(original, nn.Conv2d) for _, original in parts.values()):
        laid = [
            (Call(tuple(map(_channels_last, call.args)), call.kwargs), _channels_last(target)) for call, target in laid
        ]
    choices, fine = zip(*(learner.parameters() for learner in learners), strict=True)
    optimizer = torch.optim.Adam(
        [{"params": choices, "lr": _RATE}, {"params": [p for some in fine for p in some], "lr": _FINE_RATE}]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    with torch.enable_grad(), _learning(learners):
        for step in range(_STEPS):
            if step % len(calls) == 0:
                order = torch.randperm(len(calls), generator=generator, dtype=torch.int64, device="cpu").tolist()
            call, target = laid[order[step % len(calls)]]
            output = output_tensor(call.repeat(block))
            loss = (output.float() - target).square().mean() / power
            optimizer.zero_grad()
            loss.backward()
            with torch.device("cpu"):  # Adam counts its steps in a tensor on the default device
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                for choice in choices:
                    choice.clamp_(0, 1)
    kept = [(dict(layer._buffers), dict(layer._parameters), layer.added_bias) for layer, _ in parts.values()]
    for learner in learners:
        learner.store()
    if not _error(block, calls, targets) < before:
        for (layer, _), (buffers, parameters, added) in zip(parts.values(), kept, strict=True):
            layer._buffers.update(buffers)
            layer._parameters.update(parameters)
            layer.added_bias = added


def _channels_last(x: Any) -> Any:  # noqa: ANN401  # an argument of any kind
    """Lays a batch of pictures out as convolutions are fastest; returns anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def _error(block: nn.Module, calls: list[Call], targets: list[Tensor]) -> float:
    """The mean squared error of a block's outputs."""
    outputs = (output_tensor(call.repeat(block)).float() for call in calls)
    return sum(float((y - target).square().mean()) for y, target in zip(outputs, targets, strict=True)) / len(calls)


@contextmanager
def _learning(learners: list[_Learner]) -> Iterator[None]:
    """Lets the learners stand in for their layers."""
    with replaced_forwards({learner.layer: learner.forward for learner in learners}):
        yield
