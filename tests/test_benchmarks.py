"""Tests of what benchmarks store, and that all of them store it so."""

import argparse
import ast
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.measure.timing import Timing
from dybit.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"
SHARED = {"results", "networks", "forward_memory", "texts"}  # modules that the benchmarks import
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if file.stem not in SHARED)
_spec = importlib.util.spec_from_file_location("benchmark_results", FOLDER / "results.py")
results = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = results
_spec.loader.exec_module(results)

DOC = "Speed of a thing.\n\nTimes are medians.\n"
COLUMNS = (results.Column("model", "model"), results.Column("ms", "ms", 1), results.Column("ratio", "faster", 2, "×"))
ROW = {"model": "a|b", "ms": 1 / 3, "ratio": [1.5, 2.0, 2.25]}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """A commit without changes, and no arguments of the test runner in the command."""
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rounds", "3 or more"])


def started(folder, again=False, columns=COLUMNS):
    options = argparse.Namespace(results=folder, again=again)
    return results.Results("/somewhere/speed.py", DOC, columns, options, {"W4": Recipe(weights=4)})


def stored(folder):
    return json.loads((folder / "speed.json").read_text())


def test_a_row_is_stored_with_all_that_it_takes_to_repeat_it(tmp_path):
    with started(tmp_path) as record:
        record.fact("Memory", "17 GB/s")
        record.add(**ROW)
    data = stored(tmp_path)
    assert data["command"] == "python benchmarks/speed.py --rounds '3 or more'"
    assert data["recipes"] == {"W4": Recipe(weights=4).to_dict()}
    assert data["rows"] == [{"model": "a|b", "ms": 0.333333, "ratio": [1.5, 2.0, 2.25]}]
    assert data["complete"] and data["facts"] == {"Memory": "17 GB/s"}
    assert data["commit"] == "0123456789ab" and set(data["versions"]) == {"dybit", "torch", "Python"}
    assert data["cores"] >= 1 and data["threads"] >= 1 and data["processor"] and data["kernels"]


def test_the_page_shows_every_row_and_fact(tmp_path):
    with started(tmp_path) as record:
        record.fact("Memory", "17 GB/s")
        record.add(**ROW)
        record.add(model="c", ms=12.0)
    page = (tmp_path / "speed.md").read_text()
    assert page == results.page(stored(tmp_path))
    assert "# Speed of a thing\n\nTimes are medians.\n" in page
    assert "| a\\|b | 0.3 | 2.00× (1.50 to 2.25) |\n| c | 12.0 |  |\n" in page
    for text in ("`python benchmarks/speed.py", "0123456789ab", "| Memory | 17 GB/s |", '| Recipe W4 | `{"version"'):
        assert text in page
    assert "Not complete" not in page


def test_cells_in_words():
    columns = [{"key": key, "digits": 2, "unit": unit} for key, unit in (("a", " %"), ("b", ""), ("c", ""), ("d", "×"))]
    assert results.cells({"a": [81.234, 2.5], "b": 3, "d": 2.0}, columns) == ["81.23 ± 2.50 %", "3", "", "2.00×"]


def test_columns_without_a_value_are_left_out(tmp_path):
    with started(tmp_path, columns=(*COLUMNS, results.Column("onnx", "to ONNX Runtime"))) as record:
        record.add(**ROW)
    assert "ONNX" not in (tmp_path / "speed.md").read_text()


def test_an_interrupted_measurement_is_marked_and_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt), started(tmp_path) as record:
        record.add(**ROW)
        raise KeyboardInterrupt
    assert not stored(tmp_path)["complete"]
    assert "Not complete" in (tmp_path / "speed.md").read_text()
    with started(tmp_path) as record:
        assert record.has(model="a|b") and not record.has(model="c")
        record.add(model="c", ms=1.0)
    assert stored(tmp_path)["complete"] and [row["model"] for row in stored(tmp_path)["rows"]] == ["a|b", "c"]


