"""Tests of `dybit quantize` and `dybit info`."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import good, invoke
from helpers import cuts, damaged, flips, header_flips
from safetensors.torch import save_file
from torch import nn

import dybit

MODULE = """
import time
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10)).eval()

def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()

class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Bilinear(4, 2, 8)

def half(): return Half().eval()
def images(): return [torch.randn(4, 3, 8, 8)]

def data(split="calibration"):
    torch.manual_seed(split == "evaluation")
    return (torch.randn(16, 24) for _ in range(3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.limited = nn.Embedding(4, 16, max_norm=1.0)
    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

def tied(): return Tied().eval()
def ids(): return [{"input_ids": torch.randint(20, (2, 6))} for _ in range(2)]
def number(): return 3
def empty(): return []
def one(): return torch.ones(3, 24)
def wrong(): return [torch.ones(3, 25)]
def raises(): raise RuntimeError("out of\\nluck")
def leaves(): raise SystemExit("bye")
def later():
    yield torch.ones(1, 24)
    raise KeyError("gone")
def nan():
    model = net()
    model[0].weight.data[1, 2] = float("nan")
    return model
def endless():
    yield torch.randn(4, 24)
    print("calibrating", flush=True)
    while True:
        time.sleep(0.1)
        yield torch.randn(4, 24)
constant = 5
"""


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "mine.py").write_text(MODULE)
    sys.modules.pop("mine", None)  # other tests have another module of that name
    (folder / "broken.py").write_text("import nowhere_at_all\n")
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)
    sys.modules.pop("mine", None)


def mine():
    import mine

    return mine


def test_a_module_becomes_a_checkpoint(tmp_path):
    out = tmp_path / "q"
    result = invoke("quantize", "mine:net", "-o", str(out), "--activations", "8", "--calibration", "mine:data")
    assert result.exit_code == 0, result.stderr
    assert f"next: dybit evaluate {out} --model mine:net --data mine:data\n" in result.stderr
    text = result.stdout
    assert re.search(r"0 +4 +dybit4spare +channel .* +\d\d\.\d +int8", text)
    assert "FP32 size 4.5 kB" in text
    loaded, batch = dybit.load(out, mine().net()), torch.randn(5, 24)
    original = dybit.quantize_(mine().net(), dybit.Recipe(activations=8), calibration=mine().data())
    assert torch.equal(loaded(batch), original(batch))


def test_sqnr_is_that_of_the_folded_weight(tmp_path):
    text = good("quantize", "mine:convolutions", "-o", str(tmp_path / "q"), "--weights", "8")
    values = [float(value) for value in re.findall(r"% +(\d\d\.\d) +fp32", text)]
    assert len(values) == 2 and all(46 < value < 54 for value in values)
    assert "1 folded batch norms" in good("info", str(tmp_path / "q"))


def test_tied_weights_count_once_and_warnings_are_notes(tmp_path):
    result = invoke("quantize", "mine:tied", "-o", str(tmp_path / "q"), "--calibration", "mine:ids")
    assert result.exit_code == 0, result.stderr
    assert "--model mine:tied --data module:function\n" in result.stderr  # mine:ids has one split
    assert re.search(r"head .* tied", result.stdout)
    assert "note: layer 'limited' keeps floating point" in result.stderr
    assert re.search(r"head .* tied", good("info", str(tmp_path / "q")))


def test_layers_fit_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = good("quantize", "mine:net", "-o", str(tmp_path / "q"), "--activations", "8", "--calibration", "mine:data")
    assert max(map(len, text.splitlines()[:3])) <= 80 and re.search(r"^0 +4 +s4\w* \d+% +\d\d", text, re.MULTILINE)
    assert "dybit4spare" in good("info", str(tmp_path / "q"))


def test_options_reach_the_recipe(tmp_path):
    options = "--weights 3 --group-size 8 --scale bf16 --variants plain --method absmax --embeddings none"
    good("quantize", "mine:net", "-o", str(tmp_path / "q"), *options.split())
    stored = json.loads((tmp_path / "q" / "dybit.json").read_text())["recipe"]
    assert stored == {"version": 1, "weights": 3, "group_size": 8, "scale": "bf16", "variants": "plain",
                      "method": "absmax", "embeddings": None}  # fmt: skip
    text = good("info", str(tmp_path / "q"))
    assert "group 8 bf16" in text and '"variants": "plain"' in text and "checksum correct" in text


def test_formats_bring_their_group_size(tmp_path):
    good("quantize", "mine:net", "-o", str(tmp_path / "q"), "--weights", "mxfp4")
    assert "group 32 pow2" in good("info", str(tmp_path / "q"))


def test_groups_need_their_size(tmp_path):
    result = invoke("quantize", "mine:net", "-o", str(tmp_path / "q"), "--granularity", "group")
    assert result.exit_code == 2 and result.stderr == "dybit: --granularity group needs --group-size\n"
    good("quantize", "mine:net", "-o", str(tmp_path / "q"), "--granularity", "group", "--weights", "mxfp4")


def test_a_recipe_from_a_file(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text('{"weights": 4, "rules": {"2": null}}')
    text = good("quantize", "mine:net", "-o", str(tmp_path / "q"), "--recipe", str(recipe))
    assert not re.search(r"^2 ", text, re.MULTILINE)


def test_arrays_as_calibration(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 24)))
    save_file({"x": torch.randn(20, 24)}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        good("quantize", "mine:net", "-o", str(tmp_path / "q"), "--activations", "8",
             "--calibration", str(tmp_path / name))  # fmt: skip


def test_a_plain_file_loads_into_its_architecture(tmp_path):
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(12, 16),
            "conv": nn.Conv1d(4, 6, 3),
            "attention": nn.MultiheadAttention(16, 2),
            "low": nn.Linear(16, 8).bfloat16(),
            "norm": nn.LayerNorm(16),
        }
    )
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    text = good("quantize", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "q"))
    assert "attention.in_proj_weight" in text and "norm" not in text
    assert re.search(r"embed_tokens +8 ", text)
    fresh = nn.ModuleDict({name: type(part)(*arguments) for name, part, arguments in (
        ("embed_tokens", model["embed_tokens"], (12, 16)), ("conv", model["conv"], (4, 6, 3)),
        ("attention", model["attention"], (16, 2)), ("low", model["low"], (16, 8)), ("norm", model["norm"], (16,)),
    )})  # fmt: skip
    fresh["low"].bfloat16()
    loaded = dybit.load(tmp_path / "q", fresh)
    assert loaded["low"].weight.dtype == torch.bfloat16
    for name, width in (("conv", 0.2), ("low", 0.2), ("embed_tokens", 0.02)):
        error = (loaded[name].weight.float() - model[name].weight.float()).norm() / model[name].weight.float().norm()
        assert 0 < error < width
    assert torch.equal(loaded["norm"].weight, model["norm"].weight)


def test_rules_apply_to_a_plain_file(tmp_path):
    save_file({"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    recipe = tmp_path / "r.json"
    recipe.write_text('{"weights": 4, "rules": {"a": null}}')
    good("quantize", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "q"), "--recipe", str(recipe))
    assert list(json.loads((tmp_path / "q" / "dybit.json").read_text())["layers"]) == ["b"]


def test_what_is_left_is_said_and_refused_by_strict(tmp_path):
    """By a model, by a file of its tensors, and by the checkpoint of either."""
    save_file({"layer.weight": torch.randn(8, 8), "other": torch.randn(4, 16)}, tmp_path / "m.safetensors")
    for source, reason in (
        ("mine:half", "not a supported kind"),
        (tmp_path / "m.safetensors", "not named as a weight"),
    ):
        words = (str(source), "-o", str(tmp_path / "q"))
        result = invoke("quantize", *words, "--strict")
        assert result.exit_code == 2 and "--strict, but 50 % of the weights would stay" in result.stderr
        assert not (tmp_path / "q").exists()
        line = "50 % of 128 weights are quantized; in floating point: "
        for text in (good("quantize", *words), good("info", str(tmp_path / "q"))):
            assert line in text and reason in text
        recipe = tmp_path / "r.json"
        recipe.write_text('{"weights": 4, "rules": {"other": null}}')
        assert "rule 'other'" in good("quantize", *words, "--strict", "--recipe", str(recipe))
        shutil.rmtree(tmp_path / "q")


BAD = [
    (("mine:net", "--weights", "9"), "--weights.*'9'"),
    (("mine:net", "--weights", "nf"), "--weights 'nf'"),
    (("mine:net", "--activations", "8", "--activation-mode", "static"), "--activations 8.*--calibration"),
    (("mine:net", "--scale", "fp8"), "scale.*'fp8'"),
    (("mine:net", "--recipe", "no.json"), "--recipe 'no.json' cannot be read"),
    (("mine:net", "--recipe", "bad.json"), "--recipe 'bad.json': the recipe is not valid JSON"),
    (("mine:net", "--recipe", "typo.json"), "--recipe 'typo.json'.*'wieghts'.*'weights'"),
    (("mine:net", "--recipe", "rule.json"), "rule 'x' matches no layer"),
    (("mine:net", "--recipe", "rule.json", "--weights", "4"), "--weights and --recipe 'rule.json'"),
    (("nowhere:net",), "MODEL 'nowhere:net' cannot be imported: No module named 'nowhere'"),
    (("broken:net",), "MODEL 'broken:net' cannot be imported: No module named 'nowhere_at_all'"),
    (("mine:nothing",), "module 'mine' has no function 'nothing'"),
    (("mine:number",), "'mine:number' must return a torch.nn.Module, not int"),
    (("mine:constant",), "'mine:constant' must return a torch.nn.Module, not int"),
    (("mine:raises",), "MODEL 'mine:raises' raised RuntimeError: out of$"),
    (("mine:leaves",), "MODEL 'mine:leaves' raised SystemExit: bye"),
    (("mine:nan",), "layer '0'.*nan.*\\(1, 2\\)"),
    (("nodir",), "MODEL must be.*'nodir' does not exist"),
    (("no.safetensors",), "MODEL 'no.safetensors' does not exist"),
    (("flat.safetensors",), "'flat.safetensors' has no floating-point tensor"),
    (("nan.safetensors",), "tensor 'a.weight'.*nan"),
    (("ok.safetensors", "--activations", "8"), "--activations 8.*'ok.safetensors'"),
    (("ok.safetensors", "--calibration", "mine:data"), "--calibration 'mine:data'"),
    (("ok.safetensors", "--recipe", "rule.json"), "rule 'x' matches no layer"),
    (("mine:net", "--calibration", "mine:empty"), "--calibration 'mine:empty' yields no batch"),
    (("mine:net", "--calibration", "mine:one"), "must return an iterable of batches, not a Tensor"),
    (("mine:net", "--calibration", "mine:wrong"), "calibration batch 0.*\\(3, 25\\).*does not fit"),
    (("mine:net", "--calibration", "mine:later"), "--calibration 'mine:later' raised KeyError: 'gone'"),
    (("mine:net", "--calibration", "no.npy"), "--calibration must be.*'no.npy' does not exist"),
    (("mine:net", "--calibration", "bad.npy"), "--calibration 'bad.npy' cannot be read"),
    (("mine:net", "--calibration", "some.txt"), "MODEL 'mine:net' has no tokenizer; give --tokenizer"),
]


@pytest.fixture(scope="module")
def bad_files(place):
    (place / "bad.json").write_text("{")
    (place / "typo.json").write_text('{"wieghts": 4}')
    (place / "rule.json").write_text('{"rules": {"x": null}}')
    (place / "bad.npy").write_text("no array")
    (place / "some.txt").write_text("words")
    save_file({"a.weight": torch.ones(3), "b": torch.ones(3, 3)}, place / "flat.safetensors")
    save_file({"a.weight": torch.tensor([[0.0, float("nan")]])}, place / "nan.safetensors")
    save_file({"a.weight": torch.randn(4, 4)}, place / "ok.safetensors")


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_bad_input(bad_files, tmp_path, words, message):
    result = invoke("quantize", *words, "-o", str(tmp_path / "q"))
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert re.search(message, last), last
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_targets(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("dear")
    for name in ("file", "folder", "file/below"):
        result = invoke("quantize", "mine:net", "-o", str(tmp_path / name))
        assert result.exit_code == 2 and "--output: path" in result.stderr
    assert (tmp_path / "folder" / "letter").read_text() == "dear"


def test_control_c_leaves_nothing(place, tmp_path):
    words = ("mine:net", "-o", str(tmp_path / "q"), "--activations", "8", "--calibration", "mine:endless")
    command = [sys.executable, "-m", "dybit", "quantize", *words]
    # Whoever runs the tests in the background may ignore the signal, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=place, preexec_fn=heed, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "calibrating\n"  # and will not end by itself
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "dybit: interrupted; nothing half-written was left behind"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [(), ("--activations", "8", "--activation-mode", "dynamic")], ids=["weights", "inputs"]
)
@pytest.mark.parametrize("shards", ["5GB", "8KB"])
def test_files_of_a_transformers_directory(tmp_path, shards, words):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").write_text("not to be copied")
    file = tmp_path / "m" / f"model.safetensors{'.index.json' if shards == '8KB' else ''}"
    shown = good("quantize", str(file), "-o", str(tmp_path / "q"), "--group-size", "16", *words)
    assert "model.layers.0.mlp.up_proj" in shown
    names = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "dybit.json"}
    assert {path.name for path in (tmp_path / "q").iterdir()} == names
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    fields = {"activations": 8, "activation_mode": "dynamic"} if words else {}
    dybit.quantize_(model, dybit.Recipe(weights=4, group_size=16, **fields))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        own = dybit.load(tmp_path / "q", transformers.LlamaForCausalLM(config))
        assert torch.equal(own(ids).logits, expected)
    assert own.lm_head._buffers["weight"] is own.model.embed_tokens._buffers["weight"]


def test_deep_json(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    save_file({"0.weight": torch.ones(8, 8)}, tmp_path / "m" / "model.safetensors")
    deep = "[" * 100_000
    for name in ("model.safetensors.index.json", "config.json", "r.json"):
        (tmp_path / "m" / name).write_text(deep)
    folder, out = str(tmp_path / "m"), ("-o", str(tmp_path / "q"))
    cases = {
        "model.safetensors.index.json": (f"{folder}/model.safetensors.index.json",),
        "r.json": ("mine:net", "--recipe", f"{folder}/r.json"),
        "m": (folder,),
        "config.json": (f"{folder}/model.safetensors",),
    }
    for name, words in cases.items():
        result = invoke("quantize", *words, *out)
        assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("dybit: "), result.stderr
        assert name in result.stderr and ("deeper" in result.stderr or "recursion" in result.stderr)
    assert not (tmp_path / "q").exists()


def test_flipped_bits_of_a_streamed_directory(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "m")
    folder = tmp_path / "q"
    good("quantize", str(tmp_path / "m" / "model.safetensors"), "-o", str(folder), "--group-size", "16")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["checksums"]
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["checksums"]
    own = {"quantization_config", "config.json"}  # of other texts
    assert {k: v for k, v in stored.items() if k not in own} == {k: v for k, v in again.items() if k not in own}
    assert set(stored) == set(again) and len(stored) == len(model.state_dict()) + 2

    def read():
        return transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()

    def load():
        return dybit.load(folder, transformers.LlamaForCausalLM(config)).state_dict()

    assert damaged(folder / "model.safetensors", lambda data: header_flips(data, 240), read) > 200
    assert damaged(folder / "model.safetensors", lambda data: cuts(data, 20), read) >= 20
    assert damaged(folder / "config.json", lambda data: flips(data, 120), read, Exception) > 105
    assert damaged(folder / "model.safetensors", lambda data: header_flips(data, 100), load) == 100
    assert damaged(folder / "dybit.json", lambda data: flips(data, 100), load) > 50


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "GptOss"])
def test_experts_in_files(tmp_path, name, shards):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2, **{"num_experts" if name == "Qwen2Moe" else "num_local_experts": 12},
    )  # fmt: skip
    build = getattr(transformers, f"{name}ForCausalLM")
    model = build(config).eval()
    model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    recipe = tmp_path / "r.json"
    recipe.write_text('{"weights": 4, "group_size": 16, "rules": {"*.layers.1.mlp.experts": {"weights": 3}}}')
    file = tmp_path / "m" / f"model.safetensors{'.index.json' if shards == '30KB' else ''}"
    shown = good("quantize", str(file), "-o", str(tmp_path / "q"), "--recipe", str(recipe))
    assert "model.layers.0.mlp.experts.gate_up_proj" in shown and ".w1" not in shown
    known = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["checksums"]
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.norm.weight"} < set(known)
    assert {**model.state_dict(), "quantization_config": None, "config.json": None}.keys() == known.keys()
    dybit.quantize_(model, dybit.Recipe.from_json(recipe.read_text()))
    ids = torch.arange(8)[None]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own = dybit.load(tmp_path / "q", build(config))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected) and torch.equal(own(ids).logits, expected)


def test_experts_in_files_that_are_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m")
    file, recipe = str(tmp_path / "m" / "model.safetensors"), tmp_path / "r.json"
    recipe.write_text('{"rules": {"*.layers.1.mlp.experts": null}}')
    good("quantize", file, "-o", str(tmp_path / "q"), "--recipe", str(recipe))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    first, second = (layer.mlp.experts for layer in loaded.model.layers)
    assert first.weight_specs["down_proj"].bits == 4
    assert torch.equal(second.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj)
    result = invoke("quantize", file, "-o", str(tmp_path / "r"), "--granularity", "tensor")
    assert result.exit_code == 2 and "is stored in 6 parts" in result.stderr and not (tmp_path / "r").exists()


def test_directories_of_transformers_that_do_not_fit(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    save_file({"model.norm.weight": torch.ones(4), "x.weight": torch.ones(4, 4)}, tmp_path / "m" / "m.safetensors")
    for config, message in (
        ("{", "cannot be built by transformers"),
        ('{"model_type": "nothing"}', "cannot be built by transformers"),
        ('{"model_type": "llama", "architectures": ["NoSuchModel"]}', "cannot be built by transformers.*NoSuchModel"),
        ('{"model_type": "bert", "quantization_config": {"quant_method": "dybit"}}', "is already quantized"),
    ):
        (tmp_path / "m" / "config.json").write_text(config)
        result = invoke("quantize", str(tmp_path / "m" / "m.safetensors"), "-o", str(tmp_path / "q"))
        assert result.exit_code == 2 and re.search(message, result.stderr.splitlines()[-1]), result.stderr
    assert not (tmp_path / "q").exists()


def test_pickles_are_refused(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
        result = invoke("quantize", str(tmp_path / name), "-o", str(tmp_path / "q"))
        assert result.exit_code == 2 and "may be a pickle" in result.stderr and result.stderr.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_transformers_directory_with_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    words = {word: index for index, word in enumerate(["[UNK]", "one", "two", "three"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("one two three two " * 15)
    model, text = str(tmp_path / "m"), str(tmp_path / "t.txt")
    good("quantize", model, "-o", str(tmp_path / "q"), "--activations", "8", "--calibration", text)
    shown = good("evaluate", str(tmp_path / "q"), "--model", model, "--text", text)
    assert "PPL" in shown and "top-1" in shown
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    result = invoke("quantize", model, "-o", str(tmp_path / "q2"))
    assert result.exit_code == 2 and "NoSuchModel" in result.stderr.splitlines()[-1]


def test_algorithms_and_their_directory(place, tmp_path):
    words = ["quantize", "mine:net", "--calibration", "mine:data", "--weights", "3", "--algorithm", "gptq"]
    kept = tmp_path / "kept"
    for name in ("one", "two"):
        result = invoke(*words, "-o", str(tmp_path / name), "--workdir", str(kept))
        assert result.exit_code == 0, result.stderr
        assert len(list(kept.glob("*.safetensors"))) == 2
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    result = invoke(*words[:-2], "-o", str(tmp_path / "rtn"))
    assert result.exit_code == 0 and (tmp_path / "rtn" / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine:net", "--algorithm", "gptq"), "--algorithm 'gptq': algorithm 'gptq' needs calibration"),
        (("mine:net", "--algorithm", "obq"), "--algorithm 'obq': algorithm 'obq' is unknown"),
        (("mine:net", "--workdir", "w"), "--workdir w is for algorithm 'gptq', not for rtn"),
    ],
)
def test_bad_algorithms(place, tmp_path, words, message):
    result = invoke("quantize", *words, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()
