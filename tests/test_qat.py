"""Training with rounding: against the packed model bit for bit; gradients against formulas that autograd derives."""

import copy
import io
import math
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import dybit
from dybit import DyBitError, DyBitWarning, Recipe, convert_, prepare_qat_, quantize_, rivals
from dybit.calibrate import InputStatistics, choose_input
from dybit.model import quantized_layers
from dybit.qat import distillation_loss, prepared_layers
from dybit.qat.quantizers import InputQuantizer, Schedule, WeightQuantizer
from dybit.qat.rounding import Layout, learning_factor, round_input, round_weight
from dybit.scale import nearest_scale
from dybit.tensor import TensorSpec, quantize
from helpers import LAYERS, build, inputs

pytestmark = [
    pytest.mark.usefixtures("plain_torch"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),  # torch, of a layer of helpers.LAYERS
]

RECIPES = {
    "w4a4": Recipe(weights=4, activations=4),
    "w3_groups": Recipe(weights=3, embeddings=3, group_size=5, scale="bf16", variants="all"),
    "w2_tensor": Recipe(weights=2, embeddings=2, granularity="tensor", scale="pow2", variants="all"),
    "w4_e4m3": Recipe(weights="nf4", embeddings=4, group_size=8, scale="e4m3", activations="int4"),
    "w5a6_dynamic": Recipe(weights=5, activations=6, variant_granularity="tensor", activation_mode="dynamic"),
}


def round_units(x, log_scale, scale, chosen, choice, family):
    """Rounds the rows of a matrix."""
    return round_weight(x, log_scale, scale, chosen, choice, Layout(TensorSpec(family, tuple(x.shape))))


