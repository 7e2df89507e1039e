"""Linear layers, norms and attention in programs: what is rounded once, what is taken up, and the numbers."""

from dataclasses import replace

import pytest
import torch
from programs import names, same
from torch import nn
from torch.nn import functional

from dybit import Recipe, quantize_
from dybit.kernels import extension
from dybit.runtime.program import FusedProgram

ISAS = extension.available()[1:]
pytestmark = [
    pytest.mark.filterwarnings("ignore:calibration never reached"),
    pytest.mark.usefixtures("restore_isa"),
    pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="no compiled kernels"),
]
DYNAMIC = Recipe(weights=4, activations="int8", activation_mode="dynamic", method="absmax", group_size=32)
WIDTH = 64


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.function = forward

    def forward(self, x, *more):
        return self.function(self, x, *more)


def check(forward, steps, *more, recipe=DYNAMIC, atol=0.0, x=None):
    """Compares a program with its model, and its steps with those expected."""
    x = torch.randn(2, 9, WIDTH) if x is None else x
    static = recipe.activations is not None and recipe.activation_mode == "static"
    model = quantize_(Net(forward).eval(), recipe, calibration=[(x, *more)] if static else None)
    fused = FusedProgram(model, (x, *more), {})
    with torch.no_grad():
        same(fused(x, *more), model(x, *more), rtol=atol, atol=atol)
    if steps is not None:
        assert names(fused, x, *more) == steps


@pytest.mark.parametrize("isa", ISAS)
def test_layers_share_rounded_rows(isa):
    extension.use(isa)
    check(lambda m, x: (m.q(x), m.k(x), m.v(x)), ["round", "linear", "linear", "linear"])


@pytest.mark.parametrize(
    "recipe",
    [
        replace(DYNAMIC, activation_mode="static", activation_method="absmax"),
        replace(DYNAMIC, activations="dybit8"),
        replace(DYNAMIC, activation_group_size=32),
        replace(DYNAMIC, weights=8),
        replace(DYNAMIC, weights=3, granularity="channel", group_size=None),
        replace(DYNAMIC, activations=None, activation_mode="static"),
    ],
)
def test_recipes(recipe):
    check(lambda m, x: (m.q(x), m.k(m.v(x))), None, recipe=recipe)


def test_scales_of_their_own_are_rounded_for_themselves():
    """Layers after different calibration do not share rows."""
    x = torch.randn(2, 9, WIDTH)
    recipe = replace(DYNAMIC, activation_mode="static", activation_method="absmax")
    model = quantize_(Net(lambda m, x: (m.q(x), m.k(x))).eval(), recipe, calibration=[x])
    with torch.no_grad():
        model.k.input_scale.mul_(1.5)
        fused = FusedProgram(model, (x,), {})
        same(fused(x), model(x))
    assert names(fused, x) == ["round", "round", "linear", "linear"]


def test_norms_round_their_results():
    check(lambda m, x: (m.q(m.norm(x)), m.k(m.rms(x))), ["norm", "linear", "norm", "linear"], atol=0.02)

    def both(m, x):
        y = m.norm(x)
        return m.q(y) + m.k(y), y

    check(both, ["norm", "linear", "linear"], atol=0.02)


def test_parts_of_norms():
    def plain(m, x):
        a = functional.layer_norm(x, (WIDTH,))
        b = functional.layer_norm(x, (WIDTH,), m.norm.weight, eps=1e-3)
        return a + functional.rms_norm(x, (WIDTH,)), b, functional.rms_norm(x, (WIDTH,), eps=0.1)

    check(plain, None, atol=1e-5)
    check(lambda m, x: functional.layer_norm(x, (9, WIDTH)), ["torch:aten.layer_norm.default"])


@pytest.mark.parametrize(
    ("act", "atol"),
    [
        (torch.relu, 0.0),
        (functional.silu, 1e-5),
        (functional.gelu, 1e-5),
        (lambda x: functional.gelu(x, approximate="tanh"), 1e-5),
    ],
)
def test_activations_factors_and_sums_are_taken_up(act, atol):
    check(lambda m, x: x + act(m.q(x)) * x, ["round", "linear"], atol=atol)


