"""``dybit compare``: formats of one width ranked by their error on weights.

Must not know models' forward passes nor checkpoints.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from rich.text import Text

from dybit import rivals
from dybit.cli import sources
from dybit.cli.console import grid, guarded, note, out, progress
from dybit.codec import SCALE_BITS, Codebook, Family, ScaleType, Table
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from dybit.report import FormatRow
    from dybit.scale import Scales

_SYNTHETIC_SHAPE = (256, 2048)
_BOUND_WEIGHTS = 1 << 21  # that the bound is fitted to
_BOUND_ROUNDS = 10
_HISTOGRAM_SAMPLES = 1 << 20
_MAX_PICTURED = 8
_HTML = (".html", ".htm")
_COLUMNS = (">#", "format", ">SQNR dB", ">bits/weight", ">code", ">scale", ">choice", "most used")


@dataclass(frozen=True)
class Setting:
    """What all formats of a comparison share, unless a format prescribes its own.

    Attributes:
        granularity: ``tensor``, ``channel`` or ``group``.
        group_size: Weights in a group, or None.
        scale: Type of the scales.
        method: How scales are chosen.
    """

    granularity: Literal["tensor", "channel", "group"]
    group_size: int | None
    scale: ScaleType
    method: Literal["mse", "absmax", "percentile"]

    def of(self, family: Family) -> Setting:
        """The setting of a format, with what it prescribes."""
        size = family.group_size or self.group_size
        granularity = "group" if family.group_size else self.granularity
        return Setting(granularity, size, family.scale or self.scale, self.method)


@dataclass(frozen=True)
class Result:
    """How a format did.

    Attributes:
        family: The format.
        sqnr: Pooled over all weights, dB.
        scale_bits: Bits of scales, per weight.
        choice_bits: Bits of choices among codebooks, per weight.
        most_used: The codebook that most units chose.
        share: The share of units that did.
        unit: Its typical scale there, in root mean squares of the unit; negative where most scales are.
        setting: With what it was measured.
        kind: ``dybit``, ``rival`` or ``bound``.
    """

    family: Family
    sqnr: float
    scale_bits: float
    choice_bits: float
    most_used: Codebook
    share: float
    unit: float
    setting: Setting
    kind: str

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return self.family.bits + self.scale_bits + self.choice_bits


@guarded
def compare(
    weights: Annotated[
        str | None,
        typer.Argument(metavar="[WEIGHTS]", help="A .safetensors file, or module:function returning an nn.Module."),
    ] = None,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="Gaussian samples instead of weights.")] = False,
    laplace: Annotated[bool, typer.Option("--laplace", help="Laplacian samples instead of weights.")] = False,
    bits: Annotated[int, typer.Option(help="Width of the codes, 2 to 8 bits.")] = 4,
    formats: Annotated[
        str | None, typer.Option(help="Names separated by commas; default: all that are known at this width.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; else per channel.")] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="One scale for a tensor.")] = False,
    scale: Annotated[str, typer.Option(help="Type of the scales: fp32, bf16, pow2 or e4m3.")] = "fp32",
    method: Annotated[str, typer.Option(help="How scales are chosen: mse, absmax or percentile.")] = "mse",
    tensors: Annotated[str, typer.Option(metavar="GLOB", help="Which tensors, by name.")] = "*",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Picture (.png, .svg) or page (.html).")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="The table as CSV.")] = None,
) -> None:
    """Rank formats by their signal-to-quantization-noise ratio (SQNR, in dB, higher is better) on weights.

    All floating-point tensors of two or more dimensions are pooled. Formats that prescribe a group size or a type of
    scale (mxfp4, nvfp4) use theirs; compare the column of bits per weight.

    Example: dybit compare dybit.demo:minilm --tensors "*.dense.weight" --group-size 128 -o levels.png
    """
    if method not in ("mse", "absmax", "percentile"):
        raise DyBitError(f"--method must be mse, absmax or percentile, not {method!r}")
    if scale not in SCALE_BITS:
        raise DyBitError(f"--scale must be one of {', '.join(SCALE_BITS)}, not {scale!r}")
    if group_size is not None and (per_tensor or group_size < 1):
        raise DyBitError(f"--group-size {group_size} must be at least 1 and without --per-tensor")
    families = _families(bits, formats)
    for path in (output, csv_file):
        _check_output(path, page=path is output)
    granularity: Any = "group" if group_size else "tensor" if per_tensor else "channel"
    setting = Setting(granularity, group_size, scale, method)  # type: ignore[arg-type]
    matrices, name = _weights(weights, gaussian, laplace, tensors)
    results = measure(matrices, families, setting, bits)
    count = sum(matrix.numel() for matrix in matrices)
    unit = f"group of {group_size}" if group_size else "output channel" if granularity == "channel" else "tensor"
    tensors_word = "tensor" if len(matrices) == 1 else "tensors"
    title = f"{bits}-bit formats on {name}"
    subtitle = f"{len(matrices)} {tensors_word}, {count:,} weights; one {scale} scale per {unit}, chosen by {method}"
    _print(results, title, subtitle)
    if csv_file:
        _write_csv(csv_file, results)
    if output:
        draw(output, matrices, results, setting, title, subtitle)
    for path in (csv_file, output):
        if path:
            note(f"wrote {path}")


def _families(bits: int, formats: str | None) -> list[Family]:
    if formats is None:
        return list(rivals.families(bits))
    words = [word.strip() for word in formats.split(",") if word.strip()]
    if not words:
        raise DyBitError(f"--formats must name at least one format, not {formats!r}")
    return [rivals.family(word) for word in dict.fromkeys(words)]


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
            return [torch.randn(_SYNTHETIC_SHAPE, generator=generator)], "Gaussian samples"
        uniform = torch.rand(_SYNTHETIC_SHAPE, generator=generator, dtype=torch.float64) - 0.5
        return [(-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()], "Laplacian samples"
    from dybit.layers import transposed, weight_names
    from dybit.tensor import TensorSpec, check_weight

    found: dict[str, tuple[Tensor, int]] = {}
    if sources.is_reference(weights):
        model = sources.load_model(weights, "WEIGHTS")
        for layer, module in model.named_modules():
            for name in weight_names(module):
                found[f"{layer}.{name}".lstrip(".")] = getattr(module, name).detach(), transposed(module)
        from fnmatch import fnmatchcase

        found = {name: value for name, value in found.items() if fnmatchcase(name, pattern)}
    else:
        tensors = sources.read_safetensors(weights, "WEIGHTS", pattern)
        found = {name: (tensor, 0) for name, tensor in tensors.items() if tensor.is_floating_point()}
    matrices = []
    for name, (tensor, groups) in found.items():
        if 2 <= tensor.ndim <= 5:
            try:
                check_weight(tensor)
            except DyBitError as error:
                raise DyBitError(f"WEIGHTS {weights!r}, tensor {name!r}: {error}") from None
            matrices.append(TensorSpec("s4", tuple(tensor.shape), transposed=groups).to_matrix(tensor.float()))
    if not matrices:
        raise DyBitError(
            f"WEIGHTS {weights!r} has no floating-point tensor of 2 to 5 dimensions that matches {pattern!r}"
        )
    return matrices, Path(weights).name


def measure(matrices: Sequence[Tensor], families: Sequence[Family], setting: Setting, bits: int) -> list[Result]:
    """Measures formats and the Lloyd-Max bound of a width, best first.

    Args:
        matrices: Weights of shape (rows, columns), rows being output channels.
        families: The formats.
        setting: What they share.
        bits: Width of the bound.
    """
    results = []
    total = (len(families) + 1) * sum(matrix.numel() for matrix in matrices)
    with progress("comparing", total) as bar:
        done = 0

        def step(count: int, text: str) -> None:
            nonlocal done
            done += count
            bar.update(done, text=text)

        for family in families:
            name = family.name
            ours = "dybit" if "dybit" in name or (name[:1] in "su" and name[1:2].isdigit()) else "rival"
            results.append(_measure(matrices, family, setting, ours, step))
        bar.update(done, text="Lloyd-Max")
        singles = [
            r for r in results if len(r.family.books) == 1 and r.family.group_size is None and r.family.bits == bits
        ]
        start = max(singles, key=lambda result: result.sqnr).most_used if singles else None
        bound = _lloyd(matrices, setting, bits, start)
        if bound is not None:
            results.append(_measure(matrices, bound, setting, "bound", step))
    return sorted(results, key=lambda result: -result.sqnr)


def _scales(matrix: Tensor, family: Family, setting: Setting) -> Scales:
    from dybit.scale import choose_scales

    return choose_scales(
        matrix,
        family,
        granularity=setting.granularity,
        group_size=setting.group_size,
        scale_type=setting.scale,
        method=setting.method,
    )


def _measure(
    matrices: Sequence[Tensor], family: Family, setting: Setting, kind: str, step: Callable[[int, str], None]
) -> Result:
    import torch

    own = setting.of(family)
    signal = noise = 0.0
    scales_count = weights_count = tensors_bits = 0
    votes = torch.zeros(len(family.books), dtype=torch.int64)
    ratios: list[Tensor] = []
    owners: list[Tensor] = []
    for matrix in matrices:
        step(0, family.name)
        found = _scales(matrix, family, own)
        signal += float(matrix.double().square().sum())
        noise += found.error
        scales_count += found.scale.numel()
        weights_count += matrix.numel()
        tensors_bits += 32 if own.scale == "e4m3" else 0
        choice = torch.zeros_like(found.scale, dtype=torch.int64) if found.choice is None else found.choice.long()
        votes += torch.bincount(choice.flatten(), minlength=len(votes))
        ratios.append((found.scale / _unit_rms(matrix, own)).flatten())
        owners.append(choice.flatten())
        step(matrix.numel(), family.name)
    best = int(votes.argmax())
    units = torch.cat(ratios)[torch.cat(owners) == best]
    sign = -1.0 if float((units < 0).double().mean()) > 0.5 else 1.0
    return Result(
        family=family,
        sqnr=10 * math.log10(signal / noise) if noise and signal else math.inf,
        scale_bits=(scales_count * SCALE_BITS[own.scale] + tensors_bits) / weights_count,
        choice_bits=scales_count * family.choice_bits / weights_count,
        most_used=family.books[best],
        share=float(votes[best]) / scales_count,
        unit=sign * float(units.abs().median()),
        setting=own,
        kind=kind,
    )


def _unit_rms(matrix: Tensor, setting: Setting) -> Tensor:
    """Root mean square of every unit that shares a scale: shape (1, 1), (rows, 1) or (rows, groups); never zero."""
    import torch

    square = matrix.float().square()
    if setting.granularity == "tensor":
        mean = square.mean().view(1, 1)
    elif setting.granularity == "channel":
        mean = square.mean(1, keepdim=True)
    else:
        parts = square.split(setting.group_size or square.shape[1], dim=1)
        mean = torch.stack([part.mean(1) for part in parts], dim=1)
    return torch.where(mean > 0, mean, 1.0).sqrt()


def _spread(unit: Tensor, matrix: Tensor, setting: Setting) -> Tensor:
    """A number of every unit, for every element where units are groups; broadcasts against the matrix."""
    if setting.granularity != "group":
        return unit
    return unit.repeat_interleave(setting.group_size or matrix.shape[1], dim=1)[:, : matrix.shape[1]]


def normalized(matrices: Sequence[Tensor], setting: Setting, limit: int) -> NDArray[np.float64]:
    """About ``limit`` weights, evenly drawn, each divided by the root mean square of its unit: float64 (samples,)."""
    import torch

    total = sum(matrix.numel() for matrix in matrices)
    samples = []
    for matrix in matrices:
        ratio = matrix / _spread(_unit_rms(matrix, setting), matrix, setting)
        wanted = max(1, round(limit * matrix.numel() / total))
        index = torch.linspace(0, matrix.numel() - 1, min(wanted, matrix.numel()), dtype=torch.float64).long()
        samples.append(ratio.reshape(-1)[index].double())
    return torch.cat(samples).numpy()


def _lloyd(matrices: Sequence[Tensor], setting: Setting, bits: int, start: Codebook | None) -> Family | None:
    """The best single table for these weights, as a format; None where they have too few values.

    Table and scales depend on each other, so they are fitted in turns (Lloyd's algorithm, the error of a unit counting
    by the square of its scale). No turn makes the error larger; so it begins at the best table that is known.

    Args:
        matrices: The weights.
        setting: Granularity and scales.
        bits: Width of the table.
        start: The best single table of the comparison, if any.
    """
    share = min(1.0, _BOUND_WEIGHTS / sum(matrix.numel() for matrix in matrices))
    fitted = [_sampled_rows(matrix, share) for matrix in matrices]
    best: tuple[float, Family] | None = None
    try:
        fresh = rivals.lloyd_max(normalized([matrix for matrix, _ in fitted], setting, _BOUND_WEIGHTS), bits)
    except DyBitError:
        return None
    for book in (fresh, start):
        for _ in range(_BOUND_ROUNDS if book is not None else 0):
            assert book is not None
            family = Family(f"lloyd{bits}", (book,))
            error, updated = _lloyd_turn(fitted, family, setting)
            if best is None or error < best[0]:
                best = error, family
            if updated is None:
                break
            book = updated
    return best and best[1]


def _sampled_rows(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Some rows, and how many each stands for, (rows, 1): few rows with outliers may carry most of the error.

    Half of the sample are the rows with the largest norms, the others every so many of the rest.
    """
    import torch

    order = matrix.norm(dim=1).argsort(descending=True)
    sure = min(len(order), math.ceil(len(order) * share / 2))
    every = max(1, round((len(order) - sure) / max(1, len(order) * share / 2)))
    rest = order[sure + every // 2 :: every]
    counts = torch.cat([torch.ones(sure), torch.full((len(rest),), (len(order) - sure) / max(1, len(rest)))])
    return matrix[torch.cat([order[:sure], rest])], counts[:, None]


def _lloyd_turn(
    matrices: Sequence[tuple[Tensor, Tensor]], family: Family, setting: Setting
) -> tuple[float, Codebook | None]:
    """The error of a table at its best scales, and the table that is best for the codes at these scales.

    The latter is None where two of its levels would be the same.
    """
    import torch

    from dybit.ops import lookup

    table = lookup(family.books[0], torch.device("cpu"))
    count = len(table.levels)
    error, products, squares = 0.0, torch.zeros(count).double(), torch.zeros(count).double()
    for matrix, counts in matrices:
        found = _scales(matrix, family, setting)
        scale = _spread(found.scale, matrix, setting)
        level = table.nearest(matrix / scale)
        value = table.levels[level.long()]
        error += float(((matrix - value * scale).square() * counts).sum(dtype=torch.float64))
        level = level.flatten().long()
        products += torch.bincount(level, (matrix * scale * counts).flatten().double(), count)
        squares += torch.bincount(level, (scale.square() * counts).expand(matrix.shape).flatten().double(), count)
    levels = torch.where(squares > 0, products / squares, table.levels.double())
    values = np.full(1 << family.bits, np.nan)
    values[:count] = levels.sort().values.numpy()
    return error, Table("lloyd", values) if len(np.unique(values[:count])) == count else None


def _row(place: int, result: Result) -> list[str]:
    single = len(result.family.books) == 1
    used = "" if single else f"{result.most_used.name} {result.share:.0%}"
    if result.kind == "bound":
        used = "fitted to these weights"
    elif result.family.group_size:
        used = f"own groups of {result.family.group_size}, {result.setting.scale}"
    elif result.family.scale:
        used = f"{used} (own scale {result.setting.scale})".strip()
    name = "Lloyd-Max" if result.kind == "bound" else result.family.name
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
        name = "Lloyd-Max" if result.kind == "bound" else result.family.name
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
