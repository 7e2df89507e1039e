"""Sentence encoder MiniLM-L6: FP32 against W4A8.

The models take turns in one process, in a new order every round. Times are medians; ratios are medians of the paired
rounds with their quartiles. Attention and norms run in torch, except in ``fused``, which is ``dybit.fuse``. Embeddings
stay in FP32. Needs the models of the demo.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial

import torch
from results import Column, Results, compared, parser

from dybit import Recipe, fuse, quantize_
from dybit.demo import minilm
from dybit.measure.timing import compare

RECIPE = Recipe(
    weights=4, activations="int8", group_size=128, activation_mode="dynamic", method="absmax", embeddings=None
)
COLUMNS = (
    Column("batch", "batch"),
    Column("tokens", "tokens"),
    Column("threads", "threads"),
    Column("fp32_ms", "FP32, ms", 1),
    Column("dybit_ms", "dybit, ms", 1),
    Column("dybit_ratio", "times as fast", 2, "×"),
    Column("fused_ms", "fused, ms", 1),
    Column("fused_ratio", "times as fast", 2, "×"),
)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    reader.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    reader.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    with Results(__file__, __doc__, COLUMNS, options, {"W4A8": RECIPE}) as results:
        exact = minilm()
        quantized = quantize_(copy.deepcopy(exact), RECIPE)
        ids = torch.randint(1000, 20000, (2, 128))
        models = {"fp32": exact, "dybit": quantized, "fused": fuse(quantized, (ids, torch.ones_like(ids)))}
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            for batch in options.batch:
                if results.has(batch=batch, threads=threads):
                    continue
                ids = torch.randint(1000, 20000, (batch, 128), generator=torch.Generator().manual_seed(0))
                runs = {name: partial(model, ids, torch.ones_like(ids)) for name, model in models.items()}
                row = {"batch": batch, "tokens": 128, "threads": threads}
                results.add(**row, **compared(compare(runs, options.seconds)))


if __name__ == "__main__":
    main()
