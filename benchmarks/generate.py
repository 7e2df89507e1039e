"""Tokens a second of ``generate``: SmolLM2-135M in FP32 against dybit through transformers, paired and interleaved.

    python benchmarks/generate.py [--json generate.json]

The model is written with ``save_pretrained`` and quantized by ``from_pretrained``. Every round, each contestant
generates the same number of tokens greedily from the same prompt, in a new order; ratios are medians of the paired
rounds with their quartiles; fused is dybit.fuse. Times are the process's CPU time where it has one thread (a busy
machine then disturbs less), else wall-clock time. The prompt's own pass is timed apart. benchmarks/compile.py has the
compiled step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import dybit
from dybit.demo import smollm2, smollm2_tokenizer
from dybit.operators import packed_weight

CONFIGS = {
    "W4, head 8": {"weights": 4, "group_size": 64},
    "W4, head int8": {"weights": 4, "group_size": 64, "embeddings": "int8"},
    "W4, head 4": {"weights": 4, "group_size": 64, "embeddings": 4},
    "W4A8, head 4": {
        "weights": 4,
        "group_size": 64,
        "embeddings": 4,
        "activations": "int8",
        "activation_mode": "dynamic",
    },
}
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="to generate in every round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    tokenizer = smollm2_tokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    models: dict[str, Any] = {"FP32": smollm2(permute=False)}
    loading = {}
    with tempfile.TemporaryDirectory() as folder:
        models["FP32"].save_pretrained(folder)
        for name in options.only:
            start = time.perf_counter()
            config = dybit.DyBitConfig(method="absmax", **CONFIGS[name])
            models[name] = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
            loading[name] = time.perf_counter() - start
    models |= {f"{name}, fused": dybit.fuse(models[name]) for name in options.only if "activations" in CONFIGS[name]}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in models}
    firsts: dict[str, list[float]] = {name: [] for name in models}
    text = {}

    def generate(model: Any, count: int) -> tuple[torch.Tensor, float]:
        begin = clock()
        ids = model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=2)
        return ids[0, prompt.shape[1] :], clock() - begin

    with torch.inference_mode():
        for name, model in models.items():
            text[name] = tokenizer.decode(generate(model, 16)[0].tolist())
        order, shuffle = list(models), random.Random(0)
        for _ in range(options.rounds):
            shuffle.shuffle(order)
            for name in order:
                first, whole = generate(models[name], 1)[1], generate(models[name], options.tokens)[1]
                firsts[name].append(first)
                rates[name].append((options.tokens - 1) / (whole - first))
    print(f"{packed_weight.isa()}, {torch.get_num_threads()} threads, {clock.__name__}, eager\n")
    print(f"| model | tokens/s | times FP32 | prompt of {prompt.shape[1]}, ms | text |\n|---|---|---|---|---|")
    results = {}
    for name, values in rates.items():
        low, ratio, high = np.percentile([b / a for a, b in zip(rates["FP32"], values, strict=True)], [25, 50, 75])
        rate, first = statistics.median(values), statistics.median(firsts[name]) * 1e3
        results[name] = {"tokens_per_second": rate, "ratio": [low, ratio, high], "prompt_ms": first}
        shown = " ".join(text[name].split())[:60]
        print(f"| {name} | {rate:.1f} | {ratio:.2f}× ({low:.2f} to {high:.2f}) | {first:.0f} | {shown} |")
    if options.json:
        facts = {"isa": packed_weight.isa(), "threads": torch.get_num_threads(), "clock": clock.__name__}
        options.json.write_text(json.dumps({**facts, "results": results, "text": text}, indent=1) + "\n")


if __name__ == "__main__":
    main()
