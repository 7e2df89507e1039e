"""``dybit compare``: formats of one width ranked by their error on weights."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dybit.cli import grid as grids
from dybit.cli import options, sources
from dybit.cli.console import grid, guarded, note, out, progress
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.formats.scaling import SCALE_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from dybit.measure.format_ranking import Result, Setting
    from dybit.report import FormatRow

_SYNTHETIC_SHAPE = (256, 2048)
_HISTOGRAM_SAMPLES = 1 << 20
_MAX_PICTURED = 8
_HTML = (".html", ".htm")
_COLUMNS = (">#", "format", ">SQNR dB", ">bits/weight", ">code", ">scale", ">choice", "most used")


_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A .safetensors file, or module:function returning an nn.Module; with --data, a model to run.",
    ),
]
_Formats = Annotated[str | None, typer.Option(help="Names of formats, separated by commas. [all of this width]")]
_Data = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Run MODEL on these inputs: module:function, or .npy/.safetensors."),
]
_Calibration = Annotated[
    str | None, typer.Option(metavar="DATA", help="Data to calibrate on. [the calibration split of DATA]")
]
_Results = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="JSON lines of results. Results in it are not computed again; new ones are added."
    ),
]


@guarded
def compare(
    weights: _Model = None,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="Use Gaussian samples instead of weights.")] = False,
    laplace: Annotated[bool, typer.Option("--laplace", help="Use Laplacian samples instead of weights.")] = False,
    bits: Annotated[
        str, typer.Option(help="Width of the codes, 2 to 8 bits. With --data also several, such as 2,3,4.")
    ] = "4",
    formats: _Formats = None,
    group_size: Annotated[
        int | None, typer.Option(help="Number of weights that share a scale. [none: one scale per output channel]")
    ] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="Use one scale per tensor.")] = False,
    scale: Annotated[str, typer.Option(help="Type of the scales: fp32, bf16, pow2 or e4m3.")] = "fp32",
    method: Annotated[str, typer.Option(help="How scales are chosen: mse, absmax or percentile.")] = "mse",
    tensors: Annotated[str, typer.Option(metavar="GLOB", help="Names of the tensors to use.")] = "*",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a picture (.png, .svg) or page (.html).")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.")] = None,
    data: _Data = None,
    algorithm: options.Algorithms = None,
    calibration: _Calibration = None,
    results: _Results = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes; each loads the model.")] = 1,
    keep_embeddings: options.KeepEmbeddings = False,
    batches: options.Batches = None,
    tokenizer: options.Tokenizer = None,
    batch_size: options.BatchSize = 16,
) -> None:
    """Rank formats by their accuracy on weights or a model.

    On weights, it ranks by the signal-to-quantization-noise ratio (SQNR, in dB, higher is better), pooled over all
    floating-point tensors of two or more dimensions. Formats that prescribe a group size or a type of scale (mxfp4,
    nvfp4) use theirs; the column of bits per weight tells how much that costs.

    With --data, it runs the model in every format, at every width, with every algorithm, and compares it with FP32. {}
    in a format stands for the width: --bits 3,4 --formats "int{},nf{},dybit{}spare" --algorithm rtn,gptq.

    Example: dybit compare dybit.demo:minilm --tensors "*.dense.weight" --group-size 128 -o levels.png
    """
    _check(method, scale, group_size, per_tensor)
    for path in (output, csv_file):
        _check_output(path, page=path is output)
    if data is not None:
        words = (weights, data, calibration, tokenizer)
        cells = _grid_cells(words, bits, formats, algorithm, (group_size, scale), keep_embeddings, batches, batch_size)
        if gaussian or laplace or per_tensor or tensors != "*" or method != "mse":
            raise DyBitError("--gaussian, --laplace, --per-tensor, --tensors and --method do not go with --data")
        _run_grid(cells, results, workers, output, csv_file)
        return
    needing = {"algorithm": algorithm, "calibration": calibration, "results": results}
    given = [name for name, value in needing.items() if value is not None]
    if given:
        raise DyBitError(f"--{given[0]} needs --data")
    width = grids.widths(bits)
    if len(width) > 1:
        raise DyBitError(f"--bits {bits} needs --data; one width without")
    from dybit.measure.format_ranking import Setting

    families = _families(width[0], formats)
    granularity: Any = "group" if group_size else "tensor" if per_tensor else "channel"
    setting = Setting(granularity, group_size, scale, method)  # type: ignore[arg-type]
    matrices, name = _weights(weights, gaussian, laplace, tensors)
    _rank(matrices, name, width[0], families, setting, output, csv_file)


def _check(method: str, scale: str, group_size: int | None, per_tensor: bool) -> None:
    if method not in ("mse", "absmax", "percentile"):
        raise DyBitError(f"--method must be mse, absmax or percentile, not {method!r}")
    if scale not in SCALE_BITS:
        raise DyBitError(f"--scale must be one of {', '.join(SCALE_BITS)}, not {scale!r}")
    if group_size is not None and (per_tensor or group_size < 1):
        raise DyBitError(f"--group-size {group_size} must be at least 1 and without --per-tensor")


def _rank(
    matrices: list[Tensor],
    name: str,
    bits: int,
    families: Sequence[Family],
    setting: Setting,
    output: Path | None,
    csv_file: Path | None,
) -> None:
    """Ranks formats on weights, prints the table, and writes the files."""
    from dybit.measure.format_ranking import measure

    with progress("comparing") as bar:
        ranked = measure(matrices, families, setting, bits, bar.update)
    count = sum(matrix.numel() for matrix in matrices)
    unit = {"group": f"group of {setting.group_size}", "channel": "output channel", "tensor": "tensor"}
    tensors = "tensor" if len(matrices) == 1 else "tensors"
    title = f"{bits}-bit formats on {name}"
    subtitle = (
        f"{len(matrices)} {tensors}, {count:,} weights; one {setting.scale} scale per {unit[setting.granularity]}, "
        f"chosen by {setting.method}"
    )
    _print(ranked, title, subtitle)
    if csv_file:
        _write_csv(csv_file, ranked)
    if output:
        draw(output, matrices, ranked, setting, title, subtitle)
    for path in (csv_file, output):
        if path:
            note(f"wrote {path}")


def _grid_cells(
    words: tuple[str | None, str, str | None, str | None],
    bits: str,
    formats: str | None,
    algorithms: Sequence[str] | None,
    scales: tuple[int | None, str],
    keep_embeddings: bool,
    batches: int | None,
    batch_size: int,
) -> list[grids.Cell]:
    """Every configuration of the grid, checked."""
    model, data, calibration, tokenizer = words
    if model is None:
        raise DyBitError(f"--data {data!r} needs a MODEL")
    if calibration is None and sources.takes_split(data):
        calibration = data
    chains = options.alternatives(algorithms or ["rtn"])
    for chain in chains:
        options.chain(chain, calibration is not None)
    more = (*scales, keep_embeddings, batches, tokenizer, batch_size)
    return [
        grids.Cell(model, data, calibration, name, chain, *more)
        for name in grids.formats(formats, grids.widths(bits))
        for chain in (chains if name != "fp32" else ["rtn"])
    ]


def _run_grid(
    cells: list[grids.Cell], results: Path | None, workers: int, output: Path | None, csv_file: Path | None
) -> None:
    found = grids.run(cells, results, workers)
    first = cells[0]
    unit = f"groups of {first.group_size}" if first.group_size else "one scale per output channel"
    title = f"{first.model} on {first.data}, {unit}, {first.scale} scales"
    grids.show(found, title)
    if csv_file:
        grids.write_csv(csv_file, found)
    if output:
        grids.write_page(output, found, title)
    for path in (csv_file, output):
        if path:
            note(f"wrote {path}")


def _families(bits: int, formats: str | None) -> list[Family]:
    if formats is None:
        return list(catalogue.families(bits))
    words = [word.strip() for word in formats.split(",") if word.strip()]
    if not words:
        raise DyBitError(f"--formats must name at least one format, not {formats!r}")
    return [catalogue.family(word) for word in dict.fromkeys(words)]


def _check_output(path: Path | None, page: bool) -> None:
    if path is None:
        return
    if page:
        from dybit.report.histogram import SUFFIXES, check_path

        if path.suffix.lower() not in (*SUFFIXES, *_HTML):
            raise DyBitError(f"--output must end in .png, .svg or .html, not {str(path)!r}")
        check_path(path if path.suffix.lower() in SUFFIXES else path.with_suffix(".svg"))
    if not path.parent.is_dir():
        raise DyBitError(f"the folder of {str(path)!r} does not exist")


def _weights(weights: str | None, gaussian: bool, laplace: bool, pattern: str) -> tuple[list[Tensor], str]:
    """The matrices (rows, columns) to compare on, and what they are called."""
    if [weights is not None, gaussian, laplace].count(True) != 1:
        raise DyBitError("give WEIGHTS, or --gaussian, or --laplace: exactly one of them")
    import torch

    if weights is None:
        generator = torch.Generator().manual_seed(0)
        if gaussian:
            return [
                torch.randn(_SYNTHETIC_SHAPE, generator=generator, dtype=torch.float32, device="cpu")
            ], "Gaussian samples"
        uniform = torch.rand(_SYNTHETIC_SHAPE, generator=generator, dtype=torch.float64, device="cpu") - 0.5
        return [(-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()], "Laplacian samples"
    from dybit.layers.kinds import Layout, layout, weight_names
    from dybit.tensors.encoding import check_weight
    from dybit.tensors.quantized_tensor import TensorSpec

    found: dict[str, tuple[Tensor, Layout]] = {}
    if sources.is_reference(weights):
        model = sources.load_model(weights, "WEIGHTS")
        for layer, module in model.named_modules():
            for name in weight_names(module):
                found[f"{layer}.{name}".lstrip(".")] = getattr(module, name).detach(), layout(module)
        from fnmatch import fnmatchcase

        found = {name: value for name, value in found.items() if fnmatchcase(name, pattern)}
    else:
        tensors = sources.read_safetensors(weights, "WEIGHTS", pattern)
        found = {
            name: (tensor, Layout(transposed=0, row_dims=1))
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
    matrices = []
    for name, (tensor, shape) in found.items():
        if 2 <= tensor.ndim <= 5:
            try:
                check_weight(tensor)
            except DyBitError as error:
                raise DyBitError(f"WEIGHTS {weights!r}, tensor {name!r}: {error}") from None
            matrices.append(TensorSpec("s4", tuple(tensor.shape), **shape).to_matrix(tensor.float()))
    if not matrices:
        raise DyBitError(
            f"WEIGHTS {weights!r} has no floating-point tensor of 2 to 5 dimensions that matches {pattern!r}"
        )
    return matrices, Path(weights).name


def _row(place: int, result: Result) -> list[str]:
    single = len(result.family.books) == 1
    used = "" if single else f"{result.most_used.name} {result.share:.0%}"
    if result.kind == "bound":
        used = "fitted to these weights"
    elif result.family.group_size:
        used = f"own groups of {result.family.group_size}, {result.setting.scale}"
    elif result.family.scale:
        used = f"{used} (own scale {result.setting.scale})".strip()
    name = "Lloyd-Max (bound)" if result.kind == "bound" else result.family.name
    return [
        "" if result.kind == "bound" else str(place),
        name,
        f"{result.sqnr:.2f}",
        f"{result.bits:.3f}",
        str(result.family.bits),
        f"{result.scale_bits:.3f}",
        f"{result.choice_bits:.3f}",
        used,
    ]


def _ranked(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    rows, place = [], 0
    for result in results:
        place += result.kind != "bound"
        rows.append((result.kind, _row(place, result)))
    return rows


def _print(results: Sequence[Result], title: str, subtitle: str) -> None:
    console = out()
    console.print(Text(title, style="bold"))
    console.print(Text(subtitle, style="dim"), soft_wrap=True)
    shown = grid(*_COLUMNS)
    for kind, cells in _ranked(results):
        shown.add_row(*cells, style={"dybit": "bold yellow", "bound": "italic dim"}.get(kind, ""))
    console.print(shown)
    console.print(
        Text("Lloyd-Max: one table fitted to the weights; the bound for any format of one table.", style="dim"),
        soft_wrap=True,
    )


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["format", "kind", "sqnr_db", "bits_per_weight", "code_bits", "scale_bits", "choice_bits",
                         "granularity", "group_size", "scale"])  # fmt: skip
        for result in results:
            own = result.setting
            writer.writerow([result.family.name, result.kind, repr(result.sqnr), repr(result.bits), result.family.bits,
                             repr(result.scale_bits), repr(result.choice_bits), own.granularity, own.group_size or "",
                             own.scale])  # fmt: skip


def picture_rows(results: Sequence[Result]) -> list[FormatRow]:
    """The best formats, a DyBit one among them, and the bound as rows of a picture."""
    from dybit.report import FormatRow

    named = [result for result in results if result.kind != "bound"]
    chosen = named[:_MAX_PICTURED]
    ours = next((result for result in named if result.kind == "dybit"), None)
    if ours is not None and ours not in chosen:
        chosen[-1] = ours
    chosen += [result for result in results if result.kind == "bound"]
    rows = []
    for result in chosen:
        name = "Lloyd-Max (bound)" if result.kind == "bound" else result.family.name
        single = len(result.family.books) == 1
        unit = result.setting.granularity
        detail = "" if single else f"{result.most_used.name}, the choice of {result.share:.0%} of {unit}s"
        levels = result.most_used.levels * result.unit
        rows.append(FormatRow(name, levels, f"{result.sqnr:.2f} dB", detail, result.kind))
    return rows


def draw(
    path: Path, matrices: Sequence[Tensor], results: Sequence[Result], setting: Setting, title: str, subtitle: str
) -> None:
    """Writes the picture, or the page with picture and table."""
    from dybit.measure.format_ranking import normalized
    from dybit.report import histogram, write_page
    from dybit.report.histogram import save, to_svg

    unit = {"group": "group", "channel": "channel", "tensor": "tensor"}[setting.granularity]
    figure = histogram(
        normalized(matrices, setting, _HISTOGRAM_SAMPLES),
        picture_rows(results),
        title,
        subtitle,
        xlabel=f"weight / root mean square of its {unit}",
    )
    if path.suffix.lower() not in _HTML:
        save(figure, path)
        return
    notes = [
        subtitle,
        "SQNR is pooled over all weights. Bits per weight count codes, scales and choices of table. Lloyd-Max is one "
        "table fitted to these weights: the bound for any format of one table.",
    ]
    write_page(path, title=title, notes=notes, svg=to_svg(figure), columns=_COLUMNS, rows=_ranked(results))
