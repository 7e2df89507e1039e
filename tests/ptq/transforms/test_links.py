import copy

import pytest
import torch
from helpers import decoder, error
from torch import nn
from torch.nn import functional

from dybit.errors import DyBitError
from dybit.models.batch_norm import find_pairs, fold_
from dybit.ptq.transforms.factors import scale_
from dybit.ptq.transforms.links import find_links

TOKENS = {"input_ids": torch.arange(14).view(2, 7)}


def links(model, batch):
    """Producers with their readers and limits."""
    return {link.producer: (sorted(link.readers), link.limit) for link in find_links(model.eval(), batch)}


def assert_scalable(model, batch):
    """Moves random factors along all links; the output must not change."""
    changed = copy.deepcopy(model)
    found = [link for link in find_links(changed, batch) if link.limit is None]
    for link in found:
        scale_(changed, link, torch.rand(link.channels) * 3 + 0.3)
    assert found and error(changed, model, [batch]) < 1e-5


class Net(nn.Module):
    """Two layers and whatever a test puts between them."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first = first or nn.Linear(6, 8)
        self.second = second or nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.between(self, x)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_decoders(kind):
    model = decoder(kind)
    found = links(model, TOKENS)
    for i in range(2):
        layer = f"model.layers.{i}."
        qkv = [f"{layer}self_attn.{x}_proj" for x in "kqv"]
        assert found.pop(f"{layer}input_layernorm") == (qkv, None)
        assert found.pop(f"{layer}self_attn.v_proj") == ([f"{layer}self_attn.o_proj"], None)
        mlp = [f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"]
        assert found.pop(f"{layer}post_attention_layernorm") == (mlp, None)
        assert found.pop(f"{layer}mlp.up_proj") == ([f"{layer}mlp.down_proj"], None)
    assert found == {"model.norm": (["lm_head"], None)}
    assert_scalable(model, TOKENS)


def test_heads_that_share_values():
    value = next(link for link in find_links(decoder(), TOKENS) if link.producer.endswith("0.self_attn.v_proj"))
    (index,) = value.readers.values()
    assert index.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_tied_output_layers_are_left():
    assert "model.norm" not in links(decoder(tied=True), TOKENS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_and_vit(attention):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes, attn_implementation=attention))
    # A norm after the sum feeds the next sum, too.
    prefix = "encoder.layer.0.attention."
    assert links(bert, TOKENS) == {f"{prefix}self.value": ([f"{prefix}output.dense"], None)}
    assert_scalable(bert, TOKENS)
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **sizes, attn_implementation=attention)
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    found = links(vit, images)
    assert len(found) == 4 and found["vit.layernorm"] == (["classifier"], None)
    assert_scalable(vit, images)


def test_transposed_weights_of_gpt2():
    import transformers

    config = transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    norms = {name: readers for name, (readers, _) in links(model, TOKENS).items()}
    assert norms == {
        "transformer.h.0.ln_1": ["transformer.h.0.attn.c_attn"],
        "transformer.h.0.ln_2": ["transformer.h.0.mlp.c_fc"],
    }
    assert_scalable(model, TOKENS)


def mobile(activation):
    """An inverted residual of MobileNet, and what follows."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, groups=8),
        activation(), nn.Conv2d(8, 12, 3, groups=2), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(12, 5, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("activation", "limit"), [(nn.ReLU, None), (nn.ReLU6, 6.0)])
def test_convolutions(activation, limit):
    model = mobile(activation)
    fold_(model, find_pairs(model))
    images = torch.randn(2, 3, 12, 12)
    expected = {"0": (["4"], limit), "4": (["6"], limit), "6": (["9"], None), "9": (["14"], None)}
    assert links(model, images) == expected
    assert_scalable(model, images)


def test_a_batch_norm_in_between_is_left():
    assert "0" not in links(mobile(nn.ReLU), torch.randn(2, 3, 12, 12))


