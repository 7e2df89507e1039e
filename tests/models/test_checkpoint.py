"""Checkpoints: bit for bit in a new process, atomic, the size the widths say, and a sentence for every damage."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import LAYERS, Tied, build, cuts, damaged, flips, inputs
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dybit.layers.description
import dybit.models.checkpoint
import dybit.models.manifest
from dybit.errors import CheckpointError, DyBitError
from dybit.layers.quantized import quantized_layers
from dybit.models.checkpoint import TENSORS, load, read_tensors, save
from dybit.models.manifest import MANIFEST, read_manifest
from dybit.models.preparation import dequantize_, folded_pairs
from dybit.ptq.quantize import quantize_
from dybit.recipe import Recipe

OPTIONS = [
    {"granularity": "channel"},
    {"granularity": "tensor", "scale": "pow2"},
    {"group_size": 5, "scale": "bf16"},
    {"group_size": 8, "scale": "e4m3", "variant_granularity": "tensor", "variants": "all"},
    {"activations": 8},
    {"activations": 5, "activation_mode": "dynamic", "activation_group_size": 3},
]
# Every layer type with every width, the options taking turns; and every option at every width for two of them.
CASES = {
    f"{name}-w{bits}-{index}": (name, Recipe(weights=bits, embeddings=bits, **OPTIONS[index]))
    for number, name in enumerate(LAYERS)
    for bits in range(2, 9)
    for index in ((number + bits) % len(OPTIONS), *(range(len(OPTIONS)) if name in ("linear", "transposed2d") else ()))
}

LOADER = """
import sys, json
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[4]))
import dybit
from helpers import build, inputs
from pathlib import Path
outputs = {}
for path in sorted(Path(sys.argv[2]).iterdir()):
    name = path.name.split("-")[0]
    model = dybit.load(path, build(name, seed=9))
    with torch.no_grad():
        outputs[path.name] = model(*inputs(name)).contiguous()
import safetensors.torch
safetensors.torch.save_file(outputs, sys.argv[3])
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Outputs before saving and after loading in a new process, by case."""
    folder = tmp_path_factory.mktemp("checkpoints with a space")
    expected = {}
    for case, (name, recipe) in CASES.items():
        model = build(name)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            quantize_(model, recipe, [inputs(name, 5)])
            expected[case] = model(*inputs(name))
        save(model, folder / "all" / case)
    arguments = [
        str(Path(__file__).parents[1] / "support"),
        str(folder / "all"),
        str(folder / "outputs"),
        str(torch.get_num_threads()),
    ]
    subprocess.run([sys.executable, "-c", LOADER, *arguments], check=True)
    return expected, safetensors.torch.load_file(folder / "outputs")


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_computes_the_same(reloaded, case):
    expected, found = reloaded
    assert torch.equal(found[case], expected[case])


def folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def mlp(hidden=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()


STORED = Recipe(weights=4, activations="dybit8plain", activation_mode="static", group_size=6, scale="fp32")


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an MLP and the model that it was made from."""
    model = quantize_(mlp(), STORED, [torch.randn(9, 8)])
    return save(model, tmp_path / "out"), model


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def snapshot(model):
    return {key: (value.clone(), type(value)) for key, value in model.state_dict().items()}, [
        type(m) for m in model.modules()
    ]


def assert_unchanged(model, before):
    state, types = before
    assert [type(m) for m in model.modules()] == types
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[key][0]) for key, value in model.state_dict().items())


# What comes back


@torch.no_grad()
def test_folded_batch_norms(tmp_path):
    model, x = folded(), torch.randn(2, 3, 4, 4)
    quantize_(model, Recipe(weights=4, activations=8), [x])
    fresh = folded()
    nn.init.zeros_(fresh[1].weight)
    fresh.train()
    loaded = load(save(model, tmp_path / "a"), fresh)
    assert loaded is fresh and not loaded.training
    assert torch.equal(loaded(x), model(x))
    assert folded_pairs(loaded) == [("0", "1")]
    # And again: what was loaded can be saved.
    again = load(save(loaded, tmp_path / "b"), folded())
    assert torch.equal(again(x), model(x))
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


