"""Every instruction set in turn."""

import pytest

from dybit.kernels import extension
from kernels import ISAS


@pytest.fixture(params=ISAS)
def isa(request):
    before = extension.isa()
    extension.use(request.param)
    yield request.param
    extension.use(before)
