"""Tokens a second of ``generate``: SmolLM2-135M in FP32 against dybit through transformers.

The model is written with ``save_pretrained`` and quantized by ``from_pretrained``. In every round each model continues
the same prompt by the same number of tokens, greedily, and the models take turns in a new order. Ratios are medians of
the paired rounds with their quartiles. The pass over the prompt is timed apart. ``fused`` is ``dybit.fuse``. Times are
the processor time of the process where it has one thread, else wall-clock time.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
import transformers
from results import Column, Results, parser
from transformers import AutoModelForCausalLM

import dybit
from dybit.demo import smollm2, smollm2_tokenizer

RECIPES = {
    "W4, head 8": {"weights": 4, "group_size": 64},
    "W4A8, head 8": {"weights": 4, "group_size": 64, "activations": 8},
    "W4A8, head 4": {"weights": 4, "group_size": 64, "activations": 8, "embeddings": 4},
}
COLUMNS = (
    Column("model", "model"),
    Column("threads", "threads"),
    Column("rate", "tokens/s", 1),
    Column("ratio", "times as fast", 2, "×"),
    Column("prompt_ms", "prompt, ms", 0),
    Column("text", "text"),
)
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--tokens", type=int, default=32, help="to generate in every round")
    reader.add_argument("--rounds", type=int, default=7)
    reader.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    reader.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    recipes = {name: dybit.Recipe(method="absmax", **RECIPES[name]) for name in options.only}
    with Results(__file__, __doc__, COLUMNS, options, recipes) as results, torch.inference_mode():
        models: dict[str, Any] = {}
        for threads in dict.fromkeys(options.threads):
            if results.has(threads=threads):
                continue
            torch.set_num_threads(threads)
            models = models or contestants(options.only)
            for row in measure(models, options.tokens, options.rounds):
                results.add(threads=threads, **row)


def contestants(names: list[str]) -> dict[str, Any]:
    """FP32 and quantized models by name."""
    models: dict[str, Any] = {"FP32": smollm2(permute=False)}
    with tempfile.TemporaryDirectory() as folder:
        models["FP32"].save_pretrained(folder)
        for name in names:
            config = dybit.DyBitConfig(method="absmax", **RECIPES[name])
            models[name] = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return models | {f"{name}, fused": dybit.fuse(models[name]) for name in names}


def measure(models: dict[str, Any], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each model."""
    tokenizer = smollm2_tokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def generate(model: Any, count: int) -> tuple[torch.Tensor, float]:
        begin = clock()
        ids = model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=2)
        return ids[0, prompt.shape[1] :], clock() - begin

    text = {name: tokenizer.decode(generate(model, 16)[0].tolist()) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    prompts: dict[str, list[float]] = {name: [] for name in models}
    order, shuffle = list(models), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            first, whole = generate(models[name], 1)[1], generate(models[name], tokens)[1]
            prompts[name].append(first)
            rates[name].append((tokens - 1) / (whole - first))
    return [
        {
            "model": name,
            "rate": statistics.median(values),
            "ratio": np.percentile(np.divide(values, rates["FP32"]), [25, 50, 75]).tolist(),
            "prompt_ms": statistics.median(prompts[name]) * 1e3,
            "text": " ".join(text[name].split())[:60],
        }
        for name, values in rates.items()
    ]


if __name__ == "__main__":
    main()