@torch.no_grad()
def test_after_a_failure_or_dequantization_the_pairs_are_still_known(tmp_path):
    model, x = folded(), torch.randn(2, 3, 4, 4)
    with pytest.raises(DyBitError):
        quantize_(model, Recipe(activations=8), [])
    quantize_(model, Recipe(weights=8))
    dequantize_(model)
    quantize_(model, Recipe(weights=4))
    assert torch.equal(load(save(model, tmp_path / "a"), folded())(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(rules={"embedding": None}), Recipe(activations=8)], ids=["w", "kept", "a"]
)
def test_tied_weights(tmp_path, recipe):
    model, tokens = Tied().eval(), torch.randint(0, 11, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, recipe, [tokens])
    path = save(model, tmp_path / "a")
    loaded = load(path, Tied())
    assert torch.equal(loaded(tokens), model(tokens))
    for table in ("_buffers", "_parameters"):
        if "weight" in getattr(loaded.head, table):
            assert getattr(loaded.head, table)["weight"] is getattr(loaded.embedding, table)["weight"]
    stored = safetensors.torch.load_file(path / TENSORS)
    assert ("head.weight" in stored) != ("embedding.weight" in stored)


@torch.no_grad()
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_normed_weights(tmp_path, norm):
    def make():
        return nn.Sequential(norm(nn.Linear(8, 8)), norm(nn.Linear(8, 8))).eval()

    model, x = make(), torch.randn(3, 8)
    quantize_(model, Recipe(rules={"1": None}))
    fresh = make()
    assert torch.equal(load(save(model, tmp_path / "a"), fresh)(x), model(x))
    assert type(make()[0]) is not type(fresh[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(tmp_path, dtype):
    def make():
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(3, 2, 3)).eval()

    model, x = make().to(dtype), torch.randn(3, 8).to(dtype)
    quantize_(model, Recipe(activations=8), [x])
    loaded = load(save(model, tmp_path / "a"), make())
    assert torch.equal(loaded(x), model(x)) and loaded(x).dtype == dtype
    assert all(layer.float_dtype == dtype for layer in quantized_layers(loaded).values())


@torch.no_grad()
def test_one_layer_shared_modules_and_buffers(tmp_path):
    linear = quantize_(nn.Linear(4, 3), Recipe())
    x = torch.randn(2, 4)
    assert torch.equal(load(save(linear, tmp_path / "a"), nn.Linear(4, 3))(x), linear(x))

    def make():
        part = nn.Linear(4, 4)
        model = nn.Sequential(part, nn.BatchNorm1d(4), part)
        model.register_buffer("steps", torch.tensor(3))
        model.register_buffer("empty", torch.zeros(0))
        model.register_buffer("view", torch.arange(8.0)[2:5])
        model.register_buffer("strided", torch.randn(3, 4).t())
        return model.eval()

    model = quantize_(make(), Recipe())
    loaded = load(save(model, tmp_path / "b"), make())
    assert torch.equal(loaded(x), model(x)) and loaded[0] is loaded[2]
    assert torch.equal(loaded.strided, model.strided) and loaded.steps == 3


def test_recipe_is_stored(saved, tmp_path):
    path, model = saved
    manifest = read_manifest(path)
    assert manifest.recipe == STORED
    assert manifest.version == dybit.models.manifest._version()
    assert set(manifest.layers) == {"0", "2"}
    assert set(read_tensors(path, manifest)) == set(model.state_dict())
    other = Recipe(weights=3)
    assert read_manifest(save(model, tmp_path / "b", recipe=other)).recipe == other


def test_no_pickle(saved):
    path, _ = saved
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, TENSORS]
    source = Path(dybit.models.checkpoint.__file__).read_text().replace("safetensors.torch", "")
    assert not any(word in source for word in ("import pickle", "torch.save", "torch.load", 'eval("', "exec("))


@pytest.mark.parametrize(("bits", "size"), [(2, None), (3, 128), (4, 64), (5, None), (8, 128)])
def test_size_on_disk_is_what_the_widths_say(tmp_path, bits, size):
    widths = (256, 1024, 256, 1024, 256)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    recipe = Recipe(weights=bits, group_size=size, scale="bf16", method="absmax", variant_granularity="channel")
    path = save(quantize_(model, recipe), tmp_path / "a")
    said = 0
    for a, b in itertools.pairwise(widths):
        length = size or a
        scales = 16 * b * math.ceil(a / length)
        choices = b * math.ceil(math.log2(len(recipe.weight_family.books)))
        said += (a * b * bits + scales + choices + 32 * b) / 8
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    assert said <= on_disk <= 1.02 * said


