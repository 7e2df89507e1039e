"""Finished layers in a directory, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dybit.errors import DyBitError
from dybit.safe_files import feed, write_file
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
            feed(digest, [model.state_dict(), *parts])
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
            write_file(path, data)
        except OSError as error:
            raise DyBitError(f"workdir={str(path.parent)!r} cannot be written: {error.strerror}") from None

    def _path(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(self._key + name.encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"
