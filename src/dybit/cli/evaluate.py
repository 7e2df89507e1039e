"""``dybit evaluate``: how close quantized models come to their original on real inputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import options, sources
from dybit.cli.console import Bar, grid, guarded, note, out, progress, size
from dybit.cli.layer_table import Watch, disk_bytes
from dybit.cli.quantize import float_bytes
from dybit.errors import DyBitError
from dybit.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from dybit.measure.fidelity import Fidelity, Kind


AGREEMENT = {"logits": ">top-1", "embeddings": ">neighbours"}
_MEASURES = "SQNR of outputs against FP32; Spearman: rank correlation"
LEGEND = {
    "logits": f"{_MEASURES} of the logits; top-1: same largest logit; KL of predictions",
    "embeddings": f"{_MEASURES} of all similarities; neighbours: same nearest neighbour",
    "values": f"{_MEASURES} of each output",
}


@dataclass(frozen=True)
class Line:
    """A row of the result: a quantized model.

    Attributes:
        name: The format, the recipe or the checkpoint.
        fidelity: How close it is.
        stored: Bytes of its tensors; of a checkpoint, of its files.
        seconds: Time to quantize it; None for a checkpoint.
    """

    name: str
    fidelity: Fidelity
    stored: int
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """A model to be judged.

    Attributes:
        name: What it is called.
        recipe: How it is quantized; None for the original.
        chain: By which algorithms; None for the default.
    """

    name: str
    recipe: Recipe | None
    chain: str | tuple[str, ...] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether calibration is for its inputs or for an algorithm that was named."""
        if self.recipe is None:
            return False
        inputs = self.recipe.activations is not None and self.recipe.activation_mode != "dynamic"
        return inputs or (self.chain is not None and self.chain != ("rtn",))


_Target = Annotated[
    str, typer.Argument(metavar="DIR|MODEL", help="A dybit checkpoint (with --model), or a model to quantize.")
]
_Model = Annotated[str | None, typer.Option(help="FP32 original of a checkpoint, as MODEL in dybit quantize.")]
_Data = Annotated[str | None, typer.Option(metavar="DATA", help="Inputs: module:function, or .npy/.safetensors.")]
_Formats = Annotated[
    str | None, typer.Option(help="Weight formats, separated by commas, one row each. fp32 is the original.")
]
_Recipe = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A recipe in JSON. Repeat for several rows.")]
_Calibration = Annotated[str | None, typer.Option(metavar="DATA", help="Data to calibrate on, as in dybit quantize.")]


@guarded
def evaluate(
    target: _Target,
    model: _Model = None,
    data: _Data = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs of language models: a text file.")] = None,
    formats: _Formats = None,
    weights: options.Weights = None,
    activations: options.Activations = None,
    embeddings: options.Embeddings = None,
    keep_embeddings: options.KeepEmbeddings = False,
    group_size: options.GroupSize = None,
    granularity: options.Granularity = None,
    scale: options.Scale = None,
    variants: options.Variants = None,
    method: options.Method = None,
    criterion: options.Criterion = None,
    activation_mode: options.ActivationMode = None,
    recipe: _Recipe = None,
    calibration: _Calibration = None,
    algorithm: options.Algorithms = None,
    tokenizer: options.Tokenizer = None,
    split: Annotated[str, typer.Option(help="The split to request from the DATA function.")] = "evaluation",
    batches: options.Batches = None,
    batch_size: options.BatchSize = 16,
    outputs: Annotated[str, typer.Option(help="Kind of outputs: logits, embeddings, values, or auto.")] = "auto",
    fused: Annotated[
        bool, typer.Option("--fused", help="Fuse the quantized models: faster, as they would run.")
    ] = False,
) -> None:
    """Compare quantized models with FP32 on real inputs.

    It prints SQNR of the outputs in dB (higher is better); agreement in %, of the largest logit or, for embeddings, of
    the nearest neighbour; KL divergence in nats per output (lower is better); Spearman's rank correlation (1 is best);
    and perplexity of language models (lower is better). Without --calibration, activations are calibrated on the
    calibration split of DATA, if it has one, unless all their scales are dynamic.

    Example: dybit evaluate dybit.demo:minilm --data dybit.demo:minilm_batches --formats fp32,int4,nf4,dybit4spare
    """
    if (data is None) == (text is None):
        raise DyBitError("give the inputs by either --data or --text")
    kind = _kind(outputs)
    fields = options.recipe_fields(locals())
    checkpoint = (Path(target) / "dybit.json").is_file()
    chains = options.alternatives(algorithm or [])
    plans: list[Row] = []
    if checkpoint:
        _check_checkpoint(target, model, {**fields, "formats": formats, "recipe": recipe, "algorithm": algorithm})
    else:
        if model is not None:
            raise DyBitError(f"--model {model!r} needs a checkpoint, but {target!r} is not one")
        recipes = _plans(formats, recipe or [], fields)
        plans = _rows(recipes, chains, calibration is not None or (bool(chains) and sources.takes_split(data)))
    spec = data if data is not None else str(text)
    source = model if checkpoint and model else target
    if calibration is None and any(row.calibrated for row in plans):
        if sources.takes_split(data):
            calibration = data
            note(f"note: calibrating on the calibration split of {data}")
        elif any(row.recipe is not None and row.recipe.has_static_inputs for row in plans):
            raise DyBitError(f"--activations {fields['activations']} are static and need --calibration")
    original = sources.load_model(source, "--model" if checkpoint else "MODEL")
    loading: dict[str, Any] = {"model": source, "tokenizer": tokenizer, "batch_size": batch_size}
    inputs = sources.load_batches(spec, "--data" if data else "--text", split=split, limit=batches, **loading)
    prepared = None
    if calibration is not None and not checkpoint:
        prepared = sources.load_batches(calibration, "--calibration", split="calibration", **loading)
    judge = partial(_judge_checkpoint, target) if checkpoint else partial(_judge_plans, plans, prepared)
    lines, kind = judge(original, inputs, kind, fused)
    _print(lines, kind, float_bytes(original.state_dict()), f"{source} on {spec}, {len(inputs)} batches")