# Where it is written


def test_paths(saved, tmp_path, monkeypatch):
    _, model = saved
    deep = tmp_path / "a b" / "ü" / "c"
    assert save(model, str(deep)) == deep and (deep / MANIFEST).exists()
    assert (deep.stat().st_mode & 0o777) == 0o755
    assert {file.stat().st_mode & 0o777 for file in deep.iterdir()} == {0o644}
    monkeypatch.chdir(tmp_path)
    assert save(model, "relative/") == Path("relative")
    load("relative", mlp())
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert names(tmp_path) == ["a b", "empty", "out", "relative"]


def test_a_checkpoint_is_replaced(saved, tmp_path):
    path, _ = saved
    (path / "left over").write_text("x")
    other = quantize_(mlp(seed=5), Recipe(weights=3))
    assert save(other, path) == path
    assert names(path) == [MANIFEST, "left over", TENSORS]  # which may be somebody's
    x = torch.randn(2, 8)
    assert torch.equal(load(path, mlp())(x), other(x))
    assert names(tmp_path) == ["out"]


def test_a_loaded_model_survives_the_replacement(saved):
    path, model = saved
    loaded, x = load(path, mlp()), torch.randn(2, 8)
    expected = model(x)
    save(quantize_(mlp(seed=5), Recipe(weights=3)), path)
    assert torch.equal(loaded(x), expected)
    save(loaded, path)
    assert torch.equal(load(path, mlp())(x), expected)


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_is_no_checkpoint_is_kept(saved, tmp_path, what):
    _, model = saved
    path = tmp_path / "mine"
    if what == "directory":
        path.mkdir()
        (path / "thesis.txt").write_text("x")
    else:
        path.write_text("x")
    with pytest.raises(DyBitError, match=r"mine' exists and is not a dybit checkpoint; nothing was written"):
        save(model, path)
    assert (path / "thesis.txt" if what == "directory" else path).read_text() == "x"
    assert names(tmp_path) == ["mine", "out"]


@pytest.mark.parametrize("where", ["file/below", "/proc/nothing/here", "/dev/null/x", "x" * 300])
def test_places_that_cannot_be_written(saved, tmp_path, where):
    _, model = saved
    (tmp_path / "file").write_text("x")
    with pytest.raises(DyBitError, match="cannot be written: ") as error:
        save(model, tmp_path / where)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("No space left"), KeyboardInterrupt(), MemoryError()],
)
@pytest.mark.parametrize("step", ["tensors", "manifest", "rename", "second rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_in_the_middle_leaves_nothing(saved, tmp_path, monkeypatch, failure, step, existing):
    path, model = saved
    content = {file.name: file.read_bytes() for file in path.iterdir()}
    target = path if existing else tmp_path / "new"
    if isinstance(failure, SafetensorError) and step != "tensors":
        return

    def fail(*_, **__):
        raise failure

    if step == "tensors":

        def partial(_, file, **__):
            Path(file).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(safetensors.torch, "save_file", partial)
    elif step == "manifest":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        rename, calls = Path.rename, []

        def counted(self, to):
            calls.append(to)
            if len(calls) == 1 + (step == "second rename" and existing):
                raise failure
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", counted)
    expected = DyBitError if isinstance(failure, OSError | SafetensorError) else type(failure)
    with pytest.raises(expected, match="No space" if expected is DyBitError else None):
        save(model, target)
    monkeypatch.undo()
    assert names(tmp_path) == ["out"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == content


def test_only_quantized_models_are_saved(tmp_path):
    with pytest.raises(DyBitError, match="model has no quantized layer; call quantize_ first"):
        save(mlp(), tmp_path / "a")
    assert names(tmp_path) == []

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(DyBitError, match="model has the extra state '_extra_state', which is not a tensor"):
        save(quantize_(Extra(4, 4), Recipe()), tmp_path / "a")
    assert names(tmp_path) == []


# Damage


def rejected(path, model, message):
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert_unchanged(model, before)


def edit(path, change):
    """Changes the manifest in place."""
    data = json.loads((path / MANIFEST).read_text())
    change(data)
    data["manifest_sha256"] = dybit.models.manifest._digest(data)
    (path / MANIFEST).write_text(json.dumps(data))


def test_missing(tmp_path, saved):
    path, _ = saved
    rejected(tmp_path / "nowhere", mlp(), r"nowhere is not a dybit checkpoint: cannot read dybit\.json \(No such file")
    (path / TENSORS).unlink()
    rejected(path, mlp(), r"cannot read .*model\.safetensors \(No such file")
    (path / TENSORS).mkdir()
    rejected(path, mlp(), r"model\.safetensors' is a directory, not a file")
    rejected(path / MANIFEST, mlp(), "is not a dybit checkpoint")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated(saved, share):
    path, _ = saved
    for name, message in ((TENSORS, "is damaged: its SHA-256"), (MANIFEST, "is not valid JSON")):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(share * len(content))])
        rejected(path, mlp(), message)
        (path / name).write_bytes(content)
    load(path, mlp())


def test_flipped_bits_of_the_tensors(saved):
    path, _ = saved
    content = (path / TENSORS).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 40)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (path / TENSORS).write_bytes(damaged)
        rejected(path, mlp(), "is damaged: its SHA-256 is not the one")


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_a_thousand_flipped_bits_and_a_hundred_cuts(saved, name):
    path, _ = saved

    def read():
        return load(path, mlp(seed=1)).state_dict()

    assert damaged(path / name, cuts, read, CheckpointError) > 98
    assert damaged(path / name, flips, read, CheckpointError) > (999 if name == TENSORS else 500)


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_pipes(saved, name):
    path, _ = saved
    (path / name).unlink()
    os.mkfifo(path / name)
    rejected(path, mlp(), f"{name}' is a pipe, not a file")


