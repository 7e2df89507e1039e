"""Tracing: runs a torch model once and records its matrix products and convolutions as a workload."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.models.running import evaluating, without_fast_path
from dybit.workloads.workload import Conv, Gemm, Layer, Pair, Workload


def trace(model: nn.Module, *inputs: object, name: str | None = None, **named_inputs: object) -> Workload:
    """Runs ``model`` once and returns its products as a workload.

    It records products at the level of torch's operators: ``nn.Linear``, every convolution, transformers' ``Conv1D``,
    functional calls, attention, recurrent layers step by step, and experts. A product with a learned operand gets the
    name of the module that owns it, a product of two activations the name of the module that runs it. A second use of
    a name gets ``#2``.

    Args:
        model: The model. It runs in evaluation mode without gradients; its mode is restored.
        *inputs: Positional inputs, as for calling the model.
        name: Name of the workload; the model's class by default.
        **named_inputs: Named inputs.

    Raises:
        DyBitError: The model has no product, is quantized, or multiplies in an operator that cannot be recorded.

    Example:
        >>> work = trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 8, 8))
        >>> [(layer.name, layer.m, layer.k, layer.n) for layer in work]
        [('0', 64, 27, 8)]
    """
    if quantized_layers(model):
        raise DyBitError("model is quantized: trace it in floating point, and give the widths to the simulator")
    recorder = _Recorder(model)
    with (
        evaluating(model),
        without_fast_path(),
        sdpa_kernel(SDPBackend.MATH),
        _without_mkldnn(),
        recorder.following(),
        recorder,
    ):
        model(*inputs, **named_inputs)
    label = name or type(model).__name__
    if not recorder.layers:
        raise DyBitError(f"model {label!r} multiplies nothing that could run on an accelerator")
    learned = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(layer.parameters for layer in recorder.layers if "#" not in layer.name)
    return Workload(label, tuple(recorder.layers), max(learned - inside, 0))


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Switches off oneDNN, which computes a whole LSTM in one operator."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


_GROUPED = ("_grouped_mm", "grouped_mm_fallback")  # of torch and of transformers
# Other operators of torch that multiply a weight.
_HIDING = (
    "dot",
    "addbmm",
    "_int_mm",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "mkldnn_rnn_layer",
    "_cudnn_rnn",
    "miopen_rnn",
)


class _Recorder(TorchDispatchMode):
    """Turns operators into layers while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.layers: list[Layer] = []
        self._uses: dict[str, int] = {}
        self._running = [""]
        # Views of a parameter share its storage, so a transposed or reshaped weight is still recognised.
        self._owners = {
            parameter.untyped_storage()._cdata: path.rpartition(".")[0] or path
            for path, parameter in model.named_parameters()
        }

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keeps track of which module runs."""

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: self._running.append(path)

        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(lambda *_: self._running.pop() and None))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Records products and convolutions, and runs every operator as it is."""
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution:
            self._convolution(*args[:9])
        elif packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self._product(args[0], args[1], None)
        elif packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
            self._product(args[1], args[2], args[0])
        elif packet in (torch.ops.aten.mv, torch.ops.aten.addmv):
            matrix, vector = args[-2:]
            self._product(vector[None], matrix.t(), args[0] if len(args) > 2 else None)
        elif packet is torch.ops.aten._trilinear:  # nn.Bilinear: every output from all products of two inputs
            weight = args[1].flatten(1)
            self._product(args[0].new_empty(args[0].shape[0], weight.shape[1]), weight.t(), None)
        elif packet.__name__ in _GROUPED:
            self._groups(args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"])
        elif func.namespace not in ("aten", "prims", "prim") or packet.__name__ in _HIDING:
            self._refuse(packet, args)
        return func(*args, **(kwargs or {}))

    def _refuse(self, packet: Any, args: Any) -> None:  # noqa: ANN401
        """Refuses an operator that may multiply a weight without being recorded."""
        tensors = [x for part in args for x in (part if isinstance(part, list | tuple) else (part,))]
        owners = [owner for x in tensors if isinstance(x, Tensor) and (owner := self._owner(x)) is not None]
        if owners or packet.__name__ in _HIDING:
            where = owners[0] if owners else self._running[-1]
            raise DyBitError(f"module {where!r} multiplies in the operator {str(packet)!r}, which cannot be counted")

    def _groups(self, rows: Tensor, weights: Tensor, ends: Tensor) -> None:
        """Records a product of sorted rows (n, k) by the matrices (experts, k, n) of their experts."""
        start = 0
        for number, end in enumerate(ends.tolist()):
            self._product(rows[start:end], weights[number], None)
            start = end

    def _owner(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None else self._owners.get(tensor.untyped_storage()._cdata)

    def _unique(self, name: str) -> str:
        self._uses[name] = uses = self._uses.get(name, 0) + 1
        return name if uses == 1 else f"{name}#{uses}"

    def _product(self, left: Tensor, right: Tensor, added: Tensor | None) -> None:
        """Records a product (..., m, k) × (..., k, n) of matrices or batches of matrices."""
        owner, flipped = self._owner(right), False
        if owner is None and self._owner(left) is not None:  # the weight is the left operand: W·x = (xᵀ·Wᵀ)ᵀ
            owner, flipped = self._owner(left), True
        groups = left.shape[0] if left.ndim == 3 else 1
        m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
        if flipped:
            m, n = n, m
        if min(m, k, n, groups) < 1:
            return
        dynamic = owner is None
        name = self._unique(owner or f"{self._running[-1]}.product".lstrip("."))
        bias = not dynamic and self._owner(added) is not None
        self.layers.append(Gemm(name, m, k, n, groups, bias, dynamic))

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
    ) -> None:  # fmt: skip
        """Records a convolution (batch, channels, ...). 3-D and transposed convolutions are recorded as products."""
        owner = self._owner(weight) or f"{self._running[-1]}.convolution".lstrip(".")
        name, taps = self._unique(owner), math.prod(weight.shape[2:])
        axes, learned_bias = weight.ndim - 2, bias is not None
        if transposed:  # every input position contributes to a kernel of outputs
            m = x.shape[0] * math.prod(x.shape[2:])
            self.layers.append(Gemm(name, m, weight.shape[0] // groups, weight.shape[1] * taps, groups))
            return
        sizes = [tuple(v) if len(v) == axes else tuple(v) * axes for v in (x.shape[2:], stride, padding, dilation)]
        if axes > 2:
            positions = [
                (size + 2 * pad - step * (taps_ - 1) - 1) // by + 1
                for size, by, pad, step, taps_ in zip(*sizes, weight.shape[2:], strict=True)
            ]
            m = x.shape[0] * math.prod(positions)
            self.layers.append(Gemm(name, m, weight.shape[1] * taps, weight.shape[0] // groups, groups, learned_bias))
            return
        fill = ((1,), (1,), (0,), (1,))
        size, by, pad, step = (_pair(lead + v) for lead, v in zip(fill, sizes, strict=True))
        kernel = _pair((1, *weight.shape[2:]))
        self.layers.append(
            Conv(name, x.shape[1], weight.shape[0], size, kernel, by, pad, step, groups, x.shape[0], learned_bias)
        )


def _pair(numbers: tuple[int, ...]) -> Pair:
    """Returns the last two numbers: those of a two-dimensional convolution, without leading ones."""
    return numbers[-2], numbers[-1]
