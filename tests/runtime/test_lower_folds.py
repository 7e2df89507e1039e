"""Pooling, means, sums and norms as kernels: the numbers of torch in every layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check
from torch.nn import functional

from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

pytestmark = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3)},
        {"kernel_size": 2, "stride": (1, 2), "dilation": 2, "ceil_mode": True},
    ],
)
def test_max_pooling(options):
    x = torch.randn(2, 5, 9, 8)
    x[0, 1, 3, 3] = torch.nan
    for images in (x, x.to(memory_format=torch.channels_last)):
        check(lambda x: functional.max_pool2d(x, **options), images, steps=["max_pool"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "count_include_pad": False},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 2, "divisor_override": 3},
    ],
)
def test_average_pooling(options):
    x = torch.randn(2, 5, 9, 8)
    for images in (x, x.to(memory_format=torch.channels_last)):
        check(lambda x: functional.avg_pool2d(x, **options), images, steps=["average_pool"])


@pytest.mark.parametrize("size", [1, (3, 1), (2, 5), (9, 8)])
def test_adaptive_pooling(size):
    x = torch.randn(2, 5, 9, 8)
    for images in (x, x.to(memory_format=torch.channels_last)):
        # Strides of torch's own results are arbitrary where a size is 1.
        steps = ["adaptive_average_pool", "sum"]
        check(lambda x: functional.adaptive_avg_pool2d(x, size).sum((2, 3)), images, steps=steps)
        if size != 1:
            check(lambda x: functional.adaptive_avg_pool2d(x, size), images, steps=steps[:1])


@settings(max_examples=25)
@given(st.data())
def test_sums_means_and_norms_over_dimensions(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    x = torch.randn(shape)
    if data.draw(st.booleans()):
        x = x.permute(data.draw(st.permutations(range(x.ndim))))
    dims = data.draw(st.lists(st.integers(-x.ndim, x.ndim - 1), max_size=x.ndim, unique_by=lambda d: d % x.ndim))
    keep = data.draw(st.booleans())
    check(lambda x: x.mean(dims, keep), x)
    check(lambda x: x.sum(dims, keep), x)
    check(lambda x: torch.linalg.vector_norm(x, 2, dims or None, keep), x)


def test_folds_are_kernels():
    x = torch.randn(3, 7, 24)
    for dim in (1, 2, -1, (0, 1), (1, 2), (0, 1, 2)):
        check(lambda x: x.mean(dim), x, steps=["mean"])  # noqa: B023
        check(lambda x: x.sum(dim, keepdim=True), x, steps=["sum"])  # noqa: B023
    check(lambda x: functional.normalize(x, dim=-1), x, steps=["linalg_vector_norm", "clamp_min", "div"])
    check(lambda x: torch.linalg.vector_norm(x, dim=1), x, steps=["torch:aten.linalg_vector_norm.default"])
    check(lambda x: torch.linalg.vector_norm(x, 1, dim=2), x, steps=["torch:aten.linalg_vector_norm.default"])
    check(lambda x: x.mean(1), x.double(), steps=["torch:aten.mean.dim"])
    images = torch.randn(2, 5, 4, 3)
    for given_images in (images, images.to(memory_format=torch.channels_last)):
        check(lambda x: x.mean((2, 3)), given_images, steps=["mean"])
        check(lambda x: x.mean((2, 3), keepdim=True), given_images, steps=["mean"])


@pytest.mark.usefixtures("restore_isa")
def test_all_sets_give_the_same_bits():
    x, results = torch.randn(5, 131), []
    for isa in extension.available():
        if isa != extension.FALLBACK:
            extension.use(isa)
            results.append(FusedProgram(Folds().eval(), (x,), {})(x))
    assert all(torch.equal(y, results[0]) for y in results)


class Folds(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.sum(-1), x.mean(-1), torch.linalg.vector_norm(x, dim=-1)])
