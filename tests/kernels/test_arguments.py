"""What reaches the compiled kernels: tensors of the right type, shape, layout and device, and nothing else."""

import pytest
import torch

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.format import variants
from dybit.kernels import arguments, codes, extension, rounding, scale_errors
from kernels import ISAS, by_torch

needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels")


def test_addresses():
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert arguments.address("x", x, torch.float32, (3, 4)) == x.data_ptr()
    assert arguments.address("x", x[1:], torch.float32, (2, 4)) == x.data_ptr() + 16
    assert arguments.address("bias", None, torch.float32, (3, 4)) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3, 4, dtype=torch.float64), r"torch.float64 of shape \(3, 4\) on cpu"),
        (torch.ones(3, 4, dtype=torch.int32), "torch.int32 of shape"),
        (torch.ones(4, 3), r"torch.float32 of shape \(4, 3\)"),
        (torch.ones(12), r"torch.float32 of shape \(12,\)"),
        (torch.ones(4, 3).T, r"torch.float32 of shape \(3, 4\)"),
        (torch.ones(3, 4, device="meta"), r"torch.float32 of shape \(3, 4\) on meta"),
    ],
    ids=["dtype", "integers", "shape", "rank", "strides", "device"],
)
def test_what_has_no_address(given, said):
    with pytest.raises(
        DyBitError, match=r"y must be a contiguous float32 tensor of shape \(3, 4\) on the CPU, not " + said
    ):
        arguments.address("y", given, torch.float32, (3, 4))


@needs_kernels
def test_what_the_kernels_are_asked_for(plain_torch, monkeypatch):
    assert arguments.kernels_for() is None
    monkeypatch.undo()
    x = torch.ones(3)
    assert arguments.kernels_for(x, None, torch.nn.Parameter(x)) is extension.load()
    assert arguments.kernels_for(x, x.to("meta")) is None
    assert arguments.kernels_for(x.as_subclass(type("Mine", (torch.Tensor,), {}))) is None
    assert torch.compile(lambda x: x + (arguments.kernels_for(x) is None), backend="eager")(x)[0] == 2


def foreign(tensor):
    """The tensor with other types, shapes, strides and devices, none of which the kernels may read as it is."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8):
        if dtype != tensor.dtype:
            yield tensor.to(dtype)
    yield tensor.to("meta")
    yield tensor[..., :-1].contiguous()
    yield tensor[:0]
    yield torch.cat([tensor, tensor])[::2]
    yield tensor[None]
    yield tensor.reshape(-1)


TABLE, OWNERS = torch.rand(64, 12), [(0, 5), (5, 12)]
SUMS = ("pass_through", "fit", "search", "search_all", "coarse")  # added up in different orders
BOOK = catalogue.family("s4r2").books[0]
ENTRIES = {
    "fake_quantize": (
        lambda x, scale, offset: rounding.fake_quantize(x, scale, offset, BOOK),
        lambda: (torch.randn(6, 40), torch.rand(6, 1) + 0.1, torch.rand(1)),
    ),
    "fake_quantize_dynamic": (
        lambda x: rounding.fake_quantize_dynamic(x, BOOK, 1.7, 16),
        lambda: (torch.randn(6, 40),),
    ),
    "round_chosen": (
        lambda x, scale, choice: rounding.round_chosen(x, scale, choice, variants(4)),
        lambda: (torch.randn(6, 40), torch.rand(6, 1) + 0.1, torch.arange(6, dtype=torch.uint8)[:, None]),
    ),
    "pass_through": (
        lambda x, grad, rounded, scale, choice: rounding.pass_through(x, grad, rounded, scale, variants(4), choice),
        lambda: (
            *torch.randn(3, 6, 40),
            torch.rand(6, 1),
            torch.arange(6, dtype=torch.uint8)[:, None],
        ),
    ),
    "encode": (
        lambda x, scale, choice: codes.encode(x, scale, choice, variants(4), 16),
        lambda: (torch.randn(6, 40), torch.rand(6, 3) + 0.1, torch.randint(9, (6, 3), dtype=torch.uint8)),
    ),
    "decode": (
        lambda packed, scale, choice: codes.decode(packed, scale, choice, variants(4), 40, 16),
        lambda: (
            torch.randint(256, (6, 20), dtype=torch.uint8),
            torch.rand(6, 3) + 0.1,
            torch.randint(9, (6, 3), dtype=torch.uint8),
        ),
    ),
    "fit": (
        lambda x, weights, scale: scale_errors.fit(BOOK, x, weights, scale),
        lambda: (torch.randn(6, 40), torch.rand(6, 40), torch.rand(6, 1) + 0.1),
    ),
    "search": (
        lambda x, weights: scale_errors.CoarseTable(TABLE, OWNERS).search([(x, weights)], False, 2),
        lambda: (torch.rand(6, 40), torch.rand(6, 40)),
    ),
    "search_all": (
        lambda x, weights: scale_errors.CoarseTable(TABLE, OWNERS).search([(x, weights)], True, 2),
        lambda: (torch.rand(6, 40), torch.rand(6, 40)),
    ),
    "coarse": (
        lambda table: scale_errors.CoarseTable(table, OWNERS).search([(torch.full((2, 9), 0.5), None)], False, 2),
        lambda: (torch.rand(64, 12),),
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", ENTRIES)
def test_foreign_tensors_never_reach_the_kernels(name, isa):
    """Each is refused, or gives what plain torch makes of it; torch itself refuses what fits nothing."""
    entry, make = ENTRIES[name]
    given = make()
    refused = 0
    for place in range(len(given)):
        for other in foreign(given[place]):
            arguments = (*given[:place], other, *given[place + 1 :])
            try:
                found = entry(*arguments)
            except DyBitError as error:
                refused += 1
                assert any(
                    words in str(error) for words in ("must be a contiguous", "choice must be below", "number of rows")
                )
            except (RuntimeError, ValueError, IndexError):
                assert other.is_meta or other.shape != given[place].shape
            else:
                expected = by_torch(lambda arguments=arguments: entry(*arguments))
                pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
                for a, b in pairs:
                    assert a.shape == b.shape and a.is_meta == b.is_meta
                    assert a.is_meta or name in SUMS or torch.equal(a, b)
    assert refused or name.startswith("fake_quantize")  # which converts every type
