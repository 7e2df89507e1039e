"""transformers: quantizing while loading, saving and loading again, for the architectures in use; what goes wrong."""

import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from helpers import cuts, damaged, flips, header_flips
from transformers import AutoModel, AutoModelForCausalLM
from transformers_models import (
    ARCHITECTURES,
    TEXT,
    build,
    edited,
)

import dybit
from dybit.integrations.transformers import attach_
from dybit.layers.quantized import quantized_layers

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

# architecture: (prefix of its configuration's class, fields, model)
RECIPES = {
    "weights": {"weights": 4, "group_size": 32},
    "dynamic": {"weights": 4, "activations": 8, "activation_mode": "dynamic"},
}


def inputs(name):
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (2, 7))
    pixels = torch.randn(2, 3, 16, 16)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"pixel_values": pixels, "input_ids": ids}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    return {"input_ids": ids}


def run(model, name):
    with torch.no_grad():
        out = model(**inputs(name))
    return out.logits_per_image if name == "clip" else out.logits


def nothing_wrong(info):
    return not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, recipe, tmp_path):
    original = build(name)
    original.save_pretrained(tmp_path / "float")
    expected = dybit.quantize_(copy.deepcopy(original), dybit.Recipe(**RECIPES[recipe]))
    logits = run(expected, name)

    cls = type(original)
    config = dybit.DyBitConfig(**RECIPES[recipe])
    loaded, info = cls.from_pretrained(tmp_path / "float", quantization_config=config, output_loading_info=True)
    assert nothing_wrong(info)
    assert config.layers is None  # the caller's own is not written to
    assert set(quantized_layers(loaded)) == set(quantized_layers(expected))
    assert torch.equal(run(loaded, name), logits)

    loaded.save_pretrained(tmp_path / "codes")
    again, info = cls.from_pretrained(tmp_path / "codes", output_loading_info=True)
    assert nothing_wrong(info)
    assert torch.equal(run(again, name), logits)
    assert {k: v.data_ptr() for k, v in again.state_dict().items()}.keys() == expected.state_dict().keys()
    ties = [len({id(m._buffers.get("weight")) for m in quantized_layers(x).values()}) for x in (again, expected)]
    assert ties[0] == ties[1]
    if again.can_generate() and "input_ids" in inputs(name):
        tokens = again.generate(**inputs(name), max_new_tokens=4, do_sample=False)
        assert tokens.shape == (2, 11)
        assert torch.equal(tokens, expected.generate(**inputs(name), max_new_tokens=4, do_sample=False))


def experts(model):
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("name", ["mixtral", "qwen_moe"])
def test_experts_compute_what_their_codes_say(name):
    model = dybit.quantize_(build(name), dybit.Recipe(weights=4, group_size=32))
    spec = experts(model).weight_specs["gate_up_proj"]
    assert experts(model)._buffers["gate_up_proj"].shape == (spec.shape[0] * spec.shape[1], 2, 16, 1)
    logits = run(model, name)
    for implementation in ("eager", "grouped_mm"):
        plain = dybit.dequantize_(copy.deepcopy(model))
        plain.config._experts_implementation = implementation
        assert type(experts(plain)).__name__ == type(experts(build(name))).__name__
        assert torch.allclose(run(plain, name), logits, atol=1e-5)
    assert spec.nbytes < 0.2 * experts(plain).gate_up_proj.nbytes


def test_a_rule_for_experts(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "float")
    rules = {"*.layers.0.mlp.experts": None, "*.experts": {"weights": 3}}
    config = dybit.DyBitConfig(weights=4, rules=rules)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert experts(model).gate_up_proj.dtype == torch.float32 and not hasattr(experts(model), "weight_specs")
    assert model.model.layers[1].mlp.experts.weight_specs["down_proj"].bits == 3
    model.save_pretrained(tmp_path / "codes")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", output_loading_info=True)
    assert nothing_wrong(info) and torch.equal(run(again, "mixtral"), run(model, "mixtral"))
    again.dequantize()
    again.save_pretrained(tmp_path / "again")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert nothing_wrong(info) and torch.allclose(run(plain, "mixtral"), run(model, "mixtral"), atol=1e-5)


def test_calibrated_experts_are_attached(tmp_path):
    model = build("mixtral")
    dybit.quantize_(
        model, dybit.Recipe(weights=4, activations=8, activation_mode="static"), [inputs("mixtral")], algorithm="gptq"
    )
    assert experts(model).input_spec.mode == "dynamic" and model.lm_head.input_spec.mode == "static"
    attach_(model).save_pretrained(tmp_path / "hub")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert nothing_wrong(info) and torch.equal(run(again, "mixtral"), run(model, "mixtral"))
    dybit.save(again, tmp_path / "own")
    own = dybit.load(tmp_path / "own", build("mixtral"))
    assert torch.equal(run(own, "mixtral"), run(model, "mixtral"))
    assert torch.equal(run(copy.deepcopy(own), "mixtral"), run(model, "mixtral"))


