"""Saves quantized models and loads them: a directory of ``model.safetensors`` and ``dybit.json``, never a pickle."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dybit.errors import CheckpointError, DyBitError
from dybit.layers.description import Description, without_descriptions
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import weight_names
from dybit.layers.quantized import Quantized, quantized_layers
from dybit.layers.swap import set_bias_, swap_
from dybit.models.attachments import attachments, check_attachments, expect_attached_, is_attached
from dybit.models.batch_norm import expect_folded_, is_pair
from dybit.models.coverage import Coverage, measure
from dybit.models.preparation import bypass_fast_path_, folded_pairs, make_plain_
from dybit.recipe import Recipe
from dybit.safe_files import check_regular, read_json
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
MANIFEST = "dybit.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LayerEntry:
    """A quantized layer in a manifest.

    Attributes:
        kind: The class of the floating-point layer, for people.
        dtype: The type in which its weights are dequantized.
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
    """What ``dybit.json`` says.

    Attributes:
        layers: The quantized layers by qualified name.
        folded: The (convolution, batch norm) pairs that were folded.
        attached: What transforms attached to modules (see :mod:`dybit.models.attachments`).
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


def save(model: nn.Module, path: str | os.PathLike[str], recipe: Recipe | None = None) -> Path:
    """Saves a quantized model, atomically: the directory is complete or it is not there.

    Args:
        model: A model that :func:`dybit.quantize_` or :func:`dybit.load` returned.
        path: The directory; a checkpoint of dybit that is there already is replaced.
        recipe: The recipe to store with it; None stores the one that the model was quantized with, if known.

    Returns:
        The directory.

    Raises:
        DyBitError: The model has no quantized layer, or ``path`` is something else or cannot be written.
    """
    layers = quantized_layers(model)
    if not layers:
        raise DyBitError("model has no quantized layer; call quantize_ first")
    tensors, shared = _unique_tensors(model.state_dict())
    entries = {
        name: {
            "kind": type(layer).__name__.removeprefix("Quantized"),
            "dtype": str(layer.float_dtype).removeprefix("torch."),
            "weights": {key: spec.to_dict() for key, spec in layer.weight_specs.items()},
            "input": layer.input_spec.to_dict() if layer.input_spec else None,
            **({"added_bias": True} if layer.added_bias else {}),
        }
        for name, layer in layers.items()
    }
    recipe = recipe or getattr(model, "_dybit_recipe", None)
    parts: dict[str, Any] = {"folded": folded_pairs(model), "attached": attachments(model), "shared": shared}
    return write(path, tensors, entries, recipe=recipe, coverage=measure(model, recipe), **parts)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    *,
    folded: list[tuple[str, str]] | None = None,
    attached: Mapping[str, Mapping[str, Any]] | None = None,
    shared: Mapping[str, str] | None = None,
    recipe: Recipe | None = None,
    coverage: Coverage | None = None,
) -> Path:
    """Writes a checkpoint from its parts; see :func:`save`.

    Args:
        path: The directory.
        tensors: All tensors by key; no two of them share memory.
        layers: The entries of the quantized layers as JSON values.
        folded: The folded pairs.
        attached: What transforms attached.
        shared: Keys of tied tensors.
        recipe: The recipe.
        coverage: How much of the model is quantized.
    """
    with replacing(Path(path)) as folder:
        target = folder / TENSORS
        try:
            # One key only: with more, their order, and so the bytes of equal files, would be left to chance.
            safetensors.torch.save_file(dict(tensors), target, metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise DyBitError(f"path {str(path)!r} cannot be written: {error}") from None
        text = manifest_text(
            target,
            layers,
            folded=folded or [],
            shared=shared or {},
            recipe=recipe,
            attached=attached or {},
            coverage=coverage,
        )
        (folder / MANIFEST).write_text(text)
    return Path(path)


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
    """The contents of ``dybit.json`` for a file of tensors; see :func:`write`."""
    manifest = {
        "format": "dybit",
        "version": FORMAT_VERSION,
        "dybit_version": _version(),
        "sha256": _checksum(tensors),
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


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads a checkpoint into a fresh floating-point model of the same architecture, in place.

    Needs no calibration data. The result computes what the saved model computed, bit for bit.

    Args:
        path: The directory that :func:`save` wrote.
        model: The model; its values do not matter, and it is not changed if the checkpoint does not fit.

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: The directory is missing, truncated, foreign, of another version, or does not fit the model.
        DyBitError: The model is quantized already.
    """
    if not isinstance(model, nn.Module) or quantized_layers(model):
        raise DyBitError(
            f"model must be a floating-point torch.nn.Module, not {type(model).__name__}, quantized already"
        )
    manifest = read_manifest(path)
    _check_architecture(manifest, model, path)
    tensors = read_tensors(path, manifest)
    state = _check_keys(manifest, tensors, model, path)
    _restructure_(model, manifest)
    model.load_state_dict(state, strict=True, assign=True)
    _tie_(model, manifest.shared)
    bypass_fast_path_(model, quantized_layers(model).values())
    cast(Any, model)._dybit_folded = manifest.folded
    cast(Any, model)._dybit_recipe = manifest.recipe
    return model.eval()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks ``dybit.json``.

    Raises:
        CheckpointError: It is missing, no JSON, foreign, of another version or has bad fields.
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
        return Manifest(
            layers={str(name): _entry(entry) for name, entry in data["layers"].items()},
            folded=[(str(conv), str(norm)) for conv, norm in data["folded"]],
            attached=check_attachments(data.get("attached", {})),
            shared={str(key): str(source) for key, source in data["shared"].items()},
            recipe=Recipe.from_dict(data["recipe"]) if data["recipe"] is not None else None,
            checksum=str(data["sha256"]),
            version=str(data["dybit_version"]),
            coverage=Coverage.from_dict(data["coverage"]) if "coverage" in data else None,
        )
    except DyBitError as error:
        raise CheckpointError(f"{file} has a bad entry: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} has a missing or bad field: {error}") from None


