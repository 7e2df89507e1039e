"""Random networks for programs of kernels: branches, shared layers, several inputs and results."""

import random

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from dybit import Recipe, quantize_
from dybit.runtime.program import FusedProgram

RECIPE = Recipe(weights=4, activations="int8", granularity="channel", method="absmax", activation_method="absmax")
CHANNELS = 6
WIDTH = 24


class Images(nn.Module):
    """Random steps on images, each on random earlier values. Some write to values in place."""

    def __init__(self, seed):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2) for kernel in (1, 1, 3))
        self.deep = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.act = nn.ReLU6(inplace=True)
        self.norm, self.back = nn.BatchNorm2d(CHANNELS), nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)
        draw = random.Random(seed)
        self.steps = [(draw.choice(IMAGE_STEPS), draw.random(), draw.random()) for _ in range(9)]

    def forward(self, x, other):
        values = [x, other + 0.5]
        for step, one, two in self.steps:
            n = len(values)
            values.append(step(self, values[int(n * one**0.4)], values[int(n * two**0.4)]))
        return {"last": self.convs[1](values[-1]), "sum": values[-2] + values[-3], "size": x.shape[0]}


def _gate(m, x):
    return torch.sigmoid(m.excite(functional.silu(m.squeeze(functional.adaptive_avg_pool2d(x, 1)))))


IMAGE_STEPS = [
    lambda m, x, y: m.convs[0](x),
    lambda m, x, y: m.convs[2](x),
    lambda m, x, y: m.deep(x),
    lambda m, x, y: torch.relu(m.convs[1](x)),
    lambda m, x, y: m.act(m.convs[1](x)),
    lambda m, x, y: m.act(m.deep(x)) + y,
    lambda m, x, y: torch.relu(m.convs[0](x) + y),
    lambda m, x, y: functional.max_pool2d(functional.pad(x, (1, 1, 1, 1)), 3, 1),
    lambda m, x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
    lambda m, x, y: x * 0.5 - y.clamp(-0.5, 1.0),
    lambda m, x, y: functional.hardswish(x),
    lambda m, x, y: x * functional.hardsigmoid(y.mean((2, 3), keepdim=True)),
    lambda m, x, y: x * _gate(m, y),
    lambda m, x, y: functional.silu(m.deep(m.back(x))),
    lambda m, x, y: torch.relu(m.norm(x)) + y,
    lambda m, x, y: functional.avg_pool2d(x, 3, 1, 1) - functional.adaptive_avg_pool2d(y, 1),
    lambda m, x, y: m.convs[1](x).relu_().add_(functional.normalize(y, dim=1)),
    lambda m, x, y: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda m, x, y: x.flatten(2).cumsum(-1).view(x.shape).clamp(-1, 1),
    lambda m, x, y: (x + 0.0).mul_(0.5).add_(y),
]


class Rows(nn.Module):
    """Random steps on tokens, as in transformers."""

    def __init__(self, seed):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)])
        draw = random.Random(seed)
        self.steps = [(draw.choice(ROW_STEPS), draw.random(), draw.random()) for _ in range(8)]

    def forward(self, x, mask=None):
        values = [x, x * 0.5]
        for step, one, two in self.steps:
            n = len(values)
            values.append(step(self, values[int(n * one**0.4)], values[int(n * two**0.4)], mask))
        return self.layers[0](values[-1]), values[-2]


