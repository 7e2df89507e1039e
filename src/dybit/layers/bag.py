"""Embedding bags: sums, means or maxima of rows that were looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def bag_of_rows(
    bag: nn.EmbeddingBag,
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Computes ``nn.EmbeddingBag.forward`` from rows instead of the table.

    Args:
        bag: The module; its weight is not read.
        rows: The rows of the indices: (indices, embedding_dim).
        input: The indices, as the module takes them.
        offsets: Where bags begin, as the module takes them.
        per_sample_weights: Factors of the rows, as the module takes them.

    Returns:
        (bags, embedding_dim).
    """
    flat = input.reshape(-1)
    index = torch.arange(rows.shape[0], device=input.device, dtype=input.dtype)
    padding = None
    if bag.padding_idx is not None:  # padding indices get an additional row
        padding = rows.shape[0]
        index = index.masked_fill(flat == bag.padding_idx, padding)
        rows = functional.pad(rows, (0, 0, 0, 1))
    return functional.embedding_bag(
        index.view(input.shape),
        rows,
        offsets,
        mode=bag.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=bag.include_last_offset,
        padding_idx=padding,
    )
