"""``dybit quantize``: a model or a file of weights to a checkpoint.

Must not know how scales are chosen nor how a checkpoint is laid out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dybit.cli import options, sources
from dybit.cli.console import guarded, note, out, progress
from dybit.cli.layers import LayerRow, Watch, print_layers, print_totals, row
from dybit.errors import DyBitError
from dybit.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# A file has no layers: that a table is one of embeddings can be told by its name only.
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|emb)([._]|$)")
_SHOWN_LAYERS = 40


@guarded
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A transformers directory, module:function returning an nn.Module, or a .safetensors."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the checkpoint.")],
    weights: options.Weights = None,
    activations: options.Activations = None,
    embeddings: options.Embeddings = None,
    group_size: options.GroupSize = None,
    granularity: options.Granularity = None,
    scale: options.Scale = None,
    variants: options.Variants = None,
    method: options.Method = None,
    criterion: options.Criterion = None,
    activation_mode: options.ActivationMode = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in JSON, instead of the above.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="module:function, a text file, or .npy/.safetensors of inputs."),
    ] = None,
    algorithm: options.Algorithm = None,
    workdir: options.Workdir = None,
    tokenizer: options.Tokenizer = None,
    batches: options.Batches = None,
    batch_size: options.BatchSize = 16,
    every: Annotated[bool, typer.Option("--all", help=f"Show all layers, not the first {_SHOWN_LAYERS}.")] = False,
) -> None:
    """Quantize a model and save it: DIR gets model.safetensors and dybit.json, complete or not at all.

    dybit.load(DIR, model) loads it into the same architecture; dybit evaluate compares it with the original. Of a plain
    .safetensors file, tensors of 2 to 5 dimensions named *.weight are quantized (weights only; first dimension = output
    channels; names with "embed", "wte" or "wpe" count as embeddings), all others are copied.

    Example: dybit quantize dybit.demo:minilm -o minilm-w4a8 --activations 8 --calibration dybit.demo:minilm_batches

    Example: dybit quantize dybit.demo:smollm2 -o smol --algorithm gptq --calibration dybit.demo:smollm2_batches
    """
    plan = options.make_recipe(
        recipe,
        weights=weights,
        activations=activations,
        embeddings=embeddings,
        group_size=group_size,
        granularity=granularity,
        scale=scale,
        variants=variants,
        method=method,
        criterion=criterion,
        activation_mode=activation_mode,
    )
    check_target(output)
    chain = options.chain(algorithm, calibration is not None)
    if not sources.is_reference(model) and model.endswith(".safetensors"):
        if calibration is not None:
            raise DyBitError(f"--calibration {calibration!r} needs a model that can be run, not the file {model!r}")
        if chain not in (None, "auto", ("rtn",)):
            raise DyBitError(f"--algorithm {algorithm!r} needs a model that can be run, not the file {model!r}")
        rows, fp32 = _quantize_file(model, output, plan)
    else:
        needs_calibration(plan, calibration)
        loaded = sources.load_model(model)
        data = None
        if calibration is not None:
            data = sources.load_batches(calibration, "--calibration", split="calibration", limit=batches, model=model,
                                        tokenizer=tokenizer, batch_size=batch_size)  # fmt: skip
        rows, fp32 = _quantize_model(loaded, output, plan, data, chain, workdir)
    print_layers(rows, None if every else _SHOWN_LAYERS)
    stored = sum(file.stat().st_size for file in output.iterdir())
    print_totals(fp32, stored)
    out().print(f"saved to {output}; SQNR is that of each weight, unweighted", soft_wrap=True)
    if sources.is_reference(model):
        note(f"next: dybit evaluate {output} --model {model} --data module:function")
    else:
        note(f"next: dybit info {output}")


def needs_calibration(recipe: Recipe, calibration: str | None) -> None:
    """Checks, before a model is loaded, that static activations have calibration data.

    Raises:
        DyBitError: They have not.
    """
    if recipe.activations is not None and recipe.activation_mode == "static" and calibration is None:
        raise DyBitError(
            f"--activations {recipe.activations} are static and need --calibration; or give --activation-mode dynamic"
        )


def check_target(path: Path) -> None:
    """Checks, before any work, that a checkpoint can be written.

    Raises:
        DyBitError: The path is something else than a checkpoint, or cannot be written.
    """
    from dybit.checkpoint import replacing

    class _Probe(Exception):
        pass

    try:
        with replacing(path):
            raise _Probe
    except _Probe:
        pass
    except DyBitError as error:
        raise DyBitError(f"--output: {error}") from None


def float_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors in FP32, each distinct one counted once; integers as they are."""
    distinct = {(t.data_ptr(), tuple(t.shape)): t for t in tensors.values()}
    return sum(4 * t.numel() if t.is_floating_point() else t.nbytes for t in distinct.values())


