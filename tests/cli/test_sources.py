import os
import sys

import pytest
from command_line import invoke

from dybit.cli import sources

PIPES = {
    "info": ("info", "DIR", "dybit.json"),
    "info_tensors": ("info", "DIR", "model.safetensors"),
    "file": ("quantize", "PIPE", "-o", "out", "m.safetensors"),
    "index": ("quantize", "PIPE", "-o", "out", "m.safetensors.index.json"),
    "recipe": ("quantize", "torch.nn:Identity", "-o", "out", "--recipe", "PIPE", "r.json"),
    "array": ("quantize", "torch.nn:Identity", "-o", "out", "--calibration", "PIPE", "d.npy"),
    "text": ("evaluate", "torch.nn:Identity", "--data", "PIPE", "d.txt"),
    "compare": ("compare", "PIPE", "m.safetensors"),
    "import_gguf": ("import", "PIPE", "-o", "out", "m.gguf"),
    "import_onnx": ("import", "PIPE", "-o", "out", "m.onnx"),
    "import_config": ("import", "DIR", "-o", "out", "config.json"),
    "workload": ("simulate", "PIPE", "w.json"),
    "config": ("simulate", "resnet18", "--config", "PIPE", "c.toml"),
    "run": ("report", "DIR", "search.json"),
}


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
@pytest.mark.parametrize("name", PIPES)
def test_pipes_are_not_waited_for(tmp_path, monkeypatch, name):
    *words, file = PIPES[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    if name == "info_tensors":
        from torch import nn

        import dybit

        folder.rmdir()
        dybit.save(dybit.quantize_(nn.Sequential(nn.Linear(8, 8)), dybit.Recipe()), folder)
        (folder / file).unlink()
    os.mkfifo(folder / file)
    result = invoke(*({"DIR": str(folder), "PIPE": str(folder / file)}.get(word, word) for word in words))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, (result.stderr, result.exception)
    assert str(folder) in result.stderr and ("is a pipe, not a file" in result.stderr or "is no file" in result.stderr)
    assert not (tmp_path / "out").exists()


def test_models_come_in_evaluation_mode(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trained.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 4)).train()\n"
    )
    model = sources.load_model("trained:net")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nearly.net", "'nearly.net' does not exist; did you mean 'nearly:net'?"),
        ("nearly.py", "'nearly.py' is a Python file; name a function in it, as in nearly:FUNCTION"),
        ("pack/inner.py", "'pack/inner.py' is a Python file; name a function in it, as in pack.inner:FUNCTION"),
        ("pack.inner.net", "'pack.inner.net' does not exist; did you mean 'pack.inner:net'?"),
        ("broken.inner.net", "'broken.inner.net' does not exist"),
        ("nothing.net", "'nothing.net' does not exist"),
    ],
)
def test_words_that_nearly_name_a_function(tmp_path, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for folder in ("pack", "broken"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("" if folder == "pack" else "raise RuntimeError")
        (tmp_path / folder / "inner.py").write_text("")
    (tmp_path / "nearly.py").write_text("def net(): pass\n")
    result = invoke("quantize", word, "-o", "out")
    assert result.exit_code == 2 and result.stderr.rstrip().endswith(f"but {said}")
    if not word.endswith(".py"):
        result = invoke("quantize", "torch.nn:Identity", "-o", "out", "--calibration", word)
        assert result.exit_code == 2 and result.stderr.rstrip().endswith(f"but {said}")
    for name in ("nearly", "pack", "pack.inner"):
        sys.modules.pop(name, None)
