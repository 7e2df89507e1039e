"""Runs a floating-point model in other runtimes, ONNX Runtime and OpenVINO, in FP32 and INT8."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dybit.errors import MissingExtraError
from dybit.onnx import capture
from dybit.onnx.graph import Array

Run = Callable[[Any], list[Tensor]]
Feed = dict[str, Array]

ORT, OPENVINO = "ONNX Runtime", "OpenVINO"
# Packages that a runtime needs for FP32, then those that INT8 needs as well.
_PACKAGES = {ORT: (("onnxruntime",), ("onnx",)), OPENVINO: (("openvino",), ("nncf",))}
_OPSET = 18


def lacking(runtime: str, int8: bool = False) -> list[str]:
    """Returns the packages that a runtime needs and that are not installed.

    Args:
        runtime: A name among :data:`ORT` and :data:`OPENVINO`.
        int8: Whether the model is to be quantized.
    """
    names = _PACKAGES[runtime][0] + (_PACKAGES[runtime][1] if int8 else ())
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """Checks that there is a runtime to compare with.

    Raises:
        MissingExtraError: Neither ONNX Runtime nor OpenVINO is installed.
    """
    if all(lacking(runtime) for runtime in _PACKAGES):
        raise MissingExtraError(
            'peers need onnxruntime or openvino, and neither is installed: pip install "dybit[bench]"'
        )


class Peers:
    """A floating-point model in the other runtimes that are installed.

    The model is exported to ONNX once. INT8 is each runtime's own recommendation. ONNX Runtime: static, per channel,
    with unsigned inputs (QDQ) for convolutional networks; dynamic for others. OpenVINO: NNCF's post-training
    quantization; for others than convolutional networks with ``model_type=TRANSFORMER``, which includes SmoothQuant.
    Use it as a context manager: it keeps its files in a temporary directory.

    Attributes:
        skipped: Why a runtime is left out, a sentence by name, such as ``"OpenVINO INT8"``.

    Args:
        model: On the CPU, in FP32; it runs in evaluation mode and is not changed.
        batches: Inputs as in :func:`dybit.quantize_`, at least one. The first is traced. They tell which dimensions
            vary.
        calibration: Inputs for INT8, which is left out if there are none.

    Raises:
        DyBitError: torch cannot export the model.
        MissingExtraError: No runtime is installed.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], calibration: Sequence[Any] = ()) -> None:
        check_installed()
        self.skipped: dict[str, str] = {}
        exported = capture.capture(model, batches, _OPSET)
        self._folder = tempfile.TemporaryDirectory(prefix="dybit-peers-")
        self._names = [str(value.name) for value in exported.graph.inputs]
        self._file = self._path("fp32")
        ir.save(exported, self._file)
        self._feeds = [self._feed(batch) for batch in calibration]
        self._static = is_convolutional(model)
        self._int8 = {ORT: self._ort_int8, OPENVINO: self._openvino_int8}
        self._files: dict[str, tuple[str, Path]] = {}  # of every contestant: runtime and model
        for runtime in _PACKAGES:
            self._add(runtime, f"{runtime} FP32", lambda: self._file, lacking(runtime))
            if calibration:
                self._add(runtime, f"{runtime} INT8", self._int8[runtime], lacking(runtime, int8=True))

    def _add(self, runtime: str, name: str, make: Callable[[], Path], missing: list[str]) -> None:
        if missing:
            self.skipped[name] = f"{name} is left out: {' and '.join(missing)} not installed"
            return
        try:
            with _quiet():
                self._files[name] = (runtime, make())
        except Exception as error:  # their errors have no common class
            self.skipped[name] = f"{name} is left out: {_reason(error)}"

    def runs(self) -> dict[str, Run]:
        """Returns functions from a batch to the model's output tensors, by name, on torch's current threads.

        Runtimes that cannot load their model are added to :attr:`skipped`.
        """
        load = {ORT: self._ort, OPENVINO: self._openvino}
        found: dict[str, Run] = {}
        for name, (runtime, file) in self._files.items():
            try:
                found[name] = load[runtime](file)
            except Exception as error:  # their errors have no common class
                self.skipped[name] = f"{name} is left out: {_reason(error)}"
        return found

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.onnx"

    def _feed(self, batch: Any) -> Feed:  # noqa: ANN401
        """The arrays of a batch by the names of the file's inputs."""
        return dict(zip(self._names, (np.ascontiguousarray(x) for x in capture.tensors(batch)), strict=True))

    def _ort(self, file: Path) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda batch: [torch.from_numpy(np.asarray(y)) for y in session.run(None, self._feed(batch))]

    def _openvino(self, file: Path) -> Run:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = openvino.Core().compile_model(str(file), "CPU", settings)
        outputs = range(len(model.outputs))

        def run(batch: Any) -> list[Tensor]:  # noqa: ANN401
            found = model(list(self._feed(batch).values()), share_inputs=True)
            return [torch.from_numpy(found[i]) for i in outputs]

        return run

    def _ort_int8(self) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, feeds: list[Feed]) -> None:
                self._feeds: Iterator[Feed] = iter(feeds)

            def get_next(self) -> Feed | None:
                return next(self._feeds, None)

        prepared, made = self._path("prepared"), self._path("ort-int8")
        # The exporter has already inferred the shapes, and symbolic inference fails on some transformers.
        quant_pre_process(str(self._file), str(prepared), skip_symbolic_shape=True)
        if self._static:
            kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            quantize_static(str(prepared), str(made), Reader(self._feeds), per_channel=True, **kinds)
        else:
            quantize_dynamic(str(prepared), str(made), weight_type=QuantType.QInt8, per_channel=True)
        return made

    def _openvino_int8(self) -> Path:
        import nncf
        import openvino

        model = openvino.Core().read_model(str(self._file))
        data = nncf.Dataset(self._feeds, lambda feed: list(feed.values()))
        kind = {} if self._static else {"model_type": nncf.ModelType.TRANSFORMER}
        made = self._path("openvino-int8").with_suffix(".xml")
        openvino.save_model(nncf.quantize(model, data, subset_size=len(self._feeds), **kind), str(made), False)
        return made


def is_convolutional(model: nn.Module) -> bool:
    """Whether a model has more convolutions than linear layers."""
    convolutions = sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
    return convolutions > sum(isinstance(m, nn.Linear) for m in model.modules())


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages and progress bars of their quantizers."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
