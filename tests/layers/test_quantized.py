"""Quantized layers against plain torch layers with weights and inputs from the NumPy oracle, bit for bit."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import LAYERS, Padded, Tied, build, conv1d, inputs, oracle, rounded_input
from torch import nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import channel_dim, channel_groups, channels, input_places, transposed, weight_names
from dybit.layers.quantized import Quantized, original_class, quantized_layers
from dybit.models.preparation import dequantize_
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")  # tests/test_linear.py is about the kernels

RECIPES = {
    "w4": Recipe(weights=4, embeddings=4),
    "w3_groups": Recipe(weights=3, embeddings=3, group_size=5, scale="bf16", variants="all"),
    "w2_tensor": Recipe(weights=2, embeddings=2, granularity="tensor", scale="pow2"),
    "w8a8": Recipe(weights=8, activations=8),
    "w5a6_offset": Recipe(weights=5, activations=6, group_size=8, variant_granularity="tensor"),
    "w4a8_dynamic": Recipe(weights=4, activations=8, activation_mode="dynamic"),
    "w6a4_dynamic_groups": Recipe(weights=6, activations=4, activation_mode="dynamic", activation_group_size=3),
    "a8": Recipe(weights=None, embeddings=None, activations=8),
    "int8_nf4": Recipe(weights="nf4", embeddings="int4asym", activations="int8"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def quantized(name, recipe):
    """A quantized model, or None where the recipe leaves nothing to do."""
    model = build(name)
    if recipe.weights is None and name == "embedding":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tied weight of which one use is kept
        return quantize_(model, recipe, [inputs(name, seed) for seed in (5, 6)])


@each_layer
@each_recipe
@torch.no_grad()
def test_packed_equals_fake_quantized(name, recipe):
    model = quantized(name, recipe)
    if model is None:
        return
    reference = oracle(build(name), model)
    for seed in (1, 5):
        arguments = inputs(name, seed)
        expected = reference(*arguments)
        assert torch.equal(model(*arguments), expected)
        assert bool(torch.isfinite(expected).all())


@each_layer
@torch.no_grad()
def test_eight_bits_are_close_to_floating_point(name):
    recipe = Recipe(weights=8, embeddings=8, activations=8, group_size=8)
    model, arguments = quantized(name, recipe), inputs(name, 5)
    expected = build(name)(*arguments)
    assert (model(*arguments) - expected).norm() < 0.03 * expected.norm()


@each_layer
@torch.no_grad()
def test_copies_and_pickles(name):
    model = quantized(name, RECIPES["w8a8"])
    arguments = inputs(name)
    expected = model(*arguments)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(*arguments), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        for buffer in layer.buffers(recurse=False):
            buffer.zero_()
    assert torch.equal(model(*arguments), expected)


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_to_another_type_keeps_the_codes(name, dtype):
    model = quantized(name, RECIPES["w3_groups"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {
        (key, k): layer.quantized_tensor(k).dequantize()
        for key, layer in quantized_layers(model).items()
        for k in layer.weight_specs
    }
    model.to(dtype)
    for layer in quantized_layers(model).values():
        assert layer.float_dtype == dtype
        for key in layer.weight_specs:
            assert getattr(layer, key).dtype == dtype
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in inputs(name)]
    assert model(*arguments).dtype == dtype
    model.float()
    for key, layer in quantized_layers(model).items():
        for k in layer.weight_specs:
            assert torch.equal(getattr(layer, k), weights[key, k])
            for suffix in layer.weight_specs[k].buffers():
                stored = f"{key}.{k}{suffix}".removeprefix(".")
                assert torch.equal(model.state_dict()[stored].float(), before[stored].float())
    half = copy.deepcopy(model).half()
    assert half(*[x.half() if x.is_floating_point() else x for x in inputs(name)]).dtype == torch.float16


@each_layer
@pytest.mark.parametrize("recipe", [RECIPES["w4"], RECIPES["w3_groups"]], ids=["channel", "group"])
def test_state_dict_does_not_load_into_the_floating_point_model(name, recipe):
    state = quantized(name, recipe).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(name).load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(name).load_state_dict(state, strict=False, assign=True)


@each_layer
@torch.no_grad()
def test_state_dict_loads_into_a_quantized_model(name):
    first = quantized(name, RECIPES["w8a8"])
    other = build(name, seed=3)
    quantize_(other, RECIPES["w8a8"], [inputs(name, seed) for seed in (5, 6)])
    if {k: v.shape for k, v in first.state_dict().items()} != {k: v.shape for k, v in other.state_dict().items()}:
        return
    other.load_state_dict(first.state_dict())
    for key, value in first.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@each_layer
@torch.no_grad()
def test_dequantize_keeps_the_result(name):
    model, arguments = quantized(name, RECIPES["w4"]), inputs(name)
    expected = model(*arguments)
    keys = set(build(name).state_dict())
    types = [type(m) for m in build(name).modules()]
    assert dequantize_(model) is model
    assert torch.equal(model(*arguments), expected)
    assert set(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert build(name).load_state_dict(model.state_dict())
    quantize_(model, RECIPES["w4"])  # and it can be quantized again


@each_layer
def test_describes_itself(name):
    model = quantized(name, RECIPES["w8a8"])
    text = repr(model)
    if name == "transformers_conv1d":  # which has a __repr__ of its own
        return
    assert "weight=dybit8plain/channel" in text
    if name != "embedding":
        assert "/static" in text


def test_keyword_arguments():
    cases = [
        (nn.Linear(4, 3), {"input": torch.randn(2, 4)}),
        (nn.Conv2d(2, 3, 3), {"input": torch.randn(1, 2, 5, 5)}),
        (nn.ConvTranspose2d(2, 3, 3, stride=2), {"output_size": [12, 12], "input": torch.randn(1, 2, 5, 5)}),
        (conv1d(), {"x": torch.randn(2, 9)}),
        (nn.Embedding(5, 4), {"input": torch.tensor([1, 2])}),
    ]
    for module, arguments in cases:
        x = arguments.get("input", arguments.get("x"))
        extra = (arguments["output_size"],) if "output_size" in arguments else ()
        quantize_(module.eval(), Recipe(activations=8), [(x, *extra)])
        assert torch.equal(module(**arguments), module(x, *extra))


def test_keyword_arguments_of_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    twin = copy.deepcopy(attention)
    quantize_(attention, Recipe(weights=4, activations=8), [(q, k, v)])
    quantize_(twin, Recipe(weights=4, activations=8), [{"value": v, "key": k, "query": q}])
    expected = attention(q, k, v)[0]
    assert torch.equal(attention(value=v, key=k, query=q)[0], expected)
    assert torch.equal(attention(q, value=v, key=k)[0], expected)
    assert torch.equal(twin(q, k, v)[0], expected)


class Scaled(nn.Linear):
    """Its first argument is no tensor."""

    def forward(self, factor, x):
        return super().forward(x) * factor


class OwnAttention(nn.MultiheadAttention):
    """A forward of its own, with one argument."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Coordinates(nn.Conv2d):
    """Puts channels between its input and its weight."""

    def forward(self, x):
        return super().forward(torch.cat([x, x[:, :2]], dim=1))


