"""``dybit info``: what a checkpoint says about itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from dybit.cli.console import guarded, out, size
from dybit.cli.layer_table import LayerRow, disk_bytes, print_layers, print_totals
from dybit.errors import CheckpointError

_SHOWN_LAYERS = 40


@guarded
def info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of dybit or of transformers.")],
    every: Annotated[bool, typer.Option("--all", help=f"Show all layers, not the first {_SHOWN_LAYERS}.")] = False,
) -> None:
    """Show recipe, layers, formats and sizes of a checkpoint.

    It needs no model.

    Example: dybit info minilm-w4a8
    """
    from dybit.layers.description import KEY
    from dybit.models.checkpoint import TENSORS, read
    from dybit.models.manifest import MANIFEST

    if not (path / MANIFEST).exists() and (path / "config.json").exists():
        _info_of_transformers(path)
        return
    manifest, stored = read(path)  # also checks the file against its checksum
    keys = {f"{layer}.{name}".lstrip(".") for layer, entry in manifest.layers.items() for name in entry.weights}
    missing = next((key for key in keys if key not in stored and key not in manifest.shared), None)
    if missing is not None:
        raise CheckpointError(f"{path / TENSORS} lacks the tensor {missing!r} that {MANIFEST} describes")
    console = out()
    console.print(f"{path}: written by dybit {manifest.version}, checksum correct", style="bold", soft_wrap=True)
    recipe = json.dumps(manifest.recipe.to_dict()) if manifest.recipe else "not stored"
    console.print(f"recipe: {recipe}", soft_wrap=True)
    rows, fp32 = [], 0
    ours: set[str] = set()
    for layer, entry in manifest.layers.items():
        for name, spec in entry.weights.items():
            key = f"{layer}.{name}".lstrip(".")
            tied = key in manifest.shared
            ours |= {key + suffix for suffix in spec.buffers()} | {f"{layer}.{KEY}".lstrip(".")}
            fp32 += 0 if tied else 4 * math.prod(spec.shape)
            rows.append(LayerRow(layer or "(model)" if name == "weight" else key, spec, entry.input, tied=tied))
        if not entry.weights:
            rows.append(LayerRow(layer, None, entry.input))
            ours.add(f"{layer}.{KEY}".lstrip("."))
    rest = {key: tensor for key, tensor in stored.items() if key not in ours}
    plain = sum(4 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes for tensor in rest.values())
    print_layers(rows, None if every else _SHOWN_LAYERS)
    other = size(sum(tensor.nbytes for tensor in rest.values()))
    console.print(
        f"{len(manifest.layers)} quantized layers, {len(rest)} other tensors ({other}), "
        f"{len(manifest.folded)} folded batch norms, {len(manifest.shared)} tied tensors",
        soft_wrap=True,
    )
    if manifest.coverage is not None:
        console.print(str(manifest.coverage), soft_wrap=True)
    print_totals(fp32 + plain, disk_bytes(path))


def _info_of_transformers(path: Path) -> None:
    """The same of a checkpoint of transformers, whose layers have their shapes in the model's code."""
    from dybit.integrations.config import METHOD, OWN, DyBitConfig, stored_layers
    from dybit.safe_files import checked, read_json

    file = path / "config.json"
    values = checked(read_json(file), str(file), dict).get(OWN)
    if not isinstance(values, dict) or values.get("quant_method") != METHOD:
        raise CheckpointError(f"{file} has no {OWN} of dybit, but {values!r:.100}")
    config = DyBitConfig.from_dict(values)
    if config.damaged:
        raise CheckpointError(f"{OWN} in {file} is damaged: its contents are not those that were saved")
    console = out()
    console.print(f"{path}: a checkpoint of transformers", style="bold", soft_wrap=True)
    console.print(f"recipe: {json.dumps(config.recipe.to_dict())}", soft_wrap=True)
    groups: dict[str, list[str]] = {}
    for name, weights, inputs in stored_layers(config):
        parts = (
            []
            if weights is None
            else [f"weights {weights['family']}/{weights['group_size'] or weights['granularity']}"]
        )
        parts += [] if inputs is None else [f"inputs {inputs.format}/{inputs.mode}"]
        groups.setdefault(", ".join(parts), []).append(name)
    for text, names in groups.items():
        console.print(f"{len(names)} layers such as {names[0]}: {text}", soft_wrap=True)
    if config.coverage is not None:
        console.print(str(config.coverage), soft_wrap=True)
    console.print(f"size on disk {size(disk_bytes(path))}", soft_wrap=True)
