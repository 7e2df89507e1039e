"""Area, period and FPGA cells of the accelerator's parts, as Markdown tables on standard output.

Needs Debian's yosys, opensta and qflow-tech-osu018 (0.18 µm). Cells are placed nowhere: wires are free, and absolute
values mean little; what is compared is parts that went through the same steps. Usage:

    python hardware/synthesize.py [--rows 32] [--array 4] [--skip-fpga]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from amaranth.back import verilog
from amaranth.lib.wiring import Component

from dybit.accelerator import Config, simulate
from dybit.rtl.array import Array
from dybit.rtl.codec import ActivationDecoder, Encoder, WeightDecoder
from dybit.rtl.edges import Requantizer
from dybit.rtl.reference import elements
from dybit.workloads.networks import network

LIBRARY = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
PERIOD = 100.0  # ns; longer than any path, so that the slack tells the delay
# Products a cycle of the fused elements, by width pair (weights/activations).
PAIRS = {"8/8": (8, 8), "4/8": (4, 8), "4/4": (4, 4), "2/4": (2, 4), "2/2": (2, 2)}


@dataclass(frozen=True)
class Silicon:
    """What a part takes in 0.18 µm: area in µm², cells, flip-flops, and the longest register-to-register path in ns."""

    area: float
    cells: int
    flops: int
    period: float | None


def run(*command: str, folder: Path) -> str:
    """Runs a tool and returns what it printed.

    Raises:
        SystemExit: The tool failed; its last lines are shown.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or "Error:" in done.stdout + done.stderr:
        sys.exit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def prepare(component: Component, name: str, folder: Path) -> None:
    """Writes a part as Verilog; OpenSTA reads no signed ports, so the word is dropped, which changes no gate."""
    text = verilog.convert(component, name=name, emit_src=False).replace(" signed ", " ")
    (folder / f"{name}.v").write_text(text, encoding="utf-8")


def silicon(component: Component, name: str, folder: Path) -> Silicon:
    """Maps a part to the standard cells."""
    prepare(component, name, folder)
    script = f"""
        read_verilog {name}.v; hierarchy -top {name}; proc; setattr -unset init w:*; flatten; synth -top {name}
        dfflibmap -liberty {LIBRARY}; abc -liberty {LIBRARY}; setundef -zero; splitnets -ports; opt_clean -purge
        write_verilog -noattr -noexpr {name}_mapped.v; tee -o {name}.stat stat -liberty {LIBRARY}
    """
    (folder / f"{name}.ys").write_text(script.replace(";", "\n"), encoding="utf-8")
    run("yosys", "-q", "-s", f"{name}.ys", folder=folder)
    stat = (folder / f"{name}.stat").read_text(encoding="utf-8")
    flops = sum(int(count) for count in re.findall(r"DFF\w+\s+(\d+)", stat))
    found = re.search(r"Chip area for .*?: ([\d.]+)", stat)
    cells = re.search(r"Number of cells:\s+(\d+)", stat)
    if found is None or cells is None:
        sys.exit(f"yosys reported no area for {name}")
    return Silicon(float(found[1]), int(cells[1]), flops, period(name, folder, clocked=flops > 0))


def period(name: str, folder: Path, clocked: bool) -> float:
    """Returns the delay of the longest path of a mapped part in ns; of parts without registers, from pin to pin."""
    clock = "[get_ports clk]" if clocked else ""
    # the mode stands still while a layer runs, so its fan-out to all elements is no path
    has_mode = re.search(
        r"^ *input .*\bmode\b", (folder / f"{name}_mapped.v").read_text(encoding="utf-8"), re.MULTILINE
    )
    static = "set_false_path -from [get_ports mode*]" if has_mode and clocked else ""
    script = f"""
        read_liberty {LIBRARY}
        read_verilog {name}_mapped.v
        link_design {name}
        create_clock -name clk -period {PERIOD} {clock}
        set_input_delay 0 -clock clk [all_inputs]
        set_output_delay 0 -clock clk [all_outputs]
        {static}
        report_worst_slack
    """
    (folder / f"{name}.tcl").write_text(script, encoding="utf-8")
    output = run("sta", "-no_splash", "-exit", f"{name}.tcl", folder=folder)
    found = re.search(r"worst slack ([-\d.]+)", output)
    if found is None:
        sys.exit(f"opensta reported no slack for {name}: {output[-500:]}")
    return PERIOD - float(found[1])


def fpga(component: Component, name: str, family: str, folder: Path) -> dict[str, int]:
    """Returns the LUTs, flip-flops and multipliers of a part on an FPGA."""
    prepare(component, name, folder)
    command = {"xcup": "synth_xilinx -family xcup -flatten", "ecp5": "synth_ecp5"}[family]
    script = f"read_verilog {name}.v\n{command} -top {name}\ntee -o {name}.{family} stat\n"
    (folder / f"{name}.ys").write_text(script, encoding="utf-8")
    run("yosys", "-q", "-s", f"{name}.ys", folder=folder)
    counts = dict.fromkeys(("LUT", "FF", "DSP"), 0)
    for cell, count in re.findall(r"^ +(\w+) +(\d+)$", (folder / f"{name}.{family}").read_text(), re.MULTILINE):
        kind = next((k for k, pattern in KINDS.items() if re.match(pattern, cell)), None)
        if kind:
            counts[kind] += int(count)
    return counts


KINDS = {"LUT": r"LUT\d?$", "FF": r"FD[RSCP]E$|TRELLIS_FF$", "DSP": r"DSP48E2$|MULT18X18D$"}


