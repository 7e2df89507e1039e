"""Hessians against what layers compute: the energy of their outputs is w H wᵀ, for any weight."""

import pytest
import torch
from helpers import conv1d
from torch import nn

from dybit.errors import DyBitError
from dybit.layers.kinds import transposed, weight_names
from dybit.models.plan import weight_spec
from dybit.models.running import observing
from dybit.ptq.rounding.hessian import Hessians, shrink, size
from dybit.recipe import LayerRecipe
from dybit.tensors.quantized_tensor import TensorSpec

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "Conv1D": (conv1d, (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 7, 5)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2, bias=False), (2, 4, 7, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False), (2, 4, 7, 5)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (3, 4, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (3, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2, bias=False), (2, 2, 5, 4, 4)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 5)),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), groups=2, output_padding=(1, 0), dilation=2, bias=False),
        (2, 4, 5, 4),
    ),
}


def gathered(module, calls):
    hessians = Hessians()
    with observing({"layer": module}, hessians.observe), torch.no_grad():
        outputs = [module(*call) for call in calls]
    return hessians, outputs


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_energy_of_the_outputs(make, shape):
    torch.manual_seed(0)
    module = make()
    if "Conv1D" in type(module).__name__:
        nn.init.zeros_(module.bias)
    spec = weight_spec(LayerRecipe(), tuple(module.weight.shape), transposed(module))
    shape = (*shape[:-1], spec.columns) if not hasattr(module, "kernel_size") else shape
    hessians, outputs = gathered(module, [(torch.randn(shape),) for _ in range(3)])
    hessian = hessians.of("layer", "weight", spec)
    assert hessian.shape == (getattr(module, "groups", 1), spec.columns, spec.columns)
    parts = spec.to_matrix(module.weight.detach()).unflatten(0, (len(hessian), -1))
    energy = torch.einsum("pri,pij,prj->", parts, hessian, parts)
    positions = sum(y.numel() for y in outputs) / spec.rows
    assert float(energy) == pytest.approx(sum(float(y.square().sum()) for y in outputs) / positions, rel=1e-4)
    assert size(module, spec) == hessian.nbytes


def test_chunks_of_patches_add_up(monkeypatch):
    module, calls = nn.Conv2d(3, 4, 3), [(torch.randn(5, 3, 6, 6),)]
    spec = weight_spec(LayerRecipe(), tuple(module.weight.shape), transposed(module))
    whole = gathered(module, calls)[0].of("layer", "weight", spec)
    monkeypatch.setattr("dybit.ptq.rounding.hessian._CHUNK", 1)
    assert torch.allclose(gathered(module, calls)[0].of("layer", "weight", spec), whole, atol=1e-6)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}])
def test_attention(same, widths):
    module = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    q = torch.randn(2, 4, 8)
    k = q if same and not widths else torch.randn(2, 4, widths.get("kdim", 8))
    v = q if same and not widths else torch.randn(2, 4, widths.get("vdim", 8))
    hessians, _ = gathered(module, [(q, k, v)])
    inputs = [x.flatten(0, 1) for x in (q, k, v)]
    expected = [x.T @ x / len(x) for x in inputs]
    specs = {
        name: weight_spec(LayerRecipe(), tuple(getattr(module, name).shape), transposed(module))
        for name in weight_names(module)
    }
    found = [h for name, spec in specs.items() for h in hessians.of("layer", name, spec)]
    assert len(found) == (1 if same and not widths else 3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=False))


def test_layers_with_the_same_input_share():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x).sum() + self.b(x).sum() + self.c(x.clone()).sum()

    model, hessians = Twins(), Hessians()
    with observing(dict(model.named_children()), hessians.observe):
        for _ in range(2):
            model(torch.randn(5, 4))
    moments = hessians._moments
    assert moments["a", 0] is moments["b", 0] is not moments["c", 0]
    assert moments["a", 0].count == moments["c", 0].count == 10
    assert torch.allclose(moments["a", 0].mean, moments["c", 0].mean, rtol=1e-5)


