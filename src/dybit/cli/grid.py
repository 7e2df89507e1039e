"""The grid behind ``dybit compare MODEL --data DATA``: formats, widths and algorithms on a whole model.

Every cell is a configuration in plain words, so that it can be
run in another process and its result be found again in a file.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dybit.cli import options, sources
from dybit.cli.console import grid, note, out, progress
from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.safe_files import check_regular, parse_json

if TYPE_CHECKING:
    from torch import nn

    from dybit.measure.fidelity import Kind, Reference

FORMATS = "int{},nf{},dybit{}"
_COLUMNS = ("format", "algorithm", ">bits/weight", ">SQNR dB", ">agreement", ">KL nats", ">Spearman", ">PPL", ">s")
_HTML = (".html", ".htm")
_NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A configuration: words of the command line only.

    Attributes:
        model: The model.
        data: The inputs that it is judged on.
        calibration: The inputs that it is calibrated on, or None.
        weights: The format; ``fp32`` for the original.
        algorithm: The chain of algorithms, names separated by commas.
        group_size: Weights that share a scale, or None.
        scale: Type of the scales.
        keep_embeddings: Whether embeddings stay in floating point.
        batches: How many batches of the data are used, or None for all.
        tokenizer: For text.
        batch_size: Inputs in a batch, for files of inputs.
    """

    model: str
    data: str
    calibration: str | None
    weights: str
    algorithm: str
    group_size: int | None
    scale: str | None
    keep_embeddings: bool
    batches: int | None
    tokenizer: str | None
    batch_size: int

    @property
    def key(self) -> str:
        """The key that identifies the cell."""
        return json.dumps(asdict(self), sort_keys=True)


def widths(words: str) -> list[int]:
    """Reads ``"2,3,4"``.

    Raises:
        DyBitError: It is no list of widths.
    """
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        raise DyBitError(f"--bits must be widths separated by commas, not {words!r}") from None
    bad = [bits for bits in found if not 2 <= bits <= 8]
    if bad:
        raise DyBitError(f"--bits must be 2 to 8, not {bad[0]}")
    return list(dict.fromkeys(found))


def formats(words: str | None, bits: Sequence[int]) -> list[str]:
    """The names of formats: every name with ``{}`` at every width, others as they are.

    Raises:
        DyBitError: A format is unknown.
    """
    named = [word.strip() for word in (words or FORMATS).split(",") if word.strip()]
    if not named:
        raise DyBitError(f"--formats must name at least one format, not {words!r}")
    found = []
    for width in bits:
        found += [word.replace("{}", str(width)) for word in named if "{}" in word]
    found += [word for word in named if "{}" not in word]
    return ["fp32", *(catalogue.family(name).name for name in dict.fromkeys(found))]


def run(cells: Sequence[Cell], results: Path | None, workers: int) -> list[tuple[Cell, dict[str, Any]]]:
    """Runs cells, those that are not in the file of results already.

    Args:
        cells: The configurations.
        results: A file of JSON lines: what is in it is not run again, what is run is added.
        workers: Processes; 1 stays in this one.

    Raises:
        DyBitError: A cell fails, or the file cannot be read.
    """
    known = _read(results)
    missing = [cell for cell in dict.fromkeys(cells) if cell.key not in known]
    if len(missing) < len(cells):
        note(f"{len(cells) - len(missing)} of {len(cells)} results are already in {results}")
    with progress("comparing", len(missing)) as bar:
        for count, (cell, values) in enumerate(_run_all(missing, workers), start=1):
            known[cell.key] = values
            if results is not None:
                with results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"cell": asdict(cell), "values": values}) + "\n")
            bar.update(count, text=f"{cell.weights} {cell.algorithm}")
    return [(cell, known[cell.key]) for cell in cells]


