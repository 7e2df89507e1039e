"""``dybit demo``: real networks with narrow weights, as small, as close to FP32 and as fast as they get."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import compare, sources
from dybit.cli.console import Bar, grid, guarded, note, out, progress, size
from dybit.cli.evaluate import AGREEMENT, LEGEND, measures, quantized_copy
from dybit.cli.layer_table import disk_bytes
from dybit.cli.quantize import float_bytes
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dybit.measure.fidelity import Fidelity, Kind, Reference
    from dybit.measure.timing import Timing
    from dybit.report.bars import Network

_PICTURED = ("dybit4spare", "dybit4plain", "s4", "nf4", "e2m1", "int4")
_PICTURED_WEIGHTS = 1_500_000
_LEAST_COLUMNS = 16  # a depthwise channel of nine weights with a scale of its own says little about a format
_TIMING_SECONDS = 3.0
_NEXT = (
    "dybit quantize dybit.demo:minilm -o minilm-w4a8 --weights 4 --group-size 64 --activations 8 "
    "--calibration dybit.demo:minilm_batches --algorithm auto"
)


@dataclass(frozen=True)
class Trial:
    """A way to quantize a network.

    Attributes:
        name: A short name, such as ``W4A8``.
        recipe: The recipe.
        words: The recipe in words.
        algorithm: As for ``quantize_``.
    """

    name: str
    recipe: Recipe
    words: str
    algorithm: str = "auto"


@dataclass(frozen=True)
class Subject:
    """A network of the demo.

    Attributes:
        title: Its name.
        batches: Function of :mod:`dybit.demo` that gives its data.
        inputs: What an input is.
        calibration: Batches to calibrate on.
        evaluation: Batches to judge by.
        trials: What to do to it.
    """

    title: str
    batches: str
    inputs: str
    calibration: int
    evaluation: int
    trials: tuple[Trial, ...]


def _trials(narrow: Recipe, words: str, wide: Recipe, wide_words: str) -> tuple[Trial, ...]:
    return (
        Trial("W4A8, nearest", narrow, words, "rtn"),
        Trial("W8A8", wide, wide_words),
        Trial("W4A8", narrow, words),
    )


_EIGHT = {"weights": 8, "group_size": None}
_W4 = Recipe(weights=4, group_size=64)
SUBJECTS = {
    "minilm": Subject(
        "MiniLM-L6-v2 (sentence encoder)", "minilm_batches", "paragraphs", 8, 8,
        _trials(
            Recipe(weights=4, activations=8, group_size=64), "groups of 64 weights, INT8 inputs",
            Recipe(weights=8, activations=8), "a scale an output channel, INT8 inputs",
        ),
    ),
    "efficientnet_lite0": Subject(
        "EfficientNet-Lite0 (ImageNet classifier)", "imagenet_batches", "crops", 8, 8,
        _trials(
            Recipe(
                weights=4, activations=8, group_size=16,
                rules={"_conv_stem*": _EIGHT, "*_depthwise_conv*": _EIGHT, "_fc": _EIGHT},
            ),
            "groups of 16 weights, INT8 inputs; 8-bit weights in the first and depthwise convolutions and the head",
            Recipe(weights=8, activations=8), "a scale an output channel, INT8 inputs",
        ),
    ),
    "smollm2": Subject(
        "SmolLM2-135M (language model, FP32 = dequantized Q4_1)", "smollm2_batches", "tokens", 16, 3,
        (Trial("W4, nearest", _W4, "groups of 64 weights", "rtn"), Trial("W4", _W4, "groups of 64 weights")),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Outcome:
    """A trial on one network. ``same``: the saved model was loaded bit for bit."""

    trial: Trial
    chain: str
    fidelity: Fidelity
    stored: int
    seconds: float
    same: bool


@guarded
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of pictures and models.")
    ] = Path("demo-output"),
    models: Annotated[
        str, typer.Option(help=f"Names separated by commas: {', '.join(SUBJECTS)} (1 GB of memory, some minutes more).")
    ] = "minilm,efficientnet_lite0",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized checkpoints.")] = False,
) -> None:
    """Quantize pretrained networks and compare them with FP32.

    It prints size, fidelity and speed, and draws two pictures. W4A8 means weights in 4 bits and activations in 8;
    embedding tables have 8 bits. The algorithm is the one that "auto" chooses. One row rounds to nearest instead, to
    show the benefit of the algorithm. Each model is calibrated on other inputs than those of the
    comparison, saved, loaded again, and fused for speed.

    Example: dybit demo --output demo-output --models minilm
    """
    names = [word.strip() for word in models.split(",") if word.strip()]
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown or not names:
        raise DyBitError(f"--models must be among {', '.join(SUBJECTS)}, not {(unknown or [models])[0]!r}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DyBitError(f"--output {str(output)!r} cannot be made: {error.strerror}") from None
    from dybit.report.bars import bars
    from dybit.report.histogram import save

    begin = time.perf_counter()
    names = list(dict.fromkeys(names))
    networks = [_show(name, SUBJECTS[name], output, keep, levels=name == names[0]) for name in names]
    save(bars(networks), output / "results.png")
    console = out()
    for file, text in (
        ("results.png", "size, time and fidelity of every row"),
        ("levels.png", f"the values of 4-bit formats on the weights of {SUBJECTS[names[0]].title.split(' (')[0]}"),
    ):
        console.print(f"picture: {output / file} ({text})", soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - begin:.0f} s. Next, quantize a model to a file:", soft_wrap=True)
    console.print(f"  {_NEXT}", style="bold", soft_wrap=True)


def _show(name: str, subject: Subject, folder: Path, keep: bool, levels: bool) -> Network:
    """Runs the trials of one network and prints the table; returns what there is to draw."""
    from dybit.measure.fidelity import Reference

    with progress(f"loading {name}") as bar:
        model = sources.load_model(f"dybit.demo:{name}")
        source = f"dybit.demo:{subject.batches}"
        data = sources.load_batches(source, "data", split="calibration", limit=subject.calibration, model=name)
        inputs = sources.load_batches(source, "data", split="evaluation", limit=subject.evaluation, model=name)
        bar.start(f"{name}: FP32", len(inputs))
        fast: dict[str, nn.Module] = {"FP32": model}
        outcomes = []
        with Reference(model, inputs, progress=bar.update) as reference:
            for trial in subject.trials:
                outcome, fast[trial.name] = _run(name, model, trial, data, reference, folder, keep, bar)
                outcomes.append(outcome)
            kind, original = reference.kind, reference.fidelity
        bar.start(f"{name}: timing")
        times = _time(fast, inputs[0], bar)
        fp32 = float_bytes(model.state_dict())
        if levels:
            bar.start(f"{name}: drawing")
            _draw(folder / "levels.png", model, subject.title)
    _print(subject, original, outcomes, times, kind, fp32)
    if any(not item.same for item in outcomes):
        note("note: a model that was loaded differs from the one that was saved; this is a defect of dybit")
    return _network(subject, outcomes, times, kind, fp32)


def _run(
    name: str, model: nn.Module, trial: Trial, data: list[Any], reference: Reference, folder: Path, keep: bool, bar: Bar
) -> tuple[_Outcome, nn.Module]:
    """Quantizes, saves, loads into a fresh model, and fuses and judges what was loaded."""
    import dybit
    from dybit.models.plan import plan_layers
    from dybit.ptq import chain

    recipes = [plan.recipe for plan in plan_layers(model, trial.recipe)]
    algorithms = chain.resolve(trial.algorithm, model, recipes, calibrated=True)
    quantized, seconds = quantized_copy(
        model, trial.recipe, data, bar, f"{name} {trial.name}, {', '.join(algorithms)}", algorithms
    )
    path = dybit.save(quantized, folder / f"{name}-{trial.name.lower().replace(', ', '-')}")
    stored = disk_bytes(path)
    loaded = dybit.load(path, copy.deepcopy(model))
    same = _same(quantized, loaded, reference.batches[0])
    if not keep:
        shutil.rmtree(path)
    fast = dybit.fuse(loaded, reference.batches[0])
    bar.start(f"{name} {trial.name}: judging", len(reference.batches))
    fidelity = reference.judge(fast, bar.update)
    return _Outcome(trial, ", ".join(algorithms), fidelity, stored, seconds, same), fast


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


def _time(models: Mapping[str, nn.Module], batch: Any, bar: Bar) -> dict[int, dict[str, Timing]]:  # noqa: ANN401
    """Times all models in turns. Returns the times by the number of inputs: one, and a whole batch."""
    from torch.utils._pytree import tree_leaves, tree_map

    from dybit.measure.timing import compare as take_turns
    from dybit.models.running import run_batch

    count = len(tree_leaves(batch)[0])
    found = {}
    for step, part in enumerate(sorted({1, count})):
        inputs = tree_map(lambda x, part=part: x[:part], batch)
        runs = {name: partial(run_batch, model, inputs) for name, model in models.items()}
        found[part] = take_turns(runs, _TIMING_SECONDS)
        bar.update(step + 1, 2)
    return found


def _print(
    subject: Subject, original: Fidelity, outcomes: list[_Outcome], times: dict[int, dict[str, Timing]], kind: Kind,
    fp32: int,
) -> None:  # fmt: skip
    """Prints the table of one network, and its recipes."""
    from dybit.measure.timing import machine

    language = original.perplexity is not None
    speeds = [text for part in times for text in (f">ms, {part}", ">speed")]
    columns = ["", "algorithm", ">size", ">ratio", *speeds, ">SQNR dB", AGREEMENT[kind]]
    table = grid(*columns, *([">KL nats"] if kind == "logits" else []), ">Spearman", *([">PPL"] if language else []),
                 ">s", "reloaded")  # fmt: skip

    def row(name: str, chain: str, stored: int, fidelity: Fidelity) -> list[str]:
        timed = [found[name] for found in times.values()]
        speed = [text for time_ in timed for text in (f"{1e3 * time_.median:.1f}", f"{time_.ratio:.2f}×")]
        rest = [f"{fidelity.perplexity:.2f}"] if fidelity.perplexity is not None else []
        return [name, chain, size(stored), f"{fp32 / stored:.2f}", *speed, *measures(fidelity, kind), *rest]

    table.add_row(*row("FP32", "", fp32, original), "", "", style="dim")
    for item in outcomes:
        check = "equal" if item.same else "DIFFERENT"
        cells = row(item.trial.name, item.chain, item.stored, item.fidelity)
        table.add_row(*cells, f"{item.seconds:.0f}", check, style="bold" if item is outcomes[-1] else "")
    console = out()
    console.print(f"{subject.title}: {original.outputs:,} {subject.inputs}", style="bold", soft_wrap=True)
    console.print(table)
    for words, names in _by_words(outcomes).items():
        console.print(f"{', '.join(names)}: {words}", style="dim", soft_wrap=True)
    parts = " and ".join(f"{part} at a time" for part in times)
    console.print(
        f"{LEGEND[kind]}; s: seconds to quantize; size: on disk; ms and speed: {parts}, fused, medians in turns with "
        f"FP32 on {machine()}; reloaded: bit for bit\n",
        style="dim",
        soft_wrap=True,
    )


def _by_words(outcomes: list[_Outcome]) -> dict[str, list[str]]:
    """The names of the rows that have a recipe, by the recipe in words."""
    found: dict[str, list[str]] = {}
    for item in outcomes:
        found.setdefault(item.trial.words, []).append(item.trial.name)
    return found


def _network(
    subject: Subject, outcomes: list[_Outcome], times: dict[int, dict[str, Timing]], kind: Kind, fp32: int
) -> Network:
    """The bars of one network."""
    from dybit.report.bars import Measure, Network

    part, timed = list(times.items())[-1]
    names = ["FP32", *(item.trial.name for item in outcomes)]
    sizes = [fp32, *(item.stored for item in outcomes)]
    if kind == "values" or any(item.fidelity.agreement is None for item in outcomes):
        title, kept = "Spearman", [1.0, *(item.fidelity.spearman or 0.0 for item in outcomes)]
        words = [f"{value:.3f}" for value in kept]
    else:
        title = f"same {'top class' if kind == 'logits' else 'nearest neighbour'} as FP32"
        kept = [1.0, *(item.fidelity.agreement or 0.0 for item in outcomes)]
        words = [f"{100 * value:.0f} %" for value in kept]
    milliseconds = [1e3 * timed[name].median for name in names]
    speeds = [f"{ms:.0f} ms, {timed[name].ratio:.1f}×" for name, ms in zip(names, milliseconds, strict=True)]
    measured = (
        Measure("size on disk", sizes, [size(value) for value in sizes]),
        Measure(f"time, {part} {subject.inputs}", milliseconds, speeds),
        Measure(title, kept, words),
    )
    return Network(subject.title, names, measured)


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
    subtitle = f"values at the scale of a typical channel; SQNR of {share} channels of {len(matrices)} layers"
    compare.draw(path, matrices, results, setting, f"4-bit levels on the weights of {title.split(' (')[0]}", subtitle)
