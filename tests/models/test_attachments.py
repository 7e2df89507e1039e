import copy
import pickle

import pytest
import torch
from torch import nn

import dybit
from dybit.errors import DyBitError
from dybit.models.attachments import attach_, attachments, check_attachments, detach_, expect_attached_, is_attached
from dybit.tensors.hadamard import orthogonal_factor, rotate


def rotation(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = orthogonal_factor(size, generator)
    return factor, torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 24), nn.LayerNorm(24), nn.Linear(24, 6), nn.ReLU6()).eval()


def attached():
    built = model()
    attach_(built[0], "rotate_output", *rotation(24))
    attach_(built[1], "restore_input", *rotation(24))
    attach_(built[2], "limit_output", torch.linspace(0, 0.5, 6))
    return built


TOKENS = torch.arange(9)[None]


def test_what_the_hooks_do():
    plain, changed = model(), attached()
    torch.testing.assert_close(changed[:2](TOKENS), plain[:2](TOKENS))
    torch.testing.assert_close(changed[0](TOKENS), rotate(plain[0](TOKENS), *rotation(24)))
    expected = torch.minimum(plain[:3](TOKENS), torch.linspace(0, 0.5, 6))
    torch.testing.assert_close(changed[:3](TOKENS), expected)


def test_inputs_by_name():
    layer = nn.Linear(24, 3)
    attach_(layer, "rotate_input", *rotation(24))
    x = torch.randn(2, 24)
    assert torch.equal(layer(x), layer(input=x))
    assert torch.equal(layer(x), nn.functional.linear(rotate(x, *rotation(24)), layer.weight, layer.bias))


def test_channels_of_convolutions():
    conv = nn.Conv2d(2, 3, 1)
    free = conv(torch.ones(1, 2, 4, 4))
    attach_(conv, "limit_output", free[0, :, 0, 0].detach() - torch.tensor([0.0, 1.0, -1.0]))
    limited = conv(torch.ones(1, 2, 4, 4))
    torch.testing.assert_close((free - limited)[0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(conv(torch.ones(2, 4, 4)), limited[0])  # without a batch


def test_detach():
    built, plain = attached(), model()
    assert is_attached(built[0]) and not is_attached(plain[0])
    for module in built:
        detach_(module)
    assert attachments(built) == {} and built.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(built(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_it(copied):
    built = attached()
    twin = copied(built)
    assert attachments(twin) == attachments(built) and torch.equal(twin(TOKENS), built(TOKENS))
    detach_(twin[2])
    assert is_attached(built[2])


def test_a_fresh_model_takes_it_up():
    built, fresh = attached(), model()
    expect_attached_(fresh, check_attachments(attachments(built)))
    fresh.load_state_dict(built.state_dict())
    assert torch.equal(fresh(TOKENS), built(TOKENS))


def test_checkpoints_carry_it(tmp_path):
    built = dybit.quantize_(attached(), dybit.Recipe(weights=8, activations=8, activation_mode="dynamic"))
    dybit.save(built, tmp_path / "out")
    loaded = dybit.load(tmp_path / "out", model())
    assert torch.equal(loaded(TOKENS), built(TOKENS))
    assert attachments(loaded) == attachments(built)
    dybit.save(loaded, tmp_path / "again")
    assert (tmp_path / "out" / "dybit.json").read_text() == (tmp_path / "again" / "dybit.json").read_text()


def test_checkpoints_that_do_not_fit(tmp_path):
    dybit.save(dybit.quantize_(attached(), dybit.Recipe(weights=8)), tmp_path / "out")
    with pytest.raises(dybit.CheckpointError, match="'0' to attach to"):
        dybit.load(tmp_path / "out", attached())


@pytest.mark.parametrize(
    "entry",
    [{"kind": "rotate"}, {"kind": "bend", "sizes": []}, {"kind": "limit_output", "sizes": [[3, 3]]}, 3,
     {"kind": "limit_output", "sizes": [[-1]]}, {"kind": "rotate_input", "sizes": [[3, 3]]}],
)  # fmt: skip
def test_bad_entries(entry):
    with pytest.raises(DyBitError, match="attached has a bad entry for 'x'"):
        check_attachments({"x": entry})


def test_bad_table():
    with pytest.raises(DyBitError, match="attached must be an object"):
        check_attachments([1])


def test_compiled():
    built = dybit.quantize_(attached(), dybit.Recipe(weights=4))
    compiled = torch.compile(built, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), built(TOKENS))