@torch.no_grad()
def test_subclasses_with_a_forward_of_their_own():
    x = torch.randn(2, 4)
    model = quantize_(Scaled(4, 3).eval(), Recipe(weights=8, activations=8), [(2.0, x)])
    linear = nn.functional.linear(rounded_input(model, x), model.weight, model.bias)
    assert torch.equal(model(2.0, x), linear * 2.0)
    tokens = torch.randn(2, 5, 8)
    # Its output projection is never called, by nobody, so its input is kept.
    for recipe in (
        Recipe(weights=8),
        Recipe(weights=8, activations=8),
        Recipe(activations=8, activation_mode="dynamic"),
    ):
        attention = OwnAttention(8, 2, batch_first=True).eval()
        expected = attention(tokens)
        with pytest.warns(DyBitWarning, match="calibration never reached 1 layers, .*: out_proj"):
            quantize_(attention, recipe, [tokens])
        assert isinstance(attention, OwnAttention)
        assert 0 < (attention(tokens) - expected).norm() < 0.2 * expected.norm()
    image = torch.randn(2, 3, 6, 6)
    model = Coordinates(5, 4, 3).eval()
    expected = model(image)
    quantize_(model, Recipe(weights=8, activations=8), [image])
    assert (model(image) - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_nothing_to_look_up():
    for size in (None, 4):
        for width in (3, 4, 8):
            model = quantize_(nn.Embedding(10, 9), Recipe(embeddings=width, group_size=size))
            assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 9)
            assert torch.equal(model(torch.tensor(4)), model.weight[4])
            with pytest.raises(IndexError):
                model(torch.tensor([10]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 0, 4)])
