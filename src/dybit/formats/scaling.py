"""The words for scales: which types they have, what shares one, and how it is chosen."""

from __future__ import annotations

from typing import Literal, get_args

ScaleType = Literal["fp32", "bf16", "pow2", "e4m3"]
Granularity = Literal["tensor", "channel", "group"]
Method = Literal["mse", "absmax", "percentile"]

SCALE_TYPES: tuple[str, ...] = get_args(ScaleType)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)  # from coarse to fine
METHODS: tuple[str, ...] = get_args(Method)

SCALE_BITS: dict[str, int] = {"fp32": 32, "bf16": 16, "pow2": 8, "e4m3": 8}
