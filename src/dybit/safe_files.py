"""Files that cannot be trusted: what may be opened, how deep JSON may nest, and checksums of tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from dybit.errors import CheckpointError, DyBitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHA256 = "dybit.sha256"  # the key of a digest in the metadata of other projects' formats
_DEPTH = 100  # the files that are meant to be read nest six deep, and Python's own limit is a thousand
_KINDS = {
    stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "directory",
}  # fmt: skip
_WORDS = {
    dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true or false",
    NoneType: "null",
}  # fmt: skip
_STAGED = ".dybit-"  # begins the names of directories in which files wait for their place


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


def member(values: Mapping[str, Any], name: str, *kinds: type, error: type[DyBitError] = CheckpointError) -> Any:  # noqa: ANN401
    """The member of a JSON object.

    Args:
        values: The object.
        name: The name of the member.
        *kinds: What it may be: ``dict``, ``list``, ``str``, ``int``, ``float``, ``bool``, ``NoneType``.
        error: What to raise.

    Raises:
        DyBitError: It is missing, or something else.
    """
    if name not in values:
        raise error(f"{name} is missing")
    return checked(values[name], name, *kinds, error=error)


def checked(value: Any, name: str, *kinds: type, error: type[DyBitError] = CheckpointError) -> Any:  # noqa: ANN401
    """A JSON value of some types; see :func:`member`.

    Raises:
        DyBitError: It is something else.
    """
    if type(value) not in kinds:
        raise error(f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, not {value!r:.100}")
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
    """Type, shape and CRC-32 of a tensor given in parts, such as ``"float32 64x48:89abcdef"``."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}:{crc32(parts)}"


def feed(digest: Any, value: Any) -> None:  # noqa: ANN401  # hashlib has no type for it
    """Adds a value to a hash: tensors and arrays by their bytes, containers by their members, others by ``repr``."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        digest.update(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for key, item in value.items():
            digest.update(repr(key).encode())
            feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            feed(digest, item)
    else:
        digest.update(repr(value).encode())


def _bytes(tensor: Any) -> Any:  # noqa: ANN401  # an array of bytes
    if hasattr(tensor, "detach"):
        flat = tensor.detach().cpu().contiguous().view(-1)
        tensor = flat.view(sys.modules["torch"].uint8).numpy()
    return tensor.ravel().view("uint8").data


def cache_directory() -> Path:
    """The user's cache directory of dybit: ``DYBIT_CACHE``, or ``dybit`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("DYBIT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dybit"


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file: it is complete, or stays as it was.

    The file gets the permissions of any new file. A symbolic link stays, and its target is written. A pipe or device,
    such as ``/dev/stdout``, is written to.

    Args:
        path: The file.
        data: Its contents; text is stored as UTF-8.

    Raises:
        OSError: It cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    target = Path(os.path.realpath(path))
    if Path(path).exists() and not target.is_file():
        Path(path).write_bytes(content)
        return
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes JSON as :func:`write_file` does, and makes the directories that it needs.

    Raises:
        DyBitError: It cannot be written.
        ValueError: A number is not finite.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise DyBitError(f"{str(path)!r} cannot be written: {error.strerror}") from error


@contextmanager
def replacing(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """A new directory whose files come to ``path`` when all went well, and is removed when not.

    The files of a directory that is at ``path`` already are replaced by those of the same name; the others stay. So do
    the directory itself and symbolic links to it. New files get the permissions of any new file.

    Args:
        path: The directory.
        mark: A directory is only written to if it holds a file of this name, or nothing.

    Raises:
        DyBitError: ``path`` is something else, or cannot be written.
    """
    try:
        target = check_replaceable(path, mark)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = (target if target.is_dir() else target.parent) / f"{_STAGED}{secrets.token_hex(8)}"
        folder.mkdir()
    except DyBitError:
        raise
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from None
    try:
        yield folder
        for file in folder.iterdir():
            if file.is_file():  # safetensors writes files that only their owner can read
                file.chmod(folder.stat().st_mode & 0o666)
        put_in_place(folder, target)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(path: str | os.PathLike[str], mark: str) -> Path:
    """Checks that a directory may be written to (see :func:`replacing`), and returns it without symbolic links.

    Raises:
        DyBitError: It is something else than a directory, or holds other files.
        OSError: It cannot be read.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        with reading(target):
            names = [file.name for file in target.iterdir() if not file.name.startswith(_STAGED)]
        if not names or mark in names:
            return target
    elif not target.exists():
        return target
    raise DyBitError(f"path {str(path)!r} exists and is not a dybit checkpoint; nothing was written")


def unwritable(path: str | os.PathLike[str], error: Exception) -> DyBitError:
    """The error for a path that the system refuses to write."""
    return DyBitError(f"path {str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}")


def partial_directory(target: Path) -> Path:
    """Where the unfinished contents of a directory wait, so that a later call finds them."""
    return target / f"{_STAGED}partial" if target.is_dir() else target.parent / f".{target.name}.partial"


def put_in_place(folder: Path, target: Path) -> None:
    """Moves a complete directory to ``target``, or its files into the directory that is there: all of them or none.

    Raises:
        OSError: They cannot be moved.
    """
    if not target.is_dir():
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # unless another process has made it meanwhile
                raise
        else:
            return
    with locked(target):
        _exchange(folder, target)


def _exchange(folder: Path, target: Path) -> None:
    """Moves files into a directory. Those that they replace go to ``folder``, and come back if anything fails."""
    names = sorted(file.name for file in folder.iterdir())
    kept = folder / f"{_STAGED}replaced"
    kept.mkdir()
    begun = []
    try:
        for name in names:
            begun.append(name)
            if os.path.lexists(target / name):
                (target / name).rename(kept / name)
            (folder / name).rename(target / name)
    except BaseException:
        for name in begun:
            if os.path.lexists(kept / name):
                (kept / name).replace(target / name)
            elif not os.path.lexists(folder / name):
                (target / name).unlink()
        raise


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a directory, which one process has at a time. Windows and some file systems have none.

    Args:
        folder: The directory.
        wait: Whether to wait for another process that has it.

    Raises:
        OSError: Another process has it, or the directory is gone.
    """
    with _flock(folder, shared=False, wait=wait):
        yield


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keeps other processes from putting files in place in a directory, if there is one, while the body reads it."""
    if not folder.is_dir():
        yield
        return
    with _flock(folder, shared=True, wait=True):
        yield


@contextmanager
def _flock(folder: Path, *, shared: bool, wait: bool) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing it") from None
        except OSError:  # a file system without locks
            pass
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, "another process has just moved it")
        yield
    finally:
        os.close(descriptor)
