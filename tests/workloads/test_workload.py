"""Workloads: sizes of layers against brute force, JSON, and errors that quote what they were given."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.workloads.workload import Conv, Gemm, Workload

small = st.integers(1, 4)
pairs = st.tuples(small, small)


@st.composite
def convolutions(draw):
    groups, kernel, dilation = draw(small), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size = tuple(draw(st.integers(d * (k - 1) + 1, 16)) for k, d in zip(kernel, dilation, strict=True))
    channels = (groups * draw(small), groups * draw(small))
    return Conv("c", *channels, size, kernel, draw(pairs), padding, dilation, groups, draw(small), draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_a_convolution_has_the_outputs_and_reads_the_inputs_of_a_loop(conv):
    padded = np.pad(np.zeros(conv.size, dtype=int), [(p, p) for p in conv.padding])
    inside = np.pad(np.ones(conv.size, dtype=int), [(p, p) for p in conv.padding])
    positions = 0
    for y in range(0, padded.shape[0] - conv.dilation[0] * (conv.kernel[0] - 1), conv.stride[0]):
        for x in range(0, padded.shape[1] - conv.dilation[1] * (conv.kernel[1] - 1), conv.stride[1]):
            positions += 1
            for i in range(conv.kernel[0]):
                for j in range(conv.kernel[1]):
                    padded[y + i * conv.dilation[0], x + j * conv.dilation[1]] = 1
    assert conv.m == positions * conv.batch
    assert conv.input_elements == int((padded & inside).sum()) * conv.in_channels * conv.batch
    assert conv.macs == conv.output_elements * conv.k
    assert conv.weight_elements == conv.out_channels * conv.in_channels // conv.groups * np.prod(conv.kernel)


def test_halo_is_what_neighbouring_bands_share():
    conv = Conv("c", 8, 8, size=(16, 10), kernel=(3, 3), padding=(1, 1))
    assert conv.halo_elements(1) == 0
    assert conv.halo_elements(4) == 3 * 2 * 10 * 8  # three cuts, two shared rows of ten pixels, eight channels
    assert Conv("c", 8, 8, size=(16, 10), kernel=(2, 2), stride=(2, 2)).halo_elements(4) == 0
    assert Conv("c", 8, 8, size=(16, 10), kernel=(3, 3), batch=4).halo_elements(4) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(convolutions(), min_size=1, max_size=4), st.integers(0, 9))
def test_json_gives_the_workload_back(convs, extra):
    layers = [replace(conv, name=f"c{i}") for i, conv in enumerate(convs)]
    workload = Workload("w", (*layers, Gemm("g", 2, 3, 4, 5, dynamic=True)), extra)
    assert Workload.from_json(workload.to_json()) == workload


def test_files(tmp_path):
    workload = Workload("w", (Gemm("g", 2, 3, 4, bias=True),), 7)
    workload.save(tmp_path / "w.json")
    assert Workload.load(tmp_path / "w.json") == workload
    assert workload.parameters == 3 * 4 + 4 + 7
    assert (len(workload), [layer.name for layer in workload]) == (1, ["g"])
    with pytest.raises(DyBitError, match=r"readable text file, not .*missing\.json"):
        Workload.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gemm("a", 0, 1, 1), "m of layer 'a' must be an integer of at least 1, not 0"),
        (lambda: Gemm("a", 1, 1.5, 1), "k of layer 'a' .* not 1.5"),
        (lambda: Gemm("", 1, 1, 1), "name of a layer must be a non-empty string, not ''"),
        (lambda: Gemm("a", 1, 1, 1, bias=True, dynamic=True), "bias of layer 'a' must be False"),
        (lambda: Conv("a", 3, 4, (8, 8), groups=2), r"must divide its channels \(3, 4\), not 2"),
        (lambda: Conv("a", 3, 4, (2, 2), kernel=(3, 3)), r"kernel \(3, 3\) of layer 'a' is larger than its input"),
        (lambda: Conv("a", 3, 4, (2, 2), kernel=3), "kernel of layer 'a' must be a pair of integers, not 3"),
        (lambda: Conv("a", 3, 4, (2, 2), padding=(-1, 0)), "padding of layer 'a' .* at least 0, not -1"),
        (lambda: Workload("w", ()), "layers of workload 'w' must not be empty"),
        (lambda: Workload("w", (Gemm("a", 1, 1, 1),) * 2), "'a' is twice"),
        (lambda: Workload.from_json("{"), "workload is not valid JSON"),
        (lambda: Workload.from_json("[]"), "must be an object with a list of layers"),
        (lambda: Workload.from_json('{"layers": [], "layer": 1}'), "unknown key 'layer'"),
        (lambda: Workload.from_json('{"layers": [{"kind": "pool"}]}'), "must be gemm or conv, not 'pool'"),
        (lambda: Workload.from_json('{"layers": [{"kind": "gemm", "name": "a", "mm": 1}]}'), "unknown key 'mm'"),
        (lambda: Workload.from_json('{"layers": [{"kind": "gemm", "name": "a", "m": 1}]}'), "'a' is incomplete"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_quote_the_value(make, words):
    with pytest.raises(DyBitError, match=words):
        make()


def test_malformed_files_are_one_sentence():
    layers = (Gemm("a", 1, 8, 4), Conv("b", 3, 8, size=(8, 8), kernel=(3, 3), padding=(1, 1)))
    good, refused = json.loads(Workload("n", layers).to_json()), []

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        try:
            work = Workload.from_json(json.dumps(data))
        except DyBitError as error:
            refused.append(str(error))
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert work.macs > 0 and Workload.from_json(work.to_json()) == work

    check()
    assert len(set(refused)) > 50
    for kind in ([], {}, None, 3):  # what cannot be looked up
        with pytest.raises(DyBitError, match="kind of a layer must be gemm or conv"):
            Workload.from_json(json.dumps(good | {"layers": [good["layers"][0] | {"kind": kind}]}))
