"""Tensors in safetensors files: found where they are, in files and indices that can be damaged or hostile."""

import json
import struct

import pytest
import torch
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

import dybit
from dybit.models.tensor_files import TYPES, read_bytes, read_source


def test_tensors_are_where_they_are_said_to_be(tmp_path):
    made = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES.values()}
    save_file({**made, "empty": torch.zeros(0, 3)}, tmp_path / "m.safetensors")
    found = read_source(tmp_path / "m.safetensors")
    assert set(found) == {*made, "empty"} and found["empty"].nbytes == 0
    with (tmp_path / "m.safetensors").open("rb") as file:
        for key, tensor in made.items():
            stored = found[key]
            assert (TYPES[stored.dtype], stored.shape, stored.nbytes) == (tensor.dtype, (2, 3), tensor.nbytes)
            assert read_bytes(file.fileno(), stored, 0, stored.nbytes) == bytes(tensor.view(torch.uint8).numpy())
            half = read_bytes(file.fileno(), stored, 3 * tensor.itemsize, 3 * tensor.itemsize)
            assert half == bytes(tensor[1].view(torch.uint8).numpy())


def index(tmp_path, table):
    (tmp_path / "i.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return tmp_path / "i.safetensors.index.json"


def test_an_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    found = read_source(index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {key: stored.file.name for key, stored in found.items()} == {"a": "1.safetensors", "b": "2.safetensors"}


HOSTILE = {
    "up": {"a": "../x.safetensors"},
    "absolute": {"a": "/etc/passwd"},
    "windows": {"a": "..\\x.safetensors"},
    "drive": {"a": "c:x.safetensors"},
    "pickle": {"a": "pytorch_model.bin"},
    "empty": {"a": ""},
    "number": {"a": 3},
    "list": [1],
    "nothing": None,
    "missing": {"a": "no.safetensors"},
    "elsewhere": {"zz": "1.safetensors"},
    "twice": {"a": "1.safetensors", "c": "3.safetensors"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "3.safetensors")
    with pytest.raises(dybit.CheckpointError) as caught:
        read_source(index(tmp_path, HOSTILE[name]))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    huge = struct.pack("<Q", 1 << 60)
    wrong = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    overlap = json.dumps({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}).encode()
    nested = b"[" * 100000
    contents = [b"", b"abc", huge, huge + b"{}"]
    contents += [struct.pack("<Q", len(text)) + text + b"\0" * 4 for text in (wrong, overlap, nested, b"\xff{}")]
    for content in contents:
        (tmp_path / "m.safetensors").write_bytes(content)
        with pytest.raises(dybit.CheckpointError, match=r"m\.safetensors"):
            read_source(tmp_path / "m.safetensors")
    with pytest.raises(dybit.CheckpointError, match=r"cannot be read|no safetensors|No such"):
        read_source(tmp_path / "no.safetensors")
    (tmp_path / "x.index.json").write_text("[" * 100000)
    with pytest.raises(dybit.CheckpointError, match="not an index"):
        read_source(tmp_path / "x.index.json")


def test_indices_that_were_changed(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    good = {"metadata": {"total_size": 20}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        (tmp_path / "i.safetensors.index.json").write_text(json.dumps(data))
        try:
            assert set(read_source(tmp_path / "i.safetensors.index.json")) <= {"a", "b"}
        except dybit.CheckpointError as error:
            assert "\n" not in str(error) and "object has no attribute" not in str(error)

    check()
