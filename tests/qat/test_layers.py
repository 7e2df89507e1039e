"""Layers in training against the packed ones bit for bit, and with what else wraps layers."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, build, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import RECIPES, batches, mlp, train

from dybit import DyBitError, Recipe, convert_, prepare_qat_
from dybit.layers.quantized import quantized_layers
from dybit.qat.layers import prepared_layers

pytestmark = [
    pytest.mark.usefixtures("plain_torch"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),  # torch, of a layer of helpers.LAYERS
]

CASES = [(name, recipe) for name in LAYERS for recipe in ("w4a4", "w3_groups")]
CASES += [(name, recipe) for name in ("linear", "conv2d", "transposed2d", "encoder") for recipe in RECIPES]


@pytest.mark.parametrize(("name", "recipe"), dict.fromkeys(CASES))
def test_the_converted_model_computes_what_training_saw(name, recipe):
    recipe = RECIPES[recipe]
    calibration = [inputs(name, seed) for seed in (5, 6)] if recipe.scale else None  # else training observes
    model = build(name)
    before = dict(model.named_parameters())
    assert prepare_qat_(model, recipe, calibration, observe=1, refresh_every=2) is model
    assert not model.training
    assert all(dict(model.named_parameters())[key] is value for key, value in before.items())
    train(model, [inputs(name, seed) for seed in (1, 2)])
    arguments = inputs(name, 9)
    with torch.no_grad():
        expected = model(*arguments)
        assert convert_(model) is model
        assert torch.equal(model(*arguments), expected)
    assert bool(torch.isfinite(expected).all())
    assert quantized_layers(model) and not prepared_layers(model)


def test_copies_and_pickles_train_on():
    model = prepare_qat_(build("attention"), RECIPES["w4a4"], [inputs("attention")])
    train(model, [inputs("attention")])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(*inputs("attention")), model(*inputs("attention")))
        train(twin, [inputs("attention", 2)])
        assert not torch.equal(twin.attention.in_proj_weight, model.attention.in_proj_weight)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_tied_weights_stay_tied():
    model = prepare_qat_(build("tied"), Recipe(weights=4, embeddings=4, variants="all"), refresh_every=1)
    assert model.embedding.weight_quantizer is model.head.weight_quantizer
    for twin in (model, copy.deepcopy(model).bfloat16().float()):
        train(twin, [inputs("tied", seed) for seed in (1, 2)])
        assert twin.head._parameters["weight"] is twin.embedding._parameters["weight"]
        assert int(twin.head.weight_quantizer.passes) == 2
        assert torch.equal(twin.head.weight, twin.embedding.weight)
        convert_(twin)
        assert twin.head._buffers["weight"] is twin.embedding._buffers["weight"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    data = batches(5)
    results = []
    for checkpointed in (False, True):
        model = prepare_qat_(mlp(), Recipe(weights=3, activations=4, variants="all"), observe=3, refresh_every=2)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        model.train()
        for (x,) in data:
            optimizer.zero_grad()
            x = x.clone().requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            y.square().sum().backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert int(results[1]["0.weight_quantizer.passes"]) == 5


def test_autocast_and_half_precision():
    data = batches(4)
    model = prepare_qat_(mlp(), RECIPES["w4a4"], [data[0][0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for (x,) in data:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    assert half[0]._parameters["weight"].dtype == torch.bfloat16
    assert half[0].weight_quantizer.log_scale.dtype == torch.float32
    x = data[0][0].bfloat16()
    half(x).sum().backward()
    half.eval()
    with torch.no_grad():
        expected = half(x)
        assert expected.dtype == torch.bfloat16 and torch.equal(convert_(half)(x), expected)


def work(folder):
    """One of two processes that train on different halves of the data, with calibration and without."""
    torch.set_num_threads(1)
    group = torch.distributed
    group.init_process_group("gloo")
    rank = group.get_rank()
    try:
        for observe in (False, True):
            data = batches(6)
            recipe = Recipe(weights=3, activations=4, variants="all")
            model = prepare_qat_(
                mlp(), recipe, None if observe else [data[0][0]], observe=2, refresh_every=3, hysteresis=0.0
            )
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
            for (x,) in data:
                optimizer.zero_grad()
                wrapped(x[rank::2] if observe else x[4 * rank : 4 * rank + 4]).square().sum().backward()
                optimizer.step()
            wrapped(data[0][0])  # copies the buffers once more
            torch.save(model.eval().state_dict(), f"{folder}/{observe}{rank}.pt")
    finally:
        group.destroy_process_group()


def test_two_processes_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    support = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240, env=support)
    assert done.returncode == 0, done.stderr
    for observe in (False, True):
        first, second = (torch.load(tmp_path / f"{observe}{rank}.pt") for rank in range(2))
        assert first and all(torch.equal(first[key], second[key]) for key in first)
        assert int(first["0.weight_quantizer.passes"]) == 7
        model = prepare_qat_(mlp(), Recipe(weights=3, activations=4, variants="all"))
        model.load_state_dict(first)
        with torch.no_grad():
            expected = model(*batches(1)[0])
            assert torch.equal(convert_(model)(*batches(1)[0]), expected)


def test_what_layers_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_qat_(mlp(), RECIPES["w4a4"], [batches(1)[0][0]])
    assert "PreparedLinear" in repr(model) and "dybit4spare/channel" in repr(model)
    assert "seen=0" in repr(prepare_qat_(mlp(), RECIPES["w4a4"]))


if __name__ == "__main__":
    work(sys.argv[1])


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "parametrization": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "pruning": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "removal": lambda layer: delattr(layer, "weight"),
    "none": lambda layer: setattr(layer, "weight", None),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_norms_and_pruning_of_a_layer_in_training_are_refused(norm):
    layer = prepare_qat_(nn.Sequential(nn.Linear(8, 6)), Recipe(weights=4))[0]
    x = torch.randn(2, 8)
    before, expected = {key: value.clone() for key, value in layer.state_dict().items()}, layer(x)
    with pytest.raises(DyBitError, match="weight of a layer in training cannot be"):
        norm(layer)
    assert torch.equal(layer(x), expected)
    assert layer.state_dict().keys() == before.keys() and not layer._forward_pre_hooks


def test_a_parametrized_bias_is_copied_and_not_pickled():
    layer = prepare_qat_(nn.Sequential(nn.Linear(8, 6)), Recipe(weights=4))[0]
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    with pytest.raises(DyBitError, match="ParametrizedPreparedLinear cannot be pickled"):
        pickle.dumps(layer)
