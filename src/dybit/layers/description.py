"""The description of a quantized layer in its state dict: how its weights are stored and its inputs are rounded.

Codes, scales and offsets cannot be read without their formats. Calibration chooses formats, so two models with the same
recipe can differ in them. The state dict of a quantized layer therefore has one more tensor that holds its formats.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.input_spec import InputSpec
from dybit.safe_files import parse_json
from dybit.tensors.quantized_tensor import TensorSpec

KEY = "dybit_spec"  # in the state dict, after the name of the layer
_MOST_BYTES = 1 << 16


def text_tensor(values: object) -> Tensor:
    """Values as JSON text in UTF-8: uint8 of shape (bytes,), on the CPU."""
    # Not torch.tensor, which would follow an ambient device.
    return torch.frombuffer(bytearray(json.dumps(values, separators=(",", ":")).encode()), dtype=torch.uint8)


def read_text(tensor: object) -> Any:  # noqa: ANN401  # any JSON
    """Reads what :func:`text_tensor` made.

    Raises:
        DyBitError: It is something else.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.numel() > _MOST_BYTES:
        what = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
        raise DyBitError(f"{KEY} must be text as uint8, not {what}")
    return parse_json(bytes(tensor.detach().cpu().flatten().tolist()), KEY)


def check_picklable(layer: nn.Module) -> None:
    """Checks that a layer can be pickled.

    Raises:
        DyBitError: A parametrization was put on it. It would be lost, as torch refuses to pickle its class.
    """
    if parametrize.is_parametrized(layer):
        raise DyBitError(
            f"a {type(layer).__name__} cannot be pickled; store its state dict, or remove parametrizations"
        )


@dataclass(frozen=True)
class Description:
    """The formats of a layer.

    Attributes:
        weights: How each weight is stored, by its name.
        input: How inputs are rounded, or None.
    """

    weights: Mapping[str, TensorSpec]
    input: InputSpec | None

    def to_tensor(self) -> Tensor:
        """Encodes the description as JSON text in UTF-8: uint8 of shape (bytes,), on the CPU."""
        values = {
            "weights": {name: spec.to_dict() for name, spec in self.weights.items()},
            "input": self.input.to_dict() if self.input else None,
        }
        return text_tensor(values)

    @classmethod
    def from_tensor(cls, tensor: object) -> Description:
        """Reads the result of :meth:`to_tensor`.

        Raises:
            DyBitError: The tensor is not a description.
        """
        values = read_text(tensor)
        if not isinstance(values, dict) or set(values) != {"weights", "input"}:
            raise DyBitError(f"{KEY} must have the fields input, weights, not {values!r:.200}")
        if not isinstance(values["weights"], dict):
            raise DyBitError(f"weights in {KEY} must be an object, not {values['weights']!r:.200}")
        weights = {name: TensorSpec.from_dict(spec) for name, spec in values["weights"].items()}
        return cls(weights, None if values["input"] is None else InputSpec.from_dict(values["input"]))

    def inputs(self, state: Mapping[str, Any], prefix: str) -> tuple[Tensor | None, Tensor | None]:
        """Returns the scale and offset of a static input in a state dict: float32 of shape (1,), or None.

        Raises:
            DyBitError: One is missing, or has another type or shape.
        """
        static = self.input is not None and self.input.mode == "static"
        wanted = {"input_scale": static, "input_offset": static and self.input is not None and self.input.offset}
        found: list[Tensor | None] = []
        for name, needed in wanted.items():
            tensor = state.get(prefix + name) if needed else None
            if needed and not (isinstance(tensor, Tensor) and tensor.shape == (1,) and tensor.dtype == torch.float32):
                what = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else "missing"
                raise DyBitError(f"{name} must be torch.float32 of shape (1,), but is {what}")
            found.append(tensor)
        return found[0], found[1]


class Described:
    """Mixin of modules: a layer whose state dict describes it.

    Loading a state dict changes how the layer rounds inputs to what the state dict says. It raises an error if the
    weights are stored in another way, since their buffers then have other shapes or meanings.

    Attributes:
        weight_specs: How each weight is stored, by its name.
        input_spec: How inputs are rounded, or None.
        dybit_spec: Always None. Distributed checkpoints look up the keys of a state dict as attributes.
    """

    weight_specs: dict[str, TensorSpec]
    input_spec: InputSpec | None
    dybit_spec: Tensor | None = None

    def set_input_(self, spec: InputSpec | None, scale: Tensor | None, offset: Tensor | None) -> None:
        """Changes how inputs are rounded, in place.

        Args:
            spec: How inputs are rounded.
            scale: The scale of static inputs: float32 of shape (1,).
            offset: The offset of static inputs that have one: float32 of shape (1,).
        """
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        cast(Any, super())._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + KEY] = Description(self.weight_specs, self.input_spec).to_tensor()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # noqa: ANN401
        stored, errors = state_dict.pop(prefix + KEY, None), rest[-1]
        try:
            buffers = cast(Any, self)._buffers
            if stored is None and any(_fits(state_dict.get(prefix + name), own) for name, own in buffers.items()):
                message = (
                    f"the state dict has no {KEY!r}, which describes how layers are stored; they are assumed to be "
                    "stored as in the model"
                )
                warnings.warn(message, DyBitWarning, stacklevel=2)
            elif stored is not None and not (isinstance(stored, Tensor) and stored.is_meta):
                found = Description.from_tensor(stored)
                _check_weights(found.weights, self.weight_specs)
                self.set_input_(found.input, *found.inputs(state_dict, prefix))
        except DyBitError as error:
            errors.append(f"layer {prefix.rstrip('.')!r} stays as it is: {error}")
            return
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *rest)


def _fits(tensor: object, buffer: Tensor | None) -> bool:
    """Whether a tensor can replace a buffer."""
    if not isinstance(tensor, Tensor) or buffer is None:
        return False
    return tensor.shape == buffer.shape and tensor.dtype == buffer.dtype


def _check_weights(found: Mapping[str, TensorSpec], own: Mapping[str, TensorSpec]) -> None:
    if set(found) != set(own):
        raise DyBitError(f"the state dict holds codes of {sorted(found)}, the model of {sorted(own)}")
    for name, spec in found.items():
        one, other = spec.to_dict(), own[name].to_dict()
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                raise DyBitError(
                    f"{name} has {key}={one.get(key)!r} in the state dict and {other.get(key)!r} in the model; "
                    "quantize with the same recipe, or use dybit.save and dybit.load"
                )


def without_descriptions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict that are not descriptions."""
    return {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] != KEY}