FOLLOWED = {
    "relu": lambda m, x: m.second(functional.relu(m.first(x))),
    "in place": lambda m, x: m.second(functional.relu_(m.first(x))),
    "gate": lambda m, x: m.second(m.first(x) * torch.sigmoid(x.sum(-1, keepdim=True))),
    "scaled": lambda m, x: m.second(2 * m.first(x) / 3),
    "moved": lambda m, x: m.second(m.first(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)),
    "flipped": lambda m, x: m.second(m.first(x).flip(-1)),
    "in parts": lambda m, x: m.second(torch.cat(m.first(x).chunk(2, -1)[::-1], -1)),
    "mean": lambda m, x: m.second(m.first(x).mean(1)),
    "mean, kept": lambda m, x: m.second(m.first(x).mean(dim=1, keepdim=True)),
    "largest": lambda m, x: m.second(m.first(x).amax(1)),
    "by name": lambda m, x: m.second(input=m.first(input=x)),
    "for its shape": lambda m, x: m.second(h := m.first(x)) + torch.zeros_like(h).sum(),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name):
    model, x = Net(FOLLOWED[name]), torch.randn(4, 5, 6)
    assert list(links(model, x)) == ["first"]
    assert_scalable(model, x)


LEFT = {
    "another reader": lambda m, x: m.second(h := m.first(x)) + h.mean(),
    "residual": lambda m, x: m.second(m.first(x) + functional.pad(x, (0, 2))),
    "not homogeneous": lambda m, x: m.second(functional.gelu(m.first(x))),
    "cut below zero": lambda m, x: m.second(functional.hardtanh(m.first(x), -1, 1)),
    "cut after the mean": lambda m, x: m.second(functional.relu6(m.first(x).mean(1))),
    "squared": lambda m, x: m.second((h := m.first(x)) * h),
    "divisor": lambda m, x: m.second(1 / (m.first(x).abs() + 1)),
    "channels mixed": lambda m, x: m.second(m.first(x).mean(-1, keepdim=True).expand(*x.shape[:-1], 8)),
    "run twice": lambda m, x: m.second(m.first(x)) + m.second(m.first(x[:1])),
    "read twice": lambda m, x: m.second(m.first(x)) + m.second(torch.ones(8)),
    "returned": lambda m, x: (m.second(h := m.first(x)), {"hidden": h}),
    "looked at": lambda m, x: m.second(h) if float((h := m.first(x)).sum()) > -1e9 else h,
    "weight in use": lambda m, x: m.second(m.first(x)) + m.first.weight.sum(),
    "reader's weight in use": lambda m, x: m.second(m.first(x)) + functional.linear(torch.ones(8), m.second.weight),
    "written elsewhere": lambda m, x: m.second(h := m.first(x)) + torch.zeros_like(h).copy_(h).sum(),
    "product of two": lambda m, x: m.second(m.first(x) @ torch.ones(8, 8)),
    "integers": lambda m, x: m.second(m.first(x).int().float()),
    "other shape": lambda m, x: m.second(m.first(x).transpose(1, 2).reshape(x.shape[0], -1, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    assert links(Net(LEFT[name]), torch.randn(4, 5, 6)) == {}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


def hooked():
    layer = nn.Linear(8, 3)
    layer.register_forward_hook(lambda module, args, output: output + args[0].sum())
    return layer


@pytest.mark.parametrize("second", [Doubled(8, 3), hooked(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))])
def test_layers_that_do_more_are_left(second):
    assert links(Net(lambda m, x: m.second(m.first(x)), second=second), torch.randn(2, 6)) == {}


def test_shared_weights_are_left():
    model = Net(lambda m, x: m.second(m.first(x)), nn.Linear(8, 8), nn.Linear(8, 8))
    model.second.weight = model.first.weight
    assert links(model, torch.randn(2, 8)) == {}


def test_the_mode_is_restored_and_hooks_removed():
    model = mobile(nn.ReLU).train()
    model[3].eval()
    find_links(model, torch.randn(2, 3, 12, 12))
    assert model.training and not model[3].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_that_do_not_fit():
    with pytest.raises(DyBitError, match="does not fit the model"):
        find_links(mobile(nn.ReLU), torch.randn(2, 3))
