"""The linear operator: both paths, gradients, torch.compile, torch.export, and layers that use it."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

import dybit.operators.linear as module
from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.operators.linear import linear
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec
from kernels import ISAS, by_torch

INPUTS = [
    KEPT,
    InputRounding("s8r1", reach=1.9),
    InputRounding("s8r3", reach=4.0, group_size=24),
    InputRounding("u8r1", torch.tensor([0.03]), torch.tensor([-2.0])),
]


def weight_of(family="dybit4", rows=19, columns=70):
    torch.manual_seed(0)
    spec = TensorSpec(family, (rows, columns), "group", 32, choice="group")
    return quantize(torch.randn(rows, columns), spec, method="absmax")


def parts(x, weight, bias, inputs):
    return (
        x,
        weight.packed,
        weight.scale,
        weight.choice,
        weight.tensor_scale,
        bias,
        inputs.scale,
        inputs.offset,
        weight.spec.key,
        inputs.format,
        inputs.reach,
        inputs.group_size,
    )


@pytest.mark.parametrize("inputs", INPUTS, ids=["kept", "dynamic", "groups", "static"])
@pytest.mark.parametrize("shape", [(0, 70), (1, 70), (7, 70), (2, 3, 70), (70,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_paths_agree(inputs, shape, dtype, monkeypatch):
    weight = weight_of()
    x, bias = torch.randn(shape, dtype=dtype), torch.randn(19, dtype=dtype)
    found = linear(x, weight, bias, inputs)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 19)
    monkeypatch.setattr(module, "packed_for", lambda *_: None)
    expected = linear(x, weight, bias, inputs)
    # Rounding inputs and weights to BF16 on the way is the fallback's; the kernels keep them.
    tolerance = {torch.bfloat16: 0.15}.get(dtype, 1e-4)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inputs", INPUTS, ids=["kept", "dynamic", "groups", "static"])
def test_opcheck(inputs):
    weight = weight_of()
    x, bias = torch.randn(2, 2, 70, requires_grad=True), torch.randn(19, requires_grad=True)
    torch.library.opcheck(torch.ops.dybit.linear, parts(x, weight, bias, inputs))


def test_gradients_are_those_of_the_dequantized_weight():
    weight, bias = weight_of(), torch.randn(19, requires_grad=True)
    x = torch.randn(5, 70, requires_grad=True)
    linear(x, weight, bias, INPUTS[1]).square().sum().backward()
    y = linear(x, weight, bias, INPUTS[1]).detach()
    torch.testing.assert_close(x.grad, 2 * y @ weight.dequantize())
    torch.testing.assert_close(bias.grad, 2 * y.sum(0))


def model_of(mode="dynamic"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10)).eval()
    batches = [torch.randn(16, 64) for _ in range(2)]
    recipe = Recipe(
        weights="s4r2",
        activations="int8",
        group_size=32,
        method="absmax",
        activation_mode=mode,
        activation_method="absmax",
    )
    return quantize_(model, recipe, calibration=batches), batches[0]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_layers_use_the_operator(mode):
    model, x = model_of(mode=mode)
    layer = model[0]
    expected = torch.nn.functional.linear(layer.round_input(x), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    nan = x.clone()
    nan[3, 5] = float("nan")
    assert model(nan)[3].isnan().all() and not model(nan)[[0, 1, 2, 4]].isnan().any()


def on_every_path(x, weight, inputs):
    """The results of every instruction set, which must be one, and those of plain torch."""
    before, results = extension.isa(), []
    for isa in ISAS:
        extension.use(isa)
        results.append(linear(x, weight, None, inputs))
        assert torch.equal(results[0].nan_to_num(7e7), results[-1].nan_to_num(7e7)), isa
    extension.use(before)
    return [*results[:1], by_torch(lambda: linear(x, weight, None, inputs))]


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("format", ["int8", "s8", "u4", "nf4"])
def test_rows_that_are_not_finite_become_nan_at_dynamic_scales(format, size):
    inputs = InputRounding(format, reach=1.6, group_size=size)
    x = torch.randn(7, 70, generator=torch.Generator().manual_seed(0))
    clean = on_every_path(x, weight_of(), inputs)[0]
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[[1, 3, 5], [0, 40, 69]] = bad
    for found in on_every_path(x, weight_of(), inputs):
        assert found[1::2].isnan().all()
        torch.testing.assert_close(found[::2], clean[::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize(("format", "top"), [("int8", 127.0), ("s8", 64.0), ("u4", 8.0), ("nf4", 1.0)])
@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
def test_the_largest_inputs_do_not_overflow_at_dynamic_scales(format, top, share, size):
    x = torch.zeros(2, 70)
    x[:, 40] = torch.tensor([1.0, 0.25])
    inputs = InputRounding(format, reach=share * top, group_size=size)
    expected = x.double() @ weight_of().dequantize().double().T
    few = expected.abs() < 0.9  # others overflow in floating point, too
    for found in on_every_path(x * 3.4e38, weight_of(), inputs):
        assert not found.isnan().any()
        torch.testing.assert_close(found.double()[few] / 3.4e38, expected[few], rtol=0.12, atol=0)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_compile_and_export(mode):
    model, x = model_of(mode=mode)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        batch = torch.export.Dim("batch", min=1, max=1024)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(exported.module()(x[:5]), model(x[:5]))


def test_what_is_packed_is_not_in_state_copies_or_pickles():
    model, x = model_of()
    size = len(torch_bytes(model))
    keys = list(model.state_dict())
    expected = model(x)
    assert list(model.state_dict()) == keys and len(torch_bytes(model)) == size
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.load(io.BytesIO(torch_bytes(model)), weights_only=False)(x), expected)


def torch_bytes(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


def test_new_codes_are_seen_and_old_ones_are_let_go():
    model, x = model_of()
    before = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["0.weight"] = state["0.weight"].flip(0)
    model.load_state_dict(state)
    assert not torch.equal(model(x), before)
    with torch.no_grad():
        model[0]._buffers["weight_scale"].mul_(2)
    layer = model[0]
    expected = torch.nn.functional.linear(layer.round_input(x), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    del model, layer
    gc.collect()
    other = weight_of()
    linear(torch.randn(1, 70), other)
    count = len(module._cache)
    del other
    gc.collect()
    assert len(module._cache) == count - (extension.isa() != extension.FALLBACK)


def test_formats_without_a_step_run_on_torch():
    weight = quantize(torch.randn(19, 64), TensorSpec("nf4", (19, 64)), method="absmax")
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x, weight), x @ weight.dequantize().T)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 70, dtype=torch.int64), "x must be floating point, not torch.int64"),
        (torch.ones(3, 69), r"x must have 70 columns, but has shape \(3, 69\)"),
        (torch.tensor(1.0), "x must have 70 columns"),
    ],
)
def test_bad_inputs_are_named(x, message):
    with pytest.raises(DyBitError, match=message):
        linear(x, weight_of())
    with pytest.raises(DyBitError, match=r"bias must have shape \(19,\)"):
        linear(torch.ones(3, 70), weight_of(), torch.ones(20))


@pytest.mark.parametrize("inputs", INPUTS, ids=["kept", "dynamic", "groups", "static"])
def test_the_operator_is_called_where_somebody_watches(inputs, monkeypatch):
    weight, x, bias = weight_of(), torch.randn(3, 70), torch.randn(19)
    called = []
    operator = module._operator
    monkeypatch.setattr(module, "_operator", lambda *parts: called.append(1) or operator(*parts))

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    plain = linear(x, weight, bias, inputs)
    assert not called
    with Mode():
        assert torch.equal(linear(x, weight, bias, inputs), plain)
    assert len(called) == 1
    watched = linear(x, weight, bias.clone().requires_grad_(), inputs)
    assert len(called) == 2 and watched.requires_grad and torch.equal(watched.detach(), plain)
    with torch.no_grad():
        linear(x, weight, bias.clone().requires_grad_(), inputs)
    assert len(called) == 2
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = linear(mode.from_tensor(x), weight)
    assert fake.shape == (3, 19) and len(called) == 3
