import json

from chatting import save
from command_line import invoke

from dybit.cli.generation import rates


def test_a_model_as_it_is_and_fused(tmp_path):
    save(tmp_path / "model")
    result = invoke(
        "bench", "--generate", str(tmp_path / "model"), "--json", str(tmp_path / "x.json"), "--threads", "1"
    )
    assert result.exit_code == 0, result.stderr
    assert "as it is" in result.stdout and "fused" in result.stdout and "%" in result.stdout
    found = json.loads((tmp_path / "x.json").read_text())["rates"]
    assert found["as it is"]["floor"] is None and found["fused"]["floor"] > 0
    assert all(rate[name] > 0 for rate in found.values() for name in ("prompt", "decode"))


def test_the_prompt_fits_the_positions(tmp_path):
    assert rates(save(tmp_path), rounds=1).decode > 0


def test_wrong_arguments(tmp_path):
    result = invoke("bench", "--generate", str(tmp_path / "none"))
    assert result.exit_code == 2 and "--generate" in result.stderr
    result = invoke("bench", "--generate", str(tmp_path), "--shapes", "1x2x3")
    assert result.exit_code == 2 and "or --generate alone" in result.stderr