def test_layers_that_shared_may_part():
    a, b, hessians = nn.Linear(3, 2), nn.Linear(3, 2), Hessians()
    x, y, z = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    for module, name, inputs in ((a, "a", x), (b, "b", x), (b, "b", y), (a, "a", z)):
        hessians.observe(name, module, [inputs])
    spec = weight_spec(LayerRecipe(), tuple(a.weight.shape), transposed(a))
    for name, inputs in (("a", [x, z]), ("b", [x, y])):
        rows = torch.cat(inputs)
        assert torch.allclose(hessians.of(name, "weight", spec), (rows.T @ rows / 8)[None], atol=1e-6)


def test_changed_in_place_is_another_input():
    a, b, hessians, x = nn.Linear(3, 2), nn.Linear(3, 2), Hessians(), torch.randn(4, 3)
    hessians.observe("a", a, [x])
    hessians.observe("b", b, [x.mul_(2)])
    assert hessians._moments["a", 0] is not hessians._moments["b", 0]


def test_what_does_not_fit_is_none():
    module = nn.Linear(4, 2)
    spec = weight_spec(LayerRecipe(), tuple(module.weight.shape), transposed(module))
    hessians = Hessians()
    assert hessians.of("layer", "weight", spec) is None
    hessians.observe("layer", module, [torch.randn(0, 4)])
    assert hessians.of("layer", "weight", spec) is None
    hessians.observe("layer", module, [torch.randn(5, 3)])
    assert hessians.of("layer", "weight", spec) is None


def test_large_inputs_stay_in_range():
    module, hessians = nn.Linear(4, 2), Hessians()
    for _ in range(3):
        hessians.observe("layer", module, [torch.full((1000, 4), 1e18)])
    spec = weight_spec(LayerRecipe(), tuple(module.weight.shape), transposed(module))
    assert torch.isfinite(hessians.of("layer", "weight", spec)).all()


@pytest.mark.parametrize(("module", "shape"), [(nn.Linear(4, 2), (3, 4)), (nn.Conv1d(4, 2, 1), (1, 4, 3))])
def test_nan(module, shape):
    x = torch.zeros(shape)
    x.view(-1)[0] = torch.nan
    with pytest.raises(DyBitError, match="calibration gives layer 'layer' inputs with NaN or infinity"):
        Hessians().observe("layer", module, [x])


@pytest.mark.parametrize("count", [4, 40, 4000])
def test_chance_is_shrunk_away_and_correlations_stay(count):
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(20, generator=generator) + 0.1
    x = torch.randn(count, 20, generator=generator) * size
    chance = (x.T @ x / count)[None]
    found = shrink(chance, count)
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), chance.diagonal(dim1=1, dim2=2), rtol=1e-5)
    above = [h.triu(1).square().sum() for h in (found, chance)]
    assert above[0] < 0.05 * above[1]
    x = torch.randn(count, 1, generator=generator) * size  # all channels say the same
    same = (x.T @ x / count)[None]
    assert torch.allclose(shrink(same, count), same, rtol=2 / count + 1e-4)


def test_at_least_a_share_of_the_correlations_goes():
    x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0)
    same = (x.T @ x / 5000)[None]
    found = shrink(same, 5000, 0.3)
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), same.diagonal(dim1=1, dim2=2), rtol=1e-5)
    assert torch.allclose(found.triu(1), 0.7 * same.triu(1), rtol=1e-4)
    chance = torch.eye(8)[None] + 0.01
    assert torch.equal(shrink(chance, 2, 0.3), shrink(chance, 2))  # few samples shrink more
    hessians, layer = Hessians(), nn.Linear(8, 4)
    hessians.observe("layer", layer, [x])
    spec = TensorSpec("dybit4", (4, 8))
    seen = hessians.of("layer", "weight", spec)
    assert torch.allclose(seen, same, rtol=1e-4)
    assert torch.equal(hessians.of("layer", "weight", spec, shrinkage=0.3), shrink(seen, 5000, 0.3))


def test_shrinking_what_is_zero_or_one_channel():
    assert torch.equal(shrink(torch.zeros(2, 3, 3), 5), torch.zeros(2, 3, 3))
    assert torch.allclose(shrink(torch.ones(1, 1, 1), 5), torch.ones(1, 1, 1))
