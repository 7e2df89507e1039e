"""The written-out attention against torch's own, for every option."""

import itertools

import pytest
import torch
from torch import nn

from dybit.layers.attention import attend

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 5, "vdim": 6},
    {"kdim": 5, "bias": False, "add_zero_attn": True, "batch_first": True},
]
MASKS = {
    "none": None,
    "bool": torch.tensor([[False, True, False, False, True], [False] * 5, [True, False, False, True, True]]),
    "float": torch.linspace(-2, 1, 15).view(3, 5),
    "heads": torch.linspace(-2, 1, 4 * 15).view(4, 3, 5),
}
PADDING = {
    "none": None,
    "bool": torch.tensor([[False, False, False, False, True], [False, False, True, True, False]]),
    "float": torch.linspace(-1, 0, 10).view(2, 5),
}


def arguments(options, batched=True):
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, options.get("kdim", 8)), torch.randn(2, 5, options.get("vdim", 8))
    if not batched:
        return q[0], k[0], v[0]
    return (q, k, v) if options.get("batch_first") else tuple(x.transpose(0, 1) for x in (q, k, v))


def compare(module, inputs, **options):
    with torch.no_grad():
        expected, weights = module(*inputs, **options)
        found, found_weights = attend(module, *inputs, **options)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (found_weights is None)
    if weights is not None:
        assert found_weights.shape == weights.shape
        assert torch.allclose(found_weights, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_option(options, mode):
    module = nn.MultiheadAttention(8, 2, **options)
    getattr(module, mode)()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    same_type = [("none", "none"), ("bool", "none"), ("none", "bool"), ("bool", "bool"), ("float", "float")]
    for mask, padding in [*same_type, ("heads", "none"), ("heads", "float")]:
        for need_weights, average in itertools.product((True, False), (True, False)):
            compare(
                module,
                arguments(options),
                attn_mask=MASKS[mask],
                key_padding_mask=PADDING[padding],
                need_weights=need_weights,
                average_attn_weights=average,
            )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_one_sequence(options):
    module = nn.MultiheadAttention(8, 2, **options)
    inputs = arguments(options, batched=False)
    compare(module, inputs)
    compare(module, inputs, attn_mask=MASKS["bool"], need_weights=False)
    compare(module, inputs, key_padding_mask=PADDING["bool"][1])
    compare(module, inputs, attn_mask=torch.randn(2, 3, 5), average_attn_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal(need_weights):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    compare(module, (x, x, x), attn_mask=mask, is_causal=True, need_weights=need_weights)
    compare(
        module,
        (x, x, x),
        attn_mask=mask,
        is_causal=True,
        need_weights=need_weights,
        key_padding_mask=PADDING["float"][:, :4],
    )
    with pytest.raises(ValueError, match="need attn_mask if specifying the is_causal hint"):
        attend(module, x, x, x, is_causal=True)


def test_dropout_only_in_training():
    module = nn.MultiheadAttention(8, 2, dropout=0.5)
    x = torch.randn(4, 2, 8)
    compare(module.eval(), (x, x, x))
    module.train()
    assert not torch.equal(attend(module, x, x, x)[0], attend(module, x, x, x)[0])


def test_the_output_projection_is_called():
    module = nn.MultiheadAttention(8, 2)
    seen = []
    module.out_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 2, 8)
    module(x, x, x)
    assert seen == []
    attend(module, x, x, x)
    assert seen == [1]


def test_inputs_are_rounded():
    module = nn.MultiheadAttention(8, 2)
    x, y, z = torch.randn(4, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    found = attend(module, x, y, z, round_input=torch.round)[0]
    assert torch.equal(found, attend(module, x.round(), y.round(), z.round())[0])


def test_gradients():
    module = nn.MultiheadAttention(8, 2)
    x = torch.randn(4, 2, 8, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    expected, x.grad = x.grad, None
    attend(module, x, x, x)[0].sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-6)
