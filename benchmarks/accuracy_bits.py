"""Accuracy against bits: the sentence encoder MiniLM-L6 with weights of 2 to 8 bits in DyBit and in other formats.

The recipe is the default one but for the format of the weights: a scale for every output channel, chosen by least
squared error weighted with the inputs of calibration, rounding to nearest, inputs in floating point, embeddings in
DyBit of 8 bits. All formats get the same search of scales and the same calibration. Of the widths of exponents that
minifloats and posits may have, the best at each number of bits is drawn. Accuracy is the rank correlation (Spearman)
of the similarities of all pairs of paragraphs with those in FP32, on text that was not calibrated on. The picture is
drawn from the rows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from results import ROOT, Column, Results, parser
from torch import nn

from dybit import Recipe, quantize_
from dybit.demo import minilm, minilm_batches
from dybit.measure.fidelity import Reference

BITS = (2, 3, 4, 5, 6, 8)
# By the name of a line, the formats of a width. DyBit's default family, which chooses among its variants, is the width.
FORMATS: dict[str, dict[int, tuple[int | str, ...]]] = {
    "DyBit": {bits: (bits,) for bits in BITS},
    "NF": {bits: (f"nf{bits}",) for bits in BITS},
    "minifloat": {
        3: ("e2m0",), 4: ("e2m1", "e3m0"), 5: ("e2m2", "e3m1"), 6: ("e2m3", "e3m2"), 8: ("e2m5", "e3m4", "e4m3fn"),
    },
    "posit": {bits: (f"posit{bits}es0", f"posit{bits}es1") for bits in BITS if bits > 2},
    "INT": {bits: (f"int{bits}",) for bits in BITS},
}  # fmt: skip
COLOURS = {"DyBit": "#c2410c", "NF": "#2f6690", "minifloat": "#2f855a", "posit": "#8064a2", "INT": "#7b8794"}
COLUMNS = (
    Column("line", "format"),
    Column("bits", "bits"),
    Column("weights", "weights"),
    Column("spearman", "Spearman", 5),
    Column("agreement", "same nearest neighbour", 1, " %"),
    Column("sqnr", "SQNR, dB"),
)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    reader.add_argument("--calibration", type=int, default=8, help="batches of 16 paragraphs")
    reader.add_argument("--evaluation", type=int, default=8, help="batches of 16 paragraphs")
    reader.add_argument("--picture", type=Path, default=ROOT / "docs" / "accuracy_bits.png")
    options = reader.parse_args()
    cases = [
        (line, bits, form) for bits in options.bits for line, forms in FORMATS.items() for form in forms.get(bits, ())
    ]
    recipes = {"DyBit": Recipe(weights=4), "others": Recipe(weights="nf4")}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results:
        todo = [case for case in cases if not results.has(bits=case[1], weights=str(case[2]))]
        if todo:
            model = minilm()
            calibration = minilm_batches(batches=options.calibration)
            with Reference(model, minilm_batches("evaluation", batches=options.evaluation)) as reference:
                for line, bits, form in todo:
                    row = measure(model, Recipe(weights=form), calibration, reference)
                    results.add(line=line, bits=bits, weights=str(form), **row)
        draw(results.rows, options.picture)


def measure(model: nn.Module, recipe: Recipe, calibration: list[Any], reference: Reference) -> dict[str, float | None]:
    """The accuracy of one format."""
    found = reference.judge(quantize_(copy.deepcopy(model), recipe, calibration))
    agreement = None if found.agreement is None else 100 * found.agreement
    return {"spearman": found.spearman, "agreement": agreement, "sqnr": found.sqnr}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws a line for each kind of format, through the best format of every width."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    figure = Figure(figsize=(8.6, 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        line = best.setdefault(row["line"], {})
        line[row["bits"]] = max(row["spearman"], line.get(row["bits"], -1.0))
    for name in reversed(FORMATS):  # DyBit is drawn last, above the others
        points = sorted(best.get(name, {}).items())
        ours = name == "DyBit"
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name, linewidth=2.6 if ours else 1.6,
                  markersize=6 if ours else 4.5)  # fmt: skip
    axes.set_yscale("logit")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    _decorate(axes, {row["bits"] for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": "dybit"})
    print(f"picture: {path}")


def _decorate(axes: Any, bits: set[int]) -> None:
    """Title, axes and legend."""
    ink, grey, light = "#1f2933", "#52606d", "#e4e7eb"
    axes.set_title("MiniLM-L6 with narrow weights, rounded to nearest", loc="left", size=13, weight="bold", color=ink)
    axes.set_xlabel("bits per weight (a scale for every output channel)", color=ink, size=11)
    axes.set_ylabel("rank correlation with FP32", color=ink, size=11)
    axes.set_xticks(sorted(bits))
    axes.grid(color=light, linewidth=0.9)
    axes.tick_params(colors=grey, labelsize=10)
    for spine in axes.spines.values():
        spine.set_color(light)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=11, loc="lower right")


if __name__ == "__main__":
    main()
