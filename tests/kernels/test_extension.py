"""Which path runs: by the environment, by request, and where there is no extension."""

import ctypes
import os
import subprocess
import sys

import pytest

from dybit.errors import DyBitError
from dybit.kernels import extension

needs_kernels = pytest.mark.skipif(len(extension.available()) < 2, reason="no compiled kernels")


@needs_kernels
def test_environment_chooses():
    code = """
import os
from dybit.kernels import extension
for isa in ("torch", "nonsense", "scalar"):
    os.environ["DYBIT_ISA"] = isa
    extension.load.cache_clear()
    try:
        print(extension.isa())
    except extension.DyBitError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert (first, third) == ("torch", "scalar")
    assert second.startswith("DYBIT_ISA='nonsense' cannot be used")


def test_a_missing_extension_is_said_once():
    code = (
        "import sys; sys.modules['dybit.kernels._kernels'] = None\n"
        "from dybit.kernels import extension; print(extension.isa(), extension.isa(), extension.available())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DYBIT_ISA"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["torch", "torch", "('torch',)"]
    assert done.stderr.count("plain torch") == 1


@needs_kernels
def test_use_switches():
    before = extension.isa()
    try:
        for name in extension.available()[1:]:
            extension.use(name)
            assert extension.isa() == name
    finally:
        extension.use(before)
    with pytest.raises(DyBitError, match=r"name must be one of .*, not 'torch'"):
        extension.use("torch")


@needs_kernels
def test_rates_for_benchmarks():
    buffer = (ctypes.c_uint8 * (1 << 19))()
    extension.read_all(ctypes.addressof(buffer), len(buffer), 2)
    before = extension.isa()
    try:
        for name in extension.available()[1:]:
            extension.use(name)
            one, two = extension.multiply_bytes(10, 1), extension.multiply_bytes(10, 2)
            assert (one == 0) == (name == "scalar")
            assert abs(two - 2 * one) <= 2
    finally:
        extension.use(before)