def test_no_flipped_bit_of_the_manifest_changes_the_result(saved):
    path, model = saved
    content, x = (path / MANIFEST).read_bytes(), torch.randn(3, 8)
    expected, silent = model(x), []
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    for position in [*range(0, len(content), 3), *digits]:
        damaged = bytearray(content)
        damaged[position] ^= 1 if position in digits else 1 << (position % 7)
        (path / MANIFEST).write_bytes(damaged)
        try:
            loaded = load(path, mlp())
        except CheckpointError:
            continue
        if not torch.equal(loaded(x), expected):
            silent.append(content[position - 10 : position + 10])
    assert not silent


def test_foreign(tmp_path):
    (tmp_path / MANIFEST).write_text('{"model_type": "bert"}')
    rejected(tmp_path, mlp(), "was not written by dybit")
    for text in ("[]", "null", "3", '"dybit"'):
        (tmp_path / MANIFEST).write_text(text)
        rejected(tmp_path, mlp(), "was not written by dybit")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    rejected(tmp_path, mlp(), "is not valid JSON")
    for text in ("[" * 100_000, '{"format": "dybit", "layers": ' + "[" * 500 + "]" * 500 + "}"):
        (tmp_path / MANIFEST).write_text(text)
        rejected(tmp_path, mlp(), "dybit.json is not valid JSON: it nests deeper than 100")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions(saved, version):
    path, _ = saved
    edit(path, lambda data: data.update(version=version))
    rejected(path, mlp(), f"has format version {version!r}, this dybit reads 1")


