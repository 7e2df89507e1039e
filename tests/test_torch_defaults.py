"""Nothing that is computed depends on torch's default dtype and default device (test_package.py reads the source)."""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import dybit
from dybit.formats import catalogue
from dybit.kernels import extension
from dybit.measure.fidelity import compare_models
from dybit.measure.format_ranking import Setting, measure
from dybit.operators.experts import experts
from dybit.operators.input_rounding import InputRounding
from dybit.qat.prepare import prepare_qat_
from dybit.tensors.encoding import quantize
from dybit.tensors.hadamard import orthogonal_factor
from dybit.tensors.quantized_tensor import TensorSpec


def forget():
    """Empties every cache of dybit, so that tables are made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dybit"):
            for made in vars(module).values():
                if hasattr(made, "cache_clear") and made is not extension.load:
                    made.cache_clear()


@contextmanager
def defaults(name):
    """Another default dtype or, for ``meta``, another default device."""
    with torch.device("meta" if name == "meta" else "cpu"):
        torch.set_default_dtype(torch.float32 if name == "meta" else getattr(torch, name))
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["kernels", "torch"])
def path(request):
    """With the compiled kernels, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(extension, "load", lambda: None)
        yield request.param


def assert_same(make, compute, names=("float64", "bfloat16", "float16", "meta")):
    """What is computed from inputs made beforehand does not depend on the defaults, bit for bit."""

    def run(name):
        given = make()
        forget()
        with defaults(name):
            return compute(*given)

    expected = run("float32")
    for name in names:
        found = run(name)
        assert expected and len(found) == len(expected)
        for index, pair in enumerate(zip(found, expected, strict=True)):
            a, b = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in pair)
            assert (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b), (name, index)
    forget()


@pytest.mark.parametrize("method", ["mse", "absmax", "percentile"])
def test_weights(method, path):
    specs = [
        *(TensorSpec("dybit3", (6, 40), "group", 16, scale, choice="group") for scale in ("pow2", "e4m3")),
        *(TensorSpec("int4asym", (6, 40), "channel", None, "bf16"), TensorSpec("nf4", (6, 40), "group", 64)),
        TensorSpec("dybit4", (6, 40), "tensor", choice="tensor"),
    ]

    def compute(weight):
        found = []
        for spec in specs:
            made = quantize(weight, spec, method=method)
            found += [*made.buffers().values(), made.scales(), made.codes(), made.dequantize()]
        return found

    assert_same(lambda: [torch.arange(-120, 120).view(6, 40).float().sin()], compute)


LAYERS = [
    (lambda: nn.Linear(40, 6), (2, 3, 40)),
    (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 9)),
    (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 9, 9)),
    (lambda: nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), groups=4), (1, 4, 5, 8, 8)),
    (lambda: nn.ConvTranspose2d(8, 6, 3), (2, 8, 5, 5)),
    (lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), (2, 5, 16)),
]
RECIPES = {
    "kept": {"weights": 4},
    "static": {"weights": 4, "activations": 8, "activation_offset": False},
    "offset": {"weights": 4, "activations": "int8", "activation_method": "absmax"},
    "dynamic": {"weights": 4, "activations": "int8", "activation_mode": "dynamic"},
    "nf4": {"weights": "nf4", "activations": 8},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_modules(recipe, path):
    def make():
        torch.manual_seed(0)
        return [(nn.Sequential(build()).eval(), *torch.randn(2, *shape)) for build, shape in LAYERS]

    def compute(*layers):
        found = []
        for model, x, tracked in layers:
            dybit.quantize_(model, dybit.Recipe(**RECIPES[recipe]), [x])
            y = model(tracked.requires_grad_())
            y.sum().backward()
            found += [model(x), y, tracked.grad, *model.state_dict().values()]
        return found

    assert_same(make, compute)


def test_embeddings_and_experts(path):
    def make():
        torch.manual_seed(0)
        table = nn.Sequential(nn.Embedding(30, 40))
        return table, torch.arange(12).view(3, 4), torch.randn(3, 7, 40), torch.randn(11, 40), torch.arange(11) % 4

    def compute(table, index, matrices, x, expert):
        dybit.quantize_(table, dybit.Recipe(weights=3, group_size=16))
        weight = quantize(matrices, TensorSpec("dybit4", (3, 7, 40), row_dims=2))
        return [
            table(index),
            experts(x, expert, weight),
            experts(x, expert, weight, InputRounding("u8r1", reach=1.9, group_size=8)),
        ]

    assert_same(make, compute)


class Net(nn.Module):
    """Convolutions with a batch norm and a residual, and a block of linear layers with an activation between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(2)])

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.second(x) + x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return x


def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(6, 3, 6, 6)


def test_fused_models(path):
    def compute(model, x):
        dybit.quantize_(model, dybit.Recipe(weights=4, activations=8), [x])
        return [dybit.fuse(model)(x)]

    assert_same(net, compute)


@pytest.mark.parametrize(
    "algorithms",
    [("equalize", "gptq", "statistics"), ("equalize", "smooth", "adaround"), ("rtn", "bias", "brecq")],
    ids=",".join,
)
def test_algorithms(algorithms):
    def compute(model, x):
        dybit.quantize_(model, dybit.Recipe(weights=3, activations=8), [x], algorithm=algorithms)
        return [model(x), *model.state_dict().values()]

    assert_same(net, compute, ["meta"] if "brecq" in algorithms else ["float64", "meta"])


def test_rotations():
    def compute(*sizes):
        return [orthogonal_factor(size, torch.Generator().manual_seed(0)) for size in sizes]

    assert_same(lambda: (1, 2, 12, 28, 36, 44, 7, 172), compute)


def test_checkpoints(tmp_path):
    def compute(model, fresh, x):
        dybit.quantize_(model, dybit.Recipe(weights=4, activations=8, scale="e4m3", group_size=16), [x])
        dybit.save(model, tmp_path / "out")
        return [dybit.load(tmp_path / "out", fresh)(x), *fresh.state_dict().values()]

    assert_same(lambda: [net()[0], *net()], compute)


@pytest.mark.parametrize("recipe", [{"weights": 3}, {"weights": "nf4"}, {"weights": 4, "group_size": 16}], ids=str)
def test_training(recipe, path):
    def compute(model, x):
        prepare_qat_(model, dybit.Recipe(activations=8, **recipe), calibration=[x])
        model.train()
        y = model(x)
        y.square().mean().backward()
        found = [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        dybit.convert_(model)
        return [*found, model.eval()(x), *model.state_dict().values()]

    assert_same(net, compute, ["float64", "float16"])


def test_measurements():
    def compute(weight, model, other, x):
        families = [catalogue.family("dybit4"), catalogue.family("int4")]
        ranked = measure([weight], families, Setting("channel", None, "fp32", "mse"), 4)
        found = compare_models(model, dybit.quantize_(other, dybit.Recipe(weights=4)), [x])
        numbers = [*(result.sqnr for result in ranked), found.sqnr, found.spearman]
        return [torch.tensor(numbers, dtype=torch.float64, device="cpu")]

    assert_same(lambda: [torch.arange(-1200, 1200).view(40, 60).float().sin(), net()[0], *net()], compute)
