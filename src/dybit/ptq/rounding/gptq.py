"""GPTQ of one weight: rounds column by column, each making up for the errors of those before it.

The squared error of a layer's outputs is (w - q) H (w - q)ᵀ for every row, H being the second moment of its inputs.
With the factorization H = (M + I) D (M + I)ᵀ, M strictly upper triangular and D diagonal, it is the sum of
D_j (t_j - q_j)² with the target t_j = w_j + Σ_{i<j} (w_i - q_i) M_ij: every column is rounded to its target, which
depends on the columns before. That is GPTQ (Frantar et al., 2023) in the form of QuIP (Chee et al., 2023), which needs
no inverse.

Scales are chosen beforehand, with every error weighed by the geometric mean of D, which is what it costs once later
columns have made up for it, and of the diagonal of H, which is what it costs if none does. What remains is improved by
coordinate descent (:mod:`dybit.ptq.rounding.descent`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.formats.scaling import Method
from dybit.ptq.rounding.descent import descend
from dybit.ptq.rounding.elements import Elements
from dybit.tensors.encoding import check_range, check_weight
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec
from dybit.tensors.scale_search import choose_scales

_BLOCK = 64  # columns brought up to date one by one; later ones by a matrix product a block
_MAX_DAMPING = 100.0  # a share of the mean of the diagonal with which any second moments are positive definite


@dataclass(frozen=True)
class Settings:
    """How GPTQ proceeds.

    Args:
        damping: What is added to the diagonal of the Hessian, as a share of its mean; raised tenfold until the matrix
            can be factorized.
        sort: Whether columns are rounded by decreasing second moment of their inputs ("act-order").
        passes: Rounds of coordinate descent afterwards.
        shrinkage: The least share by which the Hessian of a whole model's layer is shrunk towards its diagonal, 0 to 1.
            0 fits inputs of the calibration's kind best; 0.2 is better for inputs of other kinds.
    """

    damping: float = 0.03
    sort: bool = True
    passes: int = 2
    shrinkage: float = 0.2

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.damping < float("inf"):
            raise DyBitError(f"damping must be at least 0, not {self.damping!r}")
        if not 0 <= self.shrinkage <= 1:
            raise DyBitError(f"shrinkage must be 0 to 1, not {self.shrinkage!r}")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 0:
            raise DyBitError(f"passes must be an integer of at least 0, not {self.passes!r}")


DEFAULTS = Settings()


def gptq(
    weight: Tensor,
    spec: TensorSpec,
    hessian: Tensor,
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    settings: Settings = DEFAULTS,
) -> QuantizedTensor:
    """Quantizes a weight so that the outputs of its layer change little.

    Args:
        weight: Finite floating point of shape ``spec.shape``.
        spec: How it is stored.
        hessian: Second moments of the inputs, of shape (columns, columns), or (parts, columns, columns) where the rows
            are that many equal parts with inputs of their own (grouped convolutions; query, key and value).
        method: How scales are chosen (see :func:`dybit.tensors.scale_search.choose_scales`).
        percentile: For ``method="percentile"``.
        settings: How to proceed.

    Raises:
        DyBitError: ``weight`` or ``hessian`` has another shape, or is not finite.
    """
    check_weight(weight, spec.shape)
    check_range(weight, spec)
    hessian = _checked(hessian, spec)
    parts = hessian.shape[0]
    matrix = spec.to_matrix(weight.detach()).float()
    order = _order(hessian, settings.sort)
    feedback, remaining = factorize(hessian[:, order][:, :, order], settings.damping)
    importance = torch.empty_like(remaining)
    importance[:, order] = remaining
    importance = (importance * hessian.diagonal(dim1=1, dim2=2)).sqrt()
    scales = choose_scales(
        matrix,
        spec.formats,
        granularity=spec.granularity,
        group_size=spec.group_size,
        scale_type=spec.scale,
        choice_granularity=spec.choice,
        method=method,
        percentile=percentile,
        importance=importance if parts == 1 else importance.repeat_interleave(spec.rows // parts, dim=0),
    )
    elements = Elements(matrix, spec, scales, parts)
    _round(elements, order, feedback)
    for _ in range(settings.passes):
        descend(elements, hessian, refit=method == "mse")
    return elements.packed()


def _round(elements: Elements, order: Tensor, feedback: Tensor) -> None:
    """Rounds the columns in an order, each to its target; ``feedback`` is M in that order."""
    count = len(order)
    errors = torch.empty_like(elements.error)  # in the order of rounding
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        target = elements.weight[:, order[start:stop]]
        if start:
            target.baddbmm_(feedback[:, :start, start:stop].mT, errors[:, :start])
        for place, column in enumerate(order[start:stop].tolist()):
            error = elements.round(column, target[:, place])
            errors[:, start + place] = error
            if start + place + 1 < stop:
                later = feedback[:, start + place, start + place + 1 : stop, None]
                target[:, place + 1 :].baddbmm_(later, error[:, None])


def _order(hessian: Tensor, sort: bool) -> Tensor:
    """The order in which columns are rounded, the same for all parts: int64 of shape (columns,)."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not sort:
        return torch.arange(diagonal.shape[1], dtype=torch.int64, device="cpu")
    shares = diagonal / diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return shares.mean(0).argsort(descending=True, stable=True)


def factorize(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns M and D of H + λ·mean(diagonal)·I = (M + I) D (M + I)ᵀ.

    Args:
        hessian: float32 of shape (parts, columns, columns), symmetric, diagonals at least 0.
        damping: λ, raised where the matrix is not positive definite.

    Returns:
        M, strictly upper triangular, and D, of shape (parts, columns): both float32.

    Raises:
        DyBitError: No damping makes it positive definite: it was no matrix of second moments.
    """
    wide = hessian.double()
    mean = wide.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)  # inputs that are always zero
    share = torch.full_like(mean, damping)
    while bool((share <= _MAX_DAMPING).all()):
        damped = wide.clone()
        damped.diagonal(dim1=1, dim2=2).add_((share * mean)[:, None])
        # From the lower factor of the matrix in reverse order comes the upper one.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not bool(failed.any()):
            upper = lower.flip(1, 2)
            root = upper.diagonal(dim1=1, dim2=2)
            return torch.triu(upper / root[:, None, :], 1).float(), root.square().float()
        share = torch.where(failed > 0, share.clamp(min=1e-6) * 10, share)
    raise DyBitError("hessian is not positive semidefinite")


def _checked(hessian: Tensor, spec: TensorSpec) -> Tensor:
    """The Hessian as float32 of shape (parts, columns, columns)."""
    h = hessian[None] if hessian.ndim == 2 else hessian
    columns = spec.columns
    if h.ndim != 3 or h.shape[1:] != (columns, columns) or h.shape[0] == 0 or spec.rows % h.shape[0]:
        raise DyBitError(
            f"hessian must have shape ({columns}, {columns}) or (parts, {columns}, {columns}) with parts dividing "
            f"{spec.rows} rows, not {tuple(hessian.shape)}"
        )
    if not bool(torch.isfinite(h).all()) or bool((h.diagonal(dim1=1, dim2=2) < 0).any()):
        raise DyBitError("hessian holds NaN or infinity, or a negative second moment")
    # Products of second moments must stay in the range of float32.
    return (h / h.diagonal(dim1=1, dim2=2).max().clamp(min=torch.finfo(h.dtype).tiny)).float()
