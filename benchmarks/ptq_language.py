"""Post-training quantization of the linear layers of SmolLM2-135M, judged on texts unlike the calibration's.

Evaluation is on the Debian Administrator's Handbook and on the quotations of ``fortunes`` (see ``texts.py``). A
configuration is FORMAT[:GROUP][+INPUTS[:GROUP]][?FIELD=VALUE…]/CHAIN[@TEXT], such as ``dybit4:64/gptq``,
``nf4:64+int8/gptq@own`` or ``dybit4plain?variant_granularity=tensor/plain``. INPUTS are dynamic, with a scale for every
token or for every GROUP features. FIELD is any other field of a recipe. CHAIN names algorithms; ``plain`` is rounding
to nearest without calibration. TEXT is what it is calibrated on: ``reference``, the language reference of CPython (the
default), ``own``, text that the model writes, or ``both``, half of each. Bits hold scales and choices. KL is the
divergence from FP32 of a token. Standard errors are over sequences of 512 tokens; differences are paired with the first
configuration. Embeddings stay in FP32. Seconds are of the processor, without writing text.
"""

import math
import os
import resource
import statistics
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from results import Column, Results, parser
from texts import TEXTS, text_file

import dybit
import dybit.demo
from dybit.cli.options import chain
from dybit.errors import DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.models.own_text import own_text
from dybit.models.preparation import dequantize_

COLUMNS = (
    Column("configuration", "configuration"),
    Column("bits", "bits", 3),
    *(
        Column(f"{text}_{key}", f"{text}: {title}", 4)
        for text in TEXTS
        for key, title in (
            ("ratio", "perplexity, of FP32"),
            ("kl", "KL, nats"),
            ("surprise_above", "surprise above the first's, nats"),
            ("kl_above", "KL above the first's, nats"),
        )
    ),
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
    """Of every sequence: mean surprise above the original's and divergence from it, nats."""
    rows = []
    for index, (ids, logits) in enumerate(logits_of(model, inputs)):
        sums = np.zeros(2)
        for start in range(0, LENGTH, ROWS):
            p = torch.from_numpy(np.array(kept[index, start : start + ROWS])).log_softmax(-1)
            q = logits[start : start + ROWS].log_softmax(-1)
            nexts = ids[start + 1 : start + 1 + ROWS, None]
            surprise = float((p - q)[: len(nexts)].gather(1, nexts).sum()) / (LENGTH - 1)
            sums += [surprise, float((p.exp() * (p - q)).sum()) / LENGTH]
        rows.append(sums.tolist())
    return [list(column) for column in zip(*rows, strict=True)]


@cache
def calibration(text, tokens):
    """Sequences to calibrate on."""
    count = tokens // LENGTH
    if text == "own":
        return own_text(dybit.demo.smollm2(), sequences=count, length=LENGTH)
    if text == "both":
        return [*calibration("own", tokens)[: count // 2], *calibration("reference", tokens)[::2]]
    if text != "reference":
        raise DyBitError(f"a configuration is calibrated on {text!r}; use reference, own or both")
    return dybit.demo.smollm2_batches("calibration", batches=count)


def measure(word, tokens, judged):
    """The row of a configuration, without what compares it to the first."""
    model = dybit.demo.smollm2()
    algorithm, _, text = word.rpartition("/")[2].partition("@")
    plain = algorithm == "plain"
    data = None if plain else calibration(text or "reference", tokens)
    start = time.process_time()
    dybit.quantize_(model, recipe(word), data, algorithm=None if plain else chain(algorithm, calibrated=True))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"configuration": word, "bits": bits_per_weight(model), "cpu_seconds": seconds, "peak_mb": peak // 1000}
    if recipe(word).activations is None:
        dequantize_(model)
    for text, (inputs, kept) in judged.items():
        surprise, kl = judge(model, inputs, kept)
        ratio, error = spread(surprise)
        row |= {f"{text}_surprises": surprise, f"{text}_kls": kl}
        row |= {f"{text}_ratio": [math.exp(ratio), math.exp(ratio) * error], f"{text}_kl": spread(kl)}
    return row


def spread(values):
    """Mean and standard error over sequences."""
    return [statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0]


def above(row, first):
    """The differences of a row from the first one."""
    return {
        f"{text}_{name}_above": spread([a - b for a, b in zip(row[key], first[key], strict=True)])
        for text in TEXTS
        for name in ("surprise", "kl")
        for key in (f"{text}_{name}s",)
    }


def main():
    reader = parser(__doc__)
    reader.add_argument("configurations", nargs="*", default=["dybit4:64/auto", "nf4:64/auto", "int4:64/auto"])
    reader.add_argument("--calibration", type=int, default=8192, help="tokens")
    reader.add_argument("--evaluation", type=int, default=8192, help="tokens of each text")
    reader.add_argument("--folder", type=Path, default=Path("build/language"), help="of texts and FP32 logits")
    reader.add_argument("--packages", type=Path, default=Path("/"), help="root of the texts' packages")
    options = reader.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    recipes = {word: recipe(word) for word in options.configurations}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results:
        todo = [word for word in options.configurations if not results.has(configuration=word)]
        if not todo:
            return
        judged = {}
        for text in TEXTS:
            source = text_file(text, options.packages, options.folder)
            inputs = dybit.demo.smollm2_batches("evaluation", batches=options.evaluation // LENGTH, source=source)
            judged[text] = inputs, reference(options.folder / f"{text}.{options.evaluation}.npy", inputs)
        for word in todo:
            row = measure(word, options.calibration, judged)
            results.add(**row, **(above(row, results.rows[0]) if results.rows else {}))


if __name__ == "__main__":
    main()
