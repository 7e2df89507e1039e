"""The forward of each kind of quantized layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.kernels import extension
from dybit.kernels.transforms import transforming
from dybit.layers.attention import attend
from dybit.layers.bag import bag_of_rows
from dybit.layers.experts import run_experts
from dybit.layers.offloading import is_offloaded
from dybit.layers.quantized import Quantized, original_class
from dybit.layers.recurrent import MadeWeights, is_plain, recur, recur_once
from dybit.operators.activations import activate
from dybit.operators.conv import conv
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.embedding import embedding
from dybit.operators.experts import experts
from dybit.operators.linear import linear
from dybit.operators.prepared_conv import PreparedLayer
from dybit.operators.prepared_linear import PreparedLinear


class QuantizedLinear(Quantized):
    """A linear layer that multiplies by the codes, with the compiled kernels if they are installed."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Multiplies the only argument, under any name: (..., in_features) to (..., out_features)."""
        (x,) = (*args, *kwargs.values())
        return self.multiply(x)

    def multiply(self, x: Tensor, activation: str = "") -> Tensor:
        """Computes the layer and an activation after it, in one call of the kernels if they support both.

        Args:
            x: (..., in_features).
            activation: One of :data:`dybit.operators.activations.ACTIVATIONS`.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or transforming():
            return activate(linear(x, self.quantized_tensor(), self.own_bias, self.input_rounding()), activation)
        return self.prepared().multiply(x, activation)

    def prepared(self) -> PreparedLinear:
        """Returns weight and bias prepared for the layer's inputs; the first call prepares them."""
        state, bias = self.__dict__, self.own_bias
        prepared: PreparedLinear | None = state.get("_prepared")
        if prepared is None or not prepared.snapshot.holds(state["_buffers"], bias):
            prepared = state["_prepared"] = PreparedLinear(self.quantized_tensor(), bias, self.input_rounding())
            if is_offloaded(self):  # it would keep the codes in memory
                del state["_prepared"]
        return prepared


class QuantizedConv(Quantized):
    """A convolution of rounded inputs by the codes, with the compiled kernels if they are installed."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Convolves the only argument, under any name."""
        layer = cast(nn.Conv2d, self)
        if self.input_spec is None:
            return cast(Tensor, super().forward(*args, **kwargs))
        (x,) = (*args, *kwargs.values())
        padding: Sequence[int] = layer._reversed_padding_repeated_twice
        if layer.padding_mode != "zeros":  # such a border repeats values of the input: round both
            x = nn.functional.pad(x, padding, mode=layer.padding_mode)
            padding = [0] * len(padding)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or transforming():
            geometry = _geometry(layer, padding)
            return conv(x, self.quantized_tensor(), self.own_bias, geometry, self.input_rounding())
        return self._prepare(layer, padding).convolve(x)

    def _prepare(self, layer: nn.Conv2d, padding: Sequence[int]) -> PreparedLayer:
        """Returns the convolution prepared for the layer's inputs; the first call prepares it."""
        state, bias = self.__dict__, self.own_bias
        given = (layer.stride, tuple(padding), layer.dilation, layer.groups)
        kept: tuple[PreparedLayer, object] | None = state.get("_prepared")
        if kept is not None and kept[1] == given and kept[0].snapshot.holds(state["_buffers"], bias):
            return kept[0]
        made = PreparedLayer(self.quantized_tensor(), bias, _geometry(layer, padding), self.input_rounding())
        if not is_offloaded(self):  # it would keep the codes in memory
            state["_prepared"] = made, given
        return made


def _geometry(layer: nn.Conv2d, padding: Sequence[int]) -> ConvGeometry:
    """The geometry of a layer. ``padding`` is that of the last dimension first."""
    in_order = [n for i in range(len(padding) - 2, -1, -2) for n in padding[i : i + 2]]
    return ConvGeometry.of(layer.stride, in_order, layer.dilation, layer.groups)


class QuantizedEmbedding(Quantized):
    """An embedding that dequantizes only the rows it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up: integers of any shape to (*shape, embedding_dim)."""
        return embedding(input, self.quantized_tensor()).to(self.float_dtype)


class QuantizedBag(Quantized):
    """An embedding bag that dequantizes only the rows it looks up."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        rows = embedding(input.reshape(-1), self.quantized_tensor()).to(self.float_dtype)
        return bag_of_rows(cast(nn.EmbeddingBag, self), rows, input, offsets, per_sample_weights)


class QuantizedRecurrent(MadeWeights, Quantized):
    """A recurrent layer or cell. If inputs are rounded, so are the states.

    With the kernels, a step costs less than torch's forward. Torch's forward runs on dequantized weights if there are
    no kernels, under ``torch.compile``, and in subclasses with their own forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As the layer's own forward."""
        torch_alone = torch.compiler.is_compiling() or extension.load() is None
        if not is_plain(original_class(self)) or (self.input_spec is None and torch_alone):
            with self.holding_weights():
                return super().forward(*args, **kwargs)
        weights = {name: self.quantized_tensor(name) for name in self.weight_specs}
        rounding = self.input_rounding()

        def multiply(x: Tensor, weight: str, bias: str) -> Tensor:
            return linear(x, weights[weight], self._parameters.get(bias), rounding)

        compute: Any = recur if isinstance(self, nn.RNNBase) else recur_once
        return compute(self, *args, multiply=multiply, **kwargs)


class QuantizedAttention(Quantized):
    """Multi-head attention. If inputs are rounded, so is that of ``out_proj``, which torch's forward never calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As ``nn.MultiheadAttention.forward``."""
        attention = cast(nn.MultiheadAttention, self)
        if self.input_spec is None and getattr(attention.out_proj, "input_spec", None) is None:
            return super().forward(*args, **kwargs)
        return attend(attention, *args, round_input=self.round_input, **kwargs)


class QuantizedExperts(Quantized):
    """The experts of a mixture in one module. Only experts that have tokens are computed."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """As transformers' experts."""
        rounding = self.input_rounding()

        def product(name: str, x: Tensor, expert: Tensor) -> Tensor:
            return experts(x, expert, self.quantized_tensor(name), rounding)

        return run_experts(self, product, *args, **kwargs)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a quantized convolution that only rounds and convolves its only argument."""
    return type(module).forward is QuantizedConv.forward
