import numpy as np
import onnxruntime
import pytest
import torch
from helpers import Tied, tokens
from torch import nn

import onnx
from dybit import Recipe, quantize_
from dybit.errors import DyBitError
from dybit.onnx import export


def run(path, **arrays):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in arrays.items()})


def test_batch_and_length_are_dynamic(tmp_path):
    model = quantize_(Tied().eval(), Recipe(weights=4))
    done = export(model, tmp_path / "m.onnx", [tokens()[:1]])  # one sample only
    assert done.inputs == ("tokens [batch, length]",)
    for shape in ((1, 1), (7, 2), (2, 9)):
        x = torch.randint(0, 11, shape)
        with torch.no_grad():
            np.testing.assert_allclose(run(done.path, tokens=x)[0], model(x).numpy(), atol=1e-5)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x, *, shift=None, factor=2.0):
        y = self.inner(x) * factor
        return {"y": y if shift is None else y + shift, "parts": (y, y.sum())}


def test_arguments_and_results_of_any_kind(tmp_path):
    model = quantize_(Named(), Recipe(weights=4))  # in training mode, and so it stays
    batch = {"x": torch.randn(3, 6), "shift": torch.randn(3, 3), "factor": 3.0}
    export(model, tmp_path / "m.onnx", [batch])
    assert model.training and type(model.inner).__name__ == "QuantizedLinear"
    names = [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output]
    assert names == ["y", "parts_0", "parts_1"]
    results = run(tmp_path / "m.onnx", x=batch["x"], shift=batch["shift"])
    np.testing.assert_allclose(results[0], model(**batch)["y"].detach().numpy(), atol=1e-6)


def test_a_model_that_torch_cannot_export(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) if x.sum().item() > 0 else x

    with pytest.raises(DyBitError, match=r"Branch cannot be exported by torch\.onnx"):
        export(quantize_(Branch(), Recipe(weights=4)), tmp_path / "m.onnx", [torch.ones(2, 4)])
