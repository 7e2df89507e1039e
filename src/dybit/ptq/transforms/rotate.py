"""Rotation: spreads outliers over all channels by Hadamard matrices that the model's own weights undo.

S. Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated LLMs", 2024.
The residual stream of a pre-norm transformer with RMSNorm may be rotated as a whole: what writes to it is rotated, what
reads it rotates back, and RMSNorm, once its factors are in the layers that read it, does not notice. The values of each
attention head are rotated between ``v_proj`` and ``o_proj``. The input of ``down_proj`` comes out of a product, through
which no rotation passes: it is rotated as the model runs, by additions. So are both ends of the stream where the table
of embeddings is also the output layer, which leaves the table as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.models.attachments import attach_, attachments
from dybit.models.running import Progress
from dybit.ptq.transforms.links import is_plain
from dybit.ptq.transforms.preserve import preserving
from dybit.tensors.hadamard import orthogonal_factor, rotate

_SEED = 0x0DB17
_PARTS = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_EXTRA = {"act_fn", "q_norm", "k_norm", "rotary_emb"}


@dataclass(frozen=True)
class _Rotation:
    """See :mod:`dybit.tensors.hadamard`."""

    factor: Tensor
    signs: Tensor

    @classmethod
    def draw(cls, size: int, generator: torch.Generator) -> _Rotation:
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int64, device="cpu").float() * 2 - 1
        return cls(orthogonal_factor(size, generator), signs)

    def inputs_(self, weight: Tensor) -> None:
        """Makes a weight (..., n) read rotated inputs, in place."""
        weight.copy_(rotate(weight, self.factor.to(weight.device), self.signs.to(weight.device)))

    def outputs_(self, linear: nn.Linear, heads: int = 1) -> None:
        """Rotates the outputs of a layer, or of each of its heads, in place."""
        self.inputs_(linear.weight.detach().unflatten(0, (heads, -1)).transpose(1, 2))
        if linear.bias is not None:
            self.inputs_(linear.bias.detach().unflatten(0, (heads, -1)))


@dataclass(frozen=True)
class _Decoder:
    """A transformer of Llama's structure, with qualified names.

    Attributes:
        body: Name prefix of the part with ``embed_tokens``, ``layers`` and ``norm``.
        layers: Name prefixes of the layers.
        head: Name of the output layer if it can take up a rotation, else None.
        width: Channels of the residual stream.
    """

    body: str
    layers: list[str]
    head: str | None
    width: int


def rotate_(
    model: nn.Module, names: Collection[str], batches: Sequence[Any], *, progress: Progress | None = None
) -> None:
    """Rotates the residual stream, the attention values and the inputs of ``down_proj``, in place.

    Inputs without outliers suit integers and scales shared by a whole token; a tapered format with a scale for every
    group profits from the outliers that a rotation removes (docs/accuracy.md). The rotations that remain as the model
    runs are buffers of their modules, and part of a checkpoint.

    Args:
        model: A floating-point transformers model of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM).
        names: The layers that will be quantized; inputs of ``down_proj`` are rotated where it is one of them.
        batches: Calibration batches, on the first of which the result is checked.
        progress: Called with (done, total, text).

    Raises:
        DyBitError: The model has another structure, or is rotated already.
    """
    decoder = _decoder(model)
    generator = torch.Generator().manual_seed(_SEED)
    stream = _Rotation.draw(decoder.width, generator)
    changed = [f"{decoder.body}embed_tokens", f"{decoder.body}norm", *([decoder.head] if decoder.head else [])]
    for prefix in decoder.layers:
        changed += [f"{prefix}{norm}" for norm in _NORMS]
        changed += [f"{prefix}{part}.{layer}" for part, layers in _PARTS.items() for layer in sorted(layers)]
    with preserving(model, changed, batches[0], "rotate"), torch.no_grad():
        _rotate_ends(model, decoder, stream)
        values = hidden = None
        for done, prefix in enumerate(decoder.layers):
            if progress:
                progress(done, len(decoder.layers), prefix.rstrip("."))
            layer: Any = model.get_submodule(prefix.rstrip("."))
            attention, mlp = layer.self_attn, layer.mlp
            _move_norm_(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            _move_norm_(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                stream.inputs_(reader.weight.detach())
            for writer in (attention.o_proj, mlp.down_proj):
                stream.outputs_(writer)
            values = values or _Rotation.draw(attention.head_dim, generator)
            values.outputs_(attention.v_proj, attention.v_proj.out_features // attention.head_dim)
            values.inputs_(attention.o_proj.weight.detach().unflatten(1, (-1, attention.head_dim)))
            if f"{prefix}mlp.down_proj" in names:
                hidden = hidden or _Rotation.draw(mlp.down_proj.in_features, generator)
                hidden.inputs_(mlp.down_proj.weight.detach())
                attach_(mlp.down_proj, "rotate_input", hidden.factor.clone(), hidden.signs.clone())


def _rotate_ends(model: nn.Module, decoder: _Decoder, stream: _Rotation) -> None:
    """Rotates what enters the residual stream, and back what leaves it."""
    embedding: Any = model.get_submodule(f"{decoder.body}embed_tokens")
    norm: Any = model.get_submodule(f"{decoder.body}norm")
    if decoder.head is None:
        attach_(embedding, "rotate_output", stream.factor.clone(), stream.signs.clone())
        attach_(norm, "restore_input", stream.factor.clone(), stream.signs.clone())
        return
    head: Any = model.get_submodule(decoder.head)
    stream.inputs_(embedding.weight.detach())
    _move_norm_(norm, head)
    stream.inputs_(head.weight.detach())


def _move_norm_(norm: Any, *readers: nn.Linear) -> None:  # noqa: ANN401
    """Moves the factors of a norm into the layers that read it."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def _decoder(model: nn.Module) -> _Decoder:
    """Finds the structure that is known.

    Raises:
        DyBitError: It is another one.
    """
    kind = type(model).__name__
    bodies = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens")
    ]
    if len(bodies) != 1 or not hasattr(model.get_submodule(bodies[0]), "norm"):
        raise DyBitError(f"rotate does not support {kind}: it is not a decoder with embed_tokens, layers and norm")
    if attachments(model):
        raise DyBitError(
            f"rotate cannot be used on {kind}: layer {next(iter(attachments(model)))!r} is already transformed"
        )
    body: Any = model.get_submodule(bodies[0])
    prefix = f"{bodies[0]}." if bodies[0] else ""
    for index, layer in enumerate(body.layers):
        problem = _problem(layer)
        if problem:
            raise DyBitError(f"rotate does not support {kind}: layer {prefix}layers.{index} {problem}")
    width = body.embed_tokens.embedding_dim
    if not _commutes(body.norm, width) or not isinstance(body.embed_tokens, nn.Embedding):
        raise DyBitError(f"rotate does not support {kind}: its last norm is not an RMSNorm")
    head = "lm_head" if is_plain(getattr(model, "lm_head", nn.Identity())) else None
    if head and model.get_submodule(head).weight is body.embed_tokens.weight:
        head = None
    return _Decoder(prefix, [f"{prefix}layers.{i}." for i in range(len(body.layers))], head, width)


