"""Image classifiers of 224×224 pixels: FP32 against W4A8, layer by layer and fused.

The models take turns in one process, in a new order every round. Times are medians; ratios are medians of the paired
rounds with their quartiles. All models are channels-last, with batch norms merged into the convolutions. ResNet-18 has
random weights, since speed does not depend on them. EfficientNet-Lite0 is the demo's.
``fused`` is ``dybit.fuse``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
from networks import resnet18
from results import Column, Results, compared, parser
from torch import Tensor, nn

from dybit import Recipe, fuse, quantize_
from dybit.demo import efficientnet_lite0
from dybit.measure.timing import compare
from dybit.models.batch_norm import find_pairs, fold_

RECIPE = Recipe(weights=4, activations="int8", granularity="channel", method="absmax", activation_method="absmax")
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("fp32_ms", "FP32, ms", 1),
    Column("dybit_ms", "dybit, ms", 1),
    Column("dybit_ratio", "times as fast", 2, "×"),
    Column("fused_ms", "fused, ms", 1),
    Column("fused_ratio", "times as fast", 2, "×"),
)


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": resnet18, "EfficientNet-Lite0": efficientnet_lite0}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--seconds", type=float, default=10.0, help="of every measurement")
    reader.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    reader.add_argument("--batch", type=int, nargs="+", default=[1])
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    cases = [(threads, batch) for threads in dict.fromkeys(options.threads) for batch in options.batch]
    with Results(__file__, __doc__, COLUMNS, options, {"W4A8": RECIPE}) as results:
        for name, make in MODELS.items():
            todo = [case for case in cases if not results.has(model=name, threads=case[0], batch=case[1])]
            if not todo:
                continue
            models, picture = contestants(make(), max(options.batch))
            for threads, batch in todo:
                torch.set_num_threads(threads)
                x = picture[:batch].contiguous(memory_format=torch.channels_last)
                times = compare({key: partial(model, x) for key, model in models.items()}, options.seconds)
                results.add(model=name, batch=batch, threads=threads, **compared(times))


def contestants(exact: nn.Module, batch: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The forms of a model, and a batch of random pictures (batch, 3, 224, 224)."""
    fold_(exact, find_pairs(exact))
    exact = exact.to(memory_format=torch.channels_last)
    picture = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    picture = picture.to(memory_format=torch.channels_last)
    quantized = quantize_(copy.deepcopy(exact), RECIPE, calibration=[picture[:1]])
    return {"fp32": exact, "dybit": quantized, "fused": fuse(quantized, picture)}, picture


if __name__ == "__main__":
    main()
