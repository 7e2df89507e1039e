"""Layers that follow each other computed as one: which ones are found, and that the model computes what it did."""

import copy

import pytest
import torch
from torch import nn

from dybit import Recipe, dequantize_, fuse, quantize_
from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.runtime.activations import fuse_activations
from dybit.runtime.feed_forward import FeedForward, fuse_feed_forward

needs_kernels = pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels")
DYNAMIC = Recipe(weights=4, activations="int8", activation_mode="dynamic", group_size=32)
STATIC = Recipe(weights=4, activations=8, group_size=32)
WEIGHTS = Recipe(weights=3)


class Intermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(40, 70), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(70, 40), nn.Dropout(0.1), nn.LayerNorm(40)

    def forward(self, x, residual):
        return self.norm(self.dropout(self.dense(x)) + residual)


class Unreadable(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(40, 40)

    def forward(self, x, **options):
        return (self.dense(x) if x.mean() < 1e9 else x), options.get("cache")


class Nested(nn.Module):
    """As BERT: the layers lie in different modules, beside one that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.attention, self.intermediate, self.output = Unreadable(), Intermediate(), Output()

    def forward(self, x, **options):
        x, _ = self.attention(x, **options)
        return self.output(self.intermediate(x), x)


class Gated(nn.Module):
    """As Llama."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(40, 70), nn.Linear(40, 70), nn.Linear(70, 40), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(40, 70), nn.ReLU(), nn.Dropout(0.1), nn.Linear(70, 40)

    def forward(self, x):
        return x + self.down(self.drop(self.act(self.up(x))))


def quantized(model, recipe=DYNAMIC):
    torch.manual_seed(0)
    return quantize_(model.eval(), recipe, [torch.randn(20, 40)] if recipe is STATIC else None)


def stages(model):
    """The model with its activations fused, and with feed-forward parts, too."""
    before = fuse_activations(model)[0]
    return before, fuse_feed_forward(before)


def parts(model):
    return [name for name, module in model.named_modules() if isinstance(module, FeedForward)]


@pytest.mark.parametrize("recipe", [DYNAMIC, STATIC, WEIGHTS], ids=["dynamic", "static", "weights"])
@pytest.mark.parametrize(
    ("cls", "places"),
    [(Nested, ["0.intermediate.dense", "1.intermediate.dense"]), (Gated, ["0", "1"]), (Plain, ["0.up", "1.up"])],
)
def test_the_same_bits(cls, places, recipe):
    model = quantized(nn.Sequential(cls(), cls()), recipe)
    text = str(model)
    before, fused = stages(model)
    assert parts(fused) == places == parts(fuse(model)) and not parts(before)
    assert str(model) == text and len(list(fused.parameters())) == len(list(model.parameters()))
    with torch.no_grad():
        for shape in ((0, 40), (1, 40), (3, 40), (2, 9, 40), (300, 40)):
            x = torch.randn(shape)
            assert torch.equal(fused(x), before(x))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_hooks_of_the_layers_run(name):
    model, x = quantized(nn.Sequential(Gated())), torch.randn(5, 40)
    fused = stages(model)[1]
    assert parts(fused)
    model[0].get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_else_uses_a_layer_keeps_it():
    class Twice(Plain):
        def forward(self, x):
            return self.down(self.act(self.up(x))) + self.down(x.repeat(1, 2)[:, :70])

    class Between(Plain):
        def forward(self, x):
            return self.down(2 * self.act(self.up(x)))

    class Seen(Plain):
        def forward(self, x):
            hidden = self.act(self.up(x))
            return self.down(hidden) + hidden.mean()

    class Reading(Plain):
        """As T5: it looks at the weight of the last layer."""

        def forward(self, x):
            return self.down(self.act(self.up(x)).to(self.down.bias.dtype))

    class More(Gated):
        def forward(self, x):
            return super().forward(x) + x

    class Crossed(Gated):
        def forward(self, x, y=None):
            return self.down(self.act(self.gate(x)) * self.up(x if y is None else y))

    for cls in (Twice, Between, Seen, Reading, More):
        before, fused = stages(quantized(cls()))
        assert fused is before, cls
    before, fused = stages(quantized(Crossed()))
    x, y = torch.randn(2, 5, 40)
    assert fused is before and torch.equal(fused(x, y), before(x, y))


def test_a_model_that_returns_what_a_layer_gives():
    before, fused = stages(quantized(nn.Sequential(Intermediate(), nn.Identity(), nn.Linear(70, 40))))
    assert parts(fused) == ["0.dense"]
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(fused(x), before(x))


def test_training_keeps_dropout_between_layers():
    _, fused = stages(quantized(nn.Sequential(Plain()), DYNAMIC).train())
    assert not parts(fused)


def test_modules_in_several_places():
    block, shared = Nested(), Nested()
    shared.output = block.output
    before, fused = stages(quantized(nn.Sequential(block, nn.Sequential(block), shared)))
    assert fused[0] is fused[1][0] and parts(fused) == ["0.intermediate.dense", "2.intermediate.dense"]
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(fused(x), before(x))


def test_gradients_other_types_copies_and_later_changes():
    model = quantized(Gated())
    before, fused = stages(model)
    x = torch.randn(5, 40, requires_grad=True)
    fused(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(before(x).sum(), x)[0])
    fused(x.detach()).sum().backward()
    assert all(layer.bias.grad is not None for layer in (model.gate, model.up, model.down))
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fused)(x), before(x))
        assert copy.deepcopy(fused).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(fused(x.repeat(1, 2)[:, ::2]), before(x.repeat(1, 2)[:, ::2]))
        assert torch.isnan(fused(torch.full_like(x, torch.nan))).all()
        model.down.bias.add_(1.0)  # it is shared
        assert torch.equal(fused(x), before(x))
        dequantize_(model)
        assert torch.equal(fused(x), before(x))


