"""The table of layers that ``quantize`` and ``info`` print, and the observer of quantization that fills it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dybit.cli.console import Bar, grid, note, out, size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dybit.layers.input_spec import InputSpec
    from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_WIDE = 120  # columns of a terminal that shows everything
_NARROW_NAME = 26


@dataclass(frozen=True)
class LayerRow:
    """A quantized weight, or a layer whose inputs only are quantized (``spec`` is None).

    Attributes:
        name: Qualified name of the layer, with the weight's where it is not ``weight``.
        spec: How the weight is stored.
        inputs: How inputs are rounded.
        shares: The share of units of every codebook, most used first.
        sqnr: Of the weight, dB; None without the original.
        tied: Whether the weight was counted before, under another name.
    """

    name: str
    spec: TensorSpec | None
    inputs: InputSpec | None = None
    shares: tuple[tuple[str, float], ...] = ()
    sqnr: float | None = None
    tied: bool = False


def row(
    name: str, weight: QuantizedTensor, original: Tensor | None, inputs: InputSpec | None, tied: bool = False
) -> LayerRow:
    """Makes the row of a quantized weight.

    Args:
        name: What it is called.
        weight: Codes and scales.
        original: The floating-point weight, to measure the error.
        inputs: How inputs are rounded.
        tied: Whether the weight was counted before.
    """
    import torch

    books = weight.spec.formats.books
    choices = weight.choices()
    counts = Counter({0: 1})
    if choices is not None:
        votes = torch.bincount(choices.flatten().long(), minlength=len(books)).tolist()
        counts = Counter({index: votes[index] for index in range(len(books)) if votes[index]})
    total = sum(counts.values())
    shares = tuple((books[index].name, count / total) for index, count in counts.most_common())
    return LayerRow(name, weight.spec, inputs, shares, None if original is None else _sqnr(original, weight), tied)


def _sqnr(original: Tensor, weight: QuantizedTensor) -> float:
    wide = original.detach().double()
    signal, noise = float(wide.square().sum()), float((weight.dequantize().double() - wide).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


class Watch:
    """Follows ``quantize_`` by its progress calls, and measures every layer when the next one begins.

    The weight that counts is the one just before rounding, after a batch norm was folded into it; keeping a reference
    to it until the layer is done costs no copy of the model.

    Args:
        model: The model that is being quantized.
        bar: Where to show the progress, or None.
        measure: Whether to make rows.
    """

    def __init__(self, model: nn.Module, bar: Bar | None, measure: bool = True) -> None:
        self.rows: list[LayerRow] = []
        self._model, self._bar, self._measure = model, bar, measure
        self._pending: tuple[str, dict[str, Tensor]] | None = None
        self._known: set[int] = set()

    def __call__(self, done: int, total: int, text: str) -> None:
        """Called by ``quantize_`` before every layer, after the last, and with lines about calibration."""
        if self._bar is not None:
            self._bar.update(done, total, text)
        if self._measure:
            self._finish()
            if done < total:
                self._begin(text)

    def _begin(self, name: str) -> None:
        from dybit.layers.kinds import weight_names
        from dybit.layers.quantized import Quantized

        try:
            module = self._model.get_submodule(name)
        except AttributeError:  # a line about something else, such as calibration
            return
        if isinstance(module, Quantized):
            return
        self._pending = name, {key: getattr(module, key) for key in weight_names(module)}

    def _finish(self) -> None:
        from typing import cast

        from dybit.layers.quantized import Quantized

        if self._pending is None:
            return
        name, originals = self._pending
        self._pending = None
        layer = cast(Quantized, self._model.get_submodule(name))
        for key, original in originals.items():
            shown = (name or "(model)") if key == "weight" else f"{name}.{key}".lstrip(".")
            if key not in layer.weight_specs:
                self.rows.append(LayerRow(shown, None, layer.input_spec))
                continue
            weight = layer.quantized_tensor(key)
            tied = id(layer._buffers[key]) in self._known
            self._known.add(id(layer._buffers[key]))
            self.rows.append(row(shown, weight, original, layer.input_spec, tied))


def print_layers(rows: Iterable[LayerRow], limit: int | None = None) -> None:
    """Prints a table of layers to stdout; a narrow terminal gets the most important columns."""
    rows = list(rows)
    console = out()
    narrow = console.width < _WIDE
    cells = [_cells(item, narrow) for item in rows]
    names = [
        "layer",
        ">bits",
        "format",
        "scales",
        "variants (share of scales)",
        ">SQNR dB",
        "inputs",
        ">bytes",
        ">ratio",
    ]
    shown = [any(row[index] for row in cells) for index in range(len(names))]
    if narrow:
        shown[2], shown[3] = shown[2] and not shown[4], False
        names[4], names[5] = "variant", ">dB"
    table = grid(*(name for name, keep in zip(names, shown, strict=True) if keep))
    for row in cells[:limit]:
        table.add_row(*(cell for cell, keep in zip(row, shown, strict=True) if keep))
    console.print(table)
    if limit is not None and len(rows) > limit:
        note(f"… and {len(rows) - limit} more layers; --all shows them")


def _cells(item: LayerRow, narrow: bool) -> list[str]:
    """Layer, bits, format, scales, variants, SQNR, inputs, bytes, ratio."""
    name = item.name
    if narrow and len(name) > _NARROW_NAME:  # the end of a qualified name says more
        name = "…" + name[1 - _NARROW_NAME :]
    inputs = "fp32"
    if item.inputs is not None:
        words = [item.inputs.format, "dynamic" * (item.inputs.mode == "dynamic"), "offset" * item.inputs.offset]
        inputs = words[0] + "+" * item.inputs.offset if narrow else " ".join(word for word in words if word)
    spec = item.spec
    if spec is None:
        return [name, "32", "fp32", "", "", "", inputs, "", ""]
    unit = f"group {spec.group_size}" if spec.group_size else spec.granularity
    scales = unit if spec.scale == "fp32" else f"{unit} {spec.scale}"
    variants = " ".join(f"{book} {share:.0%}" for book, share in item.shares[: 1 if narrow else 3])
    sqnr = "" if item.sqnr is None else f"{item.sqnr:.1f}"
    ratio = f"{4 * math.prod(spec.shape) / spec.nbytes:.2f}"
    sizes = ["tied", ""] if item.tied else [size(spec.nbytes), ratio]
    return [name, str(spec.bits), spec.family, scales, variants, sqnr, inputs, *sizes]


def disk_bytes(folder: Path) -> int:
    """Bytes of the files in a checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir())


def print_totals(fp32: float, stored: float, what: str = "size on disk") -> None:
    """Prints the sizes to stdout."""
    out().print(f"FP32 size {size(fp32)}, {what} {size(stored)}, ratio {fp32 / stored:.2f}", soft_wrap=True)
