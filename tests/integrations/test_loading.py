import warnings

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers_models import build, edited

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
    folder = edited(stored, tmp_path, lambda c: None)
    tensors = load_file(stored / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(dybit.CheckpointError, match=r"lacks 'model.layers.0.mlp.up_proj.weight'"):
        AutoModelForCausalLM.from_pretrained(folder)


OFFLOADED = {
    "all": {"": "disk"},
    "a layer": {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        "model.layers.0": "cpu", "model.layers.1": "disk",
    },
}  # fmt: skip


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("places", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral"])
@torch.no_grad()
def test_layers_on_disk(name, places, buffers, tmp_path):
    pytest.importorskip("accelerate")
    ids, load = torch.arange(1, 10)[None], AutoModelForCausalLM.from_pretrained
    config = dybit.DyBitConfig(weights=4, activations=8, activation_mode="dynamic")
    build(name).save_pretrained(tmp_path / "m")
    whole = load(tmp_path / "m", quantization_config=config)
    codes = dict(whole.config.quantization_config.checksums)
    whole.save_pretrained(tmp_path / "q")
    wanted = whole(ids).logits
    for folder, own in (("m", {"quantization_config": config}), ("q", {})):
        model = load(
            tmp_path / folder,
            device_map=places,
            offload_folder=tmp_path / f"off{folder}",
            offload_buffers=buffers,
            **own,
        )
        assert model.get_submodule("model.layers.1.self_attn.q_proj")._buffers["weight"].is_meta == buffers
        for _ in range(3):
            assert torch.equal(model(ids).logits, wanted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(tmp_path / f"again{folder}")
        again = load(tmp_path / f"again{folder}")
        assert torch.equal(again(ids).logits, wanted)
        known = again.config.quantization_config.checksums
        assert {key: known[key] for key in codes} == codes


def test_damaged_codes_on_disk_are_refused(stored, tmp_path):
    pytest.importorskip("accelerate")
    folder = edited(stored, tmp_path, lambda c: None)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(dybit.CheckpointError, match=r"codes of 'model.layers.1.mlp.up_proj.weight' are not those"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=OFFLOADED["a layer"], offload_buffers=True)


def test_codes_that_are_made_need_a_folder(llama):
    pytest.importorskip("accelerate")
    with pytest.raises(dybit.DyBitError, match="offload_folder must be given"):
        AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=dybit.DyBitConfig(), device_map={"": "disk"}, offload_buffers=True
        )
