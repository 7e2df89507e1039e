"""Recurrent layers in programs: one step for a direction, sequences of any length."""

import pytest
import torch
from programs import names
from torch import nn

from dybit import Recipe, quantize_
from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

pytestmark = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


class Tagger(nn.Module):
    def __init__(self, layer, gates):
        super().__init__()
        self.words, self.layer, self.out = nn.Embedding(50, 16), layer, nn.Linear(gates, 8)

    def forward(self, index, first=None):
        y, last = self.layer(self.words(index), first)
        return self.out(y), *(last if isinstance(last, tuple) else (last,))


LAYERS = {
    "lstm": (nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True), 48),
    "gru": (nn.GRU(16, 24), 24),
    "rnn": (nn.RNN(16, 24, nonlinearity="relu", bias=False, batch_first=True), 24),
    "grouped": (nn.LSTM(16, 32), 32),
}


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_any_length(name):
    layer, gates = LAYERS[name]
    index = torch.randint(0, 50, (3, 7))
    recipe = Recipe(weights=4, activations=8, activation_group_size=32 if name == "grouped" else None)
    model = quantize_(Tagger(layer, gates).eval(), recipe, calibration=[index])
    fused = FusedProgram(model, (index,), {})
    with torch.no_grad():
        for size in ((3, 7), (2, 5), (5, 40), (1, 1)):
            given = torch.randint(0, 50, size)
            for one, other in zip(fused(given), model(given), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    steps = names(fused, index)
    assert steps.count("recurrent") == (4 if name == "lstm" else 1)
    assert not [step for step in steps if step.startswith("torch")]


def test_first_states_are_inputs():
    index, first = torch.randint(0, 50, (4, 3)), (torch.randn(1, 3, 24), torch.randn(1, 3, 24))
    model = quantize_(
        Tagger(nn.LSTM(16, 24), 24).eval(), Recipe(weights=4, activations=8), calibration=[(index, first)]
    )
    fused = FusedProgram(model, (index, first), {})
    with torch.no_grad():
        kept = [state.clone() for state in first]
        for one, other in zip(fused(index, first), model(index, first), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_what_is_left_to_torch():
    index = torch.randint(0, 50, (4, 3))
    for layer, recipe in (
        (nn.LSTM(16, 24, proj_size=8), Recipe(weights=4, activations=8)),
        (nn.GRU(16, 24), Recipe(weights="nf4", activations=8)),
        (nn.GRU(16, 24), Recipe(weights=4, activations=None)),
    ):
        model = quantize_(Tagger(layer, layer.proj_size or 24).eval(), recipe, calibration=[index])
        with torch.no_grad():
            for one, other in zip(FusedProgram(model, (index,), {})(index), model(index), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
