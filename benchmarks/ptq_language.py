"""Perplexity of SmolLM2-135M after post-training quantization of its linear layers, for docs/accuracy.md.

A configuration is FORMAT[:GROUP]/ALGORITHMS, such as dybit4spare:64/gptq; the algorithm ``plain`` is rounding to the
nearest without calibration. One line of JSON is written for each, with the processor's seconds of quantizing and the
largest memory of the process so far (with the original, a copy, and the original's logits).

    python benchmarks/ptq_language.py --calibration 8192 --evaluation 6144 dybit4spare/gptq nf4/gptq
"""

import argparse
import copy
import json
import math
import resource
import time

import torch

import dybit
import dybit.demo
from dybit.fidelity import Reference
from dybit.model import dequantize_, quantized_layers

LENGTH = 512


def bits_per_weight(model):
    specs = [spec for layer in quantized_layers(model).values() for spec in layer.weight_specs.values()]
    return 8 * sum(spec.nbytes for spec in specs) / sum(math.prod(spec.shape) for spec in specs)


def measure(original, reference, data, word):
    name, _, algorithm = word.partition("/")
    weights, _, group = name.partition(":")
    recipe = dybit.Recipe(weights=weights, group_size=int(group) if group else None, embeddings=None)
    model = copy.deepcopy(original)
    wall, cpu = time.perf_counter(), time.process_time()
    plain = algorithm in ("", "plain")
    dybit.quantize_(model, recipe, None if plain else data, algorithm=None if plain else algorithm.split(","))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    bits = bits_per_weight(model)
    found = reference.judge(dequantize_(model))
    base = reference.fidelity.perplexity
    return {
        "configuration": word,
        "bits": round(bits, 3),
        "perplexity": round(found.perplexity, 3),
        "ratio": round(found.perplexity / base, 4),
        "kl": round(found.kl, 4),
        "top1": round(found.agreement, 4),
        "cpu_seconds": round(cpu),
        "wall_seconds": round(wall),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="+")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens")
    parser.add_argument("--evaluation", type=int, default=6144, help="tokens")
    arguments = parser.parse_args()
    original = dybit.demo.smollm2()
    data = dybit.demo.smollm2_batches("calibration", batches=arguments.calibration // LENGTH)
    inputs = dybit.demo.smollm2_batches("evaluation", batches=arguments.evaluation // LENGTH)
    with Reference(original, inputs) as reference:
        head = {"torch": torch.__version__, "threads": torch.get_num_threads(), "fp32": reference.fidelity.perplexity}
        print(
            json.dumps({**head, "calibration": arguments.calibration, "evaluation": arguments.evaluation}), flush=True
        )
        for word in arguments.configurations:
            print(json.dumps(measure(original, reference, data, word)), flush=True)


if __name__ == "__main__":
    main()
