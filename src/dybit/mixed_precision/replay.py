"""Replays the blocks before a layer from recorded outputs, so that a trial of the layer runs only the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from dybit.layers.patched_forward import replaced_forwards
from dybit.mixed_precision.measured_model import Subject
from dybit.models.running import output_tensor, run_batch

_MOST_BYTES = 1 << 30  # limit of kept outputs; above it, everything is computed again


class Replay:
    """The outputs of a model's blocks on the calibration batches.

    Blocks are the outermost members of ``nn.ModuleList`` and ``nn.Sequential`` that run once per batch and return
    tensors. A test on the first batch checks that replaying them changes nothing; else none is replayed.

    Args:
        subject: The model with its batches.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._entered: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._kept: dict[str, list[Any]] = {}
        self._record()
        if self._kept and not self._faithful():
            self._kept = {}

    def _record(self) -> None:
        model, clock, calls = self._subject.model, iter(range(1 << 62)), Counter[str]()
        kept: dict[str, list[Any]] = {name: [] for name in _blocks(model)}

        def enter(name: str, *_: object) -> None:
            self._entered.setdefault(name, next(clock))

        def leave(name: str, module: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401
            calls[name] += 1
            self._left.setdefault(name, next(clock))
            if name in kept:
                kept[name].append(_copy(output) if _plain(output) else None)
                self._bytes += sum(x.nbytes for x in _tensors(output))
                if self._bytes > _MOST_BYTES:
                    kept.clear()

        self._bytes = 0
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            if name in kept:
                handles.append(module.register_forward_hook(partial(leave, name)))
        try:
            with torch.no_grad():
                for batch in self._subject.batches:
                    run_batch(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        count = len(self._subject.batches)
        self._kept = {
            name: outputs
            for name, outputs in kept.items()
            if calls[name] == count and all(x is not None for x in outputs)
        }

    def _faithful(self) -> bool:
        """Whether the model's outputs stay the same, bit for bit, with all blocks but the last replayed."""
        last = max(self._kept, key=lambda name: self._left[name])
        judge = self._subject.judge
        with torch.no_grad(), self.before([last]):
            try:
                output = output_tensor(run_batch(self._subject.model, self._subject.batches[0])).float()
            except ValueError:  # the model depends on a side effect of its blocks
                return False
        return torch.equal(output, judge.outputs[0])

    @contextmanager
    def before(self, names: Iterable[str]) -> Iterator[None]:
        """Within the body, blocks that finish before the given layers start return their recorded outputs.

        Runs of the model within the body must go through the batches in order, from the first.
        """
        start = min(self._entry(name) for name in names)
        stubbed = [self._subject.model.get_submodule(name) for name in self._kept if self._left[name] < start]
        kept = [outputs for name, outputs in self._kept.items() if self._left[name] < start]
        with replaced_forwards({module: _replaying(outputs) for module, outputs in zip(stubbed, kept, strict=True)}):
            yield

    def _entry(self, name: str) -> int:
        """Returns when a layer, or its nearest parent that is called, was first entered."""
        while name and name not in self._entered:
            name = name.rpartition(".")[0]
        return self._entered.get(name, 0)


def _blocks(model: nn.Module) -> list[str]:
    """Returns the outermost members of containers."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            prefix = f"{name}." if name else ""
            found += [f"{prefix}{child}" for child, _ in module.named_children()]
    return found


def _replaying(outputs: list[Any]) -> Callable[..., Any]:
    following = cycle(outputs)
    return lambda *args, **kwargs: _copy(next(following))


def _plain(value: Any) -> bool:  # noqa: ANN401
    """Whether an output consists of tensors only."""
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list) and all(_plain(item) for item in value)
    return value is None or isinstance(value, Tensor)


def _copy(value: Any) -> Any:  # noqa: ANN401
    """Returns a copy, since later layers may write to it."""
    if isinstance(value, tuple | list):
        return type(value)(_copy(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    if isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        yield value
