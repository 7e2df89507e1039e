"""The keys and values of one attention layer, held by the compiled extension (csrc/kv_cache.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.kernels.cache_config import FLOAT_CACHE, CacheConfig


class KVCache:
    """Keys and values of several sequences, each of its own length, and attention over them.

    Args:
        sequences: Number of sequences, empty at first.
        kv_heads: Heads of keys and values.
        key_size: Numbers of a key in a head.
        value_size: Numbers of a value in a head.
        config: How they are held; FP32 by default.

    Raises:
        DyBitError: A size is not positive, or there is no extension.
    """

    def __init__(
        self, sequences: int, kv_heads: int, key_size: int, value_size: int, config: CacheConfig = FLOAT_CACHE
    ) -> None:
        for name, size in (("kv_heads", kv_heads), ("key_size", key_size), ("value_size", value_size)):
            if size < 1:
                raise DyBitError(f"{name} must be positive, not {size}")
        self.kv_heads, self.key_size, self.value_size = kv_heads, key_size, value_size
        self.native = extension.new_kv_cache(kv_heads, key_size, value_size, *config.native())
        self.native.reset(sequences)

    def __deepcopy__(self, memo: dict[int, object]) -> KVCache:
        """Returns a cache of the same tokens. Both share memory until one of them changes it."""
        other = object.__new__(KVCache)
        vars(other).update(vars(self) | {"native": self.native.copy()})
        return other

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses to be pickled.

        Raises:
            DyBitError: Always.
        """
        raise DyBitError("a KV cache cannot be pickled; copy.deepcopy copies it, read() returns its keys and values")

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.native.sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        return [self.native.length(i) for i in range(self.sequences)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory. What sequences share counts once."""
        return int(self.native.nbytes)

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None = None) -> None:
        """Adds tokens to every sequence.

        Args:
            keys: float32 of shape (sequences, kv_heads, tokens, key_size).
            values: float32 of shape (sequences, kv_heads, tokens, value_size).
            counts: The tokens of each sequence to add, the first ones; all by default.

        Raises:
            DyBitError: A tensor has another type or shape, or a count is beyond the tokens.
        """
        tokens = keys.shape[2] if keys.ndim == 4 else 0
        k = _Heads("keys", keys, (self.sequences, self.kv_heads, tokens, self.key_size))
        v = _Heads("values", values, (self.sequences, self.kv_heads, tokens, self.value_size))
        counts = _counts(counts, self.sequences, tokens)
        self.native.append(
            [(i, counts[i], k.of(i), v.of(i)) for i in range(self.sequences)],
            torch.get_num_threads(),
        )

    def attend(
        self,
        queries: Tensor,
        scale: float,
        counts: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """Computes softmax(queries · keysᵀ · scale) · values for the last tokens of every sequence.

        A token sees the tokens from its sequence's start up to itself. One that sees none gets zeros.

        Args:
            queries: float32 of shape (sequences, heads, tokens, key_size); heads is a multiple of kv_heads.
            scale: Factor of the scores.
            counts: The queries of each sequence, the first ones; all by default. The others get zeros.
            starts: Tokens of each sequence that are padding on the left; none by default.
            window: Tokens that a token sees, itself included; all by default.
            soft_cap: Scores become soft_cap · tanh(score / soft_cap).

        Returns:
            float32 of shape (sequences, tokens, heads, value_size).

        Raises:
            DyBitError: A tensor has another type or shape, or a count is beyond the tokens.
        """
        heads, tokens = queries.shape[1:3] if queries.ndim == 4 else (0, 0)
        q = _Heads("queries", queries, (self.sequences, heads, tokens, self.key_size))
        if heads == 0 or heads % self.kv_heads:
            raise DyBitError(f"queries must have a multiple of {self.kv_heads} heads, not {heads}")
        counts = _counts(counts, self.sequences, tokens)
        for i, count in enumerate(counts):
            if count > self.native.length(i):
                raise DyBitError(
                    f"counts must be at most the {self.native.length(i)} tokens of sequence {i}, not {count}"
                )
        new = torch.empty if min(counts, default=0) == tokens else torch.zeros
        out = new(self.sequences, tokens, heads, self.value_size, dtype=torch.float32, device="cpu")
        results = _Heads("results", out.transpose(1, 2), (self.sequences, heads, tokens, self.value_size))
        starts = [0] * self.sequences if starts is None else starts
        self.native.attend(
            [(i, counts[i], starts[i], q.of(i), results.of(i)) for i in range(self.sequences)],
            heads,
            scale,
            window or 0,
            soft_cap or 0.0,
            torch.get_num_threads(),
        )
        return out

    def crop(self, length: int) -> None:
        """Keeps at most the first ``length`` tokens of every sequence.

        Raises:
            DyBitError: The length is negative.
        """
        if length < 0:
            raise DyBitError(f"length must not be negative, not {length}")
        for i in range(self.sequences):
            self.native.crop(i, length)

    def reorder(self, indices: Sequence[int]) -> None:
        """Makes sequence i what sequence ``indices[i]`` was. Their number may change; copies share memory.

        Raises:
            DyBitError: There is no such sequence.
        """
        if any(not 0 <= i < self.sequences for i in indices):
            raise DyBitError(f"indices must be from 0 to {self.sequences - 1}, not {list(indices)}")
        self.native.reorder(list(indices))

    def reset(self, sequences: int) -> None:
        """Forgets everything; there are ``sequences`` empty sequences afterwards."""
        self.native.reset(sequences)

    def read(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Returns the keys (kv_heads, length, key_size) and values (kv_heads, length, value_size) of a sequence."""
        length = self.native.length(sequence)
        keys, values = (
            torch.empty(self.kv_heads, length, size, dtype=torch.float32, device="cpu")
            for size in (self.key_size, self.value_size)
        )
        self.native.read(
            sequence,
            address("keys", keys, torch.float32, keys.shape),
            address("values", values, torch.float32, values.shape),
        )
        return keys, values


class _Heads:
    """A checked (sequences, heads, tokens, size) tensor as arguments of the extension."""

    def __init__(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise DyBitError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")
        swapped = not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous()  # as projections give it
        self.memory = tensor.transpose(1, 2) if swapped else tensor.contiguous()
        self.address = address(name, self.memory, torch.float32, self.memory.shape)
        self.batch, head, token, _ = (self.memory.transpose(1, 2) if swapped else self.memory).stride()
        self.strides = head, token

    def of(self, sequence: int) -> tuple[int, tuple[int, int]]:
        """Address, and the strides of head and token."""
        return self.address + sequence * self.batch * self.memory.element_size(), self.strides


def _counts(counts: Sequence[int] | None, sequences: int, tokens: int) -> Sequence[int]:
    if counts is None:
        return [tokens] * sequences
    if len(counts) != sequences or any(not 0 <= count <= tokens for count in counts):
        raise DyBitError(f"counts must be {sequences} numbers from 0 to {tokens}, not {list(counts)}")
    return counts
