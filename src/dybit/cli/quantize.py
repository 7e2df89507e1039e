"""``dybit quantize``: a model or a file of weights to a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import options, sources
from dybit.cli.console import guarded, note, out, progress
from dybit.cli.layer_table import LayerRow, Watch, print_layers, print_totals
from dybit.errors import CheckpointError, DyBitError, MissingExtraError
from dybit.recipe import LayerRecipe, Recipe
from dybit.safe_files import check_regular

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dybit.layers.input_spec import InputSpec
    from dybit.models.coverage import Coverage
    from dybit.models.streaming import Job, Outcome, Stored, Text
    from dybit.tensors.quantized_tensor import TensorSpec

_WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# A file has no layers: that a table is one of embeddings can be told by its name only.
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|emb)([._]|$)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf")
_NOT_COPIED = ("config.json", "dybit.json", "journal")
_MOST_COPIED = 100_000_000  # bytes
_SHOWN_LAYERS = 40


@guarded
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers directory, module:function returning an nn.Module, or .safetensors[.index.json].",
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
    strict: options.Strict = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads, for a .safetensors; 0: one a processor.")] = 0,
    every: Annotated[bool, typer.Option("--all", help=f"Show all layers, not the first {_SHOWN_LAYERS}.")] = False,
) -> None:
    """Quantize a model and save it: DIR gets model.safetensors and dybit.json, complete or not at all.

    dybit.load(DIR, model) loads it into the same architecture; dybit evaluate compares it with the original.

    A .safetensors file (or .safetensors.index.json) is quantized piece by piece, however large; after an interruption,
    the same command goes on. In a transformers directory, DIR becomes one that from_pretrained loads. Elsewhere,
    tensors of 2 to 5 dimensions named *.weight are quantized (weights only; first dimension = output channels; names
    with "embed", "wte" or "wpe" count as embeddings), all others are copied.

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
    if not sources.is_reference(model) and model.endswith((".safetensors", ".safetensors.index.json")):
        if calibration is not None:
            raise DyBitError(f"--calibration {calibration!r} needs a model that can be run, not the file {model!r}")
        if chain not in (None, "auto", ("rtn",)):
            raise DyBitError(f"--algorithm {algorithm!r} needs a model that can be run, not the file {model!r}")
        rows, fp32 = _quantize_file(model, output, plan, strict, workers)
    elif not sources.is_reference(model) and Path(model).is_file():
        pickled = Path(model).suffix in _PICKLES[:6]
        what = "may be a pickle, which can run code when it is read" if pickled else "is none of these"
        raise CheckpointError(f"MODEL must be a model or safetensors file, but {model!r} {what}")
    else:
        needs_calibration(plan, calibration)
        loaded = sources.load_model(model)
        data = None
        if calibration is not None:
            data = sources.load_batches(calibration, "--calibration", split="calibration", limit=batches, model=model,
                                        tokenizer=tokenizer, batch_size=batch_size)  # fmt: skip
        rows, fp32 = _quantize_model(loaded, output, plan, data, chain, workdir, strict)
    print_layers(rows, None if every else _SHOWN_LAYERS)
    stored = sum(file.stat().st_size for file in output.iterdir())
    print_totals(fp32, stored)
    out().print(str(_coverage(output)), soft_wrap=True)
    out().print(f"saved to {output}; SQNR is that of each weight, unweighted", soft_wrap=True)
    if sources.is_reference(model):
        note(f"next: dybit evaluate {output} --model {model} --data module:function")
    else:
        note(f"next: dybit info {output}")


def _coverage(path: Path) -> Coverage | None:
    """What a checkpoint says about itself."""
    from dybit.models.checkpoint import read_manifest

    return read_manifest(path).coverage


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
    from dybit.models.checkpoint import replacing

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
    from dybit.models import streaming

    if recipe.criterion == "activation":
        raise DyBitError(f"--criterion activation needs a model that can be run, not the file {path!r}")
    if not check_regular(path).is_file():
        raise DyBitError(f"MODEL {path!r} does not exist")
    source = streaming.read_source(path)
    plan = _plan_transformers(Path(path), source, recipe) or _plan_names(path, source, recipe)
    if not plan.jobs:
        raise DyBitError("the recipe keeps every tensor in floating point")
    if strict:
        plan.coverage.check()
    with progress("quantizing") as bar:
        try:
            outcomes = streaming.quantize_files(
                source, plan.jobs, output, plan.entries, names=plan.names, shared=plan.shared, recipe=recipe,
                coverage=plan.coverage, extra=plan.extra, workers=workers, progress=bar.update,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on where this one stopped") from None
    sizes = (4 * math.prod(t.shape) if t.dtype in streaming.FLOATS else t.nbytes for t in source.values())
    specs = {plan.names.get(key, key): job.spec for key, job in plan.jobs.items()}
    return [_file_row(name, specs[name], outcome) for name, outcome in outcomes.items()], sum(sizes)


@dataclass
class _FilePlan:
    """What is to become of files of tensors; see :func:`dybit.models.streaming.quantize_files`."""

    coverage: Coverage
    jobs: dict[str, Job] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Text | Path] = field(default_factory=dict)

    def add(
        self, layer: str, kind: str, name: str, key: str, stored: Stored, job: Job, inputs: InputSpec | None
    ) -> None:
        """Adds a weight of a layer, or a part of it."""
        self.jobs[key] = job
        dtype = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored.dtype]
        entry = {"kind": kind, "dtype": dtype, "weights": {}, "input": inputs.to_dict() if inputs else None}
        weights = self.entries.setdefault(layer, entry)["weights"]
        weights[name] = job.spec.to_dict()


