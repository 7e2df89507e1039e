import re
import subprocess
import sys

import pytest
import typer
from command_line import run
from typer.testing import CliRunner

from dybit.cli.console import fail, guarded, size
from dybit.errors import DyBitError


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("tabel",), "'?tabel'?"),
        (("tabel",), "(?i)did you mean 'table'.*Try: dybit --help"),
        (("info",), "(?i)missing argument.*Try: dybit info --help"),
        (("table", "4", "--bogus"), "--bogus.*Try: dybit table --help"),
        (("table", "4", "--max-run"), "--max-run.*requires an argument.*Try: dybit table --help"),
        (
            ("quantize", "m", "--weight", "4"),
            r"No such option: --weight\. Did you mean --weights\? Try: dybit quantize",
        ),
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


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("group_size=8 does not fit granularity='channel'", "--group-size 8 does not fit --granularity channel"),
        ("algorithm 'gptq' needs calibration; pass calibration=batches",
         "algorithm 'gptq' needs calibration; pass --calibration"),
        ("scale must be one of null, fp32, bf16, not 'x'", "--scale must be one of fp32, bf16, not 'x'"),
        ("group_size must be a positive integer or None, not 8", "--group-size must be a positive integer, not 8"),
        ("scale must be one of null, fp32, not 'y'", "scale must be one of null, fp32, not 'y'"),
        ("other=8 and 'scale=1' stay", "other=8 and 'scale=1' stay"),
        ("--recipe 'r.json': group_size=8 is bad", "--recipe 'r.json': group_size=8 is bad"),
    ],
)  # fmt: skip
def test_errors_name_options(message, said):
    command = typer.Typer()

    @command.command()
    @guarded
    def failing(group_size: int = 8, granularity: str = "", scale: str = "x", calibration: str = "") -> None:
        raise DyBitError(message)

    result = CliRunner().invoke(command, [])
    assert result.exit_code == 2 and result.stderr == f"dybit: {said}\n"


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
