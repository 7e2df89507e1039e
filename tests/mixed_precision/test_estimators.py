"""Tests of the estimates, each against its definition computed in another way."""

import math

import numpy as np
import pytest
import torch
from helpers import numpy_weight, rounded_input
from searched import batches, mlp, mlp_batches, net
from torch import nn

from dybit import Candidate, Recipe
from dybit.mixed_precision.estimators import ESTIMATORS, Twins
from dybit.mixed_precision.measured_model import Subject


def one(name, subject, layer, candidate):
    cells = [(layer, candidate)]
    return ESTIMATORS[name](subject, cells)(Twins(subject).of(layer, candidate), layer)


def test_rmse_by_numpy():
    subject = Subject(mlp(), mlp_batches())
    twin = Twins(subject).of("0", Candidate(3, 4))["0"]
    weight = mlp()[0].weight.detach().numpy().astype(np.float64)
    expected = np.sqrt(np.mean((numpy_weight(twin.quantized_tensor()) - weight) ** 2)) / weight.std()
    x = torch.cat(mlp_batches())
    expected += float((rounded_input(twin, x) - x).double().square().mean().sqrt() / x.double().std(correction=0))
    assert one("rmse", subject, "0", Candidate(3, 4)) == pytest.approx(expected, rel=1e-5)


def test_output_of_a_linear_layer():
    subject = Subject(mlp(), mlp_batches())
    x = torch.cat(mlp_batches()).double()
    weight = subject.layers["0"].weight.double()
    twin = Twins(subject).of("0", Candidate(3))["0"]
    noise = (x @ (twin.weight.double() - weight).T).square().sum()
    signal = (x @ weight.T + subject.layers["0"].bias).square().sum()
    assert one("output", subject, "0", Candidate(3)) == pytest.approx(float(noise / signal), rel=1e-4)


def test_kl_of_the_whole_model():
    subject = Subject(mlp(), mlp_batches())
    model = mlp()
    model[0].weight.data.copy_(Twins(subject).of("0", Candidate(3))["0"].weight)
    # A small difference of large sums, which the kernels and torch add up in different orders.
    assert one("kl", subject, "0", Candidate(3)) == pytest.approx(subject.judge.error(model), rel=1e-3)


def test_fisher_is_close_to_kl_where_errors_are_small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    subject = Subject(model, [torch.randn(256, 12) for _ in range(4)])
    for candidate in (Candidate(6), Candidate(5, 8)):
        for layer in subject.layers:
            ratio = one("fisher", subject, layer, candidate) / one("kl", subject, layer, candidate)
            assert 0.3 < ratio < 3


def test_fisher_of_inputs():
    """Weights in floating point, values out: the error of the input through a linear layer, exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64, bias=False)).eval()
    subject = Subject(nn.Sequential(model, nn.Unflatten(-1, (8, 8, 1))).eval(), [torch.randn(512, 8)])
    exact = one("kl", subject, "0.0", Candidate(None, 4))
    assert one("fisher", subject, "0.0", Candidate(None, 4)) == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize("name", ["rmse", "output", "fisher", "kl"])
def test_narrower_is_worse_everywhere(name):
    subject = Subject(net(), batches())
    candidates = [Candidate(8, 8), Candidate(4, 8), Candidate(2, 2)]
    cells = [(layer, c) for layer in subject.layers for c in candidates]
    estimator, twins = ESTIMATORS[name](subject, cells), Twins(subject)
    for layer in subject.layers:
        errors = [estimator(twins.of(layer, c), layer) for c in candidates]
        assert 0 < errors[0] < errors[1] < errors[2] and math.isfinite(errors[2]), (layer, errors)
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())


@pytest.mark.parametrize("name", ["rmse", "output", "fisher", "kl"])
def test_dynamic_inputs(name):
    subject = Subject(net(), batches(), Recipe(activation_mode="dynamic"))
    assert one(name, subject, "conv", Candidate(8, 2)) > one(name, subject, "conv", Candidate(8, 8)) > 0


def test_weights_are_quantized_once_for_several_inputs(monkeypatch):
    import dybit.ptq.rounding.nearest as rounding

    calls, original = [], rounding.quantize
    monkeypatch.setattr(rounding, "quantize", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    twins = Twins(Subject(mlp(), mlp_batches()))
    for inputs in (8, 4, None):
        twins.of("0", Candidate(4, inputs))
    assert len(calls) == 1
