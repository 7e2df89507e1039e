"""torch.compile: the forward pass of MiniLM and a decoding step of SmolLM2-135M, FP32 and W4A8, eager and compiled.

All take turns in one process, in a new order every round. Times are medians; ratios are medians of the paired rounds
with their quartiles. Compiling takes a minute or two for each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from results import Column, Results, parser
from transformers import StaticCache

import dybit
from dybit.demo import minilm, smollm2
from dybit.measure.timing import compare

RECIPE = dybit.Recipe(
    weights=4, group_size=64, activations="int8", activation_mode="dynamic", method="absmax", embeddings=None
)
RECIPES = {"minilm": RECIPE, "smollm2": dybit.Recipe.from_dict({**RECIPE.to_dict(), "embeddings": 4})}
COLUMNS = (
    Column("model", "model"),
    Column("kind", ""),
    Column("ms", "ms", 1),
    Column("ratio", "times as fast as FP32, eager", 2, "×"),
)


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
    models = {"FP32": exact, "W4A8": dybit.quantize_(copy.deepcopy(exact), RECIPES[name])}
    calls: dict[str, Callable[[], Any]] = {}
    for kind, model in models.items():
        if name == "minilm":
            ids = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))
            run, arguments = model, (ids, torch.ones_like(ids))
        else:
            run, arguments = Step(model), (torch.tensor([[7]]), torch.tensor([[32]]))
        calls[f"{kind}, eager"] = partial(run, *arguments)
        calls[f"{kind}, compiled"] = partial(torch.compile(run, fullgraph=True, dynamic=False), *arguments)
    return calls


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--model", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    reader.add_argument("--rounds", type=int, default=25)
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    with Results(__file__, __doc__, COLUMNS, options, RECIPES) as results:
        for name in options.model:
            if results.has(model=name):
                continue
            with torch.inference_mode():
                calls = contestants(name)
                for call in calls.values():
                    call(), call()
            for kind, time in compare(calls, seconds=1e9, rounds=options.rounds).items():
                ratio = [time.ratio_low, time.ratio, time.ratio_high]
                results.add(model=name, kind=kind, ms=time.median * 1e3, ratio=ratio)


if __name__ == "__main__":
    main()
