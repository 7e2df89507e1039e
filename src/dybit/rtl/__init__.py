"""The accelerator in hardware, written in Amaranth. Needs the extra ``dybit[rtl]``."""

from __future__ import annotations

import re

from dybit.accelerator.config import Config
from dybit.errors import MissingExtraError

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
