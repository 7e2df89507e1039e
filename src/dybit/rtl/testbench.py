"""Running programs on the hardware in Amaranth's simulator, cycle by cycle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from amaranth.sim import Simulator

from dybit.rtl.accelerator import LAYER, Accelerator
from dybit.rtl.codec import mode_bits, variant_bits
from dybit.rtl.edges import WRITE_TARGETS, parameter_layout, variant_layout
from dybit.rtl.model import widen
from dybit.rtl.program import Program


@dataclass(frozen=True, eq=False)
class Run:
    """The results of a run.

    Attributes:
        outputs: Codes, (passes, M, N); -1 where none was put out.
        cycles: Cycles that the hardware counted.
        last: The cycle after ``start`` in which the last output was seen.
    """

    outputs: np.ndarray
    cycles: int
    last: int


def layer_word(program: Program) -> int:
    """Returns the ``layer`` input for a program as an integer."""
    output = program.output_format
    fields = {
        "mode": mode_bits(program.mode),
        "variant": variant_bits(program.variant),
        "output": {
            "magnitude_bits": output.magnitude_bits,
            "max_run": output.max_run,
            "negative": output.signed,
            "relu": program.relu,
        },
        "sizes": {
            "rows": program.m,
            "tile": program.tile_rows,
            "k_folds": program.k_folds,
            "n_folds": program.n_folds,
            "passes": program.passes,
        },
    }
    return LAYER.const(fields).as_value().value


def memory_words(program: Program) -> list[tuple[str, int, int, int]]:
    """Returns what must be written before a program starts: (target, bank, address, data)."""
    words = []
    for target, banks in (("activations", program.activation_banks()), ("weights", program.weight_banks())):
        words += [(target, b, at, int(word)) for b, bank in enumerate(banks) for at, word in enumerate(bank)]
    variants, parameters = variant_layout(program.config.narrowest), parameter_layout(program.config)
    for column, folds in enumerate(program.channels()):
        for at, lanes in enumerate(folds):
            told: dict[str, dict[str, int]] = {}
            scales: dict[str, int] = {}
            for lane, channel in enumerate(lanes):
                if channel is None:
                    continue
                fmt, requantizer = program.weight_formats[channel], program.requantizers[channel]
                told[f"lane_{lane}"] = variant_bits(widen(fmt, program.mode.weight_bits)[1])
                scales |= {f"bias_{lane}": requantizer.bias, f"multiplier_{lane}": requantizer.multiplier}
                scales[f"shift_{lane}"] = requantizer.shift
            words.append(("variants", column, at, variants.const(told).as_value().value))
            words.append(("requantizers", column, at, parameters.const(scales).as_value().value))
    return words


class Testbench:
    """One elaborated accelerator in the simulator, on which programs run one after another.

    Args:
        accelerator: The hardware.
    """

    __test__ = False  # not a test class, whatever its name

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def run(self, programs: list[Program]) -> list[Run]:
        """Runs every program and returns what came out of each."""
        runs: list[Run] = []

        async def bench(ctx) -> None:
            for program in programs:
                await self._write(ctx, program)
                runs.append(await self._layer(ctx, program))

        simulator = Simulator(self.accelerator)
        simulator.add_clock(1e-6)
        simulator.add_testbench(bench)
        simulator.run()
        return runs

    async def _write(self, ctx, program: Program) -> None:
        write = self.accelerator.write
        ctx.set(write.enable, 1)
        for target, bank, address, data in memory_words(program):
            ctx.set(write.target, WRITE_TARGETS[target])
            ctx.set(write.bank, bank)
            ctx.set(write.address, address)
            ctx.set(write.data, data)
            await ctx.tick()
        ctx.set(write.enable, 0)

    async def _layer(self, ctx, program: Program) -> Run:
        top, fused = self.accelerator, program.mode
        outputs = np.full((program.passes, program.m, program.n), -1)
        channels = program.channels()
        ctx.set(top.layer.as_value(), layer_word(program))
        ctx.set(top.start, 1)
        await ctx.tick()
        ctx.set(top.start, 0)
        cycle, last = 1, 0
        while ctx.get(top.busy):
            for column in range(program.config.columns):
                if ctx.get(top.valid[column]):
                    last = cycle
                    fold, row = divmod(ctx.get(top.address[column]), program.m)
                    codes = ctx.get(top.codes[column])
                    for lane in range(fused.lanes):
                        channel = channels[column][fold][lane]
                        if channel is not None:
                            outputs[channel // program.n, row, channel % program.n] = codes >> 8 * lane & 255
            await ctx.tick()
            cycle += 1
        return Run(outputs, ctx.get(top.cycles), last)
