"""Tests that MXFP4 and NVFP4 files of dybit hold its values, by the decoders of the projects whose formats they are."""

import json
import os
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import cuts, damaged, flips
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dybit import Recipe, quantize_, safe_files
from dybit.errors import CheckpointError, DyBitError
from dybit.interchange import read_compressed, read_gguf, save_compressed, write_gguf
from dybit.interchange.blocks import Blocks, from_blocks, to_blocks
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec

RECIPES = {
    "mxfp4": {"weights": "s4r2", "group_size": 32, "scale": "pow2"},
    "nvfp4": {"weights": "s4r2", "group_size": 16, "scale": "e4m3"},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4), nn.LayerNorm(4)).eval()


def weight(kind, rows=5, columns=64, family="s4r2", spread=4.0):
    torch.manual_seed(1)
    fields = RECIPES[kind]
    spec = TensorSpec(family, (rows, columns), "group", fields["group_size"], fields["scale"], "group")
    return quantize(torch.randn(rows, columns) * torch.exp(spread * torch.randn(rows, 1)), spec)


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


def test_nvfp4_with_a_power_of_two_is_exact():
    original = weight("nvfp4")
    power = torch.tensor([2.0**-5])
    original = type(original)(original.spec, original.packed, original.scale, None, power)
    blocks = to_blocks(original, "w")
    assert blocks.divisor == 64
    assert torch.equal(from_blocks(blocks, "w").dequantize(), original.dequantize())


@pytest.mark.parametrize("divisor", [1.0, 3.0, 1234.567, 1e-3])
def test_any_nvfp4_is_read_exactly(divisor):
    blocks = to_blocks(weight("nvfp4"), "w")
    blocks = Blocks(blocks.packed, blocks.scale, torch.tensor([divisor]))
    read = from_blocks(blocks, "w")
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([blocks.packed & 15, blocks.packed >> 4], dim=-1).flatten(1).long()
    values = torch.where(codes > 7, -1.0, 1.0) * e2m1[codes & 7]
    expected = values.view(5, -1, 16) * (blocks.scale.float() / divisor)[..., None]
    assert torch.equal(read.dequantize(), expected.flatten(1))


@pytest.mark.parametrize("exponent", [0, 1, 60, 127, 190, 254])
def test_every_exponent_of_mxfp4_is_read_exactly(exponent):
    packed = torch.arange(16, dtype=torch.uint8).view(1, 16) * 16 + 5
    read = from_blocks(Blocks(packed, torch.full((1, 1), exponent, dtype=torch.uint8)), "w")
    high = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = torch.stack([torch.full((16,), 3.0, dtype=torch.float64), high], dim=1).flatten() * 2.0 ** (
        exponent - 127
    )
    assert torch.equal(read.dequantize().flatten(), expected.float())


@pytest.mark.parametrize("family", ["s4r2", "e2m1", "mxfp4"])
def test_gguf_decodes_the_same_values(tmp_path, family):
    gguf = pytest.importorskip("gguf")
    original = weight("mxfp4", family=family)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": original}, {"norm": torch.ones(5)},
                      architecture="llama", metadata={"llama.block_count": 1, "general.name": "x"})  # fmt: skip
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensor = tensors["blk.0.ffn_up.weight"]
    values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    np.testing.assert_array_equal(values.reshape(5, 64), original.dequantize().numpy())
    found = read_gguf(path)
    assert torch.equal(found.weights["blk.0.ffn_up.weight"].dequantize(), original.dequantize())
    assert torch.equal(found.tensors["norm"], torch.ones(5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": 4, "group_size": 32, "scale": "pow2"}, "'0.weight' is dybit4spare"),
        ({"weights": "s4r2", "group_size": 32}, "fp32 scales, group_size=32"),
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
    with pytest.raises(DyBitError, match="is no empty directory"):
        save_compressed(quantize_(network(), Recipe(**RECIPES["mxfp4"], rules={"2": None})), tmp_path / "file")


def test_gguf_takes_mxfp4_only(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(DyBitError, match="'w' is NVFP4"):
        write_gguf(tmp_path / "m.gguf", {"w": weight("nvfp4")})
    assert not list(tmp_path.iterdir())


def parts(found):
    """All that a reader found, by name."""
    weights = {name + suffix: part for name, w in found.weights.items() for suffix, part in w.buffers().items()}
    return {**weights, **found.tensors, **{f"{name}, dequantized": w.dequantize() for name, w in found.weights.items()}}


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
        ({"config_groups": 3}, "is no configuration of compressed-tensors"),
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
        (lambda t: t.update({"0.weight_scale": t["0.weight_scale"].float()}), "no block format"),
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


def test_damaged_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    fields = {"llama.block_count": 1, "general.name": "x", "llama.scale": 2.5}
    others = {"norm": torch.randn(5), "scalar": torch.tensor(2.0), "mean": torch.randn(2, 3)}
    path = write_gguf(tmp_path / "m.gguf", {"w": weight("mxfp4")}, others, metadata=fields)
    assert len(gguf.GGUFReader(path).get_field("dybit.sha256").contents()) == 64
    assert damaged(path, cuts, lambda: parts(read_gguf(path))) > 90
    assert damaged(path, flips, lambda: parts(read_gguf(path))) > 600
    assert damaged(path, lambda data: flips(data[:300], 500), lambda: parts(read_gguf(path))) == 500


def test_gguf_of_others_has_no_digest(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "m.gguf", {"w": weight("mxfp4")})
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b"dybit.sha256", b"other.sha256").replace(data[-40:], bytes(40)))
    assert read_gguf(path).weights["w"].packed.shape
    with pytest.raises(CheckpointError, match=r"m.gguf is damaged: the SHA-256 of its tensors"):
        path.unlink()
        path.write_bytes(data.replace(data[-40:], bytes(40)))
        read_gguf(path)
