"""MXFP4 tensors in GGUF files, as llama.cpp reads them.

Names and metadata of the model are the caller's.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dybit.errors import CheckpointError, DyBitError, MissingExtraError
from dybit.interchange.blocks import MX_BLOCK, Blocks, from_blocks, to_blocks
from dybit.interchange.header import check_header
from dybit.interchange.imported import Imported
from dybit.safe_files import SHA256, check_digest, digest
from dybit.tensors.quantized_tensor import QuantizedTensor

_BYTES = 1 + MX_BLOCK // 2  # of a block: its exponent, then codes 0 … 15 in the low halves and 16 … 31 in the high ones


def write_gguf(
    path: str | os.PathLike[str],
    weights: Mapping[str, QuantizedTensor],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    architecture: str = "dybit",
    metadata: Mapping[str, str | int | float | bool] | None = None,
) -> Path:
    """Writes weights as MXFP4 tensors, atomically, with the SHA-256 of all tensors in the field ``dybit.sha256``.

    Args:
        path: The file.
        weights: By the names that they get; ``s4r2`` (or ``e2m1``) with ``group_size=32, scale="pow2"``.
        tensors: Others, written as FP32.
        architecture: llama.cpp's name of the architecture, such as ``llama``.
        metadata: Further fields of the header.

    Raises:
        DyBitError: A weight is quantized in another way, or the file cannot be written.
        MissingExtraError: The package gguf is not installed.
    """
    gguf = _gguf()
    target = Path(path)
    blocks = {name: to_blocks(weight, name) for name, weight in weights.items()}
    for name, block in blocks.items():
        if block.divisor is not None:
            raise DyBitError(f"{name!r} is NVFP4; GGUF files are written with MXFP4 (scale='pow2', group_size=32)")
    stored = {name: _interleave(block) for name, block in blocks.items()}
    stored |= {name: tensor.detach().float().contiguous().numpy() for name, tensor in (tensors or {}).items()}
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            part = Path(folder) / "part"
            writer = gguf.GGUFWriter(part, architecture)
            for key, value in {**(metadata or {}), SHA256: digest(stored)}.items():
                add = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}
                add[type(value)](key, value)
            for name, array in stored.items():
                kind = gguf.GGMLQuantizationType.MXFP4 if name in blocks else gguf.GGMLQuantizationType.F32
                writer.add_tensor(name, array, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            part.replace(target)
    except OSError as error:
        raise DyBitError(f"path {str(path)!r} cannot be written: {error.strerror}") from None
    return target


def read_gguf(path: str | os.PathLike[str]) -> Imported:
    """Reads the MXFP4 tensors of a GGUF file, value for value; those of FP32 and FP16 come as they are.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or no GGUF.
        DyBitError: It has no MXFP4 tensor of two dimensions.
        MissingExtraError: The package gguf is not installed.
    """
    gguf = _gguf()
    try:
        check_header(path, gguf.GGML_QUANT_SIZES)
        reader = gguf.GGUFReader(path)
        known = reader.get_field(SHA256)
        check_digest({tensor.name: tensor.data for tensor in reader.tensors}, known and str(known.contents()), path)
        found = Imported()
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4 and len(shape) == 2:
                found.weights[tensor.name] = from_blocks(_separate(np.asarray(tensor.data), shape), tensor.name)
            elif tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                found.tensors[tensor.name] = torch.from_numpy(np.array(tensor.data).reshape(shape))
    except CheckpointError:
        raise
    except DyBitError as error:
        raise DyBitError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the reader maps a file into memory and trusts it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a valid GGUF file: {reason}") from None
    if not found.weights:
        raise DyBitError(f"{path} has no MXFP4 tensor of two dimensions")
    return found


def _interleave(blocks: Blocks) -> Any:  # noqa: ANN401  # an array
    """(rows, bytes) as GGUF has them."""
    rows, groups = blocks.scale.shape
    codes = _codes(blocks.packed.numpy()).reshape(rows, groups, 2, MX_BLOCK // 2)
    packed = codes[:, :, 0] | codes[:, :, 1] << 4
    return np.concatenate([blocks.scale.numpy()[..., None], packed], axis=2).reshape(rows, groups * _BYTES)


def _separate(data: Any, shape: tuple[int, ...]) -> Blocks:  # noqa: ANN401  # an array
    """The inverse of :func:`_interleave`."""
    rows, columns = shape
    raw = np.array(data, dtype=np.uint8).reshape(rows, columns // MX_BLOCK, _BYTES)
    halves = np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], axis=2)
    codes = halves.reshape(rows, columns)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return Blocks(torch.from_numpy(packed), torch.from_numpy(np.ascontiguousarray(raw[..., 0])))


def _codes(packed: Any) -> Any:  # noqa: ANN401  # arrays
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)


def _gguf() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtraError('GGUF needs the package gguf: pip install "dybit[gguf]"') from None