def _check_checkpoint(target: str, model: str | None, others: dict[str, Any]) -> None:
    """Refuses the options that do not go with a checkpoint."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise DyBitError(f"--{given[0].replace('_', '-')} cannot be used with {target!r}, which is already quantized")
    if model is None:
        raise DyBitError(f"{target!r} is a checkpoint: name its floating-point original by --model")


def _kind(word: str) -> Kind | None:
    if word == "auto":
        return None
    from typing import cast

    from dybit.measure.fidelity import KINDS

    if word not in KINDS:
        raise DyBitError(f"--outputs must be auto, {', '.join(KINDS)}, not {word!r}")
    return cast("Kind", word)


def _plans(formats: str | None, recipes: Sequence[Path], fields: dict[str, Any]) -> list[tuple[str, Recipe | None]]:
    """The name and recipe of every row; the original has none."""
    plans: list[tuple[str, Recipe | None]] = [(path.name, options.read_recipe(path)) for path in recipes]
    if formats is not None:
        if fields["weights"] is not None:
            raise DyBitError(f"--weights {fields['weights']} and --formats exclude each other")
        for word in (part.strip() for part in formats.split(",")):
            if word.lower() == "fp32":
                plans.append(("fp32", None))
            elif word:
                recipe = options.make_recipe(None, **{**fields, "weights": word})
                plans.append((word, recipe))
        if not plans:
            raise DyBitError(f"--formats must name at least one format, not {formats!r}")
    elif not recipes or any(value is not None for value in fields.values()):
        recipe = options.make_recipe(None, **fields)
        plans.append((short_name(recipe), recipe))
    return plans


def _rows(plans: Sequence[tuple[str, Recipe | None]], chains: Sequence[str], calibrated: bool) -> list[Row]:
    """Every recipe with every chain of algorithms; the original once."""
    read = [(word, options.chain(word, calibrated)) for word in chains] or [("", None)]
    rows = []
    for name, recipe in plans:
        if recipe is None:
            rows.append(Row(name, None))
        else:
            rows.extend(Row(f"{name} {word}".strip(), recipe, chain) for word, chain in read)
    return rows


def short_name(recipe: Recipe) -> str:
    """A recipe in a word: ``W4A8``, ``W4``, ``nf4 A8``."""
    weights = f"W{recipe.weights}" if isinstance(recipe.weights, int) else str(recipe.weights or "W32")
    if recipe.activations is None:
        return weights
    space = "" if isinstance(recipe.activations, int) and isinstance(recipe.weights, int) else " "
    return f"{weights}{space}A{recipe.activations}"


def _judge_checkpoint(
    path: str, original: nn.Module, inputs: list[Any], kind: Kind | None, fused: bool
) -> tuple[list[Line], Kind]:
    import dybit
    from dybit.measure.fidelity import Reference

    quantized = dybit.load(path, copy.deepcopy(original), fused=inputs[0] if fused else False)
    with progress("running the original", len(inputs)) as bar, Reference(original, inputs, kind, bar.update) as kept:
        bar.start("running the checkpoint", len(inputs))
        fidelity = kept.judge(quantized, bar.update)
        lines = [
            Line("fp32", kept.fidelity, float_bytes(original.state_dict())),
            Line(Path(path).name, fidelity, disk_bytes(Path(path))),
        ]
        return lines, kept.kind


def _judge_plans(
    plans: Sequence[Row], data: list[Any] | None, original: nn.Module, inputs: list[Any],
    kind: Kind | None, fused: bool,
) -> tuple[list[Line], Kind]:  # fmt: skip
    from dybit import fuse
    from dybit.measure.fidelity import Reference

    lines = []
    with progress("running the original", len(inputs)) as bar, Reference(original, inputs, kind, bar.update) as kept:
        for row in plans:
            name, recipe = row.name, row.recipe
            if recipe is None:
                lines.append(Line(name, kept.fidelity, float_bytes(original.state_dict()), 0.0))
                continue
            model, seconds = quantized_copy(original, recipe, data, bar, name, row.chain)
            stored = stored_bytes(model)
            if recipe.activations is None:  # the same results, bit for bit, without unpacking for every batch
                from dybit.models.preparation import dequantize_

                dequantize_(model)
            elif fused:
                model = fuse(model, inputs[0])
            bar.start(f"running {name}", len(inputs))
            try:
                lines.append(Line(name, kept.judge(model, bar.update), stored, seconds))
            except DyBitError as error:
                raise DyBitError(f"{name}: {error}") from None
        return lines, kept.kind


def quantized_copy(
    original: nn.Module,
    recipe: Recipe,
    data: list[Any] | None,
    bar: Bar | None,
    name: str,
    chain: str | Sequence[str] | None = None,
) -> tuple[nn.Module, float]:
    """Quantizes a copy of a model: the copy, and the seconds that it took.

    Args:
        original: The floating-point model, which is not changed.
        recipe: What to do.
        data: Calibration batches, or None; dropped where the recipe has no use for them.
        bar: Where to show the progress, or None.
        name: What the recipe is called.
        chain: The algorithms, or None for the default.
    """
    import dybit

    model = copy.deepcopy(original)
    if bar is not None:
        bar.start(f"quantizing {name}")
    start = time.perf_counter()
    dybit.quantize_(model, recipe, calibration=data, algorithm=chain, progress=Watch(model, bar, measure=False))
    return model, time.perf_counter() - start


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as a checkpoint holds them."""
    from dybit.layers.description import without_descriptions

    distinct = {(t.data_ptr(), tuple(t.shape)): t for t in without_descriptions(model.state_dict()).values()}
    return sum(tensor.nbytes for tensor in distinct.values())


