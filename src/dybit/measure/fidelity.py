"""Compares the outputs of a quantized model with those of its floating-point original."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.models.running import evaluating, output_tensor, run, run_batch

Kind = Literal["logits", "embeddings", "values"]
KINDS: tuple[str, ...] = get_args(Kind)

_RANKED_ROWS = 64  # vectors per batch that are ranked: sorting a vocabulary takes as long as the model
_ROWS_AT_ONCE = 256  # bounds the temporaries of softmax over a vocabulary
_SPILL_BYTES = 1 << 29  # reference outputs beyond this go to temporary files


@dataclass(frozen=True)
class Fidelity:
    """The result of comparing two models; None where a measure does not apply to the outputs.

    Attributes:
        sqnr: Signal-to-quantization-noise ratio of the outputs, dB; infinite where they are equal.
        agreement: Share of outputs with the same largest entry (logits), or of items whose nearest neighbour is the
            same (embeddings), 0 to 1.
        kl: Mean Kullback-Leibler divergence of the predicted distributions, nats.
        spearman: Rank correlation: of the entries of each output, averaged; of all pair similarities for embeddings.
        perplexity: Of the second model on the batches' own tokens, for language models: batches are token ids or
            mappings with ``input_ids``, and outputs have shape (batch, length, vocabulary).
        outputs: The number of compared output vectors.
    """

    sqnr: float
    agreement: float | None
    kl: float | None
    spearman: float | None
    perplexity: float | None
    outputs: int


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio, -10·log10(Σ(output - reference)² / Σreference²), in dB.

    Args:
        reference: Real numbers of any shape.
        output: The same shape.

    Returns:
        dB: infinite if both are equal, minus infinity if only the reference is zero.

    Raises:
        DyBitError: Shapes differ, or a tensor is empty or not finite.

    Example:
        >>> round(sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])), 2)
        20.0
    """
    _check(reference, output)
    return _decibels(*_energies(reference, output))


def agreement(reference: Tensor, output: Tensor) -> float:
    """Returns the share of vectors with their largest entry at the same index (top-1 agreement).

    Args:
        reference: Logits of shape (..., classes).
        output: The same shape.

    Raises:
        DyBitError: Shapes differ, or a tensor is empty, without dimensions or not finite.
    """
    _check(reference, output, vectors=True)
    return float((reference.argmax(-1) == output.argmax(-1)).double().mean())


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> float:
    """Returns the mean divergence KL(softmax(reference) ‖ softmax(logits)) over all vectors, in nats.

    Args:
        reference_logits: Shape (..., classes).
        logits: The same shape.

    Raises:
        DyBitError: Shapes differ, or a tensor is empty, without dimensions or not finite.
    """
    _check(reference_logits, logits, vectors=True)
    pairs = zip(_rows(reference_logits).split(_ROWS_AT_ONCE), _rows(logits).split(_ROWS_AT_ONCE), strict=True)
    total = 0.0
    for p, q in pairs:
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(0.0, total / _rows(logits).shape[0])


