"""``dybit demo``: the main job on real networks, from weights to pictures."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import compare, sources
from dybit.cli.console import Bar, grid, guarded, note, out, progress, size
from dybit.cli.evaluate import AGREEMENT, LEGEND, measures, quantized_copy, short_name
from dybit.cli.quantize import float_bytes
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dybit.measure.fidelity import Fidelity, Kind, Reference

_RECIPES = (Recipe(weights=8, activations=8), Recipe(weights=4, activations=8), Recipe(weights=4))
_PICTURED = ("dybit4spare", "dybit4plain", "s4", "nf4", "e2m1", "int4")
_PICTURED_WEIGHTS = 1_500_000
_LEAST_COLUMNS = 16  # a depthwise channel of nine weights with a scale of its own says little about a format
_POOR = 0.8  # an agreement below it is worth a word


@dataclass(frozen=True)
class _Subject:
    """A network of the demo.

    Attributes:
        title: For people.
        batches: Function of :mod:`dybit.demo` that gives its data.
        inputs: What an input is.
        limit: Batches to use.
        recipes: What to try.
    """

    title: str
    batches: str
    inputs: str
    limit: int
    recipes: tuple[Recipe, ...] = _RECIPES


_SUBJECTS = {
    "minilm": _Subject("MiniLM-L6-v2 (sentence encoder)", "minilm_batches", "paragraphs", 8),
    "efficientnet_lite0": _Subject("EfficientNet-Lite0 (ImageNet classifier)", "image_batches", "crops", 8),
    "smollm2": _Subject(
        "SmolLM2-135M (language model, FP32 = dequantized Q4_1)", "smollm2_batches", "tokens", 3, _RECIPES[2:]
    ),
}


@dataclass(frozen=True)
class _Outcome:
    """One recipe on one network."""

    name: str
    fidelity: Fidelity
    stored: int
    seconds: float
    same: bool


@guarded
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where pictures and models go.")] = Path(
        "demo-output"
    ),
    models: Annotated[
        str, typer.Option(help=f"Names separated by commas: {', '.join(_SUBJECTS)} (1 GB of memory, a few minutes).")
    ] = "minilm,efficientnet_lite0",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized checkpoints, too.")] = False,
) -> None:
    """Quantize real pretrained networks; print fidelity and size, draw the 4-bit levels over their weights.

    W8A8: weights and activations in 8 bits; W4A8: weights in 4; W4: 4-bit weights, activations as they are; embedding
    tables in 8 bits. Everything is rounded to the nearest, calibrated on other inputs than those it is judged by,
    saved, and loaded again before it is judged. SQNR of the outputs in dB, agreement in %, sizes in MB.

    Example: dybit demo --output demo-output --models minilm
    """
    names = [word.strip() for word in models.split(",") if word.strip()]
    unknown = [name for name in names if name not in _SUBJECTS]
    if unknown or not names:
        raise DyBitError(f"--models must be among {', '.join(_SUBJECTS)}, not {(unknown or [models])[0]!r}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DyBitError(f"--output {str(output)!r} cannot be made: {error.strerror}") from None
    begin = time.perf_counter()
    for name in dict.fromkeys(names):
        _show(name, _SUBJECTS[name], output, keep)
    out().print(f"Done in {time.perf_counter() - begin:.0f} s. Pictures: {output}{'/'}", soft_wrap=True)


def _show(name: str, subject: _Subject, folder: Path, keep: bool) -> None:
    """One network: the table, the notes, the picture."""
    from dybit.measure.fidelity import Reference

    with progress(f"loading {name}") as bar:
        model = sources.load_model(f"dybit.demo:{name}")
        load = {"limit": subject.limit, "model": name}
        data = sources.load_batches(f"dybit.demo:{subject.batches}", "data", split="calibration", **load)  # type: ignore[arg-type]
        inputs = sources.load_batches(f"dybit.demo:{subject.batches}", "data", split="evaluation", **load)  # type: ignore[arg-type]
        bar.start(f"{name}: FP32", len(inputs))
        with Reference(model, inputs, progress=bar.update) as reference:
            outcomes = [_run(name, model, recipe, data, reference, folder, keep, bar) for recipe in subject.recipes]
            kind, original = reference.kind, reference.fidelity
        fp32 = float_bytes(model.state_dict())
    _print(subject, original, outcomes, kind, fp32)
    _remark(subject, outcomes, kind)
    picture = folder / f"{name}-levels.png"
    _draw(picture, model, subject.title)
    out().print(f"picture: {picture}\n", soft_wrap=True)


def _run(
    name: str,
    model: nn.Module,
    recipe: Recipe,
    data: list[Any],
    reference: Reference,
    folder: Path,
    keep: bool,
    bar: Bar,
) -> _Outcome:
    """Quantizes, saves, loads into a fresh model, and judges what was loaded."""
    import dybit
    from dybit.models.preparation import dequantize_

    short = short_name(recipe)
    quantized, seconds = quantized_copy(model, recipe, data, bar, f"{name} {short}")
    path = dybit.save(quantized, folder / f"{name}-{short.lower()}")
    stored = sum(file.stat().st_size for file in path.iterdir())
    loaded = dybit.load(path, copy.deepcopy(model))
    same = _same(quantized, loaded, reference.batches[0])
    if not keep:
        shutil.rmtree(path)
    if recipe.activations is None:  # computes the same, without unpacking the weights for every batch
        dequantize_(loaded)
    bar.start(f"{name} {short}: judging", len(reference.batches))
    return _Outcome(short, reference.judge(loaded, bar.update), stored, seconds, same)


def _same(saved: nn.Module, loaded: nn.Module, batch: Any) -> bool:  # noqa: ANN401
    """Whether two models are equal bit for bit: all tensors, and the outputs for a batch."""
    import torch

    from dybit.models.running import run

    before, after = saved.state_dict(), loaded.state_dict()
    equal = before.keys() == after.keys() and all(_bits_equal(before[key], after[key]) for key in before)
    outputs = [next(iter(run(model, [batch])))[1] for model in (saved, loaded)]
    return equal and torch.equal(outputs[0], outputs[1])


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def _print(subject: _Subject, original: Fidelity, outcomes: list[_Outcome], kind: Kind, fp32: int) -> None:
    columns = ["", ">size", ">ratio", ">SQNR dB", AGREEMENT[kind], *([">KL nats"] if kind == "logits" else [])]
    language = original.perplexity is not None
    table = grid(*columns, ">Spearman", *([">PPL"] if language else []), ">s", "reloaded")
    rest = [f"{original.perplexity:.2f}"] if original.perplexity is not None else []
    table.add_row("FP32", size(fp32), "1.00", *measures(original, kind), *rest, "", "", style="dim")
    for item in outcomes:
        rest = [f"{item.fidelity.perplexity:.2f}"] if item.fidelity.perplexity is not None else []
        check = "equal" if item.same else "DIFFERENT"
        cells = [f"DyBit {item.name}", size(item.stored), f"{fp32 / item.stored:.2f}", *measures(item.fidelity, kind)]
        table.add_row(*cells, *rest, f"{item.seconds:.0f}", check)
    console = out()
    console.print(f"{subject.title}: {original.outputs:,} {subject.inputs}", style="bold", soft_wrap=True)
    console.print(table)
    console.print(f"{LEGEND[kind]}; size: on disk; reloaded: bit for bit", style="dim", soft_wrap=True)


def _remark(subject: _Subject, outcomes: list[_Outcome], kind: Kind) -> None:
    """Says what the figures do not show of themselves."""
    if any(not item.same for item in outcomes):
        note("note: a model that was loaded differs from the one that was saved; this is a defect of dybit")
    what = {"logits": "predictions", "embeddings": "nearest neighbours"}.get(kind, "outputs")
    poor = [item for item in outcomes if item.fidelity.agreement is not None and item.fidelity.agreement < _POOR]
    if poor:
        figures = ", ".join(f"{item.name} {item.fidelity.agreement:.0%}" for item in poor)
        note(
            f"note: rounding to the nearest keeps too few {what} of {subject.title.split(' (')[0]} at {figures}; "
            'quantize_(…, algorithm="auto") makes up for much of the error (docs/corrections.md)'
        )


def _draw(path: Path, model: nn.Module, title: str) -> None:
    """The 4-bit levels over a histogram of the network's weights, one scale per output channel."""
    from dybit.layers.kinds import is_embedding, layout, weight_names
    from dybit.tensors.quantized_tensor import TensorSpec

    matrices = []
    for module in model.modules():
        for name in () if is_embedding(module) else weight_names(module):
            weight = getattr(module, name).detach()
            matrix = TensorSpec("s4", tuple(weight.shape), **layout(module)).to_matrix(weight)
            if matrix.shape[1] >= _LEAST_COLUMNS:
                matrices.append(matrix)
    total = sum(matrix.numel() for matrix in matrices)
    every = max(1, round(total / _PICTURED_WEIGHTS))  # channels have scales of their own: some of them will do
    matrices = [matrix[::every] for matrix in matrices]
    from dybit.measure.format_ranking import Setting, measure

    setting = Setting("channel", None, "fp32", "mse")
    results = measure(matrices, [catalogue.family(name) for name in _PICTURED], setting, bits=4)
    share = "all" if every == 1 else f"1 in {every}"
    subtitle = f"{share} output channels of {len(matrices)} layers; one scale a channel; marks at its typical value"
    compare.draw(path, matrices, results, setting, f"4-bit levels on the weights of {title.split(' (')[0]}", subtitle)
