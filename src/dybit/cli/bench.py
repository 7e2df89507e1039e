"""``dybit bench``: FP32 against quantized layers and models, paired and interleaved, on this machine."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import options, sources
from dybit.cli.console import grid, guarded, note, out, progress
from dybit.cli.generation import bench_generation
from dybit.errors import DyBitError
from dybit.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from dybit.measure.timing import Timing
    from dybit.onnx import Peers
    from dybit.runtime.program import Report

_Shapes = Annotated[
    str | None,
    typer.Option(
        help="Time linear layers of these shapes (rows x inputs x outputs), such as 1x4096x4096,128x384x1536."
    ),
]
_WithPeers = Annotated[
    bool, typer.Option("--peers", help="Time the model in ONNX Runtime and OpenVINO too, as far as they are installed.")
]
_Calibration = Annotated[
    str | None, typer.Option(metavar="DATA", help="Calibration inputs of --peers, which INT8 needs.")
]
_Generate = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Time prompt and generate of a language model, in a transformers directory."),
]
_SHAPE = re.compile(r"(\d+)[x×](\d+)[x×](\d+)", re.IGNORECASE)


@guarded
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model, as in dybit quantize. Leave out with --shapes.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Inputs, as in dybit evaluate; the first batch is timed.")
    ] = None,
    shapes: _Shapes = None,
    generate: _Generate = None,
    weights: options.Weights = None,
    activations: options.Activations = None,
    embeddings: options.Embeddings = None,
    group_size: options.GroupSize = None,
    activation_mode: options.ActivationMode = None,
    variants: options.Variants = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in JSON, instead of the above.")] = None,
    only_if_faster: Annotated[
        bool, typer.Option("--only-if-faster", help="Write a recipe to -o that keeps slower layers in FP32.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Recipe file of --only-if-faster.")
    ] = None,
    peers: _WithPeers = False,
    calibration: _Calibration = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Approximate seconds to time each layer.")] = 0.5,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of torch threads. [torch's default]")] = None,
    tokenizer: options.Tokenizer = None,
    batch_size: options.BatchSize = 16,
) -> None:
    """Time every layer and the whole model, quantized and in FP32.

    FP32 and quantized layers run in turns in one process. The table shows median times, and the median and quartiles of
    the ratio FP32 / DyBit: above 1 is faster than FP32. With one thread, times are processor time. Scales are absolute
    maxima, which take less time to find and do not affect speed. With --peers, the whole model is timed by the wall
    clock. The other runtimes get the FP32 model as ONNX, and quantize it to INT8 by their own tools.

    --generate DIR times a language model as it is and fused: tokens a second of a prompt and of generate, and the share
    of the rate at which memory alone would let it generate.

    Example: dybit bench dybit.demo:minilm --data dybit.demo:minilm_batches --activations 8
    """
    _check(model, shapes, generate, only_if_faster, output, peers, calibration)
    if generate is not None:
        with _threads(threads):
            return bench_generation(generate, json)
    plan = options.make_recipe(recipe, **options.recipe_fields(locals()))
    from dybit.measure.timing import machine
    from dybit.safe_files import write_json

    with _threads(threads):
        if shapes is not None:
            network, batch = _linears(shapes)
            names = {str(i): word for i, word in enumerate(shapes.split(","))}
        else:
            network, batch = _network(str(model), data, tokenizer, batch_size)
            names = {}
        loading = {"model": str(model), "tokenizer": tokenizer, "batch_size": batch_size}
        with _peers(network, batch, calibration, loading) if peers else nullcontext() as others:
            found = _time(network, batch, plan, seconds, shapes is None, only_if_faster, others)
        layers, whole, faster, report = found
        out().print(f"{model or 'linear layers'} on {machine()}", style="bold", soft_wrap=True)
        _print(layers, whole, names)
        if report is not None:
            out().print(f"\nthe fused model, by operator: {report}", highlight=False, soft_wrap=True)
        if json is not None:
            figures = {name: {k: asdict(t) for k, t in times.items()} for name, times in (layers | whole).items()}
            write_json(json, {"machine": asdict(machine()), "recipe": plan.to_dict(), "timings": figures})
    if output is not None:
        write_json(output, faster.to_dict())
        out().print(f"wrote {output}", soft_wrap=True)


def _check(
    model: str | None,
    shapes: str | None,
    generate: str | None,
    only_if_faster: bool,
    output: Path | None,
    peers: bool,
    calibration: str | None,
) -> None:
    """Refuses arguments that do not go together."""
    if sum(given is not None for given in (model, shapes, generate)) != 1:
        raise DyBitError("give either MODEL or --shapes, or --generate alone")
    if only_if_faster != (output is not None) or (only_if_faster and model is None):
        raise DyBitError("--only-if-faster needs MODEL, and -o FILE for the recipe; -o FILE needs --only-if-faster")
    if (peers and model is None) or (calibration is not None and not peers):
        raise DyBitError("--peers needs MODEL; --calibration DATA needs --peers")


Times = dict[str, dict[str, "Timing"]]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Runs torch on so many threads; None leaves their number alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _network(model: str, data: str | None, tokenizer: str | None, batch_size: int) -> tuple[nn.Module, Any]:
    """The model and its first batch."""
    if data is None:
        raise DyBitError("--data DATA is needed to run MODEL")
    network = sources.load_model(model)
    batches = sources.load_batches(
        data, "--data", split="evaluation", limit=1, model=model, tokenizer=tokenizer, batch_size=batch_size
    )
    return network, batches[0]


def _peers(network: nn.Module, batch: Any, calibration: str | None, loading: dict[str, Any]) -> Peers:  # noqa: ANN401
    """The model in the other runtimes."""
    from dybit.onnx import Peers

    data = []
    if calibration is not None:
        data = sources.load_batches(calibration, "--calibration", split="calibration", **loading)
    return Peers(network, [batch, *data[:1]], data)


def _time(
    network: nn.Module,
    batch: Any,  # noqa: ANN401
    plan: Recipe,
    seconds: float,
    with_whole: bool,
    only_if_faster: bool,
    peers: Peers | None,
) -> tuple[Times, Times, Recipe, Report | None]:
    """The times of the layers, of the whole model and its peers.

    Also the recipe without the layers that are slower, and where the time of the fused model goes.
    """
    from dybit import quantize_
    from dybit.measure.timing import compare
    from dybit.mixed_precision.measured_model import Subject
    from dybit.models.running import run_batch
    from dybit.runtime.program import FusedProgram

    quick = replace(plan, method="absmax", criterion="weight") if plan.method == "mse" else plan
    subject = Subject(network, [batch], quick)
    layers: Times = {}
    with progress("timing layers", len(subject.layers)) as bar:
        for index, (name, module) in enumerate(subject.layers.items()):
            bar.update(index, len(subject.layers), name)
            own = quick.layer(name, subject.kinds[name])
            if own is None or name not in subject.inputs:
                continue
            at, twin = subject.inputs[name], subject.quantized(name, own)
            runs = {"fp32": partial(module.forward, *at.args, **at.kwargs),
                    "dybit": partial(twin.forward, *at.args, **at.kwargs)}  # fmt: skip
            layers[name] = compare(runs, seconds)
        if not layers:
            raise DyBitError("the recipe keeps every layer in floating point")
        slower = [name for name, times in layers.items() if times["dybit"].ratio < 1]
        kept: dict[str, Any] = dict.fromkeys(one for name in slower for one in (name, *subject.ties[name]))
        rules = kept | {k: None if v is None else dict(v) for k, v in plan.rules if k not in kept}
        faster = replace(plan, rules=tuple(rules.items()))
        whole: Times = {}
        report: Report | None = None
        if with_whole:
            bar.start("timing the whole model")
            quantized = quantize_(copy.deepcopy(network).eval(), quick, [batch])
            models = {"fp32": subject.model, "dybit": quantized} | _fused(quantized, batch)
            if only_if_faster and 0 < len(slower) < len(layers):
                chosen = replace(faster, method=quick.method, criterion=quick.criterion)
                models["only if faster"] = quantize_(copy.deepcopy(network).eval(), chosen, [batch])
            runs = {k: partial(run_batch, m, batch) for k, m in models.items()}
            if peers is None:
                whole["whole model"] = compare(runs, 8 * seconds)
            else:
                runs |= {name: partial(run, batch) for name, run in peers.runs().items()}
                whole["whole model"] = compare(runs, 8 * seconds, alone=False)
                for reason in peers.skipped.values():
                    note(reason)
            if isinstance(fused := models.get("fused"), FusedProgram):
                report = fused.report()
    return layers, whole, faster, report


def _fused(model: nn.Module, batch: Any) -> dict[str, nn.Module]:  # noqa: ANN401
    """The fused model by its name in the table; nothing if it cannot be fused."""
    from dybit import fuse

    try:
        return {"fused": fuse(model, batch)}
    except DyBitError as error:
        note(str(error))
        return {}


def _linears(shapes: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Linear layers side by side, each on its own input."""
    import torch
    from torch import nn

    class Side(nn.ModuleList):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x).flatten() for layer, x in zip(self, inputs, strict=True)])

    sizes = []
    for word in shapes.split(","):
        match = _SHAPE.fullmatch(word.strip())
        if not match or "0" in match.groups():
            raise DyBitError(f"--shapes must be like 1x4096x4096,128x384x1536, not {word!r}")
        sizes.append([int(n) for n in match.groups()])
    torch.manual_seed(0)
    layers = Side([nn.Linear(columns, outputs, dtype=torch.float32, device="cpu") for _, columns, outputs in sizes])
    return layers, tuple(torch.randn(rows, columns, dtype=torch.float32, device="cpu") for rows, columns, _ in sizes)


def _print(layers: Times, whole: Times, names: dict[str, str]) -> None:
    table = grid("layer", ">FP32 ms", ">ms", ">times faster", ">quartiles", "")
    rows = {name: times for name, times in layers.items()} | whole
    for name, times in rows.items():
        for label in list(times)[1:]:
            found, extra = times[label], "" if label == "dybit" else f" ({label})"
            slow = "slower than FP32" if found.ratio < 1 else ""
            cells = [f"{times['fp32'].median * 1e3:.3f}", f"{found.median * 1e3:.3f}", f"{found.ratio:.2f}"]
            spread = f"{found.ratio_low:.2f} to {found.ratio_high:.2f}"
            style = "bold" if name in whole else "red" if slow else ""
            table.add_row(names.get(name, name) + extra, *cells, spread, slow, style=style)
    out().print(table)
    slower = sum(times["dybit"].ratio < 1 for times in layers.values())
    if slower:
        note(f"{slower} of {len(layers)} layers are slower than in FP32; --only-if-faster keeps these in FP32")
