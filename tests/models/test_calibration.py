"""Calibration: what it sees, what it chooses, and what it says of bad batches."""

import numpy as np
import pytest
import torch
from helpers import numpy_round
from torch import nn

from dybit.errors import DyBitWarning
from dybit.formats import catalogue
from dybit.kernels.code_operators import fake_quantize
from dybit.models.calibration import InputStatistics, calibrate, choose_dynamic_input, choose_input
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

PLAIN = (catalogue.dybit(8, kind="plain"), catalogue.dybit(8, signed=False))


def observe(*batches, module=None, **options):
    model = nn.Sequential(module or nn.Linear(batches[0].shape[-1], 2))
    return calibrate(model, {"layer": model[0]}, batches, **options)["layer"]


def test_statistics_are_those_of_all_batches():
    batches = [torch.randn(n, 5, 6) for n in (3, 1, 4)]
    seen = observe(*batches)
    flat = torch.cat([batch.reshape(-1, 6) for batch in batches])
    assert seen.seen and seen.counts[0] == len(flat)
    assert torch.allclose(seen.second_moment(), flat.square().mean(0))
    assert (seen.low, seen.high) == (float(flat.min()), float(flat.max()))
    # All positions of so few are kept.
    assert torch.equal(seen.positions(), flat) and torch.equal(seen.elements(), flat.flatten())


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.Conv1d(4, 2, 1), (3, 4, 7), 1),
        (nn.Conv2d(4, 2, 1), (3, 4, 5, 6), 1),
        (nn.Conv2d(4, 2, 1), (4, 5, 6), 0),
        (nn.Conv3d(4, 2, 1), (2, 4, 2, 3, 4), 1),
        (nn.ConvTranspose2d(4, 2, 1), (3, 4, 5, 6), 1),
        (nn.Linear(4, 2), (3, 5, 4), 2),
        (nn.Linear(4, 2), (4,), 0),
    ],
)
def test_channels_are_told_from_positions(module, shape, dim):
    x = torch.randn(shape)
    seen = observe(x, module=module)
    axes = [axis for axis in range(len(shape)) if axis != dim]
    expected = x.square().mean(axes) if axes else x.square()
    assert torch.allclose(seen.second_moment(), expected, atol=1e-6)


def test_samples_are_bounded_and_deterministic():
    batches = [torch.randn(20_000, 16) for _ in range(12)]
    first, second = observe(*batches), observe(*batches)
    assert torch.equal(first.elements(), second.elements())
    assert first.elements().numel() <= (1 << 18) + (1 << 15)
    assert len(first.samples) == 8
    assert not observe(*batches[:2], sample=False).samples


def test_attention_sees_query_key_and_value():
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True).eval()
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 4, 5), torch.randn(2, 4, 6)
    layers = {"attention": attention, "out": attention.out_proj}
    for batch in ((q, k, v), {"value": v, "query": q, "key": k}):
        seen = calibrate(attention, layers, [batch])
        for index, x in enumerate((q, k, v)):
            assert torch.allclose(seen["attention"].second_moment(index), x.square().mean((0, 1)), atol=1e-6)
        assert seen["out"].seen and seen["out"].counts[0] == 6
    assert "forward" not in attention.__dict__


def test_out_proj_of_an_encoder_is_reached():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.MultiheadAttention)}
    seen = calibrate(model, modules, [torch.randn(2, 5, 8)])
    # The fused inference path calls none of them; it is not taken while hooks are there.
    assert all(part.seen for part in seen.values())


def test_large_inputs_are_not_taken_for_infinite():
    seen = observe(torch.full((100, 4), 3e38))
    assert seen.high == pytest.approx(3e38)


def test_layers_that_are_never_reached():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    with pytest.warns(DyBitWarning, match=r"calibration never reached 1 layers, .*: unused"):
        quantize_(model, Recipe(activations=8, activation_mode="static"), [torch.randn(3, 4)])
    assert model["used"].input_spec is not None and model["unused"].input_spec is None


def test_signs_are_found():
    x = torch.randn(500, 8)
    assert choose_input(observe(x.abs()), PLAIN)[0].format.startswith("u8")
    assert choose_input(observe(x.relu()), PLAIN)[0].format.startswith("u8")
    spec, scale, offset = choose_input(observe(x), PLAIN)
    assert spec.format.startswith("s8") and not spec.offset and offset is None
    assert scale.shape == (1,) and scale.dtype == torch.float32 and scale.item() > 0
    assert choose_input(observe(torch.zeros(3, 4)), PLAIN)[0].format.startswith("u8")
    signed = (catalogue.family("nf4"), None)
    assert choose_input(observe(x.abs()), signed)[0].format == "nf4"


