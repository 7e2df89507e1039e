"""Runs a model on batches and observes the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dybit.errors import DyBitError
from dybit.layers.attention import attend
from dybit.layers.kinds import channel_dim, input_places
from dybit.layers.patched_forward import replaced_forwards
from dybit.layers.quantized import is_attention

#: Called with the number of steps done, the number of all steps, and a text.
Progress = Callable[[int, int, str], None]


def run(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Runs a model in evaluation mode without gradients, batch by batch.

    Args:
        model: The model. Its mode is restored.
        batches: Each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Yields:
        The batch and its output, float32: the model's output itself, its ``logits``, its ``last_hidden_state``, or the
        first tensor in it.

    Raises:
        DyBitError: A batch does not fit the model, or its output holds no floating-point tensor.
    """
    for index, batch in enumerate(batches):
        with evaluating(model):
            output = output_tensor(run_batch(model, batch, f"batch {index}"))
        yield batch, output.float()


def output_tensor(output: Any) -> Tensor:  # noqa: ANN401
    """Returns the main tensor of a model's output: itself, ``logits``, ``last_hidden_state`` or the first tensor.

    Raises:
        DyBitError: There is no floating-point tensor in it.
    """
    for value in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, tuple | list):
        parts = output
    for value in parts:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise DyBitError(f"the model's output holds no floating-point tensor but is a {type(output).__name__}")


def run_batch(model: nn.Module, batch: Any, name: str = "the batch") -> Any:  # noqa: ANN401
    """Calls a model on a tensor, on a tuple or list of arguments, or on a mapping of keyword arguments.

    Raises:
        DyBitError: The batch is of another type or the model does not take it.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        if isinstance(batch, Tensor):
            return model(batch)
    except DyBitError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(batch, tuple | list) and isinstance(error, TypeError) and "positional argument" in reason:
            reason += f"; a {type(batch).__name__} is passed as positional arguments; drop labels, as in "
            reason += "[x for x, _ in loader]"
        raise DyBitError(f"{name} ({_describe(batch)}) does not fit the model: {reason}") from error
    raise DyBitError(f"{name} must be a tensor, a tuple or list of arguments, or a mapping, not {type(batch).__name__}")


def iterate(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterates over calibration batches.

    Raises:
        DyBitError: ``batches`` is not an iterable of batches.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise DyBitError(f"calibration must be an iterable of batches, such as a list, not {type(batches).__name__}")
    return iter(batches)


def _describe(batch: Any) -> str:  # noqa: ANN401
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_describe(value)}" for key, value in list(batch.items())[:4])
    if isinstance(batch, tuple | list):
        return ", ".join(_describe(value) for value in batch[:4])
    return type(batch).__name__


@contextmanager
def observing(
    layers: Mapping[str, nn.Module], observe: Callable[[str, nn.Module, list[Tensor]], None]
) -> Iterator[None]:
    """Within the body, calls a function with the inputs of layers whenever they run.

    Args:
        layers: The layers by name.
        observe: Called with name, layer and its inputs: one, or query, key and value of attention.
    """
    handles = []
    # Attention then calls its out_proj.
    called: dict[nn.Module, Callable[..., Any]] = {
        module: partial(attend, module) for module in layers.values() if is_attention(module)
    }

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        places = input_places(module, args, kwargs)
        found = [args[place] if isinstance(place, int) else kwargs[place] for place in places]
        observe(name, module, [x.data if isinstance(x, PackedSequence) else x for x in found])

    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        with replaced_forwards(called):
            yield
    finally:
        for handle in handles:
            handle.remove()


def positions(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """Returns the positions of an input of a layer: float32 of shape (positions, channels).

    Raises:
        DyBitError: It holds NaN or infinity.
    """
    channels = channel_dim(module, x)
    flat = x.detach().movedim(channels, -1).reshape(-1, x.shape[channels]).float()
    check_finite(name, flat)
    return flat


def check_finite(name: str, x: Tensor) -> None:
    """Checks the input of a layer.

    Raises:
        DyBitError: It holds NaN or infinity.
    """
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise DyBitError(f"calibration gives layer {name!r} inputs with NaN or infinity")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode without gradients, and restores the mode of every module."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Leaves inference mode, so that new tensors of a model can be used outside of it.

    Stays in inference mode if the model's tensors were made in it: they can only be modified there.
    """
    tensors = [*model.parameters(), *model.buffers()] if torch.is_inference_mode_enabled() else []
    made = (tensor for tensor in tensors if not nn.parameter.is_lazy(tensor))
    if not torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in made):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switches off torch's fused encoder layers, which call none of their submodules."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def tensors_of(output: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the tensors in a model's output, also in tuples, lists and mappings. Ignores caches and other objects."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, tuple | list) else []
