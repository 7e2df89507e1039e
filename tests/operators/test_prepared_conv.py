"""What a convolution keeps between its calls: the same bits as the operator, and never those of another weight."""

import copy

import pytest
import torch
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.operators.conv import conv
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.prepared_conv import PreparedLayer

FIELDS = {"int8": {"activations": "int8"}, "dynamic": {"activations": 8, "activation_mode": "dynamic"}}
KINDS = {
    "plain": lambda: nn.Conv2d(6, 20, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, 2, groups=6, bias=False),
    "line": lambda: nn.Conv1d(6, 20, 3, padding="same"),
    "reflected": lambda: nn.Conv2d(6, 20, 3, padding=(1, 2), padding_mode="reflect"),
    "volume": lambda: nn.Conv3d(6, 4, 2, dilation=2),
}


def sample(module, batch=2, side=9):
    return torch.randn(batch, 6, *(side,) * len(module.kernel_size))


def layer(kind="plain", fields=FIELDS["int8"]):
    torch.manual_seed(0)
    made = KINDS[kind]()
    recipe = dybit.Recipe(weights=4, **fields)
    return dybit.quantize_(nn.Sequential(made), recipe, [sample(made)])[0]


def slow(module, x):
    """The layer without what it keeps."""
    sides = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        x, sides = nn.functional.pad(x, sides, mode=module.padding_mode), [0] * len(sides)
    order = [n for i in range(len(sides) - 2, -1, -2) for n in sides[i : i + 2]]
    geometry = ConvGeometry.of(module.stride, order, module.dilation, module.groups)
    return conv(x, module.quantized_tensor(), module._parameters.get("bias"), geometry, module.input_rounding())


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_bits(kind, fields):
    module = layer(kind, FIELDS[fields])
    for side in (9, 12):
        whole = sample(module, 3, side)
        inputs = [
            whole,
            whole[:1],
            whole[0],
            whole[:0],
            whole.double(),
            whole.bfloat16(),
            whole[..., ::2],
            whole * torch.nan,
        ]
        if whole.ndim == 4:
            inputs.append(whole.contiguous(memory_format=torch.channels_last))
        for x in inputs:
            for _ in range(2):
                found, wanted = module(x), slow(module, x)
                assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
                assert found.stride() == wanted.stride() and found.dtype == x.dtype


@torch.no_grad()
def test_weights_and_geometry_that_change():
    module = layer()
    x = sample(module)
    y = module(x)
    module.weight_scale.mul_(2)
    assert torch.allclose(module(x) - module.bias[:, None, None], 2 * (y - module.bias[:, None, None]), atol=1e-5)
    module.weight_scale.div_(2)
    module.bias.add_(1)
    assert torch.allclose(module(x), y + 1, atol=1e-5)
    module.bias = None
    assert torch.equal(module(x), slow(module, x))
    module.stride = (2, 2)
    assert torch.equal(module(x), slow(module, x)) and module(x).shape[-1] == 5
    module.input_scale.mul_(3)
    assert torch.equal(module(x), slow(module, x))


def test_copies_keep_nothing():
    module = layer()
    with torch.no_grad():
        module(sample(module))
    assert isinstance(module.__dict__["_prepared"][0], PreparedLayer)
    assert "_prepared" not in copy.deepcopy(module).__dict__


def test_gradients_and_wrong_shapes():
    module = layer()
    x = sample(module).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and module.bias.grad is not None
    with torch.no_grad():
        for wrong in (x[:, :5], x[None, None], x.long()):
            with pytest.raises(DyBitError, match="x must"):
                module(wrong)
