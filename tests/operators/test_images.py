"""Images of significands against NumPy, on every instruction set and in plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.format import Format
from dybit.kernels import extension
from dybit.operators.images import ImageFormat, UnknownError, decode_image, round_image
from dybit.operators.input_rounding import InputRounding
from kernels import ISAS, by_torch

exact = settings(derandomize=True, deadline=None, max_examples=25)
INT8 = InputRounding("int8", torch.tensor([0.1]))


@pytest.fixture(autouse=True)
def _restore_isa():
    before = extension.isa()
    yield
    if before in ISAS:
        extension.use(before)


def on_all(compute):
    """What every instruction set computes, which must be one, and what plain torch does."""
    results = []
    for isa in ISAS:
        extension.use(isa)
        results.append(compute())
        assert torch.equal(results[-1][0], results[0][0]), isa
    plain = by_torch(compute)
    return (results or [plain])[0], plain


@pytest.mark.parametrize("name", ["u8r1", "s8r1", "s6r2", "u8r3", "s8", "u4"])
@exact
@given(st.integers(0, 2**32 - 1))
def test_images_hold_the_significands_of_the_oracle(name, seed):
    rng = np.random.default_rng(seed)
    fmt, scale = Format.parse(name), np.float32(rng.uniform(0.01, 2))
    channels, size = int(rng.integers(1, 70)), [int(n) for n in rng.integers(1, 6, 2)]
    border = tuple(int(n) for n in rng.integers(0, 3, 4))
    # values, ties, what lies beside them, and what saturates
    shape, steps = (2, channels, *size), np.diff(np.unique(fmt.values))
    x = ((rng.choice(fmt.values, shape) + rng.choice(steps, shape) / 2) * scale).astype(np.float32)
    x = np.where(rng.random(shape) < 0.3, np.nextafter(x, np.float32(9e9)), x)
    x = x * rng.choice([1, -1, 1e6], shape, p=[0.7, 0.2, 0.1])
    x = x.astype(np.float32)
    made = ImageFormat(name, border)
    rounding = InputRounding(name, torch.tensor([scale]))
    ((image,), (plain,)) = on_all(lambda: (round_image(torch.from_numpy(x), rounding, border),))
    assert torch.equal(image, plain) and image.dtype == made.dtype
    expected = np.zeros(made.shape(2, channels, size), dtype=np.int64)
    inner = expected[:, border[0] : border[0] + size[0], border[2] : border[2] + size[1], :channels]
    inner[:] = fmt.significands[fmt.encode(x / scale)].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(image.numpy(), expected)


@exact
@given(st.sampled_from(["int8", "uint8", "s8r1", "u8r1", "s4r1", "u3r1"]), st.integers(0, 2**32 - 1))
def test_rounding_next_to_ties_is_that_of_a_division(name, seed):
    rng = np.random.default_rng(seed)
    exponent = rng.choice([0, -20, 30, -98, -101, -120, 98, 101, 118])  # the last of each sign are divided
    scale = np.float32(rng.uniform(1, 2) * 2.0**exponent)
    offset = np.float32(0) if rng.integers(2) else np.float32(rng.uniform(-3, 3)) * scale
    made = ImageFormat(name, (0,) * 4)
    factor, unit = np.float32(made.inputs.factor), np.float32(made.unit * made.inputs.factor)
    high = 2**made.inputs.magnitude_bits - 1
    ties = np.repeat(np.arange(-257, 258) + 0.5, 7)
    with np.errstate(over="ignore", under="ignore"):
        x = (ties / made.unit * float(scale) + float(offset)).astype(np.float32)
        x = (x.view(np.int32) + np.tile(np.arange(-3, 4, dtype=np.int32), 515)).view(np.float32)
        x[~np.isfinite(x)] = 0
        x[:8] = [np.inf, -np.inf, 3e38, -3e38, 0, -0.0, 1e-45, -1e-38]
        expected = np.rint(np.clip((x - offset) / (scale * factor) * unit, -high * made.inputs.signed, high))
    rounding = InputRounding(name, torch.tensor([scale]), torch.tensor([offset]) if offset else None)
    given = torch.from_numpy(x.reshape(1, 7, 5, 103))
    for isa in ISAS:
        extension.use(isa)
        image = round_image(given, rounding, (0,) * 4)
        np.testing.assert_array_equal(image.movedim(-1, 1).numpy().ravel()[: x.size], expected, err_msg=isa)


@exact
@given(st.sampled_from(["s8r2", "u8r2", "s8r4", "u8r7", "s5r3", "u3r2", "u4"]), st.integers(0, 2**32 - 1))
def test_rounding_to_tapered_levels_is_that_of_a_division(name, seed):
    rng = np.random.default_rng(seed)
    fmt = Format.parse(name)
    scale = np.float32(rng.uniform(1, 2) * 2.0 ** rng.choice([0, -20, 30, -90, -101, 90, 101]))
    levels = np.unique(fmt.values)
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, [levels[-1] * 1.5, -levels[-1] * 3]])
    x = np.repeat((points * np.float64(scale)).astype(np.float32), 7)  # and what lies beside them
    x = (x.view(np.int32) + np.tile(np.arange(-3, 4, dtype=np.int32), points.size)).view(np.float32)
    x[~np.isfinite(x)] = 0
    with np.errstate(over="ignore", under="ignore"):
        expected = fmt.significands[fmt.encode(x / scale)]
    rounding, given = InputRounding(name, torch.tensor([scale])), torch.from_numpy(x.reshape(1, 1, 1, -1))
    for isa in ISAS:
        extension.use(isa)
        found = round_image(given, rounding, (0,) * 4)
        np.testing.assert_array_equal(found.numpy().ravel(), expected, err_msg=isa)


@pytest.mark.parametrize("name", ["u8r1", "u8r3", "uint8", "u4r2", "int8"])
@pytest.mark.parametrize("channels", [3, 20])
def test_a_border_holds_the_code_of_zero(name, channels):
    made, scale = ImageFormat(name, (1, 0, 2, 1)), torch.tensor([0.03])
    level = float(np.unique(np.abs(catalogue.family(name).books[0].levels))[5])
    rounding = InputRounding(name, scale, -level * scale)
    x = torch.randn(2, channels, 5, 4)
    ((image,), (plain,)) = on_all(lambda: (round_image(x, rounding, made.border),))
    assert torch.equal(image, plain)
    whole = decode_image(image, channels, ImageFormat(name, (0,) * 4), rounding)
    expected = torch.nn.functional.pad(rounding.round(x), (2, 1, 1, 0))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)


def test_opcheck():
    rounding = (torch.randn(2, 20, 5, 4), torch.tensor([0.02]), None, "int8", (1, 0, 2, 1))
    torch.library.opcheck(torch.ops.dybit.round_image, rounding)


def test_nan_is_refused_and_infinity_saturates():
    x = torch.ones(1, 5, 3, 3)
    x[0, 2, 1, 1] = float("nan")
    with pytest.raises(UnknownError, match="NaN"):
        round_image(x, INT8, (0,) * 4)
    x[0, 2, 1, 1] = float("inf")
    assert round_image(x, INT8, (0,) * 4).max() == 127


def test_values_of_an_image():
    rounding = InputRounding("u8r3", torch.tensor([0.07]), torch.tensor([-0.4]))
    x = torch.rand(2, 3, 5, 4)
    image = round_image(x, rounding, (0,) * 4)
    made = ImageFormat("u8r3", (0,) * 4)
    torch.testing.assert_close(decode_image(image, 3, made, rounding), rounding.round(x), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_an_image():
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(DyBitError, match="border must be zero if the offset leaves 0 without a code"):
        round_image(x, InputRounding("int8", torch.ones(1), torch.full((1,), 0.5)), (1,) * 4)
    with pytest.raises(DyBitError, match="rounding must have a static scale"):
        ImageFormat("int8", (0,) * 4).rounded(InputRounding("int8"))
    with pytest.raises(DyBitError, match="x must be floating point of 4 dimensions"):
        round_image(x[0], INT8, (0,) * 4)


def test_the_image_of_an_empty_sample_is_its_border():
    image = round_image(torch.ones(1, 4, 0, 5), INT8, (1,) * 4)
    assert image.shape == (1, 2, 7, 4) and not image.any()