def test_two_bits_of_a_dybit_without_the_spare_level(tmp_path):
    """tests/data/dybit2_of_two was written when ``dybit2`` had two variants: its choices have one bit each."""
    old = Path(__file__).parents[1] / "data" / "dybit2_of_two"
    expected = safetensors.torch.load_file(old / "weights.safetensors")
    assert "members" not in (old / "checkpoint" / MANIFEST).read_text()

    def fresh():
        return nn.Sequential(nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 20))

    model = load(old / "checkpoint", fresh())
    x, plain = torch.randn(7, 12), fresh()
    plain.load_state_dict({f"{name}.weight": value for name, value in expected.items()} | {"2.bias": model[2].bias})
    for name, layer in quantized_layers(model).items():
        assert set(layer.quantized_tensor("weight").choices().flatten().tolist()) == {0, 1}
        assert torch.equal(layer.weight, expected[name])
    torch.testing.assert_close(model(x), plain(x))
    save(model, tmp_path / "again")  # as it was, so that the dybit that wrote it reads it
    layers = [json.loads((path / MANIFEST).read_text())["layers"] for path in (old / "checkpoint", tmp_path / "again")]
    assert layers[0] == layers[1]
    # Three variants say so, in a field that the older dybit refuses.
    new = quantize_(fresh(), Recipe(weights="dybit2"))
    entry = json.loads((save(new, tmp_path / "new") / MANIFEST).read_text())["layers"]["0"]["weights"]["weight"]
    assert entry["members"] == 3
    assert torch.equal(load(tmp_path / "new", fresh())(x), new(x))


def architectures():
    yield "missing layer", nn.Sequential(nn.Linear(8, 16)), "it has no layer '2'"
    yield "other width", mlp(17), r"0\.weight has shape \(17, 8\), the checkpoint \(16, 8\)"
    yield "other type", nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(16, 4)), "'0' was Linear and is LayerNorm"
    yield (
        "attention",
        nn.Sequential(nn.MultiheadAttention(8, 2), nn.ReLU(), nn.Linear(16, 4)),
        "'0' was Linear and is Multi",
    )
    model = mlp()
    model[2] = nn.Linear(16, 4, bias=False)
    yield "less", model, r"it has '2\.bias', which the model lacks"
    model = mlp()
    model.add_module("3", nn.LayerNorm(4))
    yield "more", model, r"it lacks '3\.weight' and 1 more differ"
    model = mlp()
    model[0].bias = nn.Parameter(torch.zeros(7))
    yield "bias", model, r"'0\.bias' is torch\.float32 of shape \(16,\), expected torch\.float32 of shape \(7,\)"
    model = mlp()
    model[0].bias = nn.Parameter(torch.zeros(16, dtype=torch.long), requires_grad=False)
    yield "integers", model, r"'0\.bias' is torch\.float32 of shape \(16,\), expected torch\.int64"
    yield "root", nn.Linear(8, 16), "it has no layer '0'"


@pytest.mark.parametrize(
    ("model", "message"), [case[1:] for case in architectures()], ids=[case[0] for case in architectures()]
)
def test_wrong_architecture(saved, model, message):
    rejected(saved[0], model, f"does not fit the model: .*{message}")


def test_bad_models(saved):
    path, model = saved
    for bad in (model, None, "model", nn.Linear):
        with pytest.raises(DyBitError, match="model must be a floating-point torch"):
            load(path, bad)


