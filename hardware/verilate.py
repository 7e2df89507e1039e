"""Real layer tiles on the accelerator's Verilog, compiled by Verilator: codes and cycles against the integer model.

Needs verilator and g++. Usage:

    python hardware/verilate.py [--size 4] [--rows 784] [--folder build]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dybit.accelerator import Config
from dybit.accelerator.datapath import modes
from dybit.formats.format import Format, variants
from dybit.rtl import verilog
from dybit.rtl.edges import WRITE_TARGETS, write_layout
from dybit.rtl.program import Program, random_program
from dybit.rtl.testbench import layer_word, memory_words
from dybit.workloads.networks import network

UNDERSCORES = "___05F"  # how Verilator writes two underscores of a port

HARNESS = r"""
// Reads writes ("W" and the port's word), layers ("L" and the layer's word) from a file; prints every output.
#include <cstdio>
#include <cstdint>
#include <cstring>
#include "Vaccelerator.h"
#include "verilated.h"

template <class T> void put(T& port, const uint32_t* words) { std::memcpy(&port, words, sizeof(port)); }

static Vaccelerator top;
static void tick() { top.clk = 0; top.eval(); top.clk = 1; top.eval(); }

static void outputs(long cycle) {
@OUTPUTS@
}

int main(int, char** argv) {
    std::FILE* file = std::fopen(argv[1], "rb");
    uint32_t words[64];
    top.rst = 0;
    for (int kind; (kind = std::fgetc(file)) != EOF;) {
        if (std::fread(words, 4, 64, file) != 64) return 1;
        if (kind == 'W') { put(top.write, words); tick(); continue; }
        std::memset(words + 32, 0, 128);
        put(top.write, words + 32);
        put(top.layer, words);
        top.start = 1; tick(); top.start = 0; top.eval();
        long cycle = 1;
        for (; top.busy; ++cycle) { outputs(cycle); tick(); }
        std::printf("end %u\n", (unsigned)top.cycles);
    }
    return 0;
}
"""


def build(config: Config, folder: Path) -> Path:
    """Compiles the accelerator and returns the program."""
    (folder / "accelerator.v").write_text(verilog(config), encoding="utf-8")
    lines = [
        f'    if (top.valid{UNDERSCORES}{c}) std::printf("%ld {c} %u %llx\\n", cycle, '
        f"(unsigned)top.address{UNDERSCORES}{c}, (unsigned long long)top.codes{UNDERSCORES}{c});"
        for c in range(config.columns)
    ]
    (folder / "harness.cpp").write_text(HARNESS.replace("@OUTPUTS@", "\n".join(lines)), encoding="utf-8")
    command = ["verilator", "--cc", "--exe", "--build", "-O3", "-Wno-fatal", "-Wno-lint", "--top-module", "accelerator"]
    command += ["--x-initial", "0", "-CFLAGS", "-O1", "--output-split", "20000", "accelerator.v", "harness.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"verilator failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return folder / "obj_dir" / "Vaccelerator"


def record(kind: str, value: int) -> bytes:
    """One record of the harness's input."""
    return kind.encode() + value.to_bytes(256, "little")


def write_program(program: Program, path: Path) -> None:
    """Writes what the harness does for a program."""
    layout = write_layout(program.config)
    with path.open("wb") as file:
        for target, bank, address, data in memory_words(program):
            fields = {"enable": 1, "target": WRITE_TARGETS[target], "bank": bank, "address": address, "data": data}
            file.write(record("W", layout.const(fields).as_value().value))
        file.write(record("L", layer_word(program)))


def read_outputs(text: str, program: Program) -> tuple[np.ndarray, int, int]:
    """Returns the codes (passes, M, N), the counted cycles and the cycle of the last output."""
    outputs = np.full(program.outputs.shape, -1)
    channels, cycles, last = program.channels(), 0, 0
    for line in text.splitlines():
        first, *rest = line.split()
        if first == "end":
            cycles = int(rest[0])
            continue
        last = max(last, int(first))
        column, (fold, row), codes = int(rest[0]), divmod(int(rest[1]), program.m), int(rest[2], 16)
        for lane, channel in enumerate(channels[column][fold]):
            if channel is not None:
                outputs[channel // program.n, row, channel % program.n] = codes >> 8 * lane & 255
    return outputs, cycles, last


def tiles(config: Config, rows: int) -> list[tuple[str, Program]]:
    """Tiles of real layers of ResNet-50 in every mode: whole K, as many rows and channels as are asked for."""
    layers = [layer for layer in network("resnet50") if layer.name in ("conv1", "layer1.0.conv2", "layer2.0.conv3")]
    programs = []
    for seed, mode in enumerate(modes(config.narrowest)):
        for layer in layers:
            activation = Format(mode.activation_bits, signed=False)
            shape = (1, min(layer.m, rows), layer.k, 3 * config.tile(mode)[1] - 1)
            label = f"{layer.name} {mode.weight_bits}/{mode.activation_bits}"
            formats = (activation, variants(mode.weight_bits), activation)
            programs.append((label, random_program(config, shape, formats, seed, relu=True)))
    return programs


def main() -> None:
    """Builds, runs every tile and prints a table; exits with an error where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4, help="rows and columns of the array")
    parser.add_argument("--rows", type=int, default=100, help="rows of the input in a tile")
    parser.add_argument("--folder", type=Path, help="where to build; a temporary folder by default")
    options = parser.parse_args()
    for tool in ("verilator", "g++"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} not found: apt-get install verilator g++")
    size = options.size
    config = Config(rows=size, columns=size, activation_sram=1 << 16, weight_sram=1 << 16, sum_sram=1 << 13)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        binary = build(config, folder)
        print(f"built {size} × {size} in {time.perf_counter() - start:.0f} s\n", flush=True)
        print("| tile | M × K × N | cycles | formula | codes |")
        print("|---|---|---|---|---|")
        wrong = 0
        for label, program in tiles(config, options.rows):
            write_program(program, folder / "program.bin")
            done = subprocess.run(
                [str(binary), str(folder / "program.bin")], capture_output=True, text=True, check=True
            )
            outputs, cycles, last = read_outputs(done.stdout, program)
            differ = int((outputs != program.outputs).sum())
            wrong += differ + (cycles != program.cycles) + (last != program.cycles)
            shape = f"{program.m} × {program.k} × {program.n}"
            verdict = "equal" if not differ else f"{differ} differ"
            print(f"| {label} | {shape} | {cycles:,} | {program.cycles:,} | {outputs.size:,} {verdict} |", flush=True)
    if wrong:
        sys.exit(f"{wrong} differences")


if __name__ == "__main__":
    main()
