"""Checkpoints in the layout of compressed-tensors, which vLLM and transformers read: MXFP4 and NVFP4 linear layers.

The package itself is not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dybit.errors import CheckpointError, DyBitError
from dybit.interchange.blocks import Blocks, from_blocks, to_blocks
from dybit.interchange.imported import Imported
from dybit.layers.description import without_descriptions
from dybit.layers.quantized import is_fused, quantized_layers
from dybit.safe_files import SHA256, check_digest, check_regular, digest, read_json, replacing

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FORMATS = {32: "mxfp4-pack-quantized", 16: "nvfp4-pack-quantized"}
_VERSION = "0.20.0"  # of compressed-tensors, whose layout this is


def save_compressed(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Saves a quantized model as compressed-tensors does: safetensors, and ``quantization_config`` in config.json.

    The metadata of the safetensors file has the SHA-256 of its tensors as ``dybit.sha256``.

    Args:
        model: Of which only ``nn.Linear`` layers are quantized, all weight-only in ``s4r2`` (or ``e2m1``) with
            ``group_size=32, scale="pow2"`` (MXFP4) or ``group_size=16, scale="e4m3"`` (NVFP4). A transformers model's
            own configuration is written too.
        path: The directory, which must not exist or be empty.

    Returns:
        The directory.

    Raises:
        DyBitError: The model is fused, a layer is quantized in another way, or the directory cannot be written.
    """
    if is_fused(model):
        raise DyBitError("model is fused; save the model that was passed to fuse")
    layers = quantized_layers(model)
    if not layers:
        raise DyBitError("model has no quantized layer; call quantize_ first")
    formats: dict[str, list[str]] = {}
    tensors = {key: value.detach() for key, value in without_descriptions(model.state_dict()).items()}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear) or layer.input_spec is not None or not layer.weight_specs:
            what = type(layer).__name__.removeprefix("Quantized")
            rounded = "" if layer.input_spec is None else " with rounded inputs"
            raise DyBitError(f"layer {name!r} is a {what}{rounded}; compressed-tensors takes weights of Linear layers")
        weight = layer.quantized_tensor()
        blocks = to_blocks(weight, f"{name}.weight".lstrip("."))
        key = f"{name}.weight".lstrip(".")
        for suffix in weight.spec.buffers():
            del tensors[key + suffix]
        tensors |= {f"{key}_packed": blocks.packed, f"{key}_scale": blocks.scale}
        if blocks.divisor is not None:
            tensors[f"{key}_global_scale"] = blocks.divisor
        formats.setdefault(_FORMATS[blocks.block], []).append(name)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config: Any = getattr(model, "config", None)
    base = config.to_dict() if hasattr(config, "to_dict") else {}
    return _write(Path(path), tensors, {**base, "quantization_config": _configuration(formats, kept)})


def read_compressed(path: str | os.PathLike[str]) -> Imported:
    """Reads the MXFP4 and NVFP4 weights of a directory in compressed-tensors' layout, value for value.

    Args:
        path: With config.json and model.safetensors, or its parts and their index.

    Raises:
        CheckpointError: A file is missing, damaged or no such checkpoint.
        DyBitError: The weights have another format, or do not fit their scales.
    """
    folder = Path(path)
    try:
        config = read_json(folder / CONFIG)
        quantization = config["quantization_config"]
        if quantization["quant_method"] != "compressed-tensors":
            raise CheckpointError(f"{folder} has the quant_method {quantization['quant_method']!r:.100}")
        formats = {group.get("format") or quantization["format"] for group in quantization["config_groups"].values()}
        tensors: dict[str, Tensor] = {}
        for file in _files(folder):
            tensors |= _read(folder / file)
    except OSError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: cannot read {error.filename or CONFIG}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / CONFIG} is not a configuration of compressed-tensors: {error}") from None
    if not formats <= set(_FORMATS.values()):
        raise DyBitError(f"{folder} has the format {sorted(map(str, formats))[0]!r}; dybit reads MXFP4 and NVFP4")
    return _imported(tensors, folder)


def _imported(tensors: dict[str, Tensor], folder: Path) -> Imported:
    found = Imported()
    inputs = 0
    for key in sorted(tensors):
        if not key.endswith("weight_packed"):
            continue
        name = key.removesuffix("_packed")
        packed, scale = tensors.pop(key), tensors.pop(f"{name}_scale", None)
        divisor = tensors.pop(f"{name}_global_scale", None)
        if scale is None:
            raise CheckpointError(f"{folder} lacks '{name}_scale'")
        try:
            found.weights[name] = from_blocks(Blocks(packed, scale, divisor), name)
        except DyBitError as error:
            raise DyBitError(f"{folder}: {error}") from None
        tensors.pop(f"{name}_shape", None)
        inputs += tensors.pop(f"{name.removesuffix('weight')}input_global_scale", None) is not None
    if not found.weights:
        raise DyBitError(f"{folder} has no weight in MXFP4 or NVFP4")
    return Imported(found.weights, tensors, inputs)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which are those that were written if it says which those were."""
    with safe_open(check_regular(file, CheckpointError), framework="pt") as stored:
        known = (stored.metadata() or {}).get(SHA256)
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # no iterator
    check_digest(tensors, known, file)
    return tensors


def _files(folder: Path) -> list[str]:
    if (folder / TENSORS).exists() or not (folder / INDEX).exists():
        return [TENSORS]
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / INDEX} names a file outside its directory")
    return names


def _configuration(formats: Mapping[str, list[str]], kept: list[str]) -> dict[str, Any]:
    """``quantization_config``, its groups by format."""
    single = len(formats) == 1
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if single else names,
            "format": kind,
            "weights": _weights(kind),
            "input_activations": None,
            "output_activations": None,
        }
        for index, (kind, names) in enumerate(formats.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": next(iter(formats)) if single else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(kind: str) -> dict[str, Any]:
    mx = kind.startswith("mxfp4")
    scale = "torch.uint8" if mx else "torch.float8_e4m3fn"
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if mx else "tensor_group",
        "group_size": 32 if mx else 16,
        "scale_dtype": scale,
        "zp_dtype": scale,
    }


def _write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DyBitError(f"path {str(path)!r} exists and is not an empty directory; nothing was written")
    storages: dict[int, str] = {}
    contiguous = {}
    for key, value in tensors.items():  # tied tensors are written once each: the format has no ties
        pointer = value.untyped_storage().data_ptr()
        contiguous[key] = value.clone() if pointer in storages else value.contiguous()
        storages[pointer] = key
    with replacing(path, CONFIG) as folder:
        try:
            metadata = {"format": "pt", SHA256: digest(contiguous)}
            safetensors.torch.save_file(contiguous, folder / TENSORS, metadata=metadata)
            _order(folder / TENSORS, metadata)
        except SafetensorError as error:
            raise DyBitError(f"path {str(path)!r} cannot be written: {error}") from None
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return path


def _order(file: Path, metadata: Mapping[str, str]) -> None:
    """Puts the metadata of a safetensors file in order, which is left to chance: equal files get equal bytes."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        stream.seek(8)
        stream.write(text.ljust(size))
