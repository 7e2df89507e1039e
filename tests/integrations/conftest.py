"""Checkpoints that several tests read."""

import pytest
from transformers import AutoModelForCausalLM
from transformers_models import build

import dybit


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama_tied").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(llama, tmp_path_factory):
    """A checkpoint that dybit quantized."""
    folder = tmp_path_factory.mktemp("stored")
    config = dybit.DyBitConfig(weights=4, group_size=32, scale="fp32")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(folder)
    return folder