def train(model, batches, lr=1e-2):
    """A few steps on any output; returns the optimizer."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(*batch).float().square().mean().backward()
        optimizer.step()
    model.eval()
    return optimizer


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(count, size=8, features=12):
    generator = torch.Generator().manual_seed(11)
    return [(torch.randn(size, features, generator=generator),) for _ in range(count)]


CASES = [(name, recipe) for name in LAYERS for recipe in ("w4a4", "w3_groups")]
CASES += [(name, recipe) for name in ("linear", "conv2d", "transposed2d", "encoder") for recipe in RECIPES]


@pytest.mark.parametrize(("name", "recipe"), dict.fromkeys(CASES))
def test_the_converted_model_computes_what_training_saw(name, recipe):
    recipe = RECIPES[recipe]
    calibration = [inputs(name, seed) for seed in (5, 6)] if recipe.scale else None  # else training observes
    model = build(name)
    before = dict(model.named_parameters())
    assert prepare_qat_(model, recipe, calibration, observe=1, refresh_every=2) is model
    assert not model.training
    assert all(dict(model.named_parameters())[key] is value for key, value in before.items())
    train(model, [inputs(name, seed) for seed in (1, 2)])
    arguments = inputs(name, 9)
    with torch.no_grad():
        expected = model(*arguments)
        assert convert_(model) is model
        assert torch.equal(model(*arguments), expected)
    assert bool(torch.isfinite(expected).all())
    assert quantized_layers(model) and not prepared_layers(model)


@pytest.mark.parametrize("name", ["conv2d", "attention", "tied", "encoder"])
def test_saves_and_loads_after_conversion(name, tmp_path):
    model = prepare_qat_(build(name), RECIPES["w4a4"], [inputs(name)])
    train(model, [inputs(name, 2)])
    convert_(model)
    assert model._dybit_recipe == RECIPES["w4a4"]
    twin = dybit.load(dybit.save(model, tmp_path / "q"), build(name, seed=8))
    with torch.no_grad():
        assert torch.equal(twin(*inputs(name)), model(*inputs(name)))


def reference(x, scale, offset, book):
    """s · l((x - o) / s) + o, straight-through inside the range, for autograd to differentiate."""
    ratio = (x - offset) / scale
    clamped = ratio.clamp(book.levels[0], book.levels[-1])
    nearest = torch.from_numpy(book.decode(book.encode(ratio.detach().numpy()))).to(x.dtype)
    return scale * (clamped + (nearest - clamped).detach()) + offset


FORMATS = ["int4", "int4full", "s3", "s4r2mid", "s3r1spare", "nf4", "u4", "pot4", "s2mid", "s8"]


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_weights(name):
    book = rivals.family(name).books[0]
    x = torch.randn(5, 7, dtype=torch.float64) * float(book.levels[-1])
    scale = torch.tensor([0.5, 0.3, 1.1, 2.0, -0.7 if book.levels[0] < 0 else 0.7], dtype=torch.float64)[:, None]
    mine, log_scale, upstream = x.float().requires_grad_(), torch.zeros(5, 1, requires_grad=True), torch.randn(5, 7)
    rounded = round_units(mine, log_scale, scale.float(), scale.float() * 1.25, None, name)
    rounded.backward(upstream)
    x, scale = x.float().double().requires_grad_(), scale.float().double().requires_grad_()
    expected = reference(x, scale, 0.0, book)
    expected.backward(upstream.double())
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x.grad)
    wanted = scale.grad * scale / (1.25 * scale) ** 2 * learning_factor(book) / math.sqrt(7)
    torch.testing.assert_close(log_scale.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("offset", [None, -0.6])
def test_gradients_of_inputs(name, offset):
    book = rivals.family(name).books[0]
    x, upstream = torch.randn(6, 5) * float(book.levels[-1]), torch.randn(6, 5)
    mine, log_scale, shift = x.clone().requires_grad_(), torch.zeros(1, requires_grad=True), torch.zeros(1)
    shift.requires_grad_()
    given = None if offset is None else torch.tensor([offset])
    rounded = round_input(mine, log_scale, shift, torch.tensor([0.7]), torch.tensor([0.8]), given, name)
    rounded.backward(upstream)
    x, scale = x.double().requires_grad_(), torch.tensor([0.7]).double().requires_grad_()
    moved = torch.tensor([offset or 0.0]).double().requires_grad_()
    expected = reference(x, scale, moved, book)
    expected.backward(upstream.double())
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad.double(), x.grad)
    factor = learning_factor(book) / math.sqrt(5)
    torch.testing.assert_close(log_scale.grad.double(), scale.grad * scale / 0.8**2 * factor, rtol=1e-4, atol=1e-4)
    step = (book.levels[-1] - book.levels[0]) / (len(book.levels) - 1)
    wanted = 0 * moved.grad if offset is None else moved.grad / 0.8 * step * factor
    torch.testing.assert_close(shift.grad.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_an_integer_scale_is_that_of_lsq():
    x, upstream, scale = torch.randn(3, 9), torch.randn(3, 9), 0.3
    log_scale = torch.zeros(3, 1, requires_grad=True)
    round_units(x, log_scale, torch.full((3, 1), scale), torch.full((3, 1), scale), None, "int3").backward(upstream)
    ratio = x / scale
    by_element = torch.where(ratio.abs() <= 3, ratio.round() - ratio, ratio.clamp(-3, 3))
    lsq = (upstream * by_element).sum(1, keepdim=True) / math.sqrt(9 * 3)  # of the step size: LSQ, equations 3 and 5
    torch.testing.assert_close(log_scale.grad, lsq / scale)


def test_saturated_elements_have_no_gradient():
    x = torch.tensor([[-4.0, -1.6, -1.5, 0.0, 0.2, 1.5, 1.6, 100.0]], requires_grad=True)
    round_units(x, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), None, "s2mid").sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    x = torch.tensor([-1.0, 0.0, 0.3, 8.0, 8.1], requires_grad=True)
    round_input(x, torch.zeros(1), None, torch.ones(1), torch.ones(1), None, "u4").sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["dybit4", "dybit3", "ant4", "int4asym", "adaptivfloat8", "dybit8plain"])
def test_units_with_different_codebooks(name):
    family = rivals.family(name)
    choice = torch.arange(len(family.books), dtype=torch.uint8)[:, None]
    x = torch.randn(len(family.books), 200, requires_grad=True)
    log_scale = torch.zeros(len(family.books), 1, requires_grad=True)
    scale = torch.rand(len(family.books), 1) + 0.2
    rounded = round_units(x, log_scale, scale, scale, choice, name)
    rounded.backward(torch.ones_like(x))
    for i, book in enumerate(family.books):
        alone, one = x.detach()[i : i + 1].clone().requires_grad_(), torch.zeros(1, 1, requires_grad=True)
        expected = round_units(alone, one, scale[i : i + 1], scale[i : i + 1], None, book.name)
        expected.backward(torch.ones_like(alone))
        assert torch.equal(rounded[i : i + 1], expected) and torch.equal(x.grad[i : i + 1], alone.grad)
        torch.testing.assert_close(log_scale.grad[i : i + 1], one.grad)
        oracle = book.decode(book.encode(alone.detach().numpy() / scale[i].numpy())).astype(np.float32)
        assert np.array_equal(expected.detach().numpy(), oracle * scale[i].numpy())


def test_nan_stays_nan():
    x = torch.tensor([[math.nan, 1.0]])
    for family, choice in (("int4", None), ("dybit4", torch.zeros(1, 1, dtype=torch.uint8))):
        rounded = round_units(x, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), choice, family)
        assert rounded.isnan().tolist() == [[True, False]]


def test_nearest_scales():
    scale = torch.tensor([1.0, 1.4, 1.42, -0.3, 3e-40, math.nan])
    assert nearest_scale(scale, "pow2")[:4].tolist() == [1, 1, 2, -0.25]
    assert torch.equal(nearest_scale(scale, "bf16")[:4], scale[:4].bfloat16().float())
    factor = torch.tensor([0.01])
    assert torch.equal(
        nearest_scale(scale[:4], "e4m3", factor), (scale[:4] / 0.01).to(torch.float8_e4m3fn).float() * 0.01
    )
    assert torch.equal(nearest_scale(scale, "fp32")[:4], scale[:4]) and nearest_scale(scale, "fp32")[4] == 2.0**-126
    for kind in ("fp32", "bf16", "pow2", "e4m3"):
        assert nearest_scale(scale, kind).isnan().tolist() == [False] * 5 + [True]


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
    recipe, data = Recipe(weights=None, activations=4), batches(9, 64)
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
        Recipe(weights=None, activations=4),
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
    expected = choose_input(alone, (rivals.family("s4"), rivals.family(spec.format)))
    assert spec == expected[0] and torch.allclose(scale, expected[1], rtol=1e-3)


def test_offsets_learn():
    torch.manual_seed(0)
    x = functional.gelu(torch.randn(256, 16))
    model = prepare_qat_(nn.Sequential(nn.Linear(16, 1)), Recipe(weights=None, activations="int3"), [x])
    quantizer = model[0].input_quantizer
    spec, _, offset = quantizer.export()
    assert spec.offset and float(offset) < 0
    train(model, [(x + 0.3,)] * 20, lr=0.1)
    assert float(quantizer.export()[2]) != pytest.approx(float(offset))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(convert_(model)(x), expected)


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


def test_copies_and_pickles_train_on():
    model = prepare_qat_(build("attention"), RECIPES["w4a4"], [inputs("attention")])
    train(model, [inputs("attention")])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(*inputs("attention")), model(*inputs("attention")))
        train(twin, [inputs("attention", 2)])
        assert not torch.equal(twin.attention.in_proj_weight, model.attention.in_proj_weight)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_tied_weights_stay_tied():
    model = prepare_qat_(build("tied"), Recipe(weights=4, embeddings=4, variants="all"), refresh_every=1)
    assert model.embedding.weight_quantizer is model.head.weight_quantizer
    for twin in (model, copy.deepcopy(model).bfloat16().float()):
        train(twin, [inputs("tied", seed) for seed in (1, 2)])
        assert twin.head._parameters["weight"] is twin.embedding._parameters["weight"]
        assert int(twin.head.weight_quantizer.passes) == 2
        assert torch.equal(twin.head.weight, twin.embedding.weight)
        convert_(twin)
        assert twin.head._buffers["weight"] is twin.embedding._buffers["weight"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    data = batches(5)
    results = []
    for checkpointed in (False, True):
        model = prepare_qat_(mlp(), Recipe(weights=3, activations=4, variants="all"), observe=3, refresh_every=2)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        model.train()
        for (x,) in data:
            optimizer.zero_grad()
            x = x.clone().requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            y.square().sum().backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert int(results[1]["0.weight_quantizer.passes"]) == 5


def test_autocast_and_half_precision():
    data = batches(4)
    model = prepare_qat_(mlp(), RECIPES["w4a4"], [data[0][0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for (x,) in data:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    assert half[0]._parameters["weight"].dtype == torch.bfloat16
    assert half[0].weight_quantizer.log_scale.dtype == torch.float32
    x = data[0][0].bfloat16()
    half(x).sum().backward()
    half.eval()
    with torch.no_grad():
        expected = half(x)
        assert expected.dtype == torch.bfloat16 and torch.equal(convert_(half)(x), expected)


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


def worker(rank, folder, observe):
    """One of two processes that train on different halves of the data."""
    torch.set_num_threads(1)
    group = torch.distributed
    group.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        data = batches(6)
        recipe = Recipe(weights=3, activations=4, variants="all")
        model = prepare_qat_(
            mlp(), recipe, None if observe else [data[0][0]], observe=2, refresh_every=3, hysteresis=0.0
        )
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
        for (x,) in data:
            optimizer.zero_grad()
            wrapped(x[rank::2] if observe else x[4 * rank : 4 * rank + 4]).square().sum().backward()
            optimizer.step()
        wrapped(data[0][0])  # copies the buffers once more
        torch.save(model.eval().state_dict(), f"{folder}/{observe}{rank}.pt")
    finally:
        group.destroy_process_group()


@pytest.mark.parametrize("observe", [False, True])
def test_two_processes(tmp_path, observe):
    torch.multiprocessing.spawn(worker, (str(tmp_path), observe), nprocs=2)
    first, second = (torch.load(tmp_path / f"{observe}{rank}.pt") for rank in range(2))
    assert first and all(torch.equal(first[key], second[key]) for key in first)
    assert int(first["0.weight_quantizer.passes"]) == 7
    model = prepare_qat_(mlp(), Recipe(weights=3, activations=4, variants="all"))
    model.load_state_dict(first)
    with torch.no_grad():
        expected = model(*batches(1)[0])
        assert torch.equal(convert_(model)(*batches(1)[0]), expected)


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
    with pytest.raises(DyBitError, match="model is quantized already"):
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


def test_what_layers_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_qat_(mlp(), RECIPES["w4a4"], [batches(1)[0][0]])
    assert "PreparedLinear" in repr(model) and "dybit4spare/channel" in repr(model)
    assert "seen=0" in repr(prepare_qat_(mlp(), RECIPES["w4a4"]))


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
