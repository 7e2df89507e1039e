"""Text that models write: drawn from their own distribution, always the same, and refused where it makes no sense."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.models.own_text import own_text

transformers = pytest.importorskip("transformers")
FIELDS = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 7,
}  # fmt: skip


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS | changes)).train()


class Chain(nn.Module):
    """A model whose next token depends on the last alone, by a table of chances."""

    def __init__(self, chances):
        super().__init__()
        self.chances = nn.Parameter(chances)
        self.config = SimpleNamespace(bos_token_id=1, is_encoder_decoder=False)

    def can_generate(self):
        return True

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        assert use_cache and input_ids.shape[1] == 1 and not self.training and not torch.is_grad_enabled()
        length = (past_key_values or 0) + 1
        return SimpleNamespace(logits=self.chances[input_ids].log(), past_key_values=length)


def test_tokens_have_the_models_chances():
    chances = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.8, 0.0, 0.2]])
    batches = own_text(Chain(chances), sequences=64, length=200)
    assert len(batches) == 64 and all(batch.keys() == {"input_ids"} for batch in batches)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (64, 200) and ids.dtype == torch.int64 and bool((ids[:, 0] == 1).all())
    pairs = torch.stack([ids[:, :-1].flatten(), ids[:, 1:].flatten()])
    counts = torch.zeros(3, 3).index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), chances, atol=0.03)
    assert counts[2, 1] == 0


def test_the_same_in_every_call():
    model, random, said = llama(), torch.get_rng_state(), []
    first, second = (own_text(model, sequences=2, length=70, progress=said.append) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert said == ["writing calibration text: 64 of 70 tokens"] * 2


def test_no_longer_than_the_model_takes():
    model = llama(max_position_embeddings=9)
    assert own_text(model, sequences=1)[0]["input_ids"].shape == (1, 9)


@pytest.mark.parametrize("model", [lambda: nn.Linear(4, 4), lambda: llama(bos_token_id=None)])
def test_models_that_cannot(model):
    with pytest.raises(DyBitError, match="cannot write its own calibration text"):
        own_text(model())


@pytest.mark.parametrize("field", ["sequences", "length"])
def test_bad_numbers(field):
    with pytest.raises(DyBitError, match=f"{field} must be at least 1, not 0"):
        own_text(llama(), **{field: 0})
