"""Runs as forks of one process that has imported what they need, which takes seconds.

`multiprocessing` keeps that process, its fork server. It computes nothing, so it has one thread,
and forks of it share what it imported until they write to it.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from clbench import signals
from clbench.evaluation.cost import allocator

PRELOADED = (
    "clbench.grid.fork_server",
    "clbench.cli",
    "clbench.cli.progress",
    "clbench.report.tables.summary",
    "clbench.run.course",
    "clbench.tracking.follow",
    "torch._dynamo",  # which the first optimizer imports
)
"""Modules that a run on a CPU imports. By name, for the command line stands above this folder."""


class Fork:
    """A process that makes one run; asked like a `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid: int = process.pid  # type: ignore[assignment]  # it is started

    @property
    def returncode(self) -> int | None:
        """Exit status; -n: ended by signal n; None: not known to have ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status; None: it runs."""
        self._process.join(0)
        return self.returncode

    def wait(self) -> int | None:
        """Its exit status, once it has ended."""
        self._process.join()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def are_ready(environment: Mapping[str, str]) -> bool:
    """Start the process that is forked; False: it cannot be, and each run is a program of its own.

    It begins to import at once, beside whatever this process does meanwhile.

    Args:
        environment: of all runs, beside this process's own.
    """
    if sys.platform != "linux":
        return False
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    try:
        with _set({**allocator.environment(os.environ), **environment}):
            forkserver.ensure_running()
    except OSError:  # its socket has no room where TMPDIR is long
        return False
    return True


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Fork:
    """Start `clbench run` with these words in a fork.

    Args:
        words: of the command line.
        log: its output goes to the end of this file.
        environment: beside the one that the process that is forked has.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(list(words), str(log), dict(environment)))
    process.start()
    return Fork(process)


def _run(words: list[str], log: str, environment: dict[str, str]) -> None:
    """What a fork does: `clbench run`."""
    os.setsid()  # Ctrl-C reaches the grid alone, which passes it on once
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_grid, daemon=True).start()
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.close(out)
    os.environ.update(environment)
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for strategies of the user's own
    sys.argv = ["clbench", "run", *words]
    try:
        runpy.run_module("clbench", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork ends without them


def _end_with_grid() -> None:
    """Have this process asked to stop when the grid that wanted it is killed."""
    grid = multiprocessing.parent_process()
    assert grid is not None  # noqa: S101  # it was started by one
    connection.wait([grid.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _set(more: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold while a process is started."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
