"""Random convolutions of every rank and geometry, and what they compute, in float64."""

import torch
from hypothesis import strategies as st
from torch.nn import functional

from dybit.formats import catalogue
from dybit.kernels import extension
from dybit.operators.conv import conv
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.input_rounding import InputRounding

FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FAMILIES = [f"dybit{bits}" for bits in range(2, 9)] + ["int4", "int8", "nf4", "mxfp4"]
INPUT_FORMATS = ["int8", "uint8", "s8r1", "u8r3", "s8", "s5r2", "u4", "nf4"]
DEPTH_ONE = ((1, 4, 5, 8, 8), (4, 1, 1, 3, 3), (1, 1, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1), 4)
DEPTH_THREE = ((2, 17, 6, 4, 5), (17, 1, 3, 2, 3), (2, 1, 1), (1, 2, 0, 1, 1, 0), (2, 1, 1), 17)


def on_every_set(compute, same):
    """The tensors of every instruction set, with ``same`` equal bit for bit; of plain torch without the extension."""
    results = []
    for isa in extension.available()[1:]:
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
    """Within the rounding of a few sums in float32."""
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= 2e-5 * magnitude + 1e-30).all())


def conv_of(x, weight, bias=None, *, stride, padding, dilation, groups=1, format, scale=None, offset=None, reach=1.0):
    """The operator, its options given one by one."""
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    return conv(x, weight, bias, geometry, InputRounding(format, scale, offset, reach))