@pytest.mark.parametrize("activation", [nn.functional.gelu, nn.functional.silu])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_outputs_of_gelu_and_silu_take_an_offset(activation, bits):
    x = activation(torch.randn(500, 16) * 2)
    families = (catalogue.dybit(bits, kind="plain"), catalogue.dybit(bits, signed=False))
    seen = observe(x)
    spec, scale, offset = choose_input(seen, families)
    assert spec.offset and spec.format.startswith("u")
    assert seen.low == pytest.approx(float(x.min()))
    if bits < 8:  # half a step is too much
        assert offset.item() == seen.low
    else:
        assert fake_quantize(torch.zeros(1), scale, offset, spec.format) == 0  # for zero padding
        levels = torch.tensor(catalogue.family(spec.format).books[0].levels) * scale
        assert abs(offset.item() - seen.low) <= 0.501 * levels.diff()[: int((levels < -seen.low).sum()) + 1].max()
    plain = choose_input(seen, families, offset=False)
    assert not plain[0].offset and plain[2] is None

    def error(spec, scale, offset):
        book = catalogue.family(spec.format).books[0]
        return (
            (numpy_round(x.numpy(), book, scale.item(), None if offset is None else offset.item()) - x.numpy()) ** 2
        ).sum()

    assert error(spec, scale, offset) < 0.81 * error(*plain)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_choice_is_the_best_of_all_formats(bits):
    x = torch.randn(300, 8) ** 3
    seen = observe(x)
    families = (catalogue.dybit(bits, kind="plain"), catalogue.dybit(bits, signed=False))
    spec, scale, _ = choose_input(seen, families, offset=False)
    flat = x.numpy().ravel()

    def error(book, scale):
        return ((numpy_round(flat, book, scale) - flat) ** 2).sum()

    best = error(catalogue.family(spec.format).books[0], scale.item())
    top = np.abs(flat).max()
    for book in families[0].books:
        for reach in np.geomspace(0.5, 8, 12) * float(book.levels[-1]):
            assert best <= 1.03 * error(book, top / reach)


def test_min_max_reaches_what_the_samples_missed():
    seen = InputStatistics()
    seen.add(0, torch.tensor([[-1.0, 100.0]]))
    seen.samples.append(torch.tensor([[-1.0, 1.0]]))
    spec, scale, _ = choose_input(seen, PLAIN, method="absmax", offset=False)
    top = float(catalogue.family(spec.format).books[0].levels[-1])
    assert scale.item() * top == pytest.approx(100.0)
    spec, scale, _ = choose_input(seen, PLAIN, method="percentile", percentile=50, offset=False)
    top = float(catalogue.family(spec.format).books[0].levels[-1])
    assert scale.item() * top == pytest.approx(1.0)


def test_dynamic_inputs():
    seen = observe(torch.randn(200, 64))
    family = catalogue.dybit(6, kind="plain")
    spec = choose_dynamic_input(seen, family)
    assert spec.mode == "dynamic" and spec.format in {book.name for book in family.books}
    assert spec.reach > 0 and spec.group_size is None
    assert choose_dynamic_input(seen, family, 24).group_size == 24  # which does not divide 64
    for statistics in (None, InputStatistics()):
        spec = choose_dynamic_input(statistics, family)
        assert (spec.format, spec.reach) == ("s6r2", float(catalogue.family("s6r2").books[0].levels[-1]))
    assert choose_dynamic_input(None, catalogue.family("int8")).format == "int8"


def test_calibration_is_deterministic():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        torch.manual_seed(torch.randint(1 << 30, ()).item())
        return quantize_(model, Recipe(weights=3, activations=5), batches).state_dict()

    batches = [torch.randn(5000, 8) for _ in range(3)]
    first, second = made(), made()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", ["uint8", "u4", "udybit4"])
def test_a_format_without_negative_values_takes_an_offset(name):
    families = Recipe(activations=name).activation_families
    for x in (torch.randn(500, 8), -torch.rand(500, 8), torch.full((4, 8), -0.3)):
        seen = InputStatistics(low=float(x.min()), high=float(x.max()), samples=[x])
        spec, scale, offset = choose_input(seen, families)
        rounded = fake_quantize(x, scale, offset, spec.format)
        assert (rounded - x).square().sum() < 0.05 * x.square().sum()


def test_static_inputs_of_any_magnitude_are_finite():
    for x in (torch.randn(64, 8).clamp(-1, 1) * 3.4e38, torch.randn(64, 8) * 1e-41, torch.zeros(3, 8)):
        seen = InputStatistics(low=float(x.min()), high=float(x.max()), samples=[x])
        for activations in (8, 4, "int8asym", "nf4"):
            for method in ("mse", "absmax", "percentile"):
                families = Recipe(activations=activations).activation_families
                spec, scale, offset = choose_input(seen, families, method=method)
                rounded = fake_quantize(x, scale, offset, spec.format)
                assert torch.isfinite(rounded).all()
                assert (rounded.double() - x).square().sum() <= x.double().square().sum()
