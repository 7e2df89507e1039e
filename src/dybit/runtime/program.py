"""A fused model that runs as a program of kernels."""

from __future__ import annotations

import inspect
import itertools
import operator
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dybit.errors import DyBitWarning
from dybit.kernels import extension
from dybit.kernels.transforms import transforming
from dybit.layers.quantized import FusedModule
from dybit.runtime.capture import Capture, CaptureError, Shapes, capture
from dybit.runtime.lower_conv import Images
from dybit.runtime.lower_copies import CopyRules
from dybit.runtime.lower_folds import FoldRules
from dybit.runtime.lower_recurrent import RecurrentRules
from dybit.runtime.lower_rows import RowRules
from dybit.runtime.lower_tensors import TensorRules
from dybit.runtime.lower_transposed import TransposedRules
from dybit.runtime.lowering import Lowering
from dybit.runtime.plan import Plan, Share

_KNOWN = (Tensor, bool, int, float, str, type(None))  # kinds of inputs
_MOST_CAPTURES, _MOST_PLANS = 8, 64
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")

_VERSION = operator.attrgetter("_version")

_CAPTURING = threading.RLock()  # torch.export runs in one thread at a time

Key = tuple[Any, ...]
_Planned = tuple[Plan, pytree.TreeSpec]  # the latter of the results


@dataclass(frozen=True)
class Report:
    """Where the time of a forward goes.

    Attributes:
        seconds: Of the whole forward.
        shares: The time of every step, in order. Torch's operators between two programs share theirs evenly.
    """

    seconds: float
    shares: tuple[Share, ...]

    @property
    def cuts(self) -> tuple[Share, ...]:
        """The operators that are left to torch."""
        return tuple(share for share in self.shares if not share.kernel)

    def __str__(self) -> str:
        """Returns a table: time by operator, then what is left to torch."""
        totals: dict[tuple[bool, str], list[float]] = {}
        for share in self.shares:
            totals.setdefault((share.kernel, share.name), []).append(share.seconds)
        lines = [f"{self.seconds * 1e3:.2f} ms"]
        for (kernel, name), spent in sorted(totals.items(), key=lambda item: -sum(item[1])):
            of = sum(spent) / self.seconds if self.seconds else 0.0
            lines.append(f"{of:6.1%}  {len(spent):4}  {'' if kernel else 'torch: '}{name}")
        other = self.seconds - sum(share.seconds for share in self.shares)
        lines.append(f"{other / self.seconds if self.seconds else 0.0:6.1%}        between the operators")
        return "\n".join(lines)


class FusedProgram(FusedModule):
    """A model that runs as one program of kernels; :func:`dybit.fuse` makes it.

    The model itself runs, layer by layer, in training, if gradients of inputs are recorded, under ``torch.compile``,
    ``torch.func`` and autocast, if a module has got hooks or another forward, if an input is neither a tensor nor a
    number, and if a value is NaN that would be rounded with a static scale. New shapes of inputs are planned when they
    first appear. If a parameter or buffer changes, the model is captured anew. Threads may call it at the same time.
    Copies and pickles capture the model anew.

    Attributes:
        model: The model. Its parameters and buffers are those of the fused one.

    Args:
        model: A quantized model in evaluation mode.
        args: Example inputs, positional.
        kwargs: Example inputs by name.

    Raises:
        CaptureError: The model cannot be captured.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._lock = threading.RLock()
        self._reset()
        self._example = (args, kwargs)
        self.train(model.training)
        leaves, spec, key = self._flatten(args, kwargs)
        self._plan(leaves, spec, key)

    def _reset(self) -> None:
        """Forgets all captures and plans."""
        self._captures: dict[Key, list[Capture]] = {}
        self._plans: OrderedDict[Key, _Planned | None] = OrderedDict()
        self._watched = _Watch(self.model)
        self._orders: dict[Any, tuple[list[int], pytree.TreeSpec]] = {}  # of tensors, by their names

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the model's own signature
        """As the model."""
        if torch.compiler.is_dynamo_compiling():
            return self.model(*args, **kwargs)
        with self._lock:  # while a thread captures the model, torch replaces its parameters
            found = None
            if not self._is_watched():
                leaves, spec, key = self._flatten(args, kwargs)
                found = self._find(leaves, spec, key) if _are_plain(leaves) else None
            if found is None:
                return self.model(*args, **kwargs)
        results = found[0].run(_tensors(leaves))
        if results is not None:
            return pytree.tree_unflatten(results, found[1])
        with self._lock:
            return self.model(*args, **kwargs)

    def report(self, *args: Any, **kwargs: Any) -> Report:  # noqa: ANN401
        """Runs the model and returns where the time goes.

        Args:
            args: Inputs; the example of ``fuse`` if there are none.
            kwargs: Inputs by name.
        """
        if not args and not kwargs:
            args, kwargs = self._example
        leaves, spec, key = self._flatten(args, kwargs)
        found = None if self._is_watched() or not _are_plain(leaves) else self._find(leaves, spec, key)
        if found is not None:
            found[0].run(_tensors(leaves))  # the first run touches fresh memory
        shares: list[Share] = []
        start = time.perf_counter()
        if found is None or found[0].run(_tensors(leaves), shares) is None:
            start = time.perf_counter()
            self.model(*args, **kwargs)
            shares = [Share(type(self.model).__name__, "", False, time.perf_counter() - start)]
        return Report(time.perf_counter() - start, tuple(shares))

    def _is_watched(self) -> bool:
        """Whether the model itself must run, whatever its inputs are."""
        if torch.compiler.is_compiling() or self.model.training or transforming() or not self._watched.is_bare():
            return True
        watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state()
        return bool(watched or torch.is_autocast_enabled("cpu"))

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec, Key]:
        given = (*args, *kwargs.values())
        if all(type(x) is Tensor for x in given):  # the structure depends on the names alone
            names = len(args), tuple(kwargs)
            if names not in self._orders:
                places = iter(range(len(given)))
                bound = self._watched.bind(tuple(next(places) for _ in args), {name: next(places) for name in kwargs})
                self._orders[names] = pytree.tree_flatten(bound)
            order, spec = self._orders[names]
            leaves: list[Any] = [given[i] for i in order]
        else:
            leaves, spec = pytree.tree_flatten(self._watched.bind(args, kwargs))
        kinds = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves
        )
        return leaves, spec, (spec, *kinds, extension.isa())

    def _find(self, leaves: list[Any], spec: pytree.TreeSpec, key: Key) -> _Planned | None:
        """Returns the plan of some inputs and the structure of the results; None if the model itself must run."""
        if not self._watched.is_unchanged():
            self._reset()
        if key in self._plans:
            return self._plans[key]
        try:
            return self._plan(leaves, spec, key)
        except CaptureError as error:
            warnings.warn(f"this input is not fused, and runs layer by layer: {error}", DyBitWarning, stacklevel=4)
            self._plans[key] = None
            return None

    def _plan(self, leaves: list[Any], spec: pytree.TreeSpec, key: Key) -> _Planned:
        kind = (spec, *(_kind(x) for x in leaves))
        captures = self._captures.setdefault(kind, [])
        for found in captures:
            try:
                return self._keep(key, found, leaves)
            except CaptureError:
                continue
        if sum(map(len, self._captures.values())) >= _MOST_CAPTURES:
            raise CaptureError(f"more than {_MOST_CAPTURES} kinds of inputs")
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with _CAPTURING:
            made = capture(self.model, args, kwargs)
        self._watched.add(made.names())
        plan = self._keep(key, made, leaves)
        captures.append(made)
        return plan

    def _keep(self, key: Key, captured: Capture, leaves: Sequence[Any]) -> _Planned:
        planned = self._plans[key] = lower(captured, _tensors(leaves)), captured.out_spec
        while len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return planned

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as nn.Module
        """Returns an attribute of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        """Drops captures and plans: copies make their own."""
        dropped = ("_captures", "_plans", "_lock", "_watched", "_orders")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()
        self._reset()


