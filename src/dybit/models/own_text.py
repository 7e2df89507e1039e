"""Calibration text that a language model writes itself (as in LLM-QAT, Liu et al., 2023).

It covers all kinds of text that the model knows, where a given text is of one kind. No data is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.models.running import evaluating

_SEED = 0x0DB17


def own_text(
    model: nn.Module,
    *,
    sequences: int = 16,
    length: int = 512,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Has a language model write text: every token is drawn from the model's distribution, at temperature 1.

    The result is the same in every call on the same machine. Keys and values of all tokens are in memory.

    Args:
        model: A language model of transformers: it has ``config.bos_token_id``, with which every sequence starts,
            and takes and returns ``past_key_values``.
        sequences: Number of sequences. They are written together.
        length: Tokens of each, the first one included. The longest that the model takes if it takes no more.
        progress: Called with a line of text after every 64 tokens.

    Returns:
        A batch for each sequence, with ``input_ids`` of shape (1, length), int64.

    Raises:
        DyBitError: The model is no such model, or a number is below one.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise DyBitError(f"{name} must be at least 1, not {value!r}")
    config: Any = getattr(model, "config", None)
    start = getattr(config, "bos_token_id", None)
    able = getattr(model, "can_generate", lambda: False)()
    if not able or getattr(config, "is_encoder_decoder", False) or not isinstance(start, int):
        raise DyBitError(
            f"a {type(model).__name__} cannot write its own calibration text: it must be a decoder of transformers "
            "with config.bos_token_id; pass batches as calibration"
        )
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.full((sequences, length), start, dtype=torch.int64, device="cpu")
    cache: Any = None
    with evaluating(model):
        for place in range(1, length):
            given = ids[:, place - 1 : place].to(device)
            result = cast(Any, model)(input_ids=given, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            chances = result.logits[:, -1].float().softmax(-1).cpu()
            ids[:, place] = torch.multinomial(chances, 1, generator=generator)[:, 0]
            if progress and place % 64 == 0:
                progress(f"writing calibration text: {place} of {length} tokens")
    return [{"input_ids": row[None]} for row in ids]
