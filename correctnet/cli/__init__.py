"""The command line."""

from correctnet.cli.commands import main

__all__ = ["main"]
