"""The header of a GGUF file, checked before a reader that trusts it allocates what it announces."""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from typing import NamedTuple

from dybit.errors import CheckpointError
from dybit.safe_files import check_regular

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of scalars, by type
_LEAST = {_STRING: 8, _ARRAY: 12, **_SIZES}  # bytes that a value takes at least
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_NESTED, _DIMENSIONS = 4, 4  # arrays in arrays, of which no file is known; GGUF's own limit
_ALIGNMENT = "general.alignment"


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def check_header(path: str | os.PathLike[str], sizes: Mapping[int, tuple[int, int]]) -> None:
    """Checks that a GGUF file holds what its header announces.

    Args:
        path: The file.
        sizes: Elements and bytes of a block, by the number of the tensors' type (``gguf.GGML_QUANT_SIZES``).

    Raises:
        CheckpointError: It is not a GGUF file, is truncated, or announces more than it holds.
        OSError: It cannot be read.
    """
    with check_regular(path, CheckpointError).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data, size, path).check(sizes)


class _Header:
    """One pass over a header."""

    def __init__(self, data: mmap.mmap, size: int, path: str | os.PathLike[str]) -> None:
        self.data, self.size, self.path, self.place = data, size, path, 4
        self.order = "<"

    def check(self, sizes: Mapping[int, tuple[int, int]]) -> None:
        version = self.number("I")
        if version & 0xFFFF == 0:  # how the reader recognizes files of the other byte order
            self.order, self.place = ">", 4
            version = self.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF of version {version}, not 2 or 3")
        tensors, fields = self.number("Q"), self.number("Q")
        self.room(tensors * _LEAST_TENSOR + fields * _LEAST_FIELD, f"{tensors} tensors and {fields} fields")
        alignment = 32
        for _ in range(fields):
            name, kind = self.string(), self.number("I")
            place = self.place
            self.skip(kind, name)
            if name == _ALIGNMENT.encode() and kind == 4:
                alignment = struct.unpack_from(f"{self.order}I", self.data, place)[0]
        if alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path} has the {_ALIGNMENT} {alignment}, which is not a power of two")
        found = [self.tensor() for _ in range(tensors)]
        start = -(-self.place // alignment) * alignment
        for tensor in found:
            if tensor.kind not in sizes:
                raise CheckpointError(f"{self.path} has the tensor {tensor.name!r:.100} of unknown type {tensor.kind}")
            elements, nbytes = sizes[tensor.kind]
            if (tensor.shape[0] if tensor.shape else 1) % elements:
                raise CheckpointError(f"{self.path} has the tensor {tensor.name!r:.100} with a row of broken blocks")
            self.place = start + tensor.offset
            self.room(math.prod(tensor.shape) // elements * nbytes, f"the tensor {tensor.name!r:.100}")

    def tensor(self) -> _Tensor:
        name, count = self.string().decode(errors="replace"), self.number("I")
        if count > _DIMENSIONS:
            raise CheckpointError(f"{self.path} announces {count} dimensions of {name!r:.100}, more than {_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(count))
        return _Tensor(name, shape, self.number("I"), self.number("Q"))

    def skip(self, kind: int, name: bytes, depth: int = 0) -> None:
        """Passes a value of a field."""
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner not in _LEAST or depth == _NESTED:
                raise CheckpointError(f"{self.path} has in {name!r:.100} an array of unknown kind")
            self.room(count * _LEAST[inner], f"an array of {count} in {name!r:.100}")
            if inner in _SIZES:
                self.place += count * _SIZES[inner]
            else:
                for _ in range(count):
                    self.skip(inner, name, depth + 1)
        elif kind in _SIZES:
            self.room(_SIZES[kind], f"the field {name!r:.100}")
            self.place += _SIZES[kind]
        else:
            raise CheckpointError(f"{self.path} has the field {name!r:.100} of unknown type {kind}")

    def string(self) -> bytes:
        length = self.number("Q")
        self.room(length, f"a string of {length} bytes")
        self.place += length
        return self.data[self.place - length : self.place]

    def number(self, kind: str) -> int:
        size = struct.calcsize(f"{self.order}{kind}")
        self.room(size, "a header")
        self.place += size
        found: int = struct.unpack_from(f"{self.order}{kind}", self.data, self.place - size)[0]
        return found

    def room(self, count: int, what: str) -> None:
        """Checks that so many bytes follow."""
        if count > self.size - self.place:
            raise CheckpointError(f"{self.path} announces {what}, but the file ends after {self.size} bytes")
