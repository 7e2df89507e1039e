"""Files that cannot be trusted: what may be opened, how deep JSON may nest, and checksums of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dybit.errors import CheckpointError, DyBitError

SHA256 = "dybit.sha256"  # the key of a digest in the metadata of other projects' formats
_DEPTH = 100  # the files that are meant to be read nest six deep, and Python's own limit is a thousand
_KINDS = {
    stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "directory",
}  # fmt: skip


def check_regular(path: str | os.PathLike[str], error: type[DyBitError] = DyBitError) -> Path:
    """Checks that a path is a file, before it is opened: opening a pipe would wait for somebody to write to it.

    Args:
        path: The path. One that cannot be looked at, as where there is nothing, passes: opening it says why.
        error: What to raise.

    Returns:
        The path.

    Raises:
        DyBitError: It is a pipe, device, socket or directory.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        return file
    if not stat.S_ISREG(mode):
        raise error(f"{str(file)!r} is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a file")
    return file


def read_json(path: str | os.PathLike[str], error: type[DyBitError] = CheckpointError) -> Any:  # noqa: ANN401
    """Reads a JSON file.

    Raises:
        OSError: It cannot be read.
        DyBitError: It is no file, or as :func:`parse_json`.
    """
    return parse_json(check_regular(path, error).read_bytes(), str(path), error)


def parse_json(
    text: str | bytes,
    name: str,
    error: type[DyBitError] = DyBitError,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:  # noqa: ANN401
    """The value of JSON text, unless it nests so deep that what walks it would fail.

    Args:
        text: The text, in UTF-8 if bytes.
        name: For errors.
        error: What to raise.
        pairs: Makes an object of its members.

    Raises:
        DyBitError: It is no JSON, or nests deeper than 100.
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=pairs)
    except DyBitError:
        raise
    except (ValueError, TypeError) as reason:
        raise error(f"{name} is not valid JSON: {reason}") from None
    except RecursionError:
        raise error(f"{name} is not valid JSON: it nests deeper than {_DEPTH}") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise error(f"{name} is not valid JSON: it nests deeper than {_DEPTH}")
    return value


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names.

    One tensor at a time is copied, if it lies on another device or is not contiguous, and none otherwise.

    Args:
        tensors: Tensors of torch, or arrays of NumPy, which count like tensors of their type.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        said = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        found.update(json.dumps(said).encode() + b"\n")
        found.update(_bytes(tensor))
    return found.hexdigest()


def check_digest(tensors: Mapping[str, Any], expected: str | None, path: str | os.PathLike[str]) -> None:
    """Checks tensors against the digest that their file carries, if dybit wrote it.

    Raises:
        CheckpointError: They are not those that were written.
    """
    if expected is not None and expected != digest(tensors):
        raise CheckpointError(f"{path} is damaged: the SHA-256 of its tensors is not its {SHA256}, {expected!r:.100}")


def crc32(parts: Iterable[Any]) -> str:
    """CRC-32 of the bytes of tensors, or of bytes, one after the other, as eight hexadecimal digits."""
    found = 0
    for part in parts:
        found = zlib.crc32(part if isinstance(part, bytes | bytearray) else _bytes(part), found)
    return f"{found:08x}"


def label(dtype: object, shape: Iterable[int], parts: Iterable[Any]) -> str:
    """Type, shape and CRC-32 of a tensor that is at hand in parts, as in ``"float32 64x48:89abcdef"``."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}:{crc32(parts)}"


def _bytes(tensor: Any) -> Any:  # noqa: ANN401  # an array of bytes
    if hasattr(tensor, "detach"):
        flat = tensor.detach().cpu().contiguous().view(-1)
        tensor = flat.view(sys.modules["torch"].uint8).numpy()
    return tensor.ravel().view("uint8").data
