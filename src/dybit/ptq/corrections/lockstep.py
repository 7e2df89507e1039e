"""Runs a quantized model and its floating-point reference on all batches at once, layer by layer.

Every batch runs in a thread of its own, but only one thread at a time: each
stops before every layer of interest, and when all have arrived, a visitor sees the layer's inputs in both models and
may change the layer, before any batch goes on through it. So each layer is corrected for inputs that have come through
all corrected layers before it, in one pass, whatever the shapes of the batches and the structure of the model. The
memory is that of one large batch.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.kinds import is_embedding
from dybit.layers.quantized import Quantized, quantized_layers
from dybit.models.running import Progress, evaluating, run_batch


@dataclass(frozen=True)
class Call:
    """The arguments with which a layer is about to be called."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def repeat(self, module: nn.Module) -> Any:  # noqa: ANN401
        """Calls a module's forward with copies of arguments that it may change, such as a cache."""
        return module.forward(*map(_own, self.args), **{name: _own(value) for name, value in self.kwargs.items()})


def _own(value: Any) -> Any:  # noqa: ANN401
    """A copy of an argument that a call could change."""
    if type(value) in (tuple, list):
        return type(value)(map(_own, value))
    plain = isinstance(value, Tensor | nn.Module | bool | int | float | str | torch.dtype) or value is None
    return value if plain or callable(value) else copy.deepcopy(value)


Visit = Callable[[str, list[Call], list[Call]], None]
_SHOWN = 8


def correctable(model: nn.Module, reference: nn.Module) -> dict[str, Quantized]:
    """The layers of a quantized model that can be corrected: linear layers and convolutions with quantized weights.

    Attention is left out: its projections are read, not called. So are layers whose codes are also those of another,
    such as an output layer tied to an embedding.

    Raises:
        DyBitError: The model has none, or the reference has no floating-point layer of the same name and shape.
    """
    quantized = quantized_layers(model)
    uses = Counter(id(part._buffers[key]) for part in quantized.values() for key in part.weight_specs)
    layers = {}
    for name, layer in quantized.items():
        if "weight" not in layer.weight_specs or is_embedding(layer) or uses[id(layer._buffers["weight"])] > 1:
            continue
        try:
            other = reference.get_submodule(name)
        except AttributeError:
            raise DyBitError(f"reference has no layer {name!r}, which the model has") from None
        shape = tuple(getattr(getattr(other, "weight", None), "shape", ()))
        if isinstance(other, Quantized) or shape != layer.weight_specs["weight"].shape:
            raise DyBitError(
                f"reference must be the model in floating point, but its layer {name!r} is a "
                f"{type(other).__name__} with weights of shape {shape}"
            )
        layers[name] = layer
    if not layers:
        raise DyBitError(f"model {type(model).__name__} has no quantized layer that can be corrected")
    return layers


def walk(
    model: nn.Module,
    reference: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    visit: Visit,
    progress: Progress | None = None,
) -> None:
    """Runs both models in evaluation mode and without gradients, stopping at the first call of every layer.

    Layers that no batch reaches are named in a warning.

    Args:
        model: The quantized model; left in the mode it was in.
        reference: The floating-point model, with the same module names; it is not changed.
        names: The layers to stop at.
        batches: Each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        visit: Called with the name of a layer and its calls in the model and in the reference, batch by batch.
        progress: Called with (done, total, text) before every layer and after the last.

    Raises:
        DyBitError: There is no batch, or one does not fit the model.
    """
    wanted = list(names)
    data = list(batches)
    if not data:
        raise DyBitError("calibration yields no batch")
    runners = [_Runner(part, batch, i) for i, batch in enumerate(data) for part in (model, reference)]
    handles = []
    try:
        for part in (model, reference):
            for name in wanted:
                handles.append(part.get_submodule(name).register_forward_pre_hook(_stop(name), with_kwargs=True))
        with evaluating(model, reference):
            missed = _advance(runners, wanted, visit, progress)
    finally:
        for handle in handles:
            handle.remove()
        for runner in runners:
            runner.cancel()
    if missed:
        warnings.warn(
            f"calibration never reached {len(missed)} layers, which stay as they are: {', '.join(missed[:_SHOWN])}",
            DyBitWarning,
            stacklevel=4,
        )


def _advance(runners: list[_Runner], names: list[str], visit: Visit, progress: Progress | None) -> list[str]:
    """Lets all threads go on from layer to layer until they are through."""
    left = dict.fromkeys(names)
    for runner in runners:
        runner.go()
    while waiting := [runner for runner in runners if runner.place is not None]:
        name = waiting[0].place
        assert name is not None
        here = [runner for runner in waiting if runner.place == name]
        if name in left:
            pairs = [(a, b) for a, b in zip(runners[::2], runners[1::2], strict=True) if a in here and b in here]
            if pairs:
                if progress:
                    progress(len(names) - len(left), len(names), name)
                left.pop(name)
                try:
                    visit(name, [a.call for a, _ in pairs], [b.call for _, b in pairs])
                except (RuntimeError, TypeError) as error:
                    raise DyBitError(f"calibration does not fit layer {name!r}: {error}") from error
        for runner in here:
            runner.go()
    if progress:
        progress(len(names), len(names), "done")
    return list(left)


class _Cancelled(BaseException):
    """Ends a thread that is no longer needed; no error handling of a model's own may catch it."""


class _Runner(threading.Thread):
    """One model on one batch, in a thread that runs only while the caller of :meth:`go` waits."""

    def __init__(self, model: nn.Module, batch: Any, index: int) -> None:  # noqa: ANN401
        super().__init__(daemon=True)
        self.model, self.batch, self.index = model, batch, index
        self.place: str | None = None
        self.call = Call((), {})
        self._failure: BaseException | None = None
        self._cancelled = False
        self._resume, self._stopped = threading.Semaphore(0), threading.Semaphore(0)

    def go(self) -> None:
        """Runs to the next stop, or to the end; raises what the model raised."""
        self.place, self.call = None, Call((), {})
        if self.ident is None:
            self.start()
        else:
            self._resume.release()
        self._stopped.acquire()
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """Ends the thread where it stands."""
        self._cancelled = True
        if self.is_alive():
            self._resume.release()
            self.join()

    def stop(self, name: str, call: Call) -> None:
        """Called in the thread: waits before a layer."""
        self.place, self.call = name, call
        self._stopped.release()
        self._resume.acquire()
        if self._cancelled:
            raise _Cancelled

    def run(self) -> None:
        """The thread's work."""
        try:
            with torch.no_grad():
                run_batch(self.model, self.batch, f"calibration batch {self.index}")
        except _Cancelled:
            return
        except BaseException as error:  # handed to the caller of go
            self._failure = error
        self._stopped.release()


def _stop(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runner = threading.current_thread()
        if isinstance(runner, _Runner):
            runner.stop(name, Call(args, kwargs))

    return hook
