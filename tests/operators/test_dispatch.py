"""When operators have to be called, and how they are told of a weight."""

import threading

import pytest
import torch

from dybit.operators.dispatch import no_view, read_spec, recorded, recording, unwatched
from dybit.tensors.quantized_tensor import TensorSpec


def test_specs_are_read_once():
    spec = TensorSpec("dybit4", (4, 40), "group", 16, "e4m3", choice="group")
    assert read_spec(spec.key) == spec and read_spec(spec.key) is read_spec(spec.key)


def test_nobody_watches():
    x, bias = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    assert unwatched(x) and unwatched(x, torch.ones(3)) and not unwatched(x, bias)
    assert not unwatched(bias)
    with torch.no_grad():
        assert unwatched(x, bias)
    with torch.inference_mode():
        assert unwatched(torch.ones(3), bias)


def test_somebody_watches():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Mode():
        assert not unwatched(x)
    with torch._subclasses.FakeTensorMode():
        assert not unwatched(torch.ones(3))
    assert not unwatched(x.as_subclass(type("Mine", (torch.Tensor,), {})))
    seen = []
    torch.func.vmap(lambda row: seen.append(unwatched(row)) or row)(torch.ones(2, 3))
    assert seen == [False]
    traced = torch.compile(lambda x: x + unwatched(x), backend="eager")
    assert torch.equal(traced(x), x)


@pytest.mark.parametrize("y", [torch.ones(4).view(2, 2), torch.ones(2, 2)])
def test_results_are_no_views(y):
    found = no_view(y)
    assert torch.equal(found, y) and not found._is_view() and found.data_ptr() == y.data_ptr()


def test_layers_are_recorded_inside_of_a_block_alone():
    with recording():
        assert recorded()
        found = []
        thread = threading.Thread(target=lambda: found.append(recorded()))
        thread.start()
        thread.join()
    assert not recorded() and found == [False]
