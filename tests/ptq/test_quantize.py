"""Whole models: what is quantized, what is left, what stays tied, and what is said of bad input."""

import copy
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SelfAttention, Tied, conv1d, oracle
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.input_spec import InputSpec
from dybit.layers.quantized import Quantized, quantized_layers
from dybit.models.own_text import own_text
from dybit.models.preparation import dequantize_, folded_pairs, make_plain_
from dybit.ptq import chain
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("plain_torch")  # tests/test_linear.py is about the kernels

W4A8 = Recipe(weights=4, activations=8)
STATIC = Recipe(weights=4, activations=8, activation_mode="static")


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def cnn():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="reflect"),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    return model.eval()


def transformer(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(20, 16), encoder, nn.Linear(16, 20)).eval()


def kinds(model):
    return {name: type(layer).__name__ for name, layer in quantized_layers(model).items()}


def test_containers_stay_as_they_are():
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList(
                [nn.Linear(4, 4), nn.ModuleDict({"deep": nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU())})]
            ),
            "table": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "lstm": nn.LSTM(4, 4),
        }
    )
    before = {name: type(module) for name, module in model.named_modules()}
    assert quantize_(model, Recipe()) is model
    assert kinds(model) == {
        "list.0": "QuantizedLinear",
        "list.1.deep.0": "QuantizedConv1d",
        "table": "QuantizedEmbedding",
        "lstm": "QuantizedLSTM",
    }
    for name, module in model.named_modules():
        assert type(module) is before[name] or (isinstance(module, Quantized) and isinstance(module, before[name]))
    assert type(model["list"]) is nn.ModuleList and type(model["list"][1]) is nn.ModuleDict
    assert dequantize_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 2), lambda: nn.Conv2d(2, 2, 1), conv1d, lambda: nn.Embedding(3, 2)]
)
def test_the_model_may_be_one_layer(make):
    model = make()
    assert quantize_(model, Recipe()) is model
    assert list(quantized_layers(model)) == [""]
    assert type(dequantize_(model)) is type(make())


def test_rules_decide_by_layer():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    quantize_(model, Recipe(weights=4, rules={"0": None, "1": {"weights": 2}, "re:[12]": {"weights": 8}}))
    families = {name: layer.weight_specs["weight"].family for name, layer in quantized_layers(model).items()}
    assert families == {"1": "dybit2", "2": "int8", "3": "dybit4spare"}
    assert type(model[0]) is nn.Linear


def test_progress():
    calls = []
    quantize_(mlp(), W4A8, [torch.randn(4, 8)], progress=lambda *call: calls.append(call))
    assert calls == [(0, 2, "calibrating: batch 1"), (0, 2, "0"), (1, 2, "2"), (2, 2, "done")]


def test_importance_lowers_the_error_of_the_output():
    x = torch.randn(512, 32) * torch.logspace(-2, 1, 32)
    model = nn.Linear(32, 16)
    expected = model(x)

    def error(**options):
        twin = quantize_(copy.deepcopy(model), Recipe(weights=3, **options), [x])
        return (twin(x) - expected).square().mean().item()

    assert error() < 0.7 * error(criterion="weight")
    assert error(criterion="activation") == error()


# What is tied and what is shared


@torch.no_grad()
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(embeddings=3, group_size=5), W4A8], ids=["w", "groups", "a8"])
def test_tied_weights_stay_tied(recipe):
    model = Tied().eval()
    reference = copy.deepcopy(model)
    tokens = torch.randint(0, 11, (3, 5))
    quantize_(model, recipe, [tokens])
    assert model.embedding._buffers["weight"] is model.head._buffers["weight"]
    assert model.embedding._buffers["weight_scale"] is model.head._buffers["weight_scale"]
    assert model.head.weight_specs["weight"].bits == recipe.embeddings  # the table's width
    assert torch.equal(model(tokens), oracle(reference, model)(tokens))
    model.to(torch.bfloat16).float()
    assert model.embedding._buffers["weight"] is model.head._buffers["weight"]
    assert model.embedding._buffers["weight_scale"] is model.head._buffers["weight_scale"]


