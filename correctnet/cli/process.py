"""The process of a command: signals, the head process of the workflow, and how mistakes are reported."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import click

from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.pipeline.specs import STAGES


class Stopped(BaseException):
    """Raised on SIGTERM and SIGINT, so that temporary files are removed."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


def _stop(number: int, _frame: Any) -> None:
    for further in (signal.SIGTERM, signal.SIGINT):  # further signals must not interrupt the cleanup
        signal.signal(further, signal.SIG_IGN)
    raise Stopped(number)


def end_with(head: str | None) -> None:
    """End this process, as by SIGTERM, when the process `head` has ended.

    Stages of a workflow whose head process was killed end with it, so that none of them is still running when the
    workflow is started again.
    """
    head_folder = Path("/proc") / (head or "-")
    if not head_folder.exists():  # started by hand, or in a container that does not show the process
        return

    def watch() -> None:
        try:  # readable once the process has ended, also while it is a zombie
            select.select([os.pidfd_open(int(head))], [], [])
        except OSError:  # it has ended already, or the kernel is older than 5.3
            while head_folder.exists():
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _abandon_output() -> None:
    """Discard what stdout still buffers: Python would fail to write it again at exit, with another status."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Group(click.Group):
    """Commands in the order of the pipeline; a UserError prints one line per mistake and exits with status 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of the pipeline."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; letters such as σ that the terminal's encoding lacks are printed as escapes."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and report mistakes and signals."""
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        try:
            with warnings.catch_warnings():  # filters must not outlive the command
                warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
                try:
                    return super().invoke(ctx)
                except OSError as error:  # of a file that was not checked before
                    if error.errno == errno.ENOSPC and error.filename is None:
                        _abandon_output()
                        raise UserError(f"the output cannot be written: {error.strerror}") from error
                    if error.filename is None:
                        raise
                    raise storage.unreadable(os.fsdecode(error.filename), error) from error
        except UserError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(2)
        except Stopped as stopped:
            spec = STAGES.get(ctx.invoked_subcommand)  # type: ignore[call-overload]
            again = "; the same command goes on from what is done" if spec and spec.resumes else ""
            click.echo(f"stopped by {stopped.signal.name}{again}", err=True)
            ctx.exit(128 + stopped.signal)
