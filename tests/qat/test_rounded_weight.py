"""The weight of a layer in training as others read it: its values, its gradients, and what is written to it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dybit import DyBitError, Recipe, convert_, prepare_qat_

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
    "chunk": lambda weight, x: [nn.init.zeros_(gate) for gate in weight.chunk(3)],
    "split": lambda weight, x: torch.split(weight, [2, 4])[1].copy_(x[2:]),
    "unbind": lambda weight, x: weight.unbind(1)[2].fill_(3),
    "hsplit": lambda weight, x: torch.hsplit(weight, 2)[0].mul_(2),
    "tensor_split": lambda weight, x: weight.tensor_split(3)[1].zero_(),
    "rows": lambda weight, x: [row.zero_() for row in weight],
    "named": lambda weight, x: torch.chunk(input=weight, chunks=2)[1].zero_(),
    "beside": lambda weight, x: torch.broadcast_tensors(x, weight)[1].zero_(),
    "nested": lambda weight, x: weight.T.chunk(2)[0].unbind(0)[1].zero_(),
    "foreach_zero": lambda weight, x: torch._foreach_zero_([x, weight]),
    "foreach_mul": lambda weight, x: torch._foreach_mul_([weight], 3.0),
    "foreach_copy": lambda weight, x: torch._foreach_copy_([weight], [x]),
    "foreach_view": lambda weight, x: torch._foreach_zero_(weight.chunk(2)),
    "relu": lambda weight, x: functional.relu(weight, inplace=True),
    "relu_by_place": lambda weight, x: functional.relu(weight, True),
    "dropout": lambda weight, x: torch.feature_dropout_(input=weight, p=1.0, train=True),
    "apply": lambda weight, x: weight.data.apply_(lambda value: 1.0),
    "storage": lambda weight, x: weight.untyped_storage().fill_(0),
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


REFUSED = {
    "set": (lambda weight, x: weight.set_(x), DyBitError, "cannot be given other memory"),
    "resize": (lambda weight, x: weight.resize_(3, 3), DyBitError, "cannot be changed by resize_"),
    "norm": (lambda weight, x: functional.embedding(torch.tensor([0]), weight, max_norm=0.1), DyBitError, "embedding"),
    "numpy": (lambda weight, x: weight.detach().numpy().fill(0), ValueError, "read-only"),
    "array": (lambda weight, x: np.asarray(weight.detach()).fill(0), ValueError, "read-only"),
    "swap": (lambda weight, x: torch.utils.swap_tensors(weight, nn.Parameter(x)), RuntimeError, "slots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_writes_that_cannot_reach_the_parameter_are_refused(name):
    write, error, message = REFUSED[name]
    made = layer()
    before = made._parameters["weight"].clone()
    with torch.no_grad(), pytest.raises(error, match=message):
        write(made.weight, torch.rand(6, 8))
    assert torch.equal(made._parameters["weight"], before)


def test_views_of_the_weight_have_its_gradients():
    made = layer()
    first, second = made.weight.chunk(2)
    (first.sum() + 2 * second.sum()).backward()
    assert made._parameters["weight"].grad.abs().sum() > 0


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
