"""Kinds of layers: which modules can be quantized, and where their weights, inputs and channels are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_CELL = ("weight_ih", "weight_hh")


EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # weights of transformers' experts


RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


TABLES = (nn.Embedding, nn.EmbeddingBag)


SUPPORTED = (nn.Linear, *TABLES, nn.MultiheadAttention, *CONVOLUTIONS, *TRANSPOSED)


# How to call experts of transformers that is_experts cannot recognize, by the name of their class.
_EXPERT_CLASSES = {"Llama4TextExperts": "sorted", "JetMoeParallelExperts": "counted", "Step3p7Experts": "routed"}


def named_experts(cls: type) -> str | None:
    """Returns how to call experts of a class that transformers does not mark; None for other classes."""
    own = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
    return next((_EXPERT_CLASSES[name] for name in own if name in _EXPERT_CLASSES), None)


def expert_kind(module: nn.Module) -> str:
    """Returns how to call a module of experts.

    ``routed`` experts take tokens, and the experts of every token with their weights. ``sorted`` experts take tokens
    ordered by expert, the same number for each. ``counted`` experts take tokens ordered by expert and the number of
    tokens of each.
    """
    return named_experts(type(module)) or "routed"


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights of a module of experts, in the order of their use."""
    if expert_kind(module) == "counted":
        return ("weight",)
    return EXPERTS[0 if getattr(module, "has_gate", True) else 1], EXPERTS[2]


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights of a module that can be quantized; empty for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        )
    if is_experts(module):
        return expert_weights(module)
    if isinstance(module, RECURRENT):
        held: Any = module
        names = [name for part in held._all_weights for name in part] if isinstance(module, nn.RNNBase) else _CELL
        return tuple(name for name in names if name.startswith("weight"))
    return ("weight",) if isinstance(module, SUPPORTED) or _is_conv1d(module) else ()


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding table."""
    return isinstance(module, TABLES)


def layer_kind(module: nn.Module) -> Literal["linear", "convolution", "embedding"]:
    """Returns what decides the defaults of a layer in a recipe."""
    if is_embedding(module):
        return "embedding"
    return "convolution" if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else "linear"


def inner_weights(module: nn.Module) -> tuple[str, ...]:
    """Returns the weights whose inputs the layer computes itself (states, hidden features), unseen by calibration."""
    if is_experts(module):
        return expert_weights(module)[1:]
    outer = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
    return tuple(name for name in weight_names(module) if name not in outer) if isinstance(module, RECURRENT) else ()


def has_dynamic_inputs(module: nn.Module) -> bool:
    """Whether inputs must have dynamic scales: the layer computes some itself, or its operator supports no others."""
    return is_experts(module) or isinstance(module, RECURRENT)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts of transformers 5: matrices (out, in) or (in, out) stacked in parameters.

    Transformers marks the classes whose forward can be replaced by other implementations.
    """
    marks = vars(module)
    marked = isinstance(marks.get("is_transposed"), bool) and isinstance(marks.get("has_bias"), bool)
    if not (marked and hasattr(module, "_apply_gate")) and named_experts(type(module)) is None:
        return False
    held = [module._buffers.get(name, module._parameters.get(name)) for name in expert_weights(module)]
    return all(tensor is not None and tensor.ndim == (3 if tensor.is_floating_point() else 4) for tensor in held)


def input_places(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int | str]:
    """Returns where the inputs are among the arguments of a call: positions and names.

    The inputs are query, key and value of attention, in this order; the sequence of recurrent layers, which may be
    packed; and the first floating-point tensor of other layers.
    """
    if isinstance(module, RECURRENT):  # also a packed sequence; the other arguments are states
        first: list[int | str] = [0] if args else [name for name in kwargs if name != "hx"]
        return first[:1]
    places: list[int | str] = [i for i, x in enumerate(args) if _is_floating(x)]
    named: list[int | str] = [name for name, x in kwargs.items() if _is_floating(x)]
    if not isinstance(module, nn.MultiheadAttention):
        return [*places, *named][:1]
    roles = [name for name in ("query", "key", "value") if name in named]
    return [*places, *(roles or named[: not places])][:3]


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def channels(module: nn.Module, name: str = "weight") -> int:
    """Returns the number of input channels that a weight multiplies."""
    weight = getattr(module, name)
    if is_experts(module):
        return int(weight.shape[1 if transposed(module) else 2])
    return int(weight.shape[0]) if transposed(module) else int(weight.shape[1]) * channel_groups(module)


def transposed(module: nn.Module) -> int:
    """Returns 0, or the channel groups of a weight whose first dimension is input channels (see ``TensorSpec``)."""
    if is_experts(module):
        return int(getattr(module, "is_transposed", expert_kind(module) == "sorted"))
    return module.groups if isinstance(module, TRANSPOSED) else int(_is_conv1d(module))


class Layout(TypedDict):
    """The fields of a ``TensorSpec`` that say which dimensions of a weight are its rows."""

    transposed: int
    row_dims: int


def layout(module: nn.Module) -> Layout:
    """Returns the layout of the weights of a module."""
    return {"transposed": transposed(module), "row_dims": 2 if is_experts(module) else 1}


def channel_groups(module: nn.Module) -> int:
    """Returns the number of channel groups."""
    return module.groups if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else 1


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """Returns the channel dimension of an input."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return x.ndim - len(module.kernel_size) - 1
    return x.ndim - 1


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer with a transposed weight. Imports nothing."""
    return any(named_conv1d(c) for c in type(module).__mro__)


def named_conv1d(cls: type) -> bool:
    """Whether a class is transformers' ``Conv1D``, by its name, since transformers may not be installed."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
