"""The convolution operator: against NumPy and torch, all instruction sets the same bits, and layers that use it."""

import copy

import numpy as np
import pytest
import torch
from convolutions import (
    DEPTH_ONE,
    DEPTH_THREE,
    FAMILIES,
    INPUT_FORMATS,
    LAST,
    alike,
    assert_near,
    conv_of,
    expected,
    geometries,
    on_every_set,
    rounded,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.formats.format import Format, variants
from dybit.kernels import extension
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

ISAS = extension.available()[1:]
pytestmark = pytest.mark.usefixtures("restore_isa")
exact = settings(derandomize=True, deadline=None, max_examples=12)


def run_all(x, weight, bias=None, **options):
    """The result of every instruction set, which must be one, and that of plain torch."""
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append(conv_of(x, weight, bias, **options))
        assert torch.equal(results[-1].nan_to_num(7e7), results[0].nan_to_num(7e7)), isa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", lambda: None)
        plain = conv_of(x, weight, bias, **options)
    if results:
        assert results[0].stride() == plain.stride() and results[0].dtype == plain.dtype
    return (results or [plain])[0], plain


def numpy_conv(x, w, stride, padding, dilation, groups):
    """Exact convolution of integers, two-dimensional, position by position."""
    (top, bottom, left, right), (out, per_group, kh, kw) = padding, w.shape
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((len(x), out, height, width), dtype=np.int64)
    for h in range(height):
        for v in range(width):
            rows = slice(h * stride[0], h * stride[0] + dilation[0] * (kh - 1) + 1, dilation[0])
            columns = slice(v * stride[1], v * stride[1] + dilation[1] * (kw - 1) + 1, dilation[1])
            patch = x[:, :, rows, columns]
            for g in range(groups):
                mine = slice(g * out // groups, (g + 1) * out // groups)
                part = patch[:, g * per_group : (g + 1) * per_group]
                y[:, mine, h, v] = np.einsum("bchw,ochw->bo", part, w[mine])
    return y


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@exact
@given(st.integers(0, 2**32 - 1))
def test_integers_are_exact(bits, signed, seed):
    """Weights and inputs that are codes at scale 1, so that every sum is a whole number of steps."""
    rng = np.random.default_rng(seed)
    every = variants(bits)
    fmt = every[rng.integers(len(every))]
    inputs = [f for width in range(2, 9) for f in variants(width, signed) if not (f.midrise or f.spare)]
    x_fmt = inputs[rng.integers(len(inputs))]
    kind = rng.integers(3)
    groups = int(rng.integers(1, 20)) if kind == 0 else int(rng.integers(2, 4)) if kind == 1 else 1
    per_group = 1 if kind == 0 else int(rng.integers(1, 20))
    out = groups * (1 if kind == 0 else int(rng.integers(1, 12)))
    kernel = tuple(int(n) for n in rng.integers(1, 4, 2))
    stride, dilation = (tuple(int(n) for n in rng.integers(1, 3, 2)) for _ in range(2))
    padding = [int(n) for n in rng.integers(0, 3, 4)]
    size = [int(dilation[i] * (kernel[i] - 1) + 1 + rng.integers(0, 7)) for i in range(2)]
    codes = fmt.level_codes[rng.integers(0, len(fmt.levels), (out, per_group, *kernel))]
    x_codes = x_fmt.level_codes[
        rng.integers(0, len(x_fmt.levels), (int(rng.integers(1, 3)), per_group * groups, *size))
    ]
    if rng.integers(3) == 0:  # the largest of all: what overflows a wrong accumulator
        codes[:], x_codes[:] = np.abs(fmt.significands).argmax(), np.abs(x_fmt.significands).argmax()
    spec = TensorSpec(fmt.name, codes.shape)
    weight = quantize(torch.from_numpy(fmt.values[codes]).float(), spec, method="absmax")
    weight.scale.fill_(1.0)
    stored = numpy_weight_codes(weight, fmt)
    x = torch.from_numpy(x_fmt.values[x_codes]).float()
    found, _ = run_all(
        x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups,
        format=x_fmt.name, scale=torch.ones(1),
    )  # fmt: skip
    sums = numpy_conv(x_fmt.significands[x_codes], stored, stride, padding, dilation, groups)
    expected = sums * fmt.step * x_fmt.step
    if np.abs(sums).max(initial=0) < 1 << 24:
        np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(expected).max()))


