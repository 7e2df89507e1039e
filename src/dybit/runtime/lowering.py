"""Lowers a captured graph to steps: kernels of the extension where they exist, torch's operators elsewhere.

Every value is a view of a buffer. A buffer is written by one step and read by others. Rules turn nodes into steps;
several nodes may become one step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from dybit.runtime.capture import CHECKS, CaptureError, shares_memory
from dybit.runtime.layouts import is_last

At = tuple[int, int]  # csrc/program.h: Place
PLANAR = "planar"
_MOST_FOLDED = 1 << 22  # elements of a value that is computed in advance


@dataclass(eq=False)
class Buffer:
    """Memory that one step writes.

    Attributes:
        nbytes: Its size.
        like: A tensor without values that fills it; None if only kernels know what it holds.
        constant: Its values, if they do not depend on the inputs.
        of_rows: The size of a buffer for so many rows; None if it does not consist of rows.
    """

    nbytes: int
    like: Tensor | None = None
    constant: Tensor | None = None
    of_rows: Callable[[int], int] | None = None


@dataclass(frozen=True)
class View:
    """A tensor in a buffer.

    Attributes:
        buffer: The buffer.
        like: The tensor without values.
        offset: Elements before its first one.
    """

    buffer: Buffer
    like: Tensor
    offset: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it is the tensor that fills the buffer, or no tensor at all."""
        return self.buffer.like is None or (self.buffer.like is self.like and not self.offset)

    @property
    def nbytes_before(self) -> int:
        """Bytes before its first element."""
        return self.offset * self.like.element_size()


Place = Callable[["Buffer | View | Tensor | None"], At]


@dataclass(eq=False)
class Step:
    """Something that runs: kernels if ``emit`` is set, else the operator of ``node``.

    Attributes:
        name: As in reports.
        node: The last of its nodes.
        reads: Buffers that it reads.
        writes: Buffers that it writes. Those that nobody reads get no memory.
        emit: Adds the step to a program of the extension, given the places of buffers, views and constant tensors.
    """

    name: str
    node: fx.Node
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    emit: Callable[[Any, Place], None] | None = None
    index: int = 0
    count: int = 1  # of the extension's steps
    rows: int = 0  # if the results of a row depend on that row alone: how many there are


