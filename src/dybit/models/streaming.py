"""Quantizes weights from safetensors files to a checkpoint piece by piece, whatever their size.

All sizes follow from the plan, so the header of the result is written first. Several threads then write pieces of rows
to their places in the file, in any order. A journal records finished pieces: after an interruption, the same call
continues.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dybit.errors import CheckpointError, DyBitError
from dybit.formats.scaling import Method
from dybit.models.checkpoint import TENSORS
from dybit.models.coverage import Coverage
from dybit.models.manifest import MANIFEST, manifest_text
from dybit.models.running import Progress
from dybit.models.tensor_files import NAMES, TYPES, Stored, read_bytes
from dybit.recipe import Recipe
from dybit.safe_files import (
    check_regular,
    check_replaceable,
    crc32,
    label,
    locked,
    partial_directory,
    put_in_place,
    unwritable,
)
from dybit.tensors.encoding import quantize_judged
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_PIECE = 1 << 20  # elements; a multiple of 8 rows, so that packed choices begin at a byte
_SYNC = 64  # pieces between two entries in the journal
Text = Callable[[Mapping[str, str]], str]


@dataclass(frozen=True)
class Job:
    """How a tensor is quantized: the fields of ``quantize``, and where the result goes.

    Attributes:
        row: The tensor's first row in the weight that ``spec`` describes; 0 unless the tensor is a part of it.
    """

    spec: TensorSpec
    method: Method = "mse"
    percentile: float = 99.99
    row: int = 0


@dataclass
class Outcome:
    """Figures of a quantized tensor.

    Attributes:
        signal: Sum of squares.
        noise: Sum of squared errors.
        votes: How often each codebook was chosen.
        whole: Whether this call quantized, and counted, all pieces.
    """

    signal: float = 0.0
    noise: float = 0.0
    votes: dict[int, int] = field(default_factory=dict)
    whole: bool = True


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor to quantize, or bytes of one to copy."""

    key: str
    start: int
    stop: int


