"""A decoder-only transformer in the kernels: one call computes all layers (csrc/decoder.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.kernels.arguments import address
from dybit.operators.activations import activation_number
from dybit.operators.packed_weight import PackedWeight, Product

_F32, _I64, _I32 = torch.float32, torch.int64, torch.int32
_CHUNK = 256  # rows: enough to pay for unpacking the weights, and few enough that results stay in the cache


@dataclass(frozen=True, eq=False)
class DecoderNorm:
    """A norm of rows.

    Args:
        weight: float32 of shape (columns,).
        bias: As ``weight``, or None.
        eps: Is added to the variance.
        root_mean_square: Whether the mean is left alone.
        shift: Is added to the weight.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    root_mean_square: bool
    shift: float = 0.0

    def given(self, columns: int) -> tuple[Any, ...]:
        """Returns the extension's arguments.

        Raises:
            DyBitError: A tensor has another type, shape, device or layout.
        """
        where = [address("norm", x, _F32, (columns,)) for x in (self.weight, self.bias)]
        return *where, self.eps, self.root_mean_square, self.shift


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer.

    Args:
        norms: Before and after attention, before and after the MLP, of the queries and of the keys of a head.
        inputs: The products of queries, keys and values, or one of all three.
        out: The product after attention.
        gates: The products of gate and up, one of both, or one without a gate.
        gated: Whether there is a gate.
        down: The last product of the MLP.
        activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.
        scale: Of the scores of attention.
        score_cap: ``cap · tanh(score / cap)`` replaces scores; 0 for none.
        window: The number of tokens that a token sees, itself included; 0 for all before it.
        rotary: Which table of rotary positions queries and keys use; -1 for none.
    """

    norms: tuple[DecoderNorm | None, ...]
    inputs: tuple[Product, ...]
    out: Product
    gates: tuple[Product, ...]
    gated: bool
    down: Product
    activation: str
    scale: float
    score_cap: float = 0.0
    window: int = 0
    rotary: int = -1


@dataclass(frozen=True)
class DecoderSizes:
    """Widths.

    Args:
        hidden: Numbers of a row between the layers.
        intermediate: Numbers of a row within the MLP.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_size: Numbers of a head.
        rotary_pairs: Pairs of a head that turn with the position: number i and number i + ``rotary_pairs``.
        parallel: Whether attention and MLP have the same input, and both are added to it.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_pairs: int = 0
    parallel: bool = False


Table = PackedWeight | Tensor  # of (rows, hidden); the tensor is float32


