"""Images of significands: against NumPy, and convolutions of them against those of floating point, bit for bit."""

import numpy as np
import pytest
import torch
from convolutions import (
    DEPTH_ONE,
    DEPTH_THREE,
    FAMILIES,
    INPUT_FORMATS,
    alike,
    assert_near,
    expected,
    geometries,
    on_every_set,
    rounded,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.operators.conv import conv
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.images import UnknownError, round_image
from dybit.operators.input_rounding import InputRounding
from dybit.operators.integer_conv import conv_image
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

ISAS = extension.available()[1:]
pytestmark = pytest.mark.usefixtures("restore_isa")
INFINITY = float("inf")
exact = settings(derandomize=True, deadline=None, max_examples=25)


def on_all(compute):
    """What every instruction set computes, which must be one, and what plain torch does."""
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append(compute())
        for found, first in zip(results[-1], results[0], strict=True):
            assert torch.equal(found, first), isa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", lambda: None)
        plain = compute()
    return (results or [plain])[0], plain


def random_case(rng):
    """A convolution of any geometry, its input and what follows it."""
    kind = rng.integers(4)
    groups = int(rng.integers(1, 40)) if kind == 0 else int(rng.integers(2, 4)) if kind == 1 else 1
    per_group = 1 if kind == 0 else int(rng.integers(1, 40))
    out = groups * (1 if kind == 0 else int(rng.integers(1, 80)))
    kernel = tuple(int(n) for n in (rng.integers(1, 4, 2) if kind != 2 else (1, 1)))
    stride, dilation = (tuple(int(n) for n in rng.integers(1, 3, 2)) for _ in range(2))
    if kind == 2:
        stride = (1, 1)
    padding = [int(n) for n in rng.integers(0, 3, 4)] if rng.integers(2) else [0] * 4
    size = [int(dilation[i] * (kernel[i] - 1) + 1 + rng.integers(0, 9)) for i in range(2)]
    # Groups of wide weights may need different kernels, or none: then plain torch convolves, whose sums differ.
    family = rng.choice(["dybit2", "dybit3", "dybit4", *(["dybit6", "dybit8", "int8"] if kind != 1 else [])])
    weight = torch.from_numpy(rng.standard_normal((out, per_group, *kernel)).astype(np.float32))
    stored = quantize(weight, TensorSpec(str(family), weight.shape, "channel", choice="channel"), method="absmax")
    x = torch.from_numpy(rng.standard_normal((int(rng.integers(1, 4)), per_group * groups, *size)).astype(np.float32))
    bias = torch.from_numpy(rng.standard_normal(out).astype(np.float32)) if rng.integers(2) else None
    return x, stored, bias, stride, padding, dilation, groups


@exact
@given(st.integers(0, 2**32 - 1))
def test_a_convolution_of_an_image_is_that_of_the_layers_one_by_one(seed):
    rng = np.random.default_rng(seed)
    x, weight, bias, stride, padding, dilation, groups = random_case(rng)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    name, out_name = (str(rng.choice(["int8", "uint8", "s8r1", "u8r3", "s8", "s5r2"])) for _ in range(2))
    scale, out_scale = torch.tensor([0.03]), torch.tensor([0.11])
    offset = torch.tensor([-1.3]) if not any(padding) and rng.integers(2) else None
    out_border = tuple(int(n) for n in rng.integers(0, 3, 4))
    out_offset = torch.tensor([0.7]) if not any(out_border) else None
    wider = tuple(n + int(rng.integers(2)) for n in padding) if offset is None else (0,) * 4
    low, high = [(-INFINITY, INFINITY), (0.0, INFINITY), (0.0, 6.0), (-1.0, 1.0)][rng.integers(4)]
    rounding, out = InputRounding(name, scale, offset), InputRounding(out_name, out_scale, out_offset)

    def layers():
        y = conv(x, weight, bias, geometry, rounding)
        y = (y + addend if addend is not None else y).clamp(low, high)
        return y, round_image(y, out, out_border)

    def images(keep=True):
        image = round_image(x, rounding, wider)
        return conv_image(image, addend, weight, bias, geometry, rounding, wider, out, out_border, (low, high), keep)

    addend = None
    shape = layers()[0].shape
    addend = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) if rng.integers(2) else None
    expected, plain_expected = on_all(layers)
    found, plain = on_all(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(plain[0], plain_expected[0], rtol=1e-4, atol=1e-4)
    alone, _ = on_all(lambda: images(keep=False))
    assert torch.equal(alone[1], expected[1]) and alone[0].numel() == 0


ROUNDING = InputRounding("int8", torch.tensor([0.02]))
NEXT = InputRounding("uint8", torch.tensor([0.1]))


def arguments(dims=2, channels=20, out=7, batch=2, following=NEXT):
    torch.manual_seed(0)
    size, kernel = (6, 5, 4)[:dims], (3, 2, 1)[:dims]
    weight = quantize(torch.randn(out, channels, *kernel), TensorSpec("dybit4", (out, channels, *kernel)))
    border = (1,) * 2 * dims
    image = round_image(torch.randn(batch, channels, *size), ROUNDING, border)
    ones = (1,) * dims
    geometry, out_border = ConvGeometry(ones, border, ones), border if following else ()
    return [image, None, weight, torch.randn(out), geometry, ROUNDING, border, following, out_border, (0.0, 6.0), True]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions_and_no_next_image(dims):
    with_image, plain = on_all(lambda: conv_image(*arguments(dims)))
    torch.testing.assert_close(with_image[0], plain[0], rtol=1e-4, atol=1e-4)
    assert with_image[1].shape == plain[1].shape
    without, _ = on_all(lambda: conv_image(*arguments(dims, following=None)))
    assert torch.equal(without[0], with_image[0]) and without[1].numel() == 0


def test_batches_of_none():
    y, image = on_all(lambda: conv_image(*arguments(batch=0)))[0]
    assert y.shape == (0, 7, 6, 6) and image.shape == (0, 8, 8, 7)


def test_threads_give_the_same_bits():
    before, results = torch.get_num_threads(), []
    given = arguments(channels=30, out=200)
    given[0] = torch.randint(-127, 128, (3, 42, 41, 32)).to(torch.int8)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(conv_image(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    image, addend, weight, bias, geometry, rounding, border, *_ = arguments()
    parts = (weight.packed, weight.scale, weight.choice, weight.tensor_scale)
    scales = (rounding.scale, None, NEXT.scale, None)
    options = (geometry.stride, geometry.padding, geometry.dilation, 1, "int8", border, 0.0, 6.0, True, "uint8", border)
    torch.library.opcheck(torch.ops.dybit.conv_image, (image, addend, *parts, bias, *scales, weight.spec.key, *options))


def test_nan_is_refused():
    given = arguments()
    given[3] = torch.full((7,), float("nan"))
    with pytest.raises(UnknownError, match="NaN"):
        conv_image(*given)
    given[7:9] = None, ()
    assert conv_image(*given)[0].isnan().all()  # in floating point it stays what it is


@pytest.mark.parametrize("following", [NEXT, InputRounding("u8r2", torch.tensor([0.1]))])
@pytest.mark.parametrize("keep", [False, True])
def test_nan_is_found_in_every_channel_and_row(following, keep):
    given = arguments(out=150, following=following)
    given[10] = keep
    given[9] = (-INFINITY, INFINITY)
    for channel in (0, 63, 64, 149):
        given[3] = torch.zeros(150)
        given[3][channel] = float("nan")
        with pytest.raises(UnknownError, match="NaN"):
            on_all(lambda: conv_image(*given))
    given[3], given[1] = None, torch.zeros(2, 150, 6, 6)
    given[1][1, 149, 5, 5] = float("nan")
    with pytest.raises(UnknownError, match="NaN"):
        on_all(lambda: conv_image(*given))


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("name", ["int8", "uint8", "s8"])
def test_few_and_odd_channels(channels, kernel, name):
    torch.manual_seed(0)
    shape = (70, channels, *kernel)
    weight = quantize(torch.randn(shape), TensorSpec("dybit4", shape, "channel"))
    none, laid = (0,) * 4, (ConvGeometry((2, 1), (0,) * 4, (1, 1)), InputRounding(name, torch.tensor([0.02])))
    image = round_image(torch.randn(2, channels, 9, 8), laid[1], none)
    (y, out), plain = on_all(lambda: conv_image(image, None, weight, None, *laid, none, NEXT, none))
    torch.testing.assert_close(y, plain[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(out, round_image(y, NEXT, none))
    alone, _ = on_all(lambda: conv_image(image, None, weight, None, *laid, none, NEXT, none, keep=False))
    assert torch.equal(alone[1], out)


@pytest.mark.parametrize(("limits", "offset"), [((0.5, 6.0), None), ((-2.0, -0.5), None), ((0.0, 6.0), 0.7)])
def test_places_without_a_channel_are_zero(limits, offset):
    given = arguments(out=40)
    given[7] = InputRounding("int8", torch.tensor([0.1]), None if offset is None else torch.tensor([offset]))
    given[8], given[9] = (0,) * 4, limits
    for keep in (False, True):
        given[10] = keep
        (_, image), plain = on_all(lambda: conv_image(*given))
        assert image.shape[-1] == 64 and not image[..., 40:].any()
        assert (image != plain[1]).float().mean() < 0.01  # plain torch sums in floating point


@pytest.mark.parametrize("group_size", [36, 100])
def test_weights_of_several_groups_of_columns(group_size):
    torch.manual_seed(0)
    shape = (70, 20, 3, 3)
    weight = quantize(torch.randn(shape), TensorSpec("dybit4", shape, "group", group_size))
    given = arguments()
    given[2], given[3], given[4] = weight, None, ConvGeometry((1, 1), (1,) * 4, (1, 1))
    (y, _), plain = on_all(lambda: conv_image(*given))
    torch.testing.assert_close(y, plain[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 8, 7, 32, dtype=torch.uint8), "image must be contiguous torch.int8"),
        (0, torch.zeros(2, 8, 7, 20, dtype=torch.int8), "image must be of 20 channels"),
        (0, torch.zeros(2, 8, 32, dtype=torch.int8), "image must have 4 dimensions"),
        (1, torch.zeros(9, 1, 1, 1), r"addend must broadcast to \(2, 7, 6, 6\)"),
        (4, ConvGeometry((1, 1), (2, 1, 1, 1), (1, 1)), "padding must be at most the border"),
        (5, InputRounding("nf4", torch.ones(1)), "format must be one that the kernels round to, not 'nf4'"),
    ],
)
def test_bad_arguments_are_named(place, value, message):
    given = arguments()
    given[place] = value
    with pytest.raises(DyBitError, match=message):
        conv_image(*given)


@settings(max_examples=100)
@given(
    geometries(),
    st.sampled_from(FAMILIES),
    st.sampled_from(INPUT_FORMATS[:-1]),
    st.sampled_from(["", *INPUT_FORMATS[:-1]]),
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
    rounding = InputRounding(name, scale, offset)
    out = InputRounding(out_name, out_scale) if out_name else None
    laid = (ConvGeometry(stride, padding, dilation, groups), rounding, border, out, border, (-INFINITY, 4.0))
    results = on_every_set(
        lambda: conv_image(round_image(x, rounding, border), addend, weight, bias, *laid), alike(weight, groups)
    )
    if addend is not None:
        exact, magnitude = exact + addend, magnitude + addend.abs()
    for found, image in results:
        assert_near(found, exact.clamp(max=4.0), magnitude)
        if out_name:
            assert torch.equal(image, round_image(found, out, border))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(2, 5), (1, 1)])
def test_images_smaller_than_the_kernel_are_refused(groups, size):
    weight = quantize(torch.randn(4, 4 // groups, 3, 3), TensorSpec("dybit4", (4, 4 // groups, 3, 3)))
    geometry, none = ConvGeometry((1, 1), (0,) * 4, (1, 1), groups), (0,) * 4
    image = round_image(torch.randn(1, 4, *size), ROUNDING, none)
    with pytest.raises(DyBitError, match="x must be at least as large as the kernel"):
        conv_image(image, None, weight, None, geometry, ROUNDING, none)
