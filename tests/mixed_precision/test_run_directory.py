"""Tests of run directories: what search.json says, and that it is there whole."""

import json

import numpy as np
import pytest
import torch
from searched import batches, mlp, mlp_batches, net

from dybit import AcceleratorCost, DyBitError, MaxSize, Recipe, SizeCost, Speedup, search
from dybit.accelerator import Config
from dybit.mixed_precision.run_directory import SCHEMA_VERSION, check_target, histogram, read_run, write_run
from dybit.mixed_precision.shape_search import search_shapes
from dybit.workloads.networks import network


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return search(
        net(),
        batches(),
        constraint=[Speedup(2.0), MaxSize(2500)],
        cost=[AcceleratorCost(Config(rows=4, columns=4)), SizeCost()],
        candidates=["8/8", "4/8", "2/2", "fp32"],
        pareto=5,
        baselines=True,
        cache=tmp_path_factory.mktemp("cells"),
    )


def test_everything_is_there(result, tmp_path):
    write_run(result, tmp_path / "run", model="net", command=["dybit", "search"])
    data = read_run(tmp_path / "run")
    assert data["version"] == SCHEMA_VERSION and data["kind"] == "model" and data["command"] == ["dybit", "search"]
    assert data["constraints"] == [{"kind": "Speedup", "times": 2.0}, {"kind": "MaxSize", "nbytes": 2500}]
    assert [cost["name"] for cost in data["costs"]] == ["accelerator", "size"]
    assert [candidate["name"] for candidate in data["candidates"]] == ["W8A8", "W4A8", "W2A2", "FP32"]
    for row in data["layers"]:
        assert row["name"] in data["groups"][row["group"]]
        assert len(row["errors"]) == len(row["costs"]["size"]) == 4 and row["costs"]["accelerator"][3] is None
        assert row["details"]["accelerator"][0]["bound"] in ("compute", "memory")
        assert row["chosen"] == data["result"]["choice"][row["name"]]
        assert sum(row["histogram"]["counts"]) <= row["parameters"]
    assert [row["name"] for row in data["layers"]] == list(result.problem.errors)
    assert Recipe.from_json((tmp_path / "run" / "recipe.json").read_text()) == result.recipe
    assert len(data["pareto"]) == 5
    for point, found in zip(data["pareto"], result.pareto, strict=True):
        assert Recipe.from_json((tmp_path / "run" / point["recipe"]).read_text()) == found.recipe
        assert point["error"] == found.error and point["measured"]["size"] > 0
    assert data["greedy"]["speedups"]["accelerator"] >= 2 and len(data["uniform"]) == 3
    assert data["history"][0]["name"] == "round 1"


def test_the_same_run_writes_the_same_bytes(result, tmp_path):
    for name in ("a", "b"):
        write_run(result, tmp_path / name)
    assert (tmp_path / "a" / "search.json").read_bytes() == (tmp_path / "b" / "search.json").read_bytes()


def test_an_earlier_run_is_replaced(result, tmp_path):
    write_run(result, tmp_path)
    (tmp_path / "pareto" / "99.json").write_text("{}")
    write_run(result, tmp_path)
    assert sorted(path.name for path in (tmp_path / "pareto").iterdir()) == [f"{i:02d}.json" for i in range(1, 6)]


def test_histograms_show_the_levels():
    subject = search(mlp(), mlp_batches(), constraint=MaxSize(500), candidates=[4], cache=None).subject
    found = histogram(subject, "0", Recipe(weights="s4r2", granularity="tensor").layer("0"))
    weight = subject.layers["0"].weight
    units = (weight / weight.square().mean(1, keepdim=True).sqrt()).numpy()
    counts, _ = np.histogram(units, len(found["counts"]), (found["low"], found["high"]))
    assert np.abs(counts - np.array(found["counts"])).sum() <= 2 and found["outside"] == 0
    assert found["format"] == "s4r2" and found["share"] == 1 and len(found["levels"]) == 15
    assert max(found["levels"]) > 0.5 and found["sqnr"] > 10
    assert "levels" not in histogram(subject, "0", None)


def test_attention_has_a_histogram(result):
    assert histogram(result.subject, "attention", Recipe(weights=4).layer("attention"))["levels"]
    assert not torch.is_inference_mode_enabled()


def test_shapes_only(tmp_path):
    write_run(search_shapes(network("resnet18"), constraint=Speedup(4.0), cost=AcceleratorCost()), tmp_path / "run")
    data = read_run(tmp_path / "run")
    assert data["kind"] == "shapes" and data["sensitivity"] == "shape only" and data["result"]["error"] is None
    assert "histogram" not in data["layers"][0] and data["command"] is None


def test_directories_of_others_are_left_alone(result, tmp_path):
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path, "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(DyBitError, match=message):
            check_target(path)
        with pytest.raises(DyBitError, match=message):
            write_run(result, path)
    check_target(tmp_path / "new")


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(DyBitError, match=r"no search\.json"):
        read_run(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(DyBitError, match="not of version 1"):
        read_run(tmp_path)
