"""How well the table of ``CpuCost`` predicts the time of whole quantized models.

The table is measured first. Then three recipes are applied to the real model (seed 0 for the random one) and timed
against FP32, taking turns, with one thread. Scales are absolute maxima, since they make no difference to speed.
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from functools import partial

import torch
from results import Column, Results, parser

from dybit import CpuCost, Recipe, demo, quantize_
from dybit.measure.timing import compare
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.measured_model import Subject
from dybit.models.running import run_batch

RECIPE = Recipe(embeddings=None, method="absmax", criterion="weight")
MODELS = {
    "minilm": (demo.minilm, demo.minilm_batches),
    "efficientnet_lite0": (demo.efficientnet_lite0, demo.image_batches),
}
COLUMNS = (
    Column("model", "model"),
    Column("recipe", "recipe"),
    Column("predicted", "predicted, s", 3),
    Column("measured", "measured, s", 3),
    Column("off", "off", 1, " %"),
    Column("predicted_ratio", "times as fast as FP32, predicted", 2, "×"),
    Column("measured_ratio", "measured", 2, "×"),
)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("models", nargs="*", default=["minilm"], help=f"among {', '.join(MODELS)}")
    reader.add_argument("--seconds", type=float, default=20.0, help="of timing whole models")
    reader.add_argument("--table-seconds", type=float, default=0.5, help="of timing each layer")
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with Results(__file__, __doc__, COLUMNS, options, {"base": RECIPE}) as results:
        for name in options.models:
            if not results.has(model=name):
                for row in measure(name, options.table_seconds, options.seconds):
                    results.add(model=name, **row)


def measure(name: str, table_seconds: float, seconds: float) -> list[dict[str, object]]:
    """A row for each recipe."""
    make, data = MODELS[name]
    model, batches = make(), data(batches=1)
    subject = Subject(model, batches, RECIPE)
    for layer in subject.embeddings:
        subject.layers.pop(layer, None)
    candidates = as_candidates(["fp32", "8/8", "4/8"])
    with tempfile.TemporaryDirectory() as folder:
        table = CpuCost(seconds=table_seconds, cache=folder).table(subject, candidates)
    mixed = random.Random(0)
    choices = {c.name: dict.fromkeys(subject.layers, i) for i, c in enumerate(candidates) if not c.kept}
    choices["at random"] = {layer: mixed.randrange(3) for layer in subject.layers}
    models = {"fp32": subject.model}
    for label, choice in choices.items():
        recipe = subject.mixed({layer: candidates[index] for layer, index in choice.items()})
        models[label] = quantize_(copy.deepcopy(model), recipe, batches)
    times = compare({label: partial(run_batch, m, batches[0]) for label, m in models.items()}, seconds)
    return [
        {
            "recipe": label,
            "predicted": table.total(choice),
            "measured": times[label].median,
            "off": 100 * (table.total(choice) / times[label].median - 1),
            "predicted_ratio": table.base / table.total(choice),
            "measured_ratio": times[label].ratio,
        }
        for label, choice in choices.items()
    ]


if __name__ == "__main__":
    main()
