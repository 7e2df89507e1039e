"""The operator ``torch.ops.dybit.linear``: inputs times a packed weight, by the kernels or by plain torch.

The operator takes the portable form; the kernel's own layout is made when a weight is
first used and kept beside it, never in a state dict, a copy or a pickle of it.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.kernels.code_operators import fake_quantize, fake_quantize_dynamic
from dybit.operators import packed_weight
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

# x (..., columns) of any floating type; weight, weight_scale, weight_choice and tensor_scale as QuantizedTensor stores
# them, spec being TensorSpec.key. input_format is empty for inputs that are kept; else input_scale and input_offset
# are those of static inputs, or reach and input_group_size (0: a row) those of dynamic ones.
# Returns (..., rows) of the type of x.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_choice, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_offset, str spec, str input_format, float reach, int input_group_size) "
    "-> Tensor"
)
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("dybit", "FRAGMENT")


@lru_cache(maxsize=4096)
def read_spec(key: str) -> TensorSpec:
    """The spec of a key, read once."""
    return TensorSpec.from_dict(json.loads(key))


def no_view(y: Tensor) -> Tensor:
    """Returns the same values as no view: autograd refuses to modify a view in place that an operator returned."""
    return cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape)) if y._is_view() else y


class _Entry:
    """What was made from a weight, with what it was made from."""

    def __init__(self, weight: QuantizedTensor, packed: Any) -> None:  # noqa: ANN401
        self.parts = tuple(_nothing if part is None else weakref.ref(part) for part in _parts(weight))
        self.versions = _versions(weight)
        self.packed = packed
        self.isa = extension.isa()

    def fits(self, weight: QuantizedTensor) -> bool:
        """Whether it still is that weight: the same tensors, not written to since, packed for what runs now."""
        codes, scale, choice, tensor_scale = self.parts
        return (
            self.isa == extension.isa()
            and codes() is weight.packed
            and scale() is weight.scale
            and choice() is weight.choice
            and tensor_scale() is weight.tensor_scale
            and self.versions == _versions(weight)
        )


def _nothing() -> None:
    """A weak reference to None."""


def _parts(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return weight.packed, weight.scale, weight.choice, weight.tensor_scale


def _versions(weight: QuantizedTensor) -> list[int]:
    return [0 if part is None or part.is_inference() else part._version for part in _parts(weight)]


class Cache:
    """What weights were packed into, kept beside them as long as they live; never in a state dict, copy or pickle."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, weight: QuantizedTensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """What ``make`` returned for a weight and a key, now or earlier; None where the kernels cannot do it."""
        whole = (id(weight.packed), *key)
        entry = self._entries.get(whole)
        if entry is not None and entry.fits(weight):
            return entry.packed
        if extension.isa() == extension.FALLBACK or weight.packed.device.type != "cpu":
            return None
        self._entries[whole] = _Entry(weight, packed := make())
        weakref.finalize(weight.packed, self._entries.pop, whole, None).atexit = False
        return packed


_cache = Cache()


def _packed(weight: QuantizedTensor, input_format: str, input_group_size: int) -> packed_weight.PackedWeight | None:
    """The weight in the kernel layout, made at first use; None where the kernels cannot do it."""

    def make() -> packed_weight.PackedWeight | None:
        inputs = packed_weight.input_format(input_format)
        if inputs is None or not packed_weight.supports(weight.spec.family):
            return None
        return packed_weight.PackedWeight(weight, inputs, input_group_size)

    return cast(packed_weight.PackedWeight | None, _cache.get(weight, (input_format, input_group_size), make))


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_choice: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    spec: str,
    input_format: str,
    reach: float,
    input_group_size: int,
) -> Tensor:
    stored = QuantizedTensor(read_spec(spec), weight, weight_scale, weight_choice, tensor_scale)
    return no_view(_compute(x, stored, bias, input_scale, input_offset, input_format, reach, input_group_size))


def _compute(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    input_format: str,
    reach: float,
    input_group_size: int,
) -> Tensor:
    """What the operator computes; no gradients."""
    _check(x, bias, weight.spec)
    packed = None
    if x.dtype in _KERNEL_TYPES and x.device.type == "cpu":
        packed = _packed(weight, input_format, input_group_size)
    if packed is None:
        return _by_torch(x, weight, bias, input_scale, input_offset, input_format, reach, input_group_size)
    rows = x.detach().reshape(-1, x.shape[-1])
    if x.dtype != torch.float32 or not rows.is_contiguous():
        rows = rows.float().contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    if rows.shape[0] > packed.most_rows:
        y = torch.nn.functional.linear(rows, packed.dequantize(), bias)
    else:
        y = packed.linear(rows, bias, input_scale, input_offset, reach)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody records, traces or transforms what happens to a tensor, so that no operator need be called.

    Torch's dispatch of an operator written in Python costs more than a small product.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _by_torch(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    input_format: str,
    reach: float,
    input_group_size: int,
) -> Tensor:
    """The same in plain torch: the same codes of inputs and weights, their products summed in floating point."""
    if input_format and input_scale is not None:
        x = fake_quantize(x, input_scale, input_offset, input_format)
    elif input_format:
        x = fake_quantize_dynamic(x, input_format, reach, input_group_size)
    matrix = _matrix(weight, x.dtype)
    return torch.nn.functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))


def _matrix(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The dequantized weight as (rows, columns)."""
    return weight.spec.to_matrix(weight.dequantize(dtype))


