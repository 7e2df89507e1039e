"""Post-training algorithms on EfficientNet-Lite0, format by format: how often the quantized network agrees with FP32.

    python benchmarks/ptq_vision.py [--weights 4,int4,nf4] [--activations 8] [--group-size 32] [--ends 8]
                                    [--algorithms rtn,statistics,adaround] [--crops 240] [--calibration-crops 64]
                                    [--more folder] [--judge-more folder …] [--seed 0] [--output result.json]

An algorithm is a chain such as adaround+bias. Calibration and evaluation share no picture. The standard error is that
of crops drawn independently; there are only eleven pictures unless more are given, so it is optimistic. All formats get
the same calibration, the same search of scales and the same algorithm.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from pathlib import Path

import torch

from dybit import Recipe, quantize_
from dybit.demo import efficientnet_lite0, image_batches
from dybit.measure.fidelity import Reference

_BATCH = 8


def main() -> None:
    """Runs the benchmark and prints a row for every pair of format and algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="4", help="widths or names of formats, separated by commas")
    parser.add_argument("--activations", help="width or format; default: floating point")
    parser.add_argument("--group-size", type=int, help="weights that share a scale; default: an output channel's")
    parser.add_argument("--ends", help="weights of the first convolution and of the classifier; default: as all")
    parser.add_argument("--algorithms", default="rtn,bias,statistics,adaround", help="chains, separated by commas")
    parser.add_argument("--crops", type=int, default=240, help="to judge by")
    parser.add_argument("--calibration-crops", type=int, default=64)
    parser.add_argument("--more", type=Path, help="a folder of further pictures to calibrate with")
    parser.add_argument(
        "--judge-more", type=Path, nargs="+", default=[], help="folders of further pictures to judge by"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the calibration crops")
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    arguments = parser.parse_args()
    model = efficientnet_lite0()
    calibration = image_batches(
        batches=arguments.calibration_crops // _BATCH,
        batch_size=_BATCH,
        seed=arguments.seed,
        more=sorted(arguments.more.iterdir()) if arguments.more else (),
    )
    others = [file for folder in arguments.judge_more for file in sorted(folder.iterdir())]
    evaluation = image_batches("evaluation", batches=arguments.crops // _BATCH, batch_size=_BATCH, more=others)
    rows = []
    activations = _width(arguments.activations)
    print("weights      activations algorithm             top-1 %   SE   SQNR dB  KL nats  seconds (CPU)")
    with Reference(model, evaluation, "logits") as reference:
        for weights in arguments.weights.split(","):
            for chain in arguments.algorithms.split(","):
                ends = {} if arguments.ends is None else {"weights": _width(arguments.ends), "group_size": None}
                recipe = Recipe(
                    _width(weights),
                    activations,
                    group_size=arguments.group_size,
                    rules={name: ends for name in ("_conv_stem*", "_fc")} if ends else {},
                )
                start, cpu = time.perf_counter(), time.process_time()
                quantized = quantize_(copy.deepcopy(model), recipe, calibration, algorithm=chain.split("+"))
                row = {
                    "weights": weights,
                    "activations": arguments.activations,
                    "algorithm": chain,
                    "seconds": round(time.perf_counter() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu, 1),
                }
                found = reference.judge(quantized)
                share = found.agreement or 0.0
                row |= {"agreement": share, "se": math.sqrt(share * (1 - share) / found.outputs)}
                row |= {"sqnr": found.sqnr, "kl": found.kl}
                rows.append(row)
                print(
                    f"{weights:12} {arguments.activations!s:11} {chain:20} {100 * share:8.1f} {100 * row['se']:4.1f} "
                    f"{found.sqnr:9.2f} {found.kl:8.4f} {row['seconds']:8} ({row['cpu_seconds']})",
                    flush=True,
                )
    if arguments.output:
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "crops": arguments.crops}
        about |= {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "calibration": arguments.calibration_crops,
        }
        arguments.output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def _width(word: str | None) -> int | str | None:
    return int(word) if word is not None and word.isdigit() else word


if __name__ == "__main__":
    main()
