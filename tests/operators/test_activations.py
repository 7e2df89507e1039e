"""Activations by name, against torch's modules."""

import pytest
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.operators.activations import ACTIVATIONS, activate, activation_number

MODULES = {"": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-6, 6, 101)
    expected = MODULES[name](x) if name in MODULES else x / (1 + (-1.702 * x).exp())
    torch.testing.assert_close(activate(x, name), expected)


def test_numbers_are_those_of_the_kernels():
    order = ("", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")  # Activation in csrc/kernels.h
    assert [activation_number(name) for name in order] == [*range(6)]
    with pytest.raises(DyBitError, match=r"activation must be one of relu, .*, not 'tanh'"):
        activate(torch.ones(1), "tanh")
