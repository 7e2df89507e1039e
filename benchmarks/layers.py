"""Single layers of every kind, not fused: FP32 against the default recipe.

The recipe is ``Recipe(weights=4, activations=8)`` and nothing else, calibrated on inputs like those that are timed.
FP32 and the quantized layer take turns in one process; shown are medians and the median of the paired ratios with its
quartiles.
Below 1 a layer is slower than in FP32.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from results import Column, Results, compared, parser
from torch import Tensor, nn

from dybit import Recipe, quantize_
from dybit.measure.timing import compare

RECIPE = Recipe(weights=4, activations=8)
COLUMNS = (
    Column("layer", "layer"),
    Column("inputs", "inputs"),
    Column("threads", "threads"),
    Column("fp32_ms", "FP32, ms", 3),
    Column("dybit_ms", "dybit, ms", 3),
    Column("dybit_ratio", "times as fast", 2, "×"),
)
Made = tuple[nn.Module, Callable[[int], Tensor]]  # a layer, and its input for a batch


def dense(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def indices(count: int, length: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(count, (batch, length), generator=torch.Generator().manual_seed(batch))


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        found: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found


def layers() -> dict[str, Made]:
    """A layer of every kind, at sizes of real networks."""
    return {
        "Linear 384 → 384, 1 row": (nn.Linear(384, 384), dense(384)),
        "Linear 384 → 1536, 128 rows": (nn.Linear(384, 1536), dense(128, 384)),
        "Linear 4096 → 4096, 1 row": (nn.Linear(4096, 4096), dense(4096)),
        "Conv1d 64 → 128, 3, length 256": (nn.Conv1d(64, 128, 3, padding=1), dense(64, 256)),
        "Conv2d 3 → 64, 7, stride 2, 224²": (nn.Conv2d(3, 64, 7, 2, 3), dense(3, 224, 224)),
        "Conv2d 64 → 64, 3, 56²": (nn.Conv2d(64, 64, 3, padding=1), dense(64, 56, 56)),
        "Conv2d 96 → 24, 1, 56²": (nn.Conv2d(96, 24, 1), dense(96, 56, 56)),
        "Conv2d 512 → 512, 3, 7²": (nn.Conv2d(512, 512, 3, padding=1), dense(512, 7, 7)),
        "Conv3d 16 → 32, 3, 8 × 28²": (nn.Conv3d(16, 32, 3, padding=1), dense(16, 8, 28, 28)),
        "depthwise Conv2d 144, 3, 56²": (nn.Conv2d(144, 144, 3, padding=1, groups=144), dense(144, 56, 56)),
        "depthwise Conv2d 672, 5, 14²": (nn.Conv2d(672, 672, 5, padding=2, groups=672), dense(672, 14, 14)),
        "depthwise Conv1d 256, 3, length 256": (nn.Conv1d(256, 256, 3, padding=1, groups=256), dense(256, 256)),
        "grouped Conv2d 128 → 128, 3, 28², 4 groups": (nn.Conv2d(128, 128, 3, padding=1, groups=4), dense(128, 28, 28)),
        "grouped Conv2d 128 → 128, 3, 28², 32 groups": (
            nn.Conv2d(128, 128, 3, padding=1, groups=32),
            dense(128, 28, 28),
        ),
        "ConvTranspose1d 64 → 32, 4, stride 2": (nn.ConvTranspose1d(64, 32, 4, 2, 1), dense(64, 128)),
        "ConvTranspose2d 64 → 32, 4, stride 2, 28²": (nn.ConvTranspose2d(64, 32, 4, 2, 1), dense(64, 28, 28)),
        "ConvTranspose3d 16 → 8, 4, stride 2": (nn.ConvTranspose3d(16, 8, 4, 2, 1), dense(16, 4, 14, 14)),
        "Embedding 30000 × 384, 128 tokens": (nn.Embedding(30000, 384), indices(30000, 128)),
        "EmbeddingBag 30000 × 64, 32 tokens": (nn.EmbeddingBag(30000, 64), indices(30000, 32)),
        "LSTM 128 → 256, 32 steps": (nn.LSTM(128, 256, batch_first=True), dense(32, 128)),
        "GRU 128 → 256, 32 steps": (nn.GRU(128, 256, batch_first=True), dense(32, 128)),
        "LSTMCell 256 → 512": (nn.LSTMCell(256, 512), dense(256)),
        "MultiheadAttention 384, 12 heads, 128 tokens": (SelfAttention(384, 12), dense(128, 384)),
        "experts of Mixtral, 8 of 256 → 512, 32 tokens": (experts(), dense(32, 256)),
    }


def experts() -> nn.Module:
    """A layer of experts with its router."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=256, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block: nn.Module = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    return block


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--layers", nargs="+", default=[""], metavar="WORD", help="those whose names have a word")
    reader.add_argument("--threads", type=int, nargs="+", default=[1])
    reader.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    reader.add_argument("--seconds", type=float, default=1.0, help="of every measurement")
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with Results(__file__, __doc__, COLUMNS, options, {"default": RECIPE}) as results:
        for (name, (layer, data)), threads in itertools.product(layers().items(), dict.fromkeys(options.threads)):
            if not any(word in name for word in options.layers):
                continue
            torch.set_num_threads(threads)
            exact = nn.Sequential(layer).eval()
            quantized = quantize_(copy.deepcopy(exact), RECIPE, calibration=[data(8)])
            for batch in options.batch:
                key: dict[str, Any] = {"layer": name, "inputs": batch, "threads": threads}
                if results.has(**key):
                    continue
                runs = {"fp32": partial(exact, data(batch)), "dybit": partial(quantized, data(batch))}
                results.add(**key, **compared(compare(runs, options.seconds)))


if __name__ == "__main__":
    main()
