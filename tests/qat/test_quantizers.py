"""When scales and codebooks are chosen, what they learn, and what observation keeps."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import batches, mlp, train

from dybit import DyBitError, Recipe, convert_, prepare_qat_
from dybit.formats import catalogue
from dybit.models.calibration import InputStatistics, choose_input
from dybit.qat.quantizers import InputQuantizer, Schedule, WeightQuantizer
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

pytestmark = pytest.mark.usefixtures("plain_torch")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "pow2", "e4m3"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_scales_learn_and_can_be_stored(kind, granularity):
    spec = TensorSpec("dybit3", (6, 10), granularity, 4 if granularity == "group" else None, kind, granularity)
    weight = nn.Parameter(torch.randn(6, 10))
    quantizer = WeightQuantizer(quantize(weight, spec), Recipe(), Schedule())
    start = quantizer(weight).detach()
    assert torch.equal(start, quantizer.export(weight).dequantize())
    optimizer = torch.optim.SGD([quantizer.log_scale], 0.05)
    for _ in range(10):  # shrink what it stands for
        optimizer.zero_grad()
        quantizer(weight).square().sum().backward()
        optimizer.step()
    assert quantizer.scales().abs().sum() < quantizer.scale.abs().sum() or kind == "pow2"
    assert (quantizer.scales().sign() == quantizer.scale.sign()).all()
    assert torch.equal(quantizer(weight), quantizer.export(weight).dequantize())
    quantizer.half()
    assert quantizer.log_scale.dtype == quantizer.scale.dtype == torch.float32


def heavy(rows, columns):
    """Weights for which a long run is best."""
    return torch.distributions.StudentT(2.0).sample((rows, columns)) * 0.05


def test_codebooks_are_chosen_on_schedule_and_frozen():
    layer = nn.Linear(64, 8)
    model = prepare_qat_(nn.Sequential(layer), Recipe(weights=4, variants="plain"), refresh_every=3, freeze_after=6)
    quantizer = layer.weight_quantizer
    model.train()
    choices, scales = [quantizer.choice.clone()], [quantizer.scales().clone()]
    for step in range(1, 10):
        with torch.no_grad():
            layer._parameters["weight"][:4] = heavy(4, 64) if step < 6 else torch.rand(4, 64)
            quantizer.log_scale.fill_(0.1 * step)
        model(torch.randn(2, 64))
        choices.append(quantizer.choice.clone())
        scales.append(quantizer.scales().clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(choices)]
    assert changed == [False, False, True, False, False, True, False, False, False]
    assert int(quantizer.passes) == 9
    kept = choices[2] == choices[3]
    assert kept.any()  # where the codebook stays, so does the learned scale
    torch.testing.assert_close(scales[3][kept] / scales[2][kept], torch.full_like(scales[3][kept], math.exp(0.1)))
    model.eval()
    model(torch.randn(2, 64))
    assert int(quantizer.passes) == 9


def test_hysteresis_keeps_the_incumbent():
    weight = torch.randn(32, 40)
    spec = TensorSpec("dybit4", (32, 40))
    stored = quantize(weight, spec)
    choices = {}
    for hysteresis in (0.0, 0.9):
        quantizer = WeightQuantizer(stored, Recipe(), Schedule(hysteresis=hysteresis))
        quantizer.refresh(weight + 0.2 * torch.randn(32, 40))
        choices[hysteresis] = (quantizer.choice != stored.choices()).float().mean().item()
    assert choices[0.9] == 0.0 < choices[0.0]
    quantizer.refresh(weight * math.nan)  # diverged: nothing to choose from
    assert torch.equal(quantizer.choice, stored.choices())


def test_a_refresh_without_change_is_what_the_search_finds():
    weight = torch.randn(16, 24)
    for family, granularity, group, choice in (
        ("dybit4", "group", 8, "channel"),
        ("dybit3", "channel", None, "tensor"),
    ):
        spec = TensorSpec(family, (16, 24), granularity, group, "fp32", choice)
        quantizer = WeightQuantizer(quantize(torch.rand(16, 24), spec), Recipe(), Schedule(hysteresis=0.0))
        quantizer.refresh(weight)
        assert torch.equal(quantizer.export(weight).choices(), quantize(weight, spec).choices())


def test_inputs_are_observed_in_training_passes_only():
    recipe, data = Recipe(weights=None, activations=4, activation_mode="static"), batches(9, 64)
    model = prepare_qat_(mlp(), recipe, observe=4, refresh_every=0)
    plain, first = mlp(), model[0].input_quantizer
    model.eval()
    assert torch.equal(model(*data[0]), plain(*data[0])) and first.seen == 0
    model.train()
    for batch in data[:4]:
        assert not first.ready and torch.equal(model(*batch), plain(*batch))
    assert not torch.equal(model(*data[4]), plain(*data[4])) and first.ready
    calibrated = prepare_qat_(mlp(), recipe, [batch[0] for batch in data[:4]])
    for mine, other in ((model[0], calibrated[0]), (model[2], calibrated[2])):
        assert mine.input_quantizer.candidates[int(mine.input_quantizer.choice)][0][0] == (
            "s" if mine is model[0] else "u"
        )
        assert mine.input_quantizer.scale.item() == pytest.approx(other.input_quantizer.scale.item(), rel=0.15)
    assert not torch.equal(model(*data[0]), plain(*data[0]))


def test_observation_forgets_old_batches():
    quantizer = InputQuantizer(Recipe(activations="int8"), Schedule(observe=9))
    for step in range(8):
        quantizer(torch.rand(200, 20) + 10.0 * (step == 0))
    assert (quantizer._sample > 5).float().mean().item() == pytest.approx(0.8**7, abs=0.03)
    quantizer(torch.rand(200, 20))
    quantizer(torch.rand(200, 20))
    assert quantizer.ready and not len(quantizer._sample)
    with pytest.raises(DyBitError, match="nan to nan while it is observed"):
        InputQuantizer(Recipe(activations="int8"), Schedule())(torch.tensor([math.nan]))


def test_the_format_of_an_input_is_chosen_anew():
    model = prepare_qat_(
        nn.Sequential(nn.Linear(64, 4)),
        Recipe(weights=None, activations=4, activation_mode="static"),
        [torch.rand(64, 64)],
        refresh_every=2,
        hysteresis=0.0,
    )
    quantizer = model[0].input_quantizer
    model.train()
    before = quantizer.candidates[int(quantizer.choice)]
    skewed = torch.randn(64, 64).exp()
    model(skewed)
    assert quantizer.candidates[int(quantizer.choice)] == before
    model(skewed)
    after = quantizer.candidates[int(quantizer.choice)]
    assert after != before and after[0][:2] == "u4"
    spec, scale, _ = quantizer.export()
    alone = InputStatistics(low=0.0, samples=[skewed])
    expected = choose_input(alone, (catalogue.family("s4"), catalogue.family(spec.format)))
    assert spec == expected[0] and torch.allclose(scale, expected[1], rtol=1e-3)


def test_offsets_learn():
    torch.manual_seed(0)
    x = functional.gelu(torch.randn(256, 16))
    model = prepare_qat_(
        nn.Sequential(nn.Linear(16, 1)), Recipe(weights=None, activations="int3", activation_mode="static"), [x]
    )
    quantizer = model[0].input_quantizer
    spec, _, offset = quantizer.export()
    assert spec.offset and float(offset) < 0
    train(model, [(x + 0.3,)] * 20, lr=0.1)
    assert float(quantizer.export()[2]) != pytest.approx(float(offset))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(convert_(model)(x), expected)


@pytest.mark.parametrize("method", ["mse", "absmax", "percentile"])
@pytest.mark.parametrize("family", ["int4asym", "dybit2mid", "dybit3", "uint4", "nf4"])
def test_weights_of_one_sign_and_zero_rows_train(family, method):
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
        layer.weight[1], layer.weight[3] = 0, -layer.weight[3]
    model = prepare_qat_(
        nn.Sequential(layer), Recipe(weights=family, activations=8, method=method), refresh_every=1, observe=1
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    expected = model.eval()(torch.ones(2, 6))
    assert torch.isfinite(expected).all() and torch.equal(convert_(model)(torch.ones(2, 6)), expected)


def test_e4m3_scales_grow_beyond_the_chosen_factor():
    weight = nn.Parameter(torch.randn(6, 32))
    quantizer = WeightQuantizer(
        quantize(weight, TensorSpec("s4r2", (6, 32), "group", 16, "e4m3")), Recipe(), Schedule()
    )
    assert torch.equal(quantizer.factor(), quantizer.tensor_scale)
    with torch.no_grad():
        quantizer.log_scale += math.log(100)
        weight *= 100
    grown = quantizer.scales()
    torch.testing.assert_close(grown, 100 * quantizer.scale, rtol=0.07, atol=0)
    made = quantizer.export(weight)
    assert torch.equal(made.scales(), grown) and torch.equal(made.dequantize(), quantizer(weight))
    assert quantizer.factor() / quantizer.tensor_scale in (64, 128)


def test_a_refresh_takes_the_factor_of_its_scales():
    spec = TensorSpec("dybit4", (8, 32), "group", 16, "e4m3", "group")
    quantizer = WeightQuantizer(quantize(torch.rand(8, 32), spec), Recipe(), Schedule(hysteresis=0.0))
    before, weight = quantizer.choice, heavy(8, 32) * 37.0
    quantizer.refresh(weight)
    changed = quantizer.choice != before
    assert changed.any()
    assert torch.equal(quantizer.scales()[changed], quantize(weight, spec).scales()[changed])


def test_empty_batches_are_not_observed():
    quantizer = InputQuantizer(Recipe(activations=4), Schedule(observe=1, refresh_every=1))
    assert quantizer(torch.empty(0, 8)).shape == (0, 8) and quantizer.seen == 0
    quantizer(torch.randn(4, 8))
    assert quantizer.seen == 1 and quantizer(torch.empty(0, 8)).shape == (0, 8) and quantizer.ready
