"""``dybit quantize``: a model or a file of weights to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dybit.cli import options, sources
from dybit.cli.console import guarded, note, out, progress
from dybit.cli.layer_table import LayerRow, Watch, disk_bytes, print_layers, print_totals
from dybit.errors import CheckpointError, DyBitError, MissingExtraError
from dybit.recipe import Recipe
from dybit.safe_files import check_regular

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dybit.models.file_plan import FilePlan
    from dybit.models.streaming import Outcome
    from dybit.models.tensor_files import Stored
    from dybit.tensors.quantized_tensor import TensorSpec

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN_LAYERS = 40


_Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Calibration inputs: module:function, a text file, .npy/.safetensors, or auto: the model writes them "
        "(language models).",
    ),
]


@guarded
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers directory, module:function returning an nn.Module, or a .safetensors[.index.json].",
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
    calibration: _Calibration = None,
    algorithm: options.Algorithm = None,
    workdir: options.Workdir = None,
    tokenizer: options.Tokenizer = None,
    batches: options.Batches = None,
    batch_size: options.BatchSize = 16,
    strict: options.Strict = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads, for .safetensors files. 0 uses all processors.")] = 0,
    every: Annotated[bool, typer.Option("--all", help=f"Show all layers, not the first {_SHOWN_LAYERS}.")] = False,
) -> None:
    """Quantize a model and save it as a checkpoint.

    DIR gets model.safetensors and dybit.json, complete or not at all. Use dybit.load(DIR, model) to load it into the
    same architecture, and dybit evaluate to compare it with the original.

    A .safetensors file (or .safetensors.index.json) of any size is quantized piece by piece. After an interruption, run
    the same command again to resume. If a transformers config.json is beside the file, from_pretrained can load DIR.
    Otherwise tensors of 2 to 5 dimensions named *.weight are quantized (weights only; the first dimension is output
    channels; names with "embed", "wte" or "wpe" are embeddings), and all others are copied.

    Example: dybit quantize dybit.demo:minilm -o minilm-w4a8 --activations 8 --calibration dybit.demo:minilm_batches

    Example: dybit quantize dybit.demo:smollm2 -o smol --group-size 64 --algorithm auto --calibration auto
    """
    plan = options.make_recipe(recipe, **options.recipe_fields(locals()))
    check_target(output)
    chain = options.chain(algorithm, calibration is not None)
    if not sources.is_reference(model) and model.endswith((".safetensors", ".safetensors.index.json")):
        _check_needs_no_model(model, calibration, None if chain in (None, "auto", ("rtn",)) else algorithm)
        rows, fp32 = _quantize_file(model, output, plan, strict, workers)
    elif not sources.is_reference(model) and Path(model).is_file() and Path(model).suffix != ".py":
        pickled = Path(model).suffix in _PICKLES
        what = "may be a pickle, which can run code when it is read" if pickled else "is none of these"
        raise CheckpointError(f"MODEL must be a model or safetensors file, but {model!r} {what}")
    else:
        needs_calibration(plan, calibration)
        loaded = sources.load_model(model)
        data: list[object] | str | None = calibration
        if calibration is not None and calibration != "auto":
            data = sources.load_batches(calibration, "--calibration", split="calibration", limit=batches, model=model,
                                        tokenizer=tokenizer, batch_size=batch_size)  # fmt: skip
        rows, fp32 = _quantize_model(loaded, output, plan, data, chain, workdir, strict)
    _print(rows, fp32, output, None if every else _SHOWN_LAYERS)
    if sources.is_reference(model):
        inputs = calibration if sources.takes_split(calibration) else "module:function"
        note(f"next: dybit evaluate {output} --model {model} --data {inputs}")
    else:
        note(f"next: dybit info {output}")


def _print(rows: list[LayerRow], fp32: int, output: Path, limit: int | None) -> None:
    """Prints the layers, the sizes and what stayed in floating point."""
    from dybit.models.manifest import read_manifest

    print_layers(rows, limit)
    print_totals(fp32, disk_bytes(output))
    out().print(str(read_manifest(output).coverage), soft_wrap=True)
    out().print(f"saved to {output}; SQNR compares each weight with its original", soft_wrap=True)


def _check_needs_no_model(path: str, calibration: str | None, algorithm: str | None) -> None:
    for option, value in (("calibration", calibration), ("algorithm", algorithm)):
        if value is not None:
            raise DyBitError(f"--{option} {value!r} needs a model that can be run, not the file {path!r}")


def needs_calibration(recipe: Recipe, calibration: str | None) -> None:
    """Checks, before a model is loaded, that static activations have calibration data.

    Raises:
        DyBitError: They have not.
    """
    if recipe.has_static_inputs and calibration is None:
        raise DyBitError(
            f"--activations {recipe.activations} are static and need --calibration; or use --activation-mode dynamic"
        )


def check_target(path: Path) -> None:
    """Checks, before any work, that a checkpoint can be written.

    Raises:
        DyBitError: The path is something else than a checkpoint, or cannot be written.
    """
    from dybit.models.manifest import MANIFEST
    from dybit.safe_files import replacing

    class _Probe(Exception):
        pass

    try:
        with replacing(path, MANIFEST):
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
    data: list[object] | str | None,
    chain: str | tuple[str, ...] | None,
    workdir: Path | None,
    strict: bool,
) -> tuple[list[LayerRow], int]:
    import dybit

    fp32 = float_bytes(model.state_dict())
    with progress("quantizing") as bar:
        watch = Watch(model, bar)
        dybit.quantize_(
            model, recipe, calibration=data, algorithm=chain, workdir=workdir, strict=strict, progress=watch
        )
    dybit.save(model, output, recipe)
    return watch.rows, fp32


def _quantize_file(path: str, output: Path, recipe: Recipe, strict: bool, workers: int) -> tuple[list[LayerRow], int]:
    """Quantizes the weights in safetensors files piece by piece, as ``config.json`` beside them or their names say."""
    from dybit.models.streaming import quantize_files
    from dybit.models.tensor_files import FLOATS, read_source

    if recipe.criterion == "activation":
        raise DyBitError(f"--criterion activation needs a model that can be run, not the file {path!r}")
    if not check_regular(path).is_file():
        raise DyBitError(f"MODEL {path!r} does not exist")
    source = read_source(path)
    plan = _plan(path, source, recipe)
    if not plan.jobs:
        raise DyBitError("the recipe keeps every tensor in floating point")
    if strict:
        plan.coverage.check()
    with progress("quantizing") as bar:
        try:
            outcomes = quantize_files(
                source, plan.jobs, output, plan.entries, names=plan.names, shared=plan.shared, recipe=recipe,
                coverage=plan.coverage, extra=plan.extra, workers=workers, progress=bar.update,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; run the same command again to resume") from None
    sizes = (4 * math.prod(t.shape) if t.dtype in FLOATS else t.nbytes for t in source.values())
    specs = {plan.names.get(key, key): job.spec for key, job in plan.jobs.items()}
    return [_file_row(name, specs[name], outcome) for name, outcome in outcomes.items()], sum(sizes)


def _plan(path: str, source: Mapping[str, Stored], recipe: Recipe) -> FilePlan:
    """The plan by ``config.json`` beside the file, or by the names of the tensors."""
    from dybit.models.file_plan import plan_names

    if (Path(path).parent / "config.json").is_file():
        try:
            from dybit.integrations.files import plan_directory

            return plan_directory(Path(path).parent, source, recipe)
        except MissingExtraError as error:
            note(f"note: {error}; the result will load with dybit.load only")
    if recipe.activations is not None:
        raise DyBitError(f"--activations {recipe.activations} need a model that can be run, not the file {path!r}")
    return plan_names(path, source, recipe)


def _file_row(name: str, spec: TensorSpec, outcome: Outcome) -> LayerRow:
    books = spec.formats.books
    votes = sorted((outcome.votes or {0: 1}).items(), key=lambda item: -item[1])
    shares = tuple((books[index].name, count / sum(n for _, n in votes)) for index, count in votes)
    decibels = 10 * math.log10(outcome.signal / outcome.noise) if outcome.signal and outcome.noise else math.inf
    name = name.removesuffix(".weight") or name
    return LayerRow(name, spec, None, shares if outcome.whole else (), decibels if outcome.whole else None)
