"""Verilog of the whole accelerator, and what happens without Amaranth."""

import subprocess
import sys

import pytest

from dybit.accelerator import Config
from dybit.errors import DyBitError
from dybit.rtl import verilog


def test_verilog_has_the_modules_and_the_ports():
    text = verilog(Config(rows=1, columns=2, activation_sram=64, weight_sram=64, sum_sram=64), name="tiny")
    assert "module tiny(" in text.replace("\\", "")
    for word in ("output [23:0] address__1;", "input start;", "output [31:0] cycles;", "tiny_pe pe_0_1"):
        assert word in text, word
    assert text.count("module tiny_pe(") == 1  # written once, however many there are
    assert "initial begin\n    bank[0]" not in text


def test_there_is_no_hardware_for_lanes_summed_together():
    with pytest.raises(DyBitError, match="hardware needs fuse='split'"):
        verilog(Config(fuse="together"))


def test_without_amaranth_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['amaranth'] = None\n"
        "import dybit.rtl\n"
        "from dybit.errors import MissingExtraError\n"
        "try: dybit.rtl.verilog()\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dybit[rtl]'" in done.stdout


def test_no_torch_is_imported():
    code = "import sys, dybit.rtl.testbench, dybit.rtl.reference; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
