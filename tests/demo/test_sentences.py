import pytest
import torch

from dybit.demo import minilm, minilm_batches, minilm_tokenizer
from dybit.errors import DyBitError


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@torch.no_grad()
def test_paraphrases_are_closer_than_unrelated_sentences(encoder):
    texts = [
        "A man is playing a guitar on stage.",
        "Someone performs music with a guitar.",
        "Share prices fell sharply this morning.",
        "The stock market dropped a lot today.",
    ]
    encoded = minilm_tokenizer().encode_batch(texts)
    ids = torch.tensor([item.ids for item in encoded])
    mask = torch.tensor([item.attention_mask for item in encoded])
    embeddings = encoder(ids, mask)
    assert embeddings.shape == (4, 384)
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(4), atol=1e-5)
    similarity = embeddings @ embeddings.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.5
    assert similarity[:2, 2:].max() < 0.2


@torch.no_grad()
def test_padding_does_not_matter(encoder):
    batch = minilm_batches(batch_size=4, batches=1, length=32)[0]
    padded = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    assert torch.allclose(encoder(**batch), encoder(**padded), atol=1e-5)


def test_model_is_ready(encoder):
    assert not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not any("pooler" in name for name, _ in encoder.named_modules())


def test_loading_leaves_the_generator_alone():
    before = torch.get_rng_state()
    minilm()
    assert torch.equal(before, torch.get_rng_state())


def test_batches():
    batches = minilm_batches()
    assert len(batches) == 8
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        ids = batch["input_ids"]
        assert ids.dtype == torch.int64 and ids.shape == batch["attention_mask"].shape
        assert ids.shape[0] == 16 and ids.shape[1] <= 128
    for one, two in zip(batches, minilm_batches(), strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_splits_are_disjoint():
    rows = {
        split: {
            tuple(row[mask.bool()].tolist())
            for batch in minilm_batches(split)
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        for split in ("calibration", "evaluation")
    }
    assert len(rows["calibration"]) == len(rows["evaluation"]) == 128
    assert not rows["calibration"] & rows["evaluation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"length": 513}, "length=513"),
        ({"batches": 0}, "batches=0"),
        ({"batches": 9999}, "need 159984 paragraphs"),
    ],
)
def test_batches_reject(arguments, message):
    with pytest.raises(DyBitError, match=message):
        minilm_batches(**arguments)
