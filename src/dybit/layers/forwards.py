"""The forward of each kind of quantized layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.kernels import extension
from dybit.layers.attention import attend
from dybit.layers.bag import bag_of_rows
from dybit.layers.experts import run_experts
from dybit.layers.offloading import is_offloaded
from dybit.layers.quantized import Quantized, original_class
from dybit.layers.recurrent import MadeWeights, cell_mode, is_plain, recur, recur_once
from dybit.operators.activations import activate
from dybit.operators.conv import conv
from dybit.operators.conv_geometry import ConvGeometry
from dybit.operators.dispatch import recorded, traced, unwatched
from dybit.operators.embedding import PreparedTable, embedding
from dybit.operators.experts import experts
from dybit.operators.linear import linear
from dybit.operators.packed_cache import Snapshot
from dybit.operators.packed_weight import take_rows
from dybit.operators.prepared_conv import PreparedLayer
from dybit.operators.prepared_linear import PreparedLinear
from dybit.operators.recurrent import recur_steps, recur_whole
from dybit.operators.transposed_conv import PreparedTransposed, conv_transposed
from dybit.tensors.quantized_tensor import QuantizedTensor


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
        if traced():
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
        (x,) = (*args, *kwargs.values())
        if self.input_spec is None:
            bias = self.own_bias
            if unwatched(x, bias) and x.dtype == self.float_dtype == torch.float32:
                values = prepared_table(self).values()
                if values is not None:
                    shaped = values.view(self.weight_specs["weight"].shape)
                    return cast(Tensor, layer._conv_forward(x, shaped, bias))
            return cast(Tensor, super().forward(x))
        padding: Sequence[int] = layer._reversed_padding_repeated_twice
        if layer.padding_mode != "zeros":  # such a border repeats values of the input: round both
            x = nn.functional.pad(x, padding, mode=layer.padding_mode)
            padding = [0] * len(padding)
        if traced():
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


class QuantizedTransposed(Quantized):
    """A transposed convolution of rounded inputs by the codes, with the compiled kernels if they are installed."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the layer's own forward."""
        layer = cast(Any, self)
        if (recorded() or not traced()) and layer.padding_mode == "zeros" and input.ndim == len(layer.kernel_size) + 2:
            kernel = layer.kernel_size
            more = layer._output_padding(  # which also checks output_size
                input, output_size, layer.stride, layer.padding, kernel, len(kernel), layer.dilation
            )
            places = [
                (n - 1) * step - 2 * cut + by * (k - 1) + extra + 1
                for n, step, cut, by, k, extra in zip(
                    input.shape[2:], layer.stride, layer.padding, layer.dilation, kernel, more, strict=True
                )
            ]
            if recorded():
                rest = self.own_bias, self._geometry(layer), self.input_rounding()
                return conv_transposed(input, self.quantized_tensor(), *rest, places)
            found = self._prepare(layer).convolve(input, places)
            if found is not None:
                return found
        return cast(Tensor, super().forward(input, output_size))

    def _prepare(self, layer: Any) -> PreparedTransposed:  # noqa: ANN401
        """Returns the convolution prepared for the layer's inputs; the first call prepares it."""
        state, bias = self.__dict__, self.own_bias
        given = (layer.stride, layer.padding, layer.dilation, layer.groups)
        kept: tuple[PreparedTransposed, object] | None = state.get("_prepared")
        if kept is not None and kept[1] == given and kept[0].snapshot.holds(state["_buffers"], bias):
            return kept[0]
        made = PreparedTransposed(self.quantized_tensor(), bias, self._geometry(layer), self.input_rounding())
        if not is_offloaded(self):  # it would keep the codes in memory
            state["_prepared"] = made, given
        return made

    @staticmethod
    def _geometry(layer: Any) -> ConvGeometry:  # noqa: ANN401
        cut = [n for side in layer.padding for n in (side, side)]
        return ConvGeometry.of(layer.stride, cut, layer.dilation, layer.groups)


def prepared_table(layer: Quantized) -> PreparedTable:
    """Returns the table of a layer, prepared for look-ups; the first call prepares it."""
    state = layer.__dict__
    prepared: PreparedTable | None = state.get("_prepared")
    if prepared is None or not prepared.snapshot.holds(state["_buffers"]):
        prepared = PreparedTable(layer.quantized_tensor())
        if not is_offloaded(layer):  # it would keep the codes in memory
            state["_prepared"] = prepared
    return prepared


