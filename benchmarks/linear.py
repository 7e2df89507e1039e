"""Packed linear layers: dybit against FP32, torch INT8, ONNX Runtime and llama.cpp, weights read from memory.

Every round times each contestant once, in a new order, on the next of several copies of its weights. The copies hold
more bytes than the last cache, so that the weights of single rows come from memory. Shown are medians of the rounds and
the quartiles of the paired ratios: how many times as fast dybit is as the other. The floor is the time to read the
weights or to multiply the bytes, whichever is longer. Its two rates are measured in the same run: memory read in order,
and a loop of the byte multiplication of the kernels in registers alone. Significands of 16 bits have half that rate,
FP32 inputs a quarter (except on AMX, which does not multiply them).

With one thread the clock is the processor time of the thread, with more the wall clock. Idle threads of torch, ONNX
Runtime and llama.cpp spin for some milliseconds before they sleep. With more than one thread every turn therefore waits
and is preceded by one that is not timed.

The columns are 4096 inputs (K); N is the number of outputs. Weights are in groups of 128 with a variant for each group,
except those of W8A8, which have a scale for each output channel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import random
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import Column, Results, parser

from dybit.formats import catalogue, packing
from dybit.kernels import extension
from dybit.measure.timing import SPINNING
from dybit.operators import packed_weight
from dybit.operators.input_rounding import InputRounding, input_format
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

Runs = list[Callable[[], object]]
Case = tuple[str, str, str, int, int | None]  # name, weights, inputs, rows of inputs, group size
COLUMNS = (
    Column("layer", "layer"),
    Column("rows", "rows"),
    Column("outputs", "N"),
    Column("threads", "threads"),
    Column("isa", "kernels"),
    Column("ms", "ms", 3),
    Column("fp32_ms", "FP32, ms"),
    Column("fp32", "to FP32", 2, "×"),
    Column("int8", "to torch INT8", 2, "×"),
    Column("onnx", "to ONNX Runtime 4-bit", 2, "×"),
    *(Column(kind, f"to llama.cpp {kind}", 2, "×") for kind in ("Q4_0", "Q4_K", "IQ4_NL")),
    *(Column(f"{kind}_repacked", f"to llama.cpp {kind}, repacked", 2, "×") for kind in ("Q4_0", "Q4_K", "IQ4_NL")),
    Column("floor", "share of the floor"),
)


def last_cache() -> int:
    """Bytes of the last cache, 0 where the system does not say."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in found), default=0)


