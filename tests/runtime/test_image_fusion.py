"""Fused models: the bits of the model that they were made from, and where they hand over to it."""

import operator
import pickle
import random

import pytest
import torch
from fused_networks import RECIPES, network
from torch import nn
from torch.nn import functional

from dybit import Recipe, fuse, quantize_, save
from dybit.errors import DyBitError, DyBitWarning
from dybit.interchange import save_compressed
from dybit.kernels import extension

ISAS = extension.available()[1:]
pytestmark = pytest.mark.usefixtures("restore_isa")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_are_those_of_the_model(recipe, isa):
    extension.use(isa)
    model = network(recipe)
    fused = fuse(model)
    assert fused.fused >= 4 and not any(isinstance(m, nn.ReLU6 | nn.ReLU) for m in fused.modules())
    with torch.no_grad():
        for batch in (0, 1, 3):
            x = torch.randn(batch, 3, 19, 17)
            for given in (x, x.to(memory_format=torch.channels_last), x[..., :15], x.transpose(2, 3)):
                assert torch.equal(fused(given), model(given))


def test_plain_torch_differs_by_its_sums_alone(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    model = network()
    x = torch.randn(2, 3, 19, 17)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(x), model(x), rtol=0.02, atol=0.02)  # a sum may round to another code


def test_every_kind_of_clamp():
    clamps = [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), functional.relu, functional.relu6, functional.hardtanh,
        torch.relu,
        lambda x: functional.hardtanh(x, max_val=0.5), lambda x: x.clamp(0, 1), lambda x: torch.clamp(x, max=0.3),
        lambda x: x.relu(), lambda x: functional.relu(x, inplace=True), lambda x: x.clamp_(-0.1), torch.relu_,
    ]  # fmt: skip

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(5, 5, 1) for _ in range(len(clamps) + 1))
            self.layers = nn.ModuleList(c for c in clamps if isinstance(c, nn.Module))

        def forward(self, x):
            for i, clamp in enumerate(clamps):
                x = (self.layers[i] if i < len(self.layers) else clamp)(self.convs[i](x))
            return self.convs[-1](x)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6)
    model = quantize_(Chain().eval(), RECIPES["int8"], calibration=[x])
    fused = fuse(model)
    assert fused.fused == len(clamps)
    calls = [n for n in fused.graph.graph.nodes if n.op in ("call_module", "call_method", "call_function")]
    assert len(calls) == 1 + 2 * (len(clamps) + 1)  # a rounding, and every convolution with one result
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_what_writes_into_a_shared_value_is_left_alone():
    class Hazard(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(5, 5, 1) for _ in range(4))

        def forward(self, x):
            y = self.a(torch.relu(self.d(x)))
            z = self.b(y)
            y.relu_()
            y += self.c(z)
            return y, z

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6)
    model = quantize_(Hazard().eval(), RECIPES["int8"], calibration=[x])
    with torch.no_grad():
        for found, expected in zip(fuse(model)(x), model(x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:82 % of the weights")  # a parameter that is added
def test_broadcast_additions():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 3, 1)
            self.shift, self.wide = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(2, 3, 6, 6))

        def forward(self, x):
            return torch.relu(self.b(torch.relu(self.a(x) + self.shift)) + self.wide)

    torch.manual_seed(0)
    x = torch.randn(1, 5, 6, 6)
    model = quantize_(Shifted().eval(), RECIPES["int8"], calibration=[x])
    fused = fuse(model)
    with torch.no_grad():
        assert fused(x).shape == (2, 3, 6, 6) and torch.equal(fused(x), model(x))


def test_gradients_and_other_types_run_the_model():
    model, x = network(), torch.randn(1, 3, 19, 17)
    fused = fuse(model)
    given = x.clone().requires_grad_()
    fused(given).sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(fused(x.double()), model(x.double()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_and_export():
    model, x = network(), torch.randn(2, 3, 19, 17)
    fused = fuse(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), expected)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(fused.graph, (x,), dynamic_shapes=({0: batch},))
        assert torch.equal(exported.module()(x.repeat(2, 1, 1, 1)), model(x.repeat(2, 1, 1, 1)))


def test_nothing_to_fuse_is_said():
    alone = quantize_(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()).eval(), RECIPES["int8"], [torch.randn(1, 3, 4, 4)]
    )
    with pytest.warns(DyBitWarning, match="no convolution is followed by"):
        assert fuse(alone) is alone
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.warns(DyBitWarning, match="no convolution has a static input scale"):
        assert fuse(plain) is plain
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(DyBitWarning, match="training mode"):
        quantize_(model, RECIPES["int8"], [torch.randn(2, 3, 4, 4)])
    with pytest.warns(DyBitWarning, match=r"convolution '0' is followed by a batch norm .* call model.eval\(\)"):
        assert fuse(model.eval()) is model


