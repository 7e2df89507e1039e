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
from transformers.integrations.accelerate import get_device, offload_weight

from dybit.errors import CheckpointError, DyBitError, DyBitWarning
from dybit.integrations.config import checksum_rest
from dybit.layers.description import without_descriptions
from dybit.layers.input_spec import InputSpec
from dybit.layers.offloading import held_tensor, is_offloaded, offloading_hooks, read_by_accelerate
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
    original: type[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        """Notes the class, which is another one while weights are hidden."""
        self.original = type(self.module)


def hide_weight_(layer: LoadingLayer, weight: str, parts: Mapping[str, Tensor]) -> None:
    """Puts codes in the place of a weight, behind one without values: transformers initializes what a file lacks."""
    module = layer.module
    shown = cast(Any, module._parameters.pop(weight)).detach()
    shown._is_hf_initialized = True
    module._buffers.update({weight + suffix: part for suffix, part in parts.items()})

    def show(module: nn.Module) -> Tensor | None:
        return module._buffers.get(weight) if read_by_accelerate(depth=0) else shown

    module.__class__ = type(type(module).__name__, (type(module),), {weight: property(show)})


def expect_codes_(layer: LoadingLayer, own: list[str]) -> None:
    """Prepares a layer for stored codes: as empty buffers for the loader."""
    for weight, spec in layer.specs.items():
        table = spec.buffers() if weight in own else {}
        hide_weight_(
            layer, weight, {key: torch.empty(shape, dtype=t, device="meta") for key, (shape, t) in table.items()}
        )
    if layer.input is not None and layer.input.mode == "static":
        for key in ("input_scale", *(["input_offset"] if layer.input.offset else [])):
            layer.module._buffers[key] = torch.empty(1, dtype=torch.float32, device="meta")


def check_codes_(name: str, layer: LoadingLayer, folder: str) -> dict[str, QuantizedTensor]:
    """Checks and returns the codes that the loader put into a layer (on meta if offloaded). Restores its class."""
    module = layer.module
    module.__class__ = layer.original
    for key in ("input_scale", "input_offset"):
        if key in module._buffers:
            check_part(folder, name, module, key, (1,), torch.float32)
    codes = {}
    for weight, spec in layer.specs.items():
        if weight not in module._buffers:
            continue  # tied to another
        parts: dict[str, Any] = {}
        held = []
        for suffix, (shape, dtype) in spec.buffers().items():
            if weight not in layer.codes:
                held.append(check_part(folder, name, module, weight + suffix, shape, dtype))
            parts[suffix] = module._buffers[weight + suffix]
        codes[weight] = QuantizedTensor(
            spec, parts[""], parts["_scale"], parts.get("_choice"), parts.get("_tensor_scale")
        )
        if layer.checksums.get(weight, "") not in ("", crc32(held)):
            raise CheckpointError(f"{folder} is damaged: the codes of '{name}.{weight}' are not those that were saved")
    return codes


def restore_(layer: LoadingLayer, arrived: Mapping[str, QuantizedTensor]) -> None:
    """Restores values of weights in a layer of which the file has only some weights."""
    for weight in arrived:
        codes = layer.codes[weight]
        for suffix in codes.buffers():
            del layer.module._buffers[weight + suffix]
        layer.module.register_parameter(weight, nn.Parameter(codes.dequantize(layer.dtype)))


def in_memory(module: nn.Module, weight: str, codes: QuantizedTensor) -> QuantizedTensor:
    """Returns the codes of a layer; offloaded codes as they are kept between calls."""
    held = {suffix: held_tensor(module, weight + suffix) for suffix in codes.buffers()}
    return QuantizedTensor(codes.spec, held[""], held["_scale"], held.get("_choice"), held.get("_tensor_scale"))


def offload_(model: Any, name: str, layer: LoadingLayer) -> None:  # noqa: ANN401
    """Stores codes that were made while loading with the weights of an offloaded layer.

    Raises:
        DyBitError: They belong on disk, and no folder was given.
    """
    for hook in offloading_hooks(layer.module) if is_offloaded(layer.module) else ():
        loader = hook.weights_map.dataset
        for weight, codes in layer.codes.items():
            for suffix, part in codes.buffers().items():
                key = f"{name}.{weight}{suffix}"
                if get_device(model.hf_device_map, key) != "disk":
                    loader.state_dict[key] = part
                elif loader.save_folder is None:
                    raise DyBitError("offload_folder must be given: codes that are made while loading are kept there")
                else:
                    offload_weight(part, key, loader.save_folder, loader.index)
                loader.all_keys.append(key)


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
    """Returns the stored tensors of a model other than codes and scales, unless only parts are in memory."""
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


def check_part(
    folder: str, layer: str, module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Returns a buffer that the loader brought, after checking its shape and type; an offloaded one is read."""
    part = held_tensor(module, name)
    moved = any(offloading_hooks(module))  # by accelerate, which makes other tensors
    if part.is_meta or not (moved or getattr(part, "_is_hf_initialized", False)):
        raise CheckpointError(f"{folder} lacks '{layer}.{name}'")
    if tuple(part.shape) != shape or part.dtype != dtype:
        raise CheckpointError(
            f"{folder} does not fit: '{layer}.{name}' is {part.dtype} of shape {tuple(part.shape)}, "
            f"expected {dtype} of shape {shape}"
        )
    return part
