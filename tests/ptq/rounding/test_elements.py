"""Elements of a weight against rounding each by NumPy's codebooks."""

import numpy as np
import pytest
import torch
from helpers import numpy_units

from dybit.formats import catalogue
from dybit.ptq.rounding.elements import Elements, Tables
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
from dybit.tensors.scale_search import Scales


@pytest.mark.parametrize("name", ["dybit4", "ant4", "nf3", "dybit8", "s2spare"])
def test_places_are_the_nearest_levels_of_the_chosen_codebook(name):
    family = catalogue.family(name)
    tables = Tables(family)
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=4096) * 2, dtype=torch.float32)
    choice = torch.tensor(rng.integers(len(family.books), size=4096))
    places = tables.places(x, choice, tables.bounds(choice))
    for index, book in enumerate(family.books):
        mine = choice == index
        codes = book.encode(x[mine].numpy())
        assert np.array_equal(tables.codes(places)[mine].numpy(), codes)
        assert np.array_equal(tables.levels[places][mine].numpy(), book.values[codes].astype(np.float32))


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("parts", [1, 3])
def test_rounding_every_column_to_itself_is_rounding_to_the_nearest(granularity, parts):
    torch.manual_seed(0)
    matrix = torch.randn(6, 20)
    group = 8 if granularity == "group" else None
    nearest = quantize(matrix, TensorSpec("dybit4", (6, 20), granularity, group, "fp32", granularity))
    elements = Elements(matrix, nearest.spec, Scales(nearest.scales(), nearest.choices(), 1.0, 0.0), parts)
    assert torch.equal(elements.rows(elements.weight), matrix)
    for column in range(20):
        elements.round(column, elements.weight[:, column])
    packed = elements.packed()
    assert torch.equal(packed.codes(), nearest.codes()) and torch.equal(packed.dequantize(), nearest.dequantize())
    error = matrix - nearest.dequantize()
    torch.testing.assert_close(elements.rows(elements.error), error)
    hessian = torch.eye(20).expand(parts, 20, 20)
    assert elements.loss(hessian) == pytest.approx(float(error.square().sum()), rel=1e-5)
    scale = torch.tensor(numpy_units(nearest.scales().numpy(), nearest.spec).copy())
    torch.testing.assert_close(elements.rows(elements.scale), scale.expand(6, 20).float())