COPIES_BYTES = max(160 << 20, min(last_cache() * 5 // 4, 640 << 20))  # of all copies of a weight: more than the cache


def copies(nbytes: int, batch: int) -> int:
    """How many copies of a weight take turns."""
    return max(2, min(64, -(-COPIES_BYTES // nbytes))) if batch <= 4 else 2


def random_weight(family: str, rows: int, columns: int, group: int | None) -> QuantizedTensor:
    """Random codes, scales and choices: speed does not depend on them."""
    rng = np.random.default_rng(0)
    book = catalogue.family(family).books[0]
    granularity = "group" if group else "channel"
    spec = TensorSpec(family, (rows, columns), granularity, group, "fp32", granularity)
    packed = torch.from_numpy(rng.integers(0, 256, spec.packed_shape, dtype=np.uint8))
    scale = torch.from_numpy(rng.uniform(0.001, 0.01, spec.scale_shape).astype(np.float32))
    choice = None
    if spec.choice_shape:
        units = spec.unit_shape(spec.choice)
        books = len(catalogue.family(family).books)
        index = rng.integers(0, books, units, dtype=np.uint8)
        flat = index.reshape(1, -1) if units[1] == 1 else index
        choice = torch.from_numpy(packing.pack(flat, spec.choice_bits))
    assert book.bits == spec.bits
    return QuantizedTensor(spec, packed, scale, choice)


def dybit_runs(family: str, inputs: str, x: torch.Tensor, rows: int, group: int | None) -> tuple[Runs, int]:
    """The layer of dybit on copies of its weight, and the bytes that one run reads."""
    weight = random_weight(family, rows, x.shape[1], group)
    form = input_format(inputs)
    first = packed_weight.PackedWeight(weight, form)
    weights = [first, *(packed_weight.PackedWeight(weight, form) for _ in range(copies(first.nbytes, x.shape[0]) - 1))]
    return [lambda w=w: w.linear(x, rounding=InputRounding(reach=1.9)) for w in weights], first.nbytes


def float_runs(x: torch.Tensor, rows: int) -> Runs:
    weights = [torch.randn(rows, x.shape[1]) for _ in range(copies(rows * x.shape[1] * 4, x.shape[0]))]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def int8_runs(x: torch.Tensor, rows: int) -> Runs:
    from torch.ao.nn.quantized.dynamic import Linear

    torch.backends.quantized.engine = "x86"
    layers = []
    for _ in range(copies(rows * x.shape[1], x.shape[0])):
        layer = Linear(x.shape[1], rows)
        scales, zeros = torch.full((rows,), 0.01), torch.zeros(rows, dtype=torch.int64)
        weight = torch.quantize_per_channel(torch.randn(rows, x.shape[1]), scales, zeros, 0, torch.qint8)
        layer.set_weight_bias(weight, torch.zeros(rows))
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


def onnx_runs(x: torch.Tensor, rows: int, threads: int, accuracy: int) -> Runs:
    """MatMulNBits, 4 bits, blocks of 128, accuracy_level 4 (8-bit activations) or 1 (FP32)."""
    import onnxruntime as ort

    import onnx
    from onnx import TensorProto, helper

    array, columns, rng = x.numpy(), x.shape[1], np.random.default_rng(0)
    runs: Runs = []
    for _ in range(copies(rows * columns // 2, x.shape[0])):
        codes = rng.integers(0, 256, (rows, columns // 128, 64), dtype=np.uint8)
        scale = rng.uniform(0.001, 0.01, rows * columns // 128).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
            K=columns, N=rows, bits=4, block_size=128, accuracy_level=accuracy,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], rows])],
            [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(scale, "scale")],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        runs.append(lambda s=session: s.run(None, {"x": array}))
    return runs


GGML_TYPES = {"Q4_0": 2, "Q4_K": 12, "IQ4_NL": 20}


def ggml_library(directory: Path | None) -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """The base and CPU libraries of ggml, of a directory or of the package llama-cpp-python; None if there are none."""
    if directory is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            return None
        directory = Path(found.origin).parent / "lib"
    paths = [next(iter(sorted(directory.glob(f"libggml-{part}.*"))), None) for part in ("base", "cpu")]
    if None in paths:
        return None
    base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, name).restype = ctypes.c_void_p
    return base, cpu


class GgmlPool(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml_interleaving(libraries: tuple[ctypes.CDLL, ctypes.CDLL]) -> ctypes.c_void_p | None:
    """The kind of buffer whose weights ggml interleaves, as its model loader chooses it; None without one."""
    (base, cpu), pointer = libraries, ctypes.c_void_p
    cpu.ggml_backend_cpu_reg.restype = base.ggml_backend_reg_get_proc_address.restype = pointer
    base.ggml_backend_reg_dev_get.restype = base.ggml_backend_buft_name.restype = pointer
    registry = pointer(cpu.ggml_backend_cpu_reg())
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    device = pointer(base.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
    for kind in ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device):
        if not kind:
            return None
        if ctypes.string_at(base.ggml_backend_buft_name(pointer(kind))) == b"CPU_REPACK":
            return pointer(kind)
    return None


def ggml_runs(
    libraries: tuple[ctypes.CDLL, ctypes.CDLL],
    kind: str,
    x: torch.Tensor,
    rows: int,
    threads: int,
    buffers: ctypes.c_void_p | None = None,
) -> Runs:
    """Graphs of one ggml_mul_mat, each with a weight of its own, quantized from random numbers, in a kind of buffer."""
    base, cpu = libraries
    cpu.ggml_cpu_init()
    base.ggml_backend_buft_alloc_buffer.restype = base.ggml_backend_buffer_get_base.restype = ctypes.c_void_p
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, columns, batch = ctypes.c_void_p, x.shape[1], x.shape[0]
    values, runs = torch.randn(rows, columns), []
    codes = ctypes.create_string_buffer(rows * columns)
    size = base.ggml_quantize_chunk(
        GGML_TYPES[kind], pointer(values.data_ptr()), codes, ctypes.c_int64(0), ctypes.c_int64(rows),
        ctypes.c_int64(columns), None,
    )  # fmt: skip
    work = (128 if batch > 4 else 32) << 20  # every run takes some of its pool, for good
    for _ in range(copies(rows * columns // 2, batch)):
        context = pointer(base.ggml_init(GgmlPool(rows * columns + batch * (rows + columns) * 16 + work, None, False)))
        outside = pointer(base.ggml_init(GgmlPool(1 << 16, None, True))) if buffers else context
        weight = pointer(
            base.ggml_new_tensor_2d(outside, GGML_TYPES[kind], ctypes.c_int64(columns), ctypes.c_int64(rows))
        )
        if buffers:
            buffer = pointer(base.ggml_backend_buft_alloc_buffer(buffers, ctypes.c_size_t(size + 4096)))
            base.ggml_backend_tensor_alloc(buffer, weight, pointer(base.ggml_backend_buffer_get_base(buffer)))
            base.ggml_backend_tensor_set(weight, codes, ctypes.c_size_t(0), ctypes.c_size_t(size))
        else:
            ctypes.memmove(pointer(base.ggml_get_data(weight)), codes, size)
        inputs = pointer(base.ggml_new_tensor_2d(context, 0, ctypes.c_int64(columns), ctypes.c_int64(batch)))
        ctypes.memmove(pointer(base.ggml_get_data(inputs)), x.data_ptr(), x.numel() * 4)
        product = pointer(base.ggml_mul_mat(context, weight, inputs))
        graph = pointer(base.ggml_new_graph(context))
        base.ggml_build_forward_expand(graph, product)
        run = lambda c=context, g=graph: cpu.ggml_graph_compute_with_ctx(c, g, threads)  # noqa: E731
        weakref.finalize(run, base.ggml_free, context)
        if buffers:
            weakref.finalize(run, base.ggml_backend_buffer_free, buffer)
            weakref.finalize(run, base.ggml_free, outside)
        runs.append(run)
    result = torch.frombuffer(
        (ctypes.c_float * (batch * rows)).from_address(base.ggml_get_data(product)), dtype=torch.float32
    )
    runs[-1]()
    expected = (x @ values.T).flatten()
    assert (result - expected).norm() < 0.2 * expected.norm(), f"ggml's {kind} product is wrong"
    return runs


def measure(contestants: dict[str, Runs], seconds: float, limit: int = 400) -> dict[str, list[float]]:
    """Times in milliseconds, one of every contestant in each round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for runs in contestants.values():
        for run in runs:
            run()
    order, start, i = list(contestants), time.perf_counter(), 0
    alone = torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    shuffle = random.Random(0)
    while i < 9 or (time.perf_counter() - start < seconds and i < limit):
        shuffle.shuffle(order)
        for name in order:
            runs = contestants[name]
            if not alone:
                time.sleep(SPINNING)
                runs[i * 2 % len(runs)]()
            run = runs[(i if alone else i * 2 + 1) % len(runs)]
            begin = clock()
            run()
            times[name].append((clock() - begin) * 1e3)
        i += 1
    return times


def bandwidth() -> float:
    """GB/s of reading memory in order."""
    memory, threads = torch.ones(COPIES_BYTES, dtype=torch.uint8), torch.get_num_threads()
    part = COPIES_BYTES // 4
    reads: Runs = [lambda i=i: extension.read_all(memory.data_ptr() + i * part, part, threads) for i in range(4)]
    return part / statistics.median(measure({"read": reads}, 1.0)["read"]) / 1e6


def integer_peak() -> float:
    """10⁹ products of bytes a second, in registers alone."""
    count, threads = 20000, torch.get_num_threads()
    products = extension.multiply_bytes(count, threads)
    times = measure({"peak": [lambda: extension.multiply_bytes(count, threads)]}, 1.0, 4000)["peak"]
    return products / statistics.median(times) / 1e6


def quartiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.percentile(values, [25, 50, 75])]


def cases() -> list[Case]:
    few = [(f"W{bits}A8", f"dybit{bits}" if bits < 8 else "s8r1", "s8r1", 1, 128) for bits in (4, 2, 3)]
    few += [
        ("W8A8, integers", "s8r1", "s8r1", 1, None),
        ("W8A8, both of full run", "s8", "s8", 1, None),
        ("W4A8, inputs of full run", "dybit4", "s8", 1, 128),
    ]
    many = [("W4A8", "dybit4", "s8r1", 128, 128), ("W4A8", "dybit4", "s8r1", 512, 128)]
    many += [("W4A4", "dybit4", "s4", 128, 128), ("W8A8, both of full run", "s8", "s8", 128, None)]
    kept = [("W4", "dybit4", "", m, 128) for m in (1, 8, 32, 128, 512)]
    kept += [("W8", "dybit8", "", m, 128) for m in (1, 32)]
    return few + many + kept


def contestants_of(
    case: Case, x: torch.Tensor, outputs: int, threads: int, ggml: tuple[ctypes.CDLL, ctypes.CDLL] | None
) -> tuple[dict[str, Runs], int]:
    """The contestants of a case by their names in a row, dybit first, and the bytes of dybit's weight."""
    name, family, inputs, _, group = case
    runs, size = dybit_runs(family, inputs, x, outputs, group)
    contestants = {"dybit": runs, "fp32": float_runs(x, outputs)}
    if name == "W4A8":
        contestants["int8"] = int8_runs(x, outputs)
    if name in ("W4A8", "W4") and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        contestants["onnx"] = onnx_runs(x, outputs, threads, 4 if inputs else 1)
    if name == "W4A8" and ggml:
        contestants |= {kind: ggml_runs(ggml, kind, x, outputs, threads) for kind in GGML_TYPES}
        if buffers := ggml_interleaving(ggml):
            more = {f"{kind}_repacked": ggml_runs(ggml, kind, x, outputs, threads, buffers) for kind in GGML_TYPES}
            contestants |= more
    return contestants, size


def run_case(
    case: Case,
    outputs: int,
    threads: int,
    seconds: float,
    rates: tuple[float, float],
    ggml: tuple[ctypes.CDLL, ctypes.CDLL] | None,
) -> dict[str, object]:
    """The row of a case; ``rates`` are those of :func:`bandwidth` and :func:`integer_peak`."""
    _, _, inputs, m, _ = case
    x = torch.randn(m, 4096)
    contestants, size = contestants_of(case, x, outputs, threads, ggml)
    times = measure(contestants, seconds)
    ratios = {
        key: quartiles([a / b for a, b in zip(value, times["dybit"], strict=True)])
        for key, value in times.items()
        if key != "dybit"
    }
    own = statistics.median(times["dybit"])
    reading = size / rates[0] / 1e6
    slower = {"": 4, "s8": 2, "u8": 2}.get(inputs, 1)
    known = rates[1] and (inputs or extension.isa() != "amx")
    computing = m * outputs * 4096 / rates[1] / 1e6 * slower if known else 0
    floor = f"{max(reading, computing) / own:.0%} of {'reading' if reading > computing else 'computing'}"
    return {"ms": own, "fp32_ms": statistics.median(times["fp32"]), **ratios, "floor": floor}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--seconds", type=float, default=1.5, help="of every measurement")
    reader.add_argument("--outputs", type=int, nargs="+", default=[4096], help="N of the layers; K is 4096")
    reader.add_argument("--only", nargs="+", default=[], help="names of the cases, such as W4A8; default: all")
    reader.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    reader.add_argument("--isa", nargs="+", default=[extension.isa()])
    reader.add_argument("--ggml", type=Path, help="where libggml-base and -cpu are, if not in llama-cpp-python")
    options = reader.parse_args()
    ggml = ggml_library(options.ggml)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with Results(__file__, __doc__, COLUMNS, options) as results:
        for threads, isa in itertools.product(dict.fromkeys(options.threads), options.isa):
            cases_left = [
                (case, outputs, key)
                for outputs in options.outputs
                for case in cases()
                if not options.only or case[0] in options.only
                for key in [{"layer": case[0], "rows": case[3], "outputs": outputs, "threads": threads, "isa": isa}]
                if not results.has(**key)
            ]
            if not cases_left:
                continue
            torch.set_num_threads(threads)
            extension.use(isa)
            rates = bandwidth(), integer_peak()
            results.fact(
                f"Rates, {isa}, threads: {threads}",
                f"memory reads at {rates[0]:.1f} GB/s, {rates[1]:.0f}·10⁹ products of bytes a second",
            )
            for case, outputs, key in cases_left:
                results.add(**key, **run_case(case, outputs, threads, options.seconds, rates, ggml))


if __name__ == "__main__":
    main()
