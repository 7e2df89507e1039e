"""Recurrent layers and cells written out, so that every product is a function call.

Torch's forward computes all steps in one operator, which cannot round the states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dybit.errors import DyBitError
from dybit.layers.kinds import RECURRENT
from dybit.layers.quantized_weight import plain_values
from dybit.operators.recurrent import step_of

#: Multiplies rows by the transposed weight of the first name and adds the bias of the second, if any.
Multiply = Callable[[Tensor, str, str], Tensor]
#: Computes all steps from the products with the inputs, the sequences at each step, the states, the names of the weight
#: and the bias of the states, and whether the last step is the first. None if it cannot.
Steps = Callable[[Tensor, Sequence[int], Sequence[Tensor], str, str, bool], tuple[Tensor, list[Tensor]] | None]
#: As :data:`Steps`, for products (steps, sequences, gates · size) of which all sequences have all steps.
Whole = Callable[[Tensor, Sequence[Tensor], str, str, bool], tuple[Tensor, list[Tensor]]]
_HELD = threading.local()


def recur(
    module: nn.RNNBase,
    input: Any,  # noqa: ANN401
    hx: Any = None,  # noqa: ANN401
    *,
    multiply: Multiply,
    steps: Steps | None = None,
    whole: Whole | None = None,
) -> tuple[Any, Any]:
    """Computes the forward of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.

    Args:
        module: The layer; its weights are not read.
        input: As the layer takes it: (steps, batch, features), batch first, without a batch, or a ``PackedSequence``.
        hx: The first states, as the layer takes them.
        multiply: Called for every product.
        steps: Called for every direction of every layer, unless outputs are projected; or None.
        whole: Called in place of ``steps``, if sequences are not packed: the number of steps may be symbolic; or None.

    Returns:
        As the layer's forward: outputs and last states.

    Raises:
        DyBitError: ``input`` or ``hx`` has the wrong type or number of dimensions.
    """
    packed = isinstance(input, PackedSequence)
    whole = None if packed or module.proj_size else whole
    if not packed and input.dim() not in (2, 3):
        raise DyBitError(f"input must have 2 or 3 dimensions, not shape {tuple(input.shape)}")
    alone = not packed and input.dim() == 2
    if packed:
        data, sizes = input.data, input.batch_sizes.tolist()
    else:
        data = input.unsqueeze(1) if alone else input.transpose(0, 1) if module.batch_first else input
        sizes = [data.shape[1]]
        if whole is None:
            data, sizes = data.flatten(0, 1), sizes * data.shape[0]
    if not sizes or data.shape[0] == 0 < sizes[0]:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    directions = 2 if module.bidirectional else 1
    states = _first_states(module, hx, sizes[0], data, alone)
    if packed and hx is not None and input.sorted_indices is not None:
        states = [state.index_select(1, input.sorted_indices) for state in states]
    last: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        parts = []
        for direction in range(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            mine = [state[layer * directions + direction] for state in states]
            if whole is None:
                part, final = _pass(module, data, sizes, mine, suffix, multiply, steps)
            else:
                rows = multiply(data, f"weight_ih_{suffix}", f"bias_ih_{suffix}")
                part, final = whole(rows, mine, f"weight_hh_{suffix}", f"bias_hh_{suffix}", bool(direction))
            parts.append(part)
            last.append(final)
        data = torch.cat(parts, dim=-1)
        if layer + 1 < module.num_layers:
            data = nn.functional.dropout(data, module.dropout, module.training)
    finals = [torch.stack(parts) for parts in zip(*last, strict=True)]
    output: Any
    if packed:
        if input.unsorted_indices is not None:
            finals = [state.index_select(1, input.unsorted_indices) for state in finals]
        output = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    else:
        output = data.unflatten(0, (len(sizes), sizes[0])) if whole is None else data
        output = output.squeeze(1) if alone else output.transpose(0, 1) if module.batch_first else output
        finals = [state.squeeze(1) for state in finals] if alone else finals
    return output, tuple(finals) if len(finals) > 1 else finals[0]


def recur_once(
    module: nn.RNNCellBase,
    input: Tensor,
    hx: Any = None,  # noqa: ANN401
    *,
    multiply: Multiply,
    steps: Steps | None = None,
) -> Any:  # noqa: ANN401
    """Computes the forward of ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``; see :func:`recur`.

    Raises:
        DyBitError: ``hx`` has the wrong type or shape.
    """
    alone = input.dim() == 1
    x = input.unsqueeze(0) if alone else input
    count = 2 if isinstance(module, nn.LSTMCell) else 1
    given = [] if hx is None else _given(hx, count)
    wanted = (*input.shape[:-1], module.hidden_size)
    for state in given:  # torch would broadcast them
        if tuple(state.shape) != wanted:
            raise DyBitError(f"hx must have shape {wanted}, not {tuple(state.shape)}")
    states = [state.unsqueeze(0) if alone else state for state in given]
    states = states or [x.new_zeros(x.shape[0], module.hidden_size)] * count
    rows = multiply(x, "weight_ih", "bias_ih")
    done = steps(rows, [x.shape[0]], states, "weight_hh", "bias_hh", False) if steps and x.shape[0] else None
    step = step_of(cell_mode(module), lambda h: multiply(h, "weight_hh", "bias_hh"), None)
    found = step(rows, states) if done is None else done[1]
    found = [state.squeeze(0) for state in found] if alone else found
    return tuple(found) if count > 1 else found[0]


def _first_states(module: nn.RNNBase, hx: Any, batch: int, like: Tensor, alone: bool) -> list[Tensor]:  # noqa: ANN401
    """Returns the states before the first step: each (layers · directions, batch, size)."""
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    count = module.num_layers * (2 if module.bidirectional else 1)
    if hx is None:
        return [like.new_zeros(count, batch, size) for size in sizes]
    given = _given(hx, len(sizes))
    states = [state.unsqueeze(1) if alone else state for state in given]
    for state, size in zip(states, sizes, strict=True):
        module.check_hidden_size(state, (count, batch, size))
    return states


def _given(hx: Any, count: int) -> list[Tensor]:  # noqa: ANN401
    """Returns the states of ``hx``: a tensor, or two of them for an LSTM."""
    if (count == 1) != isinstance(hx, Tensor) or (count > 1 and len(hx) != count):
        raise DyBitError(f"hx must be {'a tensor' if count == 1 else 'two tensors'}, not {type(hx).__name__}")
    return [hx] if count == 1 else list(hx)


def _pass(
    module: nn.RNNBase,
    data: Tensor,
    sizes: Sequence[int],
    states: list[Tensor],
    suffix: str,
    multiply: Multiply,
    steps: Steps | None,
) -> tuple[Tensor, list[Tensor]]:
    """Computes one direction of one layer over rows (sum of sizes, features), ``sizes`` of them at every step.

    The state of a sequence stays unchanged after its end; in the reverse direction, before its start.
    """
    projected = (lambda h: multiply(h, f"weight_hr_{suffix}", "")) if module.proj_size else None
    step = step_of(module.mode, lambda h: multiply(h, f"weight_hh_{suffix}", f"bias_hh_{suffix}"), projected)
    rows = multiply(data, f"weight_ih_{suffix}", f"bias_ih_{suffix}")
    backwards = suffix.endswith("_reverse")
    if projected is None and steps is not None:
        found = steps(rows, sizes, states, f"weight_hh_{suffix}", f"bias_hh_{suffix}", backwards)
        if found is not None:
            return found
    starts = [0, *accumulate(sizes)]
    order = range(len(sizes))
    outputs: dict[int, Tensor] = {}
    for place in reversed(order) if backwards else order:
        count = sizes[place]
        new = step(rows[starts[place] : starts[place] + count], [state[:count] for state in states])
        states = [
            one if count == old.shape[0] else torch.cat([one, old[count:]])
            for one, old in zip(new, states, strict=True)
        ]
        outputs[place] = new[0]
    return torch.cat([outputs[place] for place in order]), states


def cell_mode(cell: nn.Module) -> str:
    """Returns the mode of a layer, or of the layer that corresponds to a cell."""
    if isinstance(cell, nn.RNNBase):
        return cell.mode
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def is_plain(cls: type[nn.Module]) -> bool:
    """Whether a class is a recurrent layer or cell with torch's own forward."""
    return cls.forward in [kind.forward for kind in RECURRENT]