def _run_all(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, measure(cell)
        return
    import multiprocessing

    # A process that was forked from one with threads, as torch has, may wait for ever.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        yield from _submit(cells, executor)


def _submit(cells: Sequence[Cell], executor: Executor) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Results as they come; what has not begun when one fails is not run."""
    futures: dict[Future[dict[str, Any]], Cell] = {executor.submit(measure, cell): cell for cell in cells}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """The results in a file, by key; a last line that was cut off is left out."""
    if path is None or not path.exists():
        return {}
    known = {}
    lines = check_regular(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line, "a result")
            known[json.dumps(entry["cell"], sort_keys=True)] = entry["values"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")
                continue
            raise DyBitError(f"--results {str(path)!r}, line {number}, is not a result") from None
    return known


def measure(cell: Cell) -> dict[str, Any]:
    """Quantizes a model by a configuration and judges it: the measures by name, as JSON values."""
    from dybit.cli.evaluate import quantized_copy
    from dybit.layers.quantized import quantized_layers
    from dybit.models.preparation import dequantize_

    original, reference, batches = _loaded(
        cell.model, cell.data, cell.calibration, cell.batches, cell.tokenizer, cell.batch_size
    )
    if cell.weights == "fp32":
        fidelity, seconds, stored = reference.fidelity, 0.0, 32.0
    else:
        recipe = options.make_recipe(
            None,
            weights=cell.weights,
            group_size=cell.group_size,
            scale=cell.scale,
            embeddings="none" if cell.keep_embeddings else None,
        )
        chain = cell.algorithm if cell.algorithm == "auto" else cell.algorithm.split(",")
        model, seconds = quantized_copy(original, recipe, batches, None, cell.weights, chain)
        specs = [spec for layer in quantized_layers(model).values() for spec in layer.weight_specs.values()]
        specs = [spec for spec in specs if spec.family == catalogue.family(cell.weights).name]
        stored = 8 * sum(spec.nbytes for spec in specs) / sum(math.prod(spec.shape) for spec in specs)
        fidelity = reference.judge(dequantize_(model))
    values = {name: value for name, value in asdict(fidelity).items() if name != "outputs"}
    values["sqnr"] = None if math.isinf(values["sqnr"]) else values["sqnr"]
    return {**values, "kind": reference.kind, "bits": stored, "seconds": seconds}


@lru_cache(maxsize=1)
def _loaded(
    model: str, data: str, calibration: str | None, limit: int | None, tokenizer: str | None, batch_size: int
) -> tuple[nn.Module, Reference, list[Any] | None]:
    """The model, its outputs, and the calibration batches: once in a process."""
    from dybit.measure.fidelity import Reference

    original = sources.load_model(model)
    more: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "batch_size": batch_size}
    inputs = sources.load_batches(data, "--data", split="evaluation", limit=limit, **more)
    batches = None
    if calibration is not None:
        batches = sources.load_batches(calibration, "--calibration", split="calibration", **more)
    return original, Reference(original, inputs), batches


def show(found: Sequence[tuple[Cell, dict[str, Any]]], title: str) -> None:
    """Prints the table."""
    columns, rows = _table(found)
    shown = grid(*columns)
    for (cell, _), texts in zip(found, rows, strict=True):
        shown.add_row(*texts, style="bold yellow" if "dybit" in cell.weights else "")
    console = out()
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(shown)
    console.print(
        Text("Bits per weight count codes, scales and choices of variants; compare at equal ones.", style="dim"),
        soft_wrap=True,
    )


def _table(found: Sequence[tuple[Cell, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows, without the measures that this kind of model does not have."""
    rows = [_cells(cell, values) for cell, values in found]
    kept = [place for place, texts in enumerate(zip(*rows, strict=True)) if set(texts) != {_NONE}]
    return [_COLUMNS[place] for place in kept], [[texts[place] for place in kept] for texts in rows]


def _cells(cell: Cell, values: dict[str, Any]) -> list[str]:
    original = cell.weights == "fp32"
    numbers = [("bits", ".3f"), ("sqnr", ".2f"), ("agreement", ".3f"), ("kl", ".4f"), ("spearman", ".4f")]
    numbers += [("perplexity", ".3f"), ("seconds", ".0f")]
    texts = [_NONE if values[name] is None else format(values[name], form) for name, form in numbers]
    if original:
        texts[1] = "∞"
    return [cell.weights, "" if original else cell.algorithm, *texts]


def write_csv(path: Path, found: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Writes configurations and measures."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = [{**asdict(cell), **values} for cell, values in found]
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_page(path: Path, found: Sequence[tuple[Cell, dict[str, Any]]], title: str) -> None:
    """Writes a picture of error against bits, or a page of it and the table."""
    from dybit.report import curves
    from dybit.report import write_page as write
    from dybit.report.histogram import save, to_svg

    kind: Kind = found[0][1]["kind"]
    name, label = ("kl", "KL divergence from FP32, nats") if kind == "logits" else ("sqnr", "SQNR of outputs, dB")
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for cell, values in found:
        if cell.weights != "fp32" and values[name] is not None:
            stem = "".join(c for c in cell.weights if not c.isdigit())
            point = values["bits"], values[name], cell.weights
            lines.setdefault(f"{stem} {cell.algorithm}", []).append(point)
    page = path.suffix.lower() in _HTML  # which has the title itself
    across = "bits per weight, scales and choices counted"
    figure = curves(lines, "" if page else title, across, label, logarithmic=name == "kl")
    if not page:
        save(figure, path)
        return
    columns, texts = _table(found)
    rows = [("dybit" if "dybit" in cell.weights else "", row) for (cell, _), row in zip(found, texts, strict=True)]
    notes = ["Bits per weight count codes, scales and choices of variants. Compare formats at equal ones."]
    write(path, title=title, notes=notes, svg=to_svg(figure), columns=columns, rows=rows)
