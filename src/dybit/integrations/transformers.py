"""Hugging Face transformers (5.0 and later): ``from_pretrained`` quantizes or loads checkpoints.

It uses only hooks that have been stable since 5.0. Transformers initializes weights that a file lacks, so during
loading a layer exposes a weight without values. The layer is swapped after all weights have arrived.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import MutableSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import CheckpointError, DyBitError, MissingExtraError
from dybit.integrations.config import (
    METHOD,
    OWN,
    REST,
    DyBitConfig,
    checksum_rest,
    describe,
    stored_layers,
    stored_spec,
)
from dybit.integrations.loading import (
    LoadingLayer,
    check_codes_,
    check_headers,
    check_plain,
    check_rest,
    expect_codes_,
    hide_weight_,
    in_memory,
    offload_,
    plain_tensors,
    restore_,
    same_codes,
)
from dybit.integrations.parameters import count_codes_
from dybit.layers.description import without_descriptions
from dybit.layers.kinds import is_experts, layout, weight_names
from dybit.layers.offloading import held_tensor
from dybit.layers.quantized import is_fused, quantized_layers
from dybit.layers.swap import swap_
from dybit.models.coverage import measure
from dybit.models.plan import Plan, Ties, plan_layers, weight_spec
from dybit.models.preparation import bypass_fast_path_, dequantize_, folded_pairs, make_plain_
from dybit.ptq.rounding.nearest import layer_input, quantize_layer
from dybit.recipe import Recipe
from dybit.runtime.fuse import fusers
from dybit.safe_files import crc32, label
from dybit.tensors.encoding import quantize

try:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"found {transformers.__version__}")
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
except ImportError as error:
    raise MissingExtraError(
        f'DyBitConfig needs transformers 5 or newer: pip install "dybit[transformers]" ({error})'
    ) from None

_CAST = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


register_quantization_config(METHOD)(DyBitConfig)


def _fuse_decoder(model: nn.Module) -> nn.Module | None:
    """Fuses a decoder. Its module imports parts of transformers that are not there yet when dybit is registered."""
    from dybit.integrations.decoder import fuse_decoder

    return fuse_decoder(model)


fusers.append(_fuse_decoder)


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
        self.loading: dict[str, LoadingLayer] = {}
        self._later: list[Plan] = []  # layers that are quantized when all weights are there
        self._folder = "the checkpoint"  # for errors
        self._stored: set[str] = set()  # the keys of the files
        self.ties: dict[str, str] = {}  # taken from the model's own table, which knows parameters only

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:  # noqa: ANN401
        """Checks, before anything is read, that the devices exist.

        Raises:
            DyBitError: One does not.
        """
        accelerator, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        there = {"cpu", "disk", "meta"} | {accelerator.type if accelerator else "cpu"}
        for device in device_map.values() if isinstance(device_map, dict) else ():
            index = device if isinstance(device, int) else torch.device(device).index if device != "disk" else None
            kind = "" if isinstance(device, int) else str(device).partition(":")[0]
            if (kind and kind not in there) or (kind != "cpu" and index is not None and index >= count):
                raise DyBitError(f"device_map has the device {str(device)!r}, which this machine does not have")

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:  # noqa: ANN401
        """The type to which a stored tensor is cast; None for codes and for scales in eight bits."""
        kind = str(param.get_dtype()) if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if kind.removeprefix("torch.") in _CAST else None

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    def get_state_dict_and_metadata(self, model: Any, **_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:  # noqa: ANN401
        """Returns the tensors to save without descriptions, which are in ``config.json``. Adds checksums to it."""
        config = model.config.quantization_config
        known = {name: crc for name, crc in config.checksums.items() if ":" not in crc}
        config.checksums = known | {
            name: label(tensor.dtype, tensor.shape, [tensor]) for name, tensor in plain_tensors(model).items()
        }
        config.checksums[REST] = checksum_rest(json.loads(model.config.to_json_string()))
        state = without_descriptions(model.state_dict())
        for name, layer in quantized_layers(model).items():
            for key, buffer in layer._buffers.items():
                if buffer is not None and buffer.is_meta and f"{name}.{key}" in state:
                    state[f"{name}.{key}"] = held_tensor(layer, key).clone()  # transformers takes it for the weight
        return state, {}

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
        for other in [key, *self.tied_to(key)]:
            owner, name = self._find(other)
            assert owner is not None
            stored = owner.codes.get(name)
            # A file can have a tied weight twice, with other values even: then it is not tied.
            if stored is None or (other == key and not same_codes(stored, codes)):
                owner.codes[name], owner.dtype = codes, tensor.dtype
                if name in owner.module._parameters:
                    hide_weight_(owner, name, {})
                owner.module._buffers.update({name + suffix: part for suffix, part in codes.buffers().items()})
            if missing is not None:
                missing.discard(other)
        return True

    def _find(self, key: str) -> tuple[LoadingLayer | None, str]:
        name, _, weight = key.rpartition(".")
        return self.loading.get(name), weight

    def tied_to(self, key: str) -> list[str]:
        """The other keys that share the weight of a key."""
        source = self.ties.get(key, key)
        return [other for other in {source, *self.ties} if other != key and self.ties.get(other, other) == source]

    def _process_model_before_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        checkpoint_files: list[str] | None = None,
        **_: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        files = [Path(file) for file in checkpoint_files or ()]
        self._stored = check_headers(files)
        self._folder = str(files[0].parent) if files else self._folder
        if self.pre_quantized and self.quantization_config.layers is not None:
            check_rest(files, self.quantization_config.checksums.get(REST))
            try:
                self._prepare(model)
            except CheckpointError as error:
                raise CheckpointError(f"{self._folder}: {error}") from None
        else:
            self.plan(model)
        return model

    def plan(self, model: Any) -> None:  # noqa: ANN401
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
            self.loading[plan.name] = LoadingLayer(
                plan.module,
                {name: weight_spec(plan.recipe, shape, **layout(plan.module)) for name, shape in shapes.items()},
                layer_input(plan.recipe, plan.module)[0],
                getattr(plan.module, weight_names(plan.module)[0]).dtype,
                plan.recipe,
            )
        if self.quantization_config.strict:
            planned = [name for name, layer in self.loading.items() if layer.specs]
            planned += [plan.name for plan in self._later]
            measure(model, self.quantization_config.recipe, planned).check()
        quantized = {f"{name}.{weight}" for name, layer in self.loading.items() for weight in layer.specs}
        self._take_over(model, {t: s for t, s in table.items() if t in quantized and s in quantized})

    def _prepare(self, model: Any) -> None:  # noqa: ANN401
        """Gives the layers of a stored model empty buffers for their codes."""
        modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

        def resolve(name: str) -> str:
            """A name in this model, which may be the base of the one that was saved, or the other way round."""
            near = [name, prefix + name, name.removeprefix(prefix)]
            return next((other for other in near if other in modules), "")

        for name, weights, input_spec in stored_layers(self.quantization_config):
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
            specs = {key: stored_spec(weights, shape, module) for key, shape in shapes.items()}
            known = {weight: self.quantization_config.checksums.get(f"{name}.{weight}", "") for weight in specs}
            self.loading[resolve(name)] = LoadingLayer(module, specs, input_spec, dtype, checksums=known)
        ties = {
            _resolve_key(target, resolve): _resolve_key(s, resolve)
            for target, s in self.quantization_config.tied.items()
        }
        if self.quantization_config.damaged:
            raise CheckpointError(f"{OWN} in config.json is damaged: its contents are not those that were saved")
        ties |= self._heads(model)
        self._take_over(model, {t: s for t, s in ties.items() if t and s})
        for name, layer in self.loading.items():
            own = [weight for weight in layer.specs if f"{name}.{weight}" not in self.ties]
            expect_codes_(layer, own)

    def _heads(self, model: Any) -> dict[str, str]:  # noqa: ANN401
        """Layers of this model that the saved one lacked, such as a head, tied to a weight that it had."""
        found = {}
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            first, weight = self._find(source)
            name, _, own = target.rpartition(".")
            module = model.get_submodule(name)
            absent = name not in self.loading and not self._stored & {
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
            self.loading[name] = LoadingLayer(module, {own: spec}, inputs, first.dtype)
            found[target] = source
        return found

    def _take_over(self, model: Any, ties: dict[str, str]) -> None:  # noqa: ANN401
        """Makes quantized weights that are tied our business: transformers can only tie parameters."""
        self.ties = ties
        table = getattr(model, "all_tied_weights_keys", None) or {}
        model.all_tied_weights_keys = {
            t: s for t, s in table.items() if not any(self.param_needs_quantization(model, key) for key in (t, s))
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:  # noqa: ANN401
        arrived = {name: check_codes_(name, layer, self._folder) for name, layer in self.loading.items()}
        for target, source in self.ties.items():
            (owner, weight), (first, first_weight) = self._find(target), self._find(source)
            name, origin = target.rpartition(".")[0], source.rpartition(".")[0]
            if owner is None or first is None or first_weight not in arrived[origin]:
                continue
            if self.pre_quantized and weight not in arrived[name]:
                arrived[name][weight] = in_memory(first.module, first_weight, arrived[origin][first_weight])
        for name, layer in self.loading.items():
            if len(arrived[name]) < len(layer.specs):
                restore_(layer, arrived[name])
                continue  # a head that the file did not have, initialized at random: it is there to be trained
            scale, offset = (layer.module._buffers.pop(key, None) for key in ("input_scale", "input_offset"))
            swap_(layer.module, arrived[name], layer.input, scale, offset, layer.dtype)
            offload_(model, name, layer)
        for plan in self._later:
            if any(parameter.is_meta for parameter in plan.module.parameters()):
                raise DyBitError(
                    f"layer {plan.name!r} cannot be offloaded while it is quantized, since its weight is made of other "
                    "parameters: give it a device in device_map"
                )
            make_plain_(plan.module)
            quantize_layer(plan, None, Ties(()))
        if self.pre_quantized:
            check_plain(self._folder, model, self.quantization_config.checksums)
        bypass_fast_path_(model, quantized_layers(model).values())
        _store_as_held_(model)
        count_codes_(model)
        model._dybit_recipe = self.quantization_config.recipe
        if not self.pre_quantized:
            measure(model, self.quantization_config.recipe).announce()
        _describe_(self.quantization_config, model)
        self.loading = {}
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:  # noqa: ANN401
        dequantize_(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config that was read has its name
        model.all_tied_weights_keys = {**(getattr(model, "all_tied_weights_keys", None) or {}), **self.ties}
        return model if dtype is None else model.to(dtype)


def attach_(model: Any) -> Any:  # noqa: ANN401
    """Makes ``save_pretrained`` work on a transformers model after :func:`dybit.quantize_`, in place.

    Use it to save a calibrated model (static activations, better weights) for ``from_pretrained``.

    Args:
        model: A ``PreTrainedModel`` after :func:`dybit.quantize_`.

    Returns:
        The same model.

    Raises:
        DyBitError: It has no quantized layer, is not a model of transformers, is fused, or has batch norms that were
            folded into convolutions, which a checkpoint of transformers cannot represent.
    """
    if not quantized_layers(model) or not hasattr(model, "save_pretrained"):
        raise DyBitError(f"model must be a transformers model after quantize_, not {type(model).__name__}")
    if is_fused(model):
        raise DyBitError("model is fused; save the model that was passed to fuse")
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
    count_codes_(model)
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
    config.coverage = measure(model, config.recipe)
    config.layers = describe((name, layer.weight_specs, layer.input_spec) for name, layer in layers.items())
    # Transformers stores what its own table does not map to something else.
    targets = [re.compile(pattern) for pattern in getattr(model, "_tied_weights_keys", None) or ()]
    held = [(f"{name}.{weight}", layer, weight) for name, layer in layers.items() for weight in layer.weight_specs]
    for key, layer, weight in sorted(held, key=lambda item: any(target.search(item[0]) for target in targets)):
        source = owners.setdefault(id(layer._buffers[weight]), key)
        if source != key:
            config.tied[key] = source
        else:
            stored = (held_tensor(layer, weight + suffix) for suffix in layer.weight_specs[weight].buffers())
            config.checksums[key] = crc32(stored)


def _held_type(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """The type in which transformers would hold a weight: some models keep some in float32."""
    planned = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    found = (kept for pattern, kept in planned.items() if re.search(pattern.replace("*", ".*"), key))
    return next(found, dtype)


def _resolve_key(key: str, resolve: Any) -> str:  # noqa: ANN401
    name, _, weight = str(key).rpartition(".")
    return f"{found}.{weight}" if (found := resolve(name)) else ""
