"""Tests of `dybit compare MODEL --data DATA`: the grid, its file of results, and what it writes."""

import csv
import json
import os
import re
import sys

import pytest
from command_line import MODULE, invoke

from dybit.cli import grid


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "theirs.py").write_text(MODULE)
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop("theirs", None)  # other tests have another module of that name
    yield folder
    sys.modules.pop("theirs", None)
    sys.path.remove(str(folder))
    os.chdir(before)


@pytest.fixture
def counted(monkeypatch):
    """The cells that are run."""
    ran, original = [], grid.measure
    monkeypatch.setattr(grid, "measure", lambda cell: ran.append((cell.weights, cell.algorithm)) or original(cell))
    return ran


WORDS = ("compare", "theirs:net", "--data", "theirs:data", "--bits", "3,4", "--formats", "int{},dybit{}spare,nf4")
WORDS += ("--algorithm", "rtn+gptq", "--group-size", "8")


def test_a_grid_is_run_once(tmp_path, counted):
    kept, table = tmp_path / "r.jsonl", tmp_path / "t.csv"
    result = invoke(*WORDS, "--results", str(kept), "--csv", str(table))
    assert result.exit_code == 0, result.stderr
    assert counted[0] == ("fp32", "rtn") and len(counted) == 11
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["weights"], row["algorithm"]) for row in rows] == counted
    found = {(row["weights"], row["algorithm"]): row for row in rows}
    for name in ("int3", "dybit4spare", "nf4"):
        assert found[name, "gptq"]["sqnr"] != found[name, "rtn"]["sqnr"]
    # Codes of 4 bits, an FP32 scale for 8 of them, and a bit for which of two variants.
    assert float(found["nf4", "rtn"]["bits"]) == 8.0 and float(found["dybit4spare", "rtn"]["bits"]) > 8.1
    again = invoke(*WORDS, "--results", str(kept))
    assert again.exit_code == 0 and len(counted) == 11 and again.stdout == result.stdout
    assert "11 of 11 results are already in" in again.stderr


def test_an_interrupted_grid_goes_on(tmp_path, counted):
    kept = tmp_path / "r.jsonl"
    assert invoke(*WORDS, "--results", str(kept)).exit_code == 0
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:4]) + lines[4][:50])
    result = invoke(*WORDS, "--results", str(kept))
    assert result.exit_code == 0 and "4 of 11 results are already in" in result.stderr and len(counted) == 11 + 7
    assert len([json.loads(line) for line in kept.read_text().splitlines()]) == 11


@pytest.mark.parametrize("name", ["p.svg", "p.html"])
def test_pictures_and_pages(tmp_path, name):
    path = tmp_path / name
    result = invoke(*WORDS[:4], "--bits", "2,4", "-o", str(path), "--batches", "1")
    assert result.exit_code == 0, result.stderr
    assert path.stat().st_size > 5000
    if name.endswith("html"):
        page = path.read_text()
        assert page.count("<tr") == 8
        assert "Spearman" in page and "PPL" not in page  # no language model: no column of it


def test_workers_give_the_same(tmp_path):
    tables = []
    for workers in ("1", "2"):
        result = invoke(*WORDS[:4], "--formats", "int4,nf4", "--workers", workers, "--batches", "1")
        assert result.exit_code == 0, result.stderr
        tables.append([line.rpartition(" ")[0].rstrip() for line in result.stdout.splitlines()])
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits", "9"), "--bits must be 2 to 8, not 9"),
        (("--bits", "x"), "--bits must be widths separated by commas, not 'x'"),
        (("--formats", "int{},q{}"), "q4"),
        (("--formats", ","), "--formats must name at least one format"),
        (("--algorithm", "gptw"), "--algorithm 'gptw'"),
        (("--method", "absmax"), "do not go with --data"),
        (("--results", "theirs.py"), "--results 'theirs.py', line 1, is not a result"),
    ],
)
def test_bad_input(words, message):
    result = invoke("compare", "theirs:net", "--data", "theirs:data", *words)
    assert result.exit_code == 2 and re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gaussian", "--bits", "3,4"), "--bits 3,4 needs --data"),
        (("--gaussian", "--algorithm", "gptq"), "--algorithm needs --data"),
        (("--data", "theirs:data"), "--data 'theirs:data' needs a MODEL"),
    ],
)
def test_what_needs_data(words, message):
    result = invoke("compare", *words)
    assert result.exit_code == 2 and message in result.stderr
