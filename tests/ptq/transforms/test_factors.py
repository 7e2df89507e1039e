import copy

import torch
from helpers import error
from torch import nn
from transforms_equalize_cases import IMAGES, mobile, names

from dybit.ptq.transforms.equalize import equalize_


def test_only_layers_that_are_named():
    model = mobile(nn.ReLU)
    before = copy.deepcopy(model.state_dict())
    equalize_(model, ["2", "4"], IMAGES)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"2", "4"}
    model = mobile(nn.ReLU)
    equalize_(model, ["0", "4"], IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_without_a_range():
    model = mobile(nn.ReLU)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[4].weight[:, 5] = 0
    reference = copy.deepcopy(model)
    equalize_(model, names(model), IMAGES)
    assert error(model, reference, IMAGES) < 1e-5
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
