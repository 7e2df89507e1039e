"""Checkpoints of transformers quantized file by file, without loading the model: a plan for every tensor."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from dybit.errors import CheckpointError, DyBitWarning
from dybit.integrations.config import DyBitConfig, checksum_rest, describe
from dybit.integrations.transformers import DyBitQuantizer
from dybit.layers.input_spec import InputSpec
from dybit.models.coverage import Coverage, measure
from dybit.models.file_plan import FilePlan
from dybit.models.streaming import Job
from dybit.models.tensor_files import FLOATS, Stored
from dybit.recipe import Recipe
from dybit.safe_files import read_json
from dybit.tensors.quantized_tensor import TensorSpec

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf"
)  # fmt: skip
_NOT_COPIED = ("config.json", "dybit.json", "journal")
_MOST_COPIED = 100_000_000  # bytes


class FileWeight(NamedTuple):
    """A tensor in a file that is a weight, or rows of one.

    Attributes:
        layer: The layer.
        kind: Its class.
        name: Of the weight in the layer.
        spec: How the weight is stored.
        row: The first row of the tensor in the weight.
        shape: The shape that the tensor must have.
    """

    layer: str
    kind: str
    name: str
    spec: TensorSpec
    row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DirectoryPlan:
    """The weights of a transformers checkpoint that is quantized without being loaded.

    Attributes:
        weights: By the keys in the file.
        names: From the keys in the file to other names, where the model has them.
        inputs: How inputs are rounded, by layer.
        tied: From names of weights that are not in the file to the keys that they are tied to.
        coverage: How much of the model is quantized.
        config: Makes the text of the new ``config.json`` of checksums (see ``quantize_files``).
    """

    weights: dict[str, FileWeight]
    names: dict[str, str]
    inputs: dict[str, InputSpec | None]
    tied: dict[str, str]
    coverage: Coverage
    config: Callable[[Mapping[str, str]], str]


def build_empty(folder: Path) -> Any:  # noqa: ANN401  # a PreTrainedModel
    """The model of a transformers directory without values.

    Raises:
        CheckpointError: ``config.json`` cannot be built by transformers, or is already quantized.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        text = read_json(folder / "config.json")
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        with torch.device("meta"):
            model = architecture.from_config(config) if architecture is transformers.AutoModel else architecture(config)
    except Exception as error:  # anything can be in a file
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{folder / 'config.json'} cannot be built by transformers: {reason:.300}") from None
    if text.get("quantization_config") is not None:
        raise CheckpointError(f"{folder / 'config.json'} is already quantized")
    return model


def plan_files(folder: Path, keys: Collection[str], recipe: Recipe) -> DirectoryPlan:
    """Finds what a recipe makes of the checkpoint in a directory, by building its model without values.

    Args:
        folder: Where ``config.json`` is.
        keys: The names of the floating-point tensors.
        recipe: The recipe; its activations are kept or dynamic.

    Raises:
        CheckpointError: ``config.json`` cannot be built by transformers, or is already quantized.
        DyBitError: As :func:`dybit.ptq.quantize.plan_layers`.
    """
    model = build_empty(folder)
    quantizer = DyBitQuantizer(DyBitConfig(recipe), pre_quantized=False)
    quantizer.plan(model)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}  # key in the file by the name in the model
    for key in keys:
        near = [key, prefix + key, key.removeprefix(prefix)]
        name = next((n for n in near if quantizer.param_needs_quantization(model, n)), None)
        if name is not None:
            found[name] = key
    plain = set(found.values())
    merged, names = _merged(model, quantizer, [key for key in keys if key not in plain])
    tied = {}
    for key in list(quantizer.ties):
        sources = [other for other in [key, *quantizer.tied_to(key)] if other in found]
        for other in [key, *quantizer.tied_to(key)] if len(sources) == 1 else []:
            if other not in found:
                tied[other] = sources[0]
    present = {*found, *merged, *tied}
    layers = {
        name: layer
        for name, layer in quantizer.loading.items()
        if all(f"{name}.{weight}" in present for weight in layer.specs)
    }
    weights = {}
    for name, parts in {**{name: [(key, 0)] for name, key in found.items()}, **merged}.items():
        module, weight = name.rpartition(".")[::2]
        if module not in layers:
            continue
        spec = layers[module].specs[weight]
        for index, (key, row) in enumerate(parts):
            following = parts[index + 1][1] if index + 1 < len(parts) else spec.rows
            shape = spec.shape if len(parts) == 1 else (following - row, spec.columns)
            weights[key] = FileWeight(module, type(layers[module].module).__name__, weight, spec, row, shape)
    names |= {key: f"{weight.layer}.{weight.name}" for key, weight in weights.items() if key not in plain}
    stored = describe((n, layer.specs, layer.input) for n, layer in layers.items())
    text = read_json(folder / "config.json")
    coverage = measure(model, recipe, [name for name, layer in layers.items() if layer.specs])
    converters = [conversion for conversion in get_model_conversion_mapping(model) if hasattr(conversion, "operations")]

    def config(checksums: Mapping[str, str]) -> str:
        own = {names.get(key, key): f"{weight.layer}.{weight.name}" for key, weight in weights.items()}
        # Others only where they come to the model as they are.
        kept = [name for name in checksums if name in own or not any(c.rename_source_key(name)[1] for c in converters)]
        known = {own.get(name, name): checksums[name] for name in kept} | {"config.json": checksum_rest(text)}
        new = DyBitConfig(recipe, layers=stored, tied=tied, checksums=known, coverage=coverage.to_dict())
        return json.dumps({**text, "quantization_config": new.to_dict()}, indent=2) + "\n"

    inputs = {name: layer.input for name, layer in layers.items()}
    return DirectoryPlan(weights, names, inputs, tied, coverage, config)


