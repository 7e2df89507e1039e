"""Recurrent layers by their definition, in NumPy and step by step, with inputs and states rounded or not."""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Sequence(nn.Module):
    """A recurrent layer that returns its outputs only; packed sequences of two lengths on demand."""

    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.layer, self.packed = kind(6, 7, **options), packed

    def forward(self, x):
        if not self.packed:
            return self.layer(x)[0]
        lengths = torch.arange(x.shape[1]) % x.shape[0] + 1
        return self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data


class Cells(nn.Module):
    """One cell of each kind, over a few steps."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 7), nn.GRUCell(7, 6), nn.RNNCell(6, 5, nonlinearity="relu")

    def forward(self, x):
        state, g, r, found = None, None, None, []
        for step in x:
            state = self.lstm(step, state)
            g = self.gru(state[0], g)
            r = self.rnn(g, r)
            found.append(r)
        return torch.stack(found)


def reference(module, x, hx=None, round_input=lambda x: x):
    """What a layer or cell computes, given a function that rounds what its products multiply."""
    if isinstance(module, nn.RNNCellBase):
        states = [None if hx is None else hx] if not isinstance(hx, tuple) else list(hx)
        found = _cell(module, x.detach(), states, round_input)
        return tuple(found) if isinstance(module, nn.LSTMCell) else found[0]
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        outputs = torch.zeros(*padded.shape[:2], _width(module))
        for i, length in enumerate(lengths):
            outputs[:length, i] = _sequence(module, padded[:length, i], round_input)
        return pack_padded_sequence(outputs, lengths, enforce_sorted=False), None
    assert hx is None
    sequences = x.detach() if module.batch_first else x.detach().transpose(0, 1)
    outputs = torch.stack([_sequence(module, sequence, round_input) for sequence in sequences])
    return outputs if module.batch_first else outputs.transpose(0, 1), None


def _width(module):
    return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)


def _sequence(module, x, round_input):
    """(steps, features) to (steps, outputs)."""
    for layer in range(module.num_layers):
        sides = []
        for suffix in ("", "_reverse")[: 2 if module.bidirectional else 1]:

            def get(name, layer=layer, suffix=suffix):
                return getattr(module, f"{name}_l{layer}{suffix}", None)

            h, c = torch.zeros(module.proj_size or module.hidden_size), torch.zeros(module.hidden_size)
            outputs = []
            for step in x.flip(0) if suffix else x:
                h, c = _step(module.mode, get, step, h, c, round_input)
                outputs.append(h)
            sides.append(torch.stack(outputs).flip(0) if suffix else torch.stack(outputs))
        x = torch.cat(sides, dim=1)
    return x


def _cell(module, x, states, round_input):
    mode = {"LSTMCell": "LSTM", "GRUCell": "GRU"}.get(_name(module)) or f"RNN_{module.nonlinearity.upper()}"
    zeros = torch.zeros(x.shape[0], module.hidden_size)
    h, c = (*(zeros if state is None else state.detach() for state in states), zeros)[:2]
    rows = [
        _step(mode, lambda name: getattr(module, name, None), *row, round_input) for row in zip(x, h, c, strict=True)
    ]
    return [torch.stack(part) for part in zip(*rows, strict=True)][: 2 if mode == "LSTM" else 1]


def _name(module):
    return next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn"))


def _step(mode, get, x, h, c, round_input):
    def product(value, name, bias):
        y = nn.functional.linear(round_input(value[None]), get(name).detach())[0]
        return y if get(bias) is None else y + get(bias).detach()

    a, b = product(x, "weight_ih", "bias_ih"), product(h, "weight_hh", "bias_hh")
    if mode == "LSTM":
        i, f, g, o = np.split((a + b).numpy(), 4)
        c = torch.from_numpy(_sigmoid(f) * c.numpy() + _sigmoid(i) * np.tanh(g))
        h = torch.from_numpy(_sigmoid(o) * np.tanh(c.numpy()))
        return (h if get("weight_hr") is None else product(h, "weight_hr", "bias_hr")), c
    if mode == "GRU":
        (ra, za, na), (rb, zb, nb) = np.split(a.numpy(), 3), np.split(b.numpy(), 3)
        new, update = np.tanh(na + _sigmoid(ra + rb) * nb), _sigmoid(za + zb)
        return torch.from_numpy((1 - update) * new + update * h.numpy()), c
    return (torch.relu(a + b) if mode == "RNN_RELU" else torch.tanh(a + b)), c


def _sigmoid(x):
    return (1 / (1 + np.exp(-x))).astype(x.dtype)
