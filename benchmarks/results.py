"""Records of benchmarks: for each a JSON file and a page of Markdown, with all it takes to repeat the measurement.

Every benchmark writes ``results/NAME.json`` and ``results/NAME.md`` after each row. A benchmark that is started again
with the same command, on the same machine and with the same code and versions, keeps the rows that are there. Pages are
made from the JSON files alone: ``python benchmarks/results.py`` makes all of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dybit import Recipe
from dybit.errors import DyBitError
from dybit.measure.timing import Timing, machine

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
_CODE = ("src", "csrc", "benchmarks/*.py", "CMakeLists.txt", "pyproject.toml")
_DIGITS = 6  # significant ones that are stored
_SAME = ("command", "commit", "processor", "cores", "kernels", "versions", "recipes")  # in the header: rows are kept


@dataclass(frozen=True)
class Column:
    """A column of a page.

    A number gets the digits and the unit. A list of two numbers is shown as value ± error, of three as the median
    with the quartiles around it.

    Attributes:
        key: Its name in the rows.
        title: Its heading.
        digits: Digits behind the point.
        unit: What follows a number, such as ``×`` or `` %``.
    """

    key: str
    title: str
    digits: int = 2
    unit: str = ""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with the options that all benchmarks have.

    Args:
        doc: The docstring of the script.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=FOLDER, metavar="DIR", help="folder of the results")
    made.add_argument("--again", action="store_true", help="measure all rows again, those that are stored too")
    return made


class Results:
    """The rows of one benchmark, stored as they come. Use it as a context manager around the measurement.

    Args:
        script: ``__file__`` of the benchmark, which names the results.
        doc: Its docstring: a title and, after an empty line, what was measured and how.
        columns: The columns of the page.
        options: The options that :func:`parser` read.
        recipes: How models are quantized, by name.

    Attributes:
        rows: The rows, oldest first.
    """

    def __init__(
        self,
        script: str,
        doc: str | None,
        columns: Sequence[Column],
        options: argparse.Namespace,
        recipes: Mapping[str, Recipe] | None = None,
    ) -> None:
        name = Path(script).stem
        self._file = Path(options.results) / f"{name}.json"
        title, _, about = (doc or name).strip().partition("\n\n")
        self._header: dict[str, Any] = {
            "benchmark": name,
            "title": " ".join(title.split()).rstrip("."),
            "about": about.strip(),
            "command": command(script, sys.argv[1:]),
            "commit": commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            **_machine(),
            "recipes": {key: recipe.to_dict() for key, recipe in (recipes or {}).items()},
            "columns": [asdict(column) for column in columns],
        }
        self._facts: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        kept = None if options.again else _stored(self._file)
        if kept and kept["commit"].isalnum() and all(kept[key] == self._header[key] for key in _SAME):
            self._header["date"], self._facts, self.rows = kept["date"], kept["facts"], kept["rows"]
        self._complete = False

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        """Stores a row and prints it."""
        self.rows.append(_rounded(row))
        self._write()
        self._print(self.rows[-1:])

    def fact(self, name: str, value: str) -> None:
        """Stores something that is true of all rows, such as the bandwidth of the memory."""
        self._facts[name] = value
        print(f"{name}: {value}", flush=True)

    def __enter__(self) -> Results:
        """Prints the head of the table and the rows that are there."""
        columns = self._header["columns"]
        print(f"{machine()}\n\n{_line(column['title'] for column in columns)}\n{_line('---' for _ in columns)}")
        self._print(self.rows)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Marks the results as complete, unless an error ended the measurement."""
        if kind is None:
            self._complete = True
            self._write()
            print(f"\n{self._file} and {self._file.with_suffix('.md').name}")

    def _print(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            print(_line(cells(row, self._header["columns"])), flush=True)

    def _write(self) -> None:
        data = {**self._header, "facts": self._facts, "complete": self._complete, "rows": self.rows}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        _replace(self._file.with_suffix(".md"), page(data))


def compared(times: Mapping[str, Timing]) -> dict[str, Any]:
    """The cells of contestants that :func:`dybit.measure.timing.compare` timed.

    Args:
        times: By name, the one that the others are compared with first.

    Returns:
        For every name its median in milliseconds as ``NAME_ms``, and for all but the first the quartiles of how many
        times as fast it is as ``NAME_ratio``.
    """
    row: dict[str, Any] = {f"{name}_ms": time.median * 1e3 for name, time in times.items()}
    ratios = {f"{name}_ratio": [time.ratio_low, time.ratio, time.ratio_high] for name, time in times.items()}
    return row | dict(list(ratios.items())[1:])


def page(data: Mapping[str, Any]) -> str:
    """The page of a benchmark in Markdown.

    Args:
        data: What its JSON file holds.
    """
    facts = {
        "Command": f"`{data['command']}`",
        **{f"Recipe {name}": f"`{json.dumps(recipe)}`" for name, recipe in data["recipes"].items()},
        "Processor": f"{data['processor']}, {data['cores']} cores",
        "Kernels": data["kernels"],
        "Threads": f"{data['threads']}, unless a row says otherwise",
        "Versions": ", ".join(f"{name} {number}" for name, number in data["versions"].items()),
        "Code": f"commit {data['commit']}",
        "Date": data["date"],
        **data["facts"],
    }
    lines = ["<!-- Made by benchmarks/results.py. Do not edit. -->", "", f"# {data['title']}", ""]
    lines += [data["about"], ""] if data["about"] else []
    lines += [] if data["complete"] else ["**Not complete: the measurement was interrupted.**", ""]
    lines += [_line(("", "")), _line(("---", "---")), *(_line(pair) for pair in facts.items()), ""]
    columns = [c for c in data["columns"] if any(row.get(c["key"]) is not None for row in data["rows"])]
    lines += [_line(column["title"] for column in columns), _line("---" for _ in columns)]
    lines += [_line(cells(row, columns)) for row in data["rows"]]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any], columns: Iterable[Mapping[str, Any]]) -> list[str]:
    """The cells of a row in words, in the order of the columns."""
    return [_cell(row.get(column["key"]), column["digits"], column["unit"]) for column in columns]


