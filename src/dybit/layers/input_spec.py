"""How the inputs of a layer are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.layers.kinds import (
    CONVOLUTIONS,
    TRANSPOSED,
    channel_dim,
    input_places,
)
from dybit.operators.input_rounding import InputRounding


@dataclass(frozen=True)
class InputSpec:
    """How the inputs of a layer are rounded.

    Args:
        format: Name of a single format, such as ``u8r3``.
        mode: ``static`` (scale and offset are buffers) or ``dynamic`` (the scale is the largest magnitude).
        reach: For dynamic inputs: the value to which the largest magnitude is scaled. For tapered formats, a value well
            below the largest one is best.
        group_size: For dynamic inputs of linear layers: consecutive features that share a scale.
        offset: Whether a static input has an offset.

    Raises:
        DyBitError: A field is bad.
    """

    format: str
    mode: str = "static"
    reach: float | None = None
    group_size: int | None = None
    offset: bool = False

    def __post_init__(self) -> None:
        """Checks the fields, which may come from a file."""
        if len(catalogue.family(self.format).books) != 1:
            raise DyBitError(f"format of an input must be a single one, not the family {self.format!r}")
        if self.mode not in ("static", "dynamic") or not isinstance(self.offset, bool):
            raise DyBitError(f"mode must be static or dynamic and offset a boolean, not {self.mode!r}, {self.offset!r}")
        dynamic = self.mode == "dynamic"
        if not (isinstance(self.reach, float) and 0 < self.reach < float("inf") if dynamic else self.reach is None):
            raise DyBitError(f"reach must be a positive number for dynamic inputs only, not {self.reach!r}")
        sized = isinstance(self.group_size, int) and self.group_size > 0
        if not (self.group_size is None or (sized and dynamic)) or (self.offset and dynamic):
            raise DyBitError(f"group_size={self.group_size!r} and offset={self.offset!r} do not fit mode={self.mode!r}")

    @classmethod
    def from_dict(cls, data: object) -> InputSpec:
        """Reads the fields from JSON values.

        Raises:
            DyBitError: They are not the fields of an input, or bad.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != known:
            raise DyBitError(f"a stored input must have the fields {', '.join(sorted(known))}, not {data!r:.200}")
        return cls(**data)

    to_dict = asdict

    def rounding(self, scale: Tensor | None = None, offset: Tensor | None = None) -> InputRounding:
        """Returns the argument of operators, with the scale and offset of static inputs."""
        return InputRounding(self.format, scale, offset, self.reach or 1.0, self.group_size or 0)


def round_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], round_input: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with its inputs rounded."""
    positional = list(args)
    for place in input_places(module, args, kwargs):
        if isinstance(place, int):
            positional[place] = round_input(args[place])
        else:
            kwargs[place] = round_input(kwargs[place])
    return tuple(positional), kwargs


def round_input(module: nn.Module, x: Tensor, rounding: InputRounding) -> Tensor:
    """Rounds an input of a module. Dynamic scales belong to groups or positions; in convolutions, to samples."""
    if rounding.format and rounding.scale is None and isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        samples = x[None] if channel_dim(module, x) == 0 else x
        return replace(rounding, group_size=0).round(samples.flatten(1)).view(x.shape)
    return rounding.round(x)
