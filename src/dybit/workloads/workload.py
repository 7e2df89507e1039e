"""Workloads: the layers of a network as matrix products and convolutions, with their sizes and no numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dybit.errors import DyBitError
from dybit.safe_files import check_regular, parse_json

Pair = tuple[int, int]


@dataclass(frozen=True)
class Gemm:
    """``groups`` independent products of an (m, k) by a (k, n) matrix: a linear layer or an attention product.

    Args:
        name: Name of the layer, unique in its workload.
        m: Rows of the input: batch times tokens.
        k: Elements summed per output.
        n: Output channels.
        groups: Independent products (heads of an attention product, times windows).
        bias: Whether each output channel has a bias.
        dynamic: Both operands are activations, as in attention; there are no weights to store.

    Raises:
        DyBitError: A size is not a positive integer, or a dynamic product is given a bias.
    """

    name: str
    m: int
    k: int
    n: int
    groups: int = 1
    bias: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_name(self.name)
        for size in ("m", "k", "n", "groups"):
            _check_size(f"{size} of layer {self.name!r}", getattr(self, size))
        if self.dynamic and self.bias:
            raise DyBitError(f"bias of layer {self.name!r} must be False: a product of two activations has no weights")

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.groups * self.m * self.k * self.n

    @property
    def input_elements(self) -> int:
        """Elements of the input that are read at least once."""
        return self.groups * self.m * self.k

    @property
    def weight_elements(self) -> int:
        """Elements of the second operand; activations themselves where the product is dynamic."""
        return self.groups * self.k * self.n

    @property
    def output_elements(self) -> int:
        """Elements of the output."""
        return self.groups * self.m * self.n

    @property
    def parameters(self) -> int:
        """Learned numbers of the layer, bias included."""
        return 0 if self.dynamic else self.weight_elements + self.bias * self.groups * self.n

    def halo_elements(self, tiles: int) -> int:
        """Input elements read more than once when the rows are cut into ``tiles`` pieces: none for a matrix."""
        return 0


@dataclass(frozen=True)
class Conv:
    """A two-dimensional convolution; a one-dimensional one has height 1.

    As a matrix product (im2col) each group has m = batch · output positions, k = kernel area · input channels of the
    group and n = output channels of the group.

    Args:
        name: Name of the layer, unique in its workload.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        size: Height and width of the input.
        kernel: Height and width of the kernel.
        stride: Step of the kernel down and across.
        padding: Rows and columns of zeros on each side.
        dilation: Distance of adjacent kernel elements.
        groups: Channel groups; ``in_channels`` for a depthwise convolution.
        batch: Images.
        bias: Whether each output channel has a bias.

    Raises:
        DyBitError: A size is not a positive integer, the groups do not divide the channels, or the kernel is larger
            than the padded input.
    """

    name: str
    in_channels: int
    out_channels: int
    size: Pair
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    batch: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_name(self.name)
        for field in ("in_channels", "out_channels", "groups", "batch"):
            _check_size(f"{field} of layer {self.name!r}", getattr(self, field))
        for field in ("size", "kernel", "stride", "padding", "dilation"):
            pair = getattr(self, field)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise DyBitError(f"{field} of layer {self.name!r} must be a pair of integers, not {pair!r}")
            for value in pair:
                _check_size(f"{field} of layer {self.name!r}", value, 0 if field == "padding" else 1)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            channels = (self.in_channels, self.out_channels)
            raise DyBitError(f"groups of layer {self.name!r} must divide its channels {channels}, not {self.groups}")
        if min(self.output_size) < 1:
            raise DyBitError(f"kernel {self.kernel} of layer {self.name!r} is larger than its input {self.size}")

    @property
    def output_size(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return height, width

    @property
    def m(self) -> int:
        """Rows of the product of one group: batch times output positions."""
        return self.batch * math.prod(self.output_size)

    @property
    def k(self) -> int:
        """Elements summed per output."""
        return math.prod(self.kernel) * (self.in_channels // self.groups)

    @property
    def n(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with padding included."""
        return self.groups * self.m * self.k * self.n

    @cached_property
    def input_elements(self) -> int:
        """Elements of the input that are read at least once; padding and rows skipped by the stride are not."""
        touched = [len(self._touched(axis, self.output_size[axis])) for axis in (0, 1)]
        return self.batch * self.in_channels * math.prod(touched)

    @property
    def weight_elements(self) -> int:
        """Elements of all kernels."""
        return self.groups * self.k * self.n

    @property
    def output_elements(self) -> int:
        """Elements of the output."""
        return self.m * self.out_channels

    @property
    def parameters(self) -> int:
        """Learned numbers of the layer, bias included."""
        return self.weight_elements + self.bias * self.out_channels

    @property
    def dynamic(self) -> bool:
        """Whether both operands are activations: never."""
        return False

    def halo_elements(self, tiles: int) -> int:
        """Input elements read more than once when the output rows are cut into ``tiles`` bands.

        Each cut makes the rows that two neighbouring windows share be read twice. A cut between two images costs
        nothing; cuts are counted as if they were spread evenly.
        """
        shared = max(self.dilation[0] * (self.kernel[0] - 1) + 1 - self.stride[0], 0)
        cuts = max(tiles - self.batch, 0)
        return cuts * min(shared, self.size[0]) * self.in_channels * len(self._touched(1, self.output_size[1]))

    def _touched(self, axis: int, outputs: int) -> set[int]:
        """Input rows or columns that are read for the first ``outputs`` positions."""
        positions = (
            out * self.stride[axis] + tap * self.dilation[axis] - self.padding[axis]
            for out in range(outputs)
            for tap in range(self.kernel[axis])
        )
        return {position for position in positions if 0 <= position < self.size[axis]}