class Lowering:
    """The values of a graph, and the steps that compute them.

    Args:
        graph: The captured graph.
        values: The value of every node (:class:`dybit.runtime.capture.Shapes`).
        state: Parameters and buffers by the names of the graph's attributes.
        given: The inputs; None if they have the layouts of their values.

    Attributes:
        inputs: The buffers of the inputs, in order.
        planar: Inputs that are read as contiguous images, while their values are channels-last.
        outputs: A view, or a plain value, for every result.
        results: The nodes of the results, or plain values.
        steps: In the order of the graph.
        kept: Objects that the steps refer to by address.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, Any], state: Mapping[str, Tensor],
                 given: Sequence[Tensor] | None = None) -> None:  # fmt: skip
        self.values, self._state, self._given = values, state, given
        self.steps: list[Step] = []
        self.inputs: list[Buffer] = []
        self.planar: dict[fx.Node, View] = {}
        self.outputs: list[Any] = []
        self.results: list[Any] = []
        self.kept: list[Any] = []
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self._views: dict[fx.Node, View] = {}
        self._taken: set[fx.Node] = set()
        self._real: dict[fx.Node, Any] = {}  # values that do not depend on inputs

    def run(self, rules: Sequence[Mapping[Any, Callable[[fx.Node], bool]]]) -> None:
        """Lowers every node.

        Args:
            rules: By operator: adds steps for a node and returns True, or returns False. The first that applies counts.
                That of :data:`PLANAR` tells whether the steps for an input can read it as contiguous images.
        """
        for node in self.nodes:
            if node.op == "placeholder":
                self._input(node, rules)
            elif node.op == "output":
                self.results = list(cast("Sequence[Any]", node.args[0]))
                self.outputs = [self._result(x) for x in self.results]
            elif node.op == "get_attr":
                self._constant(node, self._state.get(str(node.target)))
            elif node in self._taken or node.op != "call_function" or self._fold(node) or self._alias(node):
                continue
            elif not any(node.target in known and known[node.target](node) for known in rules):
                self.call(node)

    def _input(self, node: fx.Node, rules: Sequence[Mapping[Any, Callable[[fx.Node], bool]]]) -> None:
        value, given = self.values[node], None if self._given is None else self._given[len(self.inputs)]
        turned = given is not None and is_last(value) and not is_last(given) and given.is_contiguous()
        view = self.own(node)
        if given is not None and turned and any(known[PLANAR](node) for known in rules if PLANAR in known):
            like = torch.empty_like(given, device="meta")
            view = self.planar[node] = View(Buffer(given.nbytes, like), like)
        self.inputs.append(view.buffer)

    def view(self, node: fx.Node) -> View:
        """Returns where a value is."""
        return self._views[node]

    def has_view(self, node: Any) -> bool:  # noqa: ANN401
        """Whether a node is a tensor that has been lowered."""
        return node in self._views

    def own(self, node: fx.Node, like: Tensor | None = None) -> View:
        """Gives a value a buffer of its own.

        Args:
            node: The value.
            like: Its layout; None for that of the value.
        """
        tensor = self.values[node] if like is None else like
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = (span if tensor.numel() else 0) * tensor.element_size()
        self._views[node] = View(Buffer(nbytes, tensor), tensor)
        return self._views[node]

    def alias(self, node: fx.Node, other: fx.Node) -> None:
        """Lets a value be another one."""
        self._views[node] = self._views[other]

    def take(self, nodes: Iterable[fx.Node]) -> None:
        """Marks nodes that a step of another node computes."""
        self._taken.update(nodes)

    def is_taken(self, node: fx.Node) -> bool:
        """Whether a step of another node computes a node."""
        return node in self._taken

    def add(self, name: str, node: fx.Node, reads: Iterable[Buffer | View | None], writes: Iterable[Buffer | View],
            emit: Callable[[Any, Place], None], count: int = 1, rows: int = 0) -> None:  # fmt: skip
        """Adds a step of the kernels. See :class:`Step`."""
        read = tuple(_buffer(x) for x in reads if x is not None)
        self.steps.append(Step(name, node, read, tuple(map(_buffer, writes)), emit, self.order[node], count, rows))

    def call(self, node: fx.Node) -> None:
        """Leaves a node to torch."""
        value = self.values[node]
        if isinstance(value, Tensor):
            wrote = self.own(node).buffer
        elif value is None or isinstance(value, int | float | bool):
            return  # known now
        else:
            wrote = Buffer(0)
            self._views[node] = View(wrote, torch.empty(0, dtype=torch.uint8, device="meta"))
        reads = tuple(self._views[x].buffer for x in node.all_input_nodes if x in self._views)
        self.steps.append(Step(str(node.target), node, reads, (wrote,), None, self.order[node]))

    def constant(self, node: Any) -> Tensor | None:  # noqa: ANN401
        """Returns the values of a node that does not depend on the inputs; else None."""
        found = self._real.get(node)
        return found if isinstance(found, Tensor) else None

    def tensor(self, node: Any) -> Tensor | None:  # noqa: ANN401
        """Returns the parameter or buffer that a node is, or what is computed from such alone; None for None.

        Raises:
            CaptureError: The node depends on the inputs.
        """
        if node is None:
            return None
        found = self._state.get(str(node.target)) if node.op == "get_attr" else self.constant(node)
        if found is None:
            raise CaptureError(f"{node} is no parameter or buffer")
        return found

    def real(self, argument: Any) -> Any:  # noqa: ANN401
        """Returns an argument with nodes replaced by values that are known now."""
        return fx.node.map_arg(argument, lambda n: self._real.get(n, self.values[n]))

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Returns the nodes that use a value, looking through copies that need not be made."""
        found: list[fx.Node] = []
        for user in node.users:
            if user.op == "call_module" or user.target in _SIZES or user.target in CHECKS:  # which read no elements
                continue
            found += self.users(user) if self.is_copy(user) else [user]
        return found

    def source(self, node: fx.Node) -> fx.Node:
        """Returns the value that a node copies; the node itself if it is no copy."""
        while self.is_copy(node):
            node = node.all_input_nodes[0]
        return node

    def is_copy(self, node: fx.Node) -> bool:
        """Whether a node returns its only tensor unchanged, in the same layout."""
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return False
        value, before = self.values[node], self.values[node.all_input_nodes[0]]
        copied = node.target in _COPIES and isinstance(value, Tensor) and isinstance(before, Tensor)
        same = copied or (node.target in _RESHAPES and shares_memory(value, before))
        return same and value.shape == before.shape and value.stride() == before.stride()

    def _constant(self, node: fx.Node, tensor: Any) -> None:  # noqa: ANN401
        self._real[node] = tensor
        if isinstance(tensor, Tensor):
            like = self.values[node]
            if tensor.stride() != like.stride():
                tensor = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
                    tensor
                )
            self._views[node] = View(Buffer(0, like, tensor), like)

    def _fold(self, node: fx.Node) -> bool:
        """Computes a value now if it does not depend on the inputs."""
        value = self.values[node]
        parts = value if isinstance(value, tuple | list) else [value]
        sources = [x for x in node.all_input_nodes if isinstance(self.values[x], Tensor | tuple | list)]
        sources = sources[1:] if node.target in _FILLED else sources  # its values do not matter
        if (
            not all(isinstance(x, Tensor) for x in parts)
            or sum(x.numel() for x in parts) > _MOST_FOLDED
            or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            or not all(x in self._real for x in sources)
        ):
            return False
        args, kwargs = self.real(node.args), self.real(node.kwargs)
        if node.target in _FILLED:
            like = self.values[node.all_input_nodes[0]]
            args = (torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu"), *args[1:])
        with torch.no_grad():
            self._constant(node, node.target(*args, **kwargs))  # type: ignore[operator]
        return True

    def _alias(self, node: fx.Node) -> bool:
        """Finds out whether a value is a view of another, or a copy that need not be made."""
        value = self.values[node]
        if self.is_copy(node):
            self.alias(node, node.all_input_nodes[0])
            return True
        sources = node.all_input_nodes
        if node.target is operator.getitem:  # of several views, such as those of split
            sources = sources[0].all_input_nodes
        for other in sources:
            if (
                other in self._views
                and shares_memory(value, self.values[other])
                and value.dtype == self.values[other].dtype
            ):
                base = self._views[other]
                moved = value.storage_offset() - self.values[other].storage_offset()
                self._views[node] = View(base.buffer, value, base.offset + moved)
                return True
        return False

    def _result(self, x: Any) -> Any:  # noqa: ANN401
        if not isinstance(x, fx.Node):
            return x
        return self._views.get(x, self.values[x])


def _buffer(x: Buffer | View) -> Buffer:
    return x if isinstance(x, Buffer) else x.buffer


_ATEN = torch.ops.aten
_COPIES = (
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.alias.default,
    _ATEN.contiguous.default,
    _ATEN.lift_fresh_copy.default,
)
_FILLED = (
    _ATEN.new_zeros.default,
    _ATEN.new_ones.default,
    _ATEN.new_full.default,
    _ATEN.zeros_like.default,
    _ATEN.ones_like.default,
    _ATEN.full_like.default,
)
_SIZES = (_ATEN.sym_size.int, _ATEN.sym_numel.default, _ATEN.sym_stride.int)
_RESHAPES = (
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.reshape.default,
    _ATEN.expand.default,
    _ATEN.slice.Tensor,
    _ATEN.dropout.default,
    _ATEN.flatten.using_ints,
    _ATEN.to.dtype,
    _ATEN.to.dtype_layout,
    _ATEN.to.device,
    _ATEN.type_as.default,
)
