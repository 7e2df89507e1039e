"""Formats of 8-bit inputs: accuracy and speed of INT8, INT8 in groups, and tapered DyBit.

Weights have 4 bits, rounded to nearest, the same in all rows of a model. ``8`` stands for DyBit of 8 bits, whose
variant calibration chooses for each layer. Static inputs have a scale for each tensor, dynamic ones for each token (for
each image in convolutions) or for each group of columns. The first SQNR compares with FP32, the second with the same
weights and inputs in FP32: it shows the error of the inputs alone.

MiniLM: rank correlation (Spearman) of similarities of pairs of paragraphs with those of FP32. SmolLM2: KL divergence
of its predictions from those of FP32, over sequences of 512 tokens. EfficientNet-Lite0: same top class as FP32, over
crops. ResNet-18 has random weights. ± is the standard error. The column behind the measure is paired: how far it
is above that of the first row. Times are medians of paired turns, fused, for the first batch.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from forward_memory import fused
from networks import resnet18, settle
from ptq_sentences import embed, halves, jackknife
from results import Column, Results, parser
from torch import Tensor, nn

from dybit import Recipe, quantize_
from dybit.demo import efficientnet_lite0, half, image_batches, minilm, minilm_batches, prose, smollm2, smollm2_batches
from dybit.measure.fidelity import kl_divergence, pair_spearman, sqnr
from dybit.measure.timing import compare
from dybit.models.running import output_tensor, run_batch

EIGHT = {"weights": 8, "group_size": None}
TEXT = Recipe(weights=4, group_size=64, criterion="weight")
IMAGES = Recipe(
    weights=4,
    group_size=16,
    criterion="weight",
    rules=dict.fromkeys(["_conv_stem*", "*_depthwise_conv*", "_fc"], EIGHT),
)
TOKENS = {
    "INT8, a scale a token": {"activations": "int8", "activation_mode": "dynamic"},
    "INT8, groups of 128": {"activations": "int8", "activation_mode": "dynamic", "activation_group_size": 128},
    "INT8, groups of 64": {"activations": "int8", "activation_mode": "dynamic", "activation_group_size": 64},
    "DyBit, a scale a token": {"activations": "dybit8plain", "activation_mode": "dynamic"},
    "DyBit, groups of 64": {"activations": "dybit8plain", "activation_mode": "dynamic", "activation_group_size": 64},
    "INT8, static": {"activations": "int8", "activation_mode": "static"},
    "DyBit, static": {"activations": "dybit8plain", "activation_mode": "static"},
}
PIXELS = {
    "INT8, static": {"activations": "int8", "activation_mode": "static"},
    "DyBit, static": {"activations": "dybit8plain", "activation_mode": "static"},
    "INT8, a scale an image": {"activations": "int8", "activation_mode": "dynamic"},
    "DyBit, a scale an image": {"activations": "dybit8plain", "activation_mode": "dynamic"},
}
COLUMNS = (
    Column("model", "model"),
    Column("inputs", "inputs"),
    Column("measure", "measure"),
    Column("accuracy", "value", 4),
    Column("above", "above the first row's", 4),
    Column("sqnr", "SQNR, dB", 2),
    Column("inputs_sqnr", "of the inputs alone, dB", 2),
    Column("ms", "ms", 1),
    Column("ratio", "to FP32", 2, "×"),
)


@dataclass(frozen=True)
class Case:
    """A model, its recipe without inputs, and how it is judged.

    Attributes:
        make: Makes it, in FP32.
        recipe: That of the weights.
        formats: Fields of the inputs by name.
        calibration: Batches.
        evaluation: Batches; None for pairs of texts.
        measure: What is measured.
    """

    make: Callable[[], nn.Module]
    recipe: Recipe
    formats: dict[str, dict[str, Any]]
    calibration: Callable[[], list[Any]]
    evaluation: Callable[[int], list[Any]] | None
    measure: str

    def outputs(self, model: nn.Module, size: int) -> list[Tensor]:
        """A tensor a batch; all embeddings in one for pairs of texts."""
        if self.evaluation is None:
            return [embed(model, halves(8 * size, half(prose(), "evaluation")))]
        with torch.inference_mode():
            return [output_tensor(run_batch(model, batch)).flatten(0, -2) for batch in self.evaluation(size)]

    def judge(self, exact: list[Tensor], found: list[Tensor], first: list[Tensor] | None) -> dict[str, Any]:
        """The measure with its standard error, and how far it is above that of the first row."""
        if self.evaluation is None:
            count = len(exact[0])

            def rank(of: Tensor, i: Tensor) -> float:
                return pair_spearman(exact[0][i], of[i])

            cells = {"accuracy": jackknife(lambda i: rank(found[0], i), count)}
            if first is not None:
                cells["above"] = jackknife(lambda i: rank(found[0], i) - rank(first[0], i), count)
            return cells
        values = self._of_batches(exact, found)
        cells = {"accuracy": spread(values)}
        if first is not None:
            others = self._of_batches(exact, first)
            cells["above"] = spread([a - b for a, b in zip(values, others, strict=True)])
        return cells

    def _of_batches(self, exact: list[Tensor], found: list[Tensor]) -> list[float]:
        pairs = zip(exact, found, strict=True)
        if self.measure.startswith("KL"):
            return [kl_divergence(a, b) for a, b in pairs]
        return [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def crops(size: int) -> list[Tensor]:
    return image_batches("evaluation", batches=5 * size)


CASES = {
    "MiniLM-L6": Case(minilm, TEXT, TOKENS, partial(minilm_batches, batches=4), None, "Spearman"),
    "SmolLM2-135M": Case(
        smollm2,
        TEXT,
        TOKENS,
        partial(smollm2_batches, batches=6),
        lambda size: smollm2_batches("evaluation", batches=size),
        "KL, nats",
    ),
    "EfficientNet-Lite0": Case(efficientnet_lite0, IMAGES, PIXELS, image_batches, crops, "same top class"),
    "ResNet-18": Case(
        lambda: settle(resnet18(), image_batches(batches=2)),
        replace(IMAGES, rules={}),
        PIXELS,
        image_batches,
        lambda size: image_batches("evaluation", batches=size),
        "same top class",
    ),
}


def measure(name: str, case: Case, size: int, seconds: float, results: Results) -> None:
    """Adds the rows of a model."""
    exact, calibration = case.make(), case.calibration()
    batch = calibration[0]
    wanted = case.outputs(exact, size)
    weights = case.outputs(quantize_(copy.deepcopy(exact), case.recipe, calibration), size)
    whole, first = torch.cat(wanted), None
    for label, fields in case.formats.items():
        model = quantize_(copy.deepcopy(exact), replace(case.recipe, **fields), calibration)
        found = case.outputs(model, size)
        cells = case.judge(wanted, found, first)
        first = first or found
        runs = {"fp32": partial(run_batch, exact, batch), "dybit": partial(run_batch, fused(model, batch), batch)}
        time = compare(runs, seconds)["dybit"]
        results.add(
            model=name,
            inputs=label,
            measure=case.measure,
            **cells,
            sqnr=sqnr(whole, torch.cat(found)),
            inputs_sqnr=sqnr(torch.cat(weights), torch.cat(found)),
            ms=time.median * 1e3,
            ratio=[time.ratio_low, time.ratio, time.ratio_high],
        )


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    reader.add_argument("--size", type=int, default=8, help="of the evaluation: sequences, 5 × 8 crops, or 8 pairs")
    reader.add_argument("--seconds", type=float, default=5.0, help="of timing each row")
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    recipes = {name: case.recipe for name, case in CASES.items() if name in options.models}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results:
        for name in options.models:
            if not results.has(model=name):
                measure(name, CASES[name], options.size, options.seconds, results)


if __name__ == "__main__":
    main()