@pytest.mark.parametrize("change", ["again", "command", "commit", "uncommitted"])
def test_rows_of_another_measurement_are_not_kept(tmp_path, monkeypatch, change):
    if change == "uncommitted":
        monkeypatch.setattr(results, "commit", lambda: "0123456789ab, changed")
    with started(tmp_path) as record:
        record.add(**ROW)
    if change == "command":
        monkeypatch.setattr(sys, "argv", ["speed.py"])
    if change == "commit":
        monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    assert not started(tmp_path, again=change == "again").rows


def test_a_file_that_is_no_json_is_an_error(tmp_path):
    (tmp_path / "speed.json").write_text("{")
    with pytest.raises(DyBitError, match=r"speed\.json holds no results"):
        started(tmp_path)


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert not results.commit().isalnum()  # no repository
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("1\n")
    (tmp_path / "notes").write_text("1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    (tmp_path / "notes").write_text("2\n")
    assert results.commit() == head[:12]
    (tmp_path / "src" / "code.py").write_text("2\n")
    assert results.commit() == f"{head[:12]}, changed"


def test_times_become_cells():
    first, second = Timing(0.004, 0.003, 0.005, 1.0, 0.9, 1.1, 5), Timing(0.002, 0.001, 0.003, 2.0, 1.8, 2.2, 5)
    row = results.compared({"fp32": first, "fused": second})
    assert row == {"fp32_ms": 4.0, "fused_ms": 2.0, "fused_ratio": [1.8, 2.0, 2.2]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_every_benchmark_stores_its_results_so(script):
    tree = ast.parse(script.read_text())
    title, _, about = ast.get_docstring(tree).partition("\n\n")
    assert "\n" not in title and title.endswith(".") and about
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert {"parser", "Results"} <= called
    given = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not given & {"--json", "--output", "--report"}


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda file: file.stem)
def test_pages_are_those_of_their_files(file):
    data = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == results.page(data)
    assert data["complete"] and data["commit"].isalnum() and (FOLDER / f"{file.stem}.py").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_names_that_a_benchmark_imports_exist(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dybit":
            module = importlib.import_module(node.module)
            for alias in node.names:
                known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert known, f"{node.module}.{alias.name}"


@pytest.mark.parametrize(
    ("name", "options", "count", "figure"),
    [
        ("quantizer", ("--rows", "16", "--columns", "128", "--rounds", "1"), 8, "kernels"),
        ("stream", ("--gigabytes", "0.1", "--formats", "s4r3"), 1, "rate"),
        ("qat_step", ("--rounds", "1"), 4, "fp32_ms"),
    ],
)
def test_a_benchmark_stores_its_rows(tmp_path, name, options, count, figure):
    words = [*options, "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / f"{name}.json").read_text())
    assert data["complete"] and len(data["rows"]) == count and all(row[figure] > 0 for row in data["rows"])


def imported(monkeypatch, name):
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_whole_models_beside_their_peers(tmp_path, monkeypatch):
    """A small network through the whole script, with ONNX Runtime and OpenVINO if it is installed."""
    models = imported(monkeypatch, "models")
    small = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, 4), nn.Flatten(), nn.Linear(784, 10))
    monkeypatch.setattr(models, "CASES", {"small": models.Case(lambda: small.eval(), pretrained=True)})
    monkeypatch.setattr(models, "pictures", lambda split, count, batch: [torch.rand(batch, 3, 224, 224)] * count)
    monkeypatch.setattr(models, "peak_of_forward", lambda *_: 5_000_000)
    monkeypatch.setattr(models, "rates", lambda threads: (200.0, 20.0))
    words = ["--models", "small", "--threads", "1", "--rounds", "5", "--algorithm", "rtn", "--judged", "16"]
    monkeypatch.setattr(sys, "argv", ["models.py", *words, "--results", str(tmp_path)])
    threads = torch.get_num_threads()
    models.main()
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    names = [row["contestant"] for row in rows if row["inputs"] == "8 images"]
    assert {"torch FP32", "ONNX Runtime INT8", "dybit W4A8", "dybit W4A8, not fused", "dybit W4A4"} <= set(names)
    assert names[0] == "torch FP32" and len(rows) == 2 * len(names)
    found = {row["contestant"]: row for row in rows if row["inputs"] == "1 image"}
    assert len(found["dybit W4A8"]["int8"]) == 3 and found["dybit W4A8"]["floor"] > 0
    assert found["dybit W4A8"]["memory"] == found["torch FP32"]["memory"] == 5 and "memory" not in found["dybit W4A4"]
    assert found["dybit W8A8"]["sqnr"] > found["dybit W4A4"]["sqnr"] and found["ONNX Runtime INT8"]["agreement"]


def test_networks_have_their_shapes(monkeypatch):
    networks = imported(monkeypatch, "networks")
    sizes = {"resnet18": 11_689_512, "mobilenet_v2": 3_504_872, "deit_tiny": 5_717_416}  # of the papers' models
    for name, size in sizes.items():
        model = networks.settle(getattr(networks, name)(), [torch.rand(2, 3, 224, 224)])
        assert sum(p.numel() for p in model.parameters()) == size and not model.training
        with torch.no_grad():
            assert model(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


def test_memory_of_a_forward(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    memory = importlib.import_module("forward_memory")  # by the name under which a new process finds it
    found = memory.peak_of_forward(partial(nn.Linear, 4096, 1024), None, torch.ones(4096, 4096), 1, extension.isa())
    assert found is None or 32e6 < found < 64e6  # 16.8 MB of weights and as many of outputs


def test_uniform_recipes_of_the_search_by_name_or_word(monkeypatch):
    search = imported(monkeypatch, "search")
    assert search.names_of(["8/8", "4/8"], None) == {"W8A8", "W4A8"}
    assert search.names_of(["8/8", "4/8"], ["4/8"]) == search.names_of(["8/8", "4/8"], ["W4A8"]) == {"W4A8"}
    with pytest.raises(DyBitError, match="--against must name candidates, among 8/8, 4/8, not 5/5"):
        search.names_of(["8/8", "4/8"], ["5/5"])


def test_texts_of_packages(tmp_path, monkeypatch):
    texts = imported(monkeypatch, "texts")
    pages = tmp_path / "usr/share/doc/debian-handbook/html/en-US"
    quotes = tmp_path / "usr/share/games/fortunes"
    pages.mkdir(parents=True)
    quotes.mkdir(parents=True)
    (pages / "b.html").write_text("<p>Last.</p>")
    (pages / "a.html").write_text(
        "<title>T</title><div>One <b>bold</b>\nword.<pre>code</pre></div><p>Two &amp; three.</p>"
    )
    (quotes / "wit").write_text("First.\n%\nSecond\nline.\n%\n")
    (quotes / "wit.dat").write_bytes(b"\xff")
    found = {name: texts.text_file(name, tmp_path, tmp_path).read_text().split("\n\n") for name in texts.TEXTS}
    assert [part for part in found["handbook"] if part] == ["One bold word.", "Two & three.", "Last."]
    assert found["quotations"][:2] == ["First.", "Second\nline."]
    with pytest.raises(DyBitError, match="does not hold the text 'handbook'; install its Debian package"):
        texts.text_file("handbook", quotes, tmp_path)


def test_words_of_the_benchmark_of_language_models(monkeypatch):
    language = imported(monkeypatch, "ptq_language")
    assert language.recipe("dybit4:32?scale=e4m3/auto@both") == Recipe(
        "dybit4", group_size=32, scale="e4m3", embeddings=None
    )
    rounded = language.recipe("nf4+int8:64/rtn")
    assert (rounded.weights, rounded.activations, rounded.activation_group_size) == ("nf4", "int8", 64)
    monkeypatch.setattr(language, "own_text", lambda *_, sequences, length: [f"own {i}" for i in range(sequences)])
    monkeypatch.setattr(language.dybit.demo, "smollm2", lambda: None, raising=False)
    windows = lambda split, batches: [f"{split} {i}" for i in range(batches)]  # noqa: E731
    monkeypatch.setattr(language.dybit.demo, "smollm2_batches", windows, raising=False)
    assert language.calibration("both", 2048) == ["own 0", "own 1", "calibration 0", "calibration 2"]
    assert len(language.calibration("reference", 2048)) == len(language.calibration("own", 2048)) == 4
    with pytest.raises(DyBitError, match="calibrated on 'poems'; use reference, own or both"):
        language.calibration("poems", 2048)