def test_different_rules_for_tied_weights_follow_the_first():
    model = quantize_(Tied(), Recipe(rules={"embedding": {"weights": 5}, "head": {"weights": 2}}))
    assert model.head.weight_specs["weight"].bits == model.embedding.weight_specs["weight"].bits == 5


@pytest.mark.parametrize("rule", ["embedding", "head"])
def test_a_weight_tied_to_one_that_is_kept_is_kept(rule):
    model = Tied()
    other = "head" if rule == "embedding" else "embedding"
    with pytest.warns(
        DyBitWarning, match=f"layer '{other}' keeps floating point: '{rule}', not quantized, has the same"
    ):
        quantize_(model, Recipe(rules={rule: None}))
    assert list(quantized_layers(model)) == ["hidden"]
    assert model.head.weight is model.embedding.weight


def test_a_weight_tied_to_a_module_of_another_kind_is_kept():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.raw = self.linear.weight

    model = Odd()
    with pytest.warns(DyBitWarning, match="layer 'linear' keeps floating point: '', not quantized"):
        quantize_(model, Recipe())
    assert list(quantized_layers(model)) == ["other"] and model.raw is model.linear.weight


def test_only_inputs_of_tied_layers():
    model = quantize_(
        Tied().eval(), Recipe(weights=None, embeddings=None, activations=8), [torch.randint(0, 11, (3, 5))]
    )
    assert set(quantized_layers(model)) == {"hidden", "head"}
    assert model.head.weight is model.embedding.weight


def test_three_layers_with_one_weight():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight = model["c"].weight = model["a"].weight
    model.forward = lambda x: model["c"](model["b"](model["a"](x)))
    rules = {"a": None, "c": {"weights": None, "activations": 8}}
    with pytest.warns(DyBitWarning, match="layer 'b' keeps floating point: 'a'"):
        quantize_(model, Recipe(rules=rules), [torch.randn(3, 4)])
    assert model["c"].input_spec is not None and not model["c"].weight_specs
    assert model["c"].weight is model["a"].weight


def test_shared_modules_are_quantized_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleList([shared])[0]).eval()
    quantize_(model, W4A8, [torch.randn(4, 8)])
    assert model[0] is model[2] is shared and len(quantized_layers(model)) == 1
    x = torch.randn(2, 8)
    assert torch.equal(model(x), shared(shared(shared(x).relu())))


# Norms of weights, pruning, types


@torch.no_grad()
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.4),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm", "old_spectral_norm", "pruned"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_norms_are_made_permanent(norm, frozen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    if frozen:
        model.requires_grad_(False)
    x = torch.randn(4, 8)
    model(x)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    plain[0].weight.copy_(model[0].weight)
    plain[0].bias.copy_(model[0].bias)
    plain[2].load_state_dict(model[2].state_dict())
    twin = copy.deepcopy(model)
    quantize_(model, W4A8, [x])
    quantize_(plain, W4A8, [x])
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert list(quantized_layers(model)) == ["0", "2"]
    twin(x)  # a copy keeps its norm
    assert not isinstance(twin[0], Quantized)
    make_plain_(twin[0])
    assert "weight" in twin[0]._parameters


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [cnn, transformer, lambda: SelfAttention(batch_first=True)])
def test_models_of_other_types(dtype, make):
    model = make().to(dtype).eval()
    x = (
        torch.randint(0, 20, (3, 5))
        if make is transformer
        else torch.randn(3, 3, 8, 8)
        if make is cnn
        else torch.randn(2, 5, 8)
    )
    x = x.to(dtype) if x.is_floating_point() else x
    quantize_(model, W4A8, [x])
    assert model(x).dtype == dtype
    assert all(layer.float_dtype == dtype for layer in quantized_layers(model).values())
    assert all(
        layer.weight_scale.dtype == torch.float32
        for layer in quantized_layers(model).values()
        if hasattr(layer, "weight_scale")
    )


# Batch norm


@torch.no_grad()
def test_batch_norms_are_folded_before_calibration():
    model = cnn()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 8, 8)
    reference = copy.deepcopy(model)
    expected = model(x)
    quantize_(model, Recipe(weights=8, activations=8), [x])
    assert folded_pairs(model) == [("0", "1")] and isinstance(model[1], nn.Identity)
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    assert not folded_pairs(reference)


