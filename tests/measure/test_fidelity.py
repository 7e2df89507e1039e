"""Tests of the measures of fidelity, against SciPy and against direct formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.measure import fidelity


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(7, 3, 11, generator=generator)
    return a, a + 0.3 * torch.randn(a.shape, generator=generator)


def test_sqnr_is_the_ratio_of_energies(pair):
    a, b = (x.double().numpy() for x in pair)
    assert fidelity.sqnr(*pair) == pytest.approx(10 * math.log10((a**2).sum() / ((a - b) ** 2).sum()))


def test_sqnr_of_equal_and_of_zero_references():
    assert fidelity.sqnr(torch.ones(3), torch.ones(3)) == math.inf
    assert fidelity.sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_agreement_counts_equal_places_of_the_maximum(pair):
    a, b = (x.numpy() for x in pair)
    assert fidelity.agreement(*pair) == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())


def test_kl_divergence_matches_scipy(pair):
    p, q = (scipy.special.softmax(x.double().numpy(), axis=-1) for x in pair)
    assert fidelity.kl_divergence(*pair) == pytest.approx(scipy.stats.entropy(p, q, axis=-1).mean(), rel=1e-4)


def test_kl_divergence_of_more_rows_than_a_block():
    a = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    p, q = scipy.special.softmax(a.numpy(), axis=-1), scipy.special.softmax(2 * a.numpy(), axis=-1)
    assert fidelity.kl_divergence(a, 2 * a) == pytest.approx(scipy.stats.entropy(p, q, axis=-1).mean(), rel=1e-4)


@pytest.mark.parametrize("levels", [1000, 4], ids=["distinct", "ties"])
def test_spearman_matches_scipy(levels):
    generator = torch.Generator().manual_seed(levels)
    a = torch.randint(levels, (5, 40), generator=generator).float()
    b = (a + torch.randint(3, a.shape, generator=generator)).float()
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert fidelity.spearman(a, b) == pytest.approx(np.mean(expected))


def test_spearman_of_a_constant_is_zero():
    assert fidelity.spearman(torch.arange(5.0), torch.ones(5)) == 0.0


def test_embeddings_by_neighbours_and_by_pairs():
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(12, 6, generator=generator)
    b = a + 0.5 * torch.randn(a.shape, generator=generator)
    unit = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b)]
    cosines = [x @ x.T for x in unit]
    upper = np.triu_indices(12, 1)
    expected = scipy.stats.spearmanr(cosines[0][upper], cosines[1][upper]).statistic
    assert fidelity.pair_spearman(a, b) == pytest.approx(expected, abs=1e-6)
    for cosine in cosines:
        np.fill_diagonal(cosine, -2)
    same = (cosines[0].argmax(1) == cosines[1].argmax(1)).mean()
    assert fidelity.neighbour_agreement(a, b) == pytest.approx(same)


@pytest.mark.parametrize("measure", [fidelity.sqnr, fidelity.agreement, fidelity.kl_divergence, fidelity.spearman])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"shape \(3, 2\).*\(2, 3\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"nothing to compare.*\(0, 3\)"),
        (torch.ones(3), torch.tensor([1.0, math.nan, 1.0]), "output holds NaN"),
        (torch.tensor([1.0, math.inf]), torch.ones(2), "reference holds NaN or infinity"),
    ],
    ids=["shapes", "empty", "nan", "infinity"],
)
def test_bad_input(measure, a, b, message):
    with pytest.raises(DyBitError, match=message):
        measure(a, b)


def test_too_little_to_rank():
    with pytest.raises(DyBitError, match="two entries"):
        fidelity.spearman(torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(DyBitError, match="items, width"):
        fidelity.neighbour_agreement(torch.ones(3), torch.ones(3))


class _Language(nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, vocabulary: int = 9) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table(input_ids))


def test_perplexity_matches_a_loop():
    model, tokens = _Language(), torch.tensor([[1, 4, 2, 8], [3, 3, 0, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logs = model.table.weight.detach().double().log_softmax(-1)
    steps = [(1, 4), (4, 2), (2, 8), (3, 3)]
    expected = math.exp(-sum(float(logs[a, b]) for a, b in steps) / len(steps))
    assert fidelity.perplexity(model, [{"input_ids": tokens, "attention_mask": mask}]) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_perplexity_of_plain_token_ids(dtype):
    model, tokens = _Language(), torch.tensor([[1, 4, 2, 8], [3, 3, 0, 5]])
    expected = fidelity.perplexity(model, [{"input_ids": tokens}])
    for batch in (tokens.to(dtype), (tokens.to(dtype),), {"input_ids": tokens.to(dtype)}):
        assert fidelity.perplexity(model, [batch]) == expected
        assert fidelity.compare_models(model, model, [batch]).perplexity == expected
    with pytest.raises(DyBitError, match="token ids"):
        fidelity.perplexity(nn.Unflatten(1, (1, 4)), [torch.ones(2, 4)])


def test_perplexity_needs_a_language_model():
    with pytest.raises(DyBitError, match="input_ids"):
        fidelity.perplexity(nn.Linear(3, 3), [torch.ones(2, 3)])
    with pytest.raises(DyBitError, match="at least one batch"):
        fidelity.perplexity(_Language(), [])


def test_comparison_equals_the_measures_over_all_batches():
    torch.manual_seed(0)
    original, other = nn.Linear(6, 5), nn.Linear(6, 5)
    other.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in original.state_dict().items()})
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    found = fidelity.compare_models(original, other, batches)
    with torch.no_grad():
        a, b = original(torch.cat(batches)), other(torch.cat(batches))
    assert found.outputs == 7 and found.perplexity is None
    assert found.sqnr == pytest.approx(fidelity.sqnr(a, b), rel=1e-5)
    assert found.agreement == pytest.approx(fidelity.agreement(a, b))
    assert found.kl == pytest.approx(fidelity.kl_divergence(a, b), rel=1e-4)
    assert found.spearman == pytest.approx(fidelity.spearman(a, b))


def test_comparison_of_language_models_has_perplexity():
    model = _Language()
    batches = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    found = fidelity.compare_models(model, model, batches)
    assert found.sqnr == math.inf and found.agreement == 1 and found.kl == 0
    assert found.perplexity == pytest.approx(fidelity.perplexity(model, batches))


def test_unit_vectors_are_taken_for_embeddings():
    class Unit(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x, dim=-1)

    with fidelity.Reference(Unit(), [torch.randn(5, 4)]) as reference:
        assert reference.kind == "embeddings" and reference.judge(Unit()).agreement == 1
    with fidelity.Reference(nn.Linear(4, 3), [torch.randn(5, 4)], "values") as reference:
        assert reference.judge(nn.Linear(4, 3)).agreement is None


def test_large_references_go_to_files_and_these_are_removed(monkeypatch):
    monkeypatch.setattr(fidelity, "_SPILL_BYTES", 100)
    model = nn.Linear(4, 6)
    with fidelity.Reference(model, [torch.randn(4, 4), torch.randn(4, 4)]) as reference:
        folder = reference._kept._folder
        assert folder is not None
        assert reference.judge(model).sqnr == math.inf
    from pathlib import Path

    assert not Path(folder.name).exists()


def test_bad_comparisons():
    with pytest.raises(DyBitError, match="no batch"):
        fidelity.Reference(nn.Linear(2, 2), [])
    with pytest.raises(DyBitError, match="'guess'"):
        fidelity.Reference(nn.Linear(2, 2), [torch.ones(1, 2)], "guess")
    with pytest.raises(DyBitError, match=r"batch 0.*does not fit"):
        fidelity.Reference(nn.Linear(2, 2), [torch.ones(1, 3)])
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.bias, math.nan)
    with pytest.raises(DyBitError, match="output for batch 0: output holds NaN"):
        fidelity.compare_models(nn.Linear(2, 2), broken, [torch.ones(1, 2)])
