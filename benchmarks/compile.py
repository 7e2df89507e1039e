"""What torch.compile gains: MiniLM's forward and SmolLM2's decoding step, FP32 and W4A8, eager and compiled.

    python benchmarks/compile.py [--model minilm smollm2] [--json compile.json]

Everything runs paired and interleaved in one process. Times are the process's CPU time where it has one thread (a busy
machine then disturbs less), else wall-clock time. Compiling takes a minute or two for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StaticCache

import dybit
from dybit.demo import minilm, smollm2
from dybit.operators import packed_weight

RECIPE = {"weights": 4, "group_size": 64, "activations": "int8", "activation_mode": "dynamic", "method": "absmax"}


class Step(torch.nn.Module):
    """One decoding step on a cache of fixed size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=128)
        model(torch.arange(32)[None], past_key_values=self.cache)

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits after one token at a position, shape (1, 1)."""
        return self.model(token, past_key_values=self.cache, position_ids=position).logits


def contestants(name: str) -> dict[str, Callable[[], Any]]:
    exact = minilm() if name == "minilm" else smollm2(permute=False)
    recipe = dybit.Recipe(**RECIPE, embeddings=None if name == "minilm" else 4)
    models = {"FP32": exact, "W4A8": dybit.quantize_(copy.deepcopy(exact), recipe)}
    calls: dict[str, Callable[[], Any]] = {}
    for kind, model in models.items():
        if name == "minilm":
            ids = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))
            run, arguments = model, (ids, torch.ones_like(ids))
        else:
            run, arguments = Step(model), (torch.tensor([[7]]), torch.tensor([[32]]))
        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        calls[f"{kind} eager"] = lambda run=run, arguments=arguments: run(*arguments)
        calls[f"{kind} compiled"] = lambda run=compiled, arguments=arguments: run(*arguments)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["minilm", "smollm2"], choices=["minilm", "smollm2"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    results: dict[str, Any] = {}
    print(f"{packed_weight.isa()}, {torch.get_num_threads()} threads, {clock.__name__}\n")
    print("| model | | ms | times FP32 eager |\n|---|---|---|---|")
    for name in options.model:
        with torch.no_grad():
            calls = contestants(name)
            for call in calls.values():
                call(), call()
            times: dict[str, list[float]] = {kind: [] for kind in calls}
            order, shuffle = list(calls), random.Random(0)
            for _ in range(options.rounds):
                shuffle.shuffle(order)
                for kind in order:
                    begin = clock()
                    calls[kind]()
                    times[kind].append((clock() - begin) * 1e3)
        for kind, values in times.items():
            pairs = [a / b for a, b in zip(times["FP32 eager"], values, strict=True)]
            low, ratio, high = np.percentile(pairs, [25, 50, 75])
            results[f"{name}, {kind}"] = {"ms": statistics.median(values), "ratio": [low, ratio, high]}
            shown = f"{ratio:.2f}× ({low:.2f} to {high:.2f})"
            print(f"| {name} | {kind} | {statistics.median(values):.1f} | {shown} |", flush=True)
    if options.json:
        facts = {"isa": packed_weight.isa(), "threads": torch.get_num_threads(), "clock": clock.__name__}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
