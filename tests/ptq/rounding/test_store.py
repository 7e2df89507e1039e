import pytest
import torch
from rounding_sequential_cases import mixed, mlp

from dybit.ptq.quantize import quantize_
from dybit.ptq.rounding import sequential
from dybit.recipe import Recipe


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    batches, recipe = mixed(64, 24), Recipe(weights=3)
    expected = quantize_(mlp(), recipe, batches, algorithm="gptq")
    calls = []

    def counted(*args, **more):
        calls.append(args[1].shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **more)

    original = sequential.gptq
    monkeypatch.setattr(sequential, "gptq", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_(mlp(), recipe, batches, algorithm="gptq", workdir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    found = quantize_(mlp(), recipe, batches, algorithm="gptq", workdir=tmp_path)
    assert calls[3:] == [(6, 24)]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    # Another recipe, other weights or other batches are another run.
    quantize_(mlp(), Recipe(weights=2), batches, algorithm="gptq", workdir=tmp_path)
    quantize_(mlp(), recipe, batches[:2], algorithm="gptq", workdir=tmp_path)
    assert len(calls) == 4 + 6


def test_damaged_files_are_made_again(tmp_path):
    batches = mixed(64, 24)
    first = quantize_(mlp(), Recipe(weights=3), batches, algorithm="gptq", workdir=tmp_path)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.write_bytes(path.read_bytes()[: -1 - number] if number % 2 else b"")
    second = quantize_(mlp(), Recipe(weights=3), batches, algorithm="gptq", workdir=tmp_path)
    assert torch.equal(first[0].weight, second[0].weight) and torch.equal(first[4].weight, second[4].weight)
