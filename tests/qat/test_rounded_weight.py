"""The weight of a layer in training as others read it: its values, its gradients, and what is written to it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dybit import Recipe, convert_, prepare_qat_

WRITES = {
    "copy": lambda weight, x: weight.data.copy_(x),
    "data": lambda weight, x: setattr(weight, "data", x.clone()),
    "init": lambda weight, x: nn.init.uniform_(weight, 3, 4),
    "xavier": lambda weight, x: nn.init.xavier_normal_(weight),
    "zeros": lambda weight, x: nn.init.zeros_(weight),
    "fill": lambda weight, x: weight.fill_(2),
    "item": lambda weight, x: weight.__setitem__(0, 7.0),
    "row": lambda weight, x: weight[1].mul_(0),
    "transposed": lambda weight, x: weight.T[:, 2].copy_(x[2]),
    "detached": lambda weight, x: weight.detach().copy_(x),
    "added": lambda weight, x: weight.__iadd__(x),
    "out": lambda weight, x: torch.add(x, x, out=weight),
}


def layer(kind=nn.Linear, recipe=None, **options):
    torch.manual_seed(0)
    module = nn.Embedding(6, 8) if kind is nn.Embedding else nn.Linear(8, 6)
    recipe = recipe or Recipe(weights=4, embeddings=4)
    return prepare_qat_(nn.Sequential(module), recipe, **options)[0]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_writes_reach_the_parameter(write, kind):
    made, plain = layer(kind), nn.Parameter(layer(kind)._parameters["weight"].detach().clone())
    values = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    given = made._parameters["weight"]
    with torch.no_grad():
        for weight in (plain, made.weight):
            torch.manual_seed(5)
            write(weight, values)
    assert made._parameters["weight"] is given
    assert torch.equal(given, plain) and not torch.equal(given, layer(kind)._parameters["weight"])


def test_freezing_and_gradients_are_those_of_the_parameter():
    made = layer()
    made(torch.randn(3, 8)).sum().backward()
    assert made.weight.grad is made._parameters["weight"].grad
    made.weight.requires_grad_(False)
    assert not made._parameters["weight"].requires_grad
    made.weight.requires_grad = True
    assert made._parameters["weight"].requires_grad
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):  # as in floating point
        made.weight.mul_(2)


def test_others_compute_with_the_rounded_values_and_their_gradients():
    made, x = layer(nn.Embedding), torch.randn(3, 8)
    twin = copy.deepcopy(made)
    rounded = made.weight
    functional.linear(x, rounded).square().sum().backward()
    assert rounded.unique().numel() < made._parameters["weight"].unique().numel()
    assert made._parameters["weight"].grad.abs().sum() > 0 and made.weight_quantizer.log_scale.grad.abs().sum() > 0
    quantized = convert_(nn.Sequential(twin))[0]
    assert torch.equal(quantized.weight, rounded)
    assert type(functional.linear(x, rounded)) is torch.Tensor
