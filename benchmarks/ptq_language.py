"""Perplexity of SmolLM2-135M after post-training quantization of its linear layers, for docs/accuracy.md.

A configuration is FORMAT[:GROUP][+INPUTS[:GROUP]][?FIELD=VALUE…]/ALGORITHMS, such as dybit4:64/gptq,
nf4:64+int8/gptq or dybit4plain?variant_granularity=tensor/plain. INPUTS are dynamic, with a scale for every token or
for every GROUP features; FIELD is any other of a recipe; the algorithm ``plain`` is rounding to the nearest without
calibration. Every configuration adds a line of JSON to the results, with the surprise and the divergence of every
sequence of 512 tokens; what is there is not run again. ``--report`` prints the table, with standard errors over
sequences, paired against the first of the configurations. Only one model is in memory while it is quantized; the
original's logits are in a file beside the results.

    python benchmarks/ptq_language.py dybit4/gptq nf4/gptq
    python benchmarks/ptq_language.py --report dybit4/gptq nf4/gptq
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dybit
import dybit.demo
from dybit.layers.quantized import quantized_layers
from dybit.models.preparation import dequantize_

LENGTH = 512
ROWS = 128  # logits of a sequence that are compared at once


def recipe(word):
    name, _, fields = word.partition("/")[0].partition("?")
    weights, _, inputs = name.partition("+")
    weights, _, group = weights.partition(":")
    values = {"weights": weights, "group_size": int(group) if group else None, "embeddings": None}
    if inputs:
        inputs, _, group = inputs.partition(":")
        values |= {"activations": int(inputs) if inputs.isdigit() else inputs, "activation_mode": "dynamic"}
        values["activation_group_size"] = int(group) if group else None
    return dybit.Recipe(**values, **dict(pair.split("=") for pair in fields.split("&") if pair))


def bits_per_weight(model):
    specs = [spec for layer in quantized_layers(model).values() for spec in layer.weight_specs.values()]
    return 8 * sum(spec.nbytes for spec in specs) / sum(math.prod(spec.shape) for spec in specs)


def logits_of(model, inputs):
    """The logits of every sequence, in evaluation mode."""
    model.eval()
    for batch in inputs:
        with torch.inference_mode():
            yield batch["input_ids"][0], model(**batch).logits[0]


def reference(options, inputs):
    """The original's logits, (sequences, tokens, vocabulary) of FP32 in a file that is mapped to memory."""
    file = options.results.with_suffix(f".{options.evaluation}.logits.npy")
    if not file.exists():
        part = file.with_suffix(f".part{os.getpid()}")
        model = dybit.demo.smollm2()
        shape = (len(inputs), LENGTH, model.config.vocab_size)
        kept = np.lib.format.open_memmap(part, "w+", np.float32, shape)
        for index, (_, logits) in enumerate(logits_of(model, inputs)):
            kept[index] = logits.numpy()
        kept.flush()
        part.rename(file)
    return np.load(file, mmap_mode="r")


def judge(model, inputs, kept):
    """Of every sequence: mean surprise of both models, divergence (nats), agreement of the top token."""
    rows = []
    for index, (ids, logits) in enumerate(logits_of(model, inputs)):
        sums = np.zeros(4)
        for start in range(0, LENGTH, ROWS):
            p = torch.from_numpy(np.array(kept[index, start : start + ROWS])).log_softmax(-1)
            q = logits[start : start + ROWS].log_softmax(-1)
            nexts = ids[start + 1 : start + 1 + ROWS, None]
            surprise = [-float(x[: len(nexts)].gather(1, nexts).sum()) / (LENGTH - 1) for x in (p, q)]
            kl = float((p.exp() * (p - q)).sum()) / LENGTH
            sums += [*surprise, kl, float((p.argmax(-1) == q.argmax(-1)).float().sum()) / LENGTH]
        rows.append(sums.tolist())
    return [list(column) for column in zip(*rows, strict=True)]


