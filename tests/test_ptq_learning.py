import pytest
import torch
from torch import nn

from dybit.ptq import learning
from dybit.ptq.learning import learn_
from test_ptq_statistics import pair


def setting():
    """A quantized linear layer, its original, and the squared error of its outputs."""
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    quantized, reference = pair(nn.Sequential(nn.Linear(12, 5)), [x], weights=3)
    target = reference(x).detach()
    return quantized, reference, lambda: (quantized(x) - target).square().mean()


def run(quantized, reference, loss, steps=60):
    generator = torch.Generator().manual_seed(0)
    return learn_(
        [(quantized[0], reference[0])],
        lambda _: loss(),
        1,
        lambda: float(loss().detach()),
        steps=steps,
        generator=generator,
    )


def test_an_error_that_falls_is_kept():
    quantized, reference, loss = setting()
    before, codes = float(loss().detach()), quantized[0].get_buffer("weight").clone()
    assert run(quantized, reference, loss) is True
    assert float(loss().detach()) < before
    # Codes go to a neighbour at most: what is stored are still values of the format.
    assert quantized[0].get_buffer("weight").shape == codes.shape


def test_what_got_worse_is_left(monkeypatch):
    monkeypatch.setattr(learning, "_FINE_RATE", 10.0)
    quantized, reference, loss = setting()
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    assert run(quantized, reference, loss, steps=5) is False
    after = quantized.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_learning_goes_back_to_the_layers_own_forward_after_a_failure():
    quantized, reference, loss = setting()

    def failing(_):
        raise RuntimeError("no")

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="no"):
        learn_([(quantized[0], reference[0])], failing, 1, lambda: 1.0, steps=1, generator=generator)
    assert "forward" not in vars(quantized[0])
    assert torch.isfinite(loss())
