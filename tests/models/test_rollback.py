"""Undoing: whatever is done to a model, a failure leaves its objects, classes, tables and hooks as they were."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from dybit.models.rollback import undone_on_failure


def model():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        spectral_norm(nn.Linear(4, 4)),
        nn.ModuleDict({"a": nn.Embedding(3, 2)}),
    )
    made.register_buffer("loose", torch.ones(2), persistent=False)
    made.note = {"a": [1]}
    return made


def state(module):
    """Everything that identifies a module: objects by identity, containers with their contents."""
    found = {}
    for name, part in module.named_modules():
        found[name] = id(part), type(part)
        for key, value in vars(part).items():
            inner = list(map(id, value.values())) + list(value) if isinstance(value, dict) else None
            found[name, key] = id(value), inner
    return found


CHANGES = {
    "replaced module": lambda m: setattr(m, "1", nn.Identity()),
    "added module": lambda m: m.add_module("new", nn.Linear(2, 2)),
    "deleted module": lambda m: delattr(m, "4"),
    "class": lambda m: setattr(m[0], "__class__", nn.Conv1d),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(1))),
    "no parameter": lambda m: m[0].register_parameter("bias", None),
    "buffer": lambda m: m[1].register_buffer("running_mean", torch.zeros(9)),
    "not persistent": lambda m: m[1].register_buffer("new", torch.zeros(9), persistent=False),
    "attribute": lambda m: setattr(m, "note", None),
    "deleted attribute": lambda m: delattr(m, "note"),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m[0].register_forward_hook(print),
    "removed hook": lambda m: torch.nn.utils.remove_spectral_norm(m[3]),
    "device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_undone(change, error):
    made = model()
    handle = made[0].register_forward_pre_hook(lambda *_: None)
    before = state(made)
    with pytest.raises(error), undone_on_failure(made):
        change(made)
        assert state(made) != before
        raise error
    assert state(made) == before
    handle.remove()
    assert not made[0]._forward_pre_hooks


def test_without_a_failure_changes_stay():
    made = model()
    with undone_on_failure(made):
        made.add_module("new", nn.Linear(2, 2))
    assert made.new.in_features == 2
