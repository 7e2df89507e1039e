"""Locates tensors in safetensors files without reading them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dybit.errors import CheckpointError
from dybit.safe_files import check_regular, checked, member, parse_json, read_json

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype: Its type as safetensors calls it.
        shape: Its shape.
        offset: Its first byte in the file.
        nbytes: Its size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_source(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """Finds the tensors of a ``.safetensors`` file, or of the files that a ``.safetensors.index.json`` names.

    Raises:
        CheckpointError: A file is missing, damaged or not a safetensors file, or the index names files elsewhere.
    """
    path = Path(path)
    if not path.name.endswith(".json"):
        return _read_header(path)
    try:
        table = member(checked(read_json(path), "the index", dict), "weight_map", dict)
        names = sorted({checked(name, f"weight_map[{key!r}]", str) for key, name in table.items()})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error}") from None
    found: dict[str, Stored] = {}
    for name in names:
        # A malicious index must not make dybit read and copy other files.
        beside = name == Path(name).name and name.isprintable() and "\\" not in name and ":" not in name
        if not beside or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {name!r}, which is not a .safetensors file beside it")
        for key, stored in _read_header(path.parent / name).items():
            if key in found:
                raise CheckpointError(f"{path}: the tensor {key!r} is in two files")
            found[key] = stored
    for key, name in table.items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(f"{path} says that {key!r} is in {name!r}, but it is not")
    return found


def _read_header(file: Path) -> dict[str, Stored]:
    check_regular(file, CheckpointError)
    try:
        with safe_open(file, framework="pt"):  # checks the header and the size of the file
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(size), str(file), CheckpointError)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    return {
        key: Stored(file, item["dtype"], tuple(item["shape"]), 8 + size + begin, end - begin)
        for key, item in header.items()
        for begin, end in [item["data_offsets"]]
    }


def read_bytes(descriptor: int, stored: Stored, start: int, length: int) -> bytearray:
    """Reads bytes of a tensor. A memory map would count towards the memory of this process until it is closed."""
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], stored.offset + start + done)
        if count == 0:
            raise CheckpointError(f"{stored.file} became shorter while it was read")
        done += count
    return data
