"""Random convolutions of every rank and geometry, against float64 ones of the values that the codes stand for."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.kernels import extension
from dybit.operators.conv import conv
from dybit.operators.integer_conv import ImageFormat, conv_image, round_image
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

ISAS = extension.available()[1:]
FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
LAYERS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FAMILIES = [f"dybit{bits}" for bits in range(2, 9)] + ["int4", "int8", "nf4", "mxfp4"]
INPUTS = ["int8", "uint8", "s8r1", "u8r3", "s8", "s5r2", "u4", "nf4"]
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def _restore_isa():
    before = extension.isa()
    yield
    if before in ISAS:
        extension.use(before)


def on_all(compute, same):
    """The tensors of every instruction set, with ``same`` equal bit for bit; of plain torch without the extension."""
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append(compute())
        if same:
            assert all(torch.equal(a, b) for a, b in zip(results[-1], results[0], strict=True)), isa
    return results or [compute()]


def alike(weight, groups):
    """Whether all groups surely take one kernel. Some sets leave groups of wide weights that differ to plain torch."""
    return groups == 1 or weight.spec.shape[1] == 1 or weight.spec.bits <= 4


@st.composite
def geometries(draw):
    """Rank, shapes of input and weight, stride, padding, dilation and groups of a convolution."""
    rank = draw(st.integers(1, 3))
    few = st.integers(1, 3)
    many = st.sampled_from([1, 2, 3, 5, 16, 17, 33])
    kind = draw(st.sampled_from(["depthwise", "multiplier", "groups", "dense", "dense"]))
    groups = draw(many) if kind in ("depthwise", "multiplier") else draw(few) if kind == "groups" else 1
    per_group = 1 if kind in ("depthwise", "multiplier") else draw(many)
    out = groups * (1 if kind == "depthwise" else draw(st.integers(2, 3)) if kind == "multiplier" else draw(many))
    kernel, stride, dilation = (draw(st.tuples(*[few] * rank)) for _ in range(3))
    padding = draw(st.one_of(st.just((0,) * 2 * rank), st.tuples(*[st.integers(0, 2)] * 2 * rank)))
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(rank)]
    least = [max(1, reach[i] - padding[2 * i] - padding[2 * i + 1]) for i in range(rank)]
    size = [n + draw(st.integers(0, 5)) for n in least]
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    return (batch, per_group * groups, *size), (out, per_group, *kernel), stride, padding, dilation, groups


DEPTH_ONE = ((1, 4, 5, 8, 8), (4, 1, 1, 3, 3), (1, 1, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1), 4)
DEPTH_THREE = ((2, 17, 6, 4, 5), (17, 1, 3, 2, 3), (2, 1, 1), (1, 2, 0, 1, 1, 0), (2, 1, 1), 17)


def rounded(x, name, scale, offset, reach):
    """The values that inputs are rounded to, float64, by the NumPy codebook; with one dynamic scale for each sample."""
    book = catalogue.family(name).books[0]
    if scale is None:
        scale = (x.flatten(1).abs().amax(1) / reach).view(-1, *[1] * (x.ndim - 1))
        scale = torch.where(scale == 0, 1.0, scale)
    shifted = (x - offset if offset is not None else x) / scale
    values = torch.from_numpy(book.values[book.encode(shifted.numpy())]) * scale.double()
    return values if offset is None else values + offset.double()


def expected(x, weight, bias, stride, padding, dilation, groups):
    """The convolution in float64, and the sum of the magnitudes that each result is made of."""
    zeros = [n for i in range(len(stride) - 1, -1, -1) for n in padding[2 * i : 2 * i + 2]]
    x, weight = functional.pad(x, zeros), weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    magnitudes = (x.abs(), weight.abs(), bias.abs())
    function = FUNCTIONS[len(stride)]
    return tuple(function(*parts, stride, 0, dilation, groups) for parts in ((x, weight, bias), magnitudes))


def assert_near(found, exact, magnitude):
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= 2e-5 * magnitude + 1e-30).all())


@settings(max_examples=150)
@given(
    geometries(),
    st.sampled_from(FAMILIES),
    st.sampled_from(["channel", "group"]),
    st.sampled_from(INPUTS),
    st.sampled_from(["static", "offset", "dynamic"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@example(DEPTH_ONE, "dybit8", "channel", "s8r1", "dynamic", True, False, 0)
@example(DEPTH_THREE, "dybit4", "channel", "int8", "static", False, True, 0)
def test_convolutions_are_those_of_the_values(geometry, family, granularity, name, mode, has_bias, last, seed):
    generator = torch.Generator().manual_seed(seed)
    x_shape, shape, *options = geometry
    spec = TensorSpec(family, shape, granularity, 8 if granularity == "group" else None, choice=granularity)
    weight = quantize(torch.randn(shape, generator=generator), spec, method="absmax")
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    x = torch.randn(x_shape, generator=generator)
    if last and x.ndim > 3:
        x = x.to(memory_format=LAST[x.ndim - 2])
    scale = None if mode == "dynamic" else torch.tensor([0.03])
    offset = torch.tensor([-1.3]) if mode == "offset" else None
    reach = 1.5
    given_options = dict(zip(("stride", "padding", "dilation", "groups"), options, strict=True))
    results = on_all(
        lambda: (conv(x, weight, bias, **given_options, input_format=name, input_scale=scale, input_offset=offset,
                      reach=reach),),
        alike(weight, options[-1]),
    )  # fmt: skip
    exact, magnitude = expected(rounded(x, name, scale, offset, reach), weight.dequantize(), bias, *options)
    for (found,) in results:
        assert_near(found, exact, magnitude)


@settings(max_examples=100)
@given(
    geometries(),
    st.sampled_from(FAMILIES),
    st.sampled_from(INPUTS[:-1]),
    st.sampled_from(["", *INPUTS[:-1]]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@example(DEPTH_ONE, "dybit8", "s8r1", "u8r3", False, True, 0)
@example(DEPTH_THREE, "dybit4", "int8", "s8", True, False, 0)
def test_convolutions_of_images_are_those_of_the_values(geometry, family, name, out_name, has_offset, adds, seed):
    generator = torch.Generator().manual_seed(seed)
    x_shape, shape, stride, padding, dilation, groups = geometry
    weight = quantize(torch.randn(shape, generator=generator), TensorSpec(family, shape, "channel", choice="channel"))
    bias, x = torch.randn(shape[0], generator=generator), torch.randn(x_shape, generator=generator)
    scale, out_scale = torch.tensor([0.03]), torch.tensor([0.11])
    offset = torch.tensor([-1.3]) if has_offset and not any(padding) else None
    extra = torch.randint(0, 2, (len(padding),), generator=generator).tolist()
    border = padding if offset is not None else tuple(a + b for a, b in zip(padding, extra, strict=True))
    exact, magnitude = expected(
        rounded(x, name, scale, offset, 1.0), weight.dequantize(), bias, stride, padding, dilation, groups
    )
    addend = torch.randn(exact.shape, generator=generator) if adds else None
    made, out = ImageFormat(name, border), ImageFormat(out_name, border)
    results = on_all(
        lambda: conv_image(
            round_image(x, scale, offset, made), addend, weight, bias, scale, offset,
            out_scale if out_name else None, None, stride, padding, dilation, groups, name, border,
            -INFINITY, 4.0, True, out_name, border if out_name else (),
        ),
        alike(weight, groups),
    )  # fmt: skip
    if addend is not None:
        exact, magnitude = exact + addend, magnitude + addend.abs()
    for found, image in results:
        assert_near(found, exact.clamp(max=4.0), magnitude)
        if out_name:
            assert torch.equal(image, round_image(found, out_scale, None, out))


@st.composite
def modules(draw):
    """A convolution layer of any kind, and a shape for its input."""
    x_shape, shape, stride, padding, dilation, groups = draw(geometries())
    rank = len(stride)
    transposed = draw(st.booleans())
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    given_padding = tuple(min(padding[2 * i], padding[2 * i + 1]) for i in range(rank))
    if not transposed and draw(st.booleans()):
        given_padding, stride = "same", (1,) * rank
    size = tuple(n + 5 for n in x_shape[2:])  # reflections need inputs larger than the border
    layer = LAYERS[rank][transposed](
        x_shape[1], shape[0], shape[2:], stride, given_padding, dilation=dilation, groups=groups, padding_mode=mode
    )
    return layer.eval(), (max(1, x_shape[0]), x_shape[1], *size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=50)
@given(modules(), st.integers(2, 8), st.sampled_from(["static", "dynamic"]), st.booleans())
def test_modules_are_those_of_the_values(made, bits, mode, last):
    plain, shape = made
    x, kind = torch.randn(shape), type(plain)
    recipe = Recipe(weights=bits, activations=8, activation_mode=mode)
    (layer,) = quantize_(nn.Sequential(plain), recipe, calibration=[x])
    if last and x.ndim > 3:
        x = x.to(memory_format=LAST[x.ndim - 2])
    with torch.no_grad():
        found = layer(x)
    again = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, dilation=layer.dilation,
        groups=layer.groups, padding_mode=layer.padding_mode,
    ).double()  # fmt: skip
    spec = layer.input_spec
    values = rounded(x, spec.format, layer._buffers.get("input_scale"), layer._buffers.get("input_offset"), spec.reach)
    with torch.no_grad():
        again.weight.copy_(layer.weight)
        again.bias.copy_(layer.bias)
        exact = again(values)
        again.weight.abs_(), again.bias.abs_()
        assert_near(found, exact, again(values.abs()))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(2, 5), (1, 1), (0, 5)])
def test_inputs_smaller_than_the_kernel_are_refused(groups, size):
    weight = quantize(torch.randn(4, 4 // groups, 3, 3), TensorSpec("dybit4", (4, 4 // groups, 3, 3)))
    geometry, scale = ((1, 1), (0, 0, 0, 0), (1, 1), groups), torch.tensor([0.1])
    options = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
    x = torch.randn(1, 4, *size)
    with pytest.raises(DyBitError, match=r"x must be at least as large as the kernel, which covers \[3, 3\]"):
        conv(x, weight, **options, input_format="int8", input_scale=scale)
    image = round_image(x, scale, None, ImageFormat("int8", (0,) * 4))
    with pytest.raises(DyBitError, match="x must be at least as large as the kernel"):
        conv_image(image, None, weight, None, scale, None, None, None, *geometry, "int8", (0,) * 4,
                   -INFINITY, INFINITY, True, "", ())  # fmt: skip


def test_empty_samples_are_refused_and_their_images_zero():
    x, scale, border = torch.ones(1, 4, 0, 5), torch.tensor([0.1]), (1,) * 4
    weight = quantize(torch.randn(4, 4, 1, 1), TensorSpec("dybit4", (4, 4, 1, 1)))
    with pytest.raises(DyBitError, match=r"x must have no empty dimension besides the batch, but has size \[0, 5\]"):
        conv(x, weight, stride=(1, 1), padding=border, dilation=(1, 1), input_format="int8", input_scale=scale)
    image = round_image(x, scale, None, ImageFormat("int8", border))
    assert image.shape == (1, 2, 7, 4) and not image.any()
