"""The compiled kernels against the NumPy oracle: integer sums exact, every instruction set the same bits."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
import textwrap
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import catalogue, packing
from dybit.formats.format import Format, variants
from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.operators.activations import ACTIVATIONS
from dybit.operators.input_rounding import InputFormat, InputRounding, input_format
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

ISAS = [name for name in extension.available() if name != extension.FALLBACK]
pytestmark = pytest.mark.usefixtures("restore_isa")
needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
exact = settings(derandomize=True, deadline=None, max_examples=6)


def portable(codes, fmt, scale=1.0, group_size=None, family=None, choice=None):
    """A quantized tensor of given codes, with one scale."""
    rows, columns = codes.shape
    granularity = "group" if group_size else "channel"
    spec = TensorSpec(family or fmt.name, (rows, columns), granularity, group_size, "fp32", granularity)
    packed = torch.from_numpy(packing.pack(codes, fmt.bits, group_size)).view(spec.packed_shape)
    if choice is not None:
        units = choice.reshape(1, -1) if choice.shape[1] == 1 else choice
        choice = torch.from_numpy(packing.pack(units, spec.choice_bits))
    return QuantizedTensor(spec, packed, torch.full(spec.scale_shape, scale), choice)


def input_values(significands, fmt):
    """FP32 inputs that round to significands at scale 1."""
    return torch.from_numpy((significands * fmt.step).astype(np.float32))


def run_all(weight, inputs_name, x, group_size=0, bias=None, activation="", **rounding):
    """The result of every instruction set, which must be one."""
    given = InputRounding(inputs_name, group_size=group_size, **rounding)
    results = []
    for isa in ISAS:
        extension.use(isa)
        packed = packed_weight.PackedWeight(weight, input_format(inputs_name), group_size)
        assert packed.isa == isa
        results.append(packed.linear(x, bias, given, activation))
    for isa, result in zip(ISAS, results, strict=True):
        np.testing.assert_array_equal(result.numpy(), results[0].numpy(), err_msg=isa)
    return results[0].numpy()


def segments(columns, group_size, fmt, inputs):
    """Where sums are cut: at the ends of groups, and before they could pass 32 bits (csrc/weight.h)."""
    safe = min(4096, (2**31 - 1) // (fmt.max_significand * inputs.max_significand))
    safe = safe // 32 * 32 or safe
    for start in range(0, columns, group_size or columns):
        end = min(start + (group_size or columns), columns)
        yield from ((i, min(i + safe, end)) for i in range(start, end, safe))


def oracle(significands, x, fmt, inputs, group_size):
    """Exact integers for every segment, each rounded to FP32 once, added in order."""
    total = np.zeros((len(x), len(significands)), dtype=np.float32)
    for start, stop in segments(x.shape[1], group_size, fmt, inputs):
        sums = x[:, start:stop] @ significands[:, start:stop].T
        assert np.abs(sums).max() < 2**31
        term = sums.astype(np.float32).astype(np.longdouble) * fmt.step
        total = (total.astype(np.longdouble) + term).astype(np.float32)
    return total * np.float32(inputs.step)


def check_integers(rng, fmt, inputs, shape, group_size):
    m, n, k = shape
    codes = rng.integers(0, 1 << fmt.bits, (n, k), dtype=np.uint8)
    x_codes = rng.integers(0, 1 << inputs.bits, (m, k), dtype=np.uint8)
    if rng.integers(4) == 0:  # the largest of all: what overflows a wrong accumulator
        codes[:], x_codes[:] = np.abs(fmt.significands).argmax(), np.abs(inputs.significands).argmax()
    significands, x = fmt.significands[codes], inputs.significands[x_codes]
    found = run_all(
        portable(codes, fmt, group_size=group_size), inputs.name, input_values(x, inputs), scale=torch.ones(1)
    )
    np.testing.assert_array_equal(found, oracle(significands, x, fmt, inputs, group_size))


@needs_kernels
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@exact
@given(st.integers(0, 2**32 - 1))
def test_integers_are_exact(bits, signed, seed):
    rng = np.random.default_rng(seed)
    for fmt in variants(bits):
        every = [f for width in range(2, 9) for f in variants(width, signed) if not (f.midrise or f.spare)]
        inputs = every[rng.integers(len(every))]
        shape = (
            int(rng.choice([*range(1, 9), 12, 16, 19, 33, 50])),
            int(rng.integers(1, 70)),
            int(rng.integers(1, 200)),
        )
        check_integers(rng, fmt, inputs, shape, [None, 1, 7, 16, 32, 48, 128][rng.integers(7)])


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 1, 3), (1, 17, 1), (13, 65, 33)])
def test_smallest_shapes(shape):
    check_integers(np.random.default_rng(0), Format(4), Format(8, max_run=1), shape, None)


@needs_kernels
@pytest.mark.parametrize("inputs", ["s8r1", "u8r1", "s8"])
@pytest.mark.parametrize("group_size", [None, 32, 160])
def test_more_rows_and_columns_than_are_held_at_once(inputs, group_size):
    check_integers(np.random.default_rng(0), Format(4), Format.parse(inputs), (300, 35, 4100), group_size)


@needs_kernels
@pytest.mark.parametrize("inputs", ["s8r1", "u8r1", "s8", "u8", "s4", "u4r2"])
@pytest.mark.parametrize("name", ["s2mid", "s3spare", "s4", "s4mid", "s5r4mid", "s6r3", "s7", "s8r1", "s8", "s8mid"])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_overflow(name, inputs, sign):
    fmt, x_fmt = Format.parse(name), Format.parse(inputs)
    columns, rows = 5000, 20
    codes = np.full((rows, columns), int(np.argmax(fmt.significands * sign)), dtype=np.uint8)
    for m, x_sign in ((1, 1), (7, 1), (3, -1), (35, 1), (9, -1)):
        x = x_fmt.significands.max() if x_sign > 0 else x_fmt.significands.min()
        found = run_all(
            portable(codes, fmt), inputs, input_values(np.full((m, columns), x), x_fmt), scale=torch.ones(1)
        )
        expected = float(x * fmt.significands[codes[0, 0]] * columns) * fmt.step * x_fmt.step
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 24, 64])
@pytest.mark.parametrize("m", [1, 4, 11])
def test_choices_scales_and_dynamic_inputs(bits, group_size, m):
    rng = np.random.default_rng(bits)
    books = variants(bits)
    n, k = 37, 150
    groups = -(-k // group_size) if group_size else 1
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    choice = rng.integers(0, len(books), (n, groups)).astype(np.uint8)
    weight = portable(codes, books[0], 0.5, group_size, f"dybit{bits}", choice)
    weight.scale.copy_(torch.from_numpy(rng.normal(size=(n, groups)).astype(np.float32)))
    x = torch.from_numpy(rng.normal(size=(m, k)).astype(np.float32))
    bias = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    values = weight.dequantize().double().numpy()
    for inputs in ("s8r1", "s8r4", "u8r2", "s4"):
        fmt = Format.parse(inputs)
        for x_group in (0, 40):
            found = run_all(weight, inputs, x, x_group, bias=bias, reach=1.5)
            rounded = np.zeros((m, k))
            for start in range(0, k, x_group or k):
                part = x[:, start : start + (x_group or k)]
                scale = part.abs().amax(1, keepdim=True) / 1.5
                rounded[:, start : start + part.shape[1]] = (
                    fmt.decode(fmt.encode((part / scale).numpy())) * scale.numpy()
                )
            np.testing.assert_allclose(found, rounded @ values.T + bias.numpy(), rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_are_rounded_as_the_oracle_rounds(bits, signed):
    """One weight of value 1: what comes out is the rounded input."""
    weight = portable(np.ones((1, 1), dtype=np.uint8), Format(2, max_run=1))
    for fmt in variants(bits, signed):
        if fmt.midrise or fmt.spare:
            continue
        near = np.concatenate([fmt.midpoints, fmt.levels, [0.0, 1e30, -1e30, 1e-30]]).astype(np.float32)
        x = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
        found = run_all(weight, fmt.name, torch.from_numpy(x)[:, None].contiguous(), scale=torch.ones(1))
        np.testing.assert_array_equal(found[:, 0], fmt.decode(fmt.encode(x)))


@needs_kernels
def test_infinity_saturates_at_a_static_scale_and_nan_stays():
    weight = portable(np.ones((3, 5), dtype=np.uint8), Format(4, max_run=1))
    x = torch.ones(3, 5)
    x[0, 2], x[1, 4] = float("inf"), float("nan")
    found = run_all(weight, "s8r1", x, scale=torch.ones(1))
    assert np.isfinite(found[[0, 2]]).all() and np.isnan(found[1]).all()
    found = run_all(weight, "s8r1", x, reach=1.0)
    assert np.isnan(found[:2]).all() and np.isfinite(found[2]).all()


@needs_kernels
@pytest.mark.parametrize("family", ["dybit2", "dybit3", "dybit4", "dybit6", "dybit8", "int5", "e2m1"])
@pytest.mark.parametrize("m", [0, 1, 2, 3, 13])
def test_unrounded_inputs(family, m):
    rng = np.random.default_rng(m)
    books = catalogue.family(family).books
    codes = rng.integers(0, 1 << books[0].bits, (21, 75), dtype=np.uint8)
    choice = rng.integers(0, len(books), (21, 3)).astype(np.uint8) if len(books) > 1 else None
    weight = portable(codes, books[0], 0.3, 32, family, choice)
    x = torch.from_numpy(rng.normal(size=(m, 75)).astype(np.float32))
    found = run_all(weight, "", x)
    torch.testing.assert_close(torch.from_numpy(found), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)
    for isa in ISAS:
        extension.use(isa)
        packed = packed_weight.PackedWeight(weight, InputFormat())
        torch.testing.assert_close(packed.dequantize(), weight.dequantize(), rtol=0, atol=0)


def _fma(a, b, c):
    """a · b + c for FP32, rounded once, by fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))  # rounded twice: one of the two nearest
    nearest = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(nearest, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(np.int32) & 1))


