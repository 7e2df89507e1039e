"""Quantizing files piece by piece: the same bits as in memory, little of it, interrupted, damaged and hostile files."""

import json
import random
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dybit
from dybit.models import streaming
from dybit.models.streaming import Job, quantize_files
from dybit.models.tensor_files import read_source
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE", 256)
    monkeypatch.setattr(streaming, "_SYNC", 2)


def entry(spec, dtype="float32"):
    return {"kind": "weight", "dtype": dtype, "weights": {"weight": spec.to_dict()}, "input": None}


def specs(shape=(43, 40)):
    yield TensorSpec("dybit4spare", shape, "group", 16, choice="group")
    yield TensorSpec("dybit4spare", shape, "group", 16, choice="channel")
    yield TensorSpec("dybit3", shape, "channel", choice="channel")
    yield TensorSpec("dybit5spare", shape, "channel", choice="tensor")
    yield TensorSpec("int8", shape, "tensor", choice="tensor")
    yield TensorSpec("dybit2mid", shape, "group", 32, scale="pow2", choice="group")
    yield TensorSpec("nvfp4", shape, "group", 16, scale="e4m3", choice="group")
    yield TensorSpec("dybit4spare", (*shape, 3), "channel", choice="channel")
    yield TensorSpec("dybit4spare", shape, "channel", choice="channel", transposed=1)
    stack = (9, shape[1], 6)
    yield TensorSpec("dybit4spare", stack, "channel", choice="channel", transposed=1, row_dims=2)
    yield TensorSpec("dybit3", stack, "group", 16, choice="group", transposed=1, row_dims=2)


@pytest.mark.parametrize(
    "spec",
    list(specs()),
    ids=lambda spec: f"{spec.family}-{spec.granularity}-{spec.choice}-{spec.scale}-{spec.row_dims}",
)
def test_pieces_are_the_whole(tmp_path, small_pieces, spec):
    weight, other = torch.randn(spec.shape) * 3, torch.arange(1000)
    save_file({"a.weight": weight, "b": other, "c": torch.zeros(0, 3)}, tmp_path / "m.safetensors")
    source = read_source(tmp_path / "m.safetensors")
    outcome = quantize_files(source, {"a.weight": Job(spec)}, tmp_path / "q", {"a": entry(spec)}, workers=2)
    found = load_file(tmp_path / "q" / "model.safetensors")
    expected = quantize(weight, spec)
    for suffix, buffer in expected.buffers().items():
        assert torch.equal(found["a.weight" + suffix].view(torch.uint8), buffer.view(torch.uint8))
    assert torch.equal(found["b"], other) and found["c"].shape == (0, 3)
    noise = (expected.dequantize() - weight).square().sum().item()
    assert outcome["a.weight"].noise == pytest.approx(noise, rel=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"q", "m.safetensors"}


def test_half_precision(tmp_path, small_pieces):
    weight = torch.randn(24, 32).bfloat16()
    save_file({"0.weight": weight}, tmp_path / "m.safetensors")
    spec = TensorSpec("dybit4spare", (24, 32), choice="channel")
    source = read_source(tmp_path / "m.safetensors")
    quantize_files(source, {"0.weight": Job(spec)}, tmp_path / "q", {"0": entry(spec, "bfloat16")})
    model = dybit.load(tmp_path / "q", torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False).bfloat16()))
    assert torch.equal(model[0].weight, quantize(weight, spec).dequantize(torch.bfloat16))


def many(tmp_path, count=6):
    torch.manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(32, 24) for i in range(count)}
    save_file(tensors, tmp_path / "m.safetensors")
    spec = TensorSpec("dybit4spare", (32, 24), choice="channel")
    jobs = {key: Job(spec) for key in tensors}
    return read_source(tmp_path / "m.safetensors"), jobs, {str(i): entry(spec) for i in range(count)}


