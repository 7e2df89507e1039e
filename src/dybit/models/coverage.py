"""Which share of a model's weights is quantized, what stays in floating point, and why."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.kinds import layer_kind, weight_names
from dybit.layers.quantized import Quantized
from dybit.recipe import Recipe

_NOTICEABLE = 0.1  # least share of unintended floating-point weights for a warning
_MAX_NORM, _TIED = "max_norm changes it", "tied to a weight that is not quantized"
_TOLD = (_MAX_NORM, _TIED)  # planning already warns of these, layer by layer
_SHOWN = 4
_STORED = 32


@dataclass(frozen=True)
class Left:
    """A module whose weights stay in floating point.

    Attributes:
        name: Its qualified name, or the name of a parameter of the model itself.
        kind: Its class.
        weights: The number of its weights that no earlier module has.
        reason: Why they stay.
        asked: Whether the recipe asks for it.
    """

    name: str
    kind: str
    weights: int
    reason: str
    asked: bool


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized. Biases and gains do not count, tied weights count once.

    Attributes:
        quantized: The number of weights stored as codes.
        total: The number of all weights.
        left: The modules that stay in floating point, largest first.
    """

    quantized: int
    total: int
    left: tuple[Left, ...]

    @classmethod
    def of(cls, quantized: int, left: Iterable[Left]) -> Coverage:
        """Returns the coverage of a model with a number of quantized weights and the modules left."""
        ordered = tuple(sorted(left, key=lambda part: -part.weights))
        return cls(quantized, quantized + sum(part.weights for part in ordered), ordered)

    @property
    def unasked(self) -> tuple[Left, ...]:
        """The modules that stay in floating point without the recipe asking for it."""
        return tuple(part for part in self.left if not part.asked)

    def __str__(self) -> str:
        """One line: the share that is quantized, and the largest parts that are not."""
        text = f"{_percent(self.quantized, self.total)} of {self.total:,} weights are quantized"
        return f"{text}; in floating point: {self._parts(self.left)}" if self.left else text

    def announce(self, stacklevel: int = 2) -> None:
        """Logs the summary; warns if a noticeable share stays in floating point without the recipe asking for it.

        Args:
            stacklevel: As for ``warnings.warn``.
        """
        logging.getLogger("dybit").info("%s", self)
        parts = [part for part in self.unasked if part.reason not in _TOLD]
        left = sum(part.weights for part in parts)
        if left > _NOTICEABLE * self.total:
            warnings.warn(
                f"{_percent(left, self.total)} of the weights stay in floating point: {self._parts(parts)}; "
                "a rule that maps them to None keeps them without this warning",
                DyBitWarning,
                stacklevel=stacklevel + 1,
            )

    def check(self) -> None:
        """Checks that weights stay in floating point only if the recipe asks for it.

        Raises:
            DyBitError: Others do.
        """
        if self.unasked:
            left = sum(part.weights for part in self.unasked)
            raise DyBitError(
                f"strict=True, but {_percent(left, self.total)} of the weights would stay in floating point: "
                f"{self._parts(self.unasked)}; map them to None in rules to keep them"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, with the largest of the parts."""
        return {
            "quantized": self.quantized,
            "total": self.total,
            "left": [asdict(part) for part in self.left[:_STORED]],
        }

    @classmethod
    def from_dict(cls, data: object) -> Coverage:
        """Reads the result of :meth:`to_dict`.

        Raises:
            DyBitError: It is malformed.
        """
        if not isinstance(data, Mapping) or set(data) != {"quantized", "total", "left"}:
            raise DyBitError(f"coverage must have the fields quantized, total and left, not {data!r:.100}")
        types = {"name": str, "kind": str, "weights": int, "reason": str, "asked": bool}
        left: list[Any] = data["left"] if isinstance(data["left"], list) else [None]
        good = all(isinstance(part, dict) and {key: type(part[key]) for key in part} == types for part in left)
        numbers = data["quantized"], data["total"]
        if not good or any(type(number) is not int or number < 0 for number in numbers):
            raise DyBitError(f"coverage has a bad value: {data!r:.200}")
        return cls(*numbers, tuple(Left(**part) for part in left))

    def _parts(self, left: Collection[Left]) -> str:
        """Describes the largest parts; equal kinds are combined."""
        groups: dict[tuple[str, str], list[Left]] = {}
        for part in left:
            groups.setdefault((part.kind, part.reason), []).append(part)
        sizes = {key: sum(part.weights for part in parts) for key, parts in groups.items()}
        texts = []
        for (kind, reason), parts in sorted(groups.items(), key=lambda item: -sizes[item[0]]):
            name = repr(parts[0].name) if len(parts) == 1 else f"{len(parts)} such as {parts[0].name!r}"
            texts.append(f"{kind} {name} ({_percent(sizes[kind, reason], self.total)}, {reason})")
        more = f", and {len(texts) - _SHOWN} other kinds" if len(texts) > _SHOWN else ""
        return ", ".join(texts[:_SHOWN]) + more


def measure(model: nn.Module, recipe: Recipe | None = None, planned: Collection[str] = ()) -> Coverage:
    """Measures how much of a model is quantized.

    Args:
        model: The model, before or after quantization.
        recipe: The recipe, if known. Without it, nothing counts as asked for.
        planned: The names of the modules whose weights are about to be quantized.
    """
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    quantized, seen, left = 0, set[int](), []
    skipped: set[nn.Module] = set()  # parametrizations of planned weights are made permanent before quantization
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in sorted(modules.items(), key=lambda item: not weight_names(item[1])):
        if module in skipped:
            continue
        covered = weight_names(module) if name in planned else ()
        if covered and parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            skipped |= {part for key in covered if key in lists for part in lists[key].modules()}
        for identity, count in _weights(module, covered):
            quantized += count * (identity not in seen)
            seen.add(identity)
        for key, parameter in module._parameters.items():
            if not _is_left(module, key, parameter, covered) or id(parameter) in seen or parameter is None:
                continue
            seen.add(id(parameter))
            part = name.partition(f"{'.' if name else ''}parametrizations.")[0] or key
            owner: nn.Module = modules.get(part, module)
            reason, asked = _reason(part, owner, recipe, shared=uses[id(parameter)] > 1)
            left.append(Left(part, type(owner).__name__, parameter.numel(), reason, asked))
    return Coverage.of(quantized, _merged(left))


def unsupported(model: nn.Module) -> list[str]:
    """The names, as in :class:`Left`, of the modules with weights that cannot be quantized."""
    return [
        name or key
        for name, module in model.named_modules()
        if not weight_names(module)
        for key, parameter in module._parameters.items()
        if _is_left(module, key, parameter, ())
    ]


def _weights(module: nn.Module, covered: Collection[str]) -> Iterator[tuple[int, int]]:
    """Returns identity and size of the weights of a module that are codes, or will be."""
    if isinstance(module, Quantized):
        for key, spec in module.weight_specs.items():
            yield id(module._buffers[key]), spec.rows * spec.columns
    for key in covered:
        parameter = module._parameters.get(key)
        weight = getattr(module, key) if parameter is None else parameter
        yield id(weight if parameter is None else parameter), weight.numel()


def _is_left(module: nn.Module, key: str, parameter: Tensor | None, covered: Collection[str]) -> bool:
    """Whether a parameter is a weight that is neither quantized nor part of a quantized one."""
    if parameter is None or is_lazy(parameter) or not parameter.is_floating_point():
        return False
    made_of = {f"{name}{suffix}" for name in covered for suffix in ("", "_g", "_v", "_orig")}
    if "bias" in key or key in made_of:
        return False
    return key in weight_names(module) or sum(size > 1 for size in parameter.shape) > 1


def _reason(name: str, module: nn.Module, recipe: Recipe | None, *, shared: bool) -> tuple[str, bool]:
    """Returns why the weights of a module stay, and whether the recipe asks for it."""
    pattern = recipe.keeps(name) if recipe is not None else None
    if pattern is not None:
        return f"rule {pattern!r}", True
    if not weight_names(module):
        own_code = not type(module).__module__.startswith("torch.") or isinstance(module, nn.ParameterList)
        return "a parameter of the model's own code" if own_code else "not a supported kind", False
    layer = recipe.layer(name, layer_kind(module)) if recipe is not None else None
    if recipe is not None and (layer is None or layer.weights is None):
        return "the recipe keeps these weights", True
    if getattr(module, "max_norm", None) is not None:
        return _MAX_NORM, False
    return _TIED if shared else "not quantized", False


def _merged(left: Iterable[Left]) -> Iterator[Left]:
    """The parameters of one module as one part."""
    by_name: dict[str, list[Left]] = {}
    for part in left:
        by_name.setdefault(part.name, []).append(part)
    for name, parts in by_name.items():
        first = parts[0]
        yield Left(name, first.kind, sum(part.weights for part in parts), first.reason, first.asked)


def _percent(part: int, whole: int) -> str:
    """Formats a share. Rounds to 0 % and 100 % only if exact."""
    share = round(100 * part / whole) if whole else 100
    if share == 0 and part:
        return "under 1 %"
    return "over 99 %" if share == 100 and part < whole else f"{share} %"
