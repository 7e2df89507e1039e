"""Weights of quantized layers: described without values, computed when used, quantized when written."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import numpy_weight
from torch import nn
from torch.nn import functional

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.quantized_weight import QuantizedWeight, plain_values
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe
from dybit.tensors.quantized_tensor import QuantizedTensor


@pytest.fixture
def dequantized(monkeypatch):
    """The number of dequantizations of whole weights so far, in a list of one."""
    count, original = [0], QuantizedTensor.dequantize

    def counted(self, dtype=torch.float32):
        count[0] += 1
        return original(self, dtype)

    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    return count


def linear(recipe=None, size=(6, 8), dtype=torch.float32):
    return quantize_(nn.Linear(size[1], size[0], dtype=dtype), recipe or Recipe(weights=4))


def oracle(layer):
    return torch.from_numpy(numpy_weight(layer.quantized_tensor()).copy()).to(layer.float_dtype)


DESCRIPTIONS = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "shape": lambda w: (w.shape, w.size(), w.size(0), len(w), w.ndim, w.dim(), w.numel(), torch.numel(w), w.nelement()),
    "kind": lambda w: (w.is_floating_point(), torch.is_floating_point(w), w.is_complex(), torch.is_tensor(w), w.layout),
    "place": lambda w: (w.is_cuda, w.is_cpu, w.is_meta, w.is_sparse, w.get_device(), w.is_quantized, w.is_inference()),
    "memory": lambda w: (w.stride(), w.stride(0), w.is_contiguous(), w.element_size(), w.nbytes, w.storage_offset()),
    "gradient": lambda w: (w.requires_grad, w.grad, w.grad_fn, w.is_leaf, w.retains_grad),
    "type": lambda w: isinstance(w, torch.Tensor),
    "data": lambda w: (w.data.dtype, w.detach().shape, w.data.device),
    "alike": lambda w: [
        (x.dtype, x.device, x.shape, x.stride())
        for x in (torch.zeros_like(w), torch.empty_like(w), w.new_zeros(2, 3), w.new_empty(4), w.new_full((2,), 1.0))
    ],
    "as": lambda w: (
        torch.ones(2).double().to(w).dtype,
        torch.ones(2).half().type_as(w).dtype,
        torch.ones(8).expand_as(w),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_need_no_values(name, dtype, dequantized):
    layer = linear(dtype=dtype)
    dequantized[0] = 0
    expected = torch.empty(6, 8, dtype=dtype)
    found, wanted = DESCRIPTIONS[name](layer.weight), DESCRIPTIONS[name](expected)
    assert str(found) == str(wanted)
    assert dequantized == [0]


class FeedForward(nn.Module):
    """Reads types and devices of weights as T5's feed-forward block and Mamba's head do."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5, bias=False)
        self.embedding = nn.Embedding(5, 8)

    def forward(self, tokens):
        x = self.embedding(tokens).to(self.wi.weight.dtype)
        x = functional.gelu(self.wi(x))
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        x = self.wo(x.to(self.wo.weight.device))
        return self.head(x.to(self.head.weight.dtype).type_as(self.head.weight))


@pytest.mark.parametrize("activations", [None, 8])
def test_blocks_that_read_types_dequantize_nothing(activations, dequantized):
    model, tokens = FeedForward().eval(), torch.tensor([[1, 4, 2]])
    recipe = Recipe(weights=4, embeddings=8, activations=activations, activation_mode="dynamic")
    quantize_(model, recipe)
    dequantized[0] = 0
    with torch.no_grad():
        model(tokens)
    assert dequantized == [0]


def test_values_are_computed_once_a_read(dequantized):
    layer, x = linear(), torch.randn(3, 8)
    expected = oracle(layer)
    dequantized[0] = 0
    weight = layer.weight
    assert torch.equal(x @ weight.T, x @ expected.T)
    assert torch.equal(weight.abs().sum(), expected.abs().sum())
    assert torch.equal(weight, expected)
    assert dequantized == [1]