def spearman(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's rank correlation along the last dimension, averaged over all others.

    Equal entries share their mean rank. The correlation with a constant vector counts as 0.

    Args:
        a: Shape (..., n), n at least 2.
        b: The same shape.

    Raises:
        DyBitError: Shapes differ, there are fewer than two entries to rank, or a tensor is empty or not finite.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 20.0, 4.0, 30.0])), 3)
        0.8
    """
    _check(a, b, vectors=True)
    if a.shape[-1] < 2:
        raise DyBitError(f"rank correlation needs at least two entries, not shape {tuple(a.shape)}")
    x, y = _ranks(_rows(a)), _ranks(_rows(b))
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return float(torch.where(norm > 0, (x * y).sum(1) / norm.clamp(min=1e-300), 0.0).mean())


def similarities(embeddings: Tensor) -> Tensor:
    """Returns the cosine similarity of every pair of items.

    Args:
        embeddings: Shape (items, width).

    Returns:
        float32 of shape (items, items).
    """
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    return unit @ unit.T


def neighbour_agreement(reference: Tensor, output: Tensor) -> float:
    """Returns the share of items whose nearest other item, by cosine similarity, is the same under both embeddings.

    Args:
        reference: Shape (items, width), at least two items.
        output: The same shape.

    Raises:
        DyBitError: Shapes differ or are not those of embeddings, or a tensor is not finite.
    """
    _check_embeddings(reference, output)
    nearest = [similarities(x).fill_diagonal_(-math.inf).argmax(1) for x in (reference, output)]
    return float((nearest[0] == nearest[1]).double().mean())


def pair_spearman(reference: Tensor, output: Tensor) -> float:
    """Returns the rank correlation of the cosine similarities of all pairs of items.

    Args:
        reference: Embeddings of shape (items, width), at least three items.
        output: The same shape.

    Raises:
        DyBitError: Shapes differ or are not those of embeddings, or a tensor is not finite.
    """
    _check_embeddings(reference, output)
    upper = torch.triu_indices(len(reference), len(reference), offset=1, dtype=torch.int64, device="cpu")
    return spearman(similarities(reference)[*upper], similarities(output)[*upper])


def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """Returns the perplexity of a causal language model: exp of the mean negative log-likelihood of the next token.

    Args:
        model: Takes the batches; its output, or the output's ``logits``, has shape (batch, length, vocabulary).
        batches: Token ids, integers of shape (batch, length); or mappings with ``input_ids`` and, optionally,
            ``attention_mask`` of this shape.

    Raises:
        DyBitError: There is no batch or no second token, or a batch or an output is not that of a language model.
    """
    total, count = 0.0, 0
    for batch, output in run(model, batches):
        surprise = _surprise(batch, output)
        if surprise is None:
            raise DyBitError(
                "perplexity needs batches of token ids (or input_ids) and logits of shape (batch, length, vocabulary), "
                f"not an output of shape {tuple(output.shape)}"
            )
        total, count = total + surprise[0], count + surprise[1]
    if not count:
        raise DyBitError("perplexity needs at least one batch of two tokens")
    return _exp(total / count)


def guess_kind(reference: Tensor, raw: Any = None) -> Kind:  # noqa: ANN401
    """Guesses the kind of outputs: unit vectors are embeddings, other vectors logits, all others plain values.

    Args:
        reference: Outputs of the floating-point model.
        raw: The model's output object, which may have ``logits`` or ``last_hidden_state``.
    """
    if hasattr(raw, "logits"):
        return "logits"
    if reference.ndim < 2 or reference.ndim > 3 or reference.shape[-1] < 2 or hasattr(raw, "last_hidden_state"):
        return "values"
    length = _rows(reference).norm(dim=-1)
    if reference.ndim == 2 and bool(((length - 1).abs() < 1e-3).all()):
        return "embeddings"
    return "logits"


def kind_of(model: nn.Module, batch: Any) -> Kind:  # noqa: ANN401
    """Runs a model on its first batch and guesses the kind of its outputs (:func:`guess_kind`)."""
    with evaluating(model):
        raw = run_batch(model, batch, "batch 0")
    return guess_kind(output_tensor(raw).float(), raw)


class Reference:
    """The outputs of a floating-point model on some batches, to compare quantized models with.

    Outputs of more than half a gigabyte are kept in temporary files; use it as a context manager to remove them.

    Args:
        model: The floating-point model.
        batches: The inputs. Every compared model runs on them.
        kind: The kind of outputs; None to guess (see :func:`guess_kind`).
        progress: Called with (done, total) after every batch.

    Raises:
        DyBitError: There is no batch, one does not fit the model, or an output is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        kind: Kind | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if kind is not None and kind not in KINDS:
            raise DyBitError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        self.batches = list(batches)
        if not self.batches:
            raise DyBitError("data yields no batch")
        self._kept = _Kept()
        judge = _Sums(kind or kind_of(model, self.batches[0]))
        for index, (batch, output) in enumerate(run(model, self.batches)):
            self._kept.append(output)
            judge.add(batch, output, output, f"the original's output for batch {index}")
            if progress:
                progress(index + 1, len(self.batches))
        self.kind = judge.kind
        self.fidelity = judge.result()

    def judge(self, model: nn.Module, progress: Callable[[int, int], None] | None = None) -> Fidelity:
        """Runs a model on the same batches and compares its outputs.

        Args:
            model: The other model.
            progress: Called with (done, total) after every batch.

        Raises:
            DyBitError: Its outputs have another shape or are not finite.
        """
        judge = _Sums(self.kind)
        for index, (batch, output) in enumerate(run(model, self.batches)):
            judge.add(batch, self._kept[index], output, f"the output for batch {index}")
            if progress:
                progress(index + 1, len(self.batches))
        return judge.result()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()


def compare_models(
    reference: nn.Module, model: nn.Module, batches: Iterable[Any], kind: Kind | None = None
) -> Fidelity:
    """Runs two models on the same batches and compares their outputs.

    Args:
        reference: The floating-point model.
        model: The quantized one.
        batches: Each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        kind: What the outputs are; None to guess (see :func:`guess_kind`).

    Raises:
        DyBitError: There is no batch, one does not fit, or outputs differ in shape or are not finite.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> compare_models(model, model, [torch.ones(2, 4)]).sqnr
        inf
    """
    with Reference(reference, batches, kind) as kept:
        return kept.judge(model)


