"""English prose that every CPython carries with it, and its disjoint halves."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dybit.errors import DyBitError
from dybit.safe_files import check_regular

_T = TypeVar("_T")

# About a third of English running text consists of these; code, grammars and tables have few of them.
_COMMON = """
a an and are as at be but by can for from has have he her his i if in is it its may not of on or she that the
they this to was we were when which will with you
"""
_FUNCTION_WORDS = frozenset(_COMMON.split())
_MARKER = re.compile(r"^(?:[*•-]|\d+\.|\[\d+\])\s+")  # bullet, number or footnote
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_ENDINGS = tuple(".:;?!)\"'\u201d\u2019")


def prose(source: str | Path | None = None) -> list[str]:
    """English paragraphs, cleaned.

    White space is normalised and list markers are stripped. Repeated paragraphs and everything that does not
    read as English (code, grammars, tables, headings) are dropped.

    Args:
        source: A UTF-8 text file with blank lines between paragraphs; by default the language reference in
            ``pydoc_data.topics``, whose text differs a little between Python versions.

    Returns:
        Different paragraphs of at least 15 words, in the order of the source.

    Raises:
        DyBitError: If ``source`` cannot be read, or it holds no prose.

    Example:
        >>> len(prose()) > 500
        True
    """
    paragraphs: dict[str, None] = {}  # an ordered set
    for block in re.split(r"\n\s*\n", _read(source)):
        paragraph = _MARKER.sub("", " ".join(block.split()))
        if _is_english(paragraph):
            paragraphs[paragraph] = None
    if not paragraphs:
        raise DyBitError(f"source={str(source)!r} holds no paragraph of English prose.")
    return list(paragraphs)


def half(items: Sequence[_T], split: str = "calibration") -> list[_T]:
    """The part of a sequence that belongs to a split: its first or its second half.

    Args:
        items: Anything in a fixed order.
        split: ``"calibration"`` (first half) or ``"evaluation"`` (second half).

    Returns:
        That half; the two halves are disjoint and together make ``items``.

    Raises:
        DyBitError: If ``split`` is neither of the two.

    Example:
        >>> half("abcde", "calibration"), half("abcde", "evaluation")
        (['a', 'b'], ['c', 'd', 'e'])
    """
    middle = len(items) // 2
    return list(items[middle:] if is_evaluation(split) else items[:middle])


def is_evaluation(split: str) -> bool:
    """Whether a split is the evaluation split.

    Args:
        split: ``"calibration"`` or ``"evaluation"``.

    Returns:
        True for the evaluation split.

    Raises:
        DyBitError: If ``split`` is neither of the two.
    """
    if split not in ("calibration", "evaluation"):
        raise DyBitError(f"split={split!r} is neither 'calibration' nor 'evaluation'.")
    return split == "evaluation"


def spread(available: int, batches: int, batch_size: int, what: str) -> list[list[int]]:
    """Choose samples evenly, so that few of them still cover the whole text.

    Args:
        available: Number of samples.
        batches: Number of batches to choose.
        batch_size: Samples per batch.
        what: What the samples are, for the error message.

    Returns:
        For each batch, the positions of its samples: all different, ascending, in ``range(available)``.

    Raises:
        DyBitError: If ``batches`` or ``batch_size`` is below one, or too few samples are available.

    Example:
        >>> spread(9, batches=2, batch_size=2, what="letters")
        [[0, 2], [4, 6]]
    """
    for argument, value in (("batches", batches), ("batch_size", batch_size)):
        if value < 1:
            raise DyBitError(f"{argument}={value!r} is below one.")
    count = batches * batch_size
    if count > available:
        need = f"batches={batches!r} of batch_size={batch_size!r} need {count} {what}"
        raise DyBitError(f"{need}, but the split has {available}.")
    positions = [sample * available // count for sample in range(count)]
    return [positions[start : start + batch_size] for start in range(0, count, batch_size)]


def _read(source: str | Path | None) -> str:
    if source is not None:
        try:
            return check_regular(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DyBitError(f"source={str(source)!r} is not a readable UTF-8 text file: {error}.") from error
    try:
        # Some distributions pack it apart from the interpreter.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DyBitError("source=None needs pydoc_data, which this Python lacks.") from error
    return "\n\n".join(topics.values())


def _is_english(paragraph: str) -> bool:
    words = _WORD.findall(paragraph.lower())
    if len(words) < 15 or not paragraph.endswith(_ENDINGS) or "::=" in paragraph or ">>>" in paragraph:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    common = sum(word in _FUNCTION_WORDS for word in words)
    return letters >= 0.8 * len(paragraph) and common >= 0.2 * len(words)
