"""Headers of GGUF files that announce what the file does not hold, none of which may cost memory or time."""

import os
import struct
import sys

import pytest
import torch

from dybit.errors import CheckpointError
from dybit.interchange import read_gguf
from dybit.interchange.header import check_header

gguf = pytest.importorskip("gguf")
MANY = 1 << 62


def text(content, length=None):
    return struct.pack("<Q", len(content) if length is None else length) + content


def header(tensors=0, fields=0, rest=b"", version=3, order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, fields) + rest


def array(kind, count, rest=b""):
    return header(0, 1, text(b"a") + struct.pack("<IIQ", 9, kind, count) + rest)


def tensor(shape=(32,), kind=0, offset=0, dimensions=None, data=b"\0" * 256):
    count = len(shape) if dimensions is None else dimensions
    info = text(b"w") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)
    return header(1, 0, info).ljust(96, b"\0") + data


NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(20_000)) + struct.pack("<IQ", 4, 0)
HOSTILE = {
    "nothing": (b"", "not a GGUF file"),
    "magic": (b"GGML" + bytes(100), "not a GGUF file"),
    "version": (header(version=9, rest=bytes(9)), "is GGUF of version 9"),
    "tensors": (header(MANY, 0, bytes(100)), f"announces {MANY} tensors and 0 fields"),
    "fields": (header(0, MANY, bytes(100)), f"announces 0 tensors and {MANY} fields"),
    "most": (header(2**64 - 1, 2**64 - 1, bytes(100)), "announces 18446744073709551615 tensors"),
    "name": (header(0, 1, text(b"a", MANY) + bytes(50)), f"announces a string of {MANY} bytes"),
    "string": (header(0, 1, text(b"a") + struct.pack("<IQ", 8, MANY) + bytes(50)), f"a string of {MANY} bytes"),
    "array": (array(4, MANY, bytes(50)), f"announces an array of {MANY} in b'a'"),
    "strings": (array(8, 1 << 40, bytes(50)), f"announces an array of {1 << 40} in b'a'"),
    "arrays": (array(9, 1 << 40, bytes(50)), f"announces an array of {1 << 40} in b'a'"),
    "nested": (array(9, 1, NESTED), "an array of unknown kind"),
    "kind": (array(13, 1, bytes(50)), "an array of unknown kind"),
    "field": (header(0, 1, text(b"a") + struct.pack("<I", 99) + bytes(50)), "the field b'a' of unknown type 99"),
    "ends": (header(0, 1, text(b"abcd") + struct.pack("<I", 10) + bytes(4)), "announces the field b'abcd'"),
    "alignment": (header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 24)), "which is not a power of two"),
    "zero": (header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)), "which is not a power of two"),
    "dimensions": (tensor(dimensions=2**32 - 1), "announces 4294967295 dimensions of 'w'"),
    "five": (tensor((1,) * 5), "announces 5 dimensions of 'w'"),
    "size": (tensor((1 << 40,)), "announces the tensor 'w'"),
    "overflow": (tensor((1 << 32, 1 << 32)), "announces the tensor 'w'"),
    "offset": (tensor(offset=(1 << 64) - 32), "announces the tensor 'w'"),
    "type": (tensor(kind=9999), "the tensor 'w' of unknown type 9999"),
    "blocks": (tensor((33,), kind=39), "the tensor 'w' with a row of broken blocks"),
    "long": (tensor((73,)), "announces the tensor 'w', but the file ends after 352 bytes"),
    "swapped": (header(MANY, 0, bytes(100), order=">"), f"announces {MANY} tensors"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    for read in (read_gguf, lambda file: check_header(file, gguf.GGML_QUANT_SIZES)):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        said = str(caught.value)
        assert said.startswith(f"{path} ") and message in said and "\n" not in said and len(said) < 300


def test_headers_that_are_right(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["a", "bcd", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    writer.add_float64("pi", 3.14)
    writer.add_tensor("a", torch.ones(3, 5).numpy())
    writer.add_tensor("b", torch.ones(1).half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "m.gguf", gguf.GGML_QUANT_SIZES)
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("words").contents() == ["a", "bcd", ""]
    (tmp_path / "t.gguf").write_bytes(tensor((72,)))
    check_header(tmp_path / "t.gguf", gguf.GGML_QUANT_SIZES)
    nested = array(9, 2, struct.pack("<IQI", 4, 1, 7) + struct.pack("<IQ", 8, 1) + text(b"x"))
    (tmp_path / "n.gguf").write_bytes(nested)
    check_header(tmp_path / "n.gguf", gguf.GGML_QUANT_SIZES)
    with pytest.raises(FileNotFoundError):
        check_header(tmp_path / "no.gguf", gguf.GGML_QUANT_SIZES)


@pytest.mark.timeout(20)
@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
def test_pipes(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf' is a pipe, not a file"):
        check_header(tmp_path / "m.gguf", gguf.GGML_QUANT_SIZES)
