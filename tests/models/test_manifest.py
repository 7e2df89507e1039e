"""The manifest: it says what the model is, and every malformed field is one sentence."""

import json

import pytest
import torch
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from torch import nn

from dybit.errors import CheckpointError
from dybit.layers.quantized import quantized_layers
from dybit.models import manifest as manifests
from dybit.models.checkpoint import TENSORS, load, save
from dybit.models.manifest import MANIFEST, manifest_text, read_manifest
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe


def cnn():
    torch.manual_seed(0)
    parts = (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 8))
    model = nn.Sequential(*parts).eval()
    model.add_module("tied", nn.Linear(8, 8, bias=False))
    model.tied.weight = model[4].weight
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    recipe = Recipe(weights=4, activations=4, group_size=8, rules={"0": {"weights": "nf4"}})
    model = quantize_(cnn(), recipe, [torch.randn(3, 2, 4, 4)])
    return save(model, tmp_path_factory.mktemp("manifest") / "a"), model


def test_what_a_manifest_says(saved):
    path, model = saved
    found = read_manifest(path)
    for name, layer in quantized_layers(model).items():
        entry = found.layers[name]
        assert (entry.weights, entry.input, entry.dtype) == (layer.weight_specs, layer.input_spec, torch.float32)
    assert found.folded == [("0", "1")] and set(found.shared) == {"tied.weight", "tied.weight_scale"} | {
        key for key in found.shared if key.startswith("tied.weight_choice")
    }
    assert found.recipe == Recipe(weights=4, activations=4, group_size=8, rules={"0": {"weights": "nf4"}})
    assert found.checksum == manifests.checksum(path / TENSORS)
    # Equal models have equal manifests.
    layers = json.loads((path / MANIFEST).read_text())["layers"]
    parts = {"folded": found.folded, "shared": found.shared, "recipe": found.recipe, "coverage": found.coverage}
    assert manifest_text(path / TENSORS, layers, **parts) == (path / MANIFEST).read_text()


def signed(data):
    """A manifest whose own checksum is right: somebody meant it."""
    if isinstance(data, dict):
        data["manifest_sha256"] = manifests._digest(data)
    return json.dumps(data)


def document(saved):
    return json.loads((saved[0] / MANIFEST).read_text())


def test_hostile_manifests(saved, tmp_path):
    good = document(saved)
    (tmp_path / TENSORS).write_bytes((saved[0] / TENSORS).read_bytes())
    refused = []

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        (tmp_path / MANIFEST).write_text(signed(data))
        fresh = cnn()
        types = [type(module) for module in fresh.modules()]
        try:
            load(tmp_path, fresh)
        except CheckpointError as error:
            refused.append(str(error))
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert [type(module) for module in fresh.modules()] == types
        else:
            fresh(torch.randn(1, 2, 4, 4))

    check()
    assert len(refused) > 30
    words = ("object has no attribute", "not subscriptable", "unhashable", "unexpected keyword", "object is not")
    assert not [message for message in refused if any(word in message for word in words)]
