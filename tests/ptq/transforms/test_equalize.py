import copy

import pytest
import torch
from helpers import decoder, error, outliers_
from torch import nn
from transforms_equalize_cases import IMAGES, mobile, names

import dybit
from dybit.errors import DyBitWarning
from dybit.models.attachments import attachments
from dybit.models.batch_norm import find_pairs, fold_
from dybit.ptq.transforms import equalize
from dybit.ptq.transforms.equalize import equalize_


def ranges(layer):
    """Of every output and every input channel, depthwise convolutions having one each."""
    weight = layer.weight.detach().abs()
    depthwise = getattr(layer, "groups", 1) > 1
    return weight.flatten(1).amax(1), weight.flatten(1).amax(1) if depthwise else weight.transpose(0, 1).flatten(
        1
    ).amax(1)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.LeakyReLU])
def test_convolutions(activation):
    model = mobile(activation)
    reference = copy.deepcopy(model)
    equalize_(model, names(model), IMAGES)
    assert error(model, reference, IMAGES) < 1e-5
    assert not torch.equal(model[0].weight, reference[0].weight)
    for first, second in ((model[0], model[2]), (model[2], model[4]), (model[4], model[8])):
        ratio = ranges(first)[0] / ranges(second)[1]
        assert ratio.max() / ratio.min() < 1.05  # equal but for the factor that makes room for a limit
        if activation is not nn.ReLU6:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.05, rtol=0)


def test_limits_of_relu6():
    model = mobile()
    reference = copy.deepcopy(model)
    equalize_(model, names(model), IMAGES)
    assert set(attachments(model)) == {"0", "2"}
    assert all(module.output_limit.min() > 0 and module.output_limit.max() <= 6 for module in (model[0], model[2]))
    large = [batch * 10 for batch in IMAGES]  # where nearly everything is cut
    assert error(model, reference, large) < 1e-5
    cut = reference[:2](large[0])
    assert float((cut == 6).float().mean()) > 0.1


def test_quantized_with_one_scale_a_tensor(tmp_path):
    recipe = dybit.Recipe(weights="int6", granularity="tensor", method="absmax")
    errors, models = [], []
    for algorithm in (None, "equalize"):
        models.append(dybit.quantize_(mobile(), recipe, IMAGES, algorithm=algorithm))
        errors.append(error(models[-1], mobile(), IMAGES))
    assert errors[1] < 0.5 * errors[0]
    dybit.save(models[1], tmp_path / "out")
    loaded = dybit.load(tmp_path / "out", mobile())
    assert torch.equal(loaded(IMAGES[0]), models[1](IMAGES[0]))
    compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES[0]), models[1](IMAGES[0]))


def test_batch_norms_are_folded_first():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    outliers_(model[1])
    reference = copy.deepcopy(model)
    fold_(model, find_pairs(model))
    equalize_(model, names(model), IMAGES)
    assert error(model, reference, IMAGES) < 1e-5
    torch.testing.assert_close(ranges(model[0])[0], ranges(model[3])[1], atol=0, rtol=0.05)


def test_decoders():
    model, batches = decoder(), [{"input_ids": torch.arange(14).view(2, 7)}]
    reference = copy.deepcopy(model)
    equalize_(model, names(model), batches)
    assert error(model, reference, batches) < 1e-5
    layer = model.model.layers[0]
    torch.testing.assert_close(ranges(layer.mlp.up_proj)[0], ranges(layer.mlp.down_proj)[1], atol=0, rtol=0.05)
    assert torch.equal(layer.input_layernorm.weight, reference.model.layers[0].input_layernorm.weight)


class Shifting(nn.Module):
    """Computes something else on every other run, as a model with state would."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.runs = nn.Linear(6, 8), nn.Linear(8, 3), 0

    def forward(self, x):
        self.runs += 1
        return self.second(torch.relu(self.first(x))) * self.runs


def test_undone_where_the_output_changes():
    model, x = Shifting(), torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(DyBitWarning, match="equalize is left out: it would change the model's output by"):
        equalize_(model, ["first", "second"], [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_undone_when_interrupted():
    model = mobile()
    before = copy.deepcopy(model.state_dict())

    def stop(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        equalize_(model, names(model), IMAGES, progress=stop)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_progress():
    calls = []
    equalize_(mobile(), names(mobile()), IMAGES, progress=lambda *call: calls.append(call))
    assert [done for done, *_ in calls] == [*range(len(calls))] and calls[0][1] == equalize._SWEEPS
    assert calls[0][2].startswith("channels off by up to") and calls[-1][2] == "channels off by up to 1 %"


def test_half_precision():
    model = mobile().bfloat16()
    reference = copy.deepcopy(model)
    batches = [batch.bfloat16() for batch in IMAGES]
    equalize_(model, names(model), batches)
    assert 0 < error(model, reference, batches) < 0.03
