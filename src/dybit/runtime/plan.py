"""Runs the steps of a lowered graph: programs of kernels on planned memory, with torch's operators between them."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dybit.kernels import extension
from dybit.runtime.lowering import At, Buffer, Lowering, Step, View

_ALIGNMENT = 64
_CACHE = 768 << 10  # bytes of a block of rows: a part of the L2 cache
_LEAST_ROWS = 384  # fewer are not divided into blocks
_LEAST_BLOCK, _MOST_BLOCK, _TILE = 96, 384, 24  # rows of a block; a multiple of the kernels' tiles


@dataclass(eq=False)
class _Kernels:
    """Steps that run by one call of the extension."""

    steps: list[Step]
    program: Any  # the extension's own object
    nbytes: int  # of its arena
    tensors: list[Buffer]  # whose addresses it takes


@dataclass(eq=False)
class _Torch:
    """Operators of torch."""

    steps: list[Step]
    run: fx.GraphModule
    reads: list[Buffer]
    writes: list[Buffer]


@dataclass(frozen=True)
class Share:
    """The time of a part of a fused model.

    Attributes:
        name: The operator.
        where: The name of the node in the graph.
        kernel: Whether a kernel of dybit computes it, and not torch.
        seconds: The time.
    """

    name: str
    where: str
    kernel: bool
    seconds: float


class Plan:
    """A graph at given shapes, ready to run.

    Args:
        lowering: The lowered graph.
        layouts: For every result, a tensor with the strides that it has to get; None for plain values.
    """

    def __init__(self, lowering: Lowering, layouts: Sequence[Any]) -> None:
        self._lowering, self._layouts = lowering, layouts
        self._inputs, self._outputs = lowering.inputs, lowering.outputs
        live = _live(lowering)
        self._stages: list[_Kernels | _Torch] = []
        groups = _groups(live)
        wanted = {x.buffer for x in self._outputs if isinstance(x, View)}
        self._shared = _shared(groups, wanted)
        for steps in groups:
            emit = steps[0].emit is not None
            self._stages.append(self._compile(steps) if emit else self._torch(steps))
        self._constants = {
            buffer: buffer.constant
            for buffer in {b for step in live for b in step.reads} | wanted
            if buffer.constant is not None
        }

    @property
    def arena_bytes(self) -> int:
        """Bytes of the planned memory."""
        return sum(stage.nbytes for stage in self._stages if isinstance(stage, _Kernels))

    def run(self, inputs: Sequence[Tensor], times: list[Share] | None = None) -> list[Any] | None:
        """Computes the results.

        Args:
            inputs: The tensors among the inputs of the model, with the planned shapes.
            times: Receives the time of every step, if given.

        Returns:
            The results in order, or None if a kernel met a value that its integers cannot hold, such as NaN.
        """
        known: dict[Buffer, Any] = dict(self._constants)
        for buffer, x in zip(self._inputs, inputs, strict=True):
            known[buffer] = _laid_out(x, buffer.like)
        for stage in self._stages:
            if isinstance(stage, _Torch):
                start = time.perf_counter()
                results = stage.run(*[known[buffer] for buffer in stage.reads])
                for buffer, x in zip(stage.writes, results, strict=True):
                    known[buffer] = x if buffer.like is None else _laid_out(x, buffer.like)
                if times is not None:
                    times += _spread(stage, time.perf_counter() - start)
            elif not self._run_program(stage, known, times):
                return None
        return self._results(known, inputs)

    def _run_program(self, stage: _Kernels, known: dict[Buffer, Any], times: list[Share] | None) -> bool:
        addresses = []
        for buffer in stage.tensors:
            tensor = known.get(buffer)
            if tensor is None:
                tensor = known[buffer] = _empty(buffer)
            addresses.append(tensor.data_ptr())
        count = sum(step.count for step in stage.steps)
        seconds = torch.zeros(count, dtype=torch.float64, device="cpu") if times is not None else None
        done = stage.program.run(addresses, torch.get_num_threads(), 0 if seconds is None else seconds.data_ptr())
        if times is not None and seconds is not None:
            spent = iter(seconds.tolist())
            for step in stage.steps:
                times.append(Share(step.name, step.node.name, True, sum(next(spent) for _ in range(step.count))))
        return bool(done)

    def _results(self, known: dict[Buffer, Any], inputs: Sequence[Any]) -> list[Any]:
        """Returns the results. No result shares memory with an input, a parameter or an earlier result."""
        results, given = [], {id(known[b]) for b in self._inputs}
        for out, layout in zip(self._outputs, self._layouts, strict=True):
            if not isinstance(out, View):
                results.append(out)
                continue
            base = known[out.buffer]
            seen = _see(base, out)
            result = _laid_out(seen, layout)
            if result is seen and (id(base) in given or out.buffer.constant is not None):
                result = seen.clone()
            given.add(id(base))
            results.append(result)
        return results

    def _compile(self, steps: list[Step]) -> _Kernels:
        tensors: list[Buffer] = []
        own = {b for step in steps for b in step.writes}
        for buffer in (b for step in steps for b in (*step.reads, *step.writes)):
            if buffer.constant is None and (buffer in self._shared or buffer not in own) and buffer not in tensors:
                tensors.append(buffer)
        numbers = {buffer: i + 1 for i, buffer in enumerate(tensors)}
        chains = _chains(steps)
        local = {b: chain for chain in chains for b in chain.local(steps, self._shared)}
        read = {b for step in steps for b in step.reads}
        # The steps of a chain run by turns, so what they use is needed at the same time.
        times = {step: i for i, chain in enumerate(chains) for step in chain.steps}
        moments = [list(run) for _, run in itertools.groupby(steps, key=lambda step: times.get(step, step))]
        offsets, nbytes = _place(moments, {b for b in own & read if b not in self._shared and b not in local})
        inner: dict[Buffer, int] = {}
        for chain in chains:
            inner |= chain.place([b for b, owner in local.items() if owner is chain])

        def at(x: Buffer | View | Tensor | None) -> At:
            if x is None:
                return -1, 0
            if isinstance(x, Tensor):
                return -1, x.data_ptr()
            buffer, before = (x, 0) if isinstance(x, Buffer) else (x.buffer, x.nbytes_before)
            if buffer.constant is not None:
                return -1, buffer.constant.data_ptr() + before
            if buffer in inner:
                return -2, inner[buffer] + before
            if buffer in offsets:
                return 0, offsets[buffer] + before
            return (numbers[buffer], before) if buffer in numbers else (-1, 0)

        program = extension.new_program(nbytes)
        starts = {chain.steps[0]: chain for chain in chains}
        ends = {chain.steps[-1] for chain in chains}
        for step in steps:
            if step in starts:
                chain = starts[step]
                program.begin_rows(step.rows, chain.block, chain.nbytes)
            step.emit(program, at)  # type: ignore[misc]
            if step in ends:
                program.end_rows()
        return _Kernels(steps, program, nbytes, tensors)

    def _torch(self, steps: list[Step]) -> _Torch:
        own = {b for step in steps for b in step.writes}
        reads = list(dict.fromkeys(b for step in steps for b in step.reads if b not in own))
        writes = [b for b in dict.fromkeys(b for step in steps for b in step.writes) if b in self._shared]
        return _Torch(steps, _graph(steps, reads, writes, self._lowering), reads, writes)


class _Chain:
    """Steps that run on a block of rows at a time.

    Attributes:
        steps: Consecutive steps on the same rows.
        block: Rows of a block.
        nbytes: Of the memory of a block.

    Args:
        steps: The steps.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.block, self.nbytes = steps[0].rows, 0

    def local(self, steps: list[Step], shared: set[Buffer]) -> list[Buffer]:
        """Returns the buffers that only this chain uses."""
        inside = set(self.steps)
        used = {b for step in steps if step not in inside for b in step.reads}
        read = {b for step in self.steps for b in step.reads}
        wrote = [b for step in self.steps for b in step.writes]
        return [b for b in wrote if b in read and b.of_rows is not None and b not in used and b not in shared]

    def place(self, buffers: list[Buffer]) -> dict[Buffer, int]:
        """Chooses the block so that its memory fits the cache. Returns the offset of every buffer in it."""
        sized = {b: b.of_rows(_ALIGNMENT) / _ALIGNMENT for b in buffers if b.of_rows is not None}
        moments = [[step] for step in self.steps]
        _, total = _place(moments, set(buffers), lambda b: int(sized[b] * _ALIGNMENT))
        most = _CACHE * _ALIGNMENT // max(total, 1)
        self.block = max(_LEAST_BLOCK, min(most // _TILE * _TILE, _MOST_BLOCK))
        block = self.block
        offsets, self.nbytes = _place(moments, set(buffers), lambda b: b.of_rows(block))  # type: ignore[misc]
        return offsets


def _chains(steps: list[Step]) -> list[_Chain]:
    """Returns the runs of consecutive steps on the same rows, if there are enough rows for several blocks."""
    chains: list[_Chain] = []
    for rows, run in itertools.groupby(steps, key=lambda step: step.rows):
        found = list(run)
        if rows >= _LEAST_ROWS and len(found) > 1:
            chains.append(_Chain(found))
    return chains


def _live(lowering: Lowering) -> list[Step]:
    """Returns the steps whose results are used."""
    wanted = {x.buffer for x in lowering.outputs if isinstance(x, View)}
    live: list[Step] = []
    for step in reversed(lowering.steps):
        if any(b in wanted for b in step.writes):
            wanted.update(step.reads)
            live.append(step)
    return live[::-1]


def _groups(steps: list[Step]) -> list[list[Step]]:
    """Orders steps so that kernels follow kernels where they can, and returns the runs of one kind."""
    writer = {b: step for step in steps for b in step.writes}
    waits = {step: {writer[b] for b in step.reads if b in writer} for step in steps}
    users: dict[Step, list[Step]] = {step: [] for step in steps}
    for step, needs in waits.items():
        for need in needs:
            users[need].append(step)
    left = {step: len(needs) for step, needs in waits.items()}
    ready: dict[bool, list[Step]] = {True: [], False: []}
    for step in steps:
        if not left[step]:
            ready[step.emit is not None].append(step)
    groups: list[list[Step]] = []
    kind = False
    while ready[True] or ready[False]:
        if not ready[kind]:
            kind = not kind
        group: list[Step] = []
        while ready[kind]:
            step = min(ready[kind], key=operator.attrgetter("index"))
            ready[kind].remove(step)
            group.append(step)
            for user in users[step]:
                left[user] -= 1
                if not left[user]:
                    ready[user.emit is not None].append(user)
        groups.append(group)
    return groups


def _shared(groups: list[list[Step]], wanted: set[Buffer]) -> set[Buffer]:
    """Returns the buffers that are results, or read by other groups than the one that writes them."""
    shared = set(wanted)
    for group in groups:
        own = {b for step in group for b in step.writes}
        shared |= {b for step in group for b in step.reads if b not in own}
    return shared


def _nbytes(buffer: Buffer) -> int:
    return buffer.nbytes


def _place(
    moments: list[list[Step]], buffers: set[Buffer], nbytes: Callable[[Buffer], int] = _nbytes
) -> tuple[dict[Buffer, int], int]:
    """Returns the offset of every buffer in the arena, and the size of the arena.

    Buffers that are needed at the same time do not overlap. Large ones are placed first, each at the lowest offset.
    """
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for i, steps in enumerate(moments):
        for buffer in (b for step in steps for b in (*step.reads, *step.writes)):
            if buffer in buffers:
                first.setdefault(buffer, i)
                last[buffer] = i
    sizes = {b: -(-(nbytes(b) + _ALIGNMENT) // _ALIGNMENT) * _ALIGNMENT for b in first}
    offsets: dict[Buffer, int] = {}
    total = 0
    for buffer in sorted(first, key=lambda b: (-sizes[b], first[b])):
        start = 0
        for offset, length in sorted(
            (offsets[b], sizes[b]) for b in offsets if first[b] <= last[buffer] and first[buffer] <= last[b]
        ):
            if start + sizes[buffer] <= offset:
                break
            start = max(start, offset + length)
        offsets[buffer] = start
        total = max(total, start + sizes[buffer])
    return offsets, total


def _graph(steps: list[Step], reads: list[Buffer], writes: list[Buffer], lowering: Lowering) -> fx.GraphModule:
    """Returns torch's operators of some steps as a function of buffers."""
    graph = fx.Graph()
    base: dict[Buffer, fx.Node] = {b: graph.placeholder(f"x{i}") for i, b in enumerate(reads)}
    made: dict[fx.Node, fx.Node] = {}

    def see(node: fx.Node) -> Any:  # noqa: ANN401
        if not lowering.has_view(node):
            return lowering.values[node]
        view = lowering.view(node)
        if view.is_whole:
            return base[view.buffer]
        if node not in made:
            place = tuple(view.like.shape), view.like.stride(), view.offset
            made[node] = graph.call_function(strided, (base[view.buffer], *place))
        return made[node]

    for step in steps:
        args, kwargs = (fx.node.map_arg(a, see) for a in (step.node.args, step.node.kwargs))
        base[step.writes[0]] = graph.call_function(step.node.target, args, kwargs)  # type: ignore[arg-type]
    graph.output(tuple(base[b] for b in writes))
    return fx.GraphModule(torch.nn.Module(), graph)


def strided(base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Returns a view of a tensor, with an offset in elements from its first one."""
    return base.as_strided(size, stride, base.storage_offset() + offset)


def _see(base: Tensor, view: View) -> Tensor:
    return base if view.is_whole else strided(base, view.like.shape, view.like.stride(), view.offset)


def _laid_out(x: Any, like: Tensor | None) -> Any:  # noqa: ANN401
    """Returns a tensor in the planned layout."""
    if like is None or not isinstance(x, Tensor) or same_layout(x, like):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def same_layout(x: Tensor, like: Tensor) -> bool:
    """Whether the elements of two tensors of the same shape lie at the same places."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), like.stride(), strict=True))


def _empty(buffer: Buffer) -> Tensor:
    like = buffer.like
    if like is None:
        return torch.empty(buffer.nbytes, dtype=torch.uint8, device="cpu")
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")


def _spread(stage: _Torch, seconds: float) -> list[Share]:
    """Divides the time of a stage evenly among its operators."""
    return [Share(step.name, step.node.name, False, seconds / len(stage.steps)) for step in stage.steps]
