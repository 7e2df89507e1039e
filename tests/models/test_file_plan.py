"""Plans for files without a model: what is a weight, what is an embedding, what is kept."""

import pytest
import torch
from safetensors.torch import save_file

from dybit.errors import DyBitError
from dybit.models.file_plan import plan_names
from dybit.models.tensor_files import read_source
from dybit.recipe import Recipe

TENSORS = {
    "head.weight": torch.ones(6, 8),
    "head.bias": torch.ones(6),
    "conv.weight": torch.ones(4, 2, 3, 3),
    "attention.in_proj_weight": torch.ones(12, 4),
    "block.q_proj_weight": torch.ones(4, 4),
    "block.k_proj_weight": torch.ones(4, 5),
    "embed_tokens.weight": torch.ones(9, 4),
    "transformer.wte.weight": torch.ones(9, 4),
    "norm.weight": torch.ones(8),
    "steps.weight": torch.ones(3, 3, dtype=torch.int64),
    "half.weight": torch.ones(3, 3, dtype=torch.float16),
    "empty.weight": torch.zeros(0, 3),
    "table": torch.ones(5, 5),
    "weight": torch.ones(3, 2),
}


def plan(tmp_path, recipe, tensors=TENSORS):
    save_file(tensors, tmp_path / "m.safetensors")
    return plan_names("m.safetensors", read_source(tmp_path / "m.safetensors"), recipe)


def test_weights_by_their_names(tmp_path):
    found = plan(tmp_path, Recipe(weights=4, embeddings=8, method="absmax"))
    layers = {"head", "conv", "attention", "block", "embed_tokens", "transformer.wte", "half", ""}
    assert set(found.entries) == layers
    assert set(found.entries["block"]["weights"]) == {"q_proj_weight", "k_proj_weight"}
    assert found.entries["half"]["dtype"] == "float16" and found.entries["head"]["input"] is None
    bits = {key: job.spec.bits for key, job in found.jobs.items()}
    assert {key for key, width in bits.items() if width == 8} == {"embed_tokens.weight", "transformer.wte.weight"}
    assert {job.method for job in found.jobs.values()} == {"absmax"}
    for key, job in found.jobs.items():
        assert job.spec.shape == tuple(TENSORS[key].shape)
    weights = sum(TENSORS[key].numel() for key in found.jobs)
    assert (found.coverage.quantized, found.coverage.total) == (weights, weights + 25)
    assert [part.name for part in found.coverage.left] == ["table"]


def test_rules(tmp_path):
    found = plan(tmp_path, Recipe(weights=4, rules={"head": None, "conv": {"weights": 3}, "table": None}))
    assert "head.weight" not in found.jobs and found.jobs["conv.weight"].spec.bits == 3
    assert [(part.name, part.asked) for part in found.coverage.left] == [("head", True), ("table", True)]


def test_what_cannot_be_planned(tmp_path):
    with pytest.raises(DyBitError, match=r"activations=8 need a model that can be run, not the file 'm\.safetensors'"):
        plan(tmp_path, Recipe(activations=8))
    with pytest.raises(DyBitError, match="rule 'haed' matches no layer"):
        plan(tmp_path, Recipe(rules={"haed": None}))
    with pytest.raises(DyBitError, match=r"'m\.safetensors' has no floating-point tensor of 2 to 5 dimensions"):
        plan(tmp_path, Recipe(), {"a": torch.ones(3, 3), "b.weight": torch.ones(3)})