def test_pairs_are_remembered_over_failures_and_again():
    model = cnn()
    with pytest.raises(DyBitError, match="does not fit the model"):
        quantize_(model, W4A8, [torch.randn(1, 5, 8, 8)])
    assert folded_pairs(model) == [] and isinstance(model[1], nn.BatchNorm2d)  # a failure leaves the model as it was
    quantize_(model, Recipe())
    assert folded_pairs(model) == [("0", "1")]
    dequantize_(model)
    quantize_(model, Recipe(weights=8))
    assert folded_pairs(model) == [("0", "1")]


# Transformers


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_encoder_layers_do_not_take_the_fast_path(options, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    calls = []
    quantize_(model, W4A8, [x, {"src": x, "src_key_padding_mask": padding}])
    for part in quantized_layers(model).values():
        part.register_forward_hook(lambda *_: calls.append(1))
    oracle(reference, model)
    assert torch.equal(model(x), reference(x))
    assert len(calls) == 8  # attention, its projection, two linear layers, twice
    found, expected = (m(x, src_key_padding_mask=padding) for m in (model, reference))
    assert torch.equal(found[~padding], expected[~padding])


@torch.no_grad()
def test_decoders():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 6, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    expected = model(x, memory, tgt_mask=mask)
    quantize_(model, Recipe(weights=8, activations=8), [{"tgt": x, "memory": memory, "tgt_mask": mask}])
    assert (model(x, memory, tgt_mask=mask) - expected).norm() < 0.05 * expected.norm()


# Compilation and export


@torch.no_grad()
@pytest.mark.parametrize("mode", ["static", "dynamic", None])
@pytest.mark.parametrize("make", [cnn, transformer])
def test_compile_and_export(make, mode):
    recipe = Recipe(weights=4, activations=mode and 8, activation_mode=mode or "static", group_size=5)
    x = torch.randint(0, 20, (2, 5)) if make is transformer else torch.randn(2, 3, 8, 8)
    model = quantize_(make(), recipe, [x])
    expected = model(x)
    exported = torch.export.export(model, (x,))
    for result in (torch.compile(model, fullgraph=True, backend="aot_eager")(x), exported.module()(x)):
        if mode or make is cnn:
            assert torch.equal(result, expected)
        else:  # torch's own attention takes another path when it is traced
            assert torch.allclose(result, expected, atol=1e-5)
    # The program holds codes, not dequantized weights.
    assert not any(
        name.endswith("weight") and value.is_floating_point() and value.ndim > 1
        for name, value in exported.state_dict.items()
    )


# Bad input


def broken(value, layer=lambda: nn.Linear(4, 3), name="weight", position=(1, 2)):
    model = nn.Sequential(nn.ReLU(), layer())
    with torch.no_grad():
        getattr(model[1], name)[position] = value
    return model


def integers():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    return model


def complex_numbers():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
    return model


def without_channels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(0, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: broken(np.nan), "layer '1': weight holds nan at position (1, 2)"),
        (lambda: broken(np.inf), "layer '1': weight holds inf at position (1, 2)"),
        (
            lambda: broken(-np.inf, lambda: nn.Conv2d(2, 2, 3), position=(1, 0, 2, 1)),
            "holds -inf at position (1, 0, 2, 1)",
        ),
        (lambda: broken(np.nan, lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"), "layer '1': weight holds nan"),
        (lambda: broken(np.nan, lambda: nn.Embedding(4, 3)), "layer '1': weight holds nan at position (1, 2)"),
        (lambda: broken(np.nan, conv1d), "layer '1': weight holds nan at position (1, 2)"),
        (integers, "layer '0': weight must be floating point, not torch.int8"),
        (complex_numbers, "layer '0': weight must be floating point, not torch.complex64"),
        (without_channels, "layer '1': weight must not be empty, but has shape (3, 0)"),
        (lambda: nn.Sequential(nn.Linear(2, 2, device="meta")), "layer '0': weight is on the meta device"),
        (lambda: nn.Sequential(nn.ReLU()), "model Sequential has no layer that can be quantized"),
        (lambda: nn.Bilinear(2, 2, 2), "model Bilinear has no layer that can be quantized"),
        (lambda: "model", "model must be a torch.nn.Module, not str"),
        (lambda: None, "model must be a torch.nn.Module, not NoneType"),
        (lambda: nn.Linear, "model must be a torch.nn.Module, not type"),
        (lambda: quantize_(mlp(), Recipe()), "model is already quantized: layer '0' is"),
    ],
)
def test_bad_models(make, message):
    model = make()
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(DyBitError, match=re.escape(message)) as error:
        quantize_(model, Recipe())
    assert "\n" not in str(error.value)
    if isinstance(model, nn.Module):  # nothing was changed
        assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(DyBitError, match="layer '0' is not initialized: run the model once first"):
        quantize_(model, Recipe())
    model(torch.randn(2, 3))
    quantize_(model, Recipe())


@pytest.mark.parametrize(
    ("recipe", "calibration", "message"),
    [
        ("w4", None, "recipe must be a dybit.Recipe, not str"),
        (None, None, "recipe must be a dybit.Recipe, not NoneType"),
        (Recipe(rules={"1": None}), None, "rule '1' matches no layer"),
        (Recipe(rules={"0.w": None}), None, "rule '0.w' matches no layer; did you mean '0'?"),
        (Recipe(rules={"*": None}), None, "the recipe keeps every layer in floating point"),
        (Recipe(weights=None), None, "the recipe keeps every layer in floating point"),
        (
            STATIC,
            None,
            "activations=8 are static and need calibration; pass calibration=batches or set activation_mode='dynamic'",
        ),
        (Recipe(rules={"2": {"activations": 6, "activation_mode": "static"}}), None, "activations=6 are static"),
        (Recipe(criterion="activation"), None, "criterion='activation' of layer '0' needs calibration"),
        (W4A8, [], "calibration yields no batch"),
        (W4A8, [torch.randn(3, 9)], "calibration batch 0 (float32 of shape (3, 9)) does not fit the model"),
        (W4A8, torch.randn(3, 8), "calibration must be an iterable of batches"),
        (W4A8, [torch.full((3, 8), np.nan)], "calibration gives layer '0' inputs with NaN or infinity"),
        (Recipe(), [], "calibration yields no batch"),
    ],
)
def test_bad_recipes_and_calibration(recipe, calibration, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DyBitError, match=re.escape(message)) as error:
        quantize_(model, recipe, calibration)
    assert "\n" not in str(error.value)
    assert not quantized_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_static_activations_of_a_model_with_an_embedding_need_calibration():
    with pytest.raises(DyBitError, match="activations=8 are static and need calibration"):
        quantize_(Tied(), STATIC)


def test_linear_layers_need_no_calibration_but_convolutions_do():
    model = quantize_(nn.Sequential(nn.Linear(140, 4), nn.ReLU(), nn.Linear(4, 2)), W4A8)
    assert model[0].input_spec == model[2].input_spec == InputSpec("int8", "dynamic", 127.0, 128)
    x = torch.randn(3, 140)
    groups = torch.nn.functional.pad(x, (0, 116)).view(3, 2, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scale).round() * scale).view(3, 256)[:, :140]
    assert torch.allclose(model[0](x), nn.functional.linear(rounded, model[0].weight, model[0].bias), atol=1e-5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(DyBitError, match="activations=8 are static and need calibration"):
        quantize_(net, W4A8)
    quantize_(net, W4A8, [torch.randn(2, 3, 4, 4)])
    assert (net[0].input_spec.mode, net[2].input_spec.mode) == ("static", "dynamic")


def test_embeddings_that_change_their_weights_are_kept():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.warns(DyBitWarning, match="layer '0' keeps floating point: max_norm changes its weights"):
        quantize_(model, Recipe())
    assert kinds(model) == {"1": "QuantizedLinear"}


def test_training_mode_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.warns(DyBitWarning, match=r"training mode, so 1 batch norm is not merged .* call model.eval\(\) first"):
        quantize_(model, W4A8, [torch.randn(2, 3, 5, 5)])
    assert model.training and isinstance(model[1], nn.BatchNorm2d)
    assert not folded_pairs(model)


def test_training_mode_warns_of_norms_that_are_not_merged():
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    with pytest.warns(DyBitWarning, match="2 batch norms are not merged"):
        quantize_(model(), Recipe())
    quantize_(model().eval(), Recipe())  # warnings are errors in tests
    quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), Recipe())
    with pytest.warns(DyBitWarning, match="1 batch norm is not merged"):
        quantize_(model(), Recipe(rules={"0": None}))


