"""Tests of the command line as a whole: start-up, errors, `table`, `doctor`."""

import subprocess
import sys

import pytest
from command_line import invoke

COMMANDS = (
    "demo",
    "table",
    "compare",
    "quantize",
    "evaluate",
    "bench",
    "chat",
    "search",
    "report",
    "export",
    "import",
    "info",
    "doctor",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dybit {command}" in " ".join(result.stdout.split())


def test_no_arguments_show_the_help():
    result = invoke()
    assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)
    assert "Quantize PyTorch models to 2 to 8 bits per weight, and run them." in result.stdout


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("table", "4"), ("table", "nf4")], ids=" ".join)
def test_light_commands_do_not_load_torch(words):
    code = f"import sys; sys.argv = ['dybit', *{words!r}]; from dybit.cli import main; code = main() or 0; "
    code += "sys.exit(code or ('torch' in sys.modules) * 3)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_that_torch_would_be_noticed():
    code = "import torch, sys; sys.exit(('torch' in sys.modules) * 3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 3