def test_layers_of_different_widths_load(llama, tmp_path):
    rules = {"*.q_proj": {"weights": 2}, "*.k_proj": {"weights": 3}, "*.v_proj": {"weights": "int8"}, "*.o_proj": None}
    config = dybit.DyBitConfig(weights=5, group_size=16, embeddings=4, rules=rules)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    attention = again.model.layers[1].self_attn
    assert [attention.q_proj.weight_specs["weight"].bits, attention.k_proj.weight_specs["weight"].bits] == [2, 3]
    assert type(attention.o_proj) is torch.nn.Linear
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    assert dybit.DyBitConfig.from_dict(json.loads((tmp_path / "config.json").read_text())["quantization_config"])


def test_sharded_checkpoints(llama, tmp_path):
    config = dybit.DyBitConfig(weights=4)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), run(model, "llama"))


def test_half_precision_keeps_the_scales(stored):
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(stored)
    layer, other = model.model.layers[0].mlp.up_proj, exact.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, other.weight_scale)
    assert torch.allclose(run(model, "llama").float(), run(exact, "llama"), atol=0.02)


def test_dequantize(stored):
    model = AutoModelForCausalLM.from_pretrained(stored)
    logits = run(model, "llama")
    model.dequantize()
    assert not quantized_layers(model) and not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(run(model, "llama"), logits, atol=1e-5)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_stay_tied(stored):
    model = AutoModelForCausalLM.from_pretrained(stored)
    logits = run(model, "llama")
    model.tie_weights()
    assert model.lm_head._buffers["weight"] is model.model.embed_tokens._buffers["weight"]
    assert torch.equal(run(model, "llama"), logits)
    with pytest.raises(dybit.DyBitError, match=r"of shape \(101, 64\), cannot be replaced by .* \(103, 64\)"):
        model.resize_token_embeddings(103)


def test_a_file_with_both_tied_weights(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "a")
    tensors = load_file(llama / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    config = dybit.DyBitConfig(weights=4, embeddings=4)
    models = []
    for head in (table.clone(), table * 2 + 0.1):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "a", quantization_config=config, output_loading_info=True
        )
        assert nothing_wrong(info)
        models.append(model)
        model.save_pretrained(tmp_path / "b")
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
        assert nothing_wrong(info)
        assert torch.equal(run(again, "llama"), run(model, "llama"))
    same, other = models
    assert same.lm_head._buffers["weight"] is same.model.embed_tokens._buffers["weight"]
    assert other.lm_head._buffers["weight"] is not other.model.embed_tokens._buffers["weight"]
    assert torch.allclose(other.lm_head.weight, table * 2 + 0.1, atol=0.05)
    assert torch.allclose(other.model.embed_tokens.weight, table, atol=0.05)