def setter(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


HOSTILE = {
    "no layers": lambda data: data.pop("layers"),
    "no checksum": lambda data: data.pop("sha256"),
    "layers list": setter("layers", value=[]),
    "layers null": setter("layers", value=None),
    "layers empty": setter("layers", value={}),
    "entry null": setter("layers", "0", value=None),
    "entry list": setter("layers", "0", value=[]),
    "dtype": setter("layers", "0", "dtype", value="int8"),
    "dtype list": setter("layers", "0", "dtype", value=["float32"]),
    "weights list": setter("layers", "0", "weights", value=[]),
    "weights empty": setter("layers", "0", "weights", value={}),
    "weights name": lambda data: data["layers"]["0"]["weights"].update(
        bias=data["layers"]["0"]["weights"].pop("weight")
    ),
    "family": setter("layers", "0", "weights", "weight", "family", value="../../etc/passwd"),
    "other family": setter("layers", "0", "weights", "weight", "family", value="s8"),
    "family of one": setter("layers", "0", "weights", "weight", "family", value="s4"),
    "shape": setter("layers", "0", "weights", "weight", "shape", value=[1 << 40, 1 << 40]),
    "other shape": setter("layers", "0", "weights", "weight", "shape", value=[8, 16]),
    "negative": setter("layers", "0", "weights", "weight", "shape", value=[-16, -8]),
    "group": setter("layers", "0", "weights", "weight", "group_size", value=1e9),
    "other group": setter("layers", "0", "weights", "weight", "group_size", value=7),
    "huge group": setter("layers", "0", "weights", "weight", "group_size", value=1 << 62),
    "scale": setter("layers", "0", "weights", "weight", "scale", value="bf16"),
    "granularity": setter("layers", "0", "weights", "weight", "granularity", value="tensor"),
    "transposed": setter("layers", "0", "weights", "weight", "transposed", value=16),
    "transposed huge": setter("layers", "0", "weights", "weight", "transposed", value=1 << 70),
    "input": setter("layers", "0", "input", value={}),
    "input format": setter("layers", "0", "input", "format", value="dybit8"),
    "input mode": setter("layers", "0", "input", "mode", value="dynamic"),
    "input none": setter("layers", "0", "input", value=None),
    "input offset": lambda data: data["layers"]["0"]["input"].update(offset=not data["layers"]["0"]["input"]["offset"]),
    "unknown layer": lambda data: data["layers"].update(ghost=data["layers"]["0"]),
    "root layer": lambda data: data["layers"].update({"": data["layers"]["0"]}),
    "dunder": lambda data: data["layers"].update({"0.__class__": data["layers"]["0"]}),
    "folded": setter("folded", value=[["0", "2"]]),
    "folded root": setter("folded", value=[["", ""]]),
    "folded ghost": setter("folded", value=[["a", "b"]]),
    "folded short": setter("folded", value=[["0"]]),
    "folded null": setter("folded", value=None),
    "shared": setter("shared", value={"0.bias": "2.bias"}),
    "shared ghost": setter("shared", value={"0.bias": "ghost"}),
    "shared new": setter("shared", value={"ghost.x": "0.bias"}),
    "shared list": setter("shared", value=[1]),
    "recipe": setter("recipe", value={"weights": 99}),
    "recipe text": setter("recipe", value="w4"),
    "checksum": setter("sha256", value="0" * 64),
    "checksum none": setter("sha256", value=None),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_manifests(saved, change):
    path, _ = saved
    edit(path, change)
    rejected(path, mlp(), "fit the model|bad entry|missing or bad field|is damaged")


def test_edited_manifests(saved):
    path, _ = saved
    data = json.loads((path / MANIFEST).read_text())
    data["layers"]["2"]["weights"]["weight"]["family"] = "dybit4plain"
    (path / MANIFEST).write_text(json.dumps(data))
    rejected(path, mlp(), "dybit.json is damaged: its contents are not those that dybit wrote")


def test_tensors_of_another_kind(saved):
    path, _ = saved
    tensors = safetensors.torch.load_file(path / TENSORS)

    def store(changed):
        safetensors.torch.save_file(changed, path / TENSORS)
        edit(path, lambda data: data.update(sha256=dybit.models.manifest.checksum(path / TENSORS)))

    for key in tensors:
        store({k: v for k, v in tensors.items() if k != key})
        rejected(path, mlp(), f"it lacks '{key}'")
        store({**tensors, key: tensors[key][..., :0].clone()})
        rejected(path, mlp(), f"'{key}' is .*expected")
        if not key.endswith("bias"):
            store({**tensors, key: tensors[key].to(torch.float64)})
            rejected(path, mlp(), f"'{key}' is torch.float64 of shape .*expected")
    (path / TENSORS).write_bytes(b"not safetensors at all")
    edit(path, lambda data: data.update(sha256=dybit.models.manifest.checksum(path / TENSORS)))
    rejected(path, mlp(), r"model\.safetensors is not a safetensors file")


def test_codes_beyond_the_family_are_rejected_or_harmless(saved, tmp_path):
    # Choices that no family has index nothing outside of the table.
    model = quantize_(mlp(), Recipe(weights=4, variants="all"))
    path = save(model, tmp_path / "a")
    tensors = safetensors.torch.load_file(path / TENSORS)
    tensors["0.weight_choice"] = torch.full_like(tensors["0.weight_choice"], 255)
    safetensors.torch.save_file(tensors, path / TENSORS)
    edit(path, lambda data: data.update(sha256=dybit.models.manifest.checksum(path / TENSORS)))
    with pytest.raises((DyBitError, IndexError)):
        load(path, mlp())(torch.randn(1, 8))


def test_moved_and_read_only(saved, tmp_path):
    path, model = saved
    shutil.move(path, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").iterdir():
        file.chmod(0o444)
    x = torch.randn(2, 8)
    assert torch.equal(load(tmp_path / "elsewhere", mlp())(x), model(x))


# Loads that fail in the middle, and models that are hard to load into


def hooked(norm):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)), norm(nn.Linear(8, 8)), nn.BatchNorm1d(8))

    return make


