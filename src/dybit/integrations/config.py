"""The configuration in ``config.json``: how the layers of a transformers checkpoint are stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any

from torch import nn

from dybit.errors import CheckpointError, DyBitError, MissingExtraError
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import layout
from dybit.models.coverage import Coverage
from dybit.recipe import Recipe
from dybit.safe_files import checked, crc32
from dybit.tensors.quantized_tensor import TensorSpec, first_members

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise MissingExtraError(
        f'DyBitConfig needs transformers 5 or newer: pip install "dybit[transformers]" ({error})'
    ) from None

METHOD = "dybit"
FORMAT_VERSION = 1
OWN, REST = "quantization_config", "config.json"  # in the checksums: those of this configuration and of the model's
_FREE = {OWN, "architectures", "dtype", "torch_dtype", "transformers_version"}  # are written later or may change
_WEIGHT_FIELDS = ("family", "granularity", "group_size", "scale", "choice")


class DyBitConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """How transformers' ``from_pretrained`` quantizes a model; stored in ``config.json`` by ``save_pretrained``.

    Args:
        recipe: A :class:`dybit.Recipe` or its JSON values, instead of ``fields``.
        layers: Of a saved model: groups of layers that are stored alike, each a mapping with ``modules`` (their names),
            ``weights`` (fields of :class:`dybit.tensors.quantized_tensor.TensorSpec`) and ``input``.
        tied: Of a saved model: maps names of weights to the names of the weights that they are tied to.
        checksums: Of a saved model, checked when it is loaded. Maps names of weights to the CRC-32 of their codes,
            scales and choices, as eight hexadecimal digits; and names of other tensors to type, shape and CRC-32, such
            as ``float32 64x48:89abcdef``. Also has checksums of these arguments and of the model's configuration.
            Tensors without a checksum are not checked.
        coverage: Of a saved model: how much of it is quantized, as :meth:`dybit.models.coverage.Coverage.to_dict`.
        strict: Raise an error, before a weight is read, if weights would stay in floating point that the recipe does
            not keep by a rule or by ``weights=None``. It is not stored.
        format_version: The version of ``layers`` and ``tied``.
        quant_method: Always ``"dybit"``.
        **fields: The fields of a recipe.

    Raises:
        DyBitError: The recipe is bad, or has static activations, which need calibration.
        CheckpointError: ``format_version`` is not known.

    Example:
        >>> DyBitConfig(weights=4, group_size=64).to_dict()["recipe"]
        {'version': 1, 'weights': 4, 'group_size': 64}
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | None = None,
        *,
        layers: list[dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        checksums: dict[str, str] | None = None,
        coverage: dict[str, Any] | None = None,
        strict: bool = False,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **fields: Any,  # noqa: ANN401
    ) -> None:
        if quant_method != METHOD:
            raise DyBitError(f"quant_method must be {METHOD!r}, not {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config has format_version {format_version!r}, this dybit reads {FORMAT_VERSION}"
            )
        if recipe is not None and fields:
            raise DyBitError(f"give a recipe or its fields, not both: {', '.join(fields)}")
        self.quant_method = quant_method
        self.format_version = format_version
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(fields if recipe is None else recipe)
        self.layers = None if layers is None else checked(layers, "layers", list)
        self.strict = strict
        self.coverage = None if coverage is None else Coverage.from_dict(coverage)
        self.tied = _texts("tied", tied)
        stored = _texts("checksums", checksums)
        self.checksums = {name: known for name, known in stored.items() if name != OWN}
        known = stored.get(OWN)
        self.damaged = known is not None and known != own_checksum(recipe, layers, self.tied, self.checksums)
        if layers is None and self.recipe.has_static_inputs:
            raise DyBitError(
                f"activations={self.recipe.activations!r} are static and need calibration: set "
                "activation_mode='dynamic', or call dybit.quantize_ with calibration and then attach_"
            )

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
        """Reads the result of :meth:`to_dict`; transformers calls it.

        Raises:
            CheckpointError: A field is malformed.
        """
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except CheckpointError as error:
            raise CheckpointError(f"quantization_config has a bad entry: {error}") from None
        except (DyBitError, TypeError) as error:
            raise CheckpointError(f"quantization_config has a bad entry: {error!s:.400}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON values for ``config.json``."""
        data = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "recipe": self.recipe.to_dict(),
        }
        if self.layers is not None:
            data["layers"] = copy.deepcopy(self.layers)
        if self.coverage is not None:
            data["coverage"] = self.coverage.to_dict()
        if self.tied:
            data["tied"] = dict(self.tied)
        if self.checksums:
            own = own_checksum(data["recipe"], self.layers, self.tied, self.checksums)
            data["checksums"] = {**self.checksums, OWN: own}
        return data

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def describe(layers: Iterable[tuple[str, Mapping[str, TensorSpec], InputSpec | None]]) -> list[dict[str, Any]]:
    """Describes layers for ``config.json``: groups of names, with the formats of weights and inputs of each."""
    groups: list[dict[str, Any]] = []
    for name, specs, input_spec in layers:
        fields = [spec.to_dict() for spec in specs.values()][:1]
        weights = {key: fields[0][key] for key in (*_WEIGHT_FIELDS, "members") if key in fields[0]} if fields else None
        inputs = input_spec.to_dict() if input_spec else None
        group = next((g for g in groups if (g["weights"], g["input"]) == (weights, inputs)), None)
        if group is None:
            groups.append(group := {"modules": [], "weights": weights, "input": inputs})
        group["modules"].append(name)
    return groups


