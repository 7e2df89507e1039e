"""Tests that MXFP4 and NVFP4 files of dybit hold its values, by the decoders of the projects whose formats they are."""

import json
import os
import struct
import sys
import warnings

import pytest
import torch
from helpers import cuts, damaged, flips
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from interchange_cases import RECIPES, parts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dybit import Recipe, quantize_, safe_files
from dybit.errors import CheckpointError, DyBitError
from dybit.interchange import read_compressed, save_compressed


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4), nn.LayerNorm(4)).eval()


def saved(tmp_path, kind, head=False):
    model = quantize_(network(), Recipe(**RECIPES[kind], rules={} if head else {"2": None}))
    return model, save_compressed(model, tmp_path / kind)


def decoded(folder, name):
    """The weight by compressed-tensors' own reading of the configuration and of the tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = pytest.importorskip("compressed_tensors.compressors.base")
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(
            json.loads((folder / "config.json").read_text())["quantization_config"]
        )
        (scheme,) = config.config_groups.values()
        compressor = base.BaseCompressor.get_value_from_registry(config.format)
        tensors = load_file(folder / "model.safetensors")
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        return compressor.decompress(own, scheme)["weight"], config


@pytest.mark.parametrize("kind", RECIPES)
def test_compressed_tensors_decodes_the_same_values(tmp_path, kind):
    model, folder = saved(tmp_path, kind)
    values, config = decoded(folder, "0")
    assert config.format == f"{kind}-pack-quantized" and config.ignore == ["2"]
    if kind == "mxfp4":
        assert torch.equal(values.float(), model[0].weight)
    else:  # their decoder computes in BF16
        torch.testing.assert_close(values.float(), model[0].weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", RECIPES)
def test_there_and_back(tmp_path, kind):
    model, folder = saved(tmp_path, kind)
    found = read_compressed(folder)
    assert set(found.weights) == {"0.weight"} and torch.equal(found.tensors["2.weight"], model[2].weight)
    read = found.weights["0.weight"]
    if kind == "mxfp4":
        assert torch.equal(read.dequantize(), model[0].weight)
        assert read.spec.scale == "pow2" and torch.equal(read.packed, model[0].quantized_tensor().packed)
    else:
        torch.testing.assert_close(read.dequantize(), model[0].weight, rtol=2**-22, atol=0)
    again = quantize_(network(), found.recipe)
    assert type(again[2]) is nn.Linear and again[0].weight_specs["weight"].group_size == RECIPES[kind]["group_size"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": 4, "group_size": 32, "scale": "pow2"}, "'0.weight' is dybit4spare"),
        ({"weights": "s4r2", "group_size": 32, "scale": "fp32"}, "fp32 scales, group_size=32"),
        ({"weights": "s4r2", "group_size": 16, "scale": "pow2"}, "pow2 scales, group_size=16"),
        ({**RECIPES["mxfp4"], "rules": {"0": None}}, "dividing the columns"),
        ({**RECIPES["mxfp4"], "activations": 8, "activation_mode": "dynamic"}, "Linear with rounded inputs"),
    ],
)
def test_what_compressed_tensors_cannot_hold(tmp_path, fields, message):
    with pytest.raises(DyBitError, match=message):
        save_compressed(quantize_(network(), Recipe(**fields)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_and_unquantized_models_are_refused(tmp_path):
    with pytest.raises(DyBitError, match="is a Embedding"):
        save_compressed(quantize_(nn.Sequential(nn.Embedding(4, 32)), Recipe(embeddings=4)), tmp_path / "out")
    with pytest.raises(DyBitError, match="no quantized layer"):
        save_compressed(network(), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DyBitError, match="is not an empty directory"):
        save_compressed(quantize_(network(), Recipe(**RECIPES["mxfp4"], rules={"2": None})), tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", RECIPES)
def test_damaged_checkpoints(tmp_path, kind, name):
    _, folder = saved(tmp_path, kind)
    assert damaged(folder / name, cuts, lambda: parts(read_compressed(folder))) > 98
    refused = damaged(folder / name, flips, lambda: parts(read_compressed(folder)))
    assert refused > (990 if name == "model.safetensors" else 300)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_compressed(folder)


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pipes(tmp_path, name):
    _, folder = saved(tmp_path, "mxfp4")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}' is a pipe, not a file"):
        read_compressed(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_deep_json(tmp_path, name):
    _, folder = saved(tmp_path, "mxfp4")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    deep = b"[" * 100_000
    (folder / name).write_bytes(struct.pack("<Q", len(deep)) + deep if name.endswith("tensors") else deep)
    with pytest.raises(CheckpointError, match=r"nests deeper than 100|is damaged: .* invalid JSON") as caught:
        read_compressed(folder)
    assert str(folder) in str(caught.value)


def test_files_of_others_have_no_digest(tmp_path):
    model, folder = saved(tmp_path, "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "dybit.sha256": safe_files.digest(tensors)}
    tensors["2.bias"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "dybit.sha256": safe_files.digest(tensors)})
    assert torch.equal(read_compressed(folder).tensors["2.bias"], model[2].bias + 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(read_compressed(folder).tensors["2.bias"], model[2].bias + 1)
    save_file(tensors, folder / "model.safetensors", {"dybit.sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: the SHA-256 .* '00000"):
        read_compressed(folder)


def test_equal_models_are_equal_files(tmp_path):
    contents = {(saved(tmp_path / str(i), "nvfp4")[1] / "model.safetensors").read_bytes() for i in range(8)}
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"format": "pack-quantized", "config_groups": {"g": {}}}, "has the format 'pack-quantized'"),
        ({"config_groups": 3}, "is not a configuration of compressed-tensors"),
    ],
)
def test_other_configurations(tmp_path, change, message):
    _, folder = saved(tmp_path, "mxfp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DyBitError, match=message):
        read_compressed(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.weight_scale"), "lacks '0.weight_scale'"),
        (lambda t: t.update({"0.weight_scale": t["0.weight_scale"][:, :1].contiguous()}), "do not fit each other"),
        (lambda t: t.update({"0.weight_scale": t["0.weight_scale"].float()}), "not a block format"),
        (
            lambda t: t.update({"0.weight_scale": torch.full_like(t["0.weight_scale"], 255)}),
            "scale that is not a number",
        ),
        (lambda t: t.pop("0.weight_packed"), "no weight in MXFP4 or NVFP4"),
    ],
)
def test_contradictory_tensors(tmp_path, change, message):
    _, folder = saved(tmp_path, "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DyBitError, match=message):
        read_compressed(folder)


def test_an_index_must_stay_in_its_directory(tmp_path):
    _, folder = saved(tmp_path, "mxfp4")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight_packed": "part.safetensors"}}))
    assert set(read_compressed(folder).weights) == {"0.weight"}
    index.write_text(json.dumps({"weight_map": {"0.weight_packed": "../part.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        read_compressed(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_malformed_configurations_are_one_sentence(tmp_path, name):
    _, folder = saved(tmp_path, "nvfp4")
    if name == "config.json":
        good = json.loads((folder / name).read_text())
    else:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        good = {"metadata": {"total_size": 1}, "weight_map": {"0.weight_packed": "part.safetensors"}}
    refused = []

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        (folder / name).write_text(json.dumps(data))
        try:
            assert read_compressed(folder).weights
        except DyBitError as error:
            refused.append(str(error))
            assert "\n" not in str(error) and len(str(error)) < 1000

    check()
    assert len(set(refused)) > 5
