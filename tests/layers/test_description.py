"""State dicts of quantized layers: they carry their formats, so that another model computes the same or refuses."""

import copy
import io
import json
import warnings

import pytest
import safetensors.torch
import torch
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from torch import nn

import dybit
from dybit.layers.description import KEY, Description, without_descriptions
from dybit.layers.input_spec import InputSpec
from dybit.layers.quantized import quantized_layers
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe
from dybit.tensors.quantized_tensor import TensorSpec

INPUTS = [
    {"activations": 8},
    {"activations": 4},
    {"activations": 4, "activation_mode": "dynamic"},
    {"activations": "int8asym", "activation_method": "absmax"},
    {},
]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 8)).eval()


def skewed(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 16, generator=generator)
    return x.exp() * x if seed % 2 else x.abs() * 3


def specs(model):
    return {name: (layer.weight_specs, layer.input_spec) for name, layer in quantized_layers(model).items()}


PAIRS = [(by, to) for i, by in enumerate(INPUTS) for to in (by, INPUTS[i - 1])]


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("by", "to"), PAIRS)
def test_another_calibration_is_taken_over(by, to, assign):
    first = quantize_(net(0), Recipe(weights=4, **by), [skewed(1)])
    other = quantize_(net(1), Recipe(weights=4, **to), [skewed(2)])
    x = skewed(3)
    other(x)  # what was packed for the old formats must go
    other.load_state_dict(first.state_dict(), assign=assign, strict=by == to)
    assert specs(other) == specs(first)
    assert torch.equal(other(x), first(x))
    for key, tensor in first.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    if by == to and by:
        changed = quantize_(net(1), Recipe(weights=4, **to), [skewed(2)])
        assert specs(changed) != specs(first), "the calibrations do not differ: the test says nothing"


@torch.no_grad()
def test_attention_convolutions_and_embeddings():
    def parts():
        return nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "attention": nn.MultiheadAttention(8, 2)})

    for name, arguments in (("conv", (torch.randn(2, 4, 6, 6),)), ("attention", (torch.randn(5, 2, 8),) * 3)):
        first, other = parts()[name].eval(), parts()[name].eval()
        quantize_(first, Recipe(activations=5), [arguments])
        quantize_(other, Recipe(activations=5), [tuple(x.abs().square() for x in arguments)])
        other.load_state_dict(first.state_dict())
        one, two = first(*arguments), other(*arguments)
        assert torch.equal(one, two) if name == "conv" else torch.equal(one[0], two[0])


@pytest.mark.parametrize(
    ("stored", "own", "what"),
    [
        ({"weights": "nf4"}, {"weights": "int4"}, "family='nf4' in the state dict and 'int4' in the model"),
        ({"weights": 4, "variants": "plain"}, {"weights": 4}, "family='dybit4plain'"),
        ({"weights": 4, "group_size": 16}, {"weights": 4}, "granularity='group'"),
        ({"weights": 4, "scale": "bf16"}, {"weights": 4}, "scale='bf16'"),
        ({"weights": None, "activations": 8}, {"weights": 4, "activations": 8}, r"codes of \[\], the model of"),
    ],
)
def test_weights_that_are_stored_otherwise_are_refused(stored, own, what):
    first = quantize_(net(0), Recipe(**stored), [skewed(1)])
    other = quantize_(net(1), Recipe(**own), [skewed(1)])
    before = {key: tensor.clone() for key, tensor in other.state_dict().items() if not key.endswith("bias")}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"layer '0' stays as it is: .*{what}"):
            other.load_state_dict(first.state_dict(), strict=strict)
    after = other.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_state_without_descriptions_is_said():
    model = quantize_(net(), Recipe(weights=4, activations=8), [skewed(1)])
    old = without_descriptions(model.state_dict())
    assert {key.rpartition(".")[2] for key in model.state_dict().keys() - old.keys()} == {KEY}
    with pytest.warns(dybit.errors.DyBitWarning, match="has no 'dybit_spec', which describes how layers are stored"):
        assert model.load_state_dict(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({"1.anything": torch.zeros(1)}, strict=False)  # says nothing of quantized layers


def test_ways_of_a_state(tmp_path):
    model, x = quantize_(net(0), Recipe(weights=4, activations=4), [skewed(1)]), skewed(3)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a")
    for state in (torch.load(stream), safetensors.torch.load_file(tmp_path / "a"), copy.deepcopy(model).state_dict()):
        other = quantize_(net(1), Recipe(weights=4, activations=4), [skewed(2)])
        other.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(other(x), model(x))
    # Functional calls take what state_dict gives, and leave nothing behind.
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, model.state_dict(), x), model(x))
    assert all(layer.dybit_spec is None for layer in quantized_layers(model).values())


def test_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = quantize_(net(0), Recipe(weights=4, activations=4), [skewed(1)])
    other = quantize_(net(1), Recipe(weights=4, activations=4), [skewed(2)])
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, state)
    assert specs(other) == specs(model)


def test_buffers_stay_as_they_are():
    layer = quantize_(nn.Linear(8, 8), Recipe(weights=4, activations=8), [torch.randn(9, 8)])
    assert KEY not in dict(layer.named_buffers())
    with torch.device("meta"):
        assert layer.state_dict()[KEY].device.type == "cpu"


def test_layers_of_a_fused_model_refuse_other_inputs():
    def cnn():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()

    x = torch.randn(2, 3, 8, 8)
    model, other = (quantize_(cnn(), Recipe(activations=4), [batch]) for batch in (x, x.square() * 3))
    fused, expected = dybit.fuse(model), model(x)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="a fused model expects other input rounding; call load before fuse"):
        model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(fused(x), expected)


def text(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


GOOD = json.loads(
    bytes(Description({"weight": TensorSpec("dybit4", (4, 8))}, InputSpec("s8r2", "dynamic", 1.5)).to_tensor().tolist())
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(found=mutated(GOOD))
def test_descriptions_that_were_changed(found):
    try:
        read = Description.from_tensor(text(found))
    except dybit.DyBitError as error:
        assert "\n" not in str(error)
    else:
        assert Description.from_tensor(read.to_tensor()) == read


@pytest.mark.parametrize(
    "bad",
    [None, 5, torch.zeros(3), torch.zeros(1 << 17, dtype=torch.uint8), text(b"\xff"), text(b" "), text([]), text({})],
)
def test_what_is_no_description(bad):
    with pytest.raises(dybit.DyBitError, match=KEY):
        Description.from_tensor(bad)
    layer = quantize_(nn.Linear(8, 8), Recipe(weights=4))
    with pytest.raises(RuntimeError, match=f"stays as it is: .*{KEY}"):
        layer.load_state_dict({**layer.state_dict(), KEY: bad if bad is not None else "text"})


def test_scales_that_are_missing_are_refused():
    first = quantize_(net(0), Recipe(weights=4, activations=8, activation_mode="static"), [skewed(1)])
    other = quantize_(net(1), Recipe(weights=4))
    state = first.state_dict()
    del state["2.input_scale"]
    with pytest.raises(RuntimeError, match=r"layer .2. stays as it is: input_scale must be .*, but is missing"):
        other.load_state_dict(state, strict=False)
    assert other[2].input_spec is None
    state["2.input_scale"] = torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"but is torch.float64 of shape"):
        other.load_state_dict(state, strict=False)
