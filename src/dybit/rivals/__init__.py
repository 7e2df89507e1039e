"""Every number format that dybit is compared with, behind the same Codebook and Family interface as DyBit itself.

Must not know torch, scales or tensors.
"""

from dybit.rivals.families import (
    adaptivfloat,
    ant,
    dybit,
    families,
    family,
    integer_asymmetric,
    mxfp4,
    mxfp6,
    mxfp8,
    names,
    nvfp4,
)
from dybit.rivals.lloyd import lloyd_max
from dybit.rivals.tables import (
    additive_power_of_two,
    flint,
    integer,
    integer_full,
    minifloat,
    normal_float,
    posit,
    power_of_two,
    unsigned_integer,
)

__all__ = [
    "adaptivfloat",
    "additive_power_of_two",
    "ant",
    "dybit",
    "families",
    "family",
    "flint",
    "integer",
    "integer_asymmetric",
    "integer_full",
    "lloyd_max",
    "minifloat",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "names",
    "normal_float",
    "nvfp4",
    "posit",
    "power_of_two",
    "unsigned_integer",
]
