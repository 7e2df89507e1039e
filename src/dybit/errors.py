"""Errors that dybit raises for bad input, and its warning. Must not know any other module of dybit."""


class DyBitError(ValueError):
    """Bad input: one sentence that names the argument and quotes its value."""


class CheckpointError(DyBitError):
    """A checkpoint that is truncated, foreign, of another version, or made for another architecture."""


class MissingExtraError(DyBitError, ImportError):
    """An optional dependency that is not installed; the message says what to install."""


class DyBitWarning(UserWarning):
    """Something was left as it was, and the result is still correct."""