def _cell(value: Any, digits: int, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}{unit}"
    if isinstance(value, list):
        low, middle, high = (f"{number:.{digits}f}" for number in value)
        return f"{middle}{unit} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.{digits}f}{unit}"
    return f"{value}{unit}".replace("|", "\\|")


def _line(words: Iterable[str]) -> str:
    return f"| {' | '.join(words)} |"


def command(script: str, arguments: Sequence[str]) -> str:
    """What to type to repeat a benchmark, from the root of the repository."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])


def commit() -> str:
    """The commit of the code, followed by ``, changed`` where the code differs from it; ``unknown`` outside of git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}, changed" if _git("status", "--porcelain", "--", *_CODE) else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown, no repository"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> dict[str, Any]:
    here = machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"dybit": version("dybit"), "torch": here.torch, "Python": platform.python_version()}
    facts = {"processor": here.cpu, "cores": cores, "kernels": here.isa, "threads": here.threads}
    return {**facts, "versions": versions}


def _stored(file: Path) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise DyBitError(f"{file} holds no results: {error}; remove it") from None
    return data


def _rounded(value: Any) -> Any:
    """A value with its numbers at the precision that is stored."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def _replace(file: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    part = file.with_suffix(f"{file.suffix}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def main() -> None:
    """Makes all pages again from the JSON files."""
    for file in sorted(FOLDER.glob("*.json")):
        _replace(file.with_suffix(".md"), page(json.loads(file.read_text(encoding="utf-8"))))
        print(file.with_suffix(".md"))


if __name__ == "__main__":
    main()