class MadeWeights:
    """Mixin of recurrent layers whose weights are computed at every read and not kept in torch's list of weights."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        held = getattr(_HELD, "weights", None)
        return held[1] if held is not None and held[0] is self else self._made_weights()

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """Torch sets the list when parameters change."""

    @property
    def _flat_weights_names(self) -> list[str]:
        return []  # torch would update its list with every assignment

    @_flat_weights_names.setter
    def _flat_weights_names(self, value: object) -> None:
        """Torch sets the names when a module is unpickled."""

    @property
    def _flat_weight_refs(self) -> list[Any]:
        return []

    @_flat_weight_refs.setter
    def _flat_weight_refs(self, value: object) -> None:
        """As above."""

    def flatten_parameters(self) -> None:
        """Does nothing: there are no parameters to flatten."""

    def _made_weights(self) -> list[Tensor]:
        """Returns the weights and biases in torch's order; empty for cells, which have no such list."""
        return [getattr(self, name) for names in getattr(self, "_all_weights", ()) for name in names]

    @contextmanager
    def holding_weights(self) -> Iterator[None]:
        """Computes the weights once for all reads within the body: torch's forward reads them several times."""
        if torch.compiler.is_compiling():
            yield
            return
        before = getattr(_HELD, "weights", None)
        with plain_values():
            _HELD.weights = self, self._made_weights()
        try:
            yield
        finally:
            _HELD.weights = before


def forget_weights_(module: nn.Module) -> None:
    """Removes torch's list of weights from a recurrent layer, which would keep them in memory."""
    for name in ("_flat_weights", "_flat_weight_refs"):
        module.__dict__.pop(name, None)


def list_weights_(module: nn.Module) -> None:
    """Restores torch's list of the weights of a recurrent layer."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