def measure(word, data, inputs, kept):
    model = dybit.demo.smollm2()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    algorithm = word.rpartition("/")[2]
    plain = algorithm == "plain"
    wall, cpu = time.perf_counter(), time.process_time()
    dybit.quantize_(model, recipe(word), None if plain else data, algorithm=None if plain else algorithm.split(","))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bits = bits_per_weight(model)
    if recipe(word).activations is None:
        dequantize_(model)
    fp32, surprise, kl, top = judge(model, inputs, kept)
    return {
        "configuration": word, "bits": bits, "fp32": fp32, "surprise": surprise, "kl": kl, "top": top,
        "cpu_seconds": round(cpu), "wall_seconds": round(wall), "threads": torch.get_num_threads(),
        "peak_mb": peak // 1000, "before_mb": before // 1000,
    }  # fmt: skip


def read(options):
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows = [json.loads(line) for line in lines]
    found = {}
    for row in rows:
        step, rest = divmod(options.stride, row.get("stride", 1))
        if (row["calibration"], row["evaluation"], rest) == (options.calibration, options.evaluation, 0):
            found[row["configuration"]] = row | {name: row[name][::step] for name in ("fp32", "surprise", "kl", "top")}
    return found


def spread(values):
    """Mean and standard error over sequences."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def above(values, others):
    """The mean difference and its standard error, in words."""
    mean, error = spread([a - b for a, b in zip(values, others, strict=True)])
    return f"{mean:+.4f} ± {error:.4f}"


def report(options):
    rows = read(options)
    words = options.configurations or list(rows)
    names = ("configuration", "bits", "perplexity", "of FP32", "KL (nats)", "same top token")
    print(f"| {' | '.join(names)} | surprise above the first's | KL above the first's |")
    print("|---|---|---|---|---|---|---|---|")
    first = None
    for word in words:
        if word not in rows:
            continue
        row = rows[word]
        first = first or row
        ratio, error = spread([a - b for a, b in zip(row["surprise"], row["fp32"], strict=True)])
        kl, kl_error = spread(row["kl"])
        beside = ["", ""] if row is first else [above(row[name], first[name]) for name in ("surprise", "kl")]
        print(
            f"| {word} | {row['bits']:.3f} | {math.exp(statistics.mean(row['surprise'])):.2f} "
            f"| {math.exp(ratio):.4f} ± {math.exp(ratio) * error:.4f} | {kl:.4f} ± {kl_error:.4f} "
            f"| {100 * statistics.mean(row['top']):.1f} % | {' | '.join(beside)} |"
        )
    if first:
        print(f"\nFP32 perplexity {math.exp(statistics.mean(first['fp32'])):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens")
    parser.add_argument("--evaluation", type=int, default=20480, help="tokens")
    parser.add_argument("--stride", type=int, default=1, help="evaluate on every so many-th sequence only")
    parser.add_argument("--results", type=Path, default=Path("build/language/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table only")
    options = parser.parse_args()
    if options.report:
        report(options)
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    data = dybit.demo.smollm2_batches("calibration", batches=options.calibration // LENGTH)
    inputs = dybit.demo.smollm2_batches("evaluation", batches=options.evaluation // LENGTH)
    for word in options.configurations:
        recipe(word)  # a bad one is an error before any work
    kept = reference(options, inputs)
    for word in options.configurations:
        if word in read(options):
            continue
        row = measure(word, data, inputs[:: options.stride], kept[:: options.stride])
        row |= {name: getattr(options, name) for name in ("calibration", "evaluation", "stride")}
        with options.results.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        shown = [f"{word}: perplexity {math.exp(statistics.mean(row['surprise'])):.3f}", f"KL {np.mean(row['kl']):.4f}"]
        print(", ".join(shown), f"{row['wall_seconds']} s, {row['peak_mb']} MB", file=sys.stderr, flush=True)
    report(options)


if __name__ == "__main__":
    main()
