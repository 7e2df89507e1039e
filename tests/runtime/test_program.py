"""Fused programs: the results of the model, and where the model itself runs."""

import copy
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from programs import NETWORKS, RECIPE, images, names, rows, same
from torch import nn
from torch.nn import functional

from dybit import Recipe, quantize_
from dybit.errors import DyBitError, DyBitWarning
from dybit.kernels import extension
from dybit.models.checkpoint import save
from dybit.runtime.program import FusedProgram

pytestmark = [
    pytest.mark.filterwarnings("ignore:calibration never reached"),
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels"),
]
SEEDS = range(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_of_images(seed):
    model, given = images(seed)
    fused = FusedProgram(model, given, {})
    x, other = given
    more = [
        (x[:1], other[:1]),
        (x[..., :4], other[..., :4]),
        (x.to(memory_format=torch.channels_last), other),
        (torch.where(x > 1.5, torch.nan, x), other),
        (torch.randn(3, 6, 11, 6), torch.randn(3, 6, 11, 6)),
        (x[:0], other[:0]),
    ]
    with torch.no_grad():
        for inputs in (given, *more):
            kept = [x.clone() for x in inputs]
            same(fused(*inputs), model(*kept), rtol=1e-6, atol=1e-6)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_of_tokens(seed, mode):
    model, (x, mask) = rows(seed, mode)
    fused = FusedProgram(model, (x, mask), {})
    more = [
        (x[:1], mask[:1]),
        (x[:, :4], mask[:, :4]),
        (x, None),
        (torch.randn(40, 17, x.shape[-1]), torch.rand(40, 17) > 0.3),
        (x[:0], mask[:0]),
    ]
    with torch.no_grad():
        for inputs in ((x, mask), *more):
            expected, found = model(*inputs), fused(*inputs)
            for one, other in zip(found, expected, strict=True):
                largest = float(other.abs().amax()) if other.numel() else 0.0
                same(one, other, rtol=0.0, atol=0.03 * largest)


@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks_are_one_program(name):
    torch.manual_seed(3)
    model, given = NETWORKS[name]()
    model = quantize_(settled(model, given), Recipe(weights=4, activations=8), calibration=[given])
    fused = FusedProgram(model, given, {})
    sizes = [given, [x[:1] for x in given], [torch.cat([x, x]) for x in given], [x[:0] for x in given]]
    for isa, inputs in itertools.product(extension.available()[1:], sizes):
        extension.use(isa)
        with torch.no_grad():
            found, expected = fused(*inputs), model(*inputs)
        largest = float(expected.abs().amax()) if expected.numel() else 0.0
        same(found, expected, rtol=0.0, atol=0.05 * largest)
    assert not fused.report().cuts


def settled(model, given):
    """In evaluation mode, with norms that have seen inputs."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(*given)
    return model.eval()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.seen = 0

    def forward(self, x, factor=1.0, *, shift=None):
        self.seen += 1
        y = self.norm(self.b(self.a(x).relu()).mean((2, 3))) * factor
        return y if shift is None else y + shift


X = torch.randn(2, 3, 6, 5)


def small():
    torch.manual_seed(1)
    model = quantize_(Small().eval(), RECIPE, calibration=[X])
    fused = FusedProgram(model, (X,), {})
    model.seen = 0
    return model, fused


def check(fused, model, *args, itself=False, **kwargs):
    """Compares results; ``itself``: whether the model itself runs."""
    model.seen = 0
    found = fused(*args, **kwargs)
    assert model.seen == int(itself)
    same(found, model(*args, **kwargs), rtol=1e-5, atol=1e-5)


def test_arguments_in_any_order_are_one_plan():
    model, fused = small()
    with torch.no_grad():
        fused(X, 2.0, shift=torch.ones(4)), fused(X, 2), fused(X, True)
        check(fused, model, X, factor=2.0, shift=torch.ones(4))
        check(fused, model, x=X, factor=2.0, shift=torch.ones(4))
        check(fused, model, X, 2)
        check(fused, model, X, True)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        fused(factor=2.0)
    assert (fused.seen, len(fused.state_dict())) == (model.seen, len(model.state_dict()))


def test_tensors_by_name_in_any_order():
    class Sum(nn.Module):
        def forward(self, x, y=None, *, z):
            return x - (0.0 if y is None else 2.0 * y) + 3.0 * z

    x, y, z = (torch.randn(2, 3) for _ in range(3))
    fused, model = FusedProgram(Sum().eval(), (x,), {"z": z}), Sum()
    for args, kwargs in (
        ((x,), {"z": z}),
        ((x, y), {"z": z}),
        ((), {"z": z, "y": y, "x": x}),
        ((x,), {"z": x, "y": x}),
    ):
        same(fused(*args, **kwargs), model(*args, **kwargs), 1e-6, 1e-6)


def test_training_and_gradients_run_the_model():
    model, fused = small()
    check(fused, model, X)  # parameters may require gradients
    y = X.clone().requires_grad_()
    model.seen = 0
    fused(y).sum().backward()
    assert model.seen == 1
    assert y.grad is not None
    with torch.no_grad():
        check(fused, model, y)
    fused.train()
    check(fused, model, X, itself=True)
    fused.eval()
    check(fused, model, X)


def test_hooks_and_other_forwards_run_the_model():
    model, fused = small()
    handle = model.b.register_forward_hook(lambda module, args, result: result + 1)
    check(fused, model, X, itself=True)
    handle.remove()
    check(fused, model, X)
    model.norm.forward = torch.sin
    check(fused, model, X, itself=True)
    del model.norm.forward
    check(fused, model, X)


def test_transforms_and_autocast_run_the_model():
    model, fused = small()
    model.seen = 0
    with torch.no_grad():
        torch.func.functional_call(fused, {}, (X,))
        torch.func.vmap(fused)(X[None])
        with torch.autocast("cpu", torch.bfloat16):
            fused(X)
    assert model.seen == 2


def test_nan_runs_the_model():
    model, fused = small()
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        check(fused, model, bad, itself=True)
        assert fused(bad)[0].isnan().all()
        check(fused, model, X)


def test_changed_parameters_are_seen():
    model, fused = small()
    with torch.no_grad():
        before = fused(X)
        model.norm.weight.mul_(2.0)
        after = fused(X)
        torch.testing.assert_close(after - model.norm.bias, 2 * (before - model.norm.bias))
        model.norm.weight = nn.Parameter(torch.zeros(4))
        same(fused(X), model(X))
        model.a.weight_scale.mul_(0.5) if hasattr(model.a, "weight_scale") else model.a.bias.add_(1.0)
        same(fused(X), model(X), 1e-5, 1e-5)
        bias, model.norm.bias = model.norm.bias, None
        same(fused(X), model(X), 1e-5, 1e-5)
        model.norm.bias = bias
        same(fused(X), model(X), 1e-5, 1e-5)
        model.load_state_dict({name: x + 1 if name == "norm.bias" else x for name, x in model.state_dict().items()})
        same(fused(X), model(X), 1e-5, 1e-5)


def test_other_inputs_and_kinds_of_inputs():
    model, fused = small()
    with torch.no_grad():
        for inputs in (X[:1], X[:, :, :4], X.to(memory_format=torch.channels_last), X.transpose(2, 3)):
            fused(inputs)
            check(fused, model, inputs)
        check(fused, model, X[:0], itself=False)

        class Own:
            def __radd__(self, other):
                return other + 1.0

        check(fused, model, X, shift=Own(), itself=True)
        with pytest.raises(DyBitError, match="3 channels"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fused(X[:, :2])


def test_inputs_that_cannot_be_captured_are_named_once():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] < 4 or x.sum() > 0 else x - 1

    model = Branch().eval()
    fused = FusedProgram(model, (torch.ones(2, 3),), {})
    big = torch.ones(5, 3)
    with pytest.warns(DyBitWarning, match="this input is not fused, and runs layer by layer: "):
        same(fused(big), model(big))
    same(fused(-big), model(-big))  # without another warning


def test_copies_and_pickles():
    model, fused = small()
    with torch.no_grad():
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            same(other(X), fused(X))
            assert other.model is not model


def test_a_fused_model_is_not_saved(tmp_path):
    _, fused = small()
    with pytest.raises(DyBitError, match="fused"):
        save(fused, tmp_path / "model")


def test_threads():
    _, fused = small()
    inputs = [torch.randn(2, 3, 6, 5) for _ in range(4)]
    with torch.no_grad():
        expected, results = [fused(x) for x in inputs], [[] for _ in inputs]
    fused._reset()

    def run(i):
        with torch.no_grad():
            results[i] += [fused(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, one in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(x, one) for x in found)


@pytest.mark.parametrize("isa", extension.available()[1:])
def test_the_instruction_set_may_change(isa):
    model, fused = small()
    extension.use(isa)
    with torch.no_grad():
        check(fused, model, X)


def test_torch_compile_takes_the_model():
    model, fused = small()
    compiled = torch.compile(fused, backend="eager")
    with torch.no_grad():
        same(compiled(X), model(X))


def test_report():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(functional.gelu(self.up(x))).cumsum(-1)

    x = torch.randn(5, 8)
    model = quantize_(Net().eval(), RECIPE, calibration=[x])
    fused = FusedProgram(model, (x,), {})
    assert names(fused) == ["round", "linear", "round", "linear", "torch:aten.cumsum.default"]
    report = fused.report(x)
    assert [cut.name for cut in report.cuts] == ["aten.cumsum.default"]
    assert 0 < sum(share.seconds for share in report.shares) <= report.seconds
    text = str(report)
    assert "torch: aten.cumsum.default" in text
    assert "between the operators" in text
    assert text.splitlines()[0].endswith(" ms")
    itself = fused.train().report(x)
    assert [share.name for share in itself.shares] == ["Net"]