def look_up(layer: Quantized, index: Tensor) -> Tensor:
    """Looks up rows of the table of a layer."""
    return embedding(index, layer.quantized_tensor()) if traced() else prepared_table(layer).rows(index)


class QuantizedEmbedding(Quantized):
    """An embedding that dequantizes only the rows it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up: integers of any shape to (*shape, embedding_dim)."""
        rows = look_up(self, input)
        return rows if self.float_dtype is torch.float32 else rows.to(self.float_dtype)


class QuantizedBag(Quantized):
    """An embedding bag that dequantizes only the rows it looks up."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        bag = cast(nn.EmbeddingBag, self)
        simple = per_sample_weights is None and bag.padding_idx is None and not bag.include_last_offset
        if simple and not traced():
            found = prepared_table(self).bags(input, offsets, bag.mode)
            if found is not None:
                return found.to(self.float_dtype)
        rows = look_up(self, input.reshape(-1)).to(self.float_dtype)
        return bag_of_rows(bag, rows, input, offsets, per_sample_weights)


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

        def steps(
            x: Tensor, counts: Sequence[int], states: Sequence[Tensor], weight: str, bias: str, reverse: bool
        ) -> tuple[Tensor, list[Tensor]] | None:
            own = self._parameters.get(bias)
            return recur_steps(cell_mode(self), x, counts, states, weights[weight], own, rounding, reverse)

        def whole(
            x: Tensor, states: Sequence[Tensor], weight: str, bias: str, reverse: bool
        ) -> tuple[Tensor, list[Tensor]]:
            own = self._parameters.get(bias)
            return recur_whole(cell_mode(self), x, states, weights[weight], own, rounding, reverse)

        if not isinstance(self, nn.RNNBase):
            return recur_once(cast(Any, self), *args, multiply=multiply, steps=steps, **kwargs)
        return recur(self, *args, multiply=multiply, steps=steps, whole=whole if recorded() else None, **kwargs)


class QuantizedAttention(Quantized):
    """Multi-head attention. If inputs are rounded, so is that of ``out_proj``, which torch's forward never calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As ``nn.MultiheadAttention.forward``."""
        attention = cast(nn.MultiheadAttention, self)
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        # Weights that are recorded are not cut: that would be recorded, too.
        of_one = given.get("query") is given.get("key") is given.get("value")
        whole = recorded() and (of_one or "in_proj_weight" not in self.weight_specs)
        if self.weight_specs and (whole or not traced()) and extension.load() is not None:
            return attend(attention, *args, project=self._project, **kwargs)
        if self.input_spec is None and getattr(attention.out_proj, "input_spec", None) is None:
            return super().forward(*args, **kwargs)
        return attend(attention, *args, round_input=self.round_input, **kwargs)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Rounds query, key and value, and multiplies them by their weights."""
        bias, rounding = self._parameters.get("in_proj_bias"), self.input_rounding()
        whole = "in_proj_weight" in self.weight_specs
        if whole and query is key and key is value:
            return linear(query, self.quantized_tensor("in_proj_weight"), bias, rounding).chunk(3, dim=-1)
        weights = self._parts() if whole else [self.quantized_tensor(f"{name}_proj_weight") for name in "qkv"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [linear(x, w, b, rounding) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _parts(self) -> list[QuantizedTensor]:
        """Returns the weights of query, key and value, cut from one; the first call cuts them."""
        state, name = self.__dict__, "in_proj_weight"
        kept: tuple[Snapshot, list[QuantizedTensor]] | None = state.get("_prepared")
        if kept is not None and kept[0].holds(state["_buffers"]):
            return kept[1]
        weight = self.quantized_tensor(name)
        rows = weight.spec.rows // 3
        parts = [take_rows(weight, i * rows, rows) for i in range(3)]
        if not is_offloaded(self):  # they would keep the codes in memory
            state["_prepared"] = Snapshot({name + suffix: part for suffix, part in weight.parts().items()}), parts
        return parts


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
