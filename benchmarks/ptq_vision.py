"""Post-training quantization of EfficientNet-Lite0: how often the quantized network agrees with FP32.

Rows differ in the format of the weights and in the chain of algorithms; calibration and the search of scales are the
same for all. Calibration and evaluation share no picture. The standard error is that of crops drawn independently.
There are only eleven pictures unless more are given, so it is optimistic. Seconds are of the processor.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from pathlib import Path
from typing import Any

from results import Column, Results, parser
from torch import nn

from dybit import Recipe, quantize_
from dybit.cli import options
from dybit.demo import efficientnet_lite0, image_batches
from dybit.measure.fidelity import Reference

BATCH = 8
COLUMNS = (
    Column("weights", "weights"),
    Column("algorithm", "algorithm"),
    Column("agreement", "same top class", 1, " %"),
    Column("sqnr", "SQNR, dB"),
    Column("kl", "KL, nats", 4),
    Column("seconds", "s", 0),
)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--weights", nargs="+", default=["4"], help="widths or names of formats")
    reader.add_argument("--activations", default="int8", help="width or format; none: floating point")
    reader.add_argument("--group-size", type=int, help="weights that share a scale; default: an output channel's")
    reader.add_argument("--ends", default="8", help="weights of the first convolution and the classifier; none: as all")
    reader.add_argument("--algorithms", nargs="+", default=["rtn", "auto"], help="chains such as gptq,bias")
    reader.add_argument("--crops", type=int, default=240, help="to judge by")
    reader.add_argument("--calibration-crops", type=int, default=160)
    reader.add_argument("--more", type=Path, help="a folder of further pictures to calibrate with")
    reader.add_argument("--judge-more", type=Path, nargs="+", default=[], help="folders of more to judge by")
    reader.add_argument("--seed", type=int, default=0, help="of the calibration crops")
    given = reader.parse_args()
    recipes = {name: recipe(name, given.activations, given.group_size, given.ends) for name in given.weights}
    pairs = list(itertools.product(given.weights, given.algorithms))
    with Results(__file__, __doc__, COLUMNS, given, recipes) as results:
        pairs = [(name, chain) for name, chain in pairs if not results.has(weights=name, algorithm=chain)]
        if not pairs:
            return
        model = efficientnet_lite0()
        calibration = image_batches(
            batches=given.calibration_crops // BATCH,
            batch_size=BATCH,
            seed=given.seed,
            more=sorted(given.more.iterdir()) if given.more else (),
        )
        others = [file for folder in given.judge_more for file in sorted(folder.iterdir())]
        evaluation = image_batches("evaluation", batches=given.crops // BATCH, batch_size=BATCH, more=others)
        with Reference(model, evaluation, "logits") as reference:
            for name, chain in pairs:
                row = measure(model, recipes[name], calibration, chain, reference)
                results.add(weights=name, algorithm=chain, **row)


def recipe(weights: str, activations: str, group_size: int | None, ends: str) -> Recipe:
    """A recipe from the words of the command line."""
    rules = {} if ends == "none" else {"weights": options.width("ends", ends), "group_size": None}
    return Recipe(
        options.width("weights", weights),
        options.width("activations", activations),
        group_size=group_size,
        rules={name: rules for name in ("_conv_stem*", "_fc")} if rules else {},
    )


def measure(
    model: nn.Module, recipe: Recipe, calibration: list[Any], chain: str, reference: Reference
) -> dict[str, Any]:
    """The figures of one recipe and chain of algorithms."""
    start = time.process_time()
    algorithm = options.chain(chain, calibrated=True)
    quantized = quantize_(copy.deepcopy(model), recipe, calibration, algorithm=algorithm)
    seconds = time.process_time() - start
    found = reference.judge(quantized)
    share = found.agreement or 0.0
    error = math.sqrt(share * (1 - share) / found.outputs)
    return {"agreement": [100 * share, 100 * error], "sqnr": found.sqnr, "kl": found.kl, "seconds": seconds}


if __name__ == "__main__":
    main()
