"""Tracing: what a model multiplies, whichever way it is written."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dybit.errors import DyBitError
from dybit.measure.trace import trace
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe
from dybit.workloads.workload import Conv, Gemm


class Block(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False), heads

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_attention_and_linear_layers():
    work = trace(Block(), torch.randn(2, 5, 8), name="block")
    assert work.layers == (
        Gemm("qkv", 10, 8, 24, bias=True),
        Gemm("product", 5, 4, 5, 4, dynamic=True),
        Gemm("product#2", 5, 5, 4, 4, dynamic=True),
        Gemm("out", 10, 8, 8),
    )
    assert work.parameters == sum(p.numel() for p in Block().parameters())


def test_multi_head_attention_is_not_hidden_by_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    work = trace(layer, torch.randn(1, 6, 8))
    assert work.macs == 6 * 8 * (24 + 8 + 16 + 16) + 2 * 2 * 6 * 6 * 4
    assert work.parameters == sum(p.numel() for p in layer.parameters())
    assert layer.training


def test_convolutions_of_every_kind():
    model = nn.ModuleList(
        [nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
         nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)]
    )  # fmt: skip

    def of(index, *shape):
        return trace(nn.Sequential(model[index]), torch.randn(*shape)).layers[0]

    image = of(0, 2, 4, 9, 11)
    assert image == Conv("0", 4, 8, (9, 11), (3, 5), (2, 1), (1, 2), (1, 2), 2, 2, True)
    with torch.no_grad():
        assert image.output_elements == model[0](torch.randn(2, 4, 9, 11)).numel()
    assert of(1, 1, 4, 10) == Conv("0", 4, 6, (1, 10), (1, 3), padding=(0, 1), bias=True)
    assert of(2, 1, 2, 4, 5, 6) == Gemm("0", 3 * 4 * 5, 16, 3, bias=True)
    assert of(3, 1, 4, 5, 5) == Gemm("0", 25, 4, 8)


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    work = trace(nn.Sequential(pytorch_utils.Conv1D(12, 4)), torch.randn(1, 7, 4))
    assert work.layers == (Gemm("0", 7, 4, 12, bias=True),)


def test_a_shared_layer_is_counted_at_every_use_and_its_parameters_once():
    linear = nn.Linear(4, 4)
    work = trace(nn.Sequential(linear, linear), torch.randn(3, 4))
    assert [layer.name for layer in work] == ["0", "0#2"]
    assert work.extra_parameters == 0


def test_a_model_without_products_is_an_error():
    with pytest.raises(DyBitError, match="'ReLU' multiplies nothing"):
        trace(nn.ReLU(), torch.zeros(3))


def test_recurrent_layers_step_by_step():
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 16, 2), "gru": nn.GRU(16, 4)})
    model.forward = lambda x: model["gru"](model["lstm"](x)[0])
    work = trace(model, torch.randn(5, 3, 8))
    assert torch.backends.mkldnn.enabled
    names = ["lstm", *(f"lstm#{i}" for i in range(2, 13)), "gru", *(f"gru#{i}" for i in range(2, 7))]
    assert [layer.name for layer in work] == names
    steps = [Gemm(name, 3, 16, 64, bias=True) for name in names[1:6]]
    assert work.layers[:6] == (Gemm("lstm", 15, 8, 64, bias=True), *steps)
    assert [layer.n for layer in work.layers[12:]] == [12] * 6
    assert work.macs == 15 * (8 * 64 + 16 * 64 + 2 * 16 * 64 + 16 * 12 + 4 * 12)
    assert work.parameters == sum(p.numel() for p in model.parameters())


def test_vectors_bilinear_layers_and_experts():
    assert trace(nn.Linear(4, 5), torch.randn(4)).layers == (Gemm("weight", 1, 4, 5, bias=True),)
    assert trace(nn.Bilinear(4, 5, 6), torch.randn(3, 4), torch.randn(3, 5)).layers == (Gemm("weight", 3, 20, 6),)
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    work = trace(transformers.MixtralForCausalLM(config), torch.arange(8)[None])
    for size in ((32, 48), (24, 32)):
        found = [layer for layer in work if "experts" in layer.name and (layer.k, layer.n) == size]
        assert sum(layer.m for layer in found) == 16


def test_products_that_cannot_be_seen_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x):
            return torch.ops.traced.product(x, self.part.weight)

    library = torch.library.Library("traced", "FRAGMENT")
    library.define("product(Tensor x, Tensor weight) -> Tensor")
    library.impl("product", lambda x, weight: x @ weight, "CompositeExplicitAutograd")
    with pytest.raises(DyBitError, match=r"module 'part' multiplies in the operator 'traced.product'"):
        trace(Own(), torch.randn(2, 4))
    quantized = quantize_(nn.Sequential(nn.Linear(4, 4)), Recipe())
    with pytest.raises(DyBitError, match="model is quantized"):
        trace(quantized, torch.randn(2, 4))
