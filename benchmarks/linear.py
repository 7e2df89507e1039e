"""Packed linear layers against FP32, torch's INT8, ONNX Runtime and llama.cpp: paired, weights from memory.

Run ``python benchmarks/linear.py`` (``--help`` for options). Every round times each contestant once, in a new order,
on the next of several copies of its weights, so that the weights of single rows come from memory and all see the same
disturbances. Printed are medians of the rounds, the quartiles of the paired ratios, and the share of a floor: the
bytes of the weights over the read bandwidth, or the products over the integer peak, whichever takes longer. Both are
measured in the same run: memory read in order, and a loop of the path's byte multiplication on registers alone
(AMX's tiles, vpdpbusd, or vpmaddubsw, which sums have yet to follow). Significands of 16 bits have half that peak, FP32
inputs a quarter (but of AMX, which does not multiply them, and where it is not known). With
one thread the clock is the thread's processor time, so that other programs on the machine disturb the memory but do not
count; with more it is the wall's. Idle threads of torch, ONNX Runtime and llama.cpp spin for some milliseconds before
they sleep: with more than one thread every turn waits for that and is preceded by one that is not timed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import random
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dybit.formats import catalogue, packing
from dybit.kernels import extension
from dybit.operators import packed_weight
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

Runs = list[Callable[[], object]]


def last_cache() -> int:
    """Bytes of the last cache, 0 where the system does not say."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in found), default=0)


COPIES_BYTES = max(160 << 20, min(last_cache() * 5 // 4, 640 << 20))  # of all copies of a weight: more than the cache


SPINNING = 0.015  # seconds, at most, that idle threads wait for more before they sleep


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
    form = packed_weight.input_format(inputs)
    first = packed_weight.PackedWeight(weight, form)
    weights = [first, *(packed_weight.PackedWeight(weight, form) for _ in range(copies(first.nbytes, x.shape[0]) - 1))]
    return [lambda w=w: w.linear(x, reach=1.9) for w in weights], first.nbytes


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
    """The kind of buffer whose weights ggml interleaves, as its model loader does where there is one."""
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


def cases() -> list[tuple[str, str, str, int, int | None]]:
    """(name, weights, inputs, rows of inputs, group size)."""
    few = [(f"W{bits}A8", f"dybit{bits}" if bits < 8 else "s8r1", "s8r1", 1, 128) for bits in (4, 2, 3)]
    few += [
        ("W8A8 int", "s8r1", "s8r1", 1, None),
        ("W8A8 full run", "s8", "s8", 1, None),
        ("W4A8 full run", "dybit4", "s8", 1, 128),
    ]
    many = [("W4A8", "dybit4", "s8r1", 128, 128), ("W4A8", "dybit4", "s8r1", 512, 128)]
    many += [("W4A4", "dybit4", "s4", 128, 128), ("W8A8 full run", "s8", "s8", 128, None)]
    kept = [("W4", "dybit4", "", m, 128) for m in (1, 8, 32, 128, 512)]
    kept += [("W8", "dybit8", "", m, 128) for m in (1, 32)]
    return few + many + kept


def run_case(
    case: tuple[str, str, str, int, int | None],
    rows: int,
    threads: int,
    seconds: float,
    machine: dict[str, float],
    ggml: tuple[ctypes.CDLL, ctypes.CDLL] | None,
) -> dict[str, object]:
    name, family, inputs, m, group = case
    x = torch.randn(m, 4096)
    runs, size = dybit_runs(family, inputs, x, rows, group)
    contestants = {"dybit": runs, "fp32": float_runs(x, rows)}
    if name == "W4A8":
        contestants["torch int8"] = int8_runs(x, rows)
    if name in ("W4A8", "W4"):
        try:
            contestants["ort 4-bit"] = onnx_runs(x, rows, threads, 4 if inputs else 1)
        except ImportError:
            print("(onnxruntime and onnx are not installed: left out)")
        if ggml and inputs:
            contestants |= {f"llama.cpp {kind}": ggml_runs(ggml, kind, x, rows, threads) for kind in GGML_TYPES}
            if buffers := ggml_interleaving(ggml):
                for kind in GGML_TYPES:
                    runs = ggml_runs(ggml, kind, x, rows, threads, buffers)
                    contestants[f"llama.cpp {kind} interleaved"] = runs
    times = measure(contestants, seconds)
    median = {key: statistics.median(value) for key, value in times.items()}
    ratios = {
        key: quartiles([a / b for a, b in zip(value, times["dybit"], strict=True)])
        for key, value in times.items()
        if key != "dybit"
    }
    reading = size / machine["read_gb_s"] / 1e6
    slower = {"": 4, "s8": 2, "u8": 2}.get(inputs, 1)
    known = machine["peak_gmac_s"] and (inputs or packed_weight.isa() != "amx")
    computing = m * rows * 4096 / machine["peak_gmac_s"] / 1e6 * slower if known else 0
    floor = max(reading, computing)
    row = {
        "case": name,
        "rows": m,
        "n": rows,
        "group": group,
        "threads": threads,
        "isa": packed_weight.isa(),
        "ms": median,
    }
    return row | {"faster_than": ratios, "floor_ms": floor, "floor": "read" if reading > computing else "compute"}


def show(row: dict) -> str:
    ratios = ", ".join(f"{k} {q[1]:.2f}× ({q[0]:.2f} to {q[2]:.2f})" for k, q in row["faster_than"].items())
    own = row["ms"]["dybit"]
    share = row["floor_ms"] / own
    head = f"| {row['case']} | {row['rows']} | {row['n']} | {row['threads']} | {row['isa']} | {own:.3f} "
    return head + f"| {row['ms']['fp32']:.2f} | {ratios} | {share:.0%} of {row['floor']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.5, help="of every measurement")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 11008], help="N of the layers; K is 4096")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--isa", nargs="+", default=[packed_weight.isa()])
    parser.add_argument("--ggml", type=Path, help="where libggml-base and -cpu are, if not in llama-cpp-python")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    ggml = ggml_library(options.ggml)
    if ggml is None:
        print("(llama-cpp-python is not installed: llama.cpp is left out)")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    results, machines = [], []
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for isa in options.isa:
            packed_weight.use(isa)
            machine = {"read_gb_s": bandwidth(), "peak_gmac_s": integer_peak()}
            machines.append({"threads": threads, "isa": isa, **machine})
            print(f"\n{isa}, {threads} threads: reads {machine['read_gb_s']:.1f} GB/s, "
                  f"{machine['peak_gmac_s']:.0f} · 10⁹ products/s\n")  # fmt: skip
            print("| layer | rows | N | threads | ISA | dybit ms | FP32 ms | times faster than | share of floor |")
            print("|---|---|---|---|---|---|---|---|---|")
            for rows in options.rows:
                for case in cases():
                    results.append(run_case(case, rows, threads, options.seconds, machine, ggml))
                    print(show(results[-1]), flush=True)
    if options.json:
        cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.processor())  # fmt: skip
        text = json.dumps({"cpu": cpu, "torch": torch.__version__, "machine": machines, "results": results}, indent=1)
        options.json.write_text(text)


if __name__ == "__main__":
    main()
