"""Plans for files of transformers: experts stored apart, in the order of their rows; what cannot be planned."""

import json
import re

import pytest
import torch
import transformers

import dybit
from dybit.integrations import files
from dybit.integrations.files import build_empty, plan_files

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 12,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    transformers.MixtralConfig(**CONFIG, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def keys(experts=12):
    for number in range(experts):
        for name in ("w3", "w2", "w1"):
            yield f"model.layers.0.block_sparse_moe.experts.{number}.{name}.weight"
    yield "model.layers.0.block_sparse_moe.gate.weight"
    yield "model.layers.0.self_attn.q_proj.weight"


def test_experts_in_the_order_of_their_rows(folder):
    plan = plan_files(folder, list(keys()), dybit.Recipe(weights=4))
    for key, weight in plan.weights.items():
        if found := re.search(r"experts\.(\d+)\.w(\d)", key):
            number, which = int(found[1]), found[2]
            assert weight.layer == "model.layers.0.mlp.experts"
            assert weight.row == {"1": 96 * number, "3": 96 * number + 48, "2": 32 * number}[which]
            assert weight.shape == ((32, 48) if which == "2" else (48, 32))
            assert plan.names[key] == f"{weight.layer}.{'down_proj' if which == '2' else 'gate_up_proj'}"
    assert len(plan.weights) == 37
    assert plan.names["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    modules = [
        name for group in json.loads(plan.config({}))["quantization_config"]["layers"] for name in group["modules"]
    ]
    assert modules == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"]


def test_experts_that_are_missing_or_made_otherwise(folder, monkeypatch):
    with pytest.warns(dybit.DyBitWarning, match=r"'model.layers.0.mlp.experts' keeps floating point"):
        plan = plan_files(folder, list(keys(11)), dybit.Recipe(weights=4))
    assert list(plan.weights) == ["model.layers.0.self_attn.q_proj.weight"] and not plan.names
    original = files.get_model_conversion_mapping

    def other(model):
        conversions = original(model)
        for conversion in conversions:
            for operation in getattr(conversion, "operations", ()):
                operation.dim = 0
        return conversions

    monkeypatch.setattr(files, "get_model_conversion_mapping", other)
    with pytest.warns(dybit.DyBitWarning, match="in an unknown way"):
        plan = plan_files(folder, list(keys()), dybit.Recipe(weights=4))
    assert list(plan.weights) == ["model.layers.0.self_attn.q_proj.weight"]


def test_empty_models(folder, tmp_path):
    assert all(parameter.is_meta for parameter in build_empty(folder).parameters())
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(dybit.CheckpointError, match=r"config.json cannot be built by transformers"):
        build_empty(tmp_path)
    assert torch.get_default_device().type == "cpu"
