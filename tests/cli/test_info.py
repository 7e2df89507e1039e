import sys

from command_line import MODULE, good, invoke


def test_info_of_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    result = invoke("info", str(tmp_path / "no"))
    assert result.exit_code == 2 and "is not a dybit checkpoint" in result.stderr
    good("quantize", "mine:net", "-o", str(tmp_path / "q"))
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    result = invoke("info", str(tmp_path / "q"))
    assert result.exit_code == 2 and "damaged" in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "q" / "dybit.json").write_text("{")
    assert "not valid JSON" in invoke("info", str(tmp_path / "q")).stderr
