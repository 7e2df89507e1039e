import numpy as np
import pytest
import torch
from helpers import cuts, damaged, flips
from interchange_cases import parts, weight

from dybit.errors import CheckpointError, DyBitError
from dybit.interchange import read_gguf, write_gguf


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


def test_gguf_takes_mxfp4_only(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(DyBitError, match="'w' is NVFP4"):
        write_gguf(tmp_path / "m.gguf", {"w": weight("nvfp4")})
    assert not list(tmp_path.iterdir())


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
