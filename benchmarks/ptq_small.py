"""Post-training quantization of small classifiers, format by format: test accuracy, paired by seed.

Networks and data are those of ``qat.py``, not trained after the rounding. Weights have a scale for each output channel,
inputs 8 bits (static, plain DyBit for all formats), the first and the last layer 8 bits. Calibration uses 500 training
samples. The difference is DyBit's accuracy less the format's, the mean over seeds with its standard error.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from results import Column, Results, parser

from dybit import Recipe, quantize_
from qat import NETWORKS, accuracy, paired, start

COLUMNS = (
    Column("network", "network"),
    Column("bits", "bits"),
    Column("algorithm", "algorithm"),
    Column("format", "format"),
    Column("fp32", "FP32", 2, " %"),
    Column("accuracy", "accuracy", 2, " %"),
    Column("difference", "DyBit − it", 2),
)
FORMATS: dict[str, Callable[[int], int | str]] = {
    "dybit": lambda b: f"dybit{b}",
    "nf": lambda b: f"nf{b}",
    "int": lambda b: f"int{b}",
    "int-full": lambda b: f"int{b}full",
}
CHAINS = {"cnn": ("rtn", "adaround"), "digits": ("rtn", "adaround"), "vit": ("rtn", "gptq")}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    reader.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    reader.add_argument("--seeds", type=int, nargs="+", default=list(range(300, 308)))
    reader.add_argument("--folder", type=Path, default=Path("build/small"), help="of the networks in FP32")
    options = reader.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with Results(__file__, __doc__, COLUMNS, options) as results:
        for network, bits in itertools.product(options.networks, options.bits):
            ours: dict[str, list[float]] = {}
            for chain, name in itertools.product(CHAINS[network], FORMATS):
                key = {"network": network, "bits": bits, "algorithm": chain, "format": name}
                if not results.has(**key):
                    exact, found = measure(network, bits, chain, name, options.seeds, options.folder)
                    row = {"fp32": statistics.mean(exact), "accuracy": statistics.mean(found), "by_seed": found}
                    results.add(**key, **row, difference=paired(ours.get(chain, []), found))
                if name == "dybit":
                    ours[chain] = next(r["by_seed"] for r in results.rows if key.items() <= r.items())


def measure(
    network: str, bits: int, chain: str, name: str, seeds: list[int], folder: Path
) -> tuple[list[float], list[float]]:
    """The accuracies in FP32 and of a format, seed by seed, in percent."""
    exact, found = [], []
    for seed in seeds:
        data = NETWORKS[network][1](seed)
        model = start(network, seed, data, folder)
        exact.append(accuracy(model, data))
        recipe = Recipe(FORMATS[name](bits), 8, rules={layer: {"weights": 8} for layer in NETWORKS[network][4]})
        found.append(accuracy(quantize_(copy.deepcopy(model), recipe, [data[0][:500]], algorithm=chain), data))
    return exact, found


if __name__ == "__main__":
    main()
