"""Layers of a transformers model that is being loaded, and the checks of what arrived."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dybit.errors import CheckpointError, DyBitWarning
from dybit.integrations.config import (
    checksum_rest,
)
from dybit.layers.description import without_descriptions
from dybit.layers.input_spec import InputSpec
from dybit.layers.quantized import quantized_layers
from dybit.recipe import LayerRecipe
from dybit.safe_files import crc32, label, read_json
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec


@dataclass
class LoadingLayer:
    """A layer of a model that is being loaded."""

    module: nn.Module
    specs: dict[str, TensorSpec]
    input: InputSpec | None
    dtype: torch.dtype
    recipe: LayerRecipe | None = None  # None for stored codes
    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)  # by weight, of stored codes


def await_(layer: LoadingLayer, own: list[str]) -> None:
    """Prepares a layer for stored codes: as empty buffers for the loader, behind a weight of the right shape."""
    module, shown = layer.module, {}
    for weight, spec in layer.specs.items():
        shown[weight] = cast(Any, module._parameters.pop(weight)).detach()
        shown[weight]._is_hf_initialized = True
        for suffix, (shape, dtype) in spec.buffers().items() if weight in own else ():
            module._buffers[weight + suffix] = torch.empty(shape, dtype=dtype, device="meta")
    if layer.input is not None and layer.input.mode == "static":
        for key in ("input_scale", *(["input_offset"] if layer.input.offset else [])):
            module._buffers[key] = torch.empty(1, dtype=torch.float32, device="meta")

    def show(tensor: Tensor) -> property:
        return property(lambda _: tensor)

    members = {weight: show(tensor) for weight, tensor in shown.items()}
    module.__class__ = type(type(module).__name__, (type(module),), members)


def arrived_(name: str, layer: LoadingLayer, folder: str) -> dict[str, QuantizedTensor]:
    """What the loader put into a layer that :func:`await_` prepared, checked; the layer is as it was before."""
    module = layer.module
    module.__class__ = type(module).__mro__[1]
    for key in ("input_scale", "input_offset"):
        if key in module._buffers:
            check_part(folder, f"{name}.{key}", module._buffers[key], (1,), torch.float32)
    codes = {}
    for weight, spec in layer.specs.items():
        if weight not in module._buffers:
            continue  # tied to another
        parts: dict[str, Any] = {}
        for suffix, (shape, dtype) in spec.buffers().items():
            parts[suffix] = module._buffers.pop(weight + suffix)
            check_part(folder, f"{name}.{weight}{suffix}", parts[suffix], shape, dtype)
        codes[weight] = QuantizedTensor(
            spec, parts[""], parts["_scale"], parts.get("_choice"), parts.get("_tensor_scale")
        )
        if layer.checksums.get(weight, "") not in ("", crc32(parts.values())):
            raise CheckpointError(f"{folder} is damaged: the codes of '{name}.{weight}' are not those that were saved")
    return codes


def check_headers(files: Iterable[Path]) -> set[str]:
    """Checks files before transformers opens them, whose error does not say which one it is; returns their keys."""
    keys: set[str] = set()
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    keys.update(opened.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
    return keys


def check_rest(files: Iterable[Path], known: str | None) -> None:
    """Warns of a ``config.json`` that is not the one that was saved: people do edit it."""
    path = next((file.with_name("config.json") for file in files), None)
    if known is not None and path is not None and path.is_file() and checksum_rest(read_json(path)) != known:
        message = f"{path} is not what was saved: it was edited, or is damaged"
        warnings.warn(message, DyBitWarning, stacklevel=2)


def plain_tensors(model: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """What is stored of a model beside codes and their scales, where it is at hand as a whole."""
    kept = set(model._keys_to_ignore_on_save or ())
    for name, layer in quantized_layers(model).items():
        kept |= {f"{name}.{key}{suffix}" for key, spec in layer.weight_specs.items() for suffix in spec.buffers()}
    state = {name: tensor for name, tensor in without_descriptions(model.state_dict()).items() if name not in kept}
    return {name: tensor for name, tensor in state.items() if type(tensor) is Tensor and not tensor.is_meta}


def check_plain(folder: str, model: Any, checksums: Mapping[str, str]) -> None:  # noqa: ANN401
    """Checks what lies beside the codes, as far as the model has it in the type and shape in which it was stored."""
    tensors, prefix = plain_tensors(model), f"{model.base_model_prefix}."
    for name, known in checksums.items():
        near = (other for other in (name, prefix + name, name.removeprefix(prefix)) if other in tensors)
        tensor = tensors.get(next(near, ""))
        found = known if tensor is None else label(tensor.dtype, tensor.shape, [tensor])
        if found != known and found.partition(":")[0] == known.partition(":")[0]:
            raise CheckpointError(f"{folder} is damaged: {name!r} is not what was saved")


def same_codes(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether two weights have the same codes, scales and choices."""
    return all(torch.equal(a, b) for a, b in zip(one.buffers().values(), other.buffers().values(), strict=True))


def check_part(folder: str, key: str, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Checks that the loader brought a buffer of a layer, in its shape and type."""
    if not getattr(part, "_is_hf_initialized", False) or part is None:
        raise CheckpointError(f"{folder} lacks {key!r}")
    if tuple(part.shape) != shape or part.dtype != dtype:
        raise CheckpointError(
            f"{folder} does not fit: {key!r} is {part.dtype} of shape {tuple(part.shape)}, "
            f"expected {dtype} of shape {shape}"
        )
