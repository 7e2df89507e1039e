"""Transposed convolutions by the kernels: against torch on the values, and every instruction set the same bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dybit
from dybit.kernels import extension
from dybit.operators.dispatch import recording
from kernels import ISAS, by_torch

pytestmark = [
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(not ISAS, reason="no compiled kernels"),
]
KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INPUTS = ({}, {"activations": "int8"}, {"activations": "uint8"}, {"activations": 8, "activation_mode": "dynamic"})


@st.composite
def layers(draw):
    sides, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(sides))  # noqa: E731
    stride, dilation = numbers(1, 3), numbers(1, 2)
    more = tuple(draw(st.integers(0, max(a, b) - 1)) for a, b in zip(stride, dilation, strict=True))
    torch.manual_seed(draw(st.integers(0, 99)))
    return KINDS[sides - 1](
        groups * draw(st.sampled_from([4, 9])),
        groups * draw(st.sampled_from([1, 5, 18])),
        numbers(1, 3),
        stride,
        numbers(0, 1),
        more,
        groups,
        draw(st.booleans()),
        dilation,
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(layers(), st.sampled_from(INPUTS), st.sampled_from([3, 4, 8]), st.booleans(), st.integers(1, 3))
@torch.no_grad()
def test_as_torch_computes_from_the_values(made, inputs, weights, last, batch):
    x = torch.randn(batch, made.in_channels, *(5, 4, 6)[: len(made.kernel_size)]) + 0.5
    layout = torch.channels_last if last and x.ndim == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    layer = dybit.quantize_(nn.Sequential(made), dybit.Recipe(weights=weights, **inputs), [x] if inputs else None)[0]
    expected = by_torch(lambda: layer(x))
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append(layer(x))
        assert results[-1].is_contiguous(memory_format=layout)
        torch.testing.assert_close(results[-1], expected, rtol=1e-4, atol=1e-4)
    if inputs:
        assert all(torch.equal(other, results[0]) for other in results)


def layer_of(**options):
    torch.manual_seed(0)
    made = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, 2, 1, **options))
    return dybit.quantize_(made, dybit.Recipe(weights=4, activations="int8"), [torch.randn(2, 8, 5, 5)])[0]


@torch.no_grad()
def test_what_changes_between_calls():
    layer, x = layer_of(), torch.randn(2, 8, 5, 5)
    assert layer(x).shape[2:] == (9, 9) and "_prepared" in layer.__dict__
    assert "_prepared" not in copy.deepcopy(layer).__dict__
    assert layer(x, output_size=[10, 9]).shape[2:] == (10, 9)
    assert torch.equal(layer(x)[0], layer(x[:1])[0])
    for change in (
        lambda: layer.bias.add_(1),
        lambda: layer.weight_scale.mul_(2),
        lambda: layer.input_scale.mul_(2),
        lambda: setattr(layer, "stride", (1, 1)),
        lambda: setattr(layer, "bias", None),
    ):
        before = layer(x)
        change()
        found = layer(x)
        assert found.shape != before.shape or not torch.equal(found, before)
        torch.testing.assert_close(found, by_torch(lambda: layer(x)))
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[30, 30])


def test_nan_gradients_and_single_samples():
    layer, x = layer_of(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
        spoilt = x.clone()
        spoilt[0, 3, 2, 2] = torch.nan
        found = layer(spoilt)
        assert found[0, :, 3:6, 3:6].isnan().all() and not found[0, :, :3].isnan().any() and not found[1].isnan().any()
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None


@torch.no_grad()
def test_threads_give_the_same_bits():
    layer, before = layer_of(groups=2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([layer(torch.ones(batch, 8, 40, 40)) for batch in (1, 4)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(layers(), st.sampled_from(INPUTS), st.sampled_from(["dybit4", "nf4"]), st.booleans())
@torch.no_grad()
def test_one_operator_of_torch(made, inputs, weights, last):
    x = torch.randn(2, made.in_channels, *(5, 4, 6)[: len(made.kernel_size)])
    layout = torch.channels_last if last and x.ndim == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    layer = dybit.quantize_(nn.Sequential(made), dybit.Recipe(weights=weights, **inputs), [x] if inputs else None)[0]
    expected = layer(x)
    with recording():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=layout)


def test_opcheck():
    layer = layer_of(output_padding=1)
    spec, rounding = layer.quantized_tensor(), layer.input_rounding()
    parts = (
        spec.packed,
        spec.scale,
        spec.choice,
        spec.tensor_scale,
        layer.bias.detach(),
        rounding.scale,
        rounding.offset,
    )
    rest = spec.spec.key, [10, 8], [2, 2], [1, 1, 1, 1], [1, 1], 1, rounding.format, rounding.reach
    torch.library.opcheck(torch.ops.dybit.conv_transposed, (torch.randn(2, 8, 5, 4), *parts, *rest))
