"""Rules for transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import read_spec
from dybit.operators.images import three
from dybit.operators.input_rounding import InputRounding
from dybit.operators.transposed_conv import PreparedTransposed
from dybit.runtime.layouts import is_last
from dybit.runtime.lowering import Lowering, Place
from dybit.tensors.quantized_tensor import QuantizedTensor


class TransposedRules:
    """Lowers transposed convolutions.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self.rules: dict[Any, Callable[[fx.Node], bool]] = {torch.ops.dybit.conv_transposed.default: self._transposed}

    def _transposed(self, node: fx.Node) -> bool:
        low = self._lowering
        args: tuple[Any, ...] = node.args
        x, *state, spec, _, stride, padding, dilation, groups, name, reach = args
        given, value = low.values[x], low.values[node]
        last = is_last(given) and is_last(value)
        if given.dtype != torch.float32 or not value.numel() or not given.numel():
            return False
        if not last and not (given.is_contiguous() and value.is_contiguous()):
            return False
        weight, scale, choice, tensor_scale, bias, input_scale, input_offset = (low.tensor(part) for part in state)
        stored = QuantizedTensor(read_spec(str(spec)), cast(Tensor, weight), cast(Tensor, scale), choice, tensor_scale)
        rounding = InputRounding(str(name), input_scale, input_offset, float(reach))
        prepared = PreparedTransposed(stored, bias, ConvGeometry.of(stride, padding, dilation, int(groups)), rounding)
        if prepared.compiled is None:
            return False
        low.kept.append((prepared, stored))
        view, y = low.view(x), low.own(node)
        size, places = three(given.shape[2:]), three(value.shape[2:])
        own, (given_scale, given_offset, factor) = prepared.given

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            scaled = (-1, given_scale), (-1, given_offset), factor
            whole = at(view), given.shape[0], size, at(y), places, (-1, own), scaled
            program.conv_transposed(prepared.compiled, *whole, not last)

        low.add("conv_transposed", node, [view], [y], emit)
        return True
