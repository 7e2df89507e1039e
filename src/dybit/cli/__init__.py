"""The command line, ``dybit``."""

from dybit.cli.app import app, main

__all__ = ["app", "main"]
