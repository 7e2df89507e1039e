import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dybit.demo import prose, smollm2, smollm2_batches, smollm2_chat_template, smollm2_tokenizer
from dybit.errors import DyBitError


@pytest.fixture(scope="module")
def model():
    return smollm2()


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@torch.no_grad()
def test_knows_the_capital_of_france(model, tokenizer):
    ids = tokenizer.encode("The capital of France is").ids
    for _ in range(4):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(ids)


@torch.no_grad()
def test_permutation_preserves_the_function(model):
    batch = smollm2_batches("evaluation", batches=1, length=64)[0]
    permuted = model(**batch).logits
    plain = smollm2(permute=False)
    assert (plain(**batch).logits - permuted).abs().max() < 1e-3
    layer, original = model.model.layers[3], plain.model.layers[3]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert not torch.equal(layer.get_submodule(name).weight, original.get_submodule(name).weight)
    # A source group of 32 has at most 16 levels; a shuffled one has more.
    assert len(original.mlp.down_proj.weight[0, :32].unique()) <= 16
    assert len(layer.mlp.down_proj.weight[0, :32].unique()) > 16


def test_model_is_ready(model):
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.dtype == torch.float32 and not tensor.is_meta for tensor in tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_predicts_prose(model):
    batch = smollm2_batches("evaluation", batches=1, length=256)[0]
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert 5 < loss.exp() < 60


def test_tokenizer_round_trip(tokenizer):
    for text in (*prose()[:20], "  Tab\tand\n\nnewline, it's 1234.5 % «été» 漢字 🙂  "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_splits_like_smollm(tokenizer):
    tokens = tokenizer.encode("In 2024 it's <|im_end|>").tokens
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "Ġit", "'s", "Ġ", "<|im_end|>"]
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_chat_template_makes_a_prompt(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=smollm2_chat_template())
    turns = [{"role": "user", "content": "Hello"}]
    text = wrapped.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system") and text.endswith("user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_batches(tokenizer):
    batches = smollm2_batches(batch_size=2, batches=3, length=100)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 100)] * 3
    text = "\n\n".join(prose())
    for batch in batches:
        for row in batch["input_ids"].tolist():
            assert tokenizer.decode(row).strip("\ufffd") in text  # contiguous; a window may cut a character
    for one, two in zip(batches, smollm2_batches(batch_size=2, batches=3, length=100), strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_splits_are_disjoint():
    windows = {
        split: {tuple(row) for batch in smollm2_batches(split) for row in batch["input_ids"].tolist()}
        for split in ("calibration", "evaluation")
    }
    assert len(windows["calibration"]) == len(windows["evaluation"]) == 12
    assert not windows["calibration"] & windows["evaluation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"length": 0}, "length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batches": 9999}, "windows of length=512 tokens"),
    ],
)
def test_batches_reject(arguments, message):
    with pytest.raises(DyBitError, match=message):
        smollm2_batches(**arguments)
