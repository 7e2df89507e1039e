import copy
import warnings

import torch
from fused_networks import network

import dybit
from dybit import fuse
from dybit.runtime.image_fusion import Fused
from dybit.runtime.image_layers import FusedConv


def test_nan_comes_out_as_the_model_gives_it():
    model, x = network(), torch.randn(2, 3, 19, 17)
    fused = fuse(model)
    x[1, 2, 7, 8] = float("nan")
    with torch.no_grad():
        found = fused(x)
        assert found[1].isnan().all() and not found[0].isnan().any()
        torch.testing.assert_close(found, model(x), equal_nan=True)
        model.project.bias[3] = float("nan")  # one that arises in the middle
        assert fused(torch.randn(1, 3, 19, 17)).isnan().all()


def test_changes_of_the_model_are_seen():
    model, x = network(), torch.randn(1, 3, 19, 17)
    fused = fuse(model)
    with torch.no_grad():
        before = fused(x)
        model.expand.weight_scale.mul_(1.5)
        model.left.bias.add_(0.3)
        assert torch.equal(fused(x), model(x)) and not torch.equal(fused(x), before)
        twin = copy.deepcopy(fused)
        assert torch.equal(twin(x), fused(x)) and all(
            m._prepared is None or m for m in twin.modules() if isinstance(m, FusedConv)
        )


def test_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(dybit.fuse(network()), Fused)