def _plan_transformers(path: Path, source: Mapping[str, Stored], recipe: Recipe) -> _FilePlan | None:
    """The plan where the file lies in a transformers directory; None where it does not, or without transformers."""
    from dybit.models.streaming import FLOATS, Job

    if not (path.parent / "config.json").is_file():
        return None
    try:
        from dybit.integrations.files import plan_files
    except MissingExtraError as error:
        note(f"note: {error}; the result will load with dybit.load only")
        return None
    found = plan_files(path.parent, [key for key, stored in source.items() if stored.dtype in FLOATS], recipe)
    plan = _FilePlan(found.coverage)
    for key, weight in found.weights.items():
        how = recipe.layer(weight.layer)
        if source[key].shape != weight.shape:
            raise CheckpointError(f"{path}: {key!r} has shape {source[key].shape}, config.json says {weight.shape}")
        method, percentile = (how.method, how.percentile) if how else (recipe.method, recipe.percentile)
        job = Job(weight.spec, method, percentile, weight.row)
        plan.add(weight.layer, weight.kind, weight.name, key, source[key], job, found.inputs[weight.layer])
    plan.names = found.names
    for name, key in found.tied.items():
        layer = name.rpartition(".")[0]
        plan.add(layer, "", name.rpartition(".")[2], key, source[key], plan.jobs[key], found.inputs[layer])
        kept = plan.names.get(key, key)
        plan.shared |= {name + suffix: kept + suffix for suffix in plan.jobs[key].spec.buffers()}
    plan.extra["config.json"] = found.config
    for file in sorted(path.parent.iterdir()):  # the tokenizer and what else belongs to the model
        weights = file.suffix in (".safetensors", *_PICKLES) or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in _NOT_COPIED and file.stat().st_size < _MOST_COPIED:
            plan.extra[file.name] = file
    return plan


def _plan_names(path: str, source: Mapping[str, Stored], recipe: Recipe) -> _FilePlan:
    """The plan for files that say nothing about the layers that their tensors belong to."""
    from dybit.models.plan import weight_spec
    from dybit.models.streaming import FLOATS, Job

    if recipe.activations is not None:
        raise DyBitError(f"--activations {recipe.activations} need a model that can be run, not the file {path!r}")
    layers: dict[str, list[str]] = {}
    for key, stored in source.items():
        layer, _, name = key.rpartition(".")
        if name in _WEIGHT_NAMES and stored.dtype in FLOATS and 2 <= len(stored.shape) <= 5 and stored.nbytes:
            layers.setdefault(layer, []).append(key)
    if not layers:
        raise DyBitError(f"MODEL {path!r} has no floating-point tensor of 2 to 5 dimensions named *.weight")
    recipe.check_names(layers, source)
    kept = {name for name in layers if _named_recipe(recipe, name).weight_family is None}
    plan = _FilePlan(_named_coverage(source, layers, recipe, kept))
    for layer, keys in layers.items():
        how = _named_recipe(recipe, layer)
        for key in keys if layer not in kept else ():
            job = Job(weight_spec(how, source[key].shape), how.method, how.percentile)
            plan.add(layer, "weight", key.rpartition(".")[2], key, source[key], job, None)
    return plan


def _named_recipe(recipe: Recipe, layer: str) -> LayerRecipe:
    """How a layer is quantized of which only the name is known."""
    return recipe.layer(layer, embedding=bool(_EMBEDDING.search(layer))) or LayerRecipe(weights=None)


def _named_coverage(
    source: Mapping[str, Stored], layers: Mapping[str, list[str]], recipe: Recipe, kept: Collection[str]
) -> Coverage:
    """How much of files is quantized that say nothing about the layers that their tensors belong to."""
    from dybit.models.coverage import Coverage, Left
    from dybit.models.streaming import FLOATS

    named = {key: layer for layer, keys in layers.items() for key in keys}
    quantized, left = 0, []
    for key, stored in source.items():
        count = math.prod(stored.shape)
        if key in named and named[key] not in kept:
            quantized += count
        elif key in named:
            left.append(Left(named[key], "weight", count, "the recipe keeps these weights", True))
        elif stored.dtype in FLOATS and sum(size > 1 for size in stored.shape) > 1 and "bias" not in key:
            rule = recipe.keeps(key)
            reason = "not named as a weight" if rule is None else f"rule {rule!r}"
            left.append(Left(key, "tensor", count, reason, rule is not None))
    return Coverage.of(quantized, left)


def _file_row(name: str, spec: TensorSpec, outcome: Outcome) -> LayerRow:
    books = spec.formats.books
    votes = sorted((outcome.votes or {0: 1}).items(), key=lambda item: -item[1])
    shares = tuple((books[index].name, count / sum(n for _, n in votes)) for index, count in votes)
    decibels = 10 * math.log10(outcome.signal / outcome.noise) if outcome.signal and outcome.noise else math.inf
    name = name.removesuffix(".weight") or name
    return LayerRow(name, spec, None, shares if outcome.whole else (), decibels if outcome.whole else None)
