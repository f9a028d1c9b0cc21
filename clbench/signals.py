"""Signal handling: a run that is asked to stop ends after the update at hand, with all saved.

SIGTERM, SIGINT (Ctrl-C), and SIGUSR1 and SIGUSR2 (what SLURM sends ahead of the end with
`--signal=USR1@120`, and what submitit has it send) let the work at hand be finished and saved; a
second SIGINT stops at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from clbench.errors import ClbenchError

STATUS = 75
"""Exit status of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_asked: list[str] = []  # signals are the process's, and so is the answer


class Stopped(ClbenchError):  # noqa: N818  # reads as what it is
    """Work that was asked to stop, and did, with everything saved."""


def asked() -> str | None:
    """The first signal since `listening` began, or None."""
    return _asked[0] if _asked else None


def check(where: object = None) -> None:
    """Stop here if that was asked for.

    Args:
        where: what was done last; all of it must be saved.

    Raises:
        Stopped: it was.
    """
    if _asked:
        raise Stopped(
            f"stopped on {_asked[0]}; what was done is saved",
            where=where,
            next_step="run the same command again (`clbench run`: without --fresh); it goes on "
            "there",
        )


def ask(name: str) -> None:
    """Ask this process to stop, as a signal of that name does."""
    _asked.append(name)


@contextmanager
def listening() -> Iterator[None]:
    """In this block the signals ask; outside they do what they did before.

    Only the main thread can listen; in another one the block changes nothing, and neither does a
    block within another: what was asked before it stays asked.
    """
    if signal.getsignal(SIGNALS[0]) is _hear:
        yield
        return
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            signal.signal(number, _hear)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _hear(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and "SIGINT" in _asked:
        raise KeyboardInterrupt
    name = signal.Signals(number).name
    once_more = ", once more: at once" if number == signal.SIGINT else ""
    with contextlib.suppress(OSError):  # unbuffered: print may not be entered twice
        os.write(2, f"\n{name}: stopping after this update{once_more}\n".encode())
    ask(name)


def leave_to_parent(worker: int) -> None:
    """In a process of a run: a signal to the whole group is the main process's to answer.

    A worker that died of it would take the work at hand with it. It ends with its parent.

    Args:
        worker: its number, as a loader tells it; not looked at.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
