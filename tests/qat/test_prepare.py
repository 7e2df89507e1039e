"""Models prepared, trained, resumed, converted and saved; and bad input."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from helpers import build, inputs
from torch import nn
from torch.nn import functional
from training import RECIPES, batches, mlp, train

import dybit
from dybit import DyBitError, DyBitWarning, Recipe, convert_, prepare_qat_, quantize_
from dybit.layers.description import text_tensor
from dybit.qat.layers import prepared_layers
from dybit.qat.prepare import distillation_loss

pytestmark = pytest.mark.usefixtures("plain_torch")


@pytest.mark.parametrize("name", ["conv2d", "attention", "tied", "encoder"])
def test_saves_and_loads_after_conversion(name, tmp_path):
    model = prepare_qat_(build(name), RECIPES["w4a4"], [inputs(name)])
    train(model, [inputs(name, 2)])
    convert_(model)
    assert model._dybit_recipe == RECIPES["w4a4"]
    twin = dybit.load(dybit.save(model, tmp_path / "q"), build(name, seed=8))
    with torch.no_grad():
        assert torch.equal(twin(*inputs(name)), model(*inputs(name)))


def test_training_resumes_from_a_state_dict():
    recipe, data = Recipe(weights=3, activations=4, variants="all"), batches(8)
    options = {"refresh_every": 3, "freeze_after": 100, "hysteresis": 0.0}

    def steps(model, optimizer, part):
        model.train()
        for batch in part:
            optimizer.zero_grad()
            model(*batch).square().sum().backward()
            optimizer.step()

    def prepared(calibration):
        model = prepare_qat_(mlp(), recipe, calibration, **options)
        return model, torch.optim.Adam(model.parameters(), 0.05)

    whole, optimizer = prepared([data[0][0]])
    steps(whole, optimizer, data)
    half, optimizer = prepared([data[0][0]])
    steps(half, optimizer, data[:4])
    stream = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    state = torch.load(stream)
    resumed, optimizer = prepared(None)  # needs no calibration again
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps(resumed, optimizer, data[4:])
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert int(resumed[0].weight_quantizer.passes) == 8


def test_resuming_needs_the_same_formats_of_static_inputs():
    first = prepare_qat_(mlp(), Recipe(weights=4, activations=4, activation_mode="static"), [batches(1)[0][0]])
    for activations in (8, "int4", "uint4"):
        other = prepare_qat_(mlp(), Recipe(weights=4, activations=activations, activation_mode="static"))
        before = {key: value.clone() for key, value in other[0].input_quantizer.state_dict().items()}
        with pytest.raises(RuntimeError, match="input_quantizer' stays as it is: static inputs choose from"):
            other.load_state_dict(first.state_dict())
        for key, value in other[0].input_quantizer.state_dict().items():
            assert torch.equal(value, before[key])
    same = prepare_qat_(mlp(), Recipe(weights=4, activations=4, activation_mode="static"))
    old = {key: value for key, value in first.state_dict().items() if not key.endswith("input_quantizer.dybit_spec")}
    for state in (first.state_dict(), old):
        same.load_state_dict(state)
        assert torch.equal(same.eval()(batches(1)[0][0]), first.eval()(batches(1)[0][0]))
    for damaged in ({"choice": torch.tensor(99)}, {"dybit_spec": torch.zeros(3)}, {"dybit_spec": text_tensor([5])}):
        state = first.state_dict() | {f"0.input_quantizer.{key}": value for key, value in damaged.items()}
        with pytest.raises(RuntimeError, match=r"'0.input_quantizer' stays as it is"):
            same.load_state_dict(state)


def test_strict_refuses_what_would_stay_in_floating_point_and_the_report_says_it(caplog):
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 4))

    unchanged = model().train()
    with pytest.raises(DyBitError, match="strict=True, but 80 % of the weights would stay in floating point: Bilinear"):
        prepare_qat_(unchanged, Recipe(weights=4), strict=True)
    assert type(unchanged[0]) is nn.Linear and unchanged[0].training
    with caplog.at_level("INFO", "dybit"), pytest.warns(DyBitWarning, match="80 % of the weights stay"):
        prepare_qat_(model(), Recipe(weights=4))
    assert "20 % of 320 weights are quantized; in floating point: Bilinear '1'" in caplog.text
    prepare_qat_(model(), Recipe(weights=4, rules={"1": None}), strict=True)
    prepare_qat_(mlp(), Recipe(weights=4), strict=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("batch_norm", ["keep", "fold"])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(batch_norm, training, tmp_path):
    model, x = Block(), torch.randn(16, 2, 6, 6)
    for _ in range(3):
        model(x)
    model.train(training)
    prepare_qat_(model, RECIPES["w4a4"], [x], batch_norm=batch_norm)
    assert all(module.training == training for module in model.modules())
    assert isinstance(model.norm, nn.Identity if batch_norm == "fold" else nn.BatchNorm2d)
    train(model, [(x,)] * 3)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(convert_(model)(x), expected)
    twin = dybit.load(dybit.save(model, tmp_path / "q"), Block())
    with torch.no_grad():
        assert torch.equal(twin(x), expected)


def test_frozen_weights_and_fixed_scales():
    model = mlp()
    model[0].weight.requires_grad_(False)
    prepare_qat_(model, RECIPES["w4a4"], [batches(1)[0][0]], learn_scales=False)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"0.bias", "2.weight", "2.bias"}
    train(model, batches(2))
    assert not model[0].weight_quantizer.log_scale.any()


def test_distillation_loss():
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = distillation_loss(student, teacher, 3.0)
    expected = functional.kl_div(
        functional.log_softmax(student / 3, -1), functional.softmax(teacher / 3, -1), reduction="batchmean"
    )
    torch.testing.assert_close(loss, expected * 9)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(DyBitError, match="temperature must be above 0, not 0"):
        distillation_loss(student, teacher, 0)


def test_bad_arguments():
    recipe = RECIPES["w4a4"]
    with pytest.raises(DyBitError, match="is not prepared: call prepare_qat_"):
        convert_(mlp())
    with pytest.raises(DyBitError, match="is not prepared"):
        convert_(3)
    with pytest.raises(DyBitError, match=r"model must be a torch\.nn\.Module, not int"):
        prepare_qat_(3, recipe)
    with pytest.raises(DyBitError, match="model is already quantized"):
        prepare_qat_(quantize_(mlp(), Recipe()), recipe)
    for function in (prepare_qat_, quantize_):
        with pytest.raises(DyBitError, match="model is prepared for training"):
            function(prepare_qat_(mlp(), recipe), recipe)
    for name, value in (("observe", 0), ("refresh_every", -1), ("freeze_after", 1.5), ("hysteresis", 1.0)):
        model = mlp()
        with pytest.raises(DyBitError, match=f"{name} must be .* not {value}"):
            prepare_qat_(model, recipe, **{name: value})
        assert type(model[0]) is nn.Linear
    with pytest.raises(DyBitError, match="batch_norm must be one of keep, fold, not 'freeze'"):
        prepare_qat_(mlp(), recipe, batch_norm="freeze")


def test_diverged_training():
    for place in ("log_scale", "weight"):
        model = prepare_qat_(mlp(), RECIPES["w4a4"], [batches(1)[0][0]])
        with torch.no_grad():
            tensor = model[2].weight_quantizer.log_scale if place == "log_scale" else model[2]._parameters["weight"]
            tensor[1] = math.nan
        assert model(*batches(1)[0]).isnan().any()
        with pytest.raises(DyBitError, match=r"layer '2': (a learned scale or offset is nan|weight holds nan)"):
            convert_(model)
        assert len(prepared_layers(model)) == 2  # nothing was changed


def test_conversion_needs_observed_inputs():
    model = prepare_qat_(mlp(), RECIPES["w4a4"], observe=3)
    with pytest.raises(DyBitError, match="layer '0' have been observed in 0 training passes, not observe=3"):
        convert_(model)
    train(model, batches(2))
    with pytest.raises(DyBitError, match="observed in 2 training passes"):
        convert_(model)
    train(model, batches(1))
    convert_(model)
    model = nn.ModuleDict({"used": nn.Linear(12, 3), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    prepare_qat_(model, RECIPES["w4a4"], observe=1)
    train(model, batches(1))
    with pytest.warns(DyBitWarning, match="training never reached 1 layers, whose inputs are kept: unused"):
        convert_(model)


def test_bad_calibration():
    model, bad = mlp(), batches(1)[0][0].clone()
    bad[0, 3] = math.nan
    with pytest.raises(DyBitError, match="calibration gives layer '0' inputs with NaN or infinity"):
        prepare_qat_(model, RECIPES["w4a4"], [bad])
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear] and model.training
    prepare_qat_(model, RECIPES["w4a4"], [batches(1)[0][0]])


def test_what_calibration_never_reaches_is_observed_in_training():
    model = nn.ModuleDict({"used": nn.Linear(12, 3), "later": nn.Linear(12, 3)})
    model.forward = lambda x: model["used"](x)
    with pytest.warns(DyBitWarning, match="later"):
        prepare_qat_(model, RECIPES["w4a4"], [batches(1)[0][0]], observe=2)
    assert model["used"].static_input.ready and not model["later"].static_input.ready
    model.forward = lambda x: model["used"](x) + model["later"](x)
    train(model, batches(3))
    with torch.no_grad():
        expected = model(*batches(1)[0])
        assert model["later"].static_input.ready
        convert_(model)
        assert torch.equal(model(*batches(1)[0]), expected)


def test_three_bits_are_midrise_unless_the_recipe_says_otherwise():
    def families(**fields):
        model = prepare_qat_(mlp(), Recipe(**fields))
        return [layer.weight_quantizer.spec.family for layer in (model[0], model[2])]

    assert families(weights=3) == ["dybit3mid"] * 2
    assert families(weights=3, variants="spare") == ["dybit3spare"] * 2
    assert families(weights=3, rules={"2": {"weights": 4}}) == ["dybit3mid", "dybit4spare"]
    assert families(weights=4, rules={"2": {"weights": 3}}) == ["dybit4spare", "dybit3mid"]
    assert families(weights=3, rules={"2": {"variants": "plain"}}) == ["dybit3mid", "dybit3plain"]
    assert families(weights=3, rules={"2": {"group_size": 4}, "0": {"weights": "int3"}}) == ["int3", "dybit3mid"]
    assert families(weights=2) == ["dybit2mid"] * 2
    model = prepare_qat_(mlp(), Recipe(weights=3, rules={"0": None}))
    assert type(model[0]) is nn.Linear and model._dybit_recipe.weights == "dybit3mid"


def test_a_state_dict_says_how_dynamic_inputs_are_rounded():
    recipe = Recipe(weights=4, activations=4, activation_mode="dynamic")
    layer = nn.Linear(64, 8)
    first, second = copy.deepcopy(nn.Sequential(layer)), copy.deepcopy(nn.Sequential(layer))
    prepare_qat_(first, recipe, [torch.randn(64, 64) ** 3])
    prepare_qat_(second, recipe)
    assert first[0].input_spec != second[0].input_spec
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 64)
    assert second[0].input_spec == first[0].input_spec and torch.equal(second.eval()(x), first.eval()(x))
    other = prepare_qat_(nn.Sequential(nn.Linear(64, 8)), replace(recipe, weights="nf4"))
    with pytest.raises(RuntimeError, match="weight has family='dybit4spare' in the state dict and 'nf4' in the model"):
        other.load_state_dict(first.state_dict())
    kept = prepare_qat_(nn.Sequential(nn.Linear(64, 8)), replace(recipe, activations=None))
    with pytest.raises(RuntimeError, match="inputs are rounded as"):
        kept.load_state_dict(first.state_dict())
