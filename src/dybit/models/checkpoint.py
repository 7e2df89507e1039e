"""Saves quantized models and loads them: a directory of ``model.safetensors`` and ``dybit.json``, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dybit.errors import CheckpointError, DyBitError
from dybit.layers.description import Description, without_descriptions
from dybit.layers.kinds import weight_names
from dybit.layers.quantized import Quantized, is_fused, quantized_layers
from dybit.layers.swap import set_bias_, swap_
from dybit.models.attachments import attachments, expect_attached_, is_attached
from dybit.models.batch_norm import expect_folded_, is_pair
from dybit.models.coverage import Coverage, measure
from dybit.models.manifest import MANIFEST, LayerEntry, Manifest, checksum, manifest_text, read_manifest
from dybit.models.preparation import bypass_fast_path_, folded_pairs, make_plain_
from dybit.models.rollback import undone_on_failure
from dybit.models.running import ordinary_tensors
from dybit.recipe import Recipe
from dybit.safe_files import check_regular, reading, replacing
from dybit.tensors.quantized_tensor import QuantizedTensor

TENSORS = "model.safetensors"


def save(model: nn.Module, path: str | os.PathLike[str], recipe: Recipe | None = None) -> Path:
    """Saves a quantized model. The checkpoint is complete, or the directory stays as it was.

    Args:
        model: A model that :func:`dybit.quantize_` or :func:`dybit.load` returned.
        path: The directory. Replaces an existing checkpoint in it; other files stay.
        recipe: The recipe to store; None stores the one that the model was quantized with, if known.

    Returns:
        The directory.

    Raises:
        DyBitError: The model has no quantized layer, is fused or holds tensors that cannot be stored, or ``path`` is
            not a checkpoint or cannot be written.
    """
    if is_fused(model):
        raise DyBitError("model is fused; save the model that was passed to fuse")
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
        attached: Buffers and hooks of transforms.
        shared: Keys of tied tensors.
        recipe: The recipe.
        coverage: How much of the model is quantized.
    """
    with replacing(path, MANIFEST) as folder:
        target = folder / TENSORS
        try:
            # A single key, so that equal checkpoints have equal bytes: the order of several keys is random.
            safetensors.torch.save_file(dict(tensors), target, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors reports a full disk this way
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


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads a checkpoint into a fresh floating-point model of the same architecture, in place.

    Needs no calibration data. The outputs are those of the saved model, bit for bit.

    Args:
        path: The directory that :func:`save` wrote.
        model: The model. Its values do not matter. It is not changed if the checkpoint does not fit.

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: The directory is missing, truncated, not written by dybit, of another version, or does not fit
            the model.
        DyBitError: The model is already quantized.
    """
    if not isinstance(model, nn.Module) or quantized_layers(model):
        quantized = "an already quantized " if isinstance(model, nn.Module) else ""
        raise DyBitError(f"model must be a floating-point torch.nn.Module, not {quantized}{type(model).__name__}")
    with ordinary_tensors(model):
        manifest, tensors = read(path)
    with undone_on_failure(model), ordinary_tensors(model):
        try:
            _fill_(model, manifest, tensors, path)
        except (DyBitError, MemoryError):
            raise
        except Exception as error:  # raised by the model's code or by torch
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise CheckpointError(f"{path} does not fit the model: {reason:.300}") from error
    return model


def _fill_(model: nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Gives a floating-point model the structure and the tensors of a checkpoint. Does not write to its old tensors."""
    homes: dict[str, torch.device] = {}  # keys of modules; the checkpoint may store their tensors under other keys
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            homes.setdefault(key.partition(".parametrizations.")[0], tensor.device)
            homes.setdefault(key.rpartition(".")[0], tensor.device)
    _check_architecture(manifest, model, path)
    for name in manifest.layers:
        _empty_(model.get_submodule(name))
    expect_folded_(model, manifest.folded)
    expect_attached_(model, manifest.attached)
    for name, entry in manifest.layers.items():
        _prepare_layer_(model.get_submodule(name), name, entry, path)
    state = _check_keys(manifest, tensors, model, path)
    state = {key: tensor.to(homes.get(key.rpartition(".")[0], "cpu")) for key, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    _tie_(model, manifest.shared)
    bypass_fast_path_(model, quantized_layers(model).values())
    cast(Any, model)._dybit_folded = manifest.folded
    cast(Any, model)._dybit_recipe = manifest.recipe
    model.eval()
    _check_values(model, path)


def _check_values(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Checks that no tensor was left on the meta device."""
    for name, module in model.named_modules():
        hooks: Any = module._forward_pre_hooks.values()
        made = {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks}  # old-style norms do this
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, Tensor) and value.is_meta and key not in made:
                    key = f"{name}.{key}".lstrip(".")
                    raise CheckpointError(
                        f"{path} does not hold {key!r}, which the model has on the meta device: make the model on "
                        "another device, or give this tensor its values first"
                    )


def read(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, Tensor]]:
    """Reads and checks a checkpoint, with a lock against replacement by another process.

    Raises:
        CheckpointError: It is missing, truncated, damaged, not written by dybit, or of another version.
    """
    try:
        with reading(Path(path)):
            manifest = read_manifest(path)
            return manifest, read_tensors(path, manifest)
    except DyBitError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r} ({getattr(error, 'strerror', error)})") from None


def read_tensors(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, Tensor]:
    """Reads the tensors and checks that they belong to the manifest.

    Raises:
        CheckpointError: The file is missing, truncated or changed.
    """
    file = Path(path) / TENSORS
    try:
        if checksum(check_regular(file, CheckpointError)) != manifest.checksum:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({error.strerror})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None


def _unique_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors to store, and the keys of tensors that are stored under another key."""
    owners: dict[tuple[Any, ...], str] = {}
    tensors, shared = {}, {}
    for key, value in state.items():
        _check_storable(key, value)
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


def _check_storable(key: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise DyBitError(f"model has the extra state {key!r}, which is not a tensor and cannot be stored")
    if value.is_meta:
        raise DyBitError(f"model has {key!r} on the meta device, without values: bring it back to a real device first")
    if value.layout != torch.strided or value.is_quantized or value.dtype in (torch.complex32, torch.complex128):
        what = f"a {value.layout} tensor" if value.layout != torch.strided else f"of {value.dtype}"
        raise DyBitError(f"model has {key!r}, {what}, which safetensors cannot store")


def _check_architecture(manifest: Manifest, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Checks that every layer and pair of the manifest is in the model, and of the right kind."""
    modules = dict(model.named_modules())
    for name, entry in manifest.layers.items():
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"{path} does not fit the model: it has no layer {name!r}")
        names = weight_names(module)
        if not names or not set(entry.weights) <= set(names) or (entry.weights and set(entry.weights) != set(names)):
            kind = type(module).__name__
            raise CheckpointError(f"{path} does not fit the model: {name!r} was {entry.kind} and is {kind}")
    for name in manifest.attached:
        if name not in modules or is_attached(modules[name]):
            raise CheckpointError(f"{path} does not fit the model: it has no {name!r} to attach to")
    for conv, norm in manifest.folded:
        if not is_pair(modules.get(conv), modules.get(norm)):
            raise CheckpointError(f"{path} does not fit the model: it has no {conv!r} with batch norm {norm!r}")


def _check_keys(
    manifest: Manifest, tensors: Mapping[str, Tensor], model: nn.Module, path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Checks names, shapes and types of all tensors, and returns them all by key."""
    expected = model.state_dict()
    found = {**tensors, **{key: tensors.get(source) for key, source in manifest.shared.items()}}
    descriptions = {key: expected.pop(key) for key in expected.keys() - without_descriptions(expected).keys()}
    if not descriptions.keys() & tensors.keys():
        found |= descriptions  # earlier versions stored none
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
        # Tensors outside of quantized layers may be stored in another floating-point type than the fresh model has.
        free = wanted.is_floating_point() and tensor.is_floating_point() and not _is_ours(key, prefixes)
        if tensor.shape != wanted.shape or not (free or tensor.dtype == wanted.dtype):
            raise CheckpointError(
                f"{path} does not fit the model: {key!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {wanted.dtype} of shape {tuple(wanted.shape)}"
            )
        if key in descriptions:
            raise CheckpointError(f"{path} is damaged: {key!r} does not match {MANIFEST}")
    return cast(dict[str, Tensor], found)


def _agree(description: Tensor, wanted: Tensor) -> bool:
    """Whether two stored descriptions are equal, regardless of the order of their fields."""
    try:
        return Description.from_tensor(description) == Description.from_tensor(wanted)
    except DyBitError:
        return False


def _is_ours(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a key belongs to scales or inputs of a quantized layer, whose type is part of the format."""
    return key.startswith(prefixes) and key.endswith(("_scale", "_offset", "_choice"))


def _prepare_layer_(module: nn.Module, name: str, entry: LayerEntry, path: str | os.PathLike[str]) -> None:
    """Swaps a layer, with empty buffers to be filled."""
    make_plain_(module)
    for key, spec in entry.weights.items():
        weight = getattr(module, key)
        if nn.parameter.is_lazy(weight):
            raise CheckpointError(f"{path} does not fit the model: {name!r} is not initialized, run the model once")
        if tuple(weight.shape) != spec.shape:
            raise CheckpointError(
                f"{path} does not fit the model: {name}.{key} has shape {tuple(weight.shape)}, "
                f"the checkpoint {spec.shape}"
            )
    weights = {}
    for key, spec in entry.weights.items():
        buffers = {suffix: torch.empty(s, dtype=t, device="meta") for suffix, (s, t) in spec.buffers().items()}
        weights[key] = QuantizedTensor(
            spec, buffers[""], buffers["_scale"], buffers.get("_choice"), buffers.get("_tensor_scale")
        )
    scale, offset = (torch.empty(1, dtype=torch.float32, device="meta") for _ in range(2))
    swap_(module, weights, entry.input, scale, offset, entry.dtype)
    if entry.added_bias and module._parameters.get("bias") is None:
        set_bias_(
            cast(Quantized, module), torch.empty(entry.weights["weight"].rows, dtype=torch.float32, device="meta")
        )


def _empty_(module: nn.Module) -> None:
    """Replaces the tensors of a layer by empty ones, which the removal of norms and masks may write to."""
    parts = [module, *module.get_submodule("parametrizations").modules()] if parametrize.is_parametrized(module) else []
    for part in parts or [module]:
        for table in (part._parameters, part._buffers):
            for key, tensor in table.items():
                if tensor is None or nn.parameter.is_lazy(tensor) or key in part._non_persistent_buffers_set:
                    continue
                empty = torch.empty_like(tensor, device="meta")
                cast(Any, table)[key] = (
                    nn.Parameter(empty, requires_grad=tensor.requires_grad) if table is part._parameters else empty
                )


def _tie_(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Ties buffers again. Parameters are tied by the architecture, or were loaded as one tensor."""
    for key, source in shared.items():
        (owner, name), (first, first_name) = _holder(model, key), _holder(model, source)
        for table in ("_buffers", "_parameters"):
            if name in getattr(owner, table) and first_name in getattr(first, table):
                getattr(owner, table)[name] = getattr(first, table)[first_name]


def _holder(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    prefix, _, name = key.rpartition(".")
    return model.get_submodule(prefix), name
