"""Convolutions with one channel per group (csrc/depthwise.h) against NumPy, bit for bit, on every instruction set."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dybit.kernels import extension
from kernels import ISAS

pytestmark = pytest.mark.skipif(not ISAS, reason="without the extension")
exact = settings(derandomize=True, deadline=None, max_examples=150)
KINDS = {1: np.int8, 2: np.uint8, 3: np.int16}
F32 = np.float32


@dataclass
class Case:
    """A convolution of an image: sizes, what the weights and inputs hold, and how results end."""

    channels: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    places: tuple[int, int, int]
    batch: int = 1
    kind: int = 2
    most: int = 127
    border: int = 0  # wider than the padding
    pitch: int = 0  # elements behind the channels
    out_signed: bool = False
    out_padding: int = 0
    dyadic: bool = False  # results are multiples of half a significand
    offset: float = 0.0
    limits: tuple[float, float] = (-np.inf, np.inf)
    adds: bool = False
    stores: bool = False
    seed: int = 0


def fused(a, b, c):
    """a · b + c, rounded once."""
    return (a.astype(np.longdouble) * np.longdouble(b) + c).astype(F32)


def sums_of(case, image, weights, corner):
    """[batch][places][channels] int64, tap by tap."""
    total = np.zeros((case.batch, *case.places, case.channels), np.int64)
    taps = itertools.product(*map(range, case.kernel))
    for tap, w in zip(taps, weights, strict=True):
        first = [corner[d] + tap[d] * case.dilation[d] for d in range(3)]
        region = tuple(
            slice(first[d], first[d] + (case.places[d] - 1) * case.stride[d] + 1, case.stride[d]) for d in range(3)
        )
        total += image[(slice(None), *region)][..., : case.channels].astype(np.int64) * w
    return total


def check(case):
    """Compares what every set computes with NumPy."""
    rng, kernels = np.random.default_rng(case.seed), extension.load()
    pads = [(case.kernel[d] // 2, (case.kernel[d] - 1) // 2) for d in range(3)]
    size = [
        max(1, (case.places[d] - 1) * case.stride[d] + case.dilation[d] * (case.kernel[d] - 1) + 1 - sum(pads[d]))
        for d in range(3)
    ]
    # at most one stride more than is needed
    case.places = tuple(
        (size[d] + sum(pads[d]) - case.dilation[d] * (case.kernel[d] - 1) - 1) // case.stride[d] + 1 for d in range(3)
    )
    info = np.iinfo(KINDS[case.kind])
    unsigned, magnitude = case.kind == 2, min(int(info.max), 4096)
    taps = int(np.prod(case.kernel))
    most = min(case.most, (1 << 24) // (taps * magnitude) - 1)
    weights = rng.integers(-most, most + 1, (taps, case.channels))
    if case.seed % 3 == 0:  # what overflows narrow sums
        weights[:] = most * rng.choice([-1, 1])
    before = [pads[d][0] + case.border for d in range(3)]
    after = [pads[d][1] + case.border for d in range(3)]
    whole = [size[d] + before[d] + after[d] for d in range(3)]
    pitch = case.channels + case.pitch
    image = rng.integers(0 if unsigned else -magnitude, magnitude + 1, (case.batch, *whole, pitch))
    if case.seed % 3 == 0:
        image[:] = magnitude
    image = image.astype(KINDS[case.kind])
    if case.dyadic:
        scales = np.full(case.channels, 0.5, F32)
        bias = rng.integers(-300, 300, case.channels).astype(F32) / 2
        scale, out_scale = F32(128 if unsigned else 64), F32(128 if not case.out_signed else 64)
        shift = np.nextafter(bias, F32(rng.choice([-np.inf, np.inf])), dtype=F32)
        bias = np.where(rng.random(case.channels) < 0.5, bias, shift).astype(F32)
    else:
        spread = most * magnitude * np.sqrt(taps)
        scales = (rng.uniform(0.1, 3, case.channels) * rng.choice([-1, 1], case.channels) / spread).astype(F32)
        bias, scale, out_scale = rng.standard_normal(case.channels).astype(F32), F32(90.3), F32(1.37)
    unit = F32(128 if unsigned else 64)
    low, high = map(F32, case.limits)
    addend = rng.standard_normal((case.batch, *case.places, case.channels)).astype(F32)
    out_unit, most_out = (F32(64), 127) if case.out_signed else (F32(128), 255)

    sums = sums_of(case, image, weights, [case.border] * 3)
    y = fused((sums.astype(F32) * scales).astype(F32), F32(scale / unit), bias)
    if case.adds:
        y = y + addend
    y = np.minimum(np.maximum(y, low), high)
    ratio = (y - F32(case.offset)) / out_scale * out_unit
    rounded = np.rint(np.clip(ratio, -most_out if case.out_signed else 0, most_out))
    out_pitch = case.channels + case.out_padding
    expected = np.zeros((case.batch, *case.places, out_pitch), np.int64)
    expected[..., : case.channels] = rounded

    magnitudes, longest = {1: (7, 1), 2: (8, 1), 3: (7, 7)}[case.kind]
    extents = [case.kernel, case.stride, case.dilation, [p[0] for p in pads], [p[1] for p in pads]]
    by_tap = np.ascontiguousarray(weights, F32)
    for isa in ISAS:
        extension.use(isa)
        made = kernels.Depthwise(
            by_tap.ctypes.data, scales.ctypes.data, extents, case.channels, magnitudes, longest, not unsigned
        )
        found = np.full(y.shape, 7, F32)
        out = np.full(expected.shape, 99, np.int8 if case.out_signed else np.uint8)
        good = made.run_image(
            (image.ctypes.data, case.kind, before, after, case.channels, pitch),
            case.batch, size, float(scale), 0, bias.ctypes.data,
            found.ctypes.data if case.stores else 0, addend.ctypes.data if case.adds else 0, float(low), float(high),
            (out.ctypes.data, 1 if case.out_signed else 2, [0] * 3, [0] * 3, case.channels, out_pitch),
            (7 if case.out_signed else 8, 1, case.out_signed, float(out_scale), case.offset), 1,
        )  # fmt: skip
        assert good, isa
        np.testing.assert_array_equal(out, expected, err_msg=isa)
        if case.stores:
            np.testing.assert_array_equal(found, y, err_msg=isa)


@st.composite
def cases(draw):
    flat = draw(st.sampled_from([0, 1, 2, 2]))  # leading dimensions of one
    lead = [draw(st.just(1) if d < 2 - flat else st.integers(1, 3)) for d in range(2)]
    width = draw(st.integers(1, 7))
    small = st.integers(1, 3)
    return Case(
        channels=draw(st.sampled_from([1, 3, 8, 15, 16, 17, 24, 32, 40, 63, 64, 65, 96, 112, 130])),
        kernel=(lead[0], max(lead[1], draw(st.sampled_from([1, width]))) if lead[1] > 1 else 1, width),
        stride=(draw(small), draw(small), draw(small)),
        dilation=(draw(small), draw(small), draw(st.sampled_from([1, 1, 2, 3]))),
        places=(lead[0], draw(st.integers(1, 4)), draw(st.integers(1, 17))),
        batch=draw(st.sampled_from([1, 1, 2, 0])),
        kind=draw(st.sampled_from([1, 2, 3])),
        most=draw(st.sampled_from([3, 127, 128, 252, 4096, 32767])),
        border=draw(st.sampled_from([0, 0, 1])),
        pitch=draw(st.sampled_from([0, 0, 3, 32])),
        out_signed=draw(st.booleans()),
        out_padding=draw(st.sampled_from([0, 0, 5, 16])),
        dyadic=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 0.0, -0.37, 2.5])),
        limits=draw(st.sampled_from([(-np.inf, np.inf), (0.0, 6.0), (0.0, 0.81), (-0.5, 0.25), (2.0, 1.0)])),
        adds=draw(st.sampled_from([False, False, True])),
        stores=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@pytest.mark.usefixtures("restore_isa")
class TestDepthwise:
    @exact
    @given(cases())
    @example(Case(64, (1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 5, 28), dyadic=True))
    @example(Case(144, (1, 5, 5), (1, 2, 2), (1, 1, 1), (1, 4, 14), kind=1, out_signed=True, dyadic=True))
    @example(Case(96, (1, 3, 3), (1, 2, 2), (1, 1, 1), (1, 4, 14), kind=3, most=32767, limits=(0.0, 6.0)))
    def test_agrees_with_numpy(self, case):
        check(case)

    @pytest.mark.parametrize("wide", [False, True])
    def test_many_results_close_to_ties(self, wide):
        """Enough results that some lie within the span in which the first rounding is not trusted."""
        for seed in (1, 2):
            check(Case(256, (1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 30, 35), most=252 if wide else 127, seed=seed))

    def test_results_beyond_the_range_of_the_fast_rounding(self):
        for isa in ISAS:
            extension.use(isa)
            image, out = np.full((1, 1, 1, 7, 16), 200, np.uint8), np.zeros((1, 1, 1, 7, 16), np.uint8)
            weights, scales, bias = np.full((1, 16), 100, F32), np.full(16, 1e18, F32), np.zeros(16, F32)
            scales[1], scales[2], bias[3] = -1e18, 0, np.inf
            ones, none = (1, 1, 1), (0, 0, 0)
            made = extension.load().Depthwise(
                weights.ctypes.data, scales.ctypes.data, [ones, ones, ones, none, none], 16, 8, 1, False
            )
            assert made.run_image(
                (image.ctypes.data, 2, none, none, 16, 16), 1, (1, 1, 7), 1.0, 0, bias.ctypes.data, 0, 0,
                -np.inf, np.inf, (out.ctypes.data, 2, none, none, 16, 16), (8, 1, False, 1.0, 0.0), 1,
            )  # fmt: skip
            assert out[0, 0, 0, 0].tolist() == [255, 0, 0] + [255] * 13, isa
            bias[3] = np.nan
            assert not made.run_image(
                (image.ctypes.data, 2, none, none, 16, 16), 1, (1, 1, 7), 1.0, 0, bias.ctypes.data, 0, 0,
                -np.inf, np.inf, (out.ctypes.data, 2, none, none, 16, 16), (8, 1, False, 1.0, 0.0), 1,
            ), isa  # fmt: skip

    def test_weights_beyond_16_bits_are_refused(self):
        weights, scales, ones, none = np.full((1, 1), 40000, F32), np.ones(1, F32), (1, 1, 1), (0, 0, 0)
        with pytest.raises(ValueError, match="does not fit 16 bits"):
            extension.load().Depthwise(
                weights.ctypes.data, scales.ctypes.data, [ones, ones, ones, none, none], 1, 7, 1, True
            )
