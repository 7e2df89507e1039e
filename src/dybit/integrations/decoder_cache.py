"""Keys and values in the memory of the kernels, as a cache of transformers: for fused decoders and for others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dybit.errors import DyBitError
from dybit.kernels.cache_config import FLOAT_CACHE, CacheConfig
from dybit.kernels.kv_cache import KVCache
from dybit.operators.decoder import DecoderSizes

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # layers that have keys and values


def cache(model: Any, config: CacheConfig | None = None) -> DecoderCache:  # noqa: ANN401  # a model of transformers
    """Makes an empty cache for ``model.generate(..., past_key_values=dybit.cache(model, config))``.

    A model that ``dybit.fuse`` fused attends to the codes. Others get all keys and values as floats in every step,
    which costs time and memory for a while, but gives the same results up to rounding.

    Args:
        model: A decoder-only model of transformers, on the CPU.
        config: How keys and values are held; by default 4 bits (``CacheConfig()``).

    Raises:
        DyBitError: The model has an encoder or layers without keys and values, or there is no extension.
    """
    described = getattr(model, "config", None)
    if described is None or not hasattr(described, "get_text_config"):
        raise DyBitError(f"model must be a model of transformers, not {type(model).__name__}")
    text = described.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(_ATTENTION))
    if text.is_encoder_decoder or others:
        reason = f"layers of {', '.join(others)}" if others else "an encoder"
        raise DyBitError(f"model must be a decoder with keys and values in every layer, but has {reason}")
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    return DecoderCache(text.num_hidden_layers - shared, CacheConfig() if config is None else config)


class DecoderCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one layer.

    Args:
        config: How they are held.
    """

    is_croppable = True
    held: KVCache | None = None

    def __init__(self, config: CacheConfig = FLOAT_CACHE) -> None:
        super().__init__()
        self.config = config

    def offload(self) -> None:
        """Does nothing: the memory is the CPU's."""

    def prefetch(self) -> None:
        """Does nothing."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty cache for the sizes of some keys and values."""
        self.begin(key_states.shape[0], key_states.shape[1], key_states.shape[3], value_states.shape[3])

    def begin(self, sequences: int, kv_heads: int, key_size: int, value_size: int) -> KVCache:
        """Returns the cache, which is made at the first call."""
        if self.held is None:
            self.held = KVCache(sequences, kv_heads, key_size, value_size, self.config)
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
        config: How keys and values are held; FP32 by default.
    """

    layers: list[DecoderCacheLayer]

    def __init__(self, layers: int, config: CacheConfig = FLOAT_CACHE) -> None:
        super().__init__(layers=[DecoderCacheLayer(config) for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all layers."""
        return sum(layer.held.nbytes for layer in self.layers if layer.held is not None)

    def natives(self, sequences: int, sizes: DecoderSizes) -> list[Any]:
        """Returns the extension's own object of each layer, which are made at the first call."""
        shape = sequences, sizes.kv_heads, sizes.head_size, sizes.head_size
        return [layer.begin(*shape).native for layer in self.layers]
