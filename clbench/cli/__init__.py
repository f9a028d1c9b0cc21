"""The command line: parse, call, print. Nothing else.

Heavy imports happen inside the commands, so that `clbench list` and the printed tables
start without torch. `clbench --help` lists the commands in the order of the imports below.
"""

from __future__ import annotations

import io
import sys

import typer

from clbench.cli.options import app, parse_seeds, parse_splits
from clbench.errors import ClbenchError
from clbench.signals import STATUS, Stopped

# commands register in this order
# isort: off
from clbench.cli import checks, grid  # noqa: F401
from clbench.cli.studies import tune  # noqa: F401
from clbench.cli import reports, runs, tables, trained, publish, explain  # noqa: F401
# isort: on

__all__ = ["app", "main", "parse_seeds", "parse_splits"]


def main() -> None:
    """Entry point: a `ClbenchError` is printed without traceback and ends with status 1.

    A run that was stopped by a signal and can go on ends with `clbench.signals.STATUS`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file may be in an encoding without our lines
            stream.reconfigure(errors="replace")
    try:
        app()
    except Stopped as err:
        typer.echo(f"clbench: {err}", err=True)
        sys.exit(STATUS)
    except ClbenchError as err:
        typer.echo(f"clbench: {err}", err=True)
        sys.exit(1)