Layer = Gemm | Conv
_KINDS: dict[str, type[Gemm] | type[Conv]] = {"gemm": Gemm, "conv": Conv}


@dataclass(frozen=True)
class Workload:
    """The layers of a network in the order in which they run.

    Args:
        name: Name of the network.
        layers: The layers; their names are different.
        extra_parameters: Learned numbers outside the layers: normalisations, position embeddings, class tokens.

    Raises:
        DyBitError: There is no layer, or two have one name.

    Example:
        >>> work = Workload("two", (Gemm("a", 1, 8, 4), Conv("b", 3, 8, size=(8, 8), kernel=(3, 3))))
        >>> work.macs, work == Workload.from_json(work.to_json())
        (7808, True)
    """

    name: str
    layers: tuple[Layer, ...]
    extra_parameters: int = 0

    def __post_init__(self) -> None:
        """Checks that the names are different."""
        _check_size("extra_parameters", self.extra_parameters, 0)
        if not self.layers:
            raise DyBitError(f"layers of workload {self.name!r} must not be empty")
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen:
                raise DyBitError(f"layers of workload {self.name!r} must have different names, {layer.name!r} is twice")
            seen.add(layer.name)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Learned numbers of the network."""
        # A layer called name#2 is another use of what has been counted, here or in extra_parameters.
        return self.extra_parameters + sum(layer.parameters for layer in self.layers if "#" not in layer.name)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_json(self) -> str:
        """Returns the workload as JSON; fields with their default value are left out."""
        layers = [
            {"kind": type(layer).__name__.lower()}
            | {f.name: getattr(layer, f.name) for f in fields(layer) if getattr(layer, f.name) != f.default}
            for layer in self.layers
        ]
        document = {"name": self.name, "extra_parameters": self.extra_parameters, "layers": layers}
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Returns the workload that :meth:`to_json` wrote.

        Raises:
            DyBitError: ``text`` is not JSON, a key is unknown or missing, or a size is wrong.
        """
        document = parse_json(text, "workload")
        if not isinstance(document, dict) or not isinstance(document.get("layers"), list):
            raise DyBitError("workload must be an object with a list of layers")
        unknown = document.keys() - {"name", "layers", "extra_parameters"}
        if unknown:
            raise DyBitError(f"workload has the unknown key {min(unknown)!r}; known are name, layers, extra_parameters")
        layers = tuple(_layer(item) for item in document["layers"])
        return cls(str(document.get("name", "workload")), layers, document.get("extra_parameters", 0))

    def save(self, path: str | Path) -> None:
        """Writes the workload as JSON to ``path``."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Workload:
        """Returns the workload in the JSON file at ``path``.

        Raises:
            DyBitError: The file does not exist or is not a workload.
        """
        try:
            text = check_regular(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DyBitError(f"path of a workload must be a readable text file, not {str(path)!r}: {error}") from error
        return cls.from_json(text)


def _layer(item: object) -> Layer:
    """The layer of one JSON object."""
    kind = item.get("kind") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str) or kind not in _KINDS:
        raise DyBitError(f"kind of a layer must be gemm or conv, not {kind!r:.100}")
    layer: Any = _KINDS[kind]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items() if key != "kind"}
    known = [field.name for field in fields(layer)]
    unknown = values.keys() - set(known)
    if unknown:
        raise DyBitError(f"{kind} layer {item.get('name')!r} has the unknown key {min(unknown)!r}; known are {known}")
    try:
        made: Layer = layer(**values)
        return made
    except TypeError as error:
        raise DyBitError(f"{kind} layer {item.get('name')!r} is incomplete: {error}") from error


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise DyBitError(f"name of a layer must be a non-empty string, not {name!r}")


def _check_size(name: str, value: object, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise DyBitError(f"{name} must be an integer of at least {low}, not {value!r}")
