"""The command ``qpeft``, one file for each sub-command."""

from .app import main

__all__ = ["main"]
