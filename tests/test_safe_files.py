"""Files that cannot be trusted: pipes where files should be, deep JSON, and checksums of tensors."""

import json
import os
import socket
import sys

import numpy as np
import pytest
import torch

import dybit
from dybit import safe_files
from dybit.accelerator.config import Config
from dybit.errors import CheckpointError, DyBitError
from dybit.workloads import workload

DEEP = {
    "lists": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "closed": "[" * 101 + "]" * 101,  # which Python reads
    "mixed": '{"layers": [' * 400 + "]}" * 400,
}


@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        kinds = {"pipe": "pipe", "link": "pipe", "s": "socket", ".": "directory", "/dev/null": "device"}
        for name, kind in kinds.items():
            path = tmp_path / name
            with pytest.raises(DyBitError) as caught:
                safe_files.check_regular(path)
            assert str(caught.value) == f"{str(path)!r} is a {kind}, not a file"
    with pytest.raises(CheckpointError, match="is a directory"):
        safe_files.check_regular(str(tmp_path), CheckpointError)
    (tmp_path / "file").write_text("{}")
    for name in ("file", "nothing", "nul\0"):
        assert safe_files.check_regular(tmp_path / name) == tmp_path / name


READERS = {
    "recipe": dybit.Recipe.from_json,
    "workload": workload.Workload.from_json,
    "accelerator": lambda text: Config.from_toml(f"a = {text}"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DEEP)
def test_deep_text(name, reader):
    with pytest.raises(DyBitError) as caught:
        READERS[reader](DEEP[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", DEEP)
def test_deep_files(tmp_path, name):
    (tmp_path / "a.json").write_text(DEEP[name])
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON: it nests deeper than 100"):
        safe_files.read_json(tmp_path / "a.json")


def test_json(tmp_path):
    value = {"a": [1, {"b": None}], "c": "[" * 1000}
    for _ in range(96):
        value = [value]
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert safe_files.read_json(tmp_path / "a.json") == value
    for content in (b"", b"{", b"\xff{}", b"nul", b"9" * 5000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DyBitError, match=r"a\.json is not valid JSON: "):
            safe_files.read_json(tmp_path / "a.json", DyBitError)
    with pytest.raises(FileNotFoundError):
        safe_files.read_json(tmp_path / "b.json")


def tensors():
    torch.manual_seed(0)
    found = {"w": torch.randn(3, 4), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "mask": torch.ones(3) > 0}
    return found | {"half": torch.ones(2).bfloat16(), "fp8": torch.ones(4).to(torch.float8_e4m3fn)}


def test_digest_is_of_contents():
    known = safe_files.digest(tensors())
    assert len(known) == 64 and known == safe_files.digest(dict(reversed(tensors().items())))
    turned = {**tensors(), "w": tensors()["w"].t().contiguous().t()}
    assert not turned["w"].is_contiguous() and safe_files.digest(turned) == known
    arrays = {key: value.numpy() for key, value in tensors().items() if key not in ("half", "fp8")}
    same = {key: value for key, value in tensors().items() if key in arrays}
    assert safe_files.digest(arrays) == safe_files.digest(same)
    assert safe_files.digest({"w": np.asfortranarray(arrays["w"])}) == safe_files.digest({"w": same["w"]})
    safe_files.check_digest(tensors(), None, "f")
    safe_files.check_digest(tensors(), known, "f")
    with pytest.raises(
        CheckpointError, match=r"f is damaged: the SHA-256 of its tensors is not its dybit.sha256, 'ab'"
    ):
        safe_files.check_digest(tensors(), "ab", "f")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(v=t.pop("w")),
        lambda t: t.update(w=t["w"].view(4, 3)),
        lambda t: t.update(w=t["w"].view(torch.int32)),
        lambda t: t["w"].view(torch.int32)[2, 3].bitwise_xor_(1),
        lambda t: t.pop("empty"),
        lambda t: t.update(empty=torch.zeros(3, 0)),
    ],
)
def test_digest_knows_every_change(change):
    changed = tensors()
    change(changed)
    assert safe_files.digest(changed) != safe_files.digest(tensors())


def test_crc32_is_that_of_all_bytes():
    import zlib

    whole = tensors()["w"].numpy().tobytes() + b"abc"
    assert safe_files.crc32([tensors()["w"], b"abc"]) == f"{zlib.crc32(whole):08x}" == safe_files.crc32([whole])
    assert safe_files.crc32([]) == "00000000"
