"""Loading ready to run: plain, fused without an example, and fused with one."""

import pytest
import torch
from fused_networks import network

import dybit
from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.layers.quantized import is_fused, quantized_layers
from dybit.runtime.image_fusion import Fused
from dybit.runtime.program import FusedProgram


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    model = network()
    return dybit.save(model, tmp_path / "model"), model


def fresh(model):
    return dybit.dequantize_(network())


def test_plain_and_fused(saved):
    path, model = saved
    x = torch.randn(2, 3, 19, 17)
    with torch.no_grad():
        plain = dybit.load(path, fresh(model))
        assert quantized_layers(plain)
        assert not is_fused(plain)
        fused = dybit.load(path, fresh(model), fused=True)
        assert isinstance(fused, Fused)
        program = dybit.load(path, fresh(model), fused=x)
        assert isinstance(program, Fused if extension.isa() == extension.FALLBACK else FusedProgram)
        for one in (plain, fused, program):
            assert torch.equal(one(x), model(x))


def test_a_bad_example(saved):
    path, model = saved
    with pytest.raises(DyBitError, match="example must be a tensor, a tuple or a mapping, not str"):
        dybit.load(path, fresh(model), fused="yes")