def read_tensors(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, Tensor]:
    """Reads the tensors and checks that they are those the manifest was written with.

    Raises:
        CheckpointError: The file is missing, truncated or changed.
    """
    file = Path(path) / TENSORS
    try:
        if _checksum(check_regular(file, CheckpointError)) != manifest.checksum:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({error.strerror})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new directory beside ``path`` that takes its place when all went well, and is removed when not.

    Raises:
        DyBitError: ``path`` is a file, a directory that is no checkpoint, or cannot be written.
    """
    try:
        if path.exists() and not (path.is_dir() and ((path / MANIFEST).exists() or not any(path.iterdir()))):
            raise DyBitError(f"path {str(path)!r} exists and is not a dybit checkpoint; nothing was written")
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise DyBitError(f"path {str(path)!r} cannot be written: {error.strerror}") from None
    try:
        yield folder
        put_in_place(folder, path)
    except OSError as error:
        raise DyBitError(f"path {str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Renames a complete directory to ``path``; a checkpoint that is there goes, or stays if that fails."""
    folder.chmod(0o755)
    if not path.exists():
        folder.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / "old"
    try:
        path.rename(old)
        folder.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _unique_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and the keys of those that are stored under another key."""
    owners: dict[tuple[Any, ...], str] = {}
    tensors, shared = {}, {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise DyBitError(f"model has the extra state {key!r}, which is no tensor and cannot be stored")
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in owners:
            shared[key] = owners[place]
        else:
            owners[place] = key
            tensors[key] = value.detach().contiguous()
    # Views of one storage, such as slices of a fused parameter, are stored as tensors of their own.
    storages: set[int] = set()
    for key, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        if pointer in storages or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            tensors[key] = value.clone()
        storages.add(pointer)
    return tensors, shared


def _entry(data: Mapping[str, Any]) -> LayerEntry:
    if data["dtype"] not in _DTYPES:
        raise DyBitError(f"dtype must be one of {', '.join(_DTYPES)}, not {data['dtype']!r}")
    return LayerEntry(
        kind=str(data["kind"]),
        dtype=_DTYPES[data["dtype"]],
        weights={str(name): TensorSpec.from_dict(spec) for name, spec in data["weights"].items()},
        input=InputSpec.from_dict(data["input"]) if data["input"] is not None else None,
        added_bias=data.get("added_bias") is True,
    )


def _check_architecture(manifest: Manifest, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Checks that every layer and pair of the manifest is in the model, of the right kind and shape."""
    modules = dict(model.named_modules())
    for name, entry in manifest.layers.items():
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"{path} does not fit the model: it has no layer {name!r}")
        names = weight_names(module)
        if not names or not set(entry.weights) <= set(names) or (entry.weights and set(entry.weights) != set(names)):
            kind = type(module).__name__
            raise CheckpointError(f"{path} does not fit the model: {name!r} was {entry.kind} and is {kind}")
        for key, spec in entry.weights.items():
            shape = tuple(getattr(module, key).shape)
            if shape != spec.shape:
                raise CheckpointError(
                    f"{path} does not fit the model: {name}.{key} has shape {shape}, the checkpoint {spec.shape}"
                )
    for name in manifest.attached:
        if name not in modules or is_attached(modules[name]):
            raise CheckpointError(f"{path} does not fit the model: it has no {name!r} to attach to")
    for conv, norm in manifest.folded:
        if not is_pair(modules.get(conv), modules.get(norm)):
            raise CheckpointError(f"{path} does not fit the model: it has no {conv!r} with batch norm {norm!r}")


