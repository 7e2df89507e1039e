"""Transforms of torch.func, and forward-mode differentiation, of quantized layers against ordinary gradients."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from dybit import DyBitError, Recipe, prepare_qat_, quantize_
from dybit.kernels.transforms import outside_transforms, pass_gradients, transforming

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")  # torch's own, of forward mode

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 4, 4)),
    "lstm": (lambda: nn.LSTM(8, 4), (3, 2, 8)),
    "gru_cell": (lambda: nn.GRUCell(8, 4), (3, 8)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
}


def made(name, change, activations):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    holder = nn.ModuleList([make()])
    layer, attention = holder[0], name == "attention"
    change(holder, Recipe(weights=4, group_size=4, activations=activations, activation_mode="dynamic"))

    def compute(x):
        y = layer(x, x, x) if attention else layer(x)
        return y[0] if isinstance(y, tuple) else y

    return compute, torch.randn(shape), layer


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_quantized_layers(name, activations):
    compute, x, _ = made(name, quantize_, activations)
    leaf, direction = x.clone().requires_grad_(), torch.randn_like(x)
    y = compute(leaf)
    weights = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, leaf, weights)
    along = (wanted * direction).sum()

    def loss(z):
        return (compute(z) * weights).sum()

    assert close(grad(loss)(x), wanted)
    value, pull = vjp(compute, x)
    assert close(value, y.detach()) and close(pull(weights)[0], wanted)
    jacobian = jacrev(compute)(x)
    assert close((jacobian * weights.view(*y.shape, *(1,) * x.ndim)).sum(tuple(range(y.ndim))), wanted)
    assert close((jvp(compute, (x,), (direction,))[1] * weights).sum(), along)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compute(forward_ad.make_dual(x, direction))).tangent
    assert close((tangent * weights).sum(), along)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_every_sample(activations):
    compute, x, _ = made("linear", quantize_, activations)
    found = vmap(grad(lambda row: compute(row).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    compute(leaf).square().sum().backward()
    assert close(found, leaf.grad)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("train", [False, True])
def test_layers_in_training(train, activations):
    compute, x, layer = made("linear", prepare_qat_, activations)
    layer.train(train)
    leaf = x.clone().requires_grad_()
    compute(leaf).square().sum().backward()
    assert close(grad(lambda z: compute(z).square().sum())(x), leaf.grad)
    with pytest.raises(DyBitError, match="rounding in training has no rules"):
        grad(lambda values: functional_call(layer, values, (x,)).sum())(dict(layer.named_parameters()))


def test_learned_roundings_of_inputs_are_refused():
    x = torch.randn(3, 8)
    layer = prepare_qat_(
        nn.Sequential(nn.Linear(8, 6)), Recipe(weights=4, activations=8, activation_mode="static"), [x]
    )
    with pytest.raises(DyBitError, match="rounding in training has no rules"):
        grad(lambda z: layer(z).sum())(x)
    with forward_ad.dual_level(), pytest.raises(DyBitError, match="rounding in training has no rules"):
        layer(forward_ad.make_dual(x, x))


def test_outside_of_transforms_tensors_have_memory():
    assert not transforming()

    def f(x):
        assert transforming()
        with outside_transforms():
            assert torch.ones(2).data_ptr()
            assert not torch._C._functorch.is_functorch_wrapped_tensor(torch.ones(2))
        return pass_gradients(x, x.detach().round()).sum()

    gradient = grad(f)(torch.tensor([0.3, 1.7, float("inf")]))
    assert torch.equal(gradient[:2], torch.ones(2)) and not transforming()
