"""The accelerator in hardware, written in Amaranth. Must not know torch; needs the extra ``dybit[rtl]``."""

from __future__ import annotations

from dybit.accelerator.config import Config
from dybit.errors import MissingExtraError


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
        from amaranth.back import verilog as back

        from dybit.rtl.accelerator import Accelerator, check_hardware
    except ImportError as error:
        raise MissingExtraError(f"Verilog needs Amaranth and its Yosys: pip install 'dybit[rtl]' ({error})") from error
    check_hardware(config)
    text: str = back.convert(Accelerator(config), name=name, emit_src=False)
    return text
