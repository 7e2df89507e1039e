"""Running the same on every instruction set, and without the compiled kernels."""

import numpy as np
import pytest

from dybit.formats import catalogue
from dybit.formats.codebook import Table
from dybit.formats.format import variants
from dybit.kernels import extension

ISAS = extension.available()[1:]
BOOKS = {
    book.name: book
    for bits in range(2, 9)
    for signed in (True, False)
    for book in (*variants(bits, signed), *(b for f in catalogue.families(bits, signed) for b in f.books))
}
BOOKS |= {"wide": Table("wide", [0.0, 2.0**-120, 1.0, 2.0**100]), "inexact": Table("inexact", [-0.7, 0.1, 0.3, np.pi])}


def by_torch(call):
    """What a function returns without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", lambda: None)
        return call()


def hostile(book):
    """Random numbers, every level and midpoint with their neighbours, the extremes of float32."""
    generator = np.random.default_rng(0)
    top = float(np.abs(book.levels).max())
    random = (generator.standard_normal(500) * top / 2).astype(np.float32)
    points = np.concatenate((book.levels, book.midpoints)).astype(np.float32)
    info = np.finfo(np.float32)
    ends = np.array([0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.tiny, -info.tiny], np.float32)
    far = np.array([info.max, -info.max, np.inf, -np.inf, top * 1.5, -top * 1.5], np.float32)
    below, above = np.nextafter(points, np.float32(-np.inf)), np.nextafter(points, np.float32(np.inf))
    return np.concatenate((random, points, below, above, ends, -ends, far))
