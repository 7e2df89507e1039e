import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.models import running
from dybit.models.calibration import calibrate
from dybit.models.running import run_batch


def test_modes_and_hooks_are_restored():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.train()
    model[2].eval()
    before = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    calibrate(model, {"0": model[0]}, [torch.randn(8, 4)])
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(DyBitError):
        calibrate(model, {"0": model[0]}, [torch.randn(8, 5)])
    assert [module.training for module in model.modules()] == before
    assert not model[0]._forward_pre_hooks


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(64, 2))
    seen = calibrate(model, {"1": model[1]}, [torch.ones(100, 64)])["1"]
    assert torch.equal(seen.second_moment(), torch.ones(64))


def test_labels_in_a_batch_are_named():
    batch = [torch.ones(2, 4), torch.zeros(2)]
    with pytest.raises(
        DyBitError, match=r"3 were given; a list is passed .*; drop labels, as in \[x for x, _ in loader"
    ):
        run_batch(nn.Sequential(nn.Linear(4, 4)), batch)
    with pytest.raises(DyBitError) as other:
        run_batch(nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 5),))
    assert "labels" not in str(other.value)


def test_batches_of_every_kind():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, factor=1.0):
            return self.linear(x * factor)

    model, x = Two(), torch.randn(3, 4)
    for batches in ([x], [(x,)], [[x, 1.0]], [{"x": x, "factor": 1.0}], ((x,) for _ in range(1)), iter([x])):
        seen = calibrate(model, {"linear": model.linear}, batches)["linear"]
        assert torch.allclose(seen.second_moment(), x.square().mean(0))
    assert torch.equal(run_batch(model, {"x": x}), model(x))
    lines = []
    calibrate(model, {"linear": model.linear}, [x, x], progress=lines.append)
    assert lines == ["calibrating: batch 1", "calibrating: batch 2"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration yields no batch"),
        (iter(()), "calibration yields no batch"),
        (torch.zeros(3, 4), "calibration must be an iterable of batches, such as a list, not Tensor"),
        ({"x": torch.zeros(3, 4)}, "not dict"),
        ("text", "not str"),
        (5, "not int"),
        ([5], "calibration batch 0 must be a tensor, a tuple or list of arguments, or a mapping, not int"),
        (["text"], "not str"),
        ([None], "not NoneType"),
        ([np.zeros((3, 4))], "not ndarray"),
        (
            [torch.zeros(3, 4), torch.zeros(3, 5)],
            "calibration batch 1 (float32 of shape (3, 5)) does not fit the model:",
        ),
        ([torch.zeros(3, 4, dtype=torch.long)], "calibration batch 0 (int64 of shape (3, 4)) does not fit the model:"),
        ([(torch.zeros(3, 4), torch.zeros(1))], "calibration batch 0 (float32 of shape (3, 4), float32 of shape (1,))"),
        ([{"y": torch.zeros(3, 4)}], "calibration batch 0 (y: float32 of shape (3, 4)) does not fit the model:"),
        ([torch.tensor([[1.0, np.nan, 0, 0]])], "calibration gives layer 'layer' inputs with NaN or infinity"),
        ([torch.tensor([[1.0, np.inf, 0, 0]])], "calibration gives layer 'layer' inputs with NaN or infinity"),
    ],
)
def test_bad_batches(batches, message):
    model = nn.Linear(4, 2)
    with pytest.raises(DyBitError, match=re.escape(message)) as error:
        calibrate(model, {"layer": model}, batches)
    assert "\n" not in str(error.value)
    assert not model._forward_pre_hooks


def test_run_keeps_the_mode_and_takes_any_output():
    model = nn.Linear(3, 2).train()
    outputs = [output for _, output in running.run(model, [torch.ones(1, 3)])]
    assert model.training and not outputs[0].requires_grad
    tensor = torch.ones(2)
    for raw in (tensor, (1, tensor), {"x": tensor}, SimpleNamespace(last_hidden_state=tensor)):
        assert running.output_tensor(raw) is tensor
    with pytest.raises(DyBitError, match="no floating-point tensor but is a int"):
        running.output_tensor(3)
