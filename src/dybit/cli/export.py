"""``dybit export`` and ``dybit import``: between quantized models and the files of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import options, sources
from dybit.cli.console import guarded, note, out, progress, size
from dybit.cli.layer_table import Watch
from dybit.cli.quantize import check_target, float_bytes, needs_calibration
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from torch import nn

    from dybit.interchange import Imported
    from dybit.onnx import Exported

if TYPE_CHECKING:
    from torch import nn

    from dybit.interchange import Imported
    from dybit.onnx import Exported


_Target = Annotated[
    str, typer.Argument(metavar="DIR|MODEL", help="A dybit checkpoint (with --model), or a model to quantize.")
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The .onnx or .gguf file, or the directory for compressed-tensors."
    ),
]
_Calibration = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Inputs for calibration, tracing and the check, as in dybit quantize."),
]
_Preset = Annotated[
    str, typer.Option(help="ONNX: portable, fast-cpu or fp4. Other layouts: compressed-tensors or gguf.")
]
_Bound = Annotated[
    float | None,
    typer.Option(help="Largest accepted difference relative to the largest output. [depends on the preset]"),
]


@guarded
def export(
    target: _Target,
    output: _Output,
    calibration: _Calibration = None,
    preset: _Preset = "portable",
    bound: _Bound = None,
    model: Annotated[
        str | None, typer.Option(help="FP32 original of a checkpoint, as MODEL in dybit quantize.")
    ] = None,
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
    tokenizer: options.Tokenizer = None,
    batches: options.Batches = None,
    batch_size: options.BatchSize = 16,
) -> None:
    """Export a quantized model to ONNX, compressed-tensors or GGUF.

    ONNX needs the extra dybit[onnx]. FILE is written only if ONNX's checker accepts it and the outputs of ONNX Runtime
    are within the bound of the model's. Presets: portable stores packed codes and a table, and is exact in every
    runtime; fast-cpu uses ONNX Runtime's integer products; fp4 stores weights in s4r2 as FLOAT4E2M1, for runtimes that
    support it; compressed-tensors (MXFP4 or NVFP4 linear layers) and gguf (MXFP4) take weights in s4r2 with block
    scales.

    Example: dybit export dybit.demo:minilm -o minilm.onnx --weights 4 --calibration dybit.demo:minilm_batches
    """
    fields = options.recipe_fields(locals())
    import dybit.onnx

    _check_preset(preset, dybit.onnx.PRESETS, calibration)
    checkpoint = (Path(target) / "dybit.json").is_file()
    source = _source(target, model, {**fields, "recipe": recipe}) if checkpoint else target
    if not checkpoint and model is not None:
        raise DyBitError(f"--model {model!r} needs a checkpoint, but {target!r} is not one")
    plan = None if checkpoint else options.make_recipe(recipe, **fields)
    if plan is not None:
        needs_calibration(plan, calibration)
    network = sources.load_model(source, "--model" if checkpoint else "MODEL")
    float_size = float_bytes(network.state_dict())
    data = None
    if calibration is not None:
        data = sources.load_batches(calibration, "--calibration", split="calibration", limit=batches, model=source,
                                    tokenizer=tokenizer, batch_size=batch_size)  # fmt: skip
    with progress("loading" if plan is None else "quantizing") as bar:
        if plan is None:
            dybit.load(target, network)
        else:
            dybit.quantize_(network, plan, calibration=data, progress=Watch(network, bar, measure=False))
        if data is None or preset in _WRITERS:
            _WRITERS[preset](network, output)
            out().print(f"saved to {output}", soft_wrap=True)
            return
        bar.start("exporting and checking")
        done = dybit.onnx.export(network.eval(), output, data, preset=preset, bound=bound)
    _print(done, output, float_size)


def _check_preset(preset: str, onnx: Sequence[str], calibration: str | None) -> None:
    presets = (*onnx, *_WRITERS)
    if preset not in presets:
        raise DyBitError(f"--preset must be one of {', '.join(presets)}, not {preset!r}")
    if preset in onnx and calibration is None:
        raise DyBitError(f"--preset {preset} needs --calibration: inputs for tracing the model and checking the file")


def _print(done: Exported, output: Path, float_size: int) -> None:
    """Says what was written and how far the runtime's outputs are from the model's."""
    console = out()
    console.print(f"saved to {output}: {size(done.nbytes)}, {done.nbytes / float_size:.3f} of FP32", soft_wrap=True)
    console.print(f"inputs {', '.join(done.inputs)}", soft_wrap=True)
    console.print("weights " + ", ".join(f"{n} × {kind}" for kind, n in done.stored.items()), soft_wrap=True)
    check = done.check
    console.print(
        f"{check.runtime} against the model: largest difference {check.difference:.2g} of the largest output, "
        f"root mean square {check.error:.2g} of the outputs'",
        soft_wrap=True,
    )
    if "FLOAT4E2M1" in done.stored:
        note("note: ONNX Runtime's CPU provider does not compute FLOAT4E2M1; the file is for runtimes that do")


@guarded
def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="An .onnx or .gguf file, or a directory of compressed-tensors.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option(help="The architecture of the weights, as MODEL in dybit quantize."),
    ] = None,
) -> None:
    """Import quantized weights from ONNX, compressed-tensors or GGUF.

    Values stay exactly the same: DyBit with max_run=1 is an integer format, and with max_run=2 at 4 bits it is E2M1.
    From .onnx it imports weights in DequantizeLinear (INT2 to INT8) and MatMulNBits, from a directory of
    compressed-tensors MXFP4 and NVFP4, from .gguf MXFP4. It does not import the quantization of inputs. With --model,
    DIR is a checkpoint of that model; else it holds the weights by their names.

    Example: dybit import model-int8.onnx -o model-int8 --model yours:net
    """
    from dybit.models import checkpoint
    from dybit.models.manifest import MANIFEST
    from dybit.safe_files import replacing

    check_target(output)
    network = sources.load_model(model, "--model") if model is not None else None
    found = _read(file)
    tensors = dict(found.tensors)
    if network is not None:
        wanted = network.state_dict()
        unknown = [name for name in found.weights if name not in wanted]
        if unknown:
            raise DyBitError(f"--model {model!r} has no weight {unknown[0]!r}, which {file!r} has")
        tensors = {name: tensor for name, tensor in tensors.items() if name in wanted}
    entries = {}
    for name, weight in found.weights.items():
        tensors.update({name + suffix: buffer for suffix, buffer in weight.buffers().items()})
        layer, _, key = name.rpartition(".")
        entries[layer] = {"kind": "weight", "dtype": "float32", "weights": {key: weight.spec.to_dict()}, "input": None}
    if network is not None:
        tensors = {**{k: v for k, v in network.state_dict().items() if k not in found.weights}, **tensors}
    with replacing(output, MANIFEST) as folder:
        part = folder / "checked"
        checkpoint.write(part, tensors, entries, recipe=found.recipe)
        if network is not None:
            checkpoint.load(part, network)
        for item in part.iterdir():
            item.rename(folder / item.name)
        part.rmdir()
    formats = sorted({weight.spec.family for weight in found.weights.values()})
    out().print(f"saved to {output}: {len(found.weights)} weights as {', '.join(formats)}", soft_wrap=True)
    if found.inputs:
        note(f"note: the file also quantizes {found.inputs} activations; these were not imported")
    note(f"next: dybit info {output}")


def _read(file: str) -> Imported:
    from dybit import interchange
    from dybit import onnx as dybit_onnx

    if Path(file).is_dir():
        return interchange.read_compressed(file)
    return interchange.read_gguf(file) if file.endswith(".gguf") else dybit_onnx.read(file)


def _to_compressed(model: nn.Module, path: Path) -> None:
    from dybit.interchange import save_compressed

    save_compressed(model, path)


def _to_gguf(model: nn.Module, path: Path) -> None:
    """Under the names of the model itself: those of llama.cpp's architectures are its own."""
    from dybit.interchange import write_gguf
    from dybit.layers.quantized import quantized_layers

    weights = {
        f"{name}.{key}".lstrip("."): layer.quantized_tensor(key)
        for name, layer in quantized_layers(model).items()
        for key in layer.weight_specs
    }
    stored = {key + suffix for key, weight in weights.items() for suffix in weight.spec.buffers()}
    others = {key: tensor for key, tensor in model.state_dict().items() if key not in stored}
    write_gguf(path, weights, {key: tensor for key, tensor in others.items() if tensor.is_floating_point()})


_WRITERS = {"compressed-tensors": _to_compressed, "gguf": _to_gguf}


def _source(target: str, model: str | None, fields: dict[str, Any]) -> str:
    """The original of a checkpoint, if nothing else was said that does not go with one."""
    given = [name for name, value in fields.items() if value is not None]
    if given:
        raise DyBitError(f"--{given[0].replace('_', '-')} cannot be used with {target!r}, which is already quantized")
    if model is None:
        raise DyBitError(f"{target!r} is a checkpoint: name its floating-point original by --model")
    return model
