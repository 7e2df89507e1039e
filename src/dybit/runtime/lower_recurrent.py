"""Rules for recurrent layers: all steps of a direction are one step of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.operators.dispatch import read_spec
from dybit.operators.input_rounding import InputRounding
from dybit.operators.linear import packed_for
from dybit.operators.packed_weight import Product
from dybit.operators.recurrent import CELLS
from dybit.runtime.lowering import Lowering, Place
from dybit.tensors.quantized_tensor import QuantizedTensor


class RecurrentRules:
    """Lowers recurrent layers.

    Args:
        lowering: The lowering.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self.rules: dict[Any, Callable[[fx.Node], bool]] = {torch.ops.dybit.recurrent.default: self._recurrent}

    def _recurrent(self, node: fx.Node) -> bool:
        low = self._lowering
        args: tuple[Any, ...] = node.args
        x, h, c, *state, spec, cell, name, reach, group_size, reverse = args
        given = [low.values[part] for part in (x, h, c) if part is not None]
        if not all(like.dtype == torch.float32 and like.is_contiguous() and like.numel() for like in given):
            return False
        weight, scale, choice, tensor_scale, bias = (low.tensor(part) for part in state)
        stored = QuantizedTensor(read_spec(str(spec)), cast(Tensor, weight), cast(Tensor, scale), choice, tensor_scale)
        rounding = InputRounding(str(name), reach=float(reach), group_size=int(group_size))
        packed = packed_for(stored, rounding)
        steps, count = given[0].shape[:2]
        if packed is None or count > packed.most_rows:
            return False
        own = None if bias is None else bias.detach().float().contiguous()
        product = Product(packed, own, rounding)
        low.kept.append((packed, product, stored))
        results = [next((user for user in node.users if user.args[1] == i), None) for i in range(3 - (c is None))]
        low.take(user for user in results if user is not None)
        y, *last = [None if user is None else low.own(user) for user in results]
        sources = [None if part is None else low.view(part) for part in (x, h, c)]
        _, given_bias, given_scale, given_offset, factor = product.given

        def emit(program: Any, at: Place) -> None:  # noqa: ANN401
            scaled = (-1, given_scale), (-1, given_offset), factor
            first, final = [at(view) for view in sources[1:]], [at(view) for view in [*last, None][:2]]
            whole = packed.compiled, (-1, given_bias), scaled, steps, count, bool(reverse)
            program.recur(CELLS.index(str(cell)), *whole, at(sources[0]), first, final, at(y))

        low.add("recurrent", node, sources, [view for view in (y, *last) if view is not None], emit)
        return True