def _check_keys(
    manifest: Manifest, tensors: Mapping[str, Tensor], model: nn.Module, path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Checks names, shapes and types of all tensors before the model is changed, and returns them all by key."""
    skeleton = _skeleton(model)
    _restructure_(skeleton, manifest)
    expected = skeleton.state_dict()
    found = {**tensors, **{key: tensors.get(source) for key, source in manifest.shared.items()}}
    descriptions = {key: expected.pop(key) for key in expected.keys() - without_descriptions(expected).keys()}
    if not descriptions.keys() & tensors.keys():
        found |= descriptions  # of an earlier version, which stored none
    expected |= descriptions
    missing = [key for key in expected if found.get(key) is None]
    extra = [key for key in found if key not in expected]
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the model lacks"
        more = len(missing) + len(extra) - 1
        raise CheckpointError(f"{path} does not fit the model: it {what}{f' and {more} more differ' if more else ''}")
    prefixes = tuple(f"{name}." if name else "" for name in manifest.layers)
    for key, wanted in expected.items():
        tensor = cast(Tensor, found[key])
        if key in descriptions and _agree(tensor, wanted):
            continue
        # What is not ours may be stored in another floating-point type than the fresh model has.
        free = wanted.is_floating_point() and tensor.is_floating_point() and not _is_ours(key, prefixes)
        if tensor.shape != wanted.shape or not (free or tensor.dtype == wanted.dtype):
            raise CheckpointError(
                f"{path} does not fit the model: {key!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {wanted.dtype} of shape {tuple(wanted.shape)}"
            )
        if key in descriptions:
            raise CheckpointError(f"{path} is damaged: {key!r} does not say what {MANIFEST} says")
    return cast(dict[str, Tensor], found)


def _agree(description: Tensor, wanted: Tensor) -> bool:
    """Whether a stored description says what another says, in whatever order."""
    try:
        return Description.from_tensor(description) == Description.from_tensor(wanted)
    except DyBitError:
        return False


def _is_ours(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a key is that of a quantized layer's scales or inputs, whose type is part of the format."""
    return key.startswith(prefixes) and key.endswith(("_scale", "_offset", "_choice"))


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without its data, on which to try what a manifest asks for."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for value in (*module._buffers.values(), *vars(module).values()):  # the latter: weights made by hooks
            if isinstance(value, Tensor):
                memo[id(value)] = torch.empty_like(value, device="meta")
    return copy.deepcopy(model, memo)


def _restructure_(model: nn.Module, manifest: Manifest) -> None:
    """Gives a floating-point model the structure of a checkpoint, with empty tensors where values are to be loaded."""
    expect_folded_(model, manifest.folded)
    expect_attached_(model, manifest.attached)
    for name, entry in manifest.layers.items():
        _prepare_layer_(model.get_submodule(name), entry)


def _prepare_layer_(module: nn.Module, entry: LayerEntry) -> None:
    """Swaps a layer with empty buffers, to be filled."""
    make_plain_(module)
    weights = {}
    for name, spec in entry.weights.items():
        buffers = {
            suffix: torch.empty(shape, dtype=dtype, device="cpu") for suffix, (shape, dtype) in spec.buffers().items()
        }
        weights[name] = QuantizedTensor(
            spec, buffers[""], buffers["_scale"], buffers.get("_choice"), buffers.get("_tensor_scale")
        )
    scale, offset = torch.empty(2, 1, dtype=torch.float32, device="cpu")
    swap_(module, weights, entry.input, scale, offset, entry.dtype)
    if entry.added_bias and module._parameters.get("bias") is None:
        set_bias_(cast(Quantized, module), torch.empty(entry.weights["weight"].rows, dtype=torch.float32, device="cpu"))


def _tie_(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes tied buffers one tensor again; tied parameters are so by the architecture, or were loaded as one tensor."""
    for key, source in shared.items():
        (owner, name), (first, first_name) = _holder(model, key), _holder(model, source)
        for table in ("_buffers", "_parameters"):
            if name in getattr(owner, table) and first_name in getattr(first, table):
                getattr(owner, table)[name] = getattr(first, table)[first_name]


def _holder(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    prefix, _, name = key.rpartition(".")
    return model.get_submodule(prefix), name


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says about the model, or a flipped bit in a format's name would go unnoticed."""
    said = [manifest.get(name) for name in ("layers", "folded", "shared", "recipe")]
    if manifest.get("attached"):
        said.append(manifest["attached"])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _version() -> str:
    try:
        return version("dybit")
    except PackageNotFoundError:
        return "unknown"
