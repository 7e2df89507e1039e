"""A handful of the architectures; `make fuzz` runs all."""

import architectures
import pytest
import torch


@pytest.fixture(autouse=True)
def quiet():
    architectures.transformers.logging.disable_progress_bar()
    architectures.transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", ["Llama4Text", "Marian", "ResNet", "Wav2Vec2", "XLMRoberta"])
def test_architectures(name):
    """Position tables that are made anew, folded norms, normed weights, a head that comes before its table."""
    torch.manual_seed(0)
    rounding = "equal up to rounding: quantize_ folds batch norms, loading does not"
    assert architectures.check(name) == (rounding if name == "ResNet" else "equal")
