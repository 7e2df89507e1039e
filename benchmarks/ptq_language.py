"""Post-training quantization of the linear layers of SmolLM2-135M: perplexity and divergence from FP32.

A configuration is FORMAT[:GROUP][+INPUTS[:GROUP]][?FIELD=VALUE…]/ALGORITHMS, such as ``dybit4:64/gptq``,
``nf4:64+int8/gptq`` or ``dybit4plain?variant_granularity=tensor/plain``. INPUTS are dynamic, with a scale for every
token or for every GROUP features. FIELD is any other field of a recipe. The algorithm ``plain`` is rounding to nearest
without calibration. Standard errors are over sequences of 512 tokens; the last two columns are paired with the first
configuration. Embeddings stay in FP32. Seconds are of the processor.
"""

import math
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from results import Column, Results, parser

import dybit
import dybit.demo
from dybit.cli.options import chain
from dybit.layers.quantized import quantized_layers
from dybit.models.preparation import dequantize_

COLUMNS = (
    Column("configuration", "configuration"),
    Column("bits", "bits", 3),
    Column("perplexity", "perplexity"),
    Column("ratio", "of FP32", 4),
    Column("divergence", "KL, nats", 4),
    Column("same", "same top token", 1, " %"),
    Column("surprise_above", "surprise above the first's, nats", 4),
    Column("kl_above", "KL above the first's, nats", 4),
    Column("cpu_seconds", "s", 0),
    Column("peak_mb", "peak, MB"),
)
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


def reference(file, inputs):
    """The original's logits, (sequences, tokens, vocabulary) of FP32 in a file that is mapped to memory."""
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
    start = time.process_time()
    dybit.quantize_(
        model, recipe(word), None if plain else data, algorithm=None if plain else chain(algorithm, calibrated=True)
    )
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bits = bits_per_weight(model)
    if recipe(word).activations is None:
        dequantize_(model)
    fp32, surprise, kl, top = judge(model, inputs, kept)
    return {
        "configuration": word, "bits": bits, "fp32": fp32, "surprise": surprise, "kl": kl, "top": top,
        "cpu_seconds": seconds, "peak_mb": peak // 1000, "before_mb": before // 1000,
    }  # fmt: skip


def spread(values):
    """Mean and standard error over sequences."""
    return [statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0]


def above(row, first, name):
    """The mean difference of two rows and its standard error, nats; None for the first row."""
    return None if first is None else spread([a - b for a, b in zip(row[name], first[name], strict=True)])


def main():
    reader = parser(__doc__)
    reader.add_argument("configurations", nargs="*", default=["dybit4:64/auto", "nf4:64/auto", "int4:64/auto"])
    reader.add_argument("--calibration", type=int, default=8192, help="tokens")
    reader.add_argument("--evaluation", type=int, default=20480, help="tokens")
    reader.add_argument("--folder", type=Path, default=Path("build/language"), help="of the logits of the original")
    options = reader.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    recipes = {word: recipe(word) for word in options.configurations}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results:
        todo = [word for word in options.configurations if not results.has(configuration=word)]
        if not todo:
            return
        data = dybit.demo.smollm2_batches("calibration", batches=options.calibration // LENGTH)
        inputs = dybit.demo.smollm2_batches("evaluation", batches=options.evaluation // LENGTH)
        kept = reference(options.folder / f"{options.evaluation}.logits.npy", inputs)
        for word in todo:
            row = measure(word, data, inputs, kept)
            first = results.rows[0] if results.rows else None
            ratio, error = spread([a - b for a, b in zip(row["surprise"], row["fp32"], strict=True)])
            results.add(
                **row,
                perplexity=math.exp(statistics.mean(row["surprise"])),
                ratio=[math.exp(ratio), math.exp(ratio) * error],
                divergence=spread(row["kl"]),
                same=100 * statistics.mean(row["top"]),
                surprise_above=above(row, first, "surprise"),
                kl_above=above(row, first, "kl"),
            )
            results.fact("Perplexity of FP32", f"{math.exp(statistics.mean(row['fp32'])):.3f}")


if __name__ == "__main__":
    main()
