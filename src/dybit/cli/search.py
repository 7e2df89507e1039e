"""``dybit search``: a recipe of mixed precision for a speed, a size or a loss."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dybit.cli import options, sources
from dybit.cli.console import grid, guarded, note, out, progress, size
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from dybit.mixed_precision.constraint import Constraint
    from dybit.mixed_precision.search import Result
    from dybit.mixed_precision.trial import Point

_UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SHOWN_LAYERS = 60


_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Model, as in dybit quantize. Leave out with --workload.")
]
_Calibration = Annotated[str | None, typer.Option(metavar="DATA", help="Calibration data, as in dybit quantize.")]
_Workload = Annotated[
    str | None, typer.Option(metavar="NAME", help="Search by shapes only: a built-in network or a workload's .json.")
]
_MaxError = Annotated[
    float | None, typer.Option(help="Largest error of the outputs: KL in nats for logits, else noise/signal.")
]
_MaxDrop = Annotated[
    float | None,
    typer.Option(help="Largest loss in points, of the agreement with FP32 in %, or of the score of --evaluate."),
]
_MaxSize = Annotated[str | None, typer.Option(metavar="BYTES", help="Largest size of the tensors, such as 25MB.")]
_On = Annotated[
    str, typer.Option(help="Cost to measure: accelerator (its cycles), cpu (time on this machine) or size.")
]
_Config = Annotated[
    Path | None, typer.Option(metavar="TOML", help="Parameters of the accelerator, as in dybit simulate.")
]
_Recipe = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A recipe in JSON for everything but the formats, such as scales and rules."),
]
_Candidates = Annotated[
    str | None, typer.Option(help="Weights/activations to choose from, such as 8/8,4/8,fp32. [depends on --on]")
]
_Group = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Layers that must get the same formats. May be repeated.")
]
_Baselines = Annotated[bool, typer.Option("--baselines", help="Also try uniform recipes and the greedy loop.")]
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="RUN", help="Directory for recipe.json and search.json.")
]
_Evaluation = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Data to measure errors on. [the evaluation split of --calibration, if any]"),
]
_Evaluate = Annotated[
    str | None,
    typer.Option(metavar="module:function", help="Score for --max-drop: a function of a model, higher is better."),
]


@guarded
def search(
    model: _Model = None,
    calibration: _Calibration = None,
    workload: _Workload = None,
    speedup: Annotated[float | None, typer.Option(help="Smallest speedup over the base of the cost.")] = None,
    max_error: _MaxError = None,
    max_drop: _MaxDrop = None,
    max_size: _MaxSize = None,
    on: _On = "accelerator",
    config: _Config = None,
    candidates: _Candidates = None,
    sensitivity: Annotated[str, typer.Option(help="How to estimate errors: rmse, fisher, output or kl.")] = "kl",
    group: _Group = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also find the front of error against speed.")] = False,
    points: Annotated[int, typer.Option(min=2, help="Number of recipes on the front.")] = 24,
    baselines: _Baselines = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure sensitivities.")] = 1,
    output: _Output = None,
    evaluation: _Evaluation = None,
    evaluate: _Evaluate = None,
    recipe: _Recipe = None,
    embeddings: options.Embeddings = None,
    group_size: options.GroupSize = None,
    activation_mode: options.ActivationMode = None,
    variants: options.Variants = None,
    tokenizer: options.Tokenizer = None,
    batches: options.Batches = None,
    batch_size: options.BatchSize = 16,
) -> None:
    """Find the best formats of every layer under a constraint.

    With --speedup or --max-size it minimises the error, with --max-error or --max-drop the cost. Sensitivities are kept
    in the user's cache directory, so run the same command again to resume. With --workload, errors are estimated from
    shapes alone; they are not measurements.

    Example: dybit search dybit.demo:minilm --calibration dybit.demo:minilm_batches --speedup 4 -o run
    """
    from dybit.mixed_precision.candidate import as_candidates
    from dybit.mixed_precision.run_directory import check_target, write_run

    if (model is None) == (workload is None):
        raise DyBitError("give either MODEL or --workload")
    base = options.make_recipe(recipe, **options.recipe_fields(locals()))
    limits = _constraints(speedup, max_error, max_drop, max_size, evaluate)
    every = None if candidates is None else as_candidates(word for word in candidates.split(",") if word.strip())
    cost = _cost(on, config)
    if output is not None:
        check_target(output)
    front = points if pareto else 0
    if workload is not None:
        given = {"calibration": calibration, "evaluation": evaluation, "evaluate": evaluate}
        result = _search_shapes(workload, given, constraint=limits, cost=cost[0], candidates=every, recipe=base,
                                pareto=front)  # fmt: skip
    else:
        loading = {"model": model, "tokenizer": tokenizer, "batch_size": batch_size, "limit": batches}
        result = _search_model(
            str(model), calibration, evaluation, loading, constraint=limits, cost=cost, candidates=every, recipe=base,
            sensitivity=sensitivity, groups=group or (), pareto=front, baselines=baselines, workers=workers,
        )  # fmt: skip
    _print(result, model or str(workload))
    if output is not None:
        write_run(result, output, model=model or str(workload), command=["dybit", *sys.argv[1:]])
        out().print(f"saved to {output}", soft_wrap=True)
        if model is not None:
            note(f"next: dybit quantize {model} --recipe {output}/recipe.json --calibration {calibration} -o DIR")


def _search_shapes(workload: str, given: dict[str, str | None], **options: Any) -> Result:  # noqa: ANN401
    """Searches by shapes alone; refuses the options that need a model."""
    from dybit.mixed_precision.shape_search import search_shapes
    from dybit.workloads.networks import find_workload

    for name, value in given.items():
        if value is not None:
            raise DyBitError(f"--{name} {value!r} needs a model, and --workload {workload!r} has shapes only")
    return search_shapes(find_workload(workload), **options)


def _search_model(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    loading: dict[str, Any],
    **options: Any,  # noqa: ANN401
) -> Result:
    """Loads a model and its data, and searches with a progress bar."""
    import dybit

    if calibration is None:
        raise DyBitError("--calibration DATA is needed to measure errors; use --workload for shapes only")
    if evaluation is None and sources.takes_split(calibration):
        evaluation = calibration
    loaded = sources.load_model(model)
    data = sources.load_batches(calibration, "--calibration", split="calibration", **loading)
    held = None
    if evaluation is not None:
        held = sources.load_batches(evaluation, "--evaluation", split="evaluation", **loading)
    with progress("searching") as bar:
        return dybit.search(
            loaded,
            data,
            evaluation=held,
            progress=lambda done, total, text: bar.update(done, total or None, text),
            **options,
        )


def _constraints(
    speedup: float | None, max_error: float | None, max_drop: float | None, max_size: str | None, evaluate: str | None
) -> list[Constraint]:
    from dybit.mixed_precision.constraint import MaxDrop, MaxError, MaxSize, Speedup

    found: list[Constraint] = []
    if speedup is not None:
        found.append(Speedup(speedup))
    if max_error is not None:
        found.append(MaxError(max_error))
    if max_drop is not None:
        score = None
        if evaluate is not None:
            if not sources.is_reference(evaluate):
                raise DyBitError(f"--evaluate must be module:function, not {evaluate!r}")
            score = sources.function(evaluate, "--evaluate")
        found.append(MaxDrop(max_drop, score))
    elif evaluate is not None:
        raise DyBitError(f"--evaluate {evaluate!r} needs --max-drop")
    if max_size is not None:
        found.append(MaxSize(parse_bytes(max_size)))
    if not found:
        raise DyBitError("give at least one of --speedup, --max-error, --max-drop and --max-size")
    return found


def parse_bytes(word: str) -> float:
    """Reads ``25MB``, ``800 kB``, ``1.5GiB`` or a number of bytes.

    Raises:
        DyBitError: It has another form.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", word)
    try:
        if match and match[2].lower() in _UNITS:
            return float(match[1]) * _UNITS[match[2].lower()]
    except ValueError:
        pass
    raise DyBitError(f"--max-size must be a number of bytes such as 25MB, not {word!r}")


