"""Activations fused with linear layers: which ones are found, and that the model computes what it did."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dybit import Recipe, dequantize_, fuse, quantize_
from dybit.errors import DyBitWarning
from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.operators.activations import activate
from dybit.runtime.activations import _TRANSFORMERS, FusedLinear, fuse_activations, name_of

needs_kernels = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")
DYNAMIC = Recipe(weights=4, activations="int8", activation_mode="dynamic", group_size=32)
MODULES = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


class Block(nn.Module):
    """Two linear layers with an activation between them, as most transformers have it."""

    def __init__(self, act):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(40, 70), act, nn.Linear(70, 40)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Gated(nn.Module):
    """One activation for two layers, a product, and a layer whose result is needed twice."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.twice = (nn.Linear(40, 40) for _ in range(4))
        self.act, self.other = nn.SiLU(), nn.GELU()

    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.act(self.up(x)))
        z = self.twice(y)
        return self.other(z) + z


def quantized(model, recipe=DYNAMIC):
    torch.manual_seed(0)
    calibration = [torch.randn(20, 40)] if recipe.activations == 8 else None
    return quantize_(model.eval(), recipe, calibration=calibration)


def fused_layers(model):
    return {name: m.activation for name, m in model.named_modules() if isinstance(m, FusedLinear)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("recipe", [DYNAMIC, Recipe(weights=4, activations=8, group_size=32), Recipe(weights=3)])
def test_blocks(name, recipe):
    model = quantized(nn.Sequential(Block(MODULES[name]), Block(MODULES[name])), recipe)
    before = str(model)
    fused, count = fuse_activations(model)
    assert fused_layers(fused) == {"0.up": name, "1.up": name} and count == 2
    assert str(model) == before and type(fused) is nn.Sequential and type(fused[0]) is Block
    assert fused[0].up.layer is model[0].up and fused[0].down is model[0].down
    with torch.no_grad():
        for shape in ((0, 40), (1, 40), (3, 40), (2, 9, 40)):
            x = torch.randn(shape)
            # A result that lies between two codes may be rounded to the other one.
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=2e-2)
            torch.testing.assert_close(fused[0].up(x), model[0].act(model[0].up(x)), rtol=2e-6, atol=2e-6)


def test_an_activation_of_two_layers_is_fused_with_both_and_one_beside_others_is_not():
    model = quantized(Gated())
    fused = fuse(model)
    assert fused_layers(fused) == {"gate": "silu", "up": "silu"}
    assert type(fused.act) is nn.Identity and fused.other is model.other

    class Shared(Gated):
        def forward(self, x):
            return self.act(self.gate(x)) + self.act(x)

    model = quantized(Shared())
    same, count = fuse_activations(model)
    assert same is model and count == 0


def test_what_cannot_be_fused_is_left_alone():
    class Branching(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x  # torch.fx cannot follow

    class Functional(Block):
        def forward(self, x):
            return self.down(functional.gelu(self.up(x)))

    for model in (Branching(nn.GELU()), Functional(nn.GELU()), Block(nn.Tanh()), nn.Sequential(nn.GELU())):
        model = quantized(model) if len(list(model.modules())) > 2 else model
        with pytest.warns(DyBitWarning, match="fuse found nothing to do"):
            assert fuse(model) is model


def test_a_module_that_is_used_twice_is_fused_once():
    block = Block(nn.GELU())
    fused = fuse(quantized(nn.Sequential(block, nn.Sequential(block))))
    assert fused[0] is fused[1][0] and len(fused_layers(fused)) == 1


def test_convolutions_and_linear_layers_together():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    model = nn.Sequential(stem, nn.Flatten(), Block(nn.GELU())).eval()
    x = torch.randn(4, 3, 12, 12)
    quantize_(model, Recipe(weights=4, activations="int8"), calibration=[x])
    fused = fuse(model)
    assert fused.fused == 1 and len(fused_layers(fused)) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=2e-2)
        assert torch.isnan(fused(torch.full_like(x, torch.nan))).all()  # by the model's own layers


def test_gradients_other_types_and_later_changes():
    model = quantized(Block(nn.GELU()))
    fused = fuse(model)
    x = torch.randn(5, 40, requires_grad=True)
    fused(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fused)(x), fused(x))
        half = copy.deepcopy(fused).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert torch.isnan(fused(torch.full_like(x, torch.nan))).all()
        model.up.bias.add_(1.0)  # it is shared
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=2e-2)
        dequantize_(fused)
        assert torch.equal(fused(x), model(x))


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    model = quantized(Block(nn.GELU()))
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(fuse(model)(x), model(x))


def test_compile_and_export():
    model = quantized(Block(nn.GELU()))
    fused, x = fuse(model), torch.randn(5, 40)
    with torch.no_grad():
        expected = model(x)
        for graph in (
            torch.compile(fused, fullgraph=True, backend="aot_eager"),
            torch.export.export(fused, (x,)).module(),
        ):
            torch.testing.assert_close(graph(x), expected, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_of_a_fused_layer_run(before):
    model, x = quantized(Block(nn.GELU())), torch.randn(5, 40)
    fused = None if before else fuse_activations(model)[0]
    model.up.register_forward_hook(lambda module, args, y: y * 2)
    fused = fused or fuse_activations(model)[0]
    assert fused_layers(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_the_kernels_do_run(monkeypatch):
    """Else every other test would pass without them."""
    seen = []
    linear = packed_weight.Product.of

    def watch(self, *args):
        seen.append(args[-1])
        return linear(self, *args)

    monkeypatch.setattr(packed_weight.Product, "of", watch)
    with torch.no_grad():
        fuse_activations(quantized(Block(nn.GELU())))[0](torch.randn(5, 40))
    assert seen == ["gelu", ""]


def test_activations_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 999)
    for cls_name, name in _TRANSFORMERS.items():
        if hasattr(activations, cls_name):  # names have come and gone
            module = getattr(activations, cls_name)()
            assert name_of(module) == name
            torch.testing.assert_close(activate(x, name), module(x), rtol=1e-5, atol=1e-5)
    assert name_of(activations.MishActivation()) == name_of(nn.Tanh()) == name_of(None) == ""


def test_a_bert_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = quantize_(transformers.BertModel(config).eval(), DYNAMIC)
    fused = fuse(model)
    assert type(fused) is type(model) and len(fused_layers(fused)) == 2 and not fused_layers(model)
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(fused(ids)[0], model(ids)[0], rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_of_an_absorbed_activation_run(before):
    model, x = quantized(Block(nn.GELU())), torch.randn(5, 40)
    fused = None if before else fuse_activations(model)[0]
    model.act.register_forward_hook(lambda module, args, y: y * 2)
    fused = fused or fuse_activations(model)[0]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


def test_attributes_of_fused_layers_are_those_of_the_layers():
    class Reading(Block):
        def forward(self, x):
            y = super().forward(x.to(self.up.weight.dtype))
            return y * self.up.out_features if self.act.approximate == "none" else y

    model, x = quantized(Reading(nn.GELU())), torch.randn(5, 40)
    fused = fuse(model)
    assert fused is not model
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(fused)(x), model(x), rtol=1e-5, atol=1e-4)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = fused.up.missing
