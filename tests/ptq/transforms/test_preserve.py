import pytest
import torch
from torch import nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.models.attachments import attach_, attachments
from dybit.ptq.transforms.preserve import preserving


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)).train()


X = torch.ones(2, 4)


def test_kept_where_nothing_changes():
    net = model()
    with preserving(net, ["0", "2"], X, "nothing"), torch.no_grad():
        for parameter in net[0].parameters():
            parameter.mul_(2)
        net[2].weight.mul_(0.5)
    assert torch.equal(net[0].weight, 2 * model()[0].weight)
    assert net.training


def test_undone_with_what_was_attached():
    net = model()
    expected = pytest.warns(DyBitWarning, match="the bend is left out: it would change the model's output by")
    with expected, preserving(net, ["0"], X, "the bend"), torch.no_grad():
        net[0].weight.mul_(2)
        attach_(net[0], "limit_output", torch.zeros(5))
    assert torch.equal(net[0].weight, model()[0].weight)
    assert attachments(net) == {} and net.state_dict().keys() == model().state_dict().keys()


def test_undone_where_outputs_are_not_finite():
    net = model()
    with pytest.warns(DyBitWarning, match="by inf %"), preserving(net, ["2"], X, "x"), torch.no_grad():
        net[2].weight.fill_(torch.nan)
    assert torch.equal(net[2].weight, model()[2].weight)


def test_undone_where_something_fails():
    net = model()
    with pytest.raises(DyBitError, match="stop"), preserving(net, ["2"], X, "x"), torch.no_grad():
        net[2].weight.zero_()
        raise DyBitError("stop")
    assert torch.equal(net[2].weight, model()[2].weight)


def test_the_first_batch_is_named():
    with pytest.raises(DyBitError, match="calibration batch 0"), preserving(model(), [], torch.ones(2, 3), "x"):
        pass