def _check(x: Tensor, bias: Tensor | None, spec: TensorSpec) -> None:
    if not x.is_floating_point():
        raise DyBitError(f"x must be floating point, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != spec.columns:
        raise DyBitError(f"x must have {spec.columns} columns, but has shape {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (spec.rows,):
        raise DyBitError(f"bias must have shape ({spec.rows},), not {tuple(bias.shape)}")


def _shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401  # as the operator
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[1:5])
    ctx.spec, ctx.has_bias = inputs[8], inputs[5] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gradient of inputs and bias; rounding counts as the identity, and codes have none."""
    x_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = grad @ _matrix(QuantizedTensor(read_spec(ctx.spec), *ctx.saved_tensors), grad.dtype)
    bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[5] else None
    return x_grad, None, None, None, None, bias_grad, None, None, None, None, None, None


_LIBRARY.define("linear" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("dybit::linear", _shape, lib=_LIBRARY)
torch.library.register_autograd("dybit::linear", _backward, setup_context=_save, lib=_LIBRARY)
_operator = torch.ops.dybit.linear


def linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    input_format: str = "",
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    reach: float = 1.0,
    input_group_size: int = 0,
) -> Tensor:
    """Returns ``x · weightᵀ + bias``, the inputs rounded to codes first.

    With the compiled kernels the products of significands are summed as integers and scaled in a fixed order
    (``linear``); the plain-torch path has the same codes and sums their values in
    floating point, so that the two differ by the rounding of those sums and, for half-precision ``x``, of inputs and
    weights to its type, which the kernels do without. NaN in a row of ``x`` makes the row's results NaN.

    Args:
        x: Floating point of shape (..., columns).
        weight: Of ``columns`` columns.
        bias: Of shape (rows,), or None.
        input_format: Name of a single format, or empty to keep the inputs as they are.
        input_scale: The static scale, float32 of shape (1,); None for dynamic scales.
        input_offset: The static offset, float32 of shape (1,), or None.
        reach: Dynamic scales map the largest magnitude to this value.
        input_group_size: Columns that share a dynamic scale; 0 for all.

    Returns:
        Of shape (..., rows) and the type of ``x``.

    Raises:
        DyBitError: ``x`` or ``bias`` has another shape or is not floating point.
    """
    if _unwatched(x, bias):
        return _compute(x, weight, bias, input_scale, input_offset, input_format, reach, input_group_size)
    return cast(
        Tensor,
        _operator(
            x,
            weight.packed,
            weight.scale,
            weight.choice,
            weight.tensor_scale,
            bias,
            input_scale,
            input_offset,
            weight.spec.key,
            input_format,
            reach,
            input_group_size,
        ),
    )
