import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers_models import edited

import dybit


def test_codes_that_do_not_fit(stored, tmp_path):
    def change(config):
        config["layers"][1]["weights"].update(group_size=16)
        del config["checksums"]["quantization_config"]

    folder = edited(stored, tmp_path, change)
    with pytest.raises((dybit.CheckpointError, RuntimeError), match=r"does not fit|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_files(stored, tmp_path):
    folder = edited(stored, tmp_path, lambda c: None)
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        for share in (0.0, 0.01, 0.3, 0.9, 0.999):
            (folder / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises((OSError, ValueError, RuntimeError, SafetensorError)):
                AutoModelForCausalLM.from_pretrained(folder)
        (folder / name).write_bytes(content)


def test_missing_codes(stored, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(stored, tmp_path, lambda c: None)
    tensors = load_file(stored / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(dybit.CheckpointError, match=r"lacks 'model.layers.0.mlp.up_proj.weight'"):
        AutoModelForCausalLM.from_pretrained(folder)
