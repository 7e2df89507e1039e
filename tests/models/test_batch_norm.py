"""Folding of batch norms: the same function where it folds, and left alone where it would be another."""

import copy

import pytest
import torch
from helpers import Padded
from torch import nn
from torch.nn import functional

from dybit.errors import DyBitWarning
from dybit.models.batch_norm import expect_folded_, find_pairs, fold_, is_pair
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe


def settled(model):
    """Batch norms with statistics and parameters that matter, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias)
    return model.eval()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y  # the convolution's output has two users


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class Untraceable(nn.Module):
    """Control flow on the data; its blocks can be traced."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.norm(self.conv(self.block(x)))


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return functional.relu(super().forward(x))


class ConvWithActivation(nn.Conv2d):
    def forward(self, x):
        return functional.relu(super().forward(x))


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, w, self.bias, self.stride, self.padding)


class Picky(nn.Conv2d):
    def forward(self, x):
        assert x.shape[-1] == 8
        return super().forward(x)


IMAGE = (2, 3, 8, 8)
FOLDED = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 4, 4)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "not_affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)),
        IMAGE,
    ),
    "subclass": (lambda: nn.Sequential(Padded(3, 4, 3, stride=2, dilation=2), nn.BatchNorm2d(4)), IMAGE),
    "untraceable": (Untraceable, IMAGE),
}
LEFT = {
    "two_users": (Branches, IMAGE),
    "conv_used_twice": (Reused, IMAGE),
    "activation_between": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), IMAGE),
    "no_statistics": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    "norm_with_activation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormWithActivation(4)), IMAGE),
    "conv_with_activation": (lambda: nn.Sequential(ConvWithActivation(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
    "standardized": (lambda: nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
    "picky": (lambda: nn.Sequential(Picky(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)), IMAGE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_folding_keeps_the_function(name, dtype):
    make, shape = FOLDED[name]
    model = settled(make()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = model(x)
    pairs = find_pairs(model)
    assert len(pairs) == 1
    fold_(model, pairs)
    assert torch.allclose(model(x), expected, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert isinstance(model.get_submodule(pairs[0][1]), nn.Identity)
    assert find_pairs(model) == []
    fresh = make()
    expect_folded_(fresh, pairs)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_left_alone(name):
    make, shape = LEFT[name]
    model = settled(make())
    assert find_pairs(model) == []
    x = torch.randn(shape)
    expected = model(x)
    quantize_(model, Recipe(weights=8, group_size=3))
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def replaced(module, forward):
    inner = module.forward
    module.forward = lambda x: forward(inner, x)


BETWEEN = {
    "hook_of_conv": lambda m: m[0].register_forward_hook(lambda module, x, y: y.abs()),
    "forward_of_conv": lambda m: replaced(m[0], lambda inner, x: inner(x).abs()),
    "kept_forward_of_conv": lambda m: (
        setattr(m[0], "inner", m[0].forward),
        setattr(m[0], "forward", lambda x: m[0].inner(x).abs()),
    ),
    "pre_hook_of_norm": lambda m: m[1].register_forward_pre_hook(lambda module, x: (x[0].abs(),)),
    "hook_of_norm": lambda m: m[1].register_forward_hook(lambda module, x, y: y + 1),
    "forward_of_norm": lambda m: replaced(m[1], lambda inner, x: inner(x.abs())),
    "forward_of_both": lambda m: setattr(m, "forward", lambda x: m[1](m[0](x).abs())),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_hooks_and_replaced_forwards_prevent_folding(change, nested):
    block = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change(block)
    model = nn.Sequential(block, nn.ReLU()).eval() if nested else block
    x = torch.randn(IMAGE)
    expected = model(x)
    quantize_(model, Recipe(weights=8, group_size=3))
    assert isinstance(block[1], nn.BatchNorm2d)
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_hooks_that_see_the_input_or_the_result_of_both_do_not_prevent_folding():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    model[0].register_forward_pre_hook(lambda module, x: (x[0] + 1,))
    model[2].register_forward_hook(lambda module, x, y: y + 1)
    assert find_pairs(model) == [("0", "1")]


def test_shared_modules_are_left_alone():
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    assert find_pairs(settled(nn.Sequential(conv, norm, conv))) == []
    assert find_pairs(settled(nn.Sequential(conv, norm, nn.Conv2d(3, 3, 1), norm))) == []
    assert find_pairs(settled(nn.ModuleDict({"a": nn.Sequential(conv, norm), "b": conv}))) == []


def test_a_block_used_twice_is_folded_once():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    model = settled(nn.Sequential(block, block))
    x = torch.randn(IMAGE)
    expected = model(x)
    quantize_(model, Recipe(weights=8, group_size=3))
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_a_norm_in_training_mode_is_left_alone():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[1].train()
    assert find_pairs(model) == [("2", "3")]
    model.train()
    with pytest.warns(DyBitWarning, match="2 batch norms are not merged"):
        quantize_(model, Recipe())
    assert isinstance(model[3], nn.BatchNorm2d)


def test_excluded_convolutions_keep_their_norm():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    quantize_(model, Recipe(rules={"0": None}))
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[3], nn.Identity)


def test_tied_convolutions_stay_right():
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    model[2].weight = model[0].weight
    x = torch.randn(IMAGE)
    expected = model(x)
    quantize_(model, Recipe(weights=8))
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_bfloat16():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    x = torch.randn(IMAGE).bfloat16()
    expected = model(x).float()
    fold_(model, find_pairs(model))
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert (model(x).float() - expected).norm() < 0.02 * expected.norm()


def test_frozen_weights_stay_frozen():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    twin = copy.deepcopy(model)
    twin[0].weight.requires_grad_(False)
    fold_(model, [("0", "1")])
    fold_(twin, [("0", "1")])
    assert model[0].weight.requires_grad and model[0].weight.is_leaf
    assert not twin[0].weight.requires_grad and not twin[0].bias.requires_grad


def test_no_norm_no_tracing():
    class Explosive(nn.Module):
        def forward(self, x):
            raise AssertionError("must not be run")

    assert find_pairs(nn.Sequential(nn.Conv2d(3, 3, 1), Explosive())) == []


def test_is_pair():
    assert is_pair(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert not is_pair(nn.Linear(1, 1), nn.BatchNorm1d(1))
    assert not is_pair(None, None)
