"""Candidates: pairs of weight and activation formats that a search may choose for a layer, and recipes made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.recipe import LayerRecipe, Recipe, matches

_SHORT = re.compile(r"w(\d+)(?:a(\d+))?")


@dataclass(frozen=True)
class Candidate:
    """A pair of formats for the weights and the inputs of a layer.

    Args:
        weights: As in :class:`dybit.Recipe`: a width, the name of a format, or None to keep them.
        activations: The same for the inputs. ``Candidate(None, None)`` keeps the layer in floating point.

    Raises:
        DyBitError: A format is unknown or not allowed.

    Example:
        >>> Candidate.parse("4/8"), Candidate.parse("4/8").name, Candidate(None).name
        (Candidate(weights=4, activations=8), 'W4A8', 'FP32')
    """

    weights: int | str | None
    activations: int | str | None = None

    def __post_init__(self) -> None:
        """Checks the formats like a recipe."""
        family = catalogue.family(self.weights) if isinstance(self.weights, str) else None
        LayerRecipe(self.weights, self.activations, group_size=family.group_size if family else None)

    @property
    def name(self) -> str:
        """A short name: ``W4A8``, ``W4``, ``nf4 A8``, ``FP32``."""
        if self.weights is None and self.activations is None:
            return "FP32"
        weights = f"W{32 if self.weights is None else self.weights}" if not isinstance(self.weights, str) else ""
        inputs = "" if self.activations is None else f"A{self.activations}"
        return weights + inputs if weights else f"{self.weights} {inputs}".rstrip()

    @property
    def kept(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.weights is None and self.activations is None

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of a weight and of an activation code; None where they stay in floating point."""
        return _bits(self.weights), _bits(self.activations)

    @classmethod
    def parse(cls, word: str) -> Candidate:
        """Reads ``4/8``, ``W4A8``, ``4`` (weights only), ``nf4/8`` or ``fp32``.

        Raises:
            DyBitError: The word has another form.
        """
        text = word.strip().lower()
        if text in ("fp32", "none"):
            return cls(None)
        short = _SHORT.fullmatch(text)
        parts = [part for part in short.groups() if part] if short else text.split("/")
        if not 1 <= len(parts) <= 2:
            raise DyBitError(f"candidate must be like 4/8, W4A8, 4, nf4/8 or fp32, not {word!r}")
        try:
            return cls(*(_format(part) for part in parts))
        except DyBitError as error:
            raise DyBitError(f"candidate {word!r}: {error}") from None


def as_candidates(given: Iterable[object]) -> tuple[Candidate, ...]:
    """Reads a list of candidates, pairs and words.

    Args:
        given: Each a :class:`Candidate`, a pair (weights, activations), a width of weights, or a word.

    Raises:
        DyBitError: ``given`` is empty, has duplicates, or has an item of another kind.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise DyBitError(f"candidates must be a list of candidates, not {given!r}")
    made: list[Candidate] = []
    for item in given:
        if isinstance(item, Candidate):
            one = item
        elif isinstance(item, str):
            one = Candidate.parse(item)
        elif isinstance(item, tuple | list) and len(item) == 2:
            one = Candidate(*item)
        elif isinstance(item, int):
            one = Candidate(item)
        else:
            raise DyBitError(f"a candidate must be a pair (weights, activations) or a word such as '4/8', not {item!r}")
        if one in made:
            raise DyBitError(f"candidates have {one.name} twice")
        made.append(one)
    if not made:
        raise DyBitError("candidates must not be empty")
    return tuple(made)


def mixed_recipe(base: Recipe, choices: Mapping[str, Candidate], embeddings: Collection[str] = ()) -> Recipe:
    """Returns a recipe that gives every layer its candidate.

    Args:
        base: All other fields. Its rules also keep their other fields.
        choices: The candidate of every layer that is quantized or explicitly kept.
        embeddings: Names of the embedding tables among these layers.
    """
    votes = Counter(c for name, c in choices.items() if name not in embeddings and not c.kept)
    default = votes.most_common(1)[0][0] if votes else Candidate(base.weights, base.activations)
    rules: dict[str, Mapping[str, Any] | None] = {}
    for name, candidate in choices.items():
        ruled, changes = _rule(base, name)
        if candidate.kept or (name in embeddings and candidate.weights is None):
            rules[name] = None
        elif name in embeddings:
            if ruled or candidate.weights != base.embeddings:
                rules[name] = {**changes, "weights": candidate.weights}
        elif ruled or candidate != default:
            rules[name] = {**changes, "weights": candidate.weights, "activations": candidate.activations}
    for pattern, old in base.rules:
        rules.setdefault(pattern, None if old is None else dict(old))
    return replace(
        base, weights=default.weights, activations=default.activations, rules=tuple((k, v) for k, v in rules.items())
    )


def _rule(base: Recipe, name: str) -> tuple[bool, dict[str, Any]]:
    """Returns whether a rule matches a layer, and its fields."""
    for pattern, changes in base.rules:
        if matches(pattern, name):
            return True, dict(changes or ())
    return False, {}


def _format(word: str) -> int | str | None:
    if word in ("fp32", "none", "32"):
        return None
    return int(word) if word.isdigit() else catalogue.family(word).name


def _bits(value: int | str | None) -> int | None:
    return catalogue.family(value).bits if isinstance(value, str) else value