def test_an_interrupted_call_goes_on(tmp_path, small_pieces):
    source, jobs, entries = many(tmp_path)
    seen = []

    def stop(done, total, key):
        seen.append(key)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_files(source, jobs, tmp_path / "q", entries, workers=1, progress=stop)
    assert not (tmp_path / "q").exists() and (tmp_path / ".q.partial").is_dir()
    calls = []
    outcome = quantize_files(source, jobs, tmp_path / "q", entries, progress=lambda *c: calls.append(c))
    assert 0 < len(calls) < 24 and calls[-1][0] == calls[-1][1] == 6 * 32 * 24
    assert not outcome["0.weight"].whole and outcome["5.weight"].whole
    quantize_files(source, jobs, tmp_path / "fresh", entries)
    for name in ("model.safetensors", "dybit.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert not (tmp_path / ".q.partial").exists()


def test_another_plan_starts_anew(tmp_path, small_pieces):
    source, jobs, entries = many(tmp_path)

    def stop(done, total, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_files(source, jobs, tmp_path / "q", entries, progress=stop)
    jobs = {key: Job(job.spec, method="absmax") for key, job in jobs.items()}
    quantize_files(source, jobs, tmp_path / "q", entries)
    found = load_file(tmp_path / "q" / "model.safetensors")
    weight = load_file(tmp_path / "m.safetensors")["0.weight"]
    expected = quantize(weight, jobs["0.weight"].spec, method="absmax")
    assert torch.equal(found["0.weight"], expected.packed) and torch.equal(found["0.weight_scale"], expected.scale)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of directories")
@pytest.mark.parametrize("existing", [False, True])
def test_a_second_call_at_the_same_time_is_refused(tmp_path, small_pieces, existing):
    source, jobs, entries = many(tmp_path)
    other = {key: Job(job.spec, method="absmax") for key, job in jobs.items()}
    if existing:
        quantize_files(source, other, tmp_path / "q", entries)
        (tmp_path / "q" / "mine").write_text("mine")
    refused = []

    def again(done, total, key):
        if not refused:
            with pytest.raises(dybit.DyBitError, match="q' cannot be written: another process is writing it") as error:
                quantize_files(source, other, tmp_path / "q", entries)
            refused.append(error)

    quantize_files(source, jobs, tmp_path / "q", entries, progress=again)
    assert refused
    quantize_files(source, jobs, tmp_path / "fresh", entries)
    for name in ("model.safetensors", "dybit.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    left = {"model.safetensors", "dybit.json", *(["mine"] if existing else [])}
    assert {file.name for file in (tmp_path / "q").iterdir()} == left
    assert {file.name for file in tmp_path.iterdir()} == {"q", "fresh", "m.safetensors"}


def test_an_interrupted_call_goes_on_in_a_directory_that_is_there(tmp_path, small_pieces, monkeypatch):
    source, jobs, entries = many(tmp_path)
    (tmp_path / "q").mkdir()
    monkeypatch.chdir(tmp_path / "q")
    seen = []

    def stop(done, total, key):
        seen.append(key)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_files(source, jobs, ".", entries, workers=1, progress=stop)
    calls = []
    quantize_files(source, jobs, "../q", entries, progress=lambda *c: calls.append(c))
    assert 0 < len(calls) < 24
    assert {file.name for file in (tmp_path / "q").iterdir()} == {"model.safetensors", "dybit.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"q", "m.safetensors"}


def test_directories_of_others_are_kept(tmp_path):
    source, jobs, entries = many(tmp_path, 1)
    with pytest.raises(dybit.DyBitError, match="exists and is not a dybit checkpoint; nothing was written"):
        quantize_files(source, jobs, tmp_path, entries)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_bad_values_leave_nothing(tmp_path, small_pieces):
    source, jobs, entries = many(tmp_path)
    tensors = load_file(tmp_path / "m.safetensors")
    tensors["3.weight"][17, 2] = float("inf")
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(dybit.DyBitError, match=r"m.safetensors, tensor '3.weight': weight holds inf"):
        quantize_files(source, jobs, tmp_path / "q", entries)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_a_file_that_shrinks(tmp_path):
    source, jobs, entries = many(tmp_path)
    with (tmp_path / "m.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(dybit.CheckpointError, match="became shorter"):
        quantize_files(source, jobs, tmp_path / "q", entries)


def test_a_file_that_is_quantized_already(tmp_path):
    source, jobs, entries = many(tmp_path, 1)
    quantize_files(source, jobs, tmp_path / "q", entries)
    again = read_source(tmp_path / "q" / "model.safetensors")
    with pytest.raises(dybit.CheckpointError, match=r"has a tensor '0.weight_scale' already"):
        quantize_files(again, jobs, tmp_path / "r", entries)


def test_a_thousand_flipped_bits(tmp_path):
    """Damage is either found or harmless: other numbers, or a tensor that is not one any more."""
    source, jobs, entries = many(tmp_path, 2)
    good = (tmp_path / "m.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    shuffle, file, found = random.Random(0), tmp_path / "f.safetensors", 0
    for i in range(1000):
        data = bytearray(good)
        place = shuffle.randrange(header if i % 2 else len(good))
        data[place] ^= 1 << shuffle.randrange(8)
        file.write_bytes(data)
        try:
            source = read_source(file)
            if place >= header and i % 20 == 0:
                quantize_files(source, jobs, tmp_path / "q", entries, workers=1)
                found += (
                    dybit.load(tmp_path / "q", torch.nn.Sequential(*2 * [torch.nn.Linear(24, 32, bias=False)])) is None
                )
        except dybit.CheckpointError as error:
            assert "\n" not in str(error)
            found += 1
        except dybit.DyBitError as error:
            assert "holds" in str(error)  # NaN or infinity
    assert found > 300


SCRIPT = """
import resource, sys
from dybit.models.streaming import Job, quantize_files
from dybit.models.tensor_files import read_source
from dybit.tensors.quantized_tensor import TensorSpec
source = read_source(sys.argv[1])
spec = TensorSpec("dybit4spare", (1024, 2048), "group", 64, choice="group")
few = {k: v for k, v in source.items() if k in ("0", "1")}
quantize_files(few, {k: Job(spec, "absmax") for k in few}, sys.argv[2] + "w", {}, workers=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_files(source, {k: Job(spec, "absmax") for k in source}, sys.argv[2], {}, workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    size = 4 * 1024 * 2048
    table = {
        str(i): {"dtype": "F32", "shape": [1024, 2048], "data_offsets": [i * size, (i + 1) * size]} for i in range(16)
    }
    header = json.dumps(table).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:  # sparse: only the header takes room
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 16 * size)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.safetensors"), str(tmp_path / "q")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # kB
    assert grown * 1024 < 8 * size  # of 16
