"""Transforms before quantization: what chains of algorithms gain on real models.

One row for each chain, format and setting. ``token`` and ``group`` are dynamic 4-bit inputs with a scale for every
token or for every 32 features. Embeddings stay in FP32. Needs the models of the demo.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from typing import Any

from results import Column, Results, parser
from torch import nn

from dybit import Recipe, quantize_
from dybit.cli import options
from dybit.demo import efficientnet_lite0, image_batches, minilm, minilm_batches, smollm2, smollm2_batches
from dybit.measure.fidelity import Reference

SETTINGS: dict[str, dict[str, Any]] = {
    "W4": {"weights": 4},
    "W4g64": {"weights": 4, "group_size": 64},
    "W4A4token": {"weights": 4, "activations": 4, "activation_mode": "dynamic"},
    "W4A4group": {"weights": 4, "activations": 4, "activation_mode": "dynamic", "activation_group_size": 32},
    "W4g32A4group": {
        "weights": 4, "group_size": 32, "activations": 4, "activation_mode": "dynamic", "activation_group_size": 32,
    },
    "W4A8": {"weights": 4, "activations": 8},
    "W4A8token": {"weights": 4, "activations": 8, "activation_mode": "dynamic"},
    "W8A8": {"weights": 8, "activations": 8},
    "W8A8tensor": {"weights": 8, "activations": 8, "granularity": "tensor"},
}  # fmt: skip
MODELS = {
    "smollm2": (smollm2, smollm2_batches, {"length": 512}),
    "minilm": (minilm, minilm_batches, {"batch_size": 16}),
    "efficientnet": (efficientnet_lite0, image_batches, {"batch_size": 8}),
}


COLUMNS = (
    Column("model", "model"),
    Column("setting", "setting"),
    Column("format", "format"),
    Column("chain", "algorithms"),
    Column("sqnr", "SQNR, dB"),
    Column("agreement", "agreement", 1, " %"),
    Column("kl", "KL, nats", 4),
    Column("spearman", "Spearman", 4),
    Column("perplexity", "perplexity"),
    Column("seconds", "s", 0),
)


def recipe(setting: str, form: str) -> Recipe:
    """The recipe of a setting with the formats of a family."""
    fields = dict(SETTINGS[setting])
    for field in ("weights", "activations"):
        if form != "dybit" and field in fields:
            fields[field] = f"{form}{fields[field]}"
    return Recipe(embeddings=None, **fields)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("models", nargs="*", default=["smollm2"], help=f"among {', '.join(MODELS)}")
    reader.add_argument("--settings", nargs="+", choices=SETTINGS, default=["W4", "W4A4token", "W4A4group"])
    reader.add_argument("--formats", nargs="+", default=["dybit", "int", "nf"])
    reader.add_argument("--chains", nargs="+", default=["rtn", "equalize", "smooth", "rotate"])
    reader.add_argument("--calibration", type=int, default=4, help="batches")
    reader.add_argument("--evaluation", type=int, default=4, help="batches")
    given = reader.parse_args()
    warnings.filterwarnings("ignore")
    recipes = {f"{s}, {f}": recipe(s, f) for s, f in itertools.product(given.settings, given.formats)}
    with Results(__file__, __doc__, COLUMNS, given, recipes) as results:
        for name in given.models:
            build, batches, shape = MODELS[name]
            model = build()
            calibration = batches("calibration", batches=given.calibration, **shape)
            reference = Reference(model, batches("evaluation", batches=given.evaluation, **shape))
            if not results.has(model=name, setting="FP32"):
                results.add(model=name, setting="FP32", perplexity=reference.fidelity.perplexity)
            for setting, form, chain in itertools.product(given.settings, given.formats, given.chains):
                key = {"model": name, "setting": setting, "format": form, "chain": chain}
                if not results.has(**key):
                    results.add(**key, **measure(model, recipes[f"{setting}, {form}"], calibration, chain, reference))


def measure(
    model: nn.Module, recipe: Recipe, calibration: list[Any], chain: str, reference: Reference
) -> dict[str, float | None]:
    """The figures of one chain of algorithms."""
    start = time.perf_counter()
    quantized = quantize_(copy.deepcopy(model), recipe, calibration, algorithm=options.chain(chain, calibrated=True))
    seconds = time.perf_counter() - start
    found = reference.judge(quantized)
    return {
        "sqnr": found.sqnr,
        "agreement": None if found.agreement is None else 100 * found.agreement,
        "kl": found.kl,
        "spearman": found.spearman,
        "perplexity": found.perplexity,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