def numpy_weight_codes(weight, fmt):
    """The significands that a weight stores."""
    return fmt.significands[weight.codes().numpy()].reshape(weight.spec.shape)


CASES = {
    "pointwise": ((2, 32, 5, 7), (24, 32, 1, 1), {}),
    "stem": ((1, 3, 19, 17), (20, 3, 7, 7), {"stride": (2, 2), "padding": [3, 3, 3, 3]}),
    "uneven": ((1, 6, 9, 8), (5, 6, 3, 2), {"padding": [0, 1, 2, 0], "dilation": (2, 1)}),
    "groups": ((3, 12, 6, 6), (8, 3, 3, 3), {"groups": 4}),
    "depthwise": ((2, 20, 9, 9), (20, 1, 3, 3), {"groups": 20, "stride": (2, 1), "padding": [1, 1, 1, 1]}),
    "depthwise_5": ((1, 16, 11, 9), (16, 1, 5, 5), {"groups": 16, "padding": [2, 2, 2, 2], "dilation": (2, 1)}),
    "multiplier": ((1, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}),
    "line": ((2, 8, 15), (6, 8, 3), {"stride": (2,), "padding": [1, 0]}),
    "depthwise_line": ((2, 8, 15), (8, 1, 3), {"groups": 8, "padding": [1, 1]}),
    "depthwise_volume": (
        (1, 20, 4, 6, 5),
        (20, 1, 2, 3, 3),
        {"groups": 20, "padding": [1, 0, 1, 1, 1, 1], "stride": (2, 1, 1)},
    ),
    "volume": ((1, 4, 5, 4, 6), (5, 4, 2, 3, 2), {"padding": [1, 0, 1, 1, 0, 0]}),
}
INPUTS = {
    "static": {"format": "u8r1", "scale": torch.tensor([0.02])},
    "int8": {"format": "int8", "scale": torch.tensor([0.02])},
    "dynamic": {"format": "s8r3", "reach": 4.0},
    "full": {"format": "s8", "reach": 3.0},
}


def case(name, family="dybit4", group_size=None, seed=0):
    torch.manual_seed(seed)
    x_shape, shape, options = CASES[name]
    granularity = "group" if group_size else "channel"
    spec = TensorSpec(family, shape, granularity, group_size, choice=granularity)
    weight = quantize(torch.randn(shape), spec, method="absmax")
    spatial = len(shape) - 2
    plain = {"stride": (1,) * spatial, "padding": [0] * 2 * spatial, "dilation": (1,) * spatial}
    return torch.randn(x_shape), weight, torch.randn(shape[0]), plain | options


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["plain", "last", "strided"])
def test_paths_agree(name, inputs, layout):
    x, weight, bias, options = case(name)
    if layout == "last" and x.ndim > 3:
        x = x.to(memory_format=LAST[x.ndim - 2])
    if layout == "strided":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    found, plain = run_all(x, weight, bias, **options, **inputs)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["dybit2", "dybit3", "dybit6", "dybit8", "int4", "nf4"])
@pytest.mark.parametrize("group_size", [None, 5, 16])
@pytest.mark.parametrize("name", ["uneven", "groups", "depthwise"])
def test_families_and_groups(family, group_size, name):
    x, weight, bias, options = case(name, family, group_size)
    found, plain = run_all(x, weight, bias, **options, **INPUTS["dynamic"])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x, weight, bias, options = case("uneven")
    found, plain = run_all(x.to(dtype), weight, bias.to(dtype), **options, **INPUTS["static"])
    assert found.dtype == dtype
    torch.testing.assert_close(found, plain, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["pointwise", "depthwise", "groups"])
def test_offsets(name):
    x, weight, bias, options = case(name)
    shifted = {"format": "u8r1", "scale": torch.tensor([0.03]), "offset": torch.tensor([-2.0])}
    found, plain = run_all(x, weight, bias, **options, **shifted)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stem", "depthwise"])
