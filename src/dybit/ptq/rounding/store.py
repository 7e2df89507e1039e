"""Finished layers in a directory, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_VERSION = 2  # rises when the same key stands for other weights


class Store:
    """Quantized weights by name, one file each, under a key that stands for everything that they depend on.

    Args:
        folder: The directory; None keeps nothing.
        model: The floating-point model.
        parts: What else counts: tensors, mappings and sequences of them, and values with a faithful ``repr``.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, model: nn.Module, *parts: object) -> None:
        self._folder = None if folder is None else Path(folder)
        self._key = b""
        if self._folder is not None:
            digest = hashlib.sha256(f"{_VERSION} {torch.__version__}".encode())
            for part in (model.state_dict(), *parts):
                _update(digest, part)
            self._key = digest.digest()

    def get(self, name: str, spec: TensorSpec) -> QuantizedTensor | None:
        """Returns a kept weight; None if it is missing or its file is damaged."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no iterator
        except (SafetensorError, OSError):
            return None
        wanted = {suffix or "packed": layout for suffix, layout in spec.buffers().items()}
        if {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} != wanted:
            return None
        parts = ("packed", "_scale", "_choice", "_tensor_scale")
        return QuantizedTensor(spec, *(tensors.get(part) for part in parts))  # type: ignore[arg-type]

    def put(self, name: str, weight: QuantizedTensor) -> None:
        """Keeps a weight: its file is complete or not there.

        Raises:
            DyBitError: It cannot be written.
        """
        path = self._path(name)
        if path is None:
            return
        data = safetensors.torch.save({suffix or "packed": part for suffix, part in weight.buffers().items()})
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise DyBitError(f"workdir={str(path.parent)!r} cannot be written: {error.strerror}") from None

    def _path(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(self._key + name.encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"


def _update(digest: Any, part: object) -> None:  # noqa: ANN401  # hashlib has no type for it
    """Hashes tensors by their bytes, containers by their members, anything else by its ``repr``."""
    if isinstance(part, Tensor):
        flat = part.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key, value in part.items():
            digest.update(repr(key).encode())
            _update(digest, value)
    elif isinstance(part, list | tuple):
        digest.update(f"{type(part).__name__} {len(part)}".encode())
        for value in part:
            _update(digest, value)
    else:
        digest.update(repr(part).encode())
