"""The command line, ``dybit``. Must not be imported by any other room, nor load torch before a command needs it."""

from dybit.cli.app import app, main

__all__ = ["app", "main"]