def macs(name: str, bits: tuple[int, int]) -> int:
    """Products that an element of the area table makes in a cycle at a width pair."""
    narrowest = {"dybit_2_4_8": 2, "int_2_4_8": 2, "dybit_4_8": 4}.get(name, 8)
    weight, activation = (max(width, narrowest) for width in bits)
    return (8 // weight) * (8 // activation)


def element_tables(rows: int, folder: Path, with_fpga: bool) -> dict[str, Silicon]:
    """Prints area and period of the elements and what they compute per area; returns their silicon."""
    silicons: dict[str, Silicon] = {}
    print(f"| element, for {rows} rows | µm² | to int8 | flip-flops | ns | xcup LUT/FF/DSP | ECP5 LUT/FF/DSP |")
    print("|---|---|---|---|---|---|---|")
    for name, component in elements(rows).items():
        silicons[name] = part = silicon(component, name, folder)
        ratio = part.area / silicons["int8"].area
        columns = ["–", "–"]
        if with_fpga:
            counts = [fpga(elements(rows)[name], name, family, folder) for family in ("xcup", "ecp5")]
            columns = ["/".join(map(str, count.values())) for count in counts]
        print(f"| {name} | {part.area:,.0f} | {ratio:.2f} | {part.flops} | {part.period:.2f} | {' | '.join(columns)} |")
    print()
    print(f"| products per cycle and int8 area | {' | '.join(PAIRS)} |")
    print("|---|" + "---|" * len(PAIRS))
    for name, part in silicons.items():
        ratio = part.area / silicons["int8"].area
        print(f"| {name} | {' | '.join(f'{macs(name, bits) / ratio:.2f}' for bits in PAIRS.values())} |")
    return silicons


def iso_area_table(silicons: dict[str, Silicon], rows: int, folder: Path) -> None:
    """Prints speedups of arrays that take no more area than an int8 array, memories not included.

    The base runs everything at 8/8 on rows × rows int8 elements. The others are the largest squares that fit its
    area, decoders included, first without and then with a requantizer for every lane; clock, memories and DRAM are
    the same for all.
    """
    kinds = {"dybit8_significand": 8, "dybit_4_8": 4, "dybit_2_4_8": 2}
    output = silicon(Requantizer(32), "requantizer", folder).area
    decoders = dict.fromkeys(kinds, 0.0)
    for name, narrowest in kinds.items():
        if narrowest < 8:
            decoders[name] += silicon(ActivationDecoder(narrowest), "activation_decoder", folder).area
            decoders[name] += silicon(WeightDecoder(narrowest), "weight_decoder", folder).area
    print(f"| in the area of {rows} × {rows} int8 at 8/8 | array | {' | '.join(PAIRS)} |")
    print("|---|---|" + "---|" * len(PAIRS))
    for what, lane in (("array", 0.0), ("with requantizers", output)):
        budget = rows * rows * silicons["int8"].area + rows * lane
        for name, narrowest in kinds.items():
            edge = decoders[name] + lane * 8 // narrowest
            side = max(n for n in range(1, rows + 1) if n * edge + n * n * silicons[name].area <= budget)
            for model in ("resnet50", "resnet18", "mobilenet_v2", "vit_b_16"):
                base = simulate(network(model), (8, 8), Config(rows=rows, columns=rows, narrowest=8)).cycles
                config = Config(rows=side, columns=side, narrowest=narrowest)
                speedups = [base / simulate(network(model), bits, config).cycles for bits in PAIRS.values()]
                cells = " | ".join(f"{speedup:.2f}" for speedup in speedups)
                print(f"| {name}, {what}: {model} | {side} × {side} | {cells} |")


def edge_table(config: Config, folder: Path) -> None:
    """Prints area and delay of what stands once per row, column or lane, and of a small array."""
    size = config.rows
    lanes = 64 // config.narrowest // 8
    parts: dict[str, tuple[Component, str]] = {
        "activation_decoder": (ActivationDecoder(config.narrowest), "one per row"),
        "weight_decoder": (WeightDecoder(config.narrowest), "one per column"),
        "encoder": (Encoder(), f"{lanes} per column"),
        "requantizer": (Requantizer(40), f"{lanes} per column, encoder included"),
        "array": (Array(size, size, config.narrowest), f"{size} × {size}, no edges"),
    }
    print("| part | µm² | cells | flip-flops | ns | where |")
    print("|---|---|---|---|---|---|")
    for name, (component, where) in parts.items():
        part = silicon(component, name, folder)
        print(f"| {name} | {part.area:,.0f} | {part.cells:,} | {part.flops} | {part.period:.2f} | {where} |")


def main() -> None:
    """Synthesizes everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rows that the elements' partial sums are wide enough for")
    parser.add_argument("--array", type=int, default=4, help="rows and columns of the array that is synthesized")
    parser.add_argument("--skip-fpga", action="store_true", help="leave out the FPGA columns, which take longest")
    options = parser.parse_args()
    for tool in ("yosys", "sta"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} not found: apt-get install yosys opensta qflow-tech-osu018")
    if not LIBRARY.exists():
        sys.exit(f"{LIBRARY} not found: apt-get install qflow-tech-osu018")
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), options.array
        silicons = element_tables(options.rows, folder, not options.skip_fpga)
        print()
        iso_area_table(silicons, options.rows, folder)
        print()
        edge_table(Config(rows=size, columns=size), folder)


if __name__ == "__main__":
    main()