FUSABLE = {
    "convolutions": network,
    "activation": lambda: quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Sigmoid()), Recipe()),
    "feed_forward": lambda: quantize_(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval(), Recipe()),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_a_fused_model_is_neither_fused_nor_saved(tmp_path, name):
    model = FUSABLE[name]()
    fused = fuse(model)
    for outer in (fused, nn.Sequential(fused)):
        with pytest.raises(DyBitError, match="model is already fused"):
            fuse(outer)
        for write in (save, save_compressed):
            with pytest.raises(DyBitError, match="model is fused; save the model that was passed to fuse"):
                write(outer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert fused.state_dict()
    save(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["convolutions", "feed_forward"])
def test_a_fused_model_can_be_pickled(name):
    fused = fuse(FUSABLE[name]())
    x = torch.randn(*((2, 3, 19, 17) if name == "convolutions" else (2, 8)))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


def test_a_model_that_cannot_be_traced_is_named():
    class Branch(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = quantize_(Branch(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), RECIPES["int8"], [torch.ones(1, 3, 4, 4)])
    with pytest.raises(DyBitError, match="cannot be traced by torch"):
        fuse(model)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(5, 5, 3), nn.Identity(), nn.ReLU())
        self.last = nn.Conv2d(5, 5, 1)

    def forward(self, x):
        return self.last(self.block(x))


@pytest.mark.filterwarnings("ignore:fuse found nothing")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["", "block", "block.0", "block.1", "block.2", "block.3", "last"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward"])
def test_hooks_and_replaced_forwards_run(name, when, kind):
    def change(layer):
        if kind == "hook":
            layer.register_forward_hook(lambda module, args, output: output * (2 + module.training))
        elif kind == "pre_hook":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        else:
            before = layer.forward
            layer.forward = lambda x: before(x) - 1

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6)
    model = quantize_(Chain().eval(), RECIPES["int8"], calibration=[x])
    plain = model(x).detach()
    if when == "before":
        change(model.get_submodule(name))
    fused = fuse(model)
    if when == "after":
        change(model.get_submodule(name))
    with torch.no_grad():
        assert torch.equal(fused(x), model(x)) and not torch.equal(model(x), plain)


def test_pictures_without_a_batch_and_other_types_inside_run_the_model():
    class Doubled(Chain):
        wide = False

        def forward(self, x):
            y = self.block(x)
            return self.last(torch.relu(self.last(y.double() if self.wide else y))).float()

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        for net, given in ((Chain(), x[0]), (Doubled(), x)):
            model = quantize_(net.eval(), RECIPES["int8"], calibration=[x])
            model.wide = True
            assert torch.equal(fuse(model)(given), model(given))


STEPS = {
    "conv": lambda m, values, i, j: m.convs[i % 3](values[i]),
    "relu": lambda m, values, i, j: torch.relu(m.convs[j % 3](values[i])),
    "relu_": lambda m, values, i, j: m.act(m.convs[i % 3](values[j])),
    "add": lambda m, values, i, j: values[i] + values[j],
    "iadd": lambda m, values, i, j: operator.iadd(values[i], m.convs[0](values[j])),
    "write": lambda m, values, i, j: values[i].mul_(0.5),
    "part": lambda m, values, i, j: values[i][:, :3].clamp_(-0.5, 1.0).sum() * 0 + values[j],
    "view": lambda m, values, i, j: values[i].view(-1).add_(0.25).view(values[j].shape),
    "pool": lambda m, values, i, j: functional.max_pool2d(values[i], 3, 1, 1),
    "out": lambda m, values, i, j: torch.add(values[i], 0.5, out=values[j]),
    "pad": lambda m, values, i, j: m.convs[3](functional.pad(values[i], (1, 1, 1, 1))),
}


class Random(nn.Module):
    """Random steps, each on random earlier values."""

    def __init__(self, seed):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, kernel) for kernel in (1, 1, 1, 3))
        self.act = nn.ReLU(inplace=True)
        draw = random.Random(seed)
        self.steps = [(draw.choice(list(STEPS)), draw.random(), draw.random()) for _ in range(9)]
        self.hooked = draw.choice([None, None, "act", "convs.0", "convs.3", ""])

    def forward(self, x):
        values = [x]
        for name, one, other in self.steps:
            n = len(values)
            values.append(STEPS[name](self, values, int(n * one**0.4), int(n * other**0.4)))
        return sum(self.convs[1](value) for value in values[-3:])


@pytest.mark.filterwarnings("ignore:fuse found nothing", "ignore:calibration never reached")
@pytest.mark.parametrize("seed", range(60))
def test_random_networks_give_the_bits_of_the_model(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 6, 5, 4).abs()
    model = quantize_(Random(seed).eval(), RECIPES["int8"], calibration=[x.clone(), -x])
    if model.hooked is not None:
        model.get_submodule(model.hooked).register_forward_hook(lambda module, args, y: y * 0.75)
    fused = fuse(model)
    with torch.no_grad():
        for given in (x, torch.where(x > 2, torch.nan, x)):
            one, other = given.clone(), given.clone()
            torch.testing.assert_close(fused(one), model(other), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
