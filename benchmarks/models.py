"""Whole models beside what else runs them: torch, ONNX Runtime, OpenVINO and dybit.

All contestants take turns in one process, in a new order every round, by the wall clock. Times are medians; ratios are
medians of the paired rounds with their quartiles. With more than one thread every turn waits until idle threads sleep,
and is preceded by one that is not timed. INT8 of ONNX Runtime is static for convolutional networks and dynamic for
others; that of OpenVINO is NNCF's, with SmoothQuant for others. The column of INT8 compares with the faster of the two.

``W4A8`` is ``Recipe(weights=4, activations=8)`` and nothing else, fused by ``dybit.fuse`` unless the row says not.
``DyBit inputs`` have 8 bits, too, but their products have 16. The floor is the time to multiply all bytes in registers
plus the time to read the stored weights, at rates that are measured in the same run. Memory is the peak that the model
and its forward add to a process of their own.

Accuracy is measured on the same inputs for all. EfficientNet-Lite0: same top class as FP32 on crops of pictures that
calibration has not seen. MiniLM: rank correlation (Spearman) of the similarities of all pairs of texts with those of
FP32. The other networks have random weights, whose batch norms have the statistics of pictures; SQNR alone says how
close they come. ``--isa avx2`` limits dybit's kernels, not the others.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from forward_memory import fused, peak_of_forward
from linear import bandwidth, integer_peak
from networks import deit_tiny, mobilenet_v2, resnet18, settle
from ptq_sentences import embed, halves, judge
from results import Column, Results, parser
from torch import Tensor, nn

from dybit import Recipe, quantize_, save
from dybit.demo import efficientnet_lite0, half, image_batches, minilm, minilm_batches, prose
from dybit.errors import DyBitError, MissingExtraError
from dybit.kernels import extension
from dybit.layers.quantized import quantized_layers
from dybit.measure.fidelity import agreement, sqnr
from dybit.measure.timing import SPINNING, paired, take_turns
from dybit.measure.trace import trace
from dybit.models.running import output_tensor, run_batch
from dybit.onnx.peers import Peers

Run = Callable[[Any], Tensor]  # a batch to the first output
DEFAULT = "W4A8"
RECIPES = {
    DEFAULT: Recipe(weights=4, activations=8),
    "W8A8": Recipe(weights=8, activations=8),
    "W4A4": Recipe(weights=4, activations=4),
    "W4A8, DyBit inputs": Recipe(weights=4, activations="dybit8plain"),
}
INT8 = ("ONNX Runtime INT8", "OpenVINO INT8")
COLUMNS = (
    Column("model", "model"),
    Column("inputs", "inputs"),
    Column("threads", "threads"),
    Column("isa", "dybit's kernels"),
    Column("contestant", "contestant"),
    Column("ms", "ms", 1),
    Column("fp32", "to torch FP32", 2, "×"),
    Column("int8", "to the faster INT8", 2, "×"),
    Column("floor", "share of the floor", 2),
    Column("agreement", "same top class", 1, " %"),
    Column("spearman", "Spearman", 4),
    Column("sqnr", "SQNR, dB", 1),
    Column("memory", "peak, MB", 1),
)


def pictures(split: str, count: int, batch: int) -> list[Tensor]:
    return image_batches(split, batches=count, batch_size=batch)


def settled(make: Callable[[], nn.Module]) -> nn.Module:
    return settle(make(), pictures("calibration", 4, 8))


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        make: Makes the model, in FP32.
        pretrained: Whether the rounding of its weights is worth an algorithm.
        text: Whether it takes tokens.
        of_tokens: Whether it computes tokens, by linear layers.
    """

    make: Callable[[], nn.Module]
    pretrained: bool = False
    text: bool = False
    of_tokens: bool = False

    def calibration(self) -> list[Any]:
        """Batches to calibrate with."""
        return minilm_batches() if self.text else pictures("calibration", 8, 8)

    def inputs(self) -> dict[str, Any]:
        """The batches that are timed, by the name of their size."""
        if not self.text:
            (eight,) = pictures("evaluation", 1, 8)
            return {"1 image": eight[:1].clone(), "8 images": eight}
        ids = torch.randint(1000, 20000, (32, 128), generator=torch.Generator().manual_seed(0))
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"1×128 tokens": {name: x[:1].clone() for name, x in whole.items()}, "32×128 tokens": whole}

    def outputs(self, run: Run, size: int) -> Tensor:
        """What the model says to the inputs that it is judged by: ``size`` texts or crops."""
        if self.text:
            return embed(lambda **batch: run(batch), halves(size, half(prose(), "evaluation")))
        with torch.inference_mode():
            return torch.cat([run(batch) for batch in pictures("evaluation", -(-size // 8), 8)])

    def accuracy(self, exact: Tensor, found: Tensor) -> dict[str, Any]:
        """The cells of accuracy."""
        if self.text:
            figures = judge(exact, found)
            return {"spearman": figures["spearman"], "sqnr": figures["sqnr"]}
        cells: dict[str, Any] = {"sqnr": sqnr(exact, found)}
        if self.pretrained:
            share = agreement(exact, found)
            cells["agreement"] = [100 * share, 100 * math.sqrt(share * (1 - share) / len(exact))]
        return cells


CASES = {
    "MiniLM-L6": Case(minilm, pretrained=True, text=True, of_tokens=True),
    "EfficientNet-Lite0": Case(efficientnet_lite0, pretrained=True),
    "ResNet-18": Case(partial(settled, resnet18)),
    "MobileNetV2": Case(partial(settled, mobilenet_v2)),
    "DeiT-tiny": Case(partial(settled, deit_tiny), of_tokens=True),
}


@dataclass
class Ours:
    """A quantized model.

    Attributes:
        model: What runs.
        weights: Bytes of its packed weights.
        checkpoint: Its files; None if memory is not measured.
    """

    model: nn.Module
    weights: int
    checkpoint: Path | None = None


@dataclass
class Contestants:
    """All forms of one model.

    Attributes:
        case: The model and its data.
        exact: It in FP32.
        peers: It in other runtimes; None if there is none.
        ours: The quantized ones by name.
        skipped: Why others are left out.
        figures: The accuracy of every contestant.
    """

    case: Case
    exact: nn.Module
    peers: Peers | None
    ours: dict[str, Ours]
    skipped: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def runs(self, isa: str) -> dict[str, Run]:
        """Functions from a batch to the first output, on the current threads, torch's FP32 first."""
        models = {"torch FP32": self.exact}
        if not self.case.text:
            models["torch FP32, channels last"] = copy.deepcopy(self.exact).to(memory_format=torch.channels_last)
        models |= {f"dybit {name}": ours.model for name, ours in self.ours.items()}
        if extension.isa() != isa:
            extension.use(isa)
        runs: dict[str, Run] = {name: partial(first_output, model) for name, model in models.items()}
        others = self.peers.runs() if self.peers else {}
        return runs | {name: lambda batch, run=run: run(batch)[0] for name, run in others.items()}


def first_output(model: nn.Module, batch: Any) -> Tensor:
    return output_tensor(run_batch(model, batch))


def contestants(case: Case, algorithm: str, folder: Path) -> Contestants:
    """Makes all forms of a model. Checkpoints go to a folder."""
    exact, calibration, skipped = case.make(), case.calibration(), []
    example = next(iter(case.inputs().values()))
    try:
        peers = Peers(exact, calibration[:2], calibration)
        skipped += peers.skipped.values()
    except (MissingExtraError, DyBitError) as error:
        peers = None
        skipped.append(str(error))
    ours: dict[str, Ours] = {}
    for name, recipe in RECIPES.items():
        chain = algorithm if case.pretrained else None
        model = quantize_(copy.deepcopy(exact), recipe, calibration, algorithm=chain)
        specs = [spec for layer in quantized_layers(model).values() for spec in layer.weight_specs.values()]
        size = sum(spec.nbytes for spec in specs)
        if name == DEFAULT:
            save(model, folder)
            ours[f"{name}, not fused"] = Ours(model, size)
        ours[name] = Ours(fused(model, example), size, folder if name == DEFAULT else None)
    return Contestants(case, exact, peers, ours, skipped)


def rates(threads: int) -> tuple[float, float]:
    """Byte products and bytes of memory a second, 10⁹."""
    torch.set_num_threads(threads)
    return integer_peak(), bandwidth()


def products(model: nn.Module, batch: Any) -> int:
    """Multiply-accumulates of a forward, those of attention too."""
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch,), {})
    return sum(layer.macs for layer in trace(model, *args, **kwargs))


def measure(all_of: Contestants, inputs: str, threads: int, isa: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one model, one batch, one number of threads and one set of kernels."""
    torch.set_num_threads(threads)
    batch, runs = all_of.case.inputs()[inputs], all_of.runs(isa)
    pause = SPINNING if threads > 1 else 0.0
    times = take_turns({k: partial(run, batch) for k, run in runs.items()}, math.inf, rounds, pause=pause)
    fast = min((name for name in INT8 if name in times), key=lambda name: statistics.median(times[name]), default=None)
    peak, memory = rates(threads)
    count = products(all_of.exact, batch)
    for name, values in times.items():
        found = paired(values, times["torch FP32"])
        row: dict[str, Any] = {"contestant": name, "ms": found.median * 1e3, **all_of.figures.get(name, {})}
        if name != "torch FP32":
            row["fp32"] = [found.ratio_low, found.ratio, found.ratio_high]
        ours = all_of.ours.get(name.removeprefix("dybit "))
        if fast is not None and name != fast:
            other = paired(values, times[fast])
            row["int8"] = [other.ratio_low, other.ratio, other.ratio_high]
        if ours is not None and peak and memory:
            row["floor"] = (count / peak + ours.weights / memory) / 1e9 / found.median
        if name == "torch FP32" or (ours is not None and ours.checkpoint):
            bytes_ = peak_of_forward(all_of.case.make, ours and ours.checkpoint, batch, threads, isa)
            row["memory"] = None if bytes_ is None else bytes_ / 1e6
        yield row


def judge_all(all_of: Contestants, size: int, isa: str) -> None:
    """Fills in the accuracy of every contestant."""
    exact: Tensor | None = None
    for name, run in all_of.runs(isa).items():
        found = all_of.case.outputs(run, size)
        exact = found if exact is None else exact
        if "FP32" not in name and "not fused" not in name:
            all_of.figures[name] = all_of.case.accuracy(exact, found)


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    reader.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    reader.add_argument("--isa", nargs="+", default=[extension.isa()], help="instruction sets of dybit's kernels")
    reader.add_argument("--rounds", type=int, default=15, help="at least 5")
    reader.add_argument("--algorithm", default="auto", help="of pretrained models; rtn is quick, as fast to run")
    reader.add_argument("--judged", type=int, default=240, help="texts or crops to judge by")
    options = reader.parse_args()
    warnings.filterwarnings("ignore")
    with Results(__file__, __doc__, COLUMNS, options, RECIPES) as results, tempfile.TemporaryDirectory() as folder:
        for package in ("onnxruntime", "openvino", "nncf"):
            try:
                results.fact(f"Version of {package}", version(package))
            except PackageNotFoundError:
                results.fact(f"Version of {package}", "not installed")
        for name in options.models:
            case = CASES[name]
            cells = itertools.product(case.inputs(), dict.fromkeys(options.threads), options.isa)
            todo = [c for c in cells if not results.has(model=name, inputs=c[0], threads=c[1], isa=c[2])]
            if not todo:
                continue
            torch.set_num_threads(max(options.threads))
            made = contestants(case, options.algorithm, Path(folder) / name)
            for reason in made.skipped:
                results.fact(f"Left out of {name}", reason)
            with made.peers or nullcontext():
                judge_all(made, options.judged, options.isa[0])
                for inputs, threads, isa in todo:
                    for row in list(measure(made, inputs, threads, isa, options.rounds)):
                        results.add(model=name, inputs=inputs, threads=threads, isa=isa, **row)


if __name__ == "__main__":
    main()
