"""The blocks of a model: modules that run one after the other, each on what the one before returned.

With them an algorithm can run a part of a model at a time, on the outputs of parts that it
has changed already, and need not run the whole model for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dybit.models.running import run_batch

Place = int | str | None  # in arguments or in a tuple of results; None: the result itself


@dataclass
class Block:
    """A module of a sequence.

    Attributes:
        name: Its qualified name.
        module: Itself.
        takes: Where in its arguments the stream is.
        gives: Where in its result the stream is.
    """

    name: str
    module: nn.Module
    takes: Place
    gives: Place = None

    def run(self, stream: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Calls the module with a stream and its other arguments; returns the stream that comes out."""
        if isinstance(self.takes, int):
            args = [*args[: self.takes], stream, *args[self.takes + 1 :]]
        else:
            kwargs = {**kwargs, str(self.takes): stream}
        result = self.module(*args, **kwargs)
        out: Tensor = result if self.gives is None else result[self.gives]
        return out


@dataclass
class Recording:
    """The calls of a sequence of blocks.

    Attributes:
        blocks: The blocks.
        streams: What went into the first block, by batch.
        others: The other arguments of every block, by batch and block.
    """

    blocks: list[Block]
    streams: list[Tensor] = field(default_factory=list)
    others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)

    def step(self, index: int, *, keep: bool) -> None:
        """Runs a block on all streams.

        Args:
            index: Which block.
            keep: Whether the streams become what comes out.
        """
        with torch.no_grad():
            for batch, stream in enumerate(self.streams):
                out = self.blocks[index].run(stream, *self.others[batch][index])
                if keep:
                    self.streams[batch] = out

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Records the calls while the body runs the whole model on batches."""
        handles = []

        def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            takes = self.blocks[index].takes
            if index == 0:
                self.streams.append((args[takes] if isinstance(takes, int) else kwargs[str(takes)]).detach())
                self.others.append([])
            if isinstance(takes, int):
                args = (*args[:takes], None, *args[takes + 1 :])
            else:
                kwargs = {key: value for key, value in kwargs.items() if key != takes}
            self.others[-1].append((args, kwargs))

        try:
            for index, block in enumerate(self.blocks):
                handles.append(
                    block.module.register_forward_pre_hook(
                        lambda _, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Has transformers' models keep no cache of keys and values, which would make a block depend on earlier calls."""
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")
    }
    before = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def find(model: nn.Module, batch: Any, weights: Mapping[str, int]) -> list[Block]:  # noqa: ANN401
    """Finds the sequence of blocks that divides a model best.

    Of all ``nn.ModuleList`` and ``nn.Sequential`` whose members run in order, each on the result of the last, that is
    the one which leaves the smallest pieces. It is run again, member by member, and taken only if that gives the same.

    Args:
        model: The model, in evaluation mode.
        batch: One batch.
        weights: The number of weights of the layers that matter, by name.

    Returns:
        The blocks in order; empty without such a sequence.
    """
    watch = _Watch(model)
    with watch.watching(), torch.no_grad():
        run_batch(model, batch, "calibration batch 0")
    best: tuple[float, list[Block]] = (float(sum(weights.values())) ** 2, [])
    for blocks in watch.sequences():
        inside = [sum(n for name, n in weights.items() if _within(name, block.name)) for block in blocks]
        cost = sum(float(n) ** 2 for n in inside) + float(sum(weights.values()) - sum(inside)) ** 2
        if cost < best[0]:
            best = cost, blocks
    return best[1] if best[1] and _replays(model, batch, best[1]) else []


def _replays(model: nn.Module, batch: Any, blocks: list[Block]) -> bool:  # noqa: ANN401
    """Whether running the blocks by themselves gives what they gave within the model."""
    recording = Recording(blocks)
    outputs: list[Tensor] = []
    last = blocks[-1]
    handle = last.module.register_forward_hook(lambda *call: outputs.append(_at(call[2], last.gives)))
    try:
        with recording.capturing(), torch.no_grad():
            run_batch(model, batch)
        if len(outputs) != 1 or any(len(calls) != len(blocks) for calls in recording.others):
            return False
        for index in range(len(blocks)):
            recording.step(index, keep=True)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return False  # a block that cannot be called again
    finally:
        handle.remove()
    replayed, expected = recording.streams[0], outputs[0]
    return replayed.shape == expected.shape and torch.allclose(replayed, expected, rtol=1e-3, atol=1e-5)


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


class _Watch:
    """Follows the calls of the members of containers while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        self._lists: dict[str, list[Block | None]] = {}
        self._results: dict[str, Any] = {}  # what the last member returned, by container
        self._members = [
            (name, f"{name}.{key}".lstrip("."), child)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            for key, child in module.named_children()
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for container, name, child in self._members:
                handles.append(child.register_forward_pre_hook(self._before(container, name), with_kwargs=True))
                handles.append(child.register_forward_hook(self._after(container)))
            yield
        finally:
            self._results.clear()
            for handle in handles:
                handle.remove()

    def _before(self, container: str, name: str) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            blocks = self._lists.setdefault(container, [])
            inputs: list[tuple[Place, Tensor]] = [*enumerate(args), *kwargs.items()]
            inputs = [(place, x) for place, x in inputs if isinstance(x, Tensor)]
            if not blocks:
                blocks.append(Block(name, module, inputs[0][0]) if inputs else None)
                return
            outputs = _tensors(self._results.get(container))
            links = [(i, o) for i, x in inputs for o, y in outputs if x is y]
            last = blocks[-1]
            if last is None or not links or any(block and block.name == name for block in blocks):
                blocks.append(None)  # no sequence
                return
            last.gives = links[0][1]
            blocks.append(Block(name, module, links[0][0]))

        return hook

    def _after(self, container: str) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:  # noqa: ANN401
            self._results[container] = result
            blocks = self._lists.get(container)
            if blocks and blocks[-1] is not None:
                outputs = _tensors(result)
                blocks[-1].gives = outputs[0][0] if outputs else None

        return hook

    def sequences(self) -> Iterator[list[Block]]:
        """The containers whose members formed a sequence."""
        for blocks in self._lists.values():
            chain = [block for block in blocks if block is not None]
            if len(chain) == len(blocks) > 1:
                yield chain


def _tensors(result: Any) -> list[tuple[Place, Tensor]]:  # noqa: ANN401
    """The floating-point tensors of a result with their places."""
    if isinstance(result, Tensor):
        return [(None, result)]
    pairs = result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, tuple) else ()
    return [(place, x) for place, x in pairs if isinstance(x, Tensor)]


def _at(result: Any, place: Place) -> Tensor:  # noqa: ANN401
    """The tensor at a place of a result."""
    found: Tensor = result if place is None else result[place]
    return found