def twice_pruned(module):
    prune.l1_unstructured(module, "weight", 0.3)
    prune.random_unstructured(module, "weight", 0.3)
    return prune.l1_unstructured(module, "bias", 0.3)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module)


NORMS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": twice_pruned,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_and_masks_that_hooks_make(tmp_path, norm, training):
    make = hooked(norm)
    model, x = make().eval(), torch.randn(3, 8)
    model(x)
    quantize_(model, Recipe(rules={"2": None}))
    path = save(model, tmp_path / "a")
    for other in (make().train(training), hooked(lambda module: module)()):  # a norm of layer 2 is in the file
        if type(other[2]) is nn.Linear and not other[2]._forward_pre_hooks:
            rejected(path, other, "does not fit the model")
        else:
            loaded = load(path, other)
            torch.testing.assert_close(loaded(x), model(x))
            assert torch.equal(loaded[1].weight, model[1].weight)
            loaded.load_state_dict(model.state_dict())


def everything(model):
    """All that a failed load must leave: objects and their values."""
    found = {}
    for name, module in model.named_modules():
        found[name] = id(module), type(module), module.training
        for key, value in vars(module).items():
            found[name, key] = id(value)
            if isinstance(value, dict):
                found[name, key, "inner"] = [(k, id(v)) for k, v in value.items()]
                for inner in value.values():
                    if isinstance(inner, torch.Tensor):
                        found[id(inner)] = inner.requires_grad, inner._version, inner.detach().clone().numpy().tobytes()
    return found


class Refusing(nn.Linear):
    """A layer that can be made to fail whenever the code of the model is asked."""

    when = ""

    def train(self, mode=True):
        if self.when == "train":
            raise RuntimeError("refused by the model")
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.when == "load":
            raise KeyboardInterrupt

    def __setattr__(self, name, value):
        if self.when == "set" and name == "weight" and not value.is_meta:
            raise TypeError("refused by the model")
        super().__setattr__(name, value)


