"""The recipe: which layers are quantized, to which formats, at which granularity."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, get_args

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.formats.scaling import GRANULARITIES, METHODS, SCALE_TYPES, Granularity, Method, ScaleType
from dybit.safe_files import parse_json

Variants = Literal["all", "plain", "spare", "midrise"]
Criterion = Literal["auto", "weight", "activation"]
Mode = Literal["static", "dynamic"]
Kind = Literal["linear", "convolution", "embedding"]

FORMAT_VERSION = 1
_LONGEST_PATTERN = 10_000
INPUT_GROUP_SIZE = 128


@dataclass(frozen=True)
class LayerRecipe:
    """How one layer is quantized.

    Args:
        weights: Width of the codes, 2 to 8; or the name of any format, such as ``"s4r2"`` or ``"nf4"``; or None to keep
            the weights in floating point. A width means DyBit with the variants in ``variants``. 8 without ``variants``
            means ``"int8"``: its products are twice as fast, and it is nearly as accurate.
        activations: The same for the layer's inputs. 8 means ``"int8"``, whose products are the fastest; below, a width
            means DyBit, with the ``max_run`` that calibration chooses. The format becomes unsigned if calibration finds
            no negative input. ``"dybit8plain"`` is DyBit of 8 bits.
        granularity: What shares a scale. None means ``"group"`` if ``group_size`` is given, else ``"channel"``.
        group_size: Consecutive weights of an output channel that share a scale.
        scale: Type of the scales: ``fp32``, ``bf16``, ``pow2`` or ``e4m3`` (see :mod:`dybit.tensors.scale_search`).
            None means ``bf16`` for groups, where FP32 gains nothing for its bits, and ``fp32`` otherwise.
        variants: The variants that a width may choose from: ``plain`` (``max_run`` only), ``spare`` (plain variants
            with one more level, never worse than plain), ``midrise``, or ``all``. None means ``all`` at 2 bits,
            ``spare`` from 3 to 5, and ``plain`` above, where the spare level gains nothing (8 bits: INT8).
        variant_granularity: What shares a variant; None for the same as the scale.
        method: How weight scales are chosen: ``mse``, ``absmax`` or ``percentile``.
        criterion: How ``mse`` weights errors: ``weight`` (equally), ``activation`` (by the second moment of the layer's
            inputs, which needs calibration), or ``auto`` (``activation`` if there is calibration data).
        percentile: For the ``percentile`` methods of weights and activations.
        activation_mode: ``static``: one scale per tensor, from calibration. ``dynamic``: a scale per token (per sample
            in convolutions), from its largest magnitude as the model runs. None: static in convolutions; dynamic in all
            other layers, with ``activation_group_size`` 128 unless it is given.
        activation_method: How static scales are chosen: ``mse``, ``absmax`` (min-max) or ``percentile``.
        activation_group_size: For dynamic activations of linear layers: consecutive inputs that share a scale.
        activation_offset: Whether static activations may use an unsigned format and an offset if that reduces the
            error, as for outputs of GELU and SiLU.

    Raises:
        DyBitError: A field has a bad value or does not fit the others.
    """

    weights: int | str | None = 4
    activations: int | str | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    scale: ScaleType | None = None
    variants: Variants | None = None
    variant_granularity: Granularity | None = None
    method: Method = "mse"
    criterion: Criterion = "auto"
    percentile: float = 99.99
    activation_mode: Mode | None = None
    activation_method: Method = "mse"
    activation_group_size: int | None = None
    activation_offset: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        choices = {
            "granularity": (None, *GRANULARITIES),
            "scale": (None, *SCALE_TYPES),
            "variants": (None, *get_args(Variants)),
            "variant_granularity": (None, *GRANULARITIES),
            "method": METHODS,
            "criterion": get_args(Criterion),
            "activation_mode": (None, *get_args(Mode)),
            "activation_method": METHODS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join("null" if word is None else str(word) for word in allowed)
                raise DyBitError(f"{name} must be one of {words}, not {value!r}{_nearest(value, allowed)}")
        for name in ("group_size", "activation_group_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise DyBitError(f"{name} must be a positive integer or None, not {value!r}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        number = isinstance(self.percentile, int | float) and not isinstance(self.percentile, bool)
        if not number or not 0 < self.percentile <= 100:
            raise DyBitError(f"percentile must be above 0 and at most 100, not {self.percentile!r}")
        if not isinstance(self.activation_offset, bool):
            raise DyBitError(f"activation_offset must be true or false, not {self.activation_offset!r}")
        if self.granularity is not None and (self.group_size is None) == (self.granularity == "group"):
            raise DyBitError(f"group_size={self.group_size} does not fit granularity={self.granularity!r}")
        if self.activation_group_size is not None and self.activation_mode == "static":
            raise DyBitError(
                f"activation_group_size={self.activation_group_size} needs activation_mode='dynamic', "
                f"not {self.activation_mode!r}"
            )
        family = self.weight_family
        if family and family.group_size not in (None, self.group_size):
            raise DyBitError(f"weights={self.weights!r} needs group_size={family.group_size}, not {self.group_size}")
        if family and family.scale and self.scale not in (None, family.scale):
            raise DyBitError(f"weights={self.weights!r} needs scale={family.scale!r}, not {self.scale!r}")
        order = GRANULARITIES
        finer = self.variant_granularity and order.index(self.variant_granularity) > order.index(self.scale_granularity)
        if finer:
            raise DyBitError(
                f"variant_granularity={self.variant_granularity!r} is finer than the scales' {self.scale_granularity!r}"
            )
        _ = self.activation_families

    @cached_property
    def weight_family(self) -> Family | None:
        """The format family of the weights."""
        if self.weights is None or not _is_width("weights", self.weights):
            return catalogue.family(self.weights) if isinstance(self.weights, str) else None
        bits = int(self.weights)
        if bits == 8 and self.variants is None:
            return catalogue.family("int8")
        kind: Variants = "all" if bits == 2 else "spare" if bits <= 5 else "plain"
        return catalogue.dybit(bits, kind=self.variants or kind)

    @cached_property
    def activation_families(self) -> tuple[Family, Family | None] | None:
        """The families of signed and of non-negative inputs. The latter is None if the format has no unsigned family.

        None if activations stay in floating point.
        """
        if self.activations is None:
            return None
        if _is_width("activations", self.activations):
            bits = int(self.activations)
            if bits == 8:
                return catalogue.family("int8"), catalogue.family("uint8")
            return catalogue.dybit(bits, kind="plain"), catalogue.dybit(bits, signed=False)
        name = str(self.activations)
        signed = catalogue.family(name)
        if signed.scale or signed.group_size:
            raise DyBitError(f"activations={name!r} prescribes its scales, which inputs do not support")
        try:
            return signed, catalogue.family("u" + (name[1:] if name[:1] == "s" and name[1:2].isdigit() else name))
        except DyBitError:
            return signed, None if any(book.levels[0] < 0 for book in signed.books) else signed

    @property
    def scale_granularity(self) -> Granularity:
        """The granularity of scales, resolved."""
        return self.granularity or ("group" if self.group_size else "channel")

    @property
    def has_static_inputs(self) -> bool:
        """Whether the inputs have static scales, which need calibration."""
        return self.activations is not None and self.activation_mode == "static"

    @property
    def scale_type(self) -> ScaleType:
        """The type of the weight scales, resolved."""
        family = self.weight_family
        default: ScaleType = "bf16" if self.scale_granularity == "group" else "fp32"
        return self.scale or (family.scale if family else None) or default


@dataclass(frozen=True)
class Recipe(LayerRecipe):
    """How a model is quantized: defaults for all layers, and rules for some.

    Args:
        embeddings: As ``weights``, for embedding tables and the output layers tied to them. 8 by default: a table is
            not multiplied, so fewer bits save only memory.
        rules: Maps patterns of qualified names to the fields that differ, or to None to keep these layers in floating
            point. The first pattern that matches wins. A pattern is a glob (``"encoder.*.query"``) or, after ``re:``,
            a regular expression that must match the whole name.

    Raises:
        DyBitError: A field, also in a rule, is unknown or has a bad value. The message suggests the nearest name.

    Example:
        >>> recipe = Recipe(weights=4, group_size=128, rules={"head": None, "re:.*conv1": {"weights": 8}})
        >>> recipe.layer("stem.conv1").weights, recipe.layer("head")
        (8, None)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    embeddings: int | str | None = 8
    rules: Any = ()  # Mapping[str, Mapping | None] or its items; kept as a tuple of (pattern, tuple of items | None)

    def __post_init__(self) -> None:
        """Checks the defaults and every rule."""
        object.__setattr__(self, "rules", _freeze(self.rules))
        super().__post_init__()
        replace(self._defaults, weights=self.embeddings)
        for pattern, changes in self.rules:
            if len(pattern) > _LONGEST_PATTERN:
                raise DyBitError(
                    f"a rule must have at most {_LONGEST_PATTERN} characters, not {len(pattern)}: {pattern!r:.100}"
                )
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except (re.error, OverflowError) as error:
                    raise DyBitError(f"rule {pattern!r:.200} is not a regular expression: {error}") from None
                except (RecursionError, MemoryError):
                    raise DyBitError(f"rule {pattern!r:.200} is not a regular expression: it nests too deep") from None
            if changes is not None:
                _apply(self._defaults, pattern, changes)

    @cached_property
    def _defaults(self) -> LayerRecipe:
        return LayerRecipe(**{field.name: getattr(self, field.name) for field in fields(LayerRecipe)})

    def layer(self, name: str, kind: Kind = "linear") -> LayerRecipe | None:
        """Returns how a layer is quantized.

        Args:
            name: Qualified name of the module.
            kind: What decides its defaults: the default width of an ``embedding`` is ``embeddings``, and its inputs are
                indices; inputs of a ``convolution`` are static. All other layers are ``linear``.

        Returns:
            The layer's recipe, whose ``activation_mode`` is not None; or None to keep it in floating point.
        """
        defaults = self._defaults
        if kind == "embedding":
            defaults = replace(defaults, weights=self.embeddings, activations=None)
        for pattern, changes in self.rules:
            if matches(pattern, name):
                if changes is None:
                    return None
                defaults = _apply(defaults, pattern, changes)
                break
        if defaults.weights is None and defaults.activations is None:
            return None
        return _with_mode(defaults, kind)

    def keeps(self, name: str) -> str | None:
        """Returns the pattern of the rule that keeps a layer in floating point, or None."""
        rule = next(((pattern, changes) for pattern, changes in self.rules if matches(pattern, name)), None)
        return rule[0] if rule is not None and rule[1] is None else None

    def check_names(self, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Checks that every rule matches a layer.

        Args:
            names: The layers that can be quantized.
            others: Parts of the model that cannot be quantized. Only rules that keep floating point may match them.

        Raises:
            DyBitError: A rule matches nothing; the message suggests the nearest name.
        """
        layers, others = list(names), list(others)
        for pattern, changes in self.rules:
            known = layers if changes is not None else [*layers, *others]
            if not any(matches(pattern, name) for name in known):
                raise DyBitError(f"rule {pattern!r} matches no layer{_nearest(pattern.removeprefix('re:'), known)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON values, without fields that have their default value."""
        data: dict[str, Any] = {"version": FORMAT_VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "rules" and (value != field.default or field.name == "weights"):
                data[field.name] = value
        if self.rules:
            data["rules"] = {name: None if changes is None else dict(changes) for name, changes in self.rules}
        return data

    def to_json(self) -> str:
        """Returns the recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        """Reads JSON values as :meth:`to_dict` writes them.

        Raises:
            DyBitError: ``data`` is not a mapping, is of another version, or has unknown or bad fields.
        """
        if not isinstance(data, Mapping):
            raise DyBitError(f"a recipe must be a JSON object, not {data!r:.100}")
        values = dict(data)
        version = values.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise DyBitError(f"recipe version {version!r} is not supported, only {FORMAT_VERSION}")
        _check_known(values, [field.name for field in fields(cls)], "recipe")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads JSON text.

        Raises:
            DyBitError: It is not JSON, or as :meth:`from_dict`.
        """
        return cls.from_dict(parse_json(text, "the recipe", pairs=_unique))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a qualified name: a glob, or a whole regular expression after ``re:``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _apply(defaults: LayerRecipe, pattern: str, changes: tuple[tuple[str, Any], ...]) -> LayerRecipe:
    values = dict(changes)
    _check_known(values, [field.name for field in fields(LayerRecipe)], f"rule {pattern!r}")
    # A rule that sets one of these two means the other to follow.
    if "group_size" in values and "granularity" not in values:
        values["granularity"] = None
    if "granularity" in values and values["granularity"] != "group" and "group_size" not in values:
        values["group_size"] = None if values["granularity"] else defaults.group_size
    return replace(defaults, **values)


def _with_mode(layer: LayerRecipe, kind: Kind) -> LayerRecipe:
    """Returns the recipe of a layer with the mode of its inputs."""
    if layer.activation_mode is not None:
        return layer
    if kind == "convolution":
        return replace(layer, activation_mode="static", activation_group_size=None)
    return replace(
        layer, activation_mode="dynamic", activation_group_size=layer.activation_group_size or INPUT_GROUP_SIZE
    )


def _freeze(rules: object) -> tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]:
    items = rules.items() if isinstance(rules, Mapping) else rules
    frozen = []
    try:
        for pattern, changes in items:  # type: ignore[attr-defined]  # anything else is caught below
            if not isinstance(pattern, str):
                raise TypeError
            frozen.append((pattern, None if changes is None else tuple(dict(changes).items())))
    except (TypeError, ValueError):
        raise DyBitError(f"rules must map patterns to fields or None, not {rules!r:.200}") from None
    repeated = [pattern for pattern, count in Counter(pattern for pattern, _ in frozen).items() if count > 1]
    if repeated:
        raise DyBitError(f"rules have the pattern {repeated[0]!r} twice")
    return tuple(frozen)


def _is_width(name: str, value: object) -> bool:
    if isinstance(value, str):
        return False
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise DyBitError(f"{name} must be 2 to 8 bits, the name of a format, or None, not {value!r}")
    return True


def _check_known(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise DyBitError(f"{where} has no field {name!r}{_nearest(name, known)}")


def _nearest(value: object, known: Iterable[object]) -> str:
    near = get_close_matches(str(value), [str(word) for word in known if word is not None], n=1, cutoff=0.3)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DyBitError(f"the recipe names {sorted(repeated)[0]!r} twice")
    return dict(pairs)
