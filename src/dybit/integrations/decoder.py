"""Fuses decoders of transformers: a step of ``generate`` is one call of the kernels.

The fused model is the model with another forward. ``generate``, its caches' methods, configurations and tokenizers are
transformers' own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dybit.errors import DyBitWarning
from dybit.integrations.decoder_cache import DecoderCache
from dybit.kernels import extension
from dybit.kernels.transforms import transforming
from dybit.layers.quantized import FusedModule, quantized_layers
from dybit.operators.decoder import left_padding
from dybit.operators.packed_cache import Snapshot
from dybit.runtime.decoder import ModelDecoder, UnknownDecoderError, family_of
from dybit.runtime.trace import is_bare

_ASKED = ("output_attentions", "output_hidden_states")  # of single layers, which the kernels do not return


def fuse_decoder(model: nn.Module) -> nn.Module | None:
    """Fuses a causal language model of transformers.

    Args:
        model: The model. It is not changed.

    Returns:
        A model of the same class and with the same modules, whose forward calls the kernels. None if the model is not
        one of :data:`dybit.runtime.decoder.FAMILIES`, or has no quantized layers. If the kernels cannot compute one of
        these, None with a warning.
    """
    if not isinstance(model, PreTrainedModel) or extension.load() is None or not quantized_layers(model):
        return None
    base = model.base_model
    if family_of(base) is None or base is model or model.training:
        return None
    try:
        runner = _Runner(model)
    except UnknownDecoderError as error:
        warnings.warn(f"the decoder is fused layer by layer: {error}", DyBitWarning, stacklevel=3)
        return None
    fused, inner = copy.copy(model), copy.copy(base)
    inner.__class__ = _fused_class((_FusedBase, type(base)))
    fused.__class__ = _fused_class((_FusedHead, type(model)))
    fused._modules = {**model._modules, model.base_model_prefix: inner}
    vars(inner)["_runner"] = vars(fused)["_runner"] = runner
    return cast(nn.Module, fused)


@functools.cache
def _fused_class(bases: tuple[type[nn.Module], type[nn.Module]]) -> Any:  # noqa: ANN401  # a class
    """Returns a subclass of the second class with the forward of the first, and the name and signature of its own."""
    mixin, cls = bases

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return mixin.forward(self, *args, **kwargs)

    arguments = tuple(inspect.signature(cls.forward).parameters)[1:]
    state = {"forward": forward, "_names": arguments, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, bases, state)


class _Runner:
    """Runs the decoder of a model, as long as its parameters stay as they are.

    Args:
        model: The model that was fused.

    Raises:
        UnknownDecoderError: The kernels cannot compute it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._warned = False
        self._read()

    def _read(self) -> None:
        """Makes the decoder."""
        model, base = self.model, self.model.base_model
        family = family_of(base)
        assert family is not None  # fuse_decoder has asked
        head = model.get_output_embeddings()
        cap = getattr(model.config, "final_logit_softcapping", None)
        self._modules = [*base.modules(), *(() if head is None else head.modules())]
        held = [(state, name) for module in self._modules for state in _state(module) for name in state]
        self._held = dict(enumerate(held))
        self._snapshot = Snapshot(self._tensors())
        self.decoder = ModelDecoder(base, family, head, float(cap or 0.0))

    def _tensors(self) -> dict[str, Tensor | None]:
        return {str(i): state.get(name) for i, (state, name) in self._held.items()}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        held = (cast("Tensor | None", state.get(name)) for state, name in self._held.values())
        return next(tensor.device for tensor in held if tensor is not None)

    def is_current(self) -> bool:
        """Whether the decoder computes the model. Reads it anew if a parameter has changed."""
        if not all(map(is_bare, self._modules)):
            return False
        if not self._snapshot.holds(self._tensors()):
            try:
                self._read()
            except UnknownDecoderError:
                return False
        return True

    def run(self, given: dict[str, Any], hidden: bool, logits: int | None) -> Any:  # noqa: ANN401
        """Runs the decoder.

        Args:
            given: Arguments of the model's forward by name.
            hidden: Whether rows after the last norm are asked for.
            logits: Of how many rows at the end logits are asked for, 0 for all; None for none.

        Returns:
            Rows, logits, and the cache or None. None if the model's own layers must run.
        """
        ids, embeddings, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        x = ids if embeddings is None else embeddings
        if not isinstance(x, Tensor) or (ids is None) == (embeddings is None) or not self._is_plain(x, given):
            return None
        keeps = given.get("use_cache")
        keeps = getattr(self.model.config, "use_cache", True) if keeps is None else keeps
        if cache is None:
            cache = DecoderCache(self.decoder.layers)
        elif not isinstance(cache, DecoderCache):
            self._warn(f"a cache of the class {type(cache).__name__} is read by the unfused layers, which are slower")
            return None
        past, (sequences, rows) = cache.get_seq_length(), x.shape[:2]
        if not past and not self.is_current():
            return None
        mask, starts = given.get("attention_mask"), None
        if mask is not None:
            starts = _starts(mask, (sequences, past + rows))
            if starts is None:
                self._warn("an attention mask that is not padding on the left is applied by the unfused layers, slowly")
                return None
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + rows, dtype=torch.int64, device="cpu")[None]
        if positions.ndim != 2 or positions.dtype is not torch.int64 or not rows:
            return None
        self.decoder.reach(max(past + rows, int(positions.max()) + 1))
        caches = cache.natives(sequences, self.decoder.decoder.sizes)
        count = 0 if logits is None else logits or rows
        return *self.decoder.decoder.run(
            x.contiguous(), positions.contiguous(), caches, starts, hidden=hidden, logits=count
        ), cache if keeps else None

    def _is_plain(self, x: Tensor, given: dict[str, Any]) -> bool:
        """Whether the kernels may run: nothing watches, and nothing else is asked for."""
        config = self.model.config
        return not (
            torch.compiler.is_compiling()
            or self.model.training
            or transforming()
            or type(x) is not Tensor
            or x.dtype not in (torch.int64, torch.float32)
            or not x.is_cpu
            or (torch.is_grad_enabled() and x.requires_grad)
            or torch._C._len_torch_dispatch_stack()
            or torch._C._get_tracing_state()
            or torch.is_autocast_enabled("cpu")
            or any(given.get(name) or getattr(config, name, False) for name in _ASKED)
            or any(value is not None and name not in _KNOWN for name, value in given.items())
        )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, DyBitWarning, stacklevel=6)


