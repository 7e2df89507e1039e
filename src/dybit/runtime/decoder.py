"""Reads transformers' decoders: which module of a model plays which part in the kernels' decoder.

A family is a description; all families run the same code (csrc/decoder.h). What a description does not cover is refused
when the model is read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.layers.forwards import QuantizedLinear
from dybit.layers.quantized import Quantized, is_linear, original_class
from dybit.operators.decoder import Decoder, DecoderLayer, DecoderNorm, DecoderSizes, Table
from dybit.operators.input_rounding import KEPT
from dybit.operators.linear import packed_for
from dybit.operators.packed_weight import Product
from dybit.runtime.activations import name_of
from dybit.runtime.trace import is_bare

_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
_PLACES = 512  # of a table of rotary positions at first


class UnknownDecoderError(Exception):
    """A model is not a decoder that the kernels compute; the message says why."""


@dataclass(frozen=True)
class Family:
    """The names of a family's modules, and what its layers compute. An empty name: there is no such module.

    Attributes:
        layers: The list of layers, of the model.
        embedding: The embedding of tokens.
        positions: The embedding of positions.
        last_norm: The norm after the last layer.
        rotary: The module that computes rotary positions.
        attention: Of a layer; ``inputs``, ``out`` and norms of heads are its modules.
        inputs: Linear layers of queries, keys and values, or one for all.
        out: The linear layer after attention.
        query_norm: The norm of the queries of a head.
        key_norm: The norm of its keys.
        mlp: Of a layer; ``gates``, ``activation`` and ``down`` are its modules.
        gates: Linear layers of gate and up, one for both, or one without a gate.
        gated: Whether there is a gate.
        activation: The activation.
        down: The last linear layer.
        before_attention: A norm of a layer, as are the next three.
        after_attention: Of the results, before they are added.
        before_mlp: If empty, the MLP has the input of attention (``parallel``).
        after_mlp: Of the results, before they are added.
        norm_shift: Is added to the weights of norms.
        score_cap: The attribute of attention that caps scores.
        parallel: Whether attention and MLP have the same input, and both are added to it.
    """

    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str = ""
    last_norm: str = "norm"
    rotary: str = "rotary_emb"
    attention: str = "self_attn"
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    query_norm: str = ""
    key_norm: str = ""
    mlp: str = "mlp"
    gates: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    activation: str = "act_fn"
    down: str = "down_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    norm_shift: float = 0.0
    score_cap: str = ""
    parallel: bool = False


_GEMMA2 = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_shift=1.0,
    score_cap="attn_logit_softcapping",
)
_GEMMA3 = Family(**{**vars(_GEMMA2), "score_cap": "", "query_norm": "q_norm", "key_norm": "k_norm"})
_GPT2 = Family(
    layers="h",
    embedding="wte",
    positions="wpe",
    last_norm="ln_f",
    rotary="",
    attention="attn",
    inputs=("c_attn",),
    out="c_proj",
    gates=("c_fc",),
    gated=False,
    activation="act",
    down="c_proj",
    before_attention="ln_1",
    before_mlp="ln_2",
)
_PHI = Family(
    last_norm="final_layernorm",
    out="dense",
    gates=("fc1",),
    gated=False,
    activation="activation_fn",
    down="fc2",
    before_mlp="",
    parallel=True,
)
#: By the class of the model in transformers.
FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family(),
    "Qwen2Model": Family(),
    "SmolLM3Model": Family(),
    "Qwen3Model": Family(query_norm="q_norm", key_norm="k_norm"),
    "Phi3Model": Family(inputs=("qkv_proj",), gates=("gate_up_proj",), activation="activation_fn"),
    "GemmaModel": Family(norm_shift=1.0),
    "Gemma2Model": _GEMMA2,
    "Gemma3TextModel": _GEMMA3,
    "GPT2Model": _GPT2,
    "PhiModel": _PHI,
}


def family_of(model: nn.Module) -> Family | None:
    """Returns the family of a model without its head; None if it is none of :data:`FAMILIES`."""
    cls = type(model)
    return FAMILIES.get(cls.__name__) if cls.__module__.startswith("transformers.models.") else None


class ModelDecoder:
    """A model of transformers as a decoder in the kernels.

    Args:
        model: The model without its head, in evaluation mode.
        family: Its family.
        head: The layer that computes logits, or None.
        logit_cap: ``cap · tanh(logit / cap)`` replaces logits; 0 for none.

    Raises:
        UnknownDecoderError: The kernels cannot compute it.
    """

    def __init__(self, model: nn.Module, family: Family, head: nn.Module | None, logit_cap: float) -> None:
        self._model, self._family = model, family
        config = cast(Any, model.config)
        reader = _Reader(family, config)
        layers = list(cast(nn.ModuleList, reader.module(model, family.layers)))
        if not layers or getattr(config, "add_cross_attention", False):
            raise UnknownDecoderError("it has cross-attention, or no layers")
        if getattr(config, "use_bidirectional_attention", False):
            raise UnknownDecoderError("its attention looks ahead")
        self._kinds: list[str] = []  # of rotary positions, by table
        self._rotary = reader.module(model, family.rotary) if family.rotary else None
        made = [reader.layer(layer, self._table_of(layer)) for layer in layers]
        embedding = reader.module(model, family.embedding)
        first = product_of(head)
        self.has_head = first is not None
        pairs = self._angles(torch.zeros(1, 1, dtype=torch.int64, device="cpu"), 0)[0].shape[1] if self._kinds else 0
        size = reader.head_size(layers[0])
        width = made[0].out.weight.shape[1] // size
        joined = sum(p.weight.shape[0] for p in made[0].inputs)
        sizes = DecoderSizes(
            hidden=made[0].out.weight.shape[0],
            intermediate=made[0].down.weight.shape[1],
            heads=width,
            kv_heads=(joined // size - width) // 2,
            head_size=size,
            rotary_pairs=pairs,
            parallel=family.parallel,
        )
        self.decoder = Decoder(
            sizes,
            made,
            _embedding_table(embedding, head, first),
            positions=_embedding_table(reader.module(model, family.positions)) if family.positions else None,
            last=reader.norm(model, family.last_norm),
            head=first,
            embedding_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
            logit_cap=logit_cap if first is not None else 0.0,
        )
        self.layers = len(made)
        self._places, self._lock = 0, threading.Lock()

    def reach(self, places: int) -> None:
        """Makes tables of rotary positions that have so many places."""
        if places <= self._places or not self._kinds:
            return
        with self._lock:  # another thread may need fewer
            more = max(places, 2 * self._places, _PLACES)
            positions = torch.arange(more, dtype=torch.int64, device="cpu")[None]
            for index in range(len(self._kinds)):
                self.decoder.set_rotary(index, *self._angles(positions, index))
            self._places = max(more, self._places)

    def _table_of(self, layer: nn.Module) -> int:
        """Returns the number of the table of a layer."""
        attention = _Reader.module(layer, self._family.attention)
        if self._rotary is None or not getattr(attention, "use_rope", True):
            return -1
        types = getattr(self._rotary, "layer_types", None)
        kind = str(getattr(attention, "layer_type", "")) if types else ""
        rope = self._rotary.rope_type
        if (rope[kind] if isinstance(rope, dict) else rope) not in _STATIC_ROTARY:
            raise UnknownDecoderError(f"its rotary positions of type {rope!r} depend on the length of the text")
        if kind not in self._kinds:
            self._kinds.append(kind)
        return self._kinds.index(kind)

    def _angles(self, positions: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine (positions, pairs) of a table."""
        kind = self._kinds[index]
        like = torch.empty((1, 1, 1), dtype=torch.float32, device="cpu")
        both = cast(nn.Module, self._rotary)(like, positions, *([kind] if kind else []))
        cosine, sine = (x[0, :, : x.shape[-1] // 2].contiguous() for x in both)
        return cosine, sine


class _Reader:
    """Reads the modules of one model."""

    def __init__(self, family: Family, config: Any) -> None:  # noqa: ANN401  # of transformers
        self._family, self._config = family, config

    @staticmethod
    def module(owner: nn.Module, name: str) -> nn.Module:
        found = owner._modules.get(name)
        if found is None:
            raise UnknownDecoderError(f"{type(owner).__name__} has no module {name!r}")
        return found

    def head_size(self, layer: nn.Module) -> int:
        return int(cast(Any, self.module(layer, self._family.attention)).head_dim)

    def layer(self, layer: nn.Module, rotary: int) -> DecoderLayer:
        family = self._family
        attention, mlp = self.module(layer, family.attention), cast(Any, self.module(layer, family.mlp))
        window = getattr(attention, "sliding_window", getattr(self._config, "sliding_window", None))
        cap = getattr(attention, family.score_cap) if family.score_cap else None
        activation = name_of(mlp._modules.get(family.activation, getattr(mlp, family.activation, None)))
        if not activation:
            raise UnknownDecoderError(f"the kernels do not have the activation {getattr(mlp, family.activation)}")
        outer = (family.before_attention, family.after_attention, family.before_mlp, family.after_mlp)
        norms = [self.norm(layer, name) for name in outer]
        norms += [self.norm(attention, name) for name in (family.query_norm, family.key_norm)]
        return DecoderLayer(
            norms=tuple(norms),
            inputs=tuple(self.product(attention, name) for name in family.inputs),
            out=self.product(attention, family.out),
            gates=tuple(self.product(mlp, name) for name in family.gates),
            gated=family.gated,
            down=self.product(mlp, family.down),
            activation=activation,
            scale=float(cast(Any, attention).scaling),
            score_cap=float(cap or 0.0),
            window=int(window or 0),
            rotary=rotary,
        )

    def product(self, owner: nn.Module, name: str) -> Product:
        layer = self.module(owner, name)
        product = product_of(layer)
        if product is None:
            raise UnknownDecoderError(f"{name!r} of {type(owner).__name__} is not a layer that the kernels compute")
        return product

    def norm(self, owner: nn.Module, name: str) -> DecoderNorm | None:
        if not name:
            return None
        norm: Any = self.module(owner, name)
        plain = type(norm) is nn.LayerNorm
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight, bias = norm.weight, norm.bias if plain else None
        if not is_bare(norm) or weight is None or weight.dtype is not torch.float32 or not weight.is_cpu:
            raise UnknownDecoderError(f"{name!r} of {type(owner).__name__} is not a norm of float32 on the CPU")
        held = None if bias is None else bias.detach()  # of the memory that the kernels read
        return DecoderNorm(weight.detach(), held, float(eps), not plain, self._family.norm_shift)


def product_of(layer: nn.Module | None) -> Product | None:
    """Returns the product of a linear layer for the kernels; None if they do not compute it alone."""
    if not isinstance(layer, QuantizedLinear) or not is_linear(layer) or not is_bare(layer):
        return None
    return layer.prepared().product


def _embedding_table(embedding: nn.Module, head: nn.Module | None = None, product: Product | None = None) -> Table:
    """Returns the table of an embedding; that of the head if both are one."""
    if not is_bare(embedding):
        raise UnknownDecoderError("its embedding has hooks")
    if not isinstance(embedding, Quantized):
        table = cast(Any, embedding).weight
        if not isinstance(embedding, nn.Embedding) or table.dtype is not torch.float32 or not table.is_cpu:
            raise UnknownDecoderError("its embedding is not float32 on the CPU")
        return cast(Tensor, table.detach())
    cls = original_class(embedding)
    scaled = issubclass(cls, nn.Embedding) and hasattr(embedding, "scalar_embed_scale")
    if not (cls is nn.Embedding or scaled) or embedding.float_dtype is not torch.float32:
        raise UnknownDecoderError(f"its embedding is a {cls.__name__} in {embedding.float_dtype}")
    stored = embedding.quantized_tensor()
    if product is not None and cast(Quantized, head).quantized_tensor().packed is stored.packed:
        return product.weight
    packed = packed_for(stored, KEPT)
    if packed is None:
        raise UnknownDecoderError(f"the kernels cannot hold an embedding of {stored.spec.family!r}")
    return packed
