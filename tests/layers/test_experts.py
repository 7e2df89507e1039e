"""Experts of transformers that are called in other ways, against their own forward with dequantized weights."""

import copy

import pytest
import torch
from torch import nn

import dybit
from dybit.layers.kinds import expert_kind, inner_weights, is_experts, layout, weight_names
from dybit.layers.quantized import quantized_layers

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
# model: (fields beside SIZES, how its experts are called, whether matrices are (in, out))
MODELS = {
    "GptOss": ({"layer_types": ["full_attention"]}, "routed", True),
    "Llama4Text": ({"intermediate_size_mlp": 24, "num_experts_per_tok": 1}, "sorted", True),
    "JetMoe": ({"kv_channels": 16}, "counted", False),
    "AriaText": ({"moe_num_experts": 4, "moe_topk": 2}, "routed", True),
    "Mixtral": ({}, "routed", False),
}


def build(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name][0]}, attn_implementation="eager")
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{name.replace('4Text', '4')}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(0, 64, (2, 9)), use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_against_their_own_forward(name, tmp_path):
    _, kind, transposed = MODELS[name]
    model = build(name)
    found = [module for module in model.modules() if is_experts(module)]
    assert found and {expert_kind(module) for module in found} == {kind}
    assert {(layout(m)["transposed"], layout(m)["row_dims"]) for m in found} == {(int(transposed), 2)}
    assert inner_weights(found[0]) == (() if kind == "counted" else ("down_proj",))
    dybit.quantize_(model, dybit.Recipe(weights=4, group_size=8))
    assert all(name in layer.weight_specs for layer in found for name in weight_names(layer))
    expected = logits(dybit.dequantize_(copy.deepcopy(model)))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    loaded = dybit.load(dybit.save(model, tmp_path / "q"), build(name))
    assert torch.equal(logits(loaded), logits(model))
    assert len(quantized_layers(loaded)) == len(quantized_layers(model))


@pytest.mark.parametrize("name", MODELS)
def test_rounded_inputs(name):
    """Every product alone: the rows that a module of experts multiplies, rounded, by the dequantized matrices."""
    model = dybit.quantize_(build(name), dybit.Recipe(weights=4, activations=8, activation_mode="dynamic"))
    layer = next(module for module in model.modules() if is_experts(module))
    weights = {key: getattr(layer, key).mT if MODELS[name][2] else getattr(layer, key) for key in weight_names(layer)}
    x = torch.randn(8, 32)

    def multiply(key, row, number):
        y = weights[key][number] @ layer.round_input(row[None])[0]
        bias = getattr(layer, f"{key}_bias", None)
        return y if bias is None else y + bias[number]

    def hidden(row, number):
        first = multiply("gate_up_proj", row, number)
        if expert_kind(layer) == "routed":
            return layer._apply_gate(first)
        gate, up = first.chunk(2)
        return layer.act_fn(gate) * up

    with torch.no_grad():
        if expert_kind(layer) == "routed":
            index, share = torch.randint(0, 4, (8, 2)), torch.rand(8, 2)
            found = layer(x, index, share)
            expected = [
                sum(s * multiply("down_proj", hidden(row, n), n) for n, s in zip(ns, ss, strict=True))
                for row, ns, ss in zip(x, index, share, strict=True)
            ]
        elif expert_kind(layer) == "sorted":
            found = layer(x)
            expected = [multiply("down_proj", hidden(row, i // 2), i // 2) for i, row in enumerate(x)]
        else:
            numbers = [0, 0, 0, 2, 3, 3, 3, 3]
            found = layer(x, [3, 0, 1, 4])
            expected = [multiply("weight", row, number) for row, number in zip(x, numbers, strict=True)]
    expected = torch.stack(expected)
    assert (found - expected).norm() < 1e-2 * expected.norm()  # a code may flip where sums differ by their order


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text", "JetMoe"])
def test_training(name):
    model = dybit.prepare_qat_(build(name), dybit.Recipe(weights=4, activations=8, activation_mode="dynamic"))
    layer = next(module for module in model.modules() if is_experts(module))
    model(torch.randint(0, 64, (2, 9))).logits.square().mean().backward()
    key = layer.prepared_weights[0]
    assert bool(layer._parameters[key].grad.any())
    expected = logits(model)
    found = logits(dybit.convert_(model))
    assert (found - expected).norm() < 2e-2 * expected.norm()