OPERATIONS = {
    "linear": lambda w, x: functional.linear(x, w),
    "matmul": lambda w, x: w @ x.T,
    "reversed": lambda w, x: 2.0 - w,
    "index": lambda w, x: w[1:3, ::2],
    "integers": lambda w, x: w[torch.tensor([0, 2])],
    "chunk": lambda w, x: torch.cat(w.chunk(3)) + 0,
    "list": lambda w, x: torch.stack([w, w]),
    "named": lambda w, x: torch.add(input=x[0], other=w),
    "loop": lambda w, x: sum(row.sum() for row in w),
    "cast": lambda w, x: w.double(),
    "maximum": lambda w, x: w.max(dim=1),
    "norm": lambda w, x: torch.linalg.vector_norm(w),
    "numpy": lambda w, x: torch.tensor(np.asarray(w)),
    "tolist": lambda w, x: torch.tensor(w.tolist()),
    "copy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
    "vmap": lambda w, x: torch.vmap(lambda row: functional.linear(row, w))(x),
    "vmap_weight": lambda w, x: torch.vmap(lambda row: row.sum())(w + 0),
    "jacobian": lambda w, x: torch.func.jacrev(lambda y: functional.linear(y, w).sum())(x),
    "embedding": lambda w, x: functional.embedding(torch.tensor([3, 3]), w),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_compute_with_the_values(name):
    layer, x = linear(Recipe(weights=3, group_size=4)), torch.randn(3, 8)
    found, expected = OPERATIONS[name](layer.weight, x), OPERATIONS[name](oracle(layer), x)
    found, expected = (y if isinstance(y, tuple) else (y,) for y in (found, expected))
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


def test_prints_its_values():
    layer = linear()
    assert repr(layer.weight) == repr(oracle(layer))
    assert f"{layer.weight[0, 0]:.3f}" == f"{oracle(layer)[0, 0]:.3f}"


def test_gradients_go_through_it():
    layer, x = linear(), torch.randn(3, 8, requires_grad=True)
    functional.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, oracle(layer).sum(0).expand(3, 8))


WRITES = {
    "data.add_": lambda w, v: w.data.add_(v),
    "data +=": lambda w, v: setattr(w, "data", w.data.__iadd__(v)),
    "data =": lambda w, v: setattr(w, "data", v.clone()),
    "copy_": lambda w, v: w.copy_(v),
    "zeros_": lambda w, v: nn.init.zeros_(w),
    "normal_": lambda w, v: nn.init.normal_(w, generator=torch.Generator().manual_seed(3)),
    "row": lambda w, v: w.__setitem__(0, 0.0),
    "mask": lambda w, v: w.data.mul_(v > 0),
    "view": lambda w, v: w.view(-1)[3:9].fill_(1.0),
    "transposed": lambda w, v: w.data.T.copy_(v.T),
    "chunk": lambda w, v: w.chunk(2)[1].zero_(),
    "iterated": lambda w, v: [row.mul_(2.0) for row in w.detach()],
    "out": lambda w, v: torch.mul(v, 2.0, out=w.data),
    "inplace": lambda w, v: functional.relu(w, inplace=True),
    "foreach": lambda w, v: torch._foreach_mul_([w], 0.5),
    "apply_": lambda w, v: w.data.apply_(lambda value: 2 * value),
    "map_": lambda w, v: w.data.map_(v, lambda one, other: other),
    "of gradients": lambda w, v: w.data.add_(v.clone().requires_grad_()),
}


@pytest.mark.parametrize("mode", ["gradients", "no_grad", "inference"])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_quantized(name, mode):
    layer, x, values = linear(Recipe(weights=8)), torch.randn(5, 8), torch.randn(6, 8)
    expected = oracle(layer).clone()
    WRITES[name](expected, values)
    expected = expected.detach()
    kept, weight = layer._buffers["weight"], layer.weight
    layer(x)
    switch = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    if name == "inplace" and mode == "inference":
        return  # torch gives no sign of it
    with switch(), pytest.warns(DyBitWarning, match="its new values are quantized, with a relative error of"):
        WRITES[name](layer.weight, values)
    assert layer._buffers["weight"] is kept
    assert torch.allclose(oracle(layer), expected, atol=0.02 * float(expected.abs().max() + 1e-9))
    assert torch.equal(layer.weight, oracle(layer))
    assert torch.equal(weight, oracle(layer))  # also what was read before
    assert torch.allclose(layer(x), functional.linear(x, oracle(layer), layer.bias), atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights=4),
        Recipe(weights=3, group_size=3, scale="bf16", variants="all"),
        Recipe(weights=4, group_size=4, scale="e4m3"),
        Recipe(weights=2, granularity="tensor", scale="pow2"),
        Recipe(weights="nf4"),
    ],
    ids=["channel", "group", "e4m3", "tensor", "nf4"],
)
def test_what_is_not_written_keeps_its_values(recipe):
    layer = linear(recipe)
    expected = oracle(layer).clone()
    expected[0] = 0.0
    with pytest.warns(DyBitWarning, match="relative error of 0$"):
        layer.weight.data[0] = 0.0
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Embedding(9, 8)])
def test_weights_of_other_kinds_can_be_written(layer):
    quantize_(layer, Recipe(weights=8, embeddings=8))
    values = torch.randn(layer.weight.shape)
    with pytest.warns(DyBitWarning, match="relative error"):
        layer.weight.data = values
    assert torch.allclose(layer.weight, values, atol=0.1)