def _cost(on: str, config: Path | None) -> list[Any]:
    if config is not None and on != "accelerator":
        raise DyBitError(f"--config {str(config)!r} needs --on accelerator, but --on is {on!r}")
    if on == "accelerator":
        from dybit.accelerator import Config
        from dybit.accelerator.cost import AcceleratorCost

        costs: list[Any] = [AcceleratorCost(Config() if config is None else Config.load(config))]
    elif on in ("cpu", "size"):
        from dybit.mixed_precision.cost import CpuCost, SizeCost

        costs = [CpuCost(), SizeCost()] if on == "cpu" else [SizeCost()]
    else:
        raise DyBitError(f"--on must be accelerator, cpu or size, not {on!r}")
    return costs


def _print(result: Result, name: str) -> None:
    """One row for every layer, then one for every recipe."""
    problem, chosen = result.problem, result.point
    console = out()
    table = grid("layer", "chosen", ">error", *(f">{t.name}" for t in problem.tables), ">share", "bound")
    first = problem.tables[0]
    names = list(problem.errors)
    for layer in names[:_SHOWN_LAYERS]:
        index = chosen.choice[layer]
        told = first.details[layer][index] if first.details else {}
        share = first.layers[layer][index] / chosen.costs[first.name]
        cells = [_amount(t.layers[layer][index], t.unit) for t in problem.tables]
        error = f"{problem.errors[layer][index]:.3g}"
        table.add_row(layer, problem.candidates[index].name, error, *cells, f"{share:.1%}", str(told.get("bound", "")))
    shapes = " — SHAPES ONLY, errors are not measured" if result.subject is None else ""
    console.print(f"{name}: {len(names)} layers in {len(problem.groups)} groups{shapes}", style="bold", soft_wrap=True)
    console.print(table)
    if len(names) > _SHOWN_LAYERS:
        console.print(f"… and {len(names) - _SHOWN_LAYERS} more", soft_wrap=True)
    _print_points(result)


