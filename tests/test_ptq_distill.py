import copy
import math

import pytest
import torch
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.fidelity import kl_divergence
from dybit.model import quantized_layers
from dybit.ptq import distill
from dybit.ptq.distill import distill_
from dybit.ptq.reconstruct import adaround_
from test_ptq_brecq import Network
from test_ptq_statistics import error, pair


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 11, 11) for _ in range(2)]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(distill, "_STEPS", 40)


def divergence(quantized, reference, data):
    with torch.no_grad():
        return sum(kl_divergence(reference(x), quantized(x)) for x in data)


@pytest.mark.parametrize(
    "recipe", [{}, {"activations": 8}, {"weights": "nf4", "group_size": 4}, {"scale": "pow2"}, {"weights": 2}]
)
def test_predictions_come_closer(network, data, recipe):
    quantized, reference = pair(network, data, **recipe)
    adaround_(quantized, reference, data)
    before = divergence(quantized, reference, data)
    quantized.stem.train()
    assert distill_(quantized, reference, data) is quantized
    assert divergence(quantized, reference, data) < before
    assert quantized.stem.training and not quantized.head.training
    assert not any("forward" in vars(layer) for layer in quantized_layers(quantized).values())
    assert not any(parameter.grad is not None for parameter in quantized.parameters())
    kept = {name: value.clone() for name, value in reference.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in reference.state_dict().items())


def test_values_come_closer(data):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    quantized, reference = pair(network, data)
    before = error(quantized, reference, data)
    distill_(quantized, reference, data)
    assert error(quantized, reference, data) < before


def test_progress_and_no_other_random_numbers(network, data):
    quantized, reference = pair(network, data)
    seen, state = [], torch.random.get_rng_state()
    distill_(quantized, reference, data, progress=lambda done, total, text: seen.append((done, total)))
    assert seen == [(done, 40) for done in range(41)]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_in_a_chain_and_in_a_checkpoint(network, data, tmp_path):
    chain = ["adaround", "distill"]
    model = dybit.quantize_(copy.deepcopy(network), dybit.Recipe(weights=3), data, algorithm=chain)
    dybit.save(model, tmp_path / "model")
    assert torch.equal(dybit.load(tmp_path / "model", Network())(data[0]), model(data[0]))


def test_rejects(network, data):
    quantized, reference = pair(network, data)
    with pytest.raises(DyBitError, match="NaN"):
        distill_(quantized, reference, [data[0] * math.nan])
    with pytest.raises(DyBitError, match="yields no batch"):
        distill_(quantized, reference, [])
    with pytest.raises(DyBitError, match="calibration batch 0"):
        distill_(quantized, reference, [data[0][:, :2]])
