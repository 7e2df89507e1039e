"""The cache of a fused decoder, as transformers' caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dybit.kernels.kv_cache import KVCache
from dybit.operators.decoder import DecoderSizes


class DecoderCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one layer."""

    is_croppable = True
    held: KVCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty cache for the sizes of some keys and values."""
        self.begin(key_states.shape[0], key_states.shape[1], key_states.shape[3], value_states.shape[3])

    def begin(self, sequences: int, kv_heads: int, key_size: int, value_size: int) -> KVCache:
        """Returns the cache, which is made at the first call."""
        if self.held is None:
            self.held = KVCache(sequences, kv_heads, key_size, value_size)
            self.is_initialized = True
        return self.held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Appends tokens and returns all keys and values, (sequences, heads, length, size)."""
        held = self.begin(key_states.shape[0], key_states.shape[1], key_states.shape[3], value_states.shape[3])
        held.append(key_states.float(), value_states.float())
        keys, values = zip(*(held.read(i) for i in range(held.sequences)), strict=True)
        return torch.stack(keys).to(key_states.dtype), torch.stack(values).to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and offset of masks."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens."""
        return self.held.native.length(0) if self.held is not None and self.held.sequences else 0

    def get_max_length(self) -> int:
        """Returns -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.held, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, given as a negative number."""
        if self.held is not None and tokens_to_remove:
            self.held.crop(max(0, self.get_seq_length() - abs(tokens_to_remove)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.held is not None:
            self.held.reorder([i for i in range(self.held.sequences) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of some indices."""
        if self.held is not None:
            self.held.reorder(indices.tolist())


class DecoderCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of all layers.

    Args:
        layers: Their number.
    """

    layers: list[DecoderCacheLayer]

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[DecoderCacheLayer() for _ in range(layers)])

    def natives(self, sequences: int, sizes: DecoderSizes) -> list[Any]:
        """Returns the extension's own object of each layer, which are made at the first call."""
        shape = sequences, sizes.kv_heads, sizes.head_size, sizes.head_size
        return [layer.begin(*shape).native for layer in self.layers]