class Decoder:
    """All layers of a decoder, from tokens to logits.

    Args:
        sizes: Widths.
        layers: The layers.
        tokens: The embedding.
        positions: Learned positions, which are added to the embedding, or None.
        last: The norm after the last layer, or None.
        head: The product of the logits, or None.
        embedding_scale: Multiplies the embedding.
        logit_cap: ``cap · tanh(logit / cap)`` replaces logits; 0 for none.

    Raises:
        DyBitError: There is no extension, a tensor has another type, shape, device or layout, or weights do not fit
            each other.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        layers: Sequence[DecoderLayer],
        tokens: Table,
        *,
        positions: Table | None = None,
        last: DecoderNorm | None = None,
        head: Product | None = None,
        embedding_scale: float = 1.0,
        logit_cap: float = 0.0,
    ) -> None:
        self.sizes = sizes
        #: Outputs of the head; 0 without one.
        self.outputs = 0 if head is None else head.weight.shape[0]
        products = [p for layer in layers for p in (*layer.inputs, layer.out, *layer.gates, layer.down)]
        #: Bytes of weights that a token reads.
        self.nbytes = sum(p.weight.nbytes for p in (*products, *(() if head is None else (head,))))
        self._kept: tuple[Any, ...] = (layers, tokens, positions, last, head)  # the extension holds their addresses
        self._rotary: list[tuple[Tensor, Tensor]] = []  # earlier ones too: another thread may still read them
        s = sizes
        widths = (s.hidden, s.intermediate, s.heads, s.kv_heads, s.head_size, s.rotary_pairs, int(s.parallel), _CHUNK)
        given = None if last is None else last.given(s.hidden)
        ends = _table(tokens, s.hidden), _table(positions, s.hidden), given, None if head is None else head.given
        self._decoder = extension.new_decoder(widths, *ends, embedding_scale, logit_cap)
        for layer in layers:
            columns = (s.hidden,) * 4 + (s.head_size,) * 2
            norms = [None if n is None else n.given(size) for n, size in zip(layer.norms, columns, strict=True)]
            numbers = activation_number(layer.activation), layer.window, layer.rotary, int(layer.gated)
            gates = [gate.given for gate in layer.gates]
            weights = [p.given for p in layer.inputs], layer.out.given, gates, layer.down.given
            try:
                self._decoder.add(norms, *weights, numbers, (layer.scale, layer.score_cap))
            except ValueError as error:
                raise DyBitError(str(error)) from None

    def set_rotary(self, index: int, cosine: Tensor, sine: Tensor) -> None:
        """Replaces a table of rotary positions, for later runs.

        Args:
            index: Which table.
            cosine: float32 of shape (positions, rotary pairs).
            sine: As ``cosine``.

        Raises:
            DyBitError: A tensor has another type, shape, device or layout.
        """
        shape = (len(cosine), self.sizes.rotary_pairs)
        where = address("cosine", cosine, _F32, shape), address("sine", sine, _F32, shape)
        self._rotary.append((cosine, sine))
        self._decoder.set_rotary(index, *where, len(cosine))

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        caches: Sequence[Any],
        starts: Tensor | None = None,
        *,
        hidden: bool = False,
        logits: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Appends the keys and values of tokens to caches, and computes the rows after the last layer.

        Args:
            x: Tokens, int64 of shape (sequences, rows), or embeddings, float32 of shape (sequences, rows, hidden).
            positions: int64 of shape (sequences or 1, rows).
            caches: For each layer the extension's own object.
            starts: int32 of shape (sequences,): the first token of each sequence that is seen; earlier ones are
                padding. None for 0.
            hidden: Whether to return rows after the last norm.
            logits: Of how many rows at the end to return logits.

        Returns:
            float32 of shape (sequences, rows, hidden) or None, and float32 of shape (sequences, ``logits``, outputs) or
            None.

        Raises:
            DyBitError: A tensor has another type, shape, device or layout, or the caches hold another number of
                sequences.
            IndexError: A token or a position is out of range.
        """
        sequences, rows = x.shape[:2]
        tokens = address("x", x, _I64, (sequences, rows)) if x.ndim == 2 else 0
        width = self.sizes.hidden
        embeddings = 0 if x.ndim == 2 else address("x", x, _F32, (sequences, rows, width))
        own = positions.shape[0] if positions.shape[:1] == (sequences,) else 1
        placed = address("positions", positions, _I64, (own, rows)), rows if own > 1 else 0
        first = address("starts", starts, _I32, (sequences,))
        count = min(logits, rows) if self.outputs else 0
        out = torch.empty((sequences, rows, width), dtype=_F32, device="cpu") if hidden else None
        scores = torch.empty((sequences, count, self.outputs), dtype=_F32, device="cpu") if count else None
        results = (
            address("hidden", out, _F32, (sequences, rows, width)),
            address("logits", scores, _F32, (sequences, count, self.outputs)),
            count,
        )
        threads = torch.get_num_threads()
        try:
            self._decoder.run((sequences, rows), tokens, embeddings, placed, first, caches, *results, threads)
        except ValueError as error:
            raise DyBitError(str(error)) from None
        return out, scores


def left_padding(mask: Tensor) -> Tensor | None:
    """Returns where the ones of each sequence of a mask begin.

    Args:
        mask: int64 of shape (sequences, length): zeros, then ones.

    Returns:
        int32 of shape (sequences,). None if a zero follows a one.

    Raises:
        DyBitError: The mask has another type or layout.
    """
    starts = torch.empty(len(mask), dtype=_I32, device="cpu")
    where = address("mask", mask, _I64, tuple(mask.shape)), *mask.shape, address("starts", starts, _I32, (len(mask),))
    return starts if extension.left_padding(*where) else None


def _table(table: Table | None, columns: int) -> tuple[Any, int, int]:
    """Returns the extension's arguments of a table."""
    if table is None:
        return None, 0, 0
    if isinstance(table, PackedWeight):
        return table.compiled, 0, table.shape[0]
    return None, address("table", table, _F32, (len(table), columns)), len(table)