def _texts(name: str, values: object) -> dict[str, str]:
    """Returns an argument that maps names to texts; empty for None."""
    found = {} if values is None else checked(values, name, dict)
    return {key: checked(text, f"{name}[{key!r}]", str) for key, text in found.items()}


def stored_layers(config: DyBitConfig) -> Iterator[tuple[str, dict[str, Any] | None, InputSpec | None]]:
    """Yields name, weight fields and input of every layer in ``config.json``."""
    try:
        for group in config.layers or ():
            checked(group, "a group of layers", dict)
            weights, stored = group["weights"], group["input"]
            checked(weights, "weights", dict, NoneType)
            checked(stored, "input", dict, NoneType)
            input_spec = None if stored is None else InputSpec.from_dict(stored)
            if weights is not None and set(weights) - {"members"} != set(_WEIGHT_FIELDS):
                raise DyBitError(f"weights must have the fields {', '.join(_WEIGHT_FIELDS)}, not {weights!r:.200}")
            for name in checked(group["modules"], "modules", list):
                yield checked(name, "the name of a module", str), weights, input_spec
    except DyBitError as error:
        raise CheckpointError(f"quantization_config has a bad entry: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config has a missing or bad field: {error!r}") from None


def stored_spec(weights: dict[str, Any] | None, shape: tuple[int, ...], module: nn.Module) -> TensorSpec:
    """Returns the spec of a weight from its stored fields and its shape.

    Raises:
        CheckpointError: A field is malformed.
    """
    try:
        stored = weights or {}
        return TensorSpec(shape=shape, **layout(module), **{"members": first_members(stored.get("family")), **stored})
    except (DyBitError, TypeError) as error:
        raise CheckpointError(f"quantization_config has a bad entry: {error}") from None


def own_checksum(recipe: object, layers: object, tied: object, checksums: object) -> str:
    """Returns the CRC-32 of a stored configuration."""
    return crc32([json.dumps([recipe, layers, tied, checksums], sort_keys=True, default=repr).encode()])


def checksum_rest(config: Mapping[str, Any]) -> str:
    """Returns the CRC-32 of the model's part of ``config.json``."""
    rest = {name: value for name, value in config.items() if name not in _FREE}
    return crc32([json.dumps(rest, sort_keys=True).encode()])
