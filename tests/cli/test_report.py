"""`dybit report`: from the directory of a search to a page."""

import html
import json
import re
import shutil

import pytest
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from searched import batches, net
from typer.testing import CliRunner

from dybit import Speedup, search
from dybit.accelerator import Config
from dybit.accelerator.cost import AcceleratorCost
from dybit.cli import app
from dybit.mixed_precision.run_directory import write_run
from dybit.mixed_precision.shape_search import search_shapes
from dybit.models.coverage import Coverage
from dybit.workloads.networks import network

pytest.importorskip("plotly")


def invoke(*words: str):
    return CliRunner().invoke(app, ["report", *words])


def charts(path) -> dict:
    data = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(data[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    result = search(
        net(),
        batches(),
        constraint=Speedup(2.0),
        cost=AcceleratorCost(Config(rows=4, columns=4)),
        candidates=["8/8", "4/8", "2/2", "fp32"],
        pareto=4,
        baselines=True,
        cache=tmp_path_factory.mktemp("cells"),
    )
    return write_run(
        result, tmp_path_factory.mktemp("runs") / "run", model="a net", command=["dybit", "search", "a net"]
    )


def test_a_page_of_a_search(run, tmp_path):
    path = tmp_path / "page.html"
    result = invoke(str(run), "-o", str(path))
    assert result.exit_code == 0 and "wrote" in result.stdout, result.output
    document, drawn = json.loads((run / "search.json").read_text()), charts(path)
    assert set(drawn["charts"]) >= {"pareto", "strip", "sensitivity", "costs", "rivals", "histogram-0"}
    assert len(drawn["points"]) == len(document["pareto"]) + len(document["uniform"]) + 1
    assert all(json.loads(point["recipe"]) for point in drawn["points"][: len(document["pareto"])])
    chosen = drawn["points"][-1]
    speed = document["result"]["speedups"]["accelerator"]
    assert chosen["gain"] == pytest.approx(speed) and json.loads(chosen["recipe"])
    bits = [document["candidates"][layer["chosen"]]["bits"][0] or 0 for layer in document["layers"]]
    assert chosen["weights"] == bits
    text = path.read_text(encoding="utf-8")
    assert str(Coverage.from_dict(document["coverage"])) in html.unescape(text)
    assert f"at {speed:.2f} times as fast" in text and "dybit search &#39;a net&#39;" in text


def test_a_page_of_shapes(tmp_path):
    result = search_shapes(network("resnet18"), constraint=Speedup(3.0), cost=AcceleratorCost(), pareto=4)
    write_run(result, tmp_path / "run", model="resnet18")
    path = tmp_path / "page.html"
    assert invoke(str(tmp_path / "run"), "-o", str(path)).exit_code == 0
    assert "shapes only" in path.read_text(encoding="utf-8") and "rivals" not in charts(path)["charts"]


def test_bad_runs_and_paths(run, tmp_path):
    for words, sentence in (
        ((str(tmp_path), "-o", str(tmp_path / "p.html")), "holds no search.json"),
        ((str(run), "-o", str(tmp_path / "p.pdf")), "must end in .html"),
        ((str(run), "-o", str(tmp_path / "no" / "p.html")), "cannot|can be written"),
    ):
        result = invoke(*words)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and re.search(sentence, result.stderr)
    document = json.loads((run / "search.json").read_text())
    (tmp_path / "recipe.json").write_text((run / "recipe.json").read_text())
    for change, sentence in (
        ({"layers": [{}]}, "is not what dybit search wrote"),
        ({"pareto": [document["pareto"][0] | {"recipe": "../../secret.json"}]}, "lies outside"),
        ({"version": 99}, "not of version"),
    ):
        (tmp_path / "search.json").write_text(json.dumps(document | change))
        result = invoke(str(tmp_path), "-o", str(tmp_path / "p.html"))
        assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    assert not (tmp_path / "p.html").exists()


def test_malformed_runs_are_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    folder, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(run, folder)
    good = json.loads((folder / "search.json").read_text())
    refused = []

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=mutated(good))
    def check(data):
        (folder / "search.json").write_text(json.dumps(data))
        result = invoke(str(folder), "-o", str(page))
        assert result.exit_code in (0, 2) and result.stderr.count("\n") == (result.exit_code == 2), result.stderr
        refused.append(result.stderr)

    check()
    assert len(set(refused)) > 10
    free = good["result"] | {"costs": dict.fromkeys(good["result"]["costs"], 0), "measured": {}}
    (folder / "search.json").write_text(json.dumps(good | {"result": free}))
    assert "is not what dybit search wrote" in invoke(str(folder), "-o", str(page)).stderr