def test_empty_batches(shape):
    for mode in ("static", "dynamic"):
        model = quantize_(nn.Linear(4, 3), Recipe(weights=3, activations=4, activation_mode=mode), [torch.randn(8, 4)])
        assert model(torch.ones(shape)).shape == (*shape[:-1], 3)


@torch.no_grad()
def test_layouts_of_the_input_do_not_matter():
    x = torch.randn(2, 4, 6, 6)
    for mode in ("static", "dynamic"):
        conv = quantize_(nn.Conv2d(4, 4, 3).eval(), Recipe(weights=4, activations="nf4", activation_mode=mode), [x])
        assert torch.allclose(conv(x.to(memory_format=torch.channels_last)), conv(x), atol=1e-5)
        linear = quantize_(nn.Linear(6, 4).eval(), Recipe(activations="nf4", activation_mode=mode), [x])
        assert torch.equal(linear(x.transpose(1, 2)), linear(x.transpose(1, 2).contiguous()))


def test_hooks_survive():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    quantize_(model, Recipe(activations=8), [torch.randn(3, 4)])
    seen.clear()
    model(torch.randn(3, 4))
    dequantize_(model)(torch.randn(3, 4))
    assert seen == ["pre", "forward"] * 2


def test_gradients_reach_inputs_and_biases():
    x = torch.randn(3, 4, requires_grad=True)
    for mode in ("static", "dynamic"):
        model = quantize_(nn.Linear(4, 2), Recipe(activations=8, activation_mode=mode), [torch.randn(9, 4)])
        model(x).sum().backward()
        assert torch.equal(x.grad, model.weight.sum(0).expand(3, 4))
        assert model.bias.grad is not None
        x.grad = None


def test_the_module_stays_the_same_object():
    linear = nn.Linear(4, 2)
    model = quantize_(nn.Sequential(linear), Recipe())
    assert model[0] is linear and isinstance(linear, nn.Linear) and isinstance(linear, Quantized)
    assert original_class(linear) is nn.Linear
    assert type(linear).__name__ == "QuantizedLinear"
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert {name for name, _ in linear.named_buffers()} == {"weight", "weight_scale", "weight_choice"}
    assert linear.weight.shape == (2, 4) and linear.weight.dtype == torch.float32