def quantize_files(
    source: Mapping[str, Stored],
    jobs: Mapping[str, Job],
    path: str | os.PathLike[str],
    layers: Mapping[str, Mapping[str, Any]],
    *,
    names: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    recipe: Recipe | None = None,
    coverage: Coverage | None = None,
    extra: Mapping[str, Text | Path] | None = None,
    workers: int = 0,
    measure: bool = True,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Quantizes some tensors and copies the others into a checkpoint, which appears complete or not at all.

    Peak memory is tens of megabytes per worker. For transposed weights, and for weights with one scale or codebook, it
    is a small multiple of the weight.

    Args:
        source: From :func:`read_source`.
        jobs: By key; each key is in ``source``.
        path: The directory. Replaces an existing checkpoint in it; other files stay.
        layers: The entries of the manifest (see :func:`dybit.models.checkpoint.write`).
        names: The new names of tensors, by key. Parts of one weight have the same name.
        shared: Keys of tied tensors.
        recipe: The recipe, to be stored.
        coverage: How much of the model is quantized, to be stored.
        extra: Further files by name: the file to copy, or what makes their text of checksums: by the new names of
            tensors, of a weight the CRC-32 of its codes, scales and choices, of another what
            :func:`dybit.safe_files.label` says.
        workers: Threads; 0 for one per processor.
        measure: Whether to measure errors and count codebooks.
        progress: Called with (done, total, key) in elements, after every piece.

    Returns:
        The figures of the weights in ``jobs``, by their new names.

    Raises:
        DyBitError: A tensor holds NaN or infinity, is a part of a weight with a scale or codebook for the whole, or
            ``path`` is something else, cannot be written, or is being written by another process.
        CheckpointError: A file became shorter, or the parts of a weight are not the whole.
    """
    try:
        run = _Run(source, jobs, names or {}, check_replaceable(path, MANIFEST), measure)
        run.folder.mkdir(parents=True, exist_ok=True)
        with locked(run.folder, wait=False):
            try:
                run.pieces_done(workers or os.cpu_count() or 1, progress)
                run.finish(layers, shared or {}, recipe, coverage, extra or {})
            except DyBitError:
                shutil.rmtree(run.folder, ignore_errors=True)  # nothing to resume
                raise
    except OSError as error:
        raise unwritable(path, error) from None
    return run.outcomes


class _Run:
    """One call of :func:`quantize_files`."""

    def __init__(
        self, source: Mapping[str, Stored], jobs: Mapping[str, Job], names: Mapping[str, str], path: Path, measure: bool
    ) -> None:
        self.source, self.jobs, self.path, self.measure = source, jobs, path, measure
        self.names = {key: names.get(key, key) for key in source}
        self.folder = partial_directory(path)
        self.outcomes = {self.names[key]: Outcome() for key in jobs}
        self.header, self.places = _layout(source, jobs, self.names)
        _check_parts(source, jobs, self.names)
        self.pieces = list(_pieces(source, jobs))
        digest = hashlib.sha256(self.header)
        for stored in {stored.file: stored for stored in source.values()}:
            status = stored.stat()
            digest.update(f"{stored.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for key, job in sorted(jobs.items()):
            fields = (key, job.spec.key, job.method, job.percentile, self.names[key], job.row)
            digest.update(f"{' '.join(map(str, fields))}\n".encode())
        self.plan = digest.hexdigest()

    def pieces_done(self, workers: int, progress: Progress | None) -> None:
        """Writes the pieces that are not written yet."""
        done = self._open()
        total = sum(self._weight(piece) for piece in self.pieces)
        count = sum(self._weight(self.pieces[i]) for i in done)
        for i in done:
            if self.pieces[i].key in self.jobs:
                self.outcomes[self.names[self.pieces[i].key]].whole = False
        threads = torch.get_num_threads()
        files = {file: os.open(file, os.O_RDONLY) for file in {s.file for s in self.source.values()}}
        target = os.open(self.folder / TENSORS, os.O_RDWR)
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            waiting = iter([i for i in range(len(self.pieces)) if i not in done])
            running: dict[Future[Outcome | None], int] = {}
            finished: list[int] = []
            while True:
                for i in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(self._write, self.pieces[i], files, target)] = i
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    self._add(self.pieces[i].key, future.result())
                    finished.append(i)
                    count += self._weight(self.pieces[i])
                    if progress:
                        progress(count, total, self.pieces[i].key)
                if len(finished) >= _SYNC:
                    self._note(finished, target)
            self._note(finished, target)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for descriptor in (*files.values(), target):
                os.close(descriptor)
            torch.set_num_threads(threads)

    def finish(
        self,
        layers: Mapping[str, Any],
        shared: Mapping[str, str],
        recipe: Recipe | None,
        coverage: Coverage | None,
        extra: Mapping[str, Text | Path],
    ) -> None:
        """Adds the manifest and moves the directory to its final path."""
        file = self.folder / TENSORS
        text = manifest_text(file, layers, folded=[], shared=shared, recipe=recipe, coverage=coverage)
        (self.folder / MANIFEST).write_text(text)
        for name, content in extra.items():
            if isinstance(content, Path):
                shutil.copyfile(content, self.folder / name)
            else:
                (self.folder / name).write_text(content(self._checksums()))
        (self.folder / "journal").unlink()
        put_in_place(self.folder, self.path)
        shutil.rmtree(self.folder, ignore_errors=True)  # where there was a directory

    def _checksums(self) -> dict[str, str]:
        """Computes checksums by reading the file: pieces were written in any order, some by an interrupted call."""
        found: dict[str, str] = {}
        with (self.folder / TENSORS).open("rb") as file:

            def parts(*names: str) -> Iterator[bytes]:
                for place, nbytes in (self.places[name] for name in names):
                    file.seek(place)
                    for start in range(0, nbytes, _PIECE):
                        yield file.read(min(_PIECE, nbytes - start))

            for key, stored in self.source.items():
                name = self.names[key]
                if name in found:
                    continue  # of several parts
                if key in self.jobs:
                    found[name] = crc32(parts(*(name + suffix for suffix in self.jobs[key].spec.buffers())))
                elif stored.dtype in TYPES:
                    found[name] = label(TYPES[stored.dtype], stored.shape, parts(name))
        return found

    def _weight(self, piece: _Piece) -> int:
        stored = self.source[piece.key]
        rows = _rows(stored, self.jobs[piece.key]) if piece.key in self.jobs else max(1, stored.nbytes)
        return (piece.stop - piece.start) * math.prod(stored.shape) // rows

    def _open(self) -> set[int]:
        """Prepares the directory, or resumes that of an interrupted call."""
        file, journal = self.folder / TENSORS, self.folder / "journal"
        size = len(self.header) + sum(nbytes for _, nbytes in self.places.values())
        try:
            lines = check_regular(journal).read_text().splitlines()
            if lines[0] == self.plan and file.stat().st_size == size:
                return {int(line) for line in lines[1:] if line.isdigit() and int(line) < len(self.pieces)}
        except (OSError, IndexError, ValueError):
            pass
        for left in self.folder.iterdir():  # keeps the directory itself, which is locked
            left.unlink()
        with file.open("wb") as stream:
            stream.write(self.header)
            stream.truncate(size)
        journal.write_text(self.plan + "\n")
        return set()

    def _note(self, finished: list[int], target: int) -> None:
        """Records finished pieces in the journal after they are on disk."""
        os.fsync(target)
        with (self.folder / "journal").open("a") as stream:
            stream.write("".join(f"{i}\n" for i in finished))
        finished.clear()

    def _add(self, key: str, part: Outcome | None) -> None:
        if part is not None:
            outcome = self.outcomes[self.names[key]]
            outcome.signal, outcome.noise = outcome.signal + part.signal, outcome.noise + part.noise
            outcome.votes = {k: outcome.votes.get(k, 0) + part.votes.get(k, 0) for k in {**outcome.votes, **part.votes}}

    def _write(self, piece: _Piece, files: Mapping[Path, int], target: int) -> Outcome | None:
        stored = self.source[piece.key]
        job = self.jobs.get(piece.key)
        if job is None:
            data = read_bytes(files[stored.file], stored, piece.start, piece.stop - piece.start)
            _put(target, data, self.places[self.names[piece.key]][0] + piece.start)
            return None
        spec, count = job.spec, piece.stop - piece.start
        whole = count == spec.rows
        row = 0 if whole else stored.nbytes // _rows(stored, job)
        data = read_bytes(files[stored.file], stored, piece.start * row, count * row or stored.nbytes)
        part = spec if whole else _part(spec, count)
        weight = torch.frombuffer(data, dtype=TYPES[stored.dtype]).view(part.shape)
        try:
            codes, error = quantize_judged(weight, part, method=job.method, percentile=job.percentile)
        except DyBitError as failure:
            raise DyBitError(f"{stored.file}, tensor {piece.key!r}: {failure}") from None
        for suffix, buffer in codes.buffers().items():
            place, nbytes = self.places[self.names[piece.key] + suffix]
            _put(target, buffer, place + (0 if whole else _skip(suffix, spec, nbytes, job.row + piece.start)))
        return _judge(weight, codes, error) if self.measure else None


def _judge(weight: Tensor, codes: QuantizedTensor, error: float) -> Outcome:
    choices, outcome = codes.choices(), Outcome(noise=error)
    if choices is not None:
        outcome.votes = {i: n for i, n in enumerate(torch.bincount(choices.flatten().long()).tolist()) if n}
    outcome.signal = float(torch.linalg.vector_norm(weight.float())) ** 2
    return outcome


def _skip(suffix: str, spec: TensorSpec, nbytes: int, rows: int) -> int:
    """Returns the byte of a buffer at which a row begins."""
    if suffix == "_choice" and spec.unit_shape(spec.choice)[1] == 1:
        return rows * spec.choice_bits // 8  # packed across rows
    return nbytes // spec.rows * rows


def _rows(stored: Stored, job: Job) -> int:
    """Reads rows of a tensor to be quantized."""
    return math.prod(stored.shape) // job.spec.columns


def _part(spec: TensorSpec, rows: int) -> TensorSpec:
    """Returns the spec of some rows as a weight of their own."""
    if spec.transposed:  # experts: whole matrices
        return replace(spec, shape=(rows // spec.shape[2], *spec.shape[1:]))
    return replace(spec, shape=(rows, *spec.shape[spec.row_dims :]), row_dims=1)


def _in_one(spec: TensorSpec) -> bool:
    """Whether a weight must be quantized as a whole."""
    return (
        "tensor" in (spec.granularity, spec.choice)
        or spec.scale == "e4m3"
        or bool(spec.transposed and spec.row_dims == 1)
    )


def _check_parts(source: Mapping[str, Stored], jobs: Mapping[str, Job], names: Mapping[str, str]) -> None:
    """Checks that weights stored in parts are complete, and can be quantized part by part."""
    parts: dict[str, list[str]] = {}
    for key in jobs:
        parts.setdefault(names[key], []).append(key)
    for name, keys in parts.items():
        spec = jobs[keys[0]].spec
        spans = sorted((jobs[key].row, jobs[key].row + _rows(source[key], jobs[key])) for key in keys)
        ends = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != spec.rows:
            raise CheckpointError(f"{source[keys[0]].file}: the parts of {name!r} are not {spec.rows} rows")
        unaligned = spec.choice_bits and spec.unit_shape(spec.choice)[1] == 1 and any(n % 8 for n, _ in spans)
        if len(keys) > 1 and (_in_one(spec) or unaligned):
            raise DyBitError(
                f"{source[keys[0]].file}: {name!r} is stored in {len(keys)} parts, which cannot have "
                f"granularity={spec.granularity!r}, scale={spec.scale!r} and choice={spec.choice!r} in common; "
                "use a group_size"
            )


def _layout(
    source: Mapping[str, Stored], jobs: Mapping[str, Job], names: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the header of the result, and (first byte, size) of its tensors. Wide types come first for alignment."""
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for key, stored in source.items():
        name = names[key]
        if key not in jobs:
            tensors[name] = (stored.dtype, stored.shape, stored.nbytes)
            continue
        for suffix, (shape, dtype) in jobs[key].spec.buffers().items():
            if key + suffix in source and suffix:
                raise CheckpointError(f"{stored.file} has a tensor {key + suffix!r} already: is it quantized?")
            tensors[name + suffix] = (NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)
    order = sorted(tensors, key=lambda key: (-tensors[key][2] // max(1, math.prod(tensors[key][1])), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, offset = {}, 0
    for key in order:
        name, shape, nbytes = tensors[key]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        places[key] = offset, nbytes
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: (start + at, size) for key, (at, size) in places.items()}


def _pieces(source: Mapping[str, Stored], jobs: Mapping[str, Job]) -> Iterator[_Piece]:
    for key, stored in sorted(source.items(), key=lambda item: (item[1].file, item[1].offset)):
        if key not in jobs:
            yield from _cut(key, stored.nbytes, 4 * _PIECE)
            continue
        spec = jobs[key].spec
        if _in_one(spec):
            yield _Piece(key, 0, spec.rows)
        else:
            least = math.lcm(8, spec.shape[2]) if spec.transposed else 8
            yield from _cut(key, _rows(stored, jobs[key]), max(1, _PIECE // spec.columns // least) * least)


def _cut(key: str, count: int, step: int) -> Iterator[_Piece]:
    for start in range(0, count, step):
        yield _Piece(key, start, min(count, start + step))


def _put(descriptor: int, data: bytearray | Tensor, offset: int) -> None:
    if isinstance(data, Tensor):
        view = memoryview(data.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
    else:
        view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
