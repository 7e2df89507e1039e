"""What transformers asks the parameters of a model."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers_models import build

import dybit
from dybit.integrations.transformers import attach_


class Config(transformers.PretrainedConfig):
    model_type = "alone"


class Alone(transformers.PreTrainedModel):
    """A model without parameters beside a weight."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.only = nn.Linear(4, 6, bias=False)
        self.post_init()

    def forward(self, x):
        return self.only(x)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "clip", "whisper"])
def test_quantized_weights_count(name, tmp_path):
    model = build(name)
    wanted = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
    model.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m", quantization_config=dybit.DyBitConfig(weights=4))
    loaded.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    called = attach_(dybit.quantize_(model, dybit.Recipe(weights=4)))
    for quantized in (loaded, called, type(model).from_pretrained(tmp_path / "q"), copy.deepcopy(loaded)):
        assert [quantized.num_parameters(), quantized.num_parameters(exclude_embeddings=True)] == wanted
        trained = sum(p.numel() for p in quantized.parameters() if p.requires_grad)
        assert quantized.num_parameters(only_trainable=True) == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_and_type_without_parameters(dtype):
    model = attach_(dybit.quantize_(Alone(Config()).to(dtype), dybit.Recipe(weights=4)))
    for one in (model, copy.deepcopy(model)):
        assert one.device == torch.device("cpu") and one.dtype == dtype
        assert one.num_parameters() == 24 and not one.num_parameters(only_trainable=True)
    assert torch.equal(
        pickle.loads(pickle.dumps(model.only))(torch.ones(1, 4, dtype=dtype)), model(torch.ones(1, 4, dtype=dtype))
    )