def test_the_base_of_a_saved_model(stored):
    base, info = AutoModel.from_pretrained(stored, output_loading_info=True)
    whole = AutoModelForCausalLM.from_pretrained(stored)
    assert nothing_wrong(info) and len(quantized_layers(base)) == 15
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_a_new_head_stays_in_floating_point(llama, tmp_path):
    build("bert").save_pretrained(tmp_path)
    config = dybit.DyBitConfig(weights=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert type(model.classifier) is torch.nn.Linear
    assert "bert.encoder.layer.0.output.dense" in quantized_layers(model)


def test_gradients_reach_what_is_below(stored):
    model = AutoModelForCausalLM.from_pretrained(stored)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    x = torch.randn(1, 3, 64, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_calibrated_models_are_attached(tmp_path):
    model = build("llama_tied")
    batches = [inputs("llama")]
    dybit.quantize_(model, dybit.Recipe(weights=4, activations=8, activation_mode="static"), calibration=batches)
    attach_(model).save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert nothing_wrong(info)
    assert again.model.layers[0].mlp.up_proj.input_spec.mode == "static"
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    dybit.save(again, tmp_path / "own")
    own = dybit.load(tmp_path / "own", build("llama_tied"))
    assert torch.equal(run(own, "llama"), run(model, "llama"))
    with pytest.raises(dybit.DyBitError, match="model must be a transformers model after quantize_, not Linear"):
        attach_(torch.nn.Linear(2, 2))
    with pytest.raises(dybit.DyBitError, match="model is fused; save the model that was passed to fuse"):
        attach_(dybit.fuse(model))


BAD = {
    "version": (lambda c: c.update(format_version=2), "format_version 2, this dybit reads 1"),
    "family": (lambda c: c["layers"][0]["weights"].update(family="nf99"), "bad entry: .*nf99"),
    "field": (lambda c: c["layers"][0]["weights"].pop("scale"), "must have the fields"),
    "no_modules": (lambda c: c["layers"][0].pop("modules"), "missing or bad field: KeyError"),
    "groups": (lambda c: c["layers"][1]["weights"].update(group_size="x"), "bad entry: group_size='x'"),
    "norm": (lambda c: c["layers"][1]["modules"].append("model.norm"), "'model.norm', which is LlamaRMSNorm here"),
    "input": (lambda c: c["layers"][0].update(input={"format": "s8r1"}), "bad entry: a stored input"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations(stored, tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(dybit.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(stored, tmp_path, change))


def test_flipped_bits_of_codes_and_scales(stored, tmp_path):
    folder = edited(stored, tmp_path, lambda c: None)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    parts = [entry["data_offsets"] for name, entry in header.items() if "proj.weight" in name]
    assert len(parts) == 42  # codes, scales and choices of seven projections in two blocks
    for i, (start, stop) in enumerate(parts):
        place = (start, (start + stop) // 2, stop - 1)[i % 3]
        damaged = bytearray(content)
        damaged[8 + length + place] ^= 1 << (i % 8)
        file.write_bytes(damaged)
        with pytest.raises(dybit.CheckpointError, match="is damaged: the codes of 'model"):
            AutoModelForCausalLM.from_pretrained(folder)
    file.write_bytes(content)
    AutoModelForCausalLM.from_pretrained(folder)


def test_no_flipped_bit_of_the_configuration_changes_the_result(stored, tmp_path):
    folder = edited(stored, tmp_path, lambda c: None)
    expected = run(AutoModelForCausalLM.from_pretrained(stored), "llama")
    text = (folder / "config.json").read_text()
    own = json.dumps(json.loads(text)["quantization_config"])
    start = text.index(own)
    silent = []
    for place in range(start, start + len(own), max(1, len(own) // 120)):
        damaged = bytearray(text, "utf-8")
        damaged[place] ^= 1 << (place % 7)
        (folder / "config.json").write_bytes(damaged)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
        except Exception:  # of transformers, json or dybit: an error is what is asked for
            continue
        if not torch.equal(run(model, "llama"), expected):
            silent.append(text[place - 20 : place + 20])
    assert not silent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a thousand loads: biases, norms, and inputs rounded with static scales."""
    folder = tmp_path_factory.mktemp("small")
    config = {**TEXT, "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attention_bias=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = [torch.arange(16)[None]]
    dybit.quantize_(model, dybit.Recipe(weights=4, activations=8, group_size=16), calibration=ids)
    attach_(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_flipped_bits_and_cuts(small, tmp_path, name):
    folder = shutil.copytree(small, tmp_path / "m")
    ids = torch.arange(8)[None]

    def read():
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return {**model.state_dict(), "logits": model(ids).logits}

    # Of the configuration much is refused by transformers itself, in its own words; the rest warns, here an error.
    errors = dybit.DyBitError if name == "model.safetensors" else Exception
    count = 240
    changes = header_flips if name == "model.safetensors" else flips
    assert damaged(folder / name, lambda data: changes(data, count), read, errors) > 0.9 * count
    assert damaged(folder / name, lambda data: cuts(data, 20), read, errors) >= 20


def test_an_edited_configuration_is_said(stored, tmp_path):
    folder = edited(stored, tmp_path, lambda c: None)
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("architectures", ["LlamaModel"]), ("dtype", "bfloat16"), ("transformers_version", "5.0.0")):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.warns(dybit.DyBitWarning, match="config.json is not what was saved: it was edited, or is damaged"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_what_is_loaded_otherwise_than_saved_is_not_checked(stored, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(stored, dtype=torch.float16)
    assert model.model.norm.weight.dtype == torch.float16
    model.save_pretrained(tmp_path / "half")
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    model = transformers.LlamaForCausalLM.from_pretrained(stored)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # trained on, say
    model.save_pretrained(tmp_path / "other")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "other")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    model.model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(base.norm.weight, model.model.norm.weight)


def test_what_is_left_is_said_and_refused_by_strict(tmp_path):
    """Parameters of XLNet's own code."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(dybit.DyBitError, match=r"strict=True, but .* 'transformer.layer.0.rel_attn'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dybit.DyBitConfig(weights=4, strict=True))
    with pytest.warns(dybit.DyBitWarning, match=r"of the weights stay in floating point: XLNetRelativeAttention"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dybit.DyBitConfig(weights=4))
    config = dybit.DyBitConfig(weights=4, rules={"*.rel_attn": None}, strict=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "strict" not in loaded.config.quantization_config.to_dict()


def test_rules_that_match_nothing(llama):
    config = dybit.DyBitConfig(weights=4, rules={"lm_haed": None})
    with pytest.raises(dybit.DyBitError, match="rule 'lm_haed' matches no layer; did you mean 'lm_head'"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)


MAPPED = """
import re, sys, threading, time
import torch, dybit
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

ids = [torch.arange(48).view(2, 24)]
for folder in sys.argv[1:]:
    start = peak = anonymous()
    if folder == sys.argv[1]:
        threading.Thread(target=watch, daemon=True).start()
    model = AutoModelForCausalLM.from_pretrained(folder)
    dybit.quantize_(model, dybit.Recipe(weights=4, method="absmax"), ids, algorithm="rtn")
print(peak - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_stay_on_the_disk_while_they_are_calibrated(tmp_path):
    fields = {**TEXT, "hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 32}
    for name, layers in (("a", 1), ("b", 8)):
        config = transformers.LlamaConfig(**{**fields, "num_hidden_layers": layers})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    megabytes = (tmp_path / "b/model.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "a"), str(tmp_path / "b")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The codes, a layer at a time, and what allocators keep, which varies by some ten megabytes: half of the weights.
    assert megabytes > 80 and float(result.stdout) < megabytes / 2


LOAD = "m = AutoModelForCausalLM.from_pretrained({!r}); print(type(m.lm_head).__name__)"
ORDERS = {
    "dybit_first": "import dybit\nfrom transformers import AutoModelForCausalLM\n",
    "dybit_last": "from transformers import AutoModelForCausalLM\nimport dybit\n",
    "after_a_model": "from transformers import AutoModelForCausalLM, LlamaForCausalLM\nimport dybit\n",
    "forgotten": "from transformers import AutoModelForCausalLM\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(stored, order):
    script = ORDERS[order] + LOAD.format(str(stored))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if order == "forgotten":  # must not run on random weights
        assert result.returncode != 0 and "size" in result.stderr
    else:
        assert result.returncode == 0 and result.stdout.strip() == "QuantizedLinear", result.stderr


def test_a_headed_model_from_a_quantized_base(llama, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(llama, quantization_config=dybit.DyBitConfig(weights=4, group_size=32))
    base = AutoModel.from_pretrained(llama, quantization_config=dybit.DyBitConfig(weights=4, group_size=32))
    base.save_pretrained(tmp_path)
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert nothing_wrong(info)
    assert headed.lm_head._buffers["weight"] is headed.model.embed_tokens._buffers["weight"]
    assert torch.equal(run(headed, "llama"), run(whole, "llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_static_inputs_in_half_precision(tmp_path, dtype):
    model = build("llama").to(dtype)
    attach_(
        dybit.quantize_(model, dybit.Recipe(weights=4, activations=4, activation_mode="static"), [inputs("llama")])
    ).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = again.model.layers[0].mlp.down_proj
    assert layer.input_scale.dtype == torch.float32 and layer.weight.dtype == dtype
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(exact.model.layers[0].mlp.down_proj.input_scale, layer.input_scale)


@pytest.mark.parametrize("fields", [{"weights": 4}, {"weights": "nvfp4", "group_size": 16}], ids=["dybit", "nvfp4"])
def test_layers_that_a_model_keeps_in_float32(tmp_path, fields):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    cls, half = transformers.T5ForConditionalGeneration, torch.float16
    model = cls.from_pretrained(tmp_path / "m", dtype=half, quantization_config=dybit.DyBitConfig(**fields))
    model.save_pretrained(tmp_path / "q")
    again = cls.from_pretrained(tmp_path / "q", dtype=half)
    for name, layer in quantized_layers(again).items():
        assert layer.float_dtype == model.get_submodule(name).float_dtype
        assert layer.float_dtype == (torch.float32 if name.endswith(".wo") else half)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        outputs = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, again)]
    assert torch.equal(*outputs)


def test_devices_that_are_not_there_are_refused():
    quantizer = dybit.integrations.transformers.DyBitQuantizer(dybit.DyBitConfig(weights=4))
    for device in (100, "cuda:100", torch.device("cuda", 100)):
        with pytest.raises(dybit.DyBitError, match=r"device_map has the device '.*100', which this machine does not"):
            quantizer.validate_environment(device_map={"a": "cpu", "b": device})
    for devices in (None, "auto", {"": "cpu"}, {"": torch.device("cpu")}, {"a": "cpu", "b": "disk"}):
        quantizer.validate_environment(device_map=devices)


@pytest.mark.parametrize("group", [5, None, [], {}, {"modules": 5, "weights": None, "input": None}])
def test_malformed_groups_of_layers(stored, tmp_path, group):
    def change(config):
        config["layers"].append(group)
        del config["checksums"]["quantization_config"]

    with pytest.raises(dybit.CheckpointError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(edited(stored, tmp_path, change))