@dataclass
class _Sums:
    """Sums over batches."""

    kind: Kind
    noise: float = 0.0
    signal: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    outputs: int = 0
    surprise: float = 0.0
    tokens: int = 0
    embeddings: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, batch: Any, reference: Tensor, output: Tensor, name: str) -> None:  # noqa: ANN401
        try:
            _check(reference, output)
        except DyBitError as error:
            raise DyBitError(f"{name}: {error}") from None
        signal, noise = _energies(reference, output)
        self.signal, self.noise = self.signal + signal, self.noise + noise
        x, y = _rows(reference), _rows(output)
        self.outputs += len(x)
        if self.kind == "embeddings":
            self.embeddings.append((x, y))
            return
        if self.kind == "logits":
            self._sum("agreement", agreement(x, y), len(x))
            self._sum("kl", kl_divergence(x, y), len(x))
            surprise = _surprise(batch, output)
            if surprise is not None:
                self.surprise, self.tokens = self.surprise + surprise[0], self.tokens + surprise[1]
        if x.shape[1] > 1:
            rows = torch.linspace(0, len(x) - 1, min(len(x), _RANKED_ROWS), dtype=torch.float32, device="cpu").long()
            self._sum("spearman", spearman(x[rows], y[rows]), len(rows))

    def _sum(self, name: str, value: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value * count
        self.sums[name + " count"] = self.sums.get(name + " count", 0.0) + count

    def _mean(self, name: str) -> float | None:
        return self.sums[name] / self.sums[name + " count"] if name in self.sums else None

    def result(self) -> Fidelity:
        alike, ranks = self._mean("agreement"), self._mean("spearman")
        if self.kind == "embeddings":
            x, y = (torch.cat([pair[i] for pair in self.embeddings]) for i in (0, 1))
            alike = neighbour_agreement(x, y) if len(x) > 2 else None
            ranks = pair_spearman(x, y) if len(x) > 2 else None
        surprise = _exp(self.surprise / self.tokens) if self.tokens else None
        return Fidelity(_decibels(self.signal, self.noise), alike, self._mean("kl"), ranks, surprise, self.outputs)


class _Kept:
    """A list of tensors that moves to temporary files when it grows large."""

    def __init__(self) -> None:
        self._items: list[Tensor | Path] = []
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, tensor: Tensor) -> None:
        self._bytes += tensor.nbytes
        if self._bytes <= _SPILL_BYTES:
            self._items.append(tensor)
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dybit-reference-")
        path = Path(self._folder.name) / f"{len(self._items)}.pt"
        torch.save(tensor.clone(), path)
        self._items.append(path)

    def __getitem__(self, index: int) -> Tensor:
        item = self._items[index]
        if isinstance(item, Tensor):
            return item
        loaded: Tensor = torch.load(item, weights_only=True)
        return loaded

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _surprise(batch: Any, logits: Tensor) -> tuple[float, int] | None:  # noqa: ANN401
    """Returns the sum of -log p of every next token, in nats, and their number; None for other models."""
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    else:
        tokens, mask = batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch, None
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        return None
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape or int(tokens.max()) >= logits.shape[-1]:
        return None
    real = torch.ones_like(tokens) if mask is None else mask
    wanted = torch.where(real[:, 1:] != 0, tokens[:, 1:], -100).long()
    total = 0.0
    parts = (_rows(logits[:, :-1]).split(_ROWS_AT_ONCE), wanted.flatten().split(_ROWS_AT_ONCE))
    for rows, labels in zip(*parts, strict=True):
        total += float(nn.functional.cross_entropy(rows, labels, ignore_index=-100, reduction="sum"))
    return total, int((wanted != -100).sum())


def _check(reference: Tensor, output: Tensor, vectors: bool = False) -> None:
    if reference.shape != output.shape:
        raise DyBitError(f"output has shape {tuple(output.shape)}, its reference {tuple(reference.shape)}")
    if reference.numel() == 0 or (vectors and reference.ndim == 0):
        raise DyBitError(f"there is nothing to compare in outputs of shape {tuple(reference.shape)}")
    for name, tensor in (("reference", reference), ("output", output)):
        if not bool(torch.isfinite(tensor).all()):
            raise DyBitError(f"{name} holds NaN or infinity")


def _check_embeddings(reference: Tensor, output: Tensor) -> None:
    _check(reference, output)
    if reference.ndim != 2 or len(reference) < 2:
        raise DyBitError(f"embeddings must have shape (items, width), at least two, not {tuple(reference.shape)}")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def _ranks(x: Tensor) -> Tensor:
    """Returns ranks along the last dimension from 1; ties share their mean rank: float64 of shape (rows, n)."""
    ordered = x.sort(dim=-1).values
    x = x.contiguous()
    below, upto = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    return (below + upto + 1).double() / 2


def _energies(reference: Tensor, output: Tensor) -> tuple[float, float]:
    """Returns the sums of squares of the reference and of the error."""
    wide = reference.double()
    return float(wide.square().sum()), float((output.double() - wide).square().sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