def test_what_is_asked_about_modules():
    attention = nn.MultiheadAttention(8, 2)
    assert weight_names(attention) == ("in_proj_weight",)
    assert weight_names(nn.MultiheadAttention(8, 2, kdim=4)) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert weight_names(nn.LayerNorm(4)) == weight_names(nn.LSTM(4, 4)) == ()
    assert weight_names(Padded(1, 1, 1)) == weight_names(conv1d()) == ("weight",)
    conv = nn.ConvTranspose2d(4, 6, 1, groups=2)
    assert (transposed(conv), channel_groups(conv), channels(conv)) == (2, 2, 4)
    assert (transposed(conv1d()), channels(conv1d())) == (1, 9)
    assert (transposed(nn.Linear(3, 2)), channels(nn.Linear(3, 2))) == (0, 3)
    assert channels(nn.Conv2d(6, 4, 1, groups=2)) == 6
    assert channel_dim(conv, torch.zeros(1, 4, 2, 2)) == 1 and channel_dim(conv, torch.zeros(4, 2, 2)) == 0
    assert channel_dim(nn.Linear(3, 2), torch.zeros(2, 5, 3)) == 2
    x, mask = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert input_places(nn.Linear(1, 1), (), {"factor": 2, "input": x}) == ["input"]
    assert input_places(nn.Linear(1, 1), (mask, x), {"y": x}) == [1]
    assert input_places(nn.Linear(1, 1), (mask,), {}) == []
    assert input_places(attention, (x, x, x, x), {}) == [0, 1, 2]
    assert input_places(attention, (x,), {"attn_mask": x, "value": x, "key": x}) == [0, "key", "value"]


GOOD = InputSpec("s8", "dynamic", 4.0, 32).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "dybit8"}, "format of an input must be a single one, not the family 'dybit8'"),
        ({"format": 8}, "must be a string, not 8"),
        ({"format": "s9"}, "bits"),
        ({"mode": "both"}, "mode must be static or dynamic"),
        ({"mode": None}, "mode must be static or dynamic"),
        ({"mode": "static"}, "reach must be a positive number for dynamic inputs only, not 4.0"),
        ({"reach": None}, "reach must be a positive number for dynamic inputs only, not None"),
        ({"reach": 0.0}, "not 0.0"),
        ({"reach": float("nan")}, "not nan"),
        ({"reach": float("inf")}, "not inf"),
        ({"reach": "4"}, "not '4'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "32"}, "group_size='32'"),
        ({"mode": "static", "reach": None}, "group_size=32 and offset=False do not fit mode='static'"),
        ({"offset": True}, "offset=True do not fit mode='dynamic'"),
        ({"offset": 1}, "offset a boolean"),
        ({"more": 1}, "a stored input must have the fields"),
    ],
)
def test_bad_inputs(change, message):
    assert InputSpec.from_dict(GOOD).to_dict() == GOOD
    with pytest.raises(DyBitError) as error:
        InputSpec.from_dict({**GOOD, **change})
    assert message in str(error.value)


def test_bad_input_fields():
    for data in (None, [], {"format": "s8"}):
        with pytest.raises(DyBitError, match="a stored input must have the fields"):
            InputSpec.from_dict(data)


@torch.no_grad()
def test_tied_weights_share_their_codes():
    model = quantize_(Tied().eval(), Recipe(weights=4))
    assert model.embedding._buffers["weight"] is model.head._buffers["weight"]
    twin = copy.deepcopy(model)
    assert twin.embedding._buffers["weight"] is twin.head._buffers["weight"]
    assert twin.embedding._buffers["weight"] is not model.head._buffers["weight"]
    assert torch.equal(model.embedding.weight, model.head.weight)
    dequantize_(model)
    assert model.embedding.weight is model.head.weight


def test_codes_are_not_replaced_by_values():
    layer = quantized("linear", Recipe(weights=4))
    before, weight = layer(torch.ones(1, 19)), layer.weight
    layer.weight = weight  # as whoever ties weights does: the same values
    assert layer._buffers["weight"].dtype == torch.uint8
    for value in (torch.ones(6, 19), weight.half(), torch.zeros(6, 1, 3, dtype=torch.uint8)):
        with pytest.raises(DyBitError, match="weight of a quantized layer cannot be replaced by a torch"):
            layer.weight = value
    with pytest.raises(DyBitError, match="out_features of a quantized layer cannot be changed to 7"):
        layer.out_features = 7
    layer.out_features = 6
    assert torch.equal(layer(torch.ones(1, 19)), before)
    layer.weight = torch.zeros_like(layer._buffers["weight"])
    assert not torch.equal(layer(torch.ones(1, 19)), before)
