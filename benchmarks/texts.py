"""Texts of several kinds from Debian packages, for language models that were calibrated on another kind.

``apt-get install debian-handbook fortunes`` installs them. Elsewhere, unpack the packages with ``dpkg -x`` into a
folder and give it as ``--packages``.
"""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from dybit.errors import DyBitError

_BREAKS = {"p", "div", "li", "dt", "dd", "td", "th", "pre", "h1", "h2", "h3", "h4", "title"}
_SKIPPED = {"pre", "title", "style", "script"}


class _Paragraphs(HTMLParser):
    """The text of a page, with an empty line between paragraphs and without programs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in _SKIPPED
        self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in _SKIPPED and self._skipped > 0
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(" ".join(f"x{data}x".split())[1:-1])

    def _part(self, tag: str) -> None:
        if tag in _BREAKS:
            self.parts.append("\n\n")


def _pages(folder: Path) -> str:
    found = _Paragraphs()
    for file in sorted(folder.glob("*.html")):
        found.feed(file.read_text(encoding="utf-8"))
    return "".join(found.parts)


def handbook(packages: Path) -> str:
    """The Debian Administrator's Handbook: prose about running computers."""
    return _pages(packages / "usr/share/doc/debian-handbook/html/en-US")


def quotations(packages: Path) -> str:
    """The fortunes: jokes, quotations and verse, in the order of their files and without the offensive ones."""
    files = (file for file in sorted((packages / "usr/share/games/fortunes").glob("*")) if not file.suffix)
    return "\n\n".join(file.read_text(encoding="utf-8").replace("\n%\n", "\n\n") for file in files)


TEXTS: dict[str, Callable[[Path], str]] = {"handbook": handbook, "quotations": quotations}


def text_file(name: str, packages: Path, folder: Path) -> Path:
    """Writes a text to a file, as :func:`dybit.demo.prose` reads it.

    Args:
        name: One of :data:`TEXTS`.
        packages: The folder below which the packages are installed or unpacked.
        folder: Where the file goes.

    Raises:
        DyBitError: The package is not there.
    """
    text = TEXTS[name](packages)
    if not text.strip():
        raise DyBitError(f"packages={str(packages)!r} does not hold the text {name!r}; install its Debian package")
    file = folder / f"{name}.txt"
    file.write_text(text, encoding="utf-8")
    return file
