"""How well ``CpuCost``'s table predicts whole quantized models: ``python benchmarks/cpu_cost.py minilm``.

The table is measured anew; then three recipes (seed 0 for the random one) are applied to the real model and timed
against FP32, taking turns, with one thread.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import warnings
from functools import partial

import torch

from dybit import CpuCost, Recipe, demo, quantize_
from dybit.measure.timing import compare, machine
from dybit.mixed_precision.candidate import as_candidates
from dybit.mixed_precision.measured_model import Subject
from dybit.models.running import run_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["minilm", "efficientnet_lite0"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing whole models")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = demo.minilm_batches if options.model == "minilm" else demo.image_batches
    model, batches = getattr(demo, options.model)(), data(batches=1)
    # Absolute maxima: how scales are chosen makes no difference to speed.
    subject = Subject(model, batches, Recipe(embeddings=None, method="absmax", criterion="weight"))
    for name in subject.embeddings:
        subject.layers.pop(name, None)
    candidates = as_candidates(["fp32", "8/8", "4/8"])
    with tempfile.TemporaryDirectory() as folder:
        table = CpuCost(seconds=0.5, cache=folder).table(subject, candidates)
    mixed = random.Random(0)
    choices = {c.name: dict.fromkeys(subject.layers, i) for i, c in enumerate(candidates) if not c.kept}
    choices["at random"] = {name: mixed.randrange(3) for name in subject.layers}
    models = {"fp32": subject.model}
    for label, choice in choices.items():
        recipe = subject.mixed({name: candidates[index] for name, index in choice.items()})
        models[label] = quantize_(copy.deepcopy(model), recipe, batches)
    times = compare({label: partial(run_batch, m, batches[0]) for label, m in models.items()}, options.seconds)
    print(f"{options.model} on {machine()}; FP32 {table.base:.3f} s in the table, {times['fp32'].median:.3f} s after")
    print("| recipe | predicted s | measured s | off | predicted × | measured × |\n|---|---|---|---|---|---|")
    for label, choice in choices.items():
        predicted, found = table.total(choice), times[label]
        off = predicted / found.median - 1
        print(
            f"| {label} | {predicted:.3f} | {found.median:.3f} | {off:+.1%} "
            f"| {table.base / predicted:.3f} | {found.ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