def _print_points(result: Result) -> None:
    points: Sequence[Point] = [
        result.point,
        *([result.greedy] if result.greedy else []),
        *result.uniform,
        *result.pareto,
    ]
    tables, drops = result.problem.tables, result.point.drop is not None
    columns = [f">{t.name}" for t in tables] + [f">{t.name} ×" for t in tables]
    grid_ = grid("recipe", ">est. error", ">error", *([">drop"] if drops else []), *columns)
    for index, point in enumerate(points):
        cells = [_amount(point.measured.get(t.name, point.costs[t.name]), t.unit) for t in tables]
        ratios = [f"{t.base / point.measured.get(t.name, point.costs[t.name]):.2f}" for t in tables]
        error = "–" if point.error is None else f"{point.error:.4g}"
        drop = [] if not drops else ["–" if point.drop is None else f"{point.drop:.2f}"]
        style = "bold yellow" if index == 0 else ""
        label = "the search" if index == 0 else point.name
        grid_.add_row(label, f"{point.estimated_error:.4g}", error, *drop, *cells, *ratios, style=style)
    console = out()
    console.print(grid_)
    bases = "; ".join(f"{t.name} × is over {t.base_name}" for t in tables)
    console.print(
        f"error: {result.error_unit}; estimated by {result.sensitivity}; {bases}", style="dim", soft_wrap=True
    )
    for table in tables:
        if table.note:
            console.print(f"{table.name}: {table.note}", style="dim", soft_wrap=True)


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    return f"{value * 1e3:.3f} ms" if unit == "seconds" else f"{value:,.0f}"
