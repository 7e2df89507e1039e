import json

import pytest
from command_line import MODULE, good, invoke


def test_info_of_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "informed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = invoke("info", str(tmp_path / "no"))
    assert result.exit_code == 2 and "is not a dybit checkpoint" in result.stderr
    good("quantize", "informed:net", "-o", str(tmp_path / "q"))
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    result = invoke("info", str(tmp_path / "q"))
    assert result.exit_code == 2 and "damaged" in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "q" / "dybit.json").write_text("{")
    assert "not valid JSON" in invoke("info", str(tmp_path / "q")).stderr


def test_info_of_a_transformers_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    from transformers_models import build

    import dybit

    build("llama").save_pretrained(tmp_path / "m")
    config = dybit.DyBitConfig(weights=4, embeddings=None, activations=8, activation_mode="dynamic")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    good(
        "quantize",
        str(tmp_path / "m" / "model.safetensors"),
        "-o",
        str(tmp_path / "c"),
        "--weights",
        "4",
        "--embeddings",
        "none",
    )
    said, *rest = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["coverage"] for name in "qc"
    ]
    assert said == model.config.quantization_config.coverage.to_dict() and rest == [said]
    for name in "qc":
        text = good("info", str(tmp_path / name))
        assert ("layers such as" in text) == (name == "q") and '"weights": 4' in text
        left = "in floating point: Embedding 'model.embed_tokens' (9 %, the recipe keeps these weights)"
        assert f"of {said['total']:,} weights are quantized; {left}" in text
    result = invoke("info", str(tmp_path / "m"))
    assert result.exit_code == 2 and "config.json has no quantization_config of dybit" in result.stderr