def _heads(x):
    return x.view(*x.shape[:2], 3, WIDTH // 3).transpose(1, 2)


def _attend(m, x, y, mask):
    q, k, v = (_heads(layer(value)) for layer, value in zip(m.layers, (x, y, y), strict=True))
    seen = None if mask is None else mask[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(x.shape)


def _pooled(x, mask):
    kept = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].float()
    return (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1e-3)


ROW_STEPS = [
    lambda m, x, y, mask: m.norms[0](x),
    lambda m, x, y, mask: m.norms[1](x + y),
    lambda m, x, y, mask: m.layers[0](x) + y,
    lambda m, x, y, mask: y + m.down(functional.gelu(m.up(x))),
    lambda m, x, y, mask: m.layers[2](functional.silu(m.layers[0](x)) * m.layers[1](x)),
    lambda m, x, y, mask: torch.relu(m.layers[1](x)) - y,
    _attend,
    lambda m, x, y, mask: torch.cat([x[..., :8], y[..., 8:]], -1),
    lambda m, x, y, mask: x.flip(1).cumsum(-1).sin() + y,
    lambda m, x, y, mask: torch.softmax(x, -1) * 3,
    lambda m, x, y, mask: m.layers[2](x.transpose(0, 1)).transpose(0, 1),
    lambda m, x, y, mask: x.flatten(0, 1).view(x.shape).tanh(),
    lambda m, x, y, mask: x - y.mean(1, keepdim=True) * functional.normalize(y, dim=-1),
    lambda m, x, y, mask: x * torch.rsqrt((y**2).mean(-1, keepdim=True) + 1e-6),
    lambda m, x, y, mask: x + _pooled(y, mask),
]


def images(seed):
    """A quantized random network of images, and its inputs."""
    torch.manual_seed(seed)
    inputs = torch.randn(2, CHANNELS, 7, 5).abs(), torch.randn(2, CHANNELS, 7, 5)
    model = quantize_(Images(seed).eval(), RECIPE, calibration=[inputs, (-inputs[0], inputs[1])])
    return model, inputs


def rows(seed, mode="static"):
    """A quantized random network of tokens, and its inputs."""
    torch.manual_seed(seed)
    x = torch.randn(2, 9, WIDTH)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    recipe = Recipe(weights=4, activations="int8", activation_mode=mode, method="absmax", activation_method="absmax")
    model = quantize_(Rows(seed).eval(), recipe, calibration=[(x, mask), (x * 0.7, mask)])
    return model, (x, mask)


def same(one, other, rtol=0.0, atol=0.0):
    """Checks that two structures of results hold the same numbers, types, shapes and strides."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.stride() == y.stride()
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert x == y


def names(fused, *inputs):
    """The steps of a fused model in order; those of torch begin with "torch:"."""
    return [share.name if share.kernel else f"torch:{share.name}" for share in fused.report(*inputs).shares]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def check(function, *inputs, steps=None, rtol=1e-5, atol=2e-6):
    """Compares a program with the function, and its steps with those expected."""
    model = Function(function).eval()
    fused = FusedProgram(model, inputs, {})
    same(fused(*inputs), model(*inputs), rtol, atol)
    if steps is not None:
        assert names(fused, *inputs) == steps


def _unit(channels, out, kernel=1, stride=1, groups=1, act=None):
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), *([act] if act else [])]


class Inverted(nn.Module):
    """A block of MobileNetV3 or EfficientNet, with squeeze-and-excitation."""

    def __init__(self, act, gate, stride=1):
        super().__init__()
        self.wide = nn.Sequential(*_unit(8, 16, act=act), *_unit(16, 16, 5, stride, 16, act))
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act, gate
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.narrow = nn.Sequential(*_unit(16, 8))

    def forward(self, x):
        y = self.wide(x)
        y = self.narrow(y * self.gate(self.excite(self.act(self.squeeze(self.pool(y))))))
        return x + y if y.shape == x.shape else y


class Dense(nn.Module):
    """A block of a DenseNet: batch norm and activation before a convolution, concatenation after it."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(True), nn.Conv2d(8 + 4 * i, 4, 3, padding=1))
            for i in range(3)
        )

    def forward(self, x):
        for part in self.parts:
            x = torch.cat([x, part(x)], 1)
        return functional.avg_pool2d(x, 2)


class Transformer(nn.Module):
    """An encoder of patches with a class token, or of words whose means are normalized."""

    def __init__(self, words):
        super().__init__()
        self.words, self.patches = nn.Embedding(50, WIDTH), nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Embedding(40, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 3, 32, activation="gelu", batch_first=True)
        self.head, self.of_words = nn.Linear(WIDTH, 5), words

    def forward(self, x, mask=None):
        if not self.of_words:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        else:
            x = self.words(x)
        y = self.layer(x + self.places(torch.arange(x.shape[1])))
        return self.head(y[:, 0]) if mask is None else functional.normalize(_pooled(y, mask), dim=-1)


#: Small networks of known kinds, and their inputs.
NETWORKS = {
    "MobileNetV3": lambda: (
        nn.Sequential(
            *_unit(3, 8, 3, 2, act=nn.Hardswish()), Inverted(nn.ReLU(), nn.Hardsigmoid()),
            Inverted(nn.Hardswish(), nn.Hardsigmoid(), 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        ),
        (torch.randn(2, 3, 16, 16),),
    ),
    "EfficientNet": lambda: (
        nn.Sequential(
            *_unit(3, 8, 3, 2, act=nn.SiLU(True)), Inverted(nn.SiLU(), nn.Sigmoid()), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 5),
        ),
        (torch.randn(2, 3, 16, 16),),
    ),
    "DenseNet": lambda: (
        nn.Sequential(*_unit(3, 8, 3, act=nn.ReLU()), Dense(), nn.BatchNorm2d(20), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        (torch.randn(2, 3, 12, 12),),
    ),
    "ViT": lambda: (Transformer(words=False), (torch.randn(2, 3, 16, 16),)),
    "sentences": lambda: (Transformer(words=True), (torch.randint(0, 50, (2, 9)), torch.rand(2, 9) > 0.3)),
}  # fmt: skip