@pytest.mark.parametrize("when", ["train", "load", "set", "hook", "memory"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_failed_load_leaves_the_model_as_it_was(tmp_path, monkeypatch, norm, when):
    def make():
        torch.manual_seed(0)
        parts = (norm(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3), norm(nn.Linear(4, 4)), Refusing(4, 4))
        return nn.Sequential(*parts)

    model = quantize_(make().eval(), Recipe(rules={"3": None}))
    path, fresh = save(model, tmp_path / "a"), make()
    load(path, make())
    fresh[3].when = when
    handle = fresh[3].register_load_state_dict_post_hook(lambda *_: 1 / (when != "hook"))
    fresh[2].register_forward_pre_hook(print)
    if when == "memory":
        monkeypatch.setattr(dybit.models.checkpoint, "bypass_fast_path_", lambda *_: [][1 << 9].append(MemoryError))
    before = everything(fresh)
    expected = {"load": KeyboardInterrupt}.get(when, CheckpointError)
    with pytest.raises(expected) as error:
        load(path, fresh)
    assert everything(fresh) == before
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    handle.remove()
    fresh[3].when = ""
    load(path, fresh)  # and it can still be loaded into


def test_a_model_that_cannot_be_copied(saved):
    path, model = saved
    fresh, x = mlp(), torch.randn(2, 8)
    fresh.lock = threading.Lock()
    assert torch.equal(load(path, fresh)(x), model(x))


def test_layers_that_are_not_initialized(saved):
    lazy = nn.LazyLinear(16)
    with pytest.raises(CheckpointError, match="'0' is not initialized, run the model once"):
        load(saved[0], nn.Sequential(lazy, nn.ReLU(), nn.Linear(16, 4)))
    assert type(lazy) is nn.LazyLinear and isinstance(lazy.weight, nn.parameter.UninitializedParameter)


class Rotary(nn.Module):
    """Has a buffer that no checkpoint holds, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.arange(8.0), persistent=False)
        self.kept = torch.ones(8)

    def forward(self, x):
        return self.linear(x * self.frequencies) * self.kept


@torch.no_grad()
def test_models_on_the_meta_device(tmp_path):
    model, x = quantize_(Rotary().eval(), Recipe()), torch.randn(2, 8)
    path = save(model, tmp_path / "a")
    with torch.device("meta"):
        fresh = Rotary()
    with pytest.raises(CheckpointError, match="does not hold 'frequencies', which the model has on the meta device"):
        load(path, fresh)
    assert type(fresh.linear) is nn.Linear and fresh.linear.weight.is_meta
    fresh.frequencies = torch.arange(8.0)
    with pytest.raises(CheckpointError, match="does not hold 'kept'"):
        load(path, fresh)
    fresh.kept = torch.ones(8)
    assert torch.equal(load(path, fresh)(x), model(x))
    # What is held need not have values, and where load is called does not matter.
    path = save(quantize_(mlp(), Recipe()), tmp_path / "b")
    with torch.device("meta"):
        loaded = load(path, mlp())
    assert loaded(torch.randn(2, 8)).shape == (2, 4)


def test_tensors_that_cannot_be_stored(tmp_path):
    cases = {
        "sparse": (torch.eye(3).to_sparse(), "torch.sparse_coo tensor, which safetensors cannot store"),
        "complex": (torch.zeros(2, dtype=torch.complex128), "of torch.complex128, which safetensors cannot store"),
        "meta": (torch.zeros(2, device="meta"), "on the meta device, without values"),
    }
    for name, (tensor, message) in cases.items():
        model = quantize_(mlp(), Recipe())
        model.register_buffer(name, tensor)
        with pytest.raises(DyBitError, match=f"model has '{name}'.*{message}"):
            save(model, tmp_path / "a")
    model = quantize_(mlp(), Recipe())
    model.register_buffer("good", torch.tensor([1 + 2j]))
    fresh = mlp()
    fresh.register_buffer("good", torch.zeros(1, dtype=torch.complex64))
    assert torch.equal(load(save(model, tmp_path / "b"), fresh).good, model.good)
    assert names(tmp_path) == ["b"]


def test_descriptions_of_a_file_are_those_of_the_manifest(saved):
    path, model = saved
    tensors = safetensors.torch.load_file(path / TENSORS)
    assert set(tensors) == set(model.state_dict())
    key = f"0.{dybit.layers.description.KEY}"
    text = bytes(tensors[key].tolist())
    other = text.replace(b'"s8r', b'"u8r') if b'"s8r' in text else text.replace(b'"u8r', b'"s8r')
    for changed, message in ((other, "does not match dybit.json"), (b"x" * len(text), "does not match")):
        tensors[key] = torch.tensor(list(changed), dtype=torch.uint8)
        safetensors.torch.save_file(tensors, path / TENSORS)
        edit(path, lambda data: data.update(sha256=dybit.models.manifest.checksum(path / TENSORS)))
        rejected(path, mlp(), message)
    # Earlier versions stored none.
    old = {name: tensor for name, tensor in tensors.items() if not name.endswith(dybit.layers.description.KEY)}
    safetensors.torch.save_file(old, path / TENSORS)
    edit(path, lambda data: data.update(sha256=dybit.models.manifest.checksum(path / TENSORS)))
    x = torch.randn(2, 8)
    assert torch.equal(load(path, mlp())(x), model(x))


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of directories")
def test_two_that_save_and_one_that_loads(tmp_path):
    models = [quantize_(mlp(), Recipe(weights=bits)) for bits in (3, 4)]
    path = save(models[0], tmp_path / "a")
    with ThreadPoolExecutor(2) as pool:  # the locks are those of processes, but hold among threads
        savers = [pool.submit(lambda model: [save(model, path) for _ in range(30)], model) for model in models]
        while not all(saver.done() for saver in savers):
            load(path, mlp())
    assert all(saver.result() for saver in savers)
    load(path, mlp())
    assert names(path) == [MANIFEST, TENSORS] and names(tmp_path) == ["a"]


def test_what_loading_imports():
    script = (
        "import sys, dybit.models.checkpoint; print([name for name in sys.modules if name.startswith('dybit.ptq')])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
