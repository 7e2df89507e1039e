"""What was made from tensors holds as long as they are the same, unwritten; and it goes when they go."""

import gc

import pytest
import torch
from torch import nn

import dybit
from dybit.kernels import extension
from dybit.operators.packed_cache import PackedCache, Snapshot, ordinary
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
from kernels import ISAS


def tensors():
    return {"scale": torch.ones(3), "choice": None, "": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x["scale"].add_(1),
        lambda x: x[""].copy_(torch.ones(2, 2)),
        lambda x: x[""][0].zero_(),  # through a view
        lambda x: setattr(x["scale"], "data", torch.ones(3)),
        lambda x: x["scale"].set_(torch.ones(3)),
        lambda x: x.update(scale=x["scale"].clone()),
        lambda x: x.update(choice=torch.ones(1)),
        lambda x: x.update({"": None}),
        lambda x: x.pop("scale"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_snapshot_sees_writes(write, inference):
    parts = tensors()
    snapshot = Snapshot(parts)
    assert snapshot.holds(parts) and snapshot.holds({**parts, "other": torch.ones(1)}) and snapshot.alive
    with torch.inference_mode(inference), torch.no_grad():
        write(parts)
    assert not snapshot.holds(parts)


def test_a_snapshot_keeps_nothing_alive():
    parts = tensors()
    snapshot = Snapshot(parts)
    parts["scale"] = torch.ones(3)
    gc.collect()
    assert not snapshot.alive and not snapshot.holds(parts)
    assert Snapshot({}).holds({}) and Snapshot({}).alive


@pytest.mark.skipif(len(ISAS) < 2, reason="needs two instruction sets")
def test_a_snapshot_is_for_the_kernels_that_ran():
    parts, before = tensors(), extension.isa()
    snapshot = Snapshot(parts)
    try:
        extension.use(next(name for name in ISAS if name != before))
        assert not snapshot.holds(parts)
    finally:
        extension.use(before)
    assert snapshot.holds(parts)


def test_tensors_of_inference_mode_are_not_trusted():
    with torch.inference_mode():
        made = torch.ones(3)
        assert not Snapshot({"x": made}).holds({"x": made})
        usual = ordinary(made)
        assert not usual.is_inference() and torch.equal(usual, made)
        snapshot = Snapshot({"x": usual})
        assert snapshot.holds({"x": usual})
        usual.copy_(torch.zeros(3))
        assert not snapshot.holds({"x": usual})
    assert ordinary(usual) is usual


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_the_cache_makes_once_and_lets_go():
    cache, made = PackedCache(), []

    def make():
        made.append(torch.is_inference_mode_enabled())
        return made[-1]

    weight = quantize(torch.randn(4, 8), TensorSpec("dybit4", (4, 8)))
    with torch.inference_mode():
        for _ in range(2):
            assert cache.get(weight, ("a",), make) is False  # what is made may be kept in turn
    cache.get(weight, ("b",), make)
    assert len(made) == 2 and len(cache) == 2
    weight.scale.mul_(2)
    cache.get(weight, ("a",), make)
    assert len(made) == 3 and len(cache) == 2
    assert cache.get(weight, ("c",), lambda: None) is None and cache.get(weight, ("c",), make) is None
    del weight
    gc.collect()
    assert not len(cache)


def test_without_kernels_nothing_is_made(plain_torch):
    weight = quantize(torch.randn(4, 8), TensorSpec("dybit4", (4, 8)))
    cache = PackedCache()
    assert cache.get(weight, (), lambda: 1) is None and not len(cache)


KINDS = {
    "linear": (lambda: nn.Linear(24, 8), (3, 24)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6)),
    "embedding": (lambda: nn.Embedding(10, 8), None),
}


def made(kind, seed):
    build, shape = KINDS[kind]
    torch.manual_seed(2)
    x = torch.arange(6) if shape is None else torch.randn(shape)
    torch.manual_seed(seed)
    recipe = dybit.Recipe(weights=4, activations=None if shape is None else 8, activation_offset=False)
    return dybit.quantize_(nn.Sequential(build(), nn.ReLU()).eval(), recipe, [x] if shape else None), x


@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.parametrize("making", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_loaded_in_inference_mode_is_seen(kind, fused, assign, making, loading):
    """Whichever of making the models and loading the state happen in inference mode."""
    if making and not loading:
        pytest.skip("outside of inference mode, torch itself refuses such parameters")
    with torch.inference_mode(making):
        model, x = made(kind, 0)
        other, _ = made(kind, 1)
        state = {key: value.clone() for key, value in other.state_dict().items()}
    runs = dybit.fuse(model) if fused and kind in ("linear", "conv") else model
    with torch.inference_mode():
        before, expected = runs(x), other(x)
        assert torch.equal(runs(x), before)
        with torch.inference_mode(loading):
            model.load_state_dict(state, assign=assign)
        assert not torch.equal(expected, before)
        torch.testing.assert_close(runs(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected.clone(), rtol=1e-5, atol=1e-5)  # and outside of it


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_models_of_inference_mode_give_gradients_outside_of_it(kind):
    with torch.inference_mode():
        model, x = made(kind, 0)
        expected = model(x)
    given = x.clone().requires_grad_()
    y = model(given)
    y.sum().backward()
    assert torch.equal(y.detach(), expected.clone()) and given.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_with_other_data_is_seen(kind):
    model, x = made(kind, 0)
    runs = dybit.fuse(model)
    with torch.no_grad():
        runs(x)
        model[0].bias.data = model[0].bias.data + 1
        torch.testing.assert_close(runs(x), model(x), rtol=1e-5, atol=1e-5)