def test_nan_spreads_as_far_as_the_kernel_and_infinity_saturates(name):
    x, weight, bias, options = case(name)
    x[0, 1, 4, 4] = float("nan")
    found, plain = run_all(x, weight, bias, **options, **INPUTS["static"])
    assert found.isnan().any() and not found.isnan().all() and torch.equal(found.isnan(), plain.isnan())
    x[0, 1, 4, 4] = float("inf")
    found, plain = run_all(x, weight, bias, **options, **INPUTS["static"])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", ["dynamic", "full"])
@pytest.mark.parametrize("name", ["stem", "depthwise", "pointwise", "groups"])
def test_a_sample_that_is_not_finite_becomes_nan_at_a_dynamic_scale(name, inputs):
    x, weight, bias, options = case(name)
    x = torch.cat([x, x])
    clean, _ = run_all(x, weight, bias, **options, **INPUTS[inputs])
    for bad in (torch.nan, torch.inf, -torch.inf):
        given = x.clone()
        given[0, 1, 2, 2] = bad
        for found in run_all(given, weight, bias, **options, **INPUTS[inputs]):
            assert found[0].isnan().all()
            torch.testing.assert_close(found[1:], clean[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stem", "depthwise", "pointwise"])
def test_the_largest_inputs_at_a_dynamic_scale(name):
    x, weight, _, options = case(name)
    x = x.clamp(-1, 1)
    # The wanted scale is no number; the largest possible one maps 3.4e38 to 7.75, the largest value.
    results = run_all(x * 1e37, weight, **options, format="s8r3", reach=0.01)
    expected, _ = run_all(x, weight, **options, format="s8r3", reach=7.75 / 34)
    for found in results:
        torch.testing.assert_close(found / 1e37, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["pointwise", "depthwise"])
def test_nothing_and_one(name):
    x, weight, bias, options = case(name)
    for batch in (0, 1):
        found, plain = run_all(x[:1][:batch], weight, bias, **options, **INPUTS["static"])
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    single, _ = run_all(x[0], weight, bias, **options, **INPUTS["dynamic"])
    assert torch.equal(single, run_all(x[:1], weight, bias, **options, **INPUTS["dynamic"])[0][0])


def test_threads_give_the_same_bits():
    x, weight, bias, options = case("stem")
    x = torch.randn(3, 3, 60, 60)
    alone, volumes = torch.randn(2, 20, 60, 60), torch.randn(2, 20, 6, 30, 30)
    _, deep, deep_bias, deep_options = case("depthwise")
    _, thick, thick_bias, thick_options = case("depthwise_volume")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                (conv_of(x, weight, bias, **options, **INPUTS["int8"]),
                 conv_of(alone, deep, deep_bias, **deep_options, **INPUTS["dynamic"]),
                 conv_of(volumes, thick, thick_bias, **thick_options, **INPUTS["dynamic"]))
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def arguments(name, inputs, requires_grad=True):
    x, weight, bias, options = case(name)
    return (
        x.requires_grad_(requires_grad), weight.packed, weight.scale, weight.choice, weight.tensor_scale,
        bias.requires_grad_(requires_grad), inputs.get("scale"), None, weight.spec.key, options["stride"],
        options["padding"], options["dilation"], options.get("groups", 1), inputs["format"],
        inputs.get("reach", 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["uneven", "depthwise", "line"])
def test_opcheck(name):
    for inputs in (INPUTS["static"], INPUTS["dynamic"]):
        torch.library.opcheck(torch.ops.dybit.conv, arguments(name, inputs))


@pytest.mark.parametrize("name", ["uneven", "groups", "depthwise", "line", "volume"])
def test_gradients_are_those_of_the_dequantized_weight(name):
    x, weight, bias, options = case(name)
    x.requires_grad_()
    bias.requires_grad_()
    y = conv_of(x, weight, bias, **options, **INPUTS["dynamic"])
    upstream = torch.randn_like(y)
    y.backward(upstream)
    other = x.detach().clone().requires_grad_()
    padding = options["padding"]
    last_first = [n for i in range(len(padding) - 2, -1, -2) for n in padding[i : i + 2]]
    padded = nn.functional.pad(other, last_first)
    function = getattr(nn.functional, f"conv{x.ndim - 2}d")
    function(
        padded, weight.dequantize(), None, options["stride"], 0, options["dilation"], options.get("groups", 1)
    ).backward(upstream)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, upstream.flatten(2).sum((0, 2)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding="valid"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, (3, 2), padding=1, padding_mode="reflect"),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_layers_use_the_operator(mode, monkeypatch):
    x = torch.randn(2, 3, 17, 15)
    model = quantize_(network(), Recipe(weights=4, activations=8, activation_mode=mode), calibration=[x])
    found = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), found)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(exported.module()(x.repeat(2, 1, 1, 1)), model(x.repeat(2, 1, 1, 1)))
        last = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, found)
    monkeypatch.setattr(extension, "load", lambda: None)
    layer, given = model[0], torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        expected = layer._conv_forward(layer.round_input(given), layer.weight, layer.bias)
        assert torch.equal(copy.deepcopy(layer)(given), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 6, 9, 9, dtype=torch.int64)}, "x must be floating point, not torch.int64"),
        ({"x": torch.ones(1, 5, 9, 9)}, "x must have 4 dimensions and 6 channels"),
        ({"bias": torch.ones(6)}, r"bias must have shape \(5,\)"),
        ({"format": "dybit4"}, "input_format must be a single format, not the family 'dybit4'"),
    ],
)
def test_bad_inputs_are_named(change, message):
    x, weight, bias, options = case("uneven")
    values = {"x": x, "weight": weight, "bias": bias, **options, **INPUTS["static"]} | change
    with pytest.raises(DyBitError, match=message):
        conv_of(values.pop("x"), values.pop("weight"), values.pop("bias"), **values)


