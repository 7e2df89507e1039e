"""A quantized KV cache: divergence of SmolLM2-135M from FP32, and the time of attention over it.

Weights are FP32. Windows of 512 tokens pass in one call; keys after rotary positions and values are rounded before the
attention reads them. The rivals are rounded by plain torch in the layout of the cache: keys by channel in groups of 32
tokens with an offset, values by token in groups of 64 channels, scales and offsets in BF16, the largest number of a
group becoming the largest level. ``int`` has an offset for values as well. The other rows run the cache of dybit. KL
is over all positions, ± its standard error over windows. Bits count scales and offsets. Milliseconds are of
a step of decoding, all layers' attention at 4,096 tokens with caches larger than the processor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from results import Column, Results, parser
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dybit
from dybit import CacheConfig
from dybit.demo import smollm2, smollm2_batches
from dybit.formats import catalogue
from dybit.kernels.kv_cache import KVCache

COLUMNS = (
    Column("cache", "cache"),
    Column("bits", "bits", 3),
    Column("divergence", "KL, nats", 5),
    Column("step_ms", "attention of a step, ms", 2),
    Column("memory", "memory of BF16's", 3),
)
OWN = {
    "FP32": CacheConfig(None, None, rotate_values=False),
    "BF16": CacheConfig("bf16", "bf16", rotate_values=False),
    **{f"dybit {bits}": CacheConfig(bits, bits) for bits in (8, 6, 4, 3, 2)},
    "dybit 4, values not rotated": CacheConfig(rotate_values=False),
    "dybit 3, values not rotated": CacheConfig(3, 3, rotate_values=False),
    "dybit 4, groups of 64": CacheConfig(group_size=64),
}
RIVALS = ("int8", "e4m3", "int4", "nf4", "s4r2", "s4r2mid", "int3", "nf3")
HEADS, KV_HEADS, SIZE, CONTEXT = 9, 3, 64, 4096


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--windows", type=int, default=4, help="of 512 tokens")
    reader.add_argument("--only", nargs="+", choices=[*OWN, *RIVALS], default=[*OWN, *RIVALS])
    options = reader.parse_args()
    torch.set_num_threads(1)
    with Results(__file__, __doc__, COLUMNS, options) as results, torch.inference_mode():
        names = [name for name in options.only if not results.has(cache=name)]
        if not names:
            return
        model: Any = smollm2(permute=False)
        layers = model.config.num_hidden_layers
        batches = smollm2_batches("evaluation", 1, options.windows, 512)
        expected = [log_softmax(model(**batch).logits[0], -1) for batch in batches]
        AttentionInterface.register("rounded", attend_rounded)
        for name in names:
            row: dict[str, Any] = {"cache": name}
            if name in OWN:
                given = [{**batch, "past_key_values": dybit.cache(model, OWN[name])} for batch in batches]
                model.set_attn_implementation("sdpa")
                row["bits"] = sum(OWN[name].bits_per_number(SIZE)) / 2
                row["step_ms"], row["memory"] = step(OWN[name], layers)
            else:
                given = batches
                model.set_attn_implementation("rounded")
                ROUNDERS["keys"], ROUNDERS["values"], row["bits"] = rival(name)
            row["divergence"] = divergence(model, given, expected)
            results.add(**row)


def divergence(model: Any, batches: list[dict[str, Any]], expected: list[Tensor]) -> list[float]:
    """The mean over windows and its standard error."""
    found = []
    for batch, reference in zip(batches, expected, strict=True):
        logits = log_softmax(model(**batch).logits[0], -1)
        found.append(float((reference.exp() * (reference - logits)).sum(-1).mean()))
    return [float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else 0.0]


def step(config: CacheConfig, layers: int, rounds: int = 7) -> tuple[float, float]:
    """Milliseconds of the attention of all layers for one token, the best of some rounds, and memory of BF16's."""
    caches = [KVCache(1, KV_HEADS, SIZE, SIZE, config) for _ in range(layers)]
    k, v = torch.randn(2, 1, KV_HEADS, CONTEXT, SIZE).unbind()
    for cache in caches:
        cache.append(k, v)
    q = torch.randn(1, HEADS, 1, SIZE)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for cache in caches:
            cache.attend(q, SIZE**-0.5)
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3, caches[0].nbytes / (CONTEXT * KV_HEADS * SIZE * 2 * 2)


ROUNDERS: dict[str, Callable[[Tensor], Tensor]] = {}


def attend_rounded(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers', of rounded keys and values."""
    return sdpa_attention_forward(module, query, ROUNDERS["keys"](key), ROUNDERS["values"](value), mask, **options)


def rival(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]:
    """Rounds keys, rounds values, and the bits of a number."""
    book = catalogue.family(name).books[0]
    levels = torch.from_numpy(book.levels.astype(np.float32))
    whole = name.startswith("int")
    if whole:  # all 2^bits levels, which an offset moves
        levels = torch.arange(2**book.bits, dtype=torch.float32) - (2**book.bits - 1) / 2

    def by_channel(keys: Tensor) -> Tensor:
        tokens = keys.shape[2] // 32 * 32
        groups = keys[:, :, :tokens].unflatten(2, (-1, 32)).transpose(3, 4)
        rounded = rounded_groups(groups, levels, True).transpose(3, 4).flatten(2, 3)
        return torch.cat([rounded, keys[:, :, tokens:]], 2)

    def by_token(values: Tensor) -> Tensor:
        return rounded_groups(values, levels, whole)

    return by_channel, by_token, book.bits + (1 + (0.5 if whole else 0.25)) / 2


def rounded_groups(x: Tensor, levels: Tensor, centred: bool) -> Tensor:
    """Rounds groups, the last dimension."""
    low, high = x.amin(-1, True), x.amax(-1, True)
    offset = ((low + high) / 2 if centred else torch.zeros_like(low)).bfloat16().float()
    scale = torch.maximum((high - offset) / levels[-1], (low - offset) / levels[0]).bfloat16().float()
    ratio = ((x - offset) / scale.clamp_min(1e-30)).contiguous()
    return levels[torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)] * scale + offset


if __name__ == "__main__":
    main()