def test_nothing_is_random():
    def state():
        torch.manual_seed(0)
        return quantize_(cnn(), Recipe(weights=3, activations=4), [torch.randn(4, 3, 8, 8)]).state_dict()

    first, second = state(), state()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class OwnScale(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.input_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.input_scale


def test_names_of_subclasses():
    x, model = torch.randn(32, 8), nn.Sequential(OwnScale())
    expected = model(x)
    quantize_(model, Recipe(weights=8, activations=8), [x])
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight_scale = nn.Parameter(torch.ones(1))
    with pytest.raises(DyBitError, match="layer '0' has a tensor named 'weight_scale'"):
        quantize_(model, Recipe(weights=4))


@pytest.mark.parametrize("recipe", [Recipe(weights=4, criterion="activation"), Recipe(weights=4, activations=8)])
def test_a_refusal_leaves_the_model_as_it_was(recipe):
    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(norm, nn.BatchNorm2d(4)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(DyBitError, match="calibration"):
        quantize_(model, recipe)
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantized_in_inference_mode():
    x, model = torch.randn(16, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.inference_mode():
        quantize_(model, Recipe(weights=4, activations=8), [x])
    model(x).sum().backward()


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "pruned"])
def test_calibration_that_fails_leaves_the_model_as_it_was(norm):
    conv = nn.Conv2d(3, 4, 3)
    if norm == "pruned":
        nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    else:
        getattr(nn.utils.parametrizations, norm)(conv)
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    with pytest.raises(DyBitError, match="does not fit the model"):
        quantize_(model, Recipe(weights=4), [x, torch.randn(2, 7)])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "algorithm", [("equalize", "bias"), ("smooth", "gptq", "bias"), ("rotate", "gptq"), "adaround"]
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_chain_that_fails_leaves_the_model_as_it_was(algorithm, inference, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 50, (4, 16))
    with torch.no_grad():
        expected = model(ids).logits
    before = {key: value.clone() for key, value in model.state_dict().items()}
    members = [(type(module), list(module._buffers), len(module._forward_pre_hooks)) for module in model.modules()]
    last, seen = algorithm[-1] if isinstance(algorithm, tuple) else algorithm, []

    def fail(*_, **__):
        seen.append([not torch.equal(value, before.get(key, value)) for key, value in model.state_dict().items()])
        raise KeyboardInterrupt

    monkeypatch.setitem(chain.ALGORITHMS, last, replace(chain.ALGORITHMS[last], run=fail))
    with torch.inference_mode(inference), pytest.raises(KeyboardInterrupt):
        quantize_(model, Recipe(weights=4), [ids], algorithm=algorithm)
    assert any(seen[0])  # it had been changed
    assert [(type(m), list(m._buffers), len(m._forward_pre_hooks)) for m in model.modules()] == members
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    quantize_(model, Recipe(weights=4))


@pytest.mark.parametrize("algorithm", [None, "gptq"])
def test_a_language_model_writes_its_own_calibration(algorithm):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    given, said = copy.deepcopy(model), []
    quantize_(given, Recipe(weights=3), own_text(model), algorithm=algorithm)
    quantize_(model, Recipe(weights=3), "auto", algorithm=algorithm, progress=lambda *step: said.append(step))
    ids = torch.randint(1, 50, (4, 16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, given(ids).logits)


def test_a_model_that_cannot_write_stays_as_it_was():
    model = mlp()
    with pytest.raises(DyBitError, match="a Sequential cannot write its own calibration text"):
        quantize_(model, Recipe(weights=4), "auto")
    assert not quantized_layers(model)
