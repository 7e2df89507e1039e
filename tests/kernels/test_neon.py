"""The NEON kernels, cross-compiled and run under emulation, with and without dot products: `make neon` in parts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, ("make", COMPILER, EMULATOR))), reason="needs make, a cross compiler and QEMU"
    ),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the sources"),
]


@pytest.fixture(scope="module")
def program():
    path = "build/compare/arm/compare"
    jobs = len(os.sched_getaffinity(0))
    done = subprocess.run(["make", f"-j{jobs}", path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    return ROOT / path


@pytest.mark.parametrize(
    ("processor", "sets", "without"), [("max", ["neon", "neon-dot"], []), ("cortex-a72", ["neon"], ["neon-dot"])]
)
def test_equals_scalar(program, processor, sets, without):
    emulated = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, str(program)]
    done = subprocess.run([*emulated, *sets], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split()[-len(sets) - 1 :] == ["scalar", *sets]
    if without:
        refused = subprocess.run([*emulated, *without], capture_output=True, text=True)
        assert refused.returncode == 1 and "is missing" in refused.stdout