def plan_directory(folder: Path, source: Mapping[str, Stored], recipe: Recipe) -> FilePlan:
    """The plan for the files of a transformers directory, and the files beside them that belong to the model.

    Args:
        folder: Where ``config.json`` is.
        source: The tensors of the files.
        recipe: The recipe; its activations are kept or dynamic.

    Raises:
        CheckpointError: A tensor has another shape than ``config.json`` says, or as :func:`plan_files`.
        DyBitError: As :func:`plan_files`.
    """
    found = plan_files(folder, [key for key, stored in source.items() if stored.dtype in FLOATS], recipe)
    plan = FilePlan(found.coverage, names=found.names, extra={"config.json": found.config})
    for key, weight in found.weights.items():
        how = recipe.layer(weight.layer)
        if source[key].shape != weight.shape:
            raise CheckpointError(f"{folder}: {key!r} has shape {source[key].shape}, config.json says {weight.shape}")
        method, percentile = (how.method, how.percentile) if how else (recipe.method, recipe.percentile)
        job = Job(weight.spec, method, percentile, weight.row)
        plan.add(weight.layer, weight.kind, weight.name, key, source[key], job, found.inputs[weight.layer])
    for name, key in found.tied.items():
        layer, _, weight_name = name.rpartition(".")
        plan.add(layer, "", weight_name, key, source[key], plan.jobs[key], found.inputs[layer])
        kept = plan.names.get(key, key)
        plan.shared |= {name + suffix: kept + suffix for suffix in plan.jobs[key].spec.buffers()}
    for file in sorted(folder.iterdir()):  # such as the tokenizer
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in _NOT_COPIED and file.stat().st_size < _MOST_COPIED:
            plan.extra[file.name] = file
    return plan


def _merged(
    model: Any,  # noqa: ANN401
    quantizer: DyBitQuantizer,
    keys: Iterable[str],
) -> tuple[dict[str, list[tuple[str, int]]], dict[str, str]]:
    """Weights whose rows are in several tensors of the file, as transformers' table of conversions says.

    Returns:
        By the name of the weight: the tensors in the order of their rows, and their first rows; and the names that
        other tensors have in the model, where they differ and there is such a weight.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if not hasattr(conversion, "operations")]
    converters = [conversion for conversion in conversions if hasattr(conversion, "operations")]
    collected: dict[str, dict[str, list[str]]] = {}
    used: dict[str, Any] = {}
    names: dict[str, str] = {}
    known = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for key in keys:
        renamed = key
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        for converter in converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                renamed = key  # stays, unless it becomes a part
                if quantizer.param_needs_quantization(model, target):
                    collected.setdefault(target, {}).setdefault(pattern, []).append(key)
                    used[target] = converter
                break
        if renamed != key and renamed in known:
            names[key] = renamed
    merged = {}
    for name, by_pattern in collected.items():
        parts = _parts(used[name], by_pattern, model.get_parameter(name))
        if parts is None:
            layer = name.rpartition(".")[0]
            message = f"layer {layer!r} keeps floating point: its weights are made of tensors in an unknown way"
            warnings.warn(message, DyBitWarning, stacklevel=3)
        else:
            merged[name] = parts
    return merged, names if merged else {}


def _parts(converter: Any, by_pattern: Mapping[str, list[str]], weight: nn.Parameter) -> list[tuple[str, int]] | None:  # noqa: ANN401
    """The tensors that are stacked to a weight (experts, rows, columns), in order; None for other conversions."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    patterns = [pattern for pattern in converter.source_patterns if pattern in by_pattern]
    if weight.ndim != 3 or operations not in (
        [("MergeModulelist", 0)],
        [("MergeModulelist", 0), ("Concatenate", 1)],
    ):
        return None
    experts, rows = weight.shape[0], weight.shape[1] // len(patterns)
    by_expert = [sorted(by_pattern[pattern], key=_natural) for pattern in patterns]
    if any(len(found) != experts for found in by_expert):
        return None
    return [
        (by_expert[place][expert], expert * weight.shape[1] + place * rows)
        for expert in range(experts)
        for place in range(len(patterns))
    ]


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts numbers in a key by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", key)]
