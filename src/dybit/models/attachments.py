"""Buffers that a transform adds to a module, and the hook that applies them to its input or output.

Buffers are part of the state dict, so a loader that does not know them fails instead of computing something else. The
checkpoint's manifest lists the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.kinds import channel_dim
from dybit.tensors.hadamard import rotate

_RECORD = "_dybit_attached"


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Returns the arguments of a call with the first one changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _rotation(module: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return module.rotation, module.rotation_signs


def _rotate_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    return _first(args, kwargs, lambda x: rotate(x, *_rotation(module)))


def _restore_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    return _first(args, kwargs, lambda x: rotate(x, *_rotation(module), inverse=True))


def _rotate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return rotate(output, *_rotation(module))


def _limit_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    limit = cast(Tensor, module.output_limit)
    dim = channel_dim(module, output)
    return torch.minimum(output, limit.to(output.dtype).view(-1, *(1,) * (output.ndim - 1 - dim)))


# kind: (whether the hook runs before the forward, the hook, the buffers and their numbers of dimensions)
_KINDS: dict[str, tuple[bool, Callable[..., Any], dict[str, int]]] = {
    "rotate_input": (True, _rotate_input, {"rotation": 2, "rotation_signs": 1}),
    "restore_input": (True, _restore_input, {"rotation": 2, "rotation_signs": 1}),
    "rotate_output": (False, _rotate_output, {"rotation": 2, "rotation_signs": 1}),
    "limit_output": (False, _limit_output, {"output_limit": 1}),
}


def attach_(module: nn.Module, kind: str, *tensors: Tensor) -> None:
    """Attaches buffers and their hook to a module, in place.

    Args:
        module: A module without attachments.
        kind: ``rotate_input`` or ``rotate_output`` (:func:`dybit.tensors.hadamard.rotate`: factor and signs),
            ``restore_input`` (the inverse rotation), or ``limit_output`` (the largest value of every channel).
        *tensors: The buffers, float32.
    """
    before, hook, names = _KINDS[kind]
    for name, tensor in zip(names, tensors, strict=True):
        module.register_buffer(name, tensor)
    handle = module.register_forward_pre_hook(hook, with_kwargs=True) if before else module.register_forward_hook(hook)
    sizes = [list(tensor.shape) for tensor in tensors]
    setattr(module, _RECORD, {"kind": kind, "sizes": sizes, "hook": handle.id})


def detach_(module: nn.Module) -> None:
    """Removes the attachment of a module, if any."""
    record = module.__dict__.pop(_RECORD, None)
    if record is not None:
        before, _, names = _KINDS[record["kind"]]
        for name in names:
            del module._buffers[name]
        (module._forward_pre_hooks if before else module._forward_hooks).pop(record["hook"])
        module._forward_pre_hooks_with_kwargs.pop(record["hook"], None)


def is_attached(module: nn.Module) -> bool:
    """Whether a module has an attachment."""
    return hasattr(module, _RECORD)


def attachments(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Lists the attachments of a model as JSON values: by module, the kind and the shapes of the buffers."""
    return {
        name: {"kind": record["kind"], "sizes": record["sizes"]}
        for name, module in model.named_modules()
        if (record := getattr(module, _RECORD, None)) is not None
    }


def check_attachments(data: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401
    """Checks a stored result of :func:`attachments`.

    Raises:
        DyBitError: It is malformed.
    """
    if not isinstance(data, Mapping):
        raise DyBitError(f"attached must be an object, not {data!r:.100}")
    for name, entry in data.items():
        good = isinstance(entry, Mapping) and set(entry) == {"kind", "sizes"} and str(entry["kind"]) in _KINDS
        ranks = list(_KINDS[entry["kind"]][2].values()) if good else []
        sizes: Any = entry["sizes"] if good else None
        shapes = isinstance(sizes, list) and all(
            isinstance(shape, list) and all(type(n) is int and 0 < n < 1 << 24 for n in shape) for shape in sizes
        )
        if not shapes or [len(shape) for shape in sizes] != ranks:
            raise DyBitError(f"attached has a bad entry for {name!r}: {entry!r:.100}")
    return {str(name): dict(entry) for name, entry in data.items()}


def expect_attached_(model: nn.Module, attached: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds the attachments listed by :func:`attachments` to a fresh model; their values are loaded later."""
    for name, entry in attached.items():
        attach_(
            model.get_submodule(name),
            entry["kind"],
            *(torch.empty(shape, dtype=torch.float32, device="cpu") for shape in entry["sizes"]),
        )
