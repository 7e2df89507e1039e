import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from dybit.errors import DyBitError
from dybit.tensors.hadamard import hadamard, orthogonal_factor, rotate, walsh


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 56, 60, 72, 76, 108])
def test_hadamard_matrices(order):
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_orders_without_a_construction():
    assert [order for order in (3, 6, 7, 52, 92) if hadamard(order) is not None] == []


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_walsh_is_sylvesters_matrix(size):
    x = torch.randn(3, 2, size, dtype=torch.float64)
    expected = x.numpy() @ (sylvester(size) / np.sqrt(size))
    np.testing.assert_allclose(walsh(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("size", "order"), [(64, 1), (576, 36), (1536, 12), (80, 20), (7, 7), (14, 7), (11008, 43)])
def test_factors(size, order):
    factor = orthogonal_factor(size, torch.Generator().manual_seed(0))
    assert factor.shape == (order, order)
    torch.testing.assert_close(factor @ factor.T, torch.eye(order), atol=1e-5, rtol=0)


def test_sizes_without_a_rotation():
    with pytest.raises(DyBitError, match="size=1046 has no rotation: its odd part 523 is above 512"):
        orthogonal_factor(2 * 523, torch.Generator())


@given(power=st.integers(0, 6), odd=st.sampled_from([1, 3, 5, 7, 9, 11]), seed=st.integers(0, 99))
def test_rotation_is_the_dense_product(power, odd, seed):
    size, generator = odd << power, torch.Generator().manual_seed(seed)
    factor = orthogonal_factor(size, generator)
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    walsh_part = torch.tensor(sylvester(size // factor.shape[0]) / np.sqrt(size // factor.shape[0]))
    dense = torch.kron(factor.double(), walsh_part) * signs
    x = torch.randn(4, size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, factor, signs), x @ dense.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x, factor, signs, inverse=True), x @ dense, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_the_type():
    factor, signs = orthogonal_factor(24, torch.Generator().manual_seed(0)), torch.ones(24)
    x = torch.randn(5, 24).bfloat16()
    turned = rotate(x, factor, signs)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(rotate(turned, factor, signs, inverse=True), x, atol=0.05, rtol=0.05)
