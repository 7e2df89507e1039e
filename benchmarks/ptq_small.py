"""Post-training quantization of small classifiers: the true test accuracy, format by format, paired by seed.

Run ``python benchmarks/ptq_small.py``; it needs scikit-learn and mnist1d. Networks and data are those of qat.py, not
trained after the rounding: weights of 4, 3 and 2 bits per channel, inputs of 8 bits (static, the same DyBit for
all formats), the first and the last layer with 8 bits, 500 training samples for calibration.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from dybit import Recipe, quantize_
from qat import NETWORKS, accuracy, start

FORMATS: dict[str, Callable[[int], int | str]] = {
    "dybit": lambda b: f"dybit{b}",
    "nf": lambda b: f"nf{b}",
    "int": lambda b: f"int{b}",
    "int-full": lambda b: f"int{b}full",
}
CHAINS = {"cnn": ("rtn", "adaround"), "digits": ("rtn", "adaround"), "vit": ("rtn", "gptq")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(300, 308)))
    parser.add_argument("--folder", type=Path, default=Path("build/small"), help="of the networks in FP32")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for network in options.networks:
        found: dict[tuple[str, str, int], list[float]] = {}
        exact = []
        for seed in options.seeds:
            data = NETWORKS[network][1](seed)
            model = start(network, seed, data, options.folder)
            exact.append(accuracy(model, data))
            for bits in options.bits:
                for chain in CHAINS[network]:
                    for name, form in FORMATS.items():
                        ends = {layer: {"weights": 8} for layer in NETWORKS[network][4]}
                        recipe = Recipe(weights=form(bits), activations=8, rules=ends)
                        rounded = quantize_(copy.deepcopy(model), recipe, [data[0][:500]], algorithm=chain.split("+"))
                        found.setdefault((chain, name, bits), []).append(accuracy(rounded, data))
        print(f"\n{network}: FP32 {statistics.mean(exact):.2f}, {len(exact)} seeds\n")
        print("| format, algorithm | " + " | ".join(f"{bits} bits | DyBit − it" for bits in options.bits) + " |")
        print("|---" * (1 + 2 * len(options.bits)) + "|", flush=True)
        for chain in CHAINS[network]:
            for name in FORMATS:
                cells = [_cell(found[chain, name, b], found[chain, "dybit", b], name) for b in options.bits]
                print(f"| {name}, `{chain}` | {' | '.join(cells)} |", flush=True)


def _cell(mine: list[float], ours: list[float], name: str) -> str:
    differences = [a - b for a, b in zip(ours, mine, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    beside = "" if name == "dybit" else f"{statistics.mean(differences):+.2f} ± {error:.2f}"
    return f"{statistics.mean(mine):.2f} | {beside}"


if __name__ == "__main__":
    main()
