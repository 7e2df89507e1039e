"""Tests of other runtimes: what they compute, and what is said of those that are not there."""

import importlib.util

import pytest
import torch
from searched import batches
from torch import nn

from dybit.errors import DyBitError, MissingExtraError
from dybit.models.running import run_batch
from dybit.onnx import peers
from dybit.onnx.peers import OPENVINO, ORT, Peers, is_convolutional, lacking

needs_openvino = pytest.mark.skipif(bool(lacking(OPENVINO, int8=True)), reason="needs openvino and nncf")


def without(monkeypatch, *names):
    """Hides packages."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a, **k: None if name in names else find(name, *a, **k)
    )


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()


class Named(nn.Module):
    """Takes mappings, and gives a mapping."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        return {"y": self.layer(self.table(ids) * mask.unsqueeze(-1).float())}


def texts(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        {"ids": torch.randint(50, size, generator=generator), "mask": torch.ones(size, dtype=torch.int64)}
        for size in sizes
    ]


def check(runs, model, batch, bounds):
    with torch.no_grad():
        exact = run_batch(model, batch)
    exact = exact["y"] if isinstance(exact, dict) else exact
    for name, run in runs.items():
        found = run(batch)[0]
        error = float((found - exact).norm() / exact.norm())
        assert error <= bounds[name.split()[-1]], (name, error)


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=needs_openvino)])
def test_outputs_are_those_of_the_model(monkeypatch, others):
    if not others:
        without(monkeypatch, "openvino")
    words = Named().eval()
    for model, data in ((net(), batches()), (words, texts((4, 7), (2, 5)))):
        with Peers(model, data, data) as found:
            runs = found.runs()
            assert set(found.skipped) == (set() if others else {"OpenVINO FP32", "OpenVINO INT8"})
            assert list(runs) == [f"{n} {k}" for n in ([ORT, OPENVINO] if others else [ORT]) for k in ("FP32", "INT8")]
            for batch in (data[1], {k: v[:1] for k, v in data[0].items()} if model is words else data[0][:1]):
                check(runs, model, batch, {"FP32": 1e-5, "INT8": 0.1})
            assert not [run for run in found.runs() if run not in runs]


def test_runtimes_that_are_not_installed_are_left_out(monkeypatch):
    without(monkeypatch, "openvino", "onnx")
    with Peers(net(), batches(), batches()) as found:
        assert list(found.runs()) == ["ONNX Runtime FP32"]
    assert found.skipped == {
        "ONNX Runtime INT8": "ONNX Runtime INT8 is left out: onnx not installed",
        "OpenVINO FP32": "OpenVINO FP32 is left out: openvino not installed",
        "OpenVINO INT8": f"OpenVINO INT8 is left out: {' and '.join(lacking(OPENVINO, int8=True))} not installed",
    }


def test_without_calibration_there_is_no_int8():
    with Peers(net(), batches()) as found:
        assert "ONNX Runtime FP32" in found.runs() and not [name for name in found.runs() if "INT8" in name]
        folder = found._file.parent
        assert folder.exists()
    assert not folder.exists()


def test_no_runtime_at_all(monkeypatch):
    without(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(MissingExtraError, match=r'neither is installed: pip install "dybit\[bench\]"'):
        Peers(net(), batches())


def test_a_runtime_that_fails_is_left_out(monkeypatch):
    without(monkeypatch, "openvino")

    def fail(*_):
        raise RuntimeError("no such kernel\nat line 3")

    monkeypatch.setattr(Peers, "_ort_int8", fail)
    with Peers(net(), batches(), batches()) as found:
        assert found.skipped["ONNX Runtime INT8"] == "ONNX Runtime INT8 is left out: no such kernel"
        monkeypatch.setattr(Peers, "_ort", fail)
        assert not found.runs() and found.skipped["ONNX Runtime FP32"].endswith("no such kernel")


def test_a_model_that_cannot_be_exported():
    class Odd(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(DyBitError, match=r"Odd cannot be exported by torch\.onnx"):
        Peers(Odd(), [torch.ones(2, 3)])


def test_convolutional_networks():
    conv, line = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    assert is_convolutional(nn.Sequential(conv, nn.Conv1d(1, 1, 1), line))
    assert not is_convolutional(nn.Sequential(conv, line, nn.Linear(1, 1))) and not is_convolutional(line)
    assert peers.lacking("ONNX Runtime", int8=True) == []
