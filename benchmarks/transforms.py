"""What transforms of the floating-point model are worth before quantization: chains of algorithms, on real models.

Run ``python benchmarks/transforms.py smollm2`` (or ``minilm``, ``efficientnet``); it needs the demo's models. One row a
chain, format and setting: ``token`` and ``group`` are dynamic 4-bit inputs with a scale for every token or for every 32
features. Embeddings stay in FP32.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import torch

from dybit import Recipe, quantize_
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["W4", "W4A4token", "W4A4group"])
    parser.add_argument("--formats", nargs="+", default=["dybit", "int", "nf"])
    parser.add_argument("--chains", nargs="+", default=["rtn", "equalize", "smooth", "rotate"])
    parser.add_argument("--calibration", type=int, default=4, help="batches")
    parser.add_argument("--evaluation", type=int, default=4, help="batches")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    build, batches, shape = MODELS[options.model]
    model = build()
    calibration = batches("calibration", batches=options.calibration, **shape)
    reference = Reference(model, batches("evaluation", batches=options.evaluation, **shape))
    print(f"FP32 perplexity {reference.fidelity.perplexity}; {reference.fidelity.outputs} outputs\n")
    print("| setting | format | chain | SQNR dB | agreement | KL | Spearman | perplexity | s |\n" + "|---" * 9 + "|")
    for setting in options.settings:
        for name in options.formats:
            fields = dict(SETTINGS[setting])
            for field in ("weights", "activations"):
                if name != "dybit" and field in fields:
                    fields[field] = f"{name}{fields[field]}"
            for chain in options.chains:
                start = time.perf_counter()
                quantized = quantize_(
                    copy.deepcopy(model), Recipe(embeddings=None, **fields), calibration, algorithm=chain.split(",")
                )
                seconds = time.perf_counter() - start
                found = reference.judge(quantized)
                cells = (
                    f"{found.sqnr:.2f}", f"{100 * (found.agreement or 0):.1f}", _number(found.kl),
                    _number(found.spearman), _number(found.perplexity, 2), f"{seconds:.0f}",
                )  # fmt: skip
                print(f"| {setting} | {name} | {chain} | {' | '.join(cells)} |", flush=True)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    main()