def test_formats_are_what_the_tests_take_them_for():
    assert Format.parse("s8").max_significand == 4096


def test_groups_that_need_different_significands():
    """Variants are chosen by channel: one group has small significands, the other long runs."""
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(4, 6, 3, generator=generator) * 2 - 1
    tailed = torch.randn(4, 6, 3, generator=generator) * torch.exp(2 * torch.randn(4, 6, 3, generator=generator))
    weight = quantize(torch.cat([even, tailed]), TensorSpec("dybit8", (8, 6, 3)))
    chosen = weight.choices()
    assert chosen is not None and set(chosen[:4].flatten().tolist()) != set(chosen[4:].flatten().tolist())
    x = torch.randn(2, 12, 11, generator=generator)
    found, plain = run_all(
        x,
        weight,
        stride=(2,),
        padding=(0, 0),
        dilation=(1,),
        groups=2,
        format="s8r2",
        scale=torch.tensor([0.03]),
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@settings(max_examples=150)
@given(
    geometries(),
    st.sampled_from(FAMILIES),
    st.sampled_from(["channel", "group"]),
    st.sampled_from(INPUT_FORMATS),
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
    results = on_every_set(
        lambda: (conv_of(x, weight, bias, **given_options, format=name, scale=scale, offset=offset,
                      reach=reach),),
        alike(weight, options[-1]),
    )  # fmt: skip
    exact, magnitude = expected(rounded(x, name, scale, offset, reach), weight.dequantize(), bias, *options)
    for (found,) in results:
        assert_near(found, exact, magnitude)


LAYERS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


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
    options = {"stride": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": groups}
    with pytest.raises(DyBitError, match=r"x must be at least as large as the kernel, which covers \[3, 3\]"):
        conv_of(torch.randn(1, 4, *size), weight, **options, **INPUTS["static"])


def test_empty_samples_are_refused():
    weight = quantize(torch.randn(4, 4, 1, 1), TensorSpec("dybit4", (4, 4, 1, 1)))
    options = {"stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1)}
    with pytest.raises(DyBitError, match=r"x must have no empty dimension besides the batch, but has size \[0, 5\]"):
        conv_of(torch.ones(1, 4, 0, 5), weight, **options, **INPUTS["static"])
