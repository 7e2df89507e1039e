"""Tests of the command line as a whole: start-up, errors, `table`, `doctor`."""

import os
import re
import subprocess
import sys

import pytest
import typer
from command_line import invoke
from typer.testing import CliRunner

from dybit.cli.console import fail, guarded, size
from dybit.errors import DyBitError

COMMANDS = (
    "demo",
    "table",
    "compare",
    "quantize",
    "evaluate",
    "bench",
    "search",
    "report",
    "export",
    "import",
    "info",
    "doctor",
)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dybit", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dybit {command}" in " ".join(result.stdout.split())


def test_no_arguments_show_the_help():
    result = invoke()
    assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("table", "4"), ("table", "nf4")], ids=" ".join)
def test_light_commands_do_not_load_torch(words):
    code = f"import sys; sys.argv = ['dybit', *{words!r}]; from dybit.cli import main; code = main() or 0; "
    code += "sys.exit(code or ('torch' in sys.modules) * 3)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_that_torch_would_be_noticed():
    code = "import torch, sys; sys.exit(('torch' in sys.modules) * 3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 3


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("tabel",), "'?tabel'?"),
        (("table",), "(?i)missing argument"),
        (("table", "4", "--bogus"), "--bogus"),
        (("table", "4", "--max-run", "x"), "--max-run.*integer"),
        (("table", "q4"), "BITS|NAME 'q4'.*u4"),
        (("table", "9"), "bits.*not 9"),
    ],
)
def test_errors_are_one_line_and_code_2(words, pattern):
    result = run(*words)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"dybit: [^\n]+\n", result.stderr), result.stderr
    assert re.search(pattern, result.stderr)


def test_a_traceback_on_demand():
    assert "Traceback" in run("table", "q4", DYBIT_DEBUG="1").stderr
    assert "Traceback" not in run("table", "q4", DYBIT_DEBUG="0").stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m dybit table 8 | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.startswith("DyBit, 8 bits") and result.stderr == ""


def test_control_c_is_one_line_and_code_130():
    command = typer.Typer()

    @command.command()
    @guarded
    def interrupted() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(command, [])
    assert result.exit_code == 130 and result.stderr.count("\n") == 1


def test_messages_of_several_lines_become_one(capsys):
    fail("a\n  b")
    assert capsys.readouterr().err == "dybit: a b\n"


def test_errors_of_files_name_the_file():
    command = typer.Typer()

    @command.command()
    @guarded
    def broken() -> None:
        open("/nowhere/x")  # noqa: PTH123, SIM115

    result = CliRunner().invoke(command, [])
    assert result.exit_code == 2 and "'/nowhere/x': No such file" in result.stderr


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (90_300_000, "90.3 MB"), (2e9, "2.0 GB")])
def test_sizes(count, text):
    assert size(count) == text


def test_table_of_a_width_shows_the_plain_variants_side_by_side():
    text = invoke("table", "4").stdout
    assert re.search(r"111 +0111 +1\.75 +0111 +3 +0111 +4", text)
    assert "s4r2mid" in text and "and +2.5 (spare)" in text


def test_table_of_one_format():
    text = invoke("table", "2").stdout
    assert "spare (negative zero becomes 2)" in text and "and +2 (spare)" in text
    text = invoke("table", "2", "--spare").stdout
    assert "s2spare" in text and re.search(r"2 +10 +2 +2\b", text)
    text = invoke("table", "4", "--max-run", "2", "--spare").stdout
    assert "s4r2spare" in text and re.search(r"8 +1000 +10 +2\.5", text)
    assert "± 0.125" in invoke("table", "dybit4mid").stdout
    assert re.search(r"15 +1111 +1\n", invoke("table", "nf4").stdout)
    assert "unused" in invoke("table", "e4m3fn").stdout


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", ["--signed", "--unsigned"])
def test_table_of_every_width(bits, sign):
    result = invoke("table", str(bits), sign)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 160


def test_table_options_go_with_widths():
    result = invoke("table", "nf4", "--spare")
    assert result.exit_code == 2 and "not with the name 'nf4'" in result.stderr


def test_table_does_not_lose_bits_of_codes_at_any_width_of_the_terminal():
    text = run("table", "4", COLUMNS="80").stdout
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_doctor():
    text = invoke("doctor").stdout
    assert all(word in text for word in ("torch", "threads", "instruction set", "extra [plot]", "model smollm2"))


def test_guarded_keeps_errors_that_are_not_the_users():
    @guarded
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()


def test_a_defect_is_called_one(monkeypatch, capsys):
    module = sys.modules["dybit.cli.app"]
    monkeypatch.setattr(module, "app", lambda **_: 1 / 0)
    assert module.main() == 1 and "a defect of dybit" in capsys.readouterr().err


def test_guarded_passes_the_sentence_on(capsys):
    @guarded
    def bad() -> None:
        raise DyBitError("weights [0] are bad")

    with pytest.raises(typer.Exit):
        bad()
    assert capsys.readouterr().err == "dybit: weights [0] are bad\n"


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