def test_compile_and_export():
    for cls in (Gated, Plain):
        before, fused = stages(quantized(cls()))
        x = torch.randn(5, 40)
        with torch.no_grad():
            expected = before(x)
            for graph in (
                torch.compile(fused, fullgraph=True, backend="aot_eager"),
                torch.export.export(fused, (x,)).module(),
            ):
                torch.testing.assert_close(graph(x), expected, rtol=1e-3, atol=2e-2)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    model = quantized(Gated())
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(fuse(model)(x), model(x))


@needs_kernels
def test_the_kernels_do_run(monkeypatch):
    """Else every other test would pass without them."""
    seen = []
    whole = packed_weight.feed_forward
    monkeypatch.setattr(packed_weight, "feed_forward", lambda *args: seen.append(args[-1]) or whole(*args))
    with torch.no_grad():
        for cls in (Nested, Gated, Plain):
            fuse(quantized(cls()))(torch.randn(5, 40))
    assert seen == ["gelu", "silu", "relu"]


def test_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4}
    for cls, config, name in (
        ("BertModel", transformers.BertConfig(**sizes, **heads), "encoder.layer.{}.intermediate.dense"),
        ("LlamaForCausalLM", transformers.LlamaConfig(**sizes, **heads), "model.layers.{}.mlp"),
        ("GPT2Model", transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4), "h.{}.mlp.c_fc"),
    ):
        torch.manual_seed(0)
        model = quantize_(getattr(transformers, cls)(config).eval(), DYNAMIC)
        before, fused = stages(model)
        assert type(fused) is type(model) and parts(fused) == [name.format(i) for i in range(2)]
        ids = torch.randint(50, (2, 9))
        with torch.no_grad():
            assert torch.equal(fused(ids)[0], before(ids)[0])
            if cls == "LlamaForCausalLM":
                options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
                assert torch.equal(fused.generate(ids, **options), before.generate(ids, **options))
