"""The manifest of a checkpoint, ``dybit.json``: which layers are quantized, how they are stored, and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from dybit.errors import CheckpointError, DyBitError
from dybit.layers.input_spec import InputSpec
from dybit.models.attachments import check_attachments
from dybit.models.coverage import Coverage
from dybit.recipe import Recipe
from dybit.safe_files import checked, member, read_json
from dybit.tensors.quantized_tensor import TensorSpec

FORMAT_VERSION = 1
MANIFEST = "dybit.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LayerEntry:
    """A quantized layer in a manifest.

    Attributes:
        kind: The class of the floating-point layer, for information.
        dtype: The type of dequantized weights.
        weights: How each weight is stored.
        input: How inputs are rounded, or None.
        added_bias: Whether it was given a bias that the floating-point layer does not have.
    """

    kind: str
    dtype: torch.dtype
    weights: dict[str, TensorSpec]
    input: InputSpec | None
    added_bias: bool = False


@dataclass(frozen=True)
class Manifest:
    """The contents of ``dybit.json``.

    Attributes:
        layers: The quantized layers by qualified name.
        folded: The (convolution, batch norm) pairs that were folded.
        attached: Buffers and hooks of transforms, by module (see :mod:`dybit.models.attachments`).
        shared: From the keys of tied tensors to the keys under which they are stored.
        recipe: The recipe, if known.
        checksum: SHA-256 of the tensors' file.
        version: The version of dybit that wrote it.
        coverage: How much of the model is quantized; None in files of earlier versions.
    """

    layers: dict[str, LayerEntry]
    folded: list[tuple[str, str]]
    attached: dict[str, dict[str, Any]]
    shared: dict[str, str]
    recipe: Recipe | None
    checksum: str
    version: str
    coverage: Coverage | None = None


def manifest_text(
    tensors: Path,
    layers: Mapping[str, Mapping[str, Any]],
    *,
    folded: list[tuple[str, str]],
    shared: Mapping[str, str],
    recipe: Recipe | None,
    attached: Mapping[str, Any] | None = None,
    coverage: Coverage | None = None,
) -> str:
    """The text of ``dybit.json``.

    Args:
        tensors: The file of tensors.
        layers: The entries of the quantized layers as JSON values.
        folded: The folded pairs.
        shared: From the keys of tied tensors to the keys under which they are stored.
        recipe: The recipe, or None.
        attached: Buffers and hooks of transforms.
        coverage: How much of the model is quantized.
    """
    manifest = {
        "format": "dybit",
        "version": FORMAT_VERSION,
        "dybit_version": _version(),
        "sha256": checksum(tensors),
        "recipe": recipe.to_dict() if recipe else None,
        "layers": dict(layers),
        "folded": folded,
        "shared": dict(shared),
    }
    if attached:
        manifest["attached"] = dict(attached)
    if coverage is not None:
        manifest["coverage"] = coverage.to_dict()
    manifest["manifest_sha256"] = _digest(manifest)
    return json.dumps(manifest, indent=1) + "\n"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks ``dybit.json``.

    Raises:
        CheckpointError: It is missing, not JSON, not written by dybit, of another version, or has bad fields.
    """
    file = Path(path) / MANIFEST
    try:
        data = read_json(file)
    except OSError as error:
        raise CheckpointError(f"{path} is not a dybit checkpoint: cannot read {MANIFEST} ({error.strerror})") from None
    if not isinstance(data, dict) or data.get("format") != "dybit":
        raise CheckpointError(f"{file} was not written by dybit")
    if data.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {data.get('version')!r}, this dybit reads {FORMAT_VERSION}")
    if data.get("manifest_sha256") != _digest(data):
        raise CheckpointError(f"{file} is damaged: its contents are not those that dybit wrote")
    try:
        return _manifest(data)
    except DyBitError as error:
        raise CheckpointError(f"{file} has a bad entry: {error!s:.400}") from None


def _manifest(data: Mapping[str, Any]) -> Manifest:
    recipe = member(data, "recipe", dict, NoneType)
    shared = member(data, "shared", dict)
    return Manifest(
        layers={name: _entry(name, entry) for name, entry in member(data, "layers", dict).items()},
        folded=[_pair(pair) for pair in member(data, "folded", list)],
        attached=check_attachments(data.get("attached", {})),
        shared={key: checked(source, f"shared[{key!r}]", str) for key, source in shared.items()},
        recipe=None if recipe is None else Recipe.from_dict(recipe),
        checksum=member(data, "sha256", str),
        version=member(data, "dybit_version", str),
        coverage=Coverage.from_dict(data["coverage"]) if "coverage" in data else None,
    )


def _pair(pair: object) -> tuple[str, str]:
    if not isinstance(pair, list) or [type(name) for name in pair] != [str, str]:
        raise DyBitError(f"folded must hold pairs of names, not {pair!r:.100}")
    return pair[0], pair[1]


def _entry(name: str, data: object) -> LayerEntry:
    try:
        values = checked(data, "the entry", dict)
        dtype, inputs = member(values, "dtype", str), member(values, "input", dict, NoneType)
        if dtype not in _DTYPES:
            raise DyBitError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        weights = {key: TensorSpec.from_dict(spec) for key, spec in member(values, "weights", dict).items()}
        added = checked(values.get("added_bias", False), "added_bias", bool)
        if added and "weight" not in weights:
            raise DyBitError("added_bias needs a weight")
        spec = None if inputs is None else InputSpec.from_dict(inputs)
        return LayerEntry(member(values, "kind", str), _DTYPES[dtype], weights, spec, added)
    except DyBitError as error:
        raise DyBitError(f"layer {name!r}: {error}") from None


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the parts about the model. It detects a flipped bit in the name of a format."""
    said = [manifest.get(name) for name in ("layers", "folded", "shared", "recipe")]
    if manifest.get("attached"):
        said.append(manifest["attached"])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _version() -> str:
    try:
        return version("dybit")
    except PackageNotFoundError:
        return "unknown"
