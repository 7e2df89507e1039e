"""A few of the random models; `make fuzz` runs thousands."""

import pytest
import random_models


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_random_models(first):
    for number in range(first, first + 10):
        random_models.case(number)
