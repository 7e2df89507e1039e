"""The torch operators against the NumPy oracle, bit for bit."""

import numpy as np
import pytest
import torch
from helpers import numpy_round, numpy_round_dynamic
from torch.library import opcheck

from dybit.formats import catalogue, packing
from dybit.kernels import code_operators
from kernels import BOOKS

OPS = torch.ops.dybit
ONE = torch.ones(1)


@pytest.mark.parametrize("family", ["dybit2", "dybit3", "dybit4", "dybit5plain", "int6asym", "s7", "dybit8", "nf4"])
@pytest.mark.parametrize("group_size", [None, 5, 8])
@pytest.mark.parametrize("unit", ["tensor", "channel", "group"])
def test_dequantize_equals_the_oracle(family, group_size, unit):
    books = catalogue.family(family).books
    bits, count, rows = books[0].bits, 21, 4
    groups = -(-count // group_size) if group_size else 1
    shape = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, groups)}[unit]
    generator = np.random.default_rng(0)
    levels = [book.level_codes for book in books]
    choice = generator.integers(0, len(books), shape).astype(np.uint8)
    scale = generator.standard_normal(shape).astype(np.float32)

    def spread(units):
        wide = np.repeat(units, group_size or count, axis=1)[:, :count] if units.shape[1] > 1 else units
        return np.broadcast_to(wide, (rows, count))

    codes = np.array([[generator.choice(levels[b]) for b in row] for row in spread(choice)], dtype=np.uint8)
    values = np.stack([book.values for book in books]).astype(np.float32)[spread(choice), codes]
    packed = torch.from_numpy(packing.pack(codes, bits, group_size))
    arguments = (packed, torch.from_numpy(scale), torch.from_numpy(choice) if len(books) > 1 else None)
    arguments = (*arguments, family, count, bits, group_size or 0)
    assert np.array_equal(code_operators.dequantize(*arguments).numpy(), values * spread(scale))
    opcheck(OPS.dequantize.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_dequantize_no_rows(request):
    for _ in range(2):
        for name, bits, width in (("s4", 4, 6), ("s3", 3, 6), ("s8", 8, 11)):
            packed = torch.zeros(0, width, dtype=torch.uint8)
            assert code_operators.dequantize(packed, torch.ones(0, 3), None, name, 11, bits, 4).shape == (0, 11)
        request.getfixturevalue("plain_torch")


@pytest.mark.parametrize("name", ["s4", "u4", "s3r1mid", "s4r2spare", "nf4", "s8", "int8", "pot5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (1, 5), (3, 4, 9), (0, 4), (4, 0)])
def test_fake_quantize_equals_the_oracle(name, dtype, shape):
    book = BOOKS[name]
    x = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    for offset in (None, torch.tensor([-0.17])):
        result = code_operators.fake_quantize(x, torch.tensor([0.37]), offset, name)
        expected = numpy_round(x.float().numpy(), book, 0.37, None if offset is None else offset.item())
        assert result.dtype == dtype
        assert torch.equal(result, torch.from_numpy(expected).to(dtype))
    if x.numel():
        for group_size in (0, 2, 4):
            result = code_operators.fake_quantize_dynamic(x, name, 2.5, group_size)
            expected = numpy_round_dynamic(x.float().numpy(), book, 2.5, group_size or None)
            assert result.dtype == dtype
            assert torch.equal(result, torch.from_numpy(expected).to(dtype))
    else:
        assert code_operators.fake_quantize_dynamic(x, name, 2.5, 0).shape == shape


@pytest.mark.parametrize("name", ["s4", "u4", "s4r2mid", "nf4"])
def test_nan_stays_and_infinities_saturate_at_a_static_scale(name):
    book = BOOKS[name]
    x = torch.tensor([[1.0, np.nan, np.inf, -np.inf], [0.0, -np.nan, 1.0, 2.0]])
    ends = torch.tensor([book.levels[-1], book.levels[0]], dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        result = code_operators.fake_quantize(x.to(dtype), ONE, None, name)
        assert torch.isnan(result).tolist() == torch.isnan(x).tolist()
        assert torch.equal(result[0, 2:], ends.to(dtype))
        assert code_operators.fake_quantize_dynamic(x.to(dtype), name, 2.0, 0).isnan().all()


@pytest.mark.parametrize("name", ["s4", "u3", "s4r2mid", "s2mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_stay_zero(name, dtype):
    x = torch.zeros(2, 6, dtype=dtype)
    x[1, 1] = 1.0
    result = code_operators.fake_quantize_dynamic(x, name, 2.0, 0)
    # A format without a zero comes as close as float32 can.
    assert result[0].abs().max() <= 2.0**-126
    if 0 in BOOKS[name].levels:
        assert torch.equal(result[0], torch.zeros(6, dtype=dtype))
    tiny = torch.full((1, 3), float(np.finfo(np.float32).smallest_subnormal))
    assert code_operators.fake_quantize_dynamic(tiny, name, 8.0, 0).abs().max() <= 2.0**-126


def test_gradient_is_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(3, 8)
    (code_operators.fake_quantize(x, ONE, None, "s4") * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    x.grad = None
    (code_operators.fake_quantize_dynamic(x, "s4", 4.0, 3) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def layouts():
    x = torch.randn(2, 3, 4, 5)
    yield from (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, :1].expand(2, 3, 4, 5), x[:, ::2])


def test_opcheck():
    for x in layouts():
        for given in (x, x.clone().requires_grad_()):
            opcheck(OPS.fake_quantize.default, (given, ONE, None, "s4"))
            opcheck(OPS.fake_quantize.default, (given, ONE, -ONE, "nf4"))
            opcheck(OPS.fake_quantize_dynamic.default, (given, "s4", 4.0, 0))
            opcheck(OPS.fake_quantize_dynamic.default, (given, "nf4", 4.0, 2))


def test_compile_and_export():
    class Both(torch.nn.Module):
        def forward(self, x):
            y = torch.ops.dybit.fake_quantize(x.transpose(0, 1), torch.ones(1), None, "s4")
            return torch.ops.dybit.fake_quantize_dynamic(y, "nf4", 1.0, 2).reshape(-1)

    x = torch.randn(5, 6)
    expected = Both()(x)
    assert torch.equal(torch.compile(Both(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Both(), (x,)).module()(x), expected)
