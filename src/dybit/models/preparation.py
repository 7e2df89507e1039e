"""Prepares a model for quantization, and turns a quantized one back: makes norms permanent, bypasses fused paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from dybit.errors import DyBitError
from dybit.layers.kinds import weight_names
from dybit.layers.offloading import offloading_hooks
from dybit.layers.quantized import quantized_layers
from dybit.layers.swap import unswap_


def dequantize_(model: nn.Module) -> nn.Module:
    """Turns every quantized layer of a model back into floating point, in place, with the values of its codes.

    Inputs are no longer rounded. After weight-only quantization the outputs stay the same, bit for bit while weights
    are frozen. Weights require gradients if they did before.

    Returns:
        The same model.

    Raises:
        DyBitError: Accelerate keeps the tensors of a module outside of it between calls.
    """
    for name, module in model.named_modules():
        if any(hook.offload for hook in offloading_hooks(module)):
            raise DyBitError(
                f"module {name!r} is offloaded and would be given its codes for values: call accelerate's "
                "remove_hook_from_submodules first"
            )
    shared: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():  # the new parameters must be usable outside of inference mode
        for layer in list(quantized_layers(model).values()):
            keys = {name: id(layer._buffers[name]) for name in layer.weight_specs}
            unswap_(layer)
            for name, key in keys.items():
                setattr(layer, name, shared.setdefault(key, getattr(layer, name)))
    return model


def folded_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Returns the (convolution, batch norm) pairs that :func:`quantize_` folded."""
    return list(getattr(model, "_dybit_folded", []))


def make_plain_(module: nn.Module, *more: str) -> None:
    """Makes norms, masks and other parametrizations of the weights of a layer permanent, in place.

    Args:
        module: The layer.
        *more: The names of further parameters to make plain, such as ``bias``.
    """
    for name in (*weight_names(module), *more):
        if parametrize.is_parametrized(module, name):
            # torch removes the property from the class, which copies of the model share: use a class of its own.
            made_by_torch: Any = type(module)
            members = {k: v for k, v in vars(made_by_torch).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(made_by_torch.__name__, made_by_torch.__bases__, members)
            held: Any = module.parametrizations[name]  # type: ignore[index]
            if "original" in held._parameters:  # torch writes the weight into this tensor
                held._parameters["original"] = _copied(held.original)
            parametrize.remove_parametrizations(module, name)
            _remove_compatibility_hooks_(module)
            if name not in module._parameters:  # torch leaves a buffer in place of a frozen weight
                weight = getattr(module, name)
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
                original = f"{name}_orig"
                module._parameters[original] = _copied(module._parameters[original])
                prune.remove(module, name)
            if getattr(hook, "name", None) == name:
                {"WeightNorm": remove_weight_norm, "SpectralNorm": remove_spectral_norm}.get(
                    type(hook).__name__, lambda *_: None
                )(module, name)
        # torch wraps this hook and later fails to find and remove it.
        for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(wrapped, "hook", wrapped)
            if type(hook).__name__ == "SpectralNormLoadStateDictPreHook" and cast(Any, hook).fn.name == name:
                del module._load_state_dict_pre_hooks[key]


def _remove_compatibility_hooks_(module: nn.Module) -> None:
    """Removes the hook for old state dicts that torch's weight norm leaves behind; it cannot be pickled."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if "_weight_norm_compat_hook" in getattr(getattr(hook, "hook", hook), "__qualname__", ""):
            del hooks[key]


def _copied(parameter: Any) -> nn.Parameter:  # noqa: ANN401
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def bypass_fast_path_(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Switches off the fused inference path of transformer encoders that contain given layers: it does not call them.

    With a padding mask, the path also uses nested tensors, which the layers do not support.
    """
    held = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            id(part) in held for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