def _problem(layer: nn.Module) -> str | None:
    """Says how a layer differs from the known structure."""
    children = {name for name, _ in layer.named_children()}
    if children != {*_PARTS, *_NORMS}:
        return f"consists of {', '.join(sorted(children))}"
    for part, names in _PARTS.items():
        module = layer.get_submodule(part)
        found = {name for name, _ in module.named_children()}
        if not names <= found <= names | _EXTRA or not all(is_plain(module.get_submodule(name)) for name in names):
            return f"has {part} of {', '.join(sorted(found))}"
        if any(True for _ in module.parameters(recurse=False)):
            return f"has parameters in {part}"
    attention: Any = layer.get_submodule("self_attn")
    for name in _NORMS:
        if not _commutes(layer.get_submodule(name), attention.q_proj.weight.shape[1]):
            return f"has {name}, which is not an RMSNorm"
    head = getattr(attention, "head_dim", None)
    if not isinstance(head, int) or attention.v_proj.out_features % head or attention.o_proj.in_features % head:
        return "has attention without heads of equal size"
    return None


def _commutes(norm: nn.Module, width: int) -> bool:
    """Whether a module is a norm with factors, and without them computes n(R·x) = R·n(x)."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or [*dict(norm.named_parameters())] != ["weight"] or weight.shape != (width,):
        return False
    generator = torch.Generator().manual_seed(_SEED)
    x = (
        torch.randn(4, width, generator=generator, dtype=torch.float32, device="cpu") + 1
    )  # not of mean zero: LayerNorm would subtract it
    rotation = _Rotation.draw(width, generator)
    factor, signs = rotation.factor.to(weight), rotation.signs.to(weight)
    ones = {"weight": torch.ones_like(weight)}
    with torch.no_grad():
        x = x.to(weight)
        plain = torch.func.functional_call(norm, ones, x)
        rotated = torch.func.functional_call(norm, ones, rotate(x, factor, signs))
        scaled = norm(x)
    near = 8 * torch.finfo(weight.dtype).eps
    return torch.allclose(rotated, rotate(plain, factor, signs), rtol=near, atol=10 * near) and torch.allclose(
        scaled, plain * weight, rtol=near, atol=10 * near
    )