class _Watch:
    """Tells whether a model is still what has been captured.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._signature = inspect.signature(model.forward)
        self._hooks = [vars(module)[name] for module in modules for name in _HOOKS]
        self._hooks += [getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS]
        self._states = [vars(module) for module in modules]
        self._forwards = [state.get("forward") for state in self._states]
        self._model = model
        self._holders: dict[int, tuple[dict[str, Any], list[Any]]] = {}  # of parameters or buffers, by identity
        self._tensors: dict[str, Tensor] = {}  # by path
        self._versions: list[int] = []

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns arguments in the order of the signature."""
        bound = self._signature.bind(*args, **kwargs)
        return bound.args, bound.kwargs

    def add(self, names: Sequence[str]) -> None:
        """Watches parameters and buffers."""
        modules = dict(self._model.named_modules())
        for path in names:
            owner, _, name = path.rpartition(".")
            module = modules.get(owner)
            for held in (module._parameters, module._buffers) if module is not None else ():
                tensor = held.get(name)
                if tensor is not None and path not in self._tensors:
                    if tensor.is_inference():
                        raise CaptureError(f"{path!r} was made in inference mode, so changes to it cannot be seen")
                    self._holders.setdefault(id(held), (held, list(held.values())))
                    self._tensors[path] = tensor
                    self._versions.append(tensor._version)

    # Every call asks both questions about hundreds of objects, so the loops are not Python's.

    def is_bare(self) -> bool:
        """Whether no module has hooks or another forward than before."""
        found = map(dict.get, self._states, itertools.repeat("forward"))
        return not any(self._hooks) and all(map(operator.is_, found, self._forwards))

    def is_unchanged(self) -> bool:
        """Whether parameters and buffers are the same tensors, not written to."""
        same = all(
            len(held) == len(known) and all(map(operator.is_, held.values(), known))
            for held, known in self._holders.values()
        )
        return same and [*map(_VERSION, self._tensors.values())] == self._versions


def _kind(x: Any) -> Any:  # noqa: ANN401
    """What a capture depends on: torch.export records sizes of 0 and 1 as such."""
    if not isinstance(x, Tensor):
        return x
    return (x.dtype, x.device, *(n if n < 2 else -1 for n in x.shape))


def _are_plain(leaves: Sequence[Any]) -> bool:
    """Whether inputs are tensors and numbers, and no gradients of them are recorded."""
    if not all(isinstance(x, _KNOWN) for x in leaves):
        return False  # torch.export would take another object apart, or refuse it
    return not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves))


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def lower(captured: Capture, inputs: Sequence[Tensor]) -> Plan:
    """Plans a captured model for inputs of given shapes.

    Raises:
        CaptureError: The captured graph does not hold for these inputs.
    """
    values = Shapes(captured).infer(inputs)
    lowering = Lowering(captured.module.graph, values, captured.state, inputs)
    kinds = (Images, TransposedRules, RowRules, RecurrentRules, FoldRules, TensorRules, CopyRules)
    lowering.run([kind(lowering).rules for kind in kinds])
    as_model = Shapes(captured, prefer_last=False).infer(inputs)
    return Plan(lowering, [as_model.get(x) for x in lowering.results])