def _quantize_model(
    model: nn.Module,
    output: Path,
    recipe: Recipe,
    data: list[object] | None,
    chain: str | tuple[str, ...] | None,
    workdir: Path | None,
) -> tuple[list[LayerRow], int]:
    import dybit

    fp32 = float_bytes(model.state_dict())
    with progress("quantizing") as bar:
        watch = Watch(model, bar)
        dybit.quantize_(model, recipe, calibration=data, algorithm=chain, workdir=workdir, progress=watch)
    dybit.save(model, output, recipe)
    return watch.rows, fp32


def _quantize_file(path: str, output: Path, recipe: Recipe) -> tuple[list[LayerRow], int]:
    """Quantizes the weights in a safetensors file, which says nothing about the layers that they belong to."""
    from dybit import checkpoint
    from dybit.tensor import TensorSpec, check_weight
    from dybit.tensor import quantize as quantize_tensor

    if recipe.activations is not None:
        raise DyBitError(f"--activations {recipe.activations} need a model that can be run, not the file {path!r}")
    if recipe.criterion == "activation":
        raise DyBitError(f"--criterion activation needs a model that can be run, not the file {path!r}")
    tensors = sources.read_safetensors(path, "MODEL")
    layers = _layers(tensors)
    if not layers:
        raise DyBitError(f"MODEL {path!r} has no floating-point tensor of 2 to 5 dimensions named *.weight")
    recipe.check_names(layers)
    fp32 = float_bytes(tensors)
    entries, rows = {}, []
    with progress("quantizing", len(layers)) as bar:
        for index, (layer, names) in enumerate(layers.items()):
            bar.update(index, text=layer)
            plan = recipe.layer(layer, embedding=bool(_EMBEDDING.search(layer)))
            family = plan.weight_family if plan else None
            if plan is None or family is None:
                continue
            specs = {}
            for name in names:
                key = f"{layer}.{name}".lstrip(".")
                original = tensors.pop(key)
                try:
                    check_weight(original)
                except DyBitError as error:
                    raise DyBitError(f"MODEL {path!r}, tensor {key!r}: {error}") from None
                spec = TensorSpec(
                    family.name,
                    tuple(original.shape),
                    plan.scale_granularity,
                    plan.group_size,
                    plan.scale_type,
                    plan.variant_granularity or plan.scale_granularity,
                )
                packed = quantize_tensor(original, spec, method=plan.method, percentile=plan.percentile)
                tensors.update({key + suffix: buffer for suffix, buffer in packed.buffers().items()})
                specs[name] = spec.to_dict()
                rows.append(row(layer if name == "weight" else key, packed, original, None))
            dtype = str(original.dtype).removeprefix("torch.")
            entries[layer] = {"kind": "weight", "dtype": dtype, "weights": specs, "input": None}
    if not entries:
        raise DyBitError("the recipe keeps every tensor in floating point")
    checkpoint.write(output, tensors, entries, recipe=recipe)
    return rows, fp32


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of weights by layer, for the tensors that can be quantized."""
    import torch

    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    layers: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if name in _WEIGHT_NAMES and tensor.dtype in types and 2 <= tensor.ndim <= 5:
            layers.setdefault(layer, []).append(name)
    return layers