_KNOWN = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"),
    *("logits_to_keep", *_ASKED),
}


class _FusedBase(FusedModule):
    """A model without its head whose layers run in the kernels."""

    _runner: _Runner
    _names: tuple[str, ...]  # of the arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the model's own signature
        """As the model."""
        found = self._runner.run(_named(self._names, args, kwargs), True, None)
        if found is None:
            return super().forward(*args, **kwargs)
        output = BaseModelOutputWithPast(last_hidden_state=found[0], past_key_values=found[2])
        return output if _returns_dict(self, kwargs) else output.to_tuple()


class _FusedHead(FusedModule):
    """A model with its head, which is one call of the kernels."""

    _runner: _Runner
    _names: tuple[str, ...]  # of the arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the model's own signature
        """As the model."""
        given = _named(self._names, args, kwargs)
        kept = given.get("logits_to_keep", 0)
        if not isinstance(kept, int) or given.get("labels") is not None or not self._runner.decoder.has_head:
            return super().forward(*args, **kwargs)
        given.pop("labels", None)
        found = self._runner.run(given, False, kept)
        if found is None:
            return super().forward(*args, **kwargs)
        output = CausalLMOutputWithPast(logits=found[1], past_key_values=found[2])
        return output if _returns_dict(self, kwargs) else output.to_tuple()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads."""
        return int(self._runner.decoder.decoder.nbytes)

    @property
    def device(self) -> torch.device:
        """As the model, which looks through all modules; ``generate`` asks several times for a token."""
        return self._runner.device

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,  # noqa: ANN401
        model_kwargs: dict[str, Any],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """As the model, with a cache of the kernels in place of transformers' own default."""
        given = model_kwargs.get("past_key_values")
        result = cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and type(made) is DynamicCache and not cast(Cache, made).offloading:
            model_kwargs["past_key_values"] = DecoderCache(self._runner.decoder.layers)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Copies and pickles fuse the model anew."""
        return fuse_decoder, (self._runner.model,)


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _returns_dict(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return bool(cast(Any, module.config).return_dict if asked is None else asked)


def _state(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers


def _starts(mask: Any, shape: tuple[int, int]) -> Tensor | None:  # noqa: ANN401
    """Returns where the sequences of a mask begin; None if it is another mask than that of padding on the left."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or not mask.is_cpu:
        return None
    return left_padding(mask.to(torch.int64).contiguous())
