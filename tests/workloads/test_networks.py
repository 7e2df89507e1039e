"""Built-in networks against the parameter and operation counts that their publishers state."""

import pytest

from dybit.errors import DyBitError
from dybit.workloads.networks import NETWORKS, network

# num_params and GFLOPS (multiply-accumulates) of torchvision's weights of the same name.
PUBLISHED = {
    "resnet18": (11_689_512, 1.814),
    "resnet50": (25_557_032, 4.089),
    "mobilenet_v2": (3_504_872, 0.301),
    "vit_b_16": (86_567_656, 17.564),
    "convnext_tiny": (28_589_128, 4.456),
    "swin_t": (28_288_354, 4.491),
    "regnet_x_1_6gf": (9_190_136, 1.603),
    "regnet_y_1_6gf": (11_202_430, 1.612),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_totals_are_the_published_ones(name):
    workload = network(name)
    assert (workload.parameters, round(workload.macs / 1e9, 3)) == PUBLISHED[name]


def test_resnet50_has_the_shapes_of_the_reference_table():
    shapes = [(layer.m, layer.k, layer.n) for layer in network("resnet50")]
    assert (len(shapes), shapes[0], shapes[-1]) == (54, (12544, 147, 64), (1, 2048, 1000))
    assert shapes.count((196, 2304, 256)) == 6


def test_an_unknown_network_is_answered_with_the_nearest():
    with pytest.raises(DyBitError, match="not 'resnet51'; did you mean 'resnet50'"):
        network("resnet51")
    with pytest.raises(DyBitError, match="not 'zzz'; known are resnet18"):
        network("zzz")