def test_equal_values_change_nothing():
    layer = linear()
    before = {name: buffer.clone() for name, buffer in layer._buffers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight.data = layer.weight.data.clone()
        layer.weight.copy_(layer.weight)
        layer.weight.data.mul_(1.0)
        layer.weight.data = layer.weight.data
        layer.weight = layer.weight
    assert all(torch.equal(layer._buffers[name], buffer) for name, buffer in before.items())


def test_copies_are_independent():
    layer = linear()
    before = oracle(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for made in (layer.weight.clone(), layer.weight.double(), layer.weight + 0, copy.deepcopy(layer.weight)):
            assert type(made) is torch.Tensor
            made.zero_()
    assert torch.equal(layer.weight, before)


def test_tied_layers_see_what_is_written():
    model = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)])
    model[1].weight = model[0].weight
    quantize_(model, Recipe(weights=8))
    with pytest.warns(DyBitWarning):
        model[0].weight.data += 1.0
    assert torch.equal(model[0].weight, model[1].weight)


def refused(layer, write, match):
    before = {name: buffer.clone() for name, buffer in layer._buffers.items()}
    with pytest.raises((DyBitError, ValueError), match=match):
        write(layer)
    assert all(torch.equal(layer._buffers[name], buffer) for name, buffer in before.items())
    assert torch.equal(layer.weight, oracle(layer))


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda layer: layer.weight.requires_grad_(), "cannot be trained; call dequantize_ on the layer"),
        (lambda layer: setattr(layer.weight, "requires_grad", True), "cannot be trained"),
        (lambda layer: nn.Parameter(layer.weight), "cannot be trained"),
        (lambda layer: layer.weight[0].requires_grad_(), "cannot be trained"),
        (lambda layer: layer.weight.data.fill_(float("nan")), "weight holds nan at position"),
        (lambda layer: layer.weight.data[0].fill_(float("inf")), "weight holds inf at position"),
        (lambda layer: layer.weight.set_(torch.zeros(6, 8)), r"cannot be changed by aten\.set_"),
        (lambda layer: layer.weight.resize_(2, 2), "cannot be changed by resize_"),
        (lambda layer: setattr(layer.weight, "data", torch.zeros(2, 2)), r"\(6, 8\), cannot be replaced"),
        (lambda layer: setattr(layer.weight[0], "data", torch.zeros(8)), r"\(6, 8\), cannot be replaced"),
        (lambda layer: layer.weight.numpy().fill(0.0), "read-only"),
    ],
)
def test_refusals(write, match):
    refused(linear(), write, match)


def test_writes_below_functions_are_refused():
    layer = linear()
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.add.Tensor(layer.weight, 0), oracle(layer))
        with pytest.raises(DyBitError, match=r"cannot be changed by aten\.zero_"):
            torch.ops.aten.zero_(layer.weight)


def test_ordinary_tensors_on_request():
    layer = linear()
    assert type(layer.weight) is QuantizedWeight
    with plain_values():
        assert type(layer.weight) is torch.Tensor
        with plain_values():
            pass
        assert type(layer.weight) is torch.Tensor
    assert type(layer.weight) is QuantizedWeight


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_reads_weights(backend, dequantized):
    model, tokens = FeedForward().eval(), torch.tensor([[1, 4, 2]])
    quantize_(model, Recipe(weights=4, embeddings=8))
    with torch.no_grad():
        expected = model(tokens)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(tokens), expected, atol=1e-5)
        product = torch.compile(lambda x: x @ model.wo.weight, backend=backend, fullgraph=True)
        assert torch.allclose(product(torch.ones(1, 8)), torch.ones(1, 8) @ oracle(model.wo))


def test_exported_and_traced_code_reads_weights():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            return functional.linear(x.to(self.inner.weight.dtype), self.inner.weight) + self.inner.weight.shape[0]

    model, x = Reads().eval(), torch.randn(2, 8)
    expected = functional.linear(x, oracle(model.inner)) + 6
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict).module()
        assert torch.allclose(program(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.allclose(traced(x), expected)
    swapped = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.allclose(torch.func.functional_call(model, swapped, (x,)), expected)


def test_swaps_and_writes_to_the_memory_are_refused():
    layer = linear(Recipe(weights=8))
    expected = oracle(layer).clone()
    storage = layer.weight.untyped_storage()
    for write in (
        lambda: storage.fill_(0),
        lambda: storage.__setitem__(0, 1),
        lambda: storage.copy_(torch.zeros(6, 8).untyped_storage()),
        lambda: storage.resize_(0),
    ):
        with pytest.raises(DyBitError, match="memory of the weight of a quantized layer cannot be written to"):
            write()
    for weights in ((layer.weight, torch.zeros(6, 8)), (nn.Parameter(torch.zeros(6, 8)), layer.weight)):
        with pytest.raises(RuntimeError, match="different slots"):
            torch.utils.swap_tensors(*weights)
    assert torch.equal(layer.weight, expected) and torch.equal(oracle(layer), expected)