@needs_kernels
@pytest.mark.parametrize(("family", "group_size"), [("dybit4", None), ("dybit8", 24)])
def test_several_unrounded_rows_are_summed_in_the_order_of_the_columns(family, group_size):
    rng = np.random.default_rng(0)
    books = catalogue.family(family).books
    codes = rng.integers(0, 1 << books[0].bits, (2, 300), dtype=np.uint8)
    choice = rng.integers(0, len(books), (2, -(-300 // (group_size or 300)))).astype(np.uint8)
    weight = portable(codes, books[0], 0.3, group_size, family, choice)
    x, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 300), 2))
    expected = np.zeros((2, 2), np.float32)
    for k, column in enumerate(weight.dequantize().numpy().T):
        expected = np.array([[_fma(x[m, k], column[n], expected[m, n]) for n in range(2)] for m in range(2)])
    found = run_all(weight, "", torch.from_numpy(x), bias=torch.from_numpy(bias))
    np.testing.assert_array_equal(found, expected + bias)


@needs_kernels
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "group_size"), [((70, 1300), None), ((131, 700), 48), ((16, 4500), 1000), ((1, 1), None)]
)
@pytest.mark.usefixtures("three_threads")
def test_many_unrounded_rows(bits, shape, group_size):
    """More than are multiplied at once, and no multiples of a tile, a panel or a segment."""
    rng = np.random.default_rng(0)
    family = f"dybit{bits}"
    books = catalogue.family(family).books
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    choice = rng.integers(0, len(books), (shape[0], -(-shape[1] // (group_size or shape[1])))).astype(np.uint8)
    weight = portable(codes, books[0], 0.01, group_size, family, choice)
    x = torch.from_numpy(rng.normal(size=(521, shape[1])).astype(np.float32))
    x[7, 0] = torch.nan
    found = torch.from_numpy(run_all(weight, "", x))
    exact = (x.double() @ weight.dequantize().double().T).float()
    torch.testing.assert_close(
        found, exact, rtol=1e-4, atol=1e-4 * float(exact.nan_to_num().abs().max()), equal_nan=True
    )
    torch.set_num_threads(1)
    np.testing.assert_array_equal(run_all(weight, "", x), found)
    few = [run_all(weight, "", part) for part in x.split(100)]
    np.testing.assert_array_equal(np.concatenate(few), found)


@needs_kernels
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_codes_whose_significands_need_16_bits_stay_bytes(bits):
    """All but the few whose spare level breaks a third run; every code of every format comes out right."""
    codes = np.tile(np.arange(1 << bits, dtype=np.uint8), (17, 1))
    for fmt in variants(bits):
        for isa in ISAS:
            extension.use(isa)
            packed = packed_weight.PackedWeight(portable(codes, fmt), input_format("s8"))
            if fmt.max_significand <= 127:
                assert packed.storage == packed_weight.Storage.BYTES
            elif not fmt.spare:
                assert packed.storage == packed_weight.Storage.RUNS
            else:
                assert packed.storage in (packed_weight.Storage.RUNS, packed_weight.Storage.WORDS)
            values = np.tile(fmt.significands * fmt.step, (17, 1)).astype(np.float32)
            np.testing.assert_array_equal(packed.dequantize().numpy(), values)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("pattern", ["tensor", "blocks", "rows", "groups"])
@pytest.mark.parametrize("group_size", [None, 24, 64])
def test_rows_that_share_a_codebook_of_16_bits_and_rows_that_do_not(bits, pattern, group_size):
    """Blocks of 16 rows are decoded in other ways where all of them have the same choice."""
    rng = np.random.default_rng(bits)
    books = variants(bits)
    held = [i for i, book in enumerate(books) if not book.spare]
    widest = max(held, key=lambda i: books[i].max_significand)
    n, k = 69, 150  # the last block has rows to spare
    groups = -(-k // group_size) if group_size else 1
    choice = rng.choice(held, (n, groups)).astype(np.uint8)
    if pattern == "tensor":
        choice[:] = widest
    elif pattern == "blocks":
        choice[:] = choice[np.arange(n) // 16]
    elif pattern == "groups":
        choice[:, ::2] = choice[np.arange(n) // 16, ::2]
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    weight = portable(codes, books[0], 0.5, group_size, f"dybit{bits}", choice)
    largest = max(books[i].max_significand for i in np.unique(choice))
    packed = packed_weight.PackedWeight(weight, input_format("s8"))
    storage = packed_weight.Storage
    assert packed.storage == (storage.RUNS if largest > 127 else storage.BYTES)
    for m in (1, 2, 3, 4, 7):
        x = torch.from_numpy(rng.normal(size=(m, k)).astype(np.float32))
        for inputs in ("s8", "s8r1", "u8", ""):
            found = run_all(weight, inputs, x, **({"reach": 1.5} if inputs else {}))
            if not inputs:
                torch.testing.assert_close(torch.from_numpy(found), x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("group_size", [0, 100])
@pytest.mark.parametrize("rows", [1, 40, 1500])  # the last are more than are multiplied at once
@pytest.mark.usefixtures("three_threads")
def test_threads_give_the_same_bits(rows, group_size):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (700, 300), dtype=np.uint8)
    weight = portable(codes, Format(4), 0.1)
    x = torch.from_numpy(rng.normal(size=(rows, 300)).astype(np.float32))
    three = run_all(weight, "s8r1", x, group_size, reach=1.9)
    torch.set_num_threads(1)
    np.testing.assert_array_equal(run_all(weight, "s8r1", x, group_size, reach=1.9), three)
    few = [run_all(weight, "s8r1", part, group_size, reach=1.9) for part in x.split(400)]
    np.testing.assert_array_equal(np.concatenate(few), three)


def _layer(rng, shape, inputs, static=False):
    """A weight with a bias, and a way to round inputs."""
    weight = portable(rng.integers(0, 16, shape, dtype=np.uint8), Format(4), 0.02)
    packed = packed_weight.PackedWeight(weight, input_format(inputs), 0)
    scale, offset = (torch.tensor([0.01]), torch.tensor([0.3])) if static else (None, None)
    bias = torch.from_numpy(rng.normal(size=shape[0]).astype(np.float32))
    return packed_weight.Product(packed, bias, InputRounding(inputs, scale, offset, 1.9))


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 31, 95, 96, 97, 600])  # by columns, or at once or in turns by rows
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("inputs", ["int8", "s8", ""])
@pytest.mark.usefixtures("three_threads")
def test_feed_forward_gives_the_bits_of_its_products(rows, threads, gated, inputs):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    # Wide enough for several turns, and no multiple of a block.
    first, second = (_layer(rng, (3001, 37), inputs, static=bool(inputs) and static) for static in (False, True))
    down = _layer(rng, (19, 3001), inputs)
    x = torch.from_numpy(rng.normal(size=(rows, 37)).astype(np.float32))
    if rows > 4:
        x[3, 5] = torch.nan
    hidden = first.of(x, "gelu")
    if gated:
        hidden = hidden * second.of(x)
    expected = down.of(hidden)
    found = packed_weight.feed_forward(x, first, down, second if gated else None, "gelu")
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert found.isnan().any(1).sum() == (rows > 4)


@needs_kernels
def test_products_that_do_not_fit_are_named():
    rng = np.random.default_rng(0)
    first, down, x = _layer(rng, (6, 5), "s8"), _layer(rng, (4, 6), "s8"), torch.zeros(2, 5)
    for arguments, message in (
        ((x, first, first), r"down must have 6 columns, but has shape \(6, 5\)"),
        ((x, first, down, down), r"second must have shape \(6, 5\), not \(4, 6\)"),
        ((x, first, down, None, "tanh"), "activation must be one of relu, .*, not 'tanh'"),
        ((x[:, :3], first, down), r"x must be a contiguous float32 tensor of shape \(2, 5\)"),
    ):
        with pytest.raises(DyBitError, match=message):
            packed_weight.feed_forward(*arguments)


@needs_kernels
@pytest.mark.parametrize(
    ("bias", "rounding", "message"),
    [
        (torch.zeros(3), InputRounding("s8"), r"bias must be .* of shape \(4,\)"),
        (torch.zeros(4).double(), InputRounding("s8"), "bias must be a contiguous float32 tensor"),
        (torch.zeros(4, device="meta"), InputRounding("s8"), "bias must be .* on the CPU"),
        (torch.zeros(8)[::2], InputRounding("s8"), "bias must be a contiguous"),
        (None, InputRounding("s8", reach=0.0), "reach must be positive, not 0.0"),
        (None, InputRounding("s8", torch.ones(1).bfloat16()), "scale must be a contiguous float32 tensor"),
        (None, InputRounding("s8", torch.ones(())), r"scale must be .* of shape \(1,\)"),
        (None, InputRounding("s8", torch.ones(1), torch.ones(1).half()), "offset must be a contiguous float32 tensor"),
    ],
)
def test_foreign_tensors_never_reach_the_kernels(bias, rounding, message):
    weight = portable(np.ones((4, 6), dtype=np.uint8), Format(4))
    packed = packed_weight.PackedWeight(weight, input_format("s8"), 0)
    with pytest.raises(DyBitError, match=message):
        packed.linear(torch.zeros(2, 6), bias, rounding)


@needs_kernels
@pytest.mark.parametrize("part", ["packed", "scale"])
@pytest.mark.parametrize("change", [lambda x: x.to(torch.int16), lambda x: x[:2], lambda x: x.to("meta")])
def test_foreign_weights_never_reach_the_kernels(part, change):
    weight = portable(np.ones((4, 6), dtype=np.uint8), Format(4))
    other = dataclasses.replace(weight, **{part: change(getattr(weight, part))})
    if part == "scale" and other.scale.dtype == torch.int16:
        return  # any type holds scales, which become float32
    with pytest.raises(DyBitError, match=r"must be a contiguous|weight must have"):
        packed_weight.PackedWeight(other, input_format("s8"), 0)


def _product(rows=64):
    rng = np.random.default_rng(0)
    weight = portable(rng.integers(0, 16, (700, 300), dtype=np.uint8), Format(4), 0.1)
    packed = packed_weight.PackedWeight(weight, input_format("s8r1"), 0)
    return packed.linear(
        torch.from_numpy(rng.normal(size=(rows, 300)).astype(np.float32)), None, InputRounding("s8r1", reach=1.9)
    )


@needs_kernels
@pytest.mark.usefixtures("three_threads")
def test_callers_at_the_same_time():
    expected = _product()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found.result(), expected) for found in [pool.submit(_product) for _ in range(20)])


def run_alone(program):
    """What a program prints in a process of its own, with no threads but those it starts."""
    head = """
import os, torch
torch.set_num_threads(3)
torch.ones(2000, 2000).sqrt()
before = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
import dybit
torch.manual_seed(0)
layer = dybit.quantize_(torch.nn.Sequential(torch.nn.Linear(300, 700)), dybit.Recipe(weights=4, activations="int8",
                        activation_mode="dynamic"))[0]
x = torch.randn(64, 300)
"""
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    # No operator of torch that takes threads in the child: those wait for ever.
    program = """
        expected = layer(x).detach().numpy()
        child = os.fork()
        if not child:
            os._exit(0 if (layer(x).detach().numpy() == expected).all() else 1)
        print(os.waitpid(child, 0)[1])
        """
    assert run_alone(program) == "0"


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads by /proc")
def test_no_threads_beside_those_of_torch():
    program = """
        layer(x)
        print(len(os.listdir("/proc/self/task")) - before)
        """
    assert run_alone(program) == "0"


def _exact(name, x):
    """Activations in double precision; GELU by the complementary error function, which keeps its digits below zero."""
    cubed = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    by_name = {
        "relu": np.maximum(x, 0),
        "gelu": x * (torch.special.erfc(torch.from_numpy(-x / np.sqrt(2))) / 2).numpy(),
        "gelu_tanh": x / (1 + np.exp(-2 * cubed)),
        "silu": x / (1 + np.exp(-x)),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
    }
    return by_name[name]


@needs_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize(("rows", "shape"), [(1, (700, 300)), (3, (17, 5)), (300, (700, 300)), (40, (1, 1))])
def test_activations(name, rows, shape):
    rng = np.random.default_rng(0)
    weight = portable(rng.integers(0, 16, shape, dtype=np.uint8), Format(4), 0.3)
    x = torch.from_numpy((rng.normal(size=(rows, shape[1])) * np.logspace(-3, 2, rows)[:, None]).astype(np.float32))
    for inputs in ("s8r1", ""):
        reach = {"reach": 1.9} if inputs else {}
        plain = run_all(weight, inputs, x, **reach).astype(np.float64)
        found = run_all(weight, inputs, x, activation=name, **reach)
        expected = _exact(name, plain)
        assert (np.abs(found - expected) <= 2e-7 * np.maximum(1, np.abs(expected))).all()


@needs_kernels
def test_activations_of_what_is_not_finite_are_those_of_torch():
    weight = portable(np.array([[1]], dtype=np.uint8), Format(4), 4.0)
    x = torch.tensor([[np.inf], [-np.inf], [np.nan], [-0.0], [3e38], [-3e38]])
    expected = {"relu": [np.inf, 0], "gelu": [np.inf, np.nan], "gelu_tanh": [np.inf, np.nan], "silu": [np.inf, np.nan]}
    for name, (above, below) in expected.items():
        found = run_all(weight, "", x, activation=name).ravel()
        np.testing.assert_array_equal(found, np.float32([above, below, np.nan, 0, 3e38, 0]), err_msg=name)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "x must be a contiguous float32"),
        (lambda x: x[:, :3], "x must be"),
        (lambda x: x.T.contiguous().T, "x must be a contiguous"),
        (lambda x: x[0], "x must be"),
    ],
)
def test_bad_inputs_are_named(change, message):
    packed = packed_weight.PackedWeight(portable(np.ones((4, 5), dtype=np.uint8), Format(4)), InputFormat())
    with pytest.raises(DyBitError, match=message):
        packed.linear(change(torch.zeros(3, 5)))
    with pytest.raises(DyBitError, match=r"activation must be one of relu, .*, not 'tanh'"):
        packed.linear(torch.zeros(3, 5), activation="tanh")


def test_integers_are_dybit_with_a_run_of_one():
    assert input_format("int8") == InputFormat(7, 1, True, 64.0)
    assert input_format("s8r1") == InputFormat(7, 1, True, 1.0)
    assert input_format("uint4") == InputFormat(4, 1, False, 8.0)
    assert input_format("nf4") is None
