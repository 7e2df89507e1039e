"""Runs an ONNX file beside the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import onnx
from dybit.errors import DyBitError
from dybit.models.running import evaluating, run_batch
from dybit.onnx.capture import arguments, widened
from dybit.onnx.graph import Array


@dataclass(frozen=True)
class Check:
    """How a file's outputs compare with the model's.

    Attributes:
        runtime: What computed them.
        difference: The largest difference as a share of the largest magnitude of the model's output.
        error: Root of the mean square of the differences as a share of that of the model's output.
    """

    runtime: str
    difference: float
    error: float


def verify(data: bytes, model: nn.Module, batch: Any, *, runtime: bool = True) -> Check:  # noqa: ANN401
    """Checks a file and compares it on a batch, and on its first sample alone where the file allows that.

    Args:
        data: The ONNX file.
        model: What it should compute, in any mode.
        batch: Inputs as in :func:`dybit.quantize_`.
        runtime: Whether ONNX Runtime knows all types in use; else FLOAT4E2M1 is decoded for it.

    Raises:
        DyBitError: The file is not a valid ONNX, does not run, or has other outputs than the model.
    """
    proto = onnx.load_from_string(data)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DyBitError(f"the exported graph does not pass ONNX's checker: {reason}") from error
    names = [value.name for value in proto.graph.input]
    run, said = _runtime(data if runtime else _decoded(proto), names)
    said += "" if runtime else ", FLOAT4E2M1 decoded by ONNX's reference implementation,"
    dynamic = all(v.type.tensor_type.shape.dim and v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input)
    batches = [batch]
    if dynamic and names:
        batches = [widened(batch), pytree.tree_map_only(Tensor, lambda x: x[:1], batch)]
    largest = errors = energy = 0.0
    for part in batches:
        expected, found = _outputs(model, part), run(_inputs(part))
        if [x.shape for x in expected] != [x.shape for x in found]:
            shapes = [tuple(x.shape) for x in expected], [tuple(x.shape) for x in found]
            raise DyBitError(f"{said} gives outputs of shapes {shapes[1]}, the model {shapes[0]}")
        for a, b in zip(expected, found, strict=True):
            if a.size == 0:
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            scale = np.abs(a[np.isfinite(a)]).max(initial=0.0) or 1.0
            with np.errstate(invalid="ignore"):  # infinity minus infinity, where both agree
                gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            largest = max(largest, float(np.nan_to_num(gap, nan=np.inf).max()) / scale)
            errors += float(np.square(gap).sum())
            energy += float(np.square(a[np.isfinite(a)]).sum())
    return Check(said, largest, (errors / energy) ** 0.5 if energy else 0.0)


def _inputs(batch: Any) -> list[Array]:  # noqa: ANN401
    return [x.detach().cpu().numpy() for x in pytree.tree_leaves(arguments(batch)) if isinstance(x, Tensor)]


def _outputs(model: nn.Module, batch: Any) -> list[Array]:  # noqa: ANN401
    with evaluating(model):
        result = run_batch(model, batch)
    return [_array(x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def _array(x: Tensor) -> Array:
    x = x.detach().cpu()
    return x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _runtime(data: bytes, names: list[str]) -> tuple[Any, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    said = f"ONNX Runtime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise DyBitError(f"{said} cannot load the exported graph: {str(error).strip().splitlines()[0]}") from error

    return _guarded(session, names, said)


def _decoded(proto: onnx.ModelProto) -> bytes:
    """A file with its FLOAT4E2M1 weights decoded to FP32, by ONNX's own reference implementation."""
    from onnx.reference import ReferenceEvaluator

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in list(graph.node):
        first = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if first is None or first.data_type != onnx.TensorProto.FLOAT4E2M1:
            continue
        output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        part = onnx.helper.make_graph([node], "part", [], [output], [stored[name] for name in node.input])
        (value,) = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=proto.opset_import)).run(None, {})
        graph.node.remove(node)
        graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), node.output[0]))
    for tensor in [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT4E2M1]:
        graph.initializer.remove(tensor)
    return bytes(result.SerializeToString())


def _guarded(session: Any, names: list[str], said: str) -> tuple[Any, str]:  # noqa: ANN401
    def run(inputs: list[Array]) -> list[Array]:
        try:
            return [np.asarray(y) for y in session.run(None, dict(zip(names, inputs, strict=True)))]
        except Exception as error:  # its errors have no common class
            raise DyBitError(f"{said} cannot run the exported graph: {str(error).strip().splitlines()[0]}") from error

    return run, said