def _print(lines: Sequence[Line], kind: Kind, fp32: int, title: str) -> None:
    """Prints one row for every model, with the measures that apply."""
    agree = AGREEMENT.get(kind)
    columns = ["weights", ">size", ">ratio", ">SQNR dB", *([agree] if agree else [])]
    if kind == "logits":
        columns.append(">KL nats")
    columns.append(">Spearman")
    timed = lines[-1].seconds is not None
    language = any(line.fidelity.perplexity is not None for line in lines)
    table = grid(*columns, *([">PPL"] if language else []), *([">s"] if timed else []))
    for line in lines:
        cells = [line.name, size(line.stored), f"{fp32 / line.stored:.2f}", *measures(line.fidelity, kind)]
        if language:
            cells.append(_number(line.fidelity.perplexity, ".2f"))
        if line.seconds is not None:
            cells.append(f"{line.seconds:.1f}")
        table.add_row(*cells, style="bold yellow" if "dybit" in line.name else "")
    console = out()
    console.print(f"{title}, {lines[0].fidelity.outputs:,} outputs", style="bold", soft_wrap=True)
    console.print(table)
    words = "size: of the tensors; s: seconds to quantize" if timed else "size: on disk, of FP32 of the tensors"
    console.print(f"{LEGEND[kind]}; {words}", style="dim", soft_wrap=True)


def measures(fidelity: Fidelity, kind: Kind) -> list[str]:
    """The cells of SQNR, agreement, KL and Spearman that apply to a kind of outputs."""
    cells = ["∞" if fidelity.sqnr == math.inf else f"{fidelity.sqnr:.2f}"]
    if kind != "values":
        cells.append("–" if fidelity.agreement is None else f"{100 * fidelity.agreement:.1f} %")
    if kind == "logits":
        cells.append(_number(fidelity.kl, ".4f"))
    return [*cells, _number(fidelity.spearman, ".4f")]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