def test_gates():
    check(
        lambda m, x: x + m.down(functional.silu(m.up(x)) * m.up(x + 0.0)),
        ["round", "linear", "add", "round", "linear", "round", "linear"],
        atol=0.02,
    )


def test_what_is_used_twice_or_broadcasts_is_not_taken_up():
    def twice(m, x):
        y = m.q(x)
        return y.relu() + y

    check(twice, ["round", "linear", "relu", "add"])
    check(lambda m, x: m.q(x) + x[:, :1], ["round", "linear", "add"])
    check(lambda m, x: m.q(x) - x, ["round", "linear", "sub"])


def heads(x):
    return x.view(*x.shape[:2], 4, -1).transpose(1, 2)


def attend(m, x, mask=None, **options):
    y = functional.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), mask, **options)
    return y.transpose(1, 2).reshape(x.shape)


ATTENTION = ["round", "linear", "linear", "linear", "attention"]


def test_attention():
    check(lambda m, x: attend(m, x), ATTENTION, atol=1e-5)
    check(lambda m, x: attend(m, x, is_causal=True), ATTENTION, atol=1e-5)
    check(lambda m, x: attend(m, x, scale=0.3), ATTENTION, atol=1e-5)
    check(lambda m, x: m.down(m.up(attend(m, x))), [*ATTENTION, "round", "linear", "round", "linear"], atol=0.02)


def test_masks_of_attention():
    seen = torch.rand(2, 1, 1, 9) > 0.4
    seen[..., 0] = True
    for mask in (seen, torch.randn(2, 1, 1, 9), torch.randn(2, 4, 9, 9), torch.randn(9, 9), torch.randn(4, 1, 9)):
        check(lambda m, x, mask: attend(m, x, mask), ATTENTION, mask, atol=1e-5)
    check(lambda m, x, mask: attend(m, x, mask), None, seen.expand(2, 4, 9, 9).clone().requires_grad_(False), atol=1e-5)


def test_fewer_heads_of_keys():
    def grouped(m, x):
        q, k, v = heads(m.q(x)), heads(m.k(x))[:, :2], heads(m.v(x))[:, :2]
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(x.shape)

    check(grouped, ATTENTION, atol=1e-5)


def test_dropout_in_attention_is_left_to_torch():
    check(lambda m, x: attend(m, x, dropout_p=1e-30), None, atol=1e-5)


def test_rows_in_blocks():
    """With many rows, steps run on blocks of rows in the cache; the last block has fewer."""

    def block(m, x):
        return x + m.down(functional.gelu(m.up(m.norm(x)))), m.q(x)

    check(block, ["round", "norm", "linear", "round", "linear", "linear"], atol=0.02, x=torch.randn(5, 131, WIDTH))


def test_transposed_rows():
    check(lambda m, x: m.q(x.transpose(0, 1)).transpose(0, 1), None)
    check(lambda m, x: m.q(x[:, ::2]), None)
    check(lambda m, x: m.q(x[:, 0]), ["round", "linear"])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_of_torch(batch_first, mode):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, activation="gelu", batch_first=batch_first).eval()
    x = torch.randn(3, 7, WIDTH)
    model = quantize_(layer, replace(DYNAMIC, activation_mode=mode, activation_method="absmax"), calibration=[x])
    fused = FusedProgram(model, (x,), {})
    with torch.no_grad():
        for given in (x, torch.randn(2, 5, WIDTH)):
            one, other = fused(given), model(given)
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.02 * float(other.abs().amax()))
    assert not [name for name in names(fused, x) if name.startswith("torch")]


def test_attention_to_other_tokens_and_its_weights():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.other = nn.MultiheadAttention(WIDTH, 4, batch_first=True, kdim=32, vdim=32)

        def forward(self, x, y, mask):
            mixed, weights = self.one(x, x[:, :3], x[:, :3])
            return self.other(mixed, y, y, key_padding_mask=mask, need_weights=False)[0], weights

    given = torch.randn(2, 7, WIDTH), torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = quantize_(Crossed().eval(), DYNAMIC, calibration=[given])
    with torch.no_grad():
        same(FusedProgram(model, given, {})(*given), model(*given), rtol=1e-5, atol=1e-5)
