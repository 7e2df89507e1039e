"""Hugging Face transformers (5.0 and later): ``from_pretrained`` quantizes while it loads, and loads what was saved.

Only hooks that have been stable since 5.0 are used. While a model is loaded, a layer shows transformers, which
initializes what a file lacks, a weight without values; it is swapped when all weights are there.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableSet
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dybit.errors import CheckpointError, DyBitError, DyBitWarning, MissingExtraError
from dybit.layers.description import without_descriptions
from dybit.layers.input_spec import InputSpec
from dybit.layers.kinds import is_experts, layout, weight_names
from dybit.layers.quantized import quantized_layers
from dybit.layers.swap import swap_
from dybit.models.coverage import measure
from dybit.models.plan import Plan, Ties, plan_layers, weight_spec
from dybit.models.preparation import bypass_fast_path_, dequantize_, folded_pairs, make_plain_
from dybit.ptq.rounding.nearest import layer_input, quantize_layer
from dybit.recipe import LayerRecipe, Recipe
from dybit.safe_files import checked, crc32, label, read_json
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec, first_members

try:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"found {transformers.__version__}")
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise MissingExtraError(
        f'DyBitConfig needs transformers 5 or newer: pip install "dybit[transformers]" ({error})'
    ) from None

METHOD = "dybit"
FORMAT_VERSION = 1
_OWN, _REST = "quantization_config", "config.json"  # in the checksums: those of this configuration and of the model's
_FREE = {_OWN, "architectures", "dtype", "torch_dtype", "transformers_version"}  # are written later or may change
_CAST = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
_WEIGHT_FIELDS = ("family", "granularity", "group_size", "scale", "choice")


@register_quantization_config(METHOD)
class DyBitConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """How transformers' ``from_pretrained`` quantizes a model; stored in ``config.json`` by ``save_pretrained``.

    Args:
        recipe: What to do, as a :class:`dybit.Recipe` or its JSON values; instead of ``fields``.
        layers: Of a saved model: groups of layers that are stored alike, each a mapping with ``modules`` (their names),
            ``weights`` (fields of :class:`dybit.tensors.quantized_tensor.TensorSpec`) and ``input``.
        tied: Of a saved model: from names of weights to those of the weights that they are tied to.
        checksums: Of a saved model, checked when it is loaded: from names of weights to the CRC-32 of their codes,
            scales and choices, as eight hexadecimal digits; from names of other tensors to type, shape and
            CRC-32, as in ``float32 64x48:89abcdef``, for those who load them as such; those of all these
            arguments and of the model's own configuration. What has none is not checked.
        strict: Raise an error before a weight is read if weights would stay in floating point that the recipe does not
            keep by a rule or by ``weights=None``. It is not stored.
        format_version: Of ``layers`` and ``tied``.
        quant_method: Always ``"dybit"``.
        **fields: The fields of a recipe.

    Raises:
        DyBitError: The recipe is bad, or has static activations, which only a calibrated model can have.
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
        self.tied = _texts("tied", tied)
        stored = _texts("checksums", checksums)
        self.checksums = {name: known for name, known in stored.items() if name != _OWN}
        known = stored.get(_OWN)
        self.damaged = known is not None and known != _own(recipe, layers, self.tied, self.checksums)
        if layers is None and self.recipe.activations is not None and self.recipe.activation_mode == "static":
            raise DyBitError(
                f"activations={self.recipe.activations!r} are static and need calibration: set "
                "activation_mode='dynamic', or call dybit.quantize_ with calibration and then attach_"
            )

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
        """Reads what :meth:`to_dict` wrote; transformers calls it.

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
        """The JSON values in ``config.json``."""
        data = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "recipe": self.recipe.to_dict(),
        }
        if self.layers is not None:
            data["layers"] = copy.deepcopy(self.layers)
        if self.tied:
            data["tied"] = dict(self.tied)
        if self.checksums:
            own = _own(data["recipe"], self.layers, self.tied, self.checksums)
            data["checksums"] = {**self.checksums, _OWN: own}
        return data

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@dataclass
class _Layer:
    """A layer of a model that is being loaded."""

    module: nn.Module
    specs: dict[str, TensorSpec]
    input: InputSpec | None
    dtype: torch.dtype
    recipe: LayerRecipe | None = None  # None for stored codes
    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)  # by weight, of stored codes


@register_quantizer(METHOD)
class DyBitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads, quantizes and saves models for transformers; made by ``from_pretrained``."""

    requires_calibration = False
    is_trainable = True  # adapters: gradients reach inputs and biases, codes have none
    is_compileable = True
    is_qat_trainable = False

    def __init__(self, quantization_config: DyBitConfig, **kwargs: Any) -> None:  # noqa: ANN401
        # A copy: a config may serve several models, and this one will say what became of its own.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._layers: dict[str, _Layer] = {}
        self._later: list[Plan] = []  # layers that are quantized when all weights are there
        self._folder = "the checkpoint"  # for errors
        self._stored: set[str] = set()  # the keys of the files
        self._ties: dict[str, str] = {}  # taken from the model's own table, which knows parameters only

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:  # noqa: ANN401
        """Checks that all layers come to one device, before anything is read.

        Raises:
            DyBitError: They do not.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise DyBitError(
                f"device_map has {', '.join(sorted(devices))}, but quantized layers can neither be offloaded nor "
                "spread over devices: give one device"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:  # noqa: ANN401
        """The type to which a stored tensor is cast; None for codes and for scales in eight bits."""
        kind = str(param.get_dtype()) if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if kind.removeprefix("torch.") in _CAST else None

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    def get_state_dict_and_metadata(self, model: Any, **_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:  # noqa: ANN401
        """What is saved: no descriptions, since ``config.json`` has them. Notes checksums of all but the codes."""
        config = model.config.quantization_config
        known = {name: crc for name, crc in config.checksums.items() if ":" not in crc}
        config.checksums = known | {
            name: label(tensor.dtype, tensor.shape, [tensor]) for name, tensor in _plain(model).items()
        }
        config.checksums[_REST] = checksum_rest(json.loads(model.config.to_json_string()))
        return without_descriptions(model.state_dict()), {}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:  # noqa: ANN401
        """Whether a tensor is a weight that is quantized, or whose codes replace one of another shape."""
        layer, weight = self._find(param_name)
        return layer is not None and weight in layer.specs

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of one element of a parameter, as it will be held."""
        layer, weight = self._find(param_name)
        if layer is None or weight not in layer.specs or layer.recipe is None:
            return float(param.element_size())
        spec = layer.specs[weight]
        return spec.nbytes / (spec.rows * spec.columns)

    def get_quantize_ops(self) -> Any:  # noqa: ANN401
        """The operation that transformers applies to tensors to be quantized."""
        from transformers.core_model_loading import ConversionOps

        class Quantize(ConversionOps):  # type: ignore[misc]
            def __init__(self, quantizer: DyBitQuantizer) -> None:
                self.quantizer = quantizer

            def convert(
                self,
                input_dict: dict[str, Any],
                *,
                full_layer_name: str = "",
                missing_keys: MutableSet[str] | None = None,
                **_: Any,  # noqa: ANN401
            ) -> dict[str, Tensor]:
                kept = {}
                for key, value in input_dict.items():
                    tensor = value[0] if isinstance(value, list) else value
                    name = full_layer_name if len(input_dict) == 1 else key
                    if not self.quantizer.take(name, tensor, missing_keys):
                        kept[key] = tensor
                return kept

        return Quantize(self)

    def take(self, key: str, tensor: Tensor, missing: MutableSet[str] | None) -> bool:
        """Quantizes a weight for its layer and for those tied to it; False if it is to be kept."""
        layer, weight = self._find(key)
        if layer is None or layer.recipe is None or weight not in layer.specs:
            return False
        codes = quantize(tensor, layer.specs[weight], method=layer.recipe.method, percentile=layer.recipe.percentile)
        for other in [key, *self._tied_to(key)]:
            owner, name = self._find(other)
            assert owner is not None
            stored = owner.codes.get(name)
            # A file can have a tied weight twice, with other values even: then it is not tied.
            if stored is None or (other == key and not _same(stored, codes)):
                owner.codes[name], owner.dtype = codes, tensor.dtype
            if missing is not None:
                missing.discard(other)
            # Stays without values, and must not be given random ones.
            cast(Any, owner.module._parameters[name])._is_hf_initialized = True
        return True

    def _find(self, key: str) -> tuple[_Layer | None, str]:
        name, _, weight = key.rpartition(".")
        return self._layers.get(name), weight

    def _tied_to(self, key: str) -> list[str]:
        source = self._ties.get(key, key)
        return [other for other in {source, *self._ties} if other != key and self._ties.get(other, other) == source]

    def _process_model_before_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        checkpoint_files: list[str] | None = None,
        **_: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        files = [Path(file) for file in checkpoint_files or ()]
        self._stored = _check_headers(files)
        self._folder = str(files[0].parent) if files else self._folder
        if self.pre_quantized and self.quantization_config.layers is not None:
            _check_rest(files, self.quantization_config.checksums.get(_REST))
            try:
                self._prepare(model)
            except CheckpointError as error:
                raise CheckpointError(f"{self._folder}: {error}") from None
        else:
            self._plan(model)
        return model

    def _plan(self, model: Any) -> None:  # noqa: ANN401
        """Finds the layers to quantize, on a model without values."""
        table = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for target, source in table.items():  # tied only after loading, but one decision is due for both
            holder, name = model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]
            setattr(holder, name, model.get_parameter(source))
        for plan in plan_layers(model, self.quantization_config.recipe, values=False):
            names = weight_names(plan.module) if plan.recipe.weights is not None else ()
            if any(plan.module._parameters.get(name) is None for name in names):
                self._later.append(plan)  # made by a parametrization of other parameters
                continue
            shapes = {name: tuple(getattr(plan.module, name).shape) for name in names}
            self._layers[plan.name] = _Layer(
                plan.module,
                {name: weight_spec(plan.recipe, shape, **layout(plan.module)) for name, shape in shapes.items()},
                layer_input(plan.recipe, plan.module)[0],
                getattr(plan.module, weight_names(plan.module)[0]).dtype,
                plan.recipe,
            )
        if self.quantization_config.strict:
            planned = [name for name, layer in self._layers.items() if layer.specs]
            planned += [plan.name for plan in self._later]
            measure(model, self.quantization_config.recipe, planned).check()
        quantized = {f"{name}.{weight}" for name, layer in self._layers.items() for weight in layer.specs}
        self._take_over(model, {t: s for t, s in table.items() if t in quantized and s in quantized})

    def _prepare(self, model: Any) -> None:  # noqa: ANN401
        """Gives the layers of a stored model empty buffers for their codes."""
        modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

        def resolve(name: str) -> str:
            """A name in this model, which may be the base of the one that was saved, or the other way round."""
            near = [name, prefix + name, name.removeprefix(prefix)]
            return next((other for other in near if other in modules), "")

        for name, weights, input_spec in _stored_layers(self.quantization_config):
            module = modules.get(resolve(name))
            if module is None or not resolve(name):
                continue  # such as the head, where only the base is loaded
            if not weight_names(module):
                raise CheckpointError(f"quantization_config has {name!r}, which is {type(module).__name__} here")
            make_plain_(module)
            names = weight_names(module) if weights else ()
            first = weight_names(module)[0]
            dtype = _held_type(model, f"{resolve(name)}.{first}", getattr(module, first).dtype)
            shapes = {weight: tuple(getattr(module, weight).shape) for weight in names}
            specs = {key: _spec(weights, shape, module) for key, shape in shapes.items()}
            known = {weight: self.quantization_config.checksums.get(f"{name}.{weight}", "") for weight in specs}
            self._layers[resolve(name)] = _Layer(module, specs, input_spec, dtype, checksums=known)
        ties = {
            _resolve_key(target, resolve): _resolve_key(s, resolve)
            for target, s in self.quantization_config.tied.items()
        }
        if self.quantization_config.damaged:
            raise CheckpointError(f"{_OWN} in config.json is damaged: its contents are not those that were saved")
        ties |= self._heads(model)
        self._take_over(model, {t: s for t, s in ties.items() if t and s})
        for name, layer in self._layers.items():
            own = [weight for weight in layer.specs if f"{name}.{weight}" not in self._ties]
            _await_(layer, own)

    def _heads(self, model: Any) -> dict[str, str]:  # noqa: ANN401
        """Layers of this model that the saved one lacked, such as a head, tied to a weight that it had."""
        found = {}
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            first, weight = self._find(source)
            name, _, own = target.rpartition(".")
            module = model.get_submodule(name)
            absent = name not in self._layers and not self._stored & {
                target,
                target.removeprefix(f"{model.base_model_prefix}."),
            }
            if first is None or weight not in first.specs or not absent or own not in weight_names(module):
                continue
            shape, spec = tuple(getattr(module, own).shape), first.specs[weight]
            if shape != spec.shape or layout(module) != layout(first.module):
                continue
            recipe = self.quantization_config.recipe.layer(name)
            dynamic = recipe is not None and recipe.activation_mode == "dynamic"
            inputs = layer_input(recipe, module)[0] if recipe is not None and dynamic else None
            self._layers[name] = _Layer(module, {own: spec}, inputs, first.dtype)
            found[target] = source
        return found

    def _take_over(self, model: Any, ties: dict[str, str]) -> None:  # noqa: ANN401
        """Makes quantized weights that are tied our business: transformers can only tie parameters."""
        self._ties = ties
        table = getattr(model, "all_tied_weights_keys", None) or {}
        model.all_tied_weights_keys = {
            t: s for t, s in table.items() if not any(self.param_needs_quantization(model, key) for key in (t, s))
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:  # noqa: ANN401
        if self.pre_quantized:
            for name, layer in self._layers.items():
                layer.codes = _arrived_(name, layer, self._folder)
            for target, source in self._ties.items():
                (owner, weight), (first, first_weight) = self._find(target), self._find(source)
                if owner is not None and first is not None:
                    owner.codes[weight] = first.codes[first_weight]
        for layer in self._layers.values():
            if len(layer.codes) < len(layer.specs):
                continue  # a head that the file did not have, initialized at random: it is there to be trained
            scale, offset = (layer.module._buffers.pop(key, None) for key in ("input_scale", "input_offset"))
            swap_(layer.module, layer.codes, layer.input, scale, offset, layer.dtype)
        for plan in self._later:
            make_plain_(plan.module)
            quantize_layer(plan, None, Ties(()))
        if self.pre_quantized:
            _check_plain(self._folder, model, self.quantization_config.checksums)
        bypass_fast_path_(model, quantized_layers(model).values())
        _store_as_held_(model)
        model._dybit_recipe = self.quantization_config.recipe
        if not self.pre_quantized:
            measure(model, self.quantization_config.recipe).announce()
        _describe_(self.quantization_config, model)
        self._layers = {}
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:  # noqa: ANN401
        dequantize_(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config that was read has its name
        model.all_tied_weights_keys = {**(getattr(model, "all_tied_weights_keys", None) or {}), **self._ties}
        return model if dtype is None else model.to(dtype)


def attach_(model: Any) -> Any:  # noqa: ANN401
    """Makes ``save_pretrained`` work on a transformers model that :func:`dybit.quantize_` quantized, in place.

    This is how a calibrated model (static activations, better weights) becomes a checkpoint for ``from_pretrained``.

    Args:
        model: A ``PreTrainedModel`` after :func:`dybit.quantize_`.

    Returns:
        The same model.

    Raises:
        DyBitError: It has no quantized layer, is no model of transformers, or has batch norms that were folded into
            convolutions, for which a checkpoint of transformers has no place.
    """
    if not quantized_layers(model) or not hasattr(model, "save_pretrained"):
        raise DyBitError(f"model must be a transformers model after quantize_, not {type(model).__name__}")
    if folded_pairs(model):
        raise DyBitError(f"model has a folded batch norm, {folded_pairs(model)[0][1]!r}: save it with dybit.save")
    recipe = getattr(model, "_dybit_recipe", None) or Recipe()
    config = DyBitConfig(recipe, layers=[])
    _describe_(config, model)
    model.config.quantization_config = config
    quantizer = DyBitQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    _store_as_held_(model)
    quantizer._take_over(model, config.tied)
    return model


def _store_as_held_(model: Any) -> None:  # noqa: ANN401
    """Has transformers store weights as the model holds them, names apart: codes cannot be cut into other tensors."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        model._weight_conversions = [conversion for conversion in known if not getattr(conversion, "operations", None)]
    elif any(is_experts(layer) for layer in quantized_layers(model).values()):
        model._weight_conversions = []


def _describe_(config: DyBitConfig, model: nn.Module) -> None:
    """Writes down how the layers of a model are stored, those that are alike in one group."""
    owners: dict[int, str] = {}
    config.tied, config.checksums, layers = {}, {}, quantized_layers(model)
    config.layers = describe((name, layer.weight_specs, layer.input_spec) for name, layer in layers.items())
    # Transformers stores what its own table does not map to something else.
    targets = [re.compile(pattern) for pattern in getattr(model, "_tied_weights_keys", None) or ()]
    held = [(f"{name}.{weight}", layer, weight) for name, layer in layers.items() for weight in layer.weight_specs]
    for key, layer, weight in sorted(held, key=lambda item: any(target.search(item[0]) for target in targets)):
        source = owners.setdefault(id(layer._buffers[weight]), key)
        if source != key:
            config.tied[key] = source
        else:
            stored = (layer._buffers[weight + suffix] for suffix in layer.weight_specs[weight].buffers())
            config.checksums[key] = crc32(cast(Tensor, part) for part in stored)


def describe(layers: Iterable[tuple[str, Mapping[str, TensorSpec], InputSpec | None]]) -> list[dict[str, Any]]:
    """The layers in ``config.json``: groups of names, with how the weights and inputs of each are stored."""
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
    """An argument that maps names to texts; empty for None."""
    found = {} if values is None else checked(values, name, dict)
    return {key: checked(text, f"{name}[{key!r}]", str) for key, text in found.items()}


def _stored_layers(config: DyBitConfig) -> Iterator[tuple[str, dict[str, Any] | None, InputSpec | None]]:
    """Name, weight fields and input of every layer that ``config.json`` names."""
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


def _spec(weights: dict[str, Any] | None, shape: tuple[int, ...], module: nn.Module) -> TensorSpec:
    try:
        stored = weights or {}
        return TensorSpec(shape=shape, **layout(module), **{"members": first_members(stored.get("family")), **stored})
    except (DyBitError, TypeError) as error:
        raise CheckpointError(f"quantization_config has a bad entry: {error}") from None


def _held_type(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """The type in which transformers would hold a weight: some models keep some in float32."""
    planned = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    found = (kept for pattern, kept in planned.items() if re.search(pattern.replace("*", ".*"), key))
    return next(found, dtype)


def _resolve_key(key: str, resolve: Any) -> str:  # noqa: ANN401
    name, _, weight = str(key).rpartition(".")
    return f"{found}.{weight}" if (found := resolve(name)) else ""


def _await_(layer: _Layer, own: list[str]) -> None:
    """Prepares a layer for stored codes: as empty buffers for the loader, behind a weight of the right shape."""
    module, shown = layer.module, {}
    for weight, spec in layer.specs.items():
        shown[weight] = cast(Any, module._parameters.pop(weight)).detach()
        shown[weight]._is_hf_initialized = True
        for suffix, (shape, dtype) in spec.buffers().items() if weight in own else ():
            module._buffers[weight + suffix] = torch.empty(shape, dtype=dtype, device="meta")
    if layer.input is not None and layer.input.mode == "static":
        for key in ("input_scale", *(["input_offset"] if layer.input.offset else [])):
            module._buffers[key] = torch.empty(1, dtype=torch.float32, device="meta")

    def show(tensor: Tensor) -> property:
        return property(lambda _: tensor)

    members = {weight: show(tensor) for weight, tensor in shown.items()}
    module.__class__ = type(type(module).__name__, (type(module),), members)


def _arrived_(name: str, layer: _Layer, folder: str) -> dict[str, QuantizedTensor]:
    """What the loader put into a layer that :func:`_await_` prepared, checked; the layer is as it was before."""
    module = layer.module
    module.__class__ = type(module).__mro__[1]
    for key in ("input_scale", "input_offset"):
        if key in module._buffers:
            _check_part(folder, f"{name}.{key}", module._buffers[key], (1,), torch.float32)
    codes = {}
    for weight, spec in layer.specs.items():
        if weight not in module._buffers:
            continue  # tied to another
        parts: dict[str, Any] = {}
        for suffix, (shape, dtype) in spec.buffers().items():
            parts[suffix] = module._buffers.pop(weight + suffix)
            _check_part(folder, f"{name}.{weight}{suffix}", parts[suffix], shape, dtype)
        codes[weight] = QuantizedTensor(
            spec, parts[""], parts["_scale"], parts.get("_choice"), parts.get("_tensor_scale")
        )
        if layer.checksums.get(weight, "") not in ("", crc32(parts.values())):
            raise CheckpointError(f"{folder} is damaged: the codes of '{name}.{weight}' are not those that were saved")
    return codes


def _own(recipe: object, layers: object, tied: object, checksums: object) -> str:
    """CRC-32 of a configuration, as it is stored."""
    return crc32([json.dumps([recipe, layers, tied, checksums], sort_keys=True, default=repr).encode()])


def checksum_rest(config: Mapping[str, Any]) -> str:
    """CRC-32 of what ``config.json`` says about the model itself."""
    rest = {name: value for name, value in config.items() if name not in _FREE}
    return crc32([json.dumps(rest, sort_keys=True).encode()])


def _check_headers(files: Iterable[Path]) -> set[str]:
    """Checks files before transformers opens them, whose error does not say which one it is; returns their keys."""
    keys: set[str] = set()
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    keys.update(opened.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
    return keys


def _check_rest(files: Iterable[Path], known: str | None) -> None:
    """Warns of a ``config.json`` that is not the one that was saved: people do edit it."""
    path = next((file.with_name("config.json") for file in files), None)
    if known is not None and path is not None and path.is_file() and checksum_rest(read_json(path)) != known:
        message = f"{path} is not what was saved: it was edited, or is damaged"
        warnings.warn(message, DyBitWarning, stacklevel=2)


def _plain(model: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """What is stored of a model beside codes and their scales, where it is at hand as a whole."""
    kept = set(model._keys_to_ignore_on_save or ())
    for name, layer in quantized_layers(model).items():
        kept |= {f"{name}.{key}{suffix}" for key, spec in layer.weight_specs.items() for suffix in spec.buffers()}
    state = {name: tensor for name, tensor in without_descriptions(model.state_dict()).items() if name not in kept}
    return {name: tensor for name, tensor in state.items() if type(tensor) is Tensor and not tensor.is_meta}


def _check_plain(folder: str, model: Any, checksums: Mapping[str, str]) -> None:  # noqa: ANN401
    """Checks what lies beside the codes, as far as the model has it in the type and shape in which it was stored."""
    tensors, prefix = _plain(model), f"{model.base_model_prefix}."
    for name, known in checksums.items():
        near = (other for other in (name, prefix + name, name.removeprefix(prefix)) if other in tensors)
        tensor = tensors.get(next(near, ""))
        found = known if tensor is None else label(tensor.dtype, tensor.shape, [tensor])
        if found != known and found.partition(":")[0] == known.partition(":")[0]:
            raise CheckpointError(f"{folder} is damaged: {name!r} is not what was saved")


def _same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.buffers().values(), other.buffers().values(), strict=True))


def _check_part(folder: str, key: str, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not getattr(part, "_is_hf_initialized", False) or part is None:
        raise CheckpointError(f"{folder} lacks {key!r}")
    if tuple(part.shape) != shape or part.dtype != dtype:
        raise CheckpointError(
            f"{folder} does not fit: {key!r} is {part.dtype} of shape {tuple(part.shape)}, "
            f"expected {dtype} of shape {shape}"
        )
