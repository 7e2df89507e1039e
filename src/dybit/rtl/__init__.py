"""The accelerator in hardware, written in Amaranth. Must not know torch; needs the extra ``dybit[rtl]``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from dybit.accelerator.config import Config
from dybit.errors import DyBitError, MissingExtraError

# Memories are filled before they are read. Without the zeros, a bit each for Yosys to read and a line a word to write,
# the text is many times shorter, and there in a third of the time.
_ZEROED = re.compile(
    r"  cell \$meminit_v2 [^\n]+\n(?:    (?!connect \\DATA)[^\n]+\n)+    connect \\DATA \d+'0+\n.*?  end\n", re.DOTALL
)


def verilog(config: Config | None = None, *, name: str = "accelerator") -> str:
    """Returns the accelerator as Verilog.

    Args:
        config: The accelerator; its defaults if None.
        name: Name of the top module.

    Raises:
        DyBitError: There is no hardware for ``config``.
        MissingExtraError: Amaranth is not installed.
    """
    config = config or Config()
    try:
        from amaranth.back import rtlil
        from amaranth.back.verilog import _convert_rtlil_text as convert

        from dybit.rtl.accelerator import Accelerator, check_hardware
        from dybit.rtl.shared import Shared
    except ImportError as error:
        raise MissingExtraError(f"Verilog needs Amaranth and its Yosys: pip install 'dybit[rtl]' ({error})") from error
    check_hardware(config)
    shared = Shared(name)
    texts = [rtlil.convert(Accelerator(config, shared), name=name, emit_src=False)]
    texts += [rtlil.convert(part, name=f"{name}_{kind}", emit_src=False) for kind, part in shared.parts.items()]
    return "\n".join(convert(_ZEROED.sub("", text)) for text in texts)


def rtl_command(
    output: str | Path, rows: int | None = None, columns: int | None = None, config: str | Path | None = None
) -> str:
    """Does the work of ``dybit rtl``: writes the Verilog and returns a sentence that says what was written.

    Args:
        output: Path of the Verilog file.
        rows: Rows of the array, in place of the config's.
        columns: Columns of the array, in place of the config's.
        config: Path of a TOML file; the defaults if None.

    Raises:
        DyBitError: The parameters are wrong or a file cannot be read or written.
        MissingExtraError: Amaranth is not installed.
    """
    machine = Config() if config is None else Config.load(config)
    machine = replace(
        machine,
        rows=machine.rows if rows is None else rows,
        columns=machine.columns if columns is None else columns,
    )
    text = verilog(machine)
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DyBitError(f"output must be a file that can be written, not {str(output)!r}: {error}") from error
    return f"{output}: {machine.rows} x {machine.columns} array, {text.count(chr(10)):,} lines of Verilog"
