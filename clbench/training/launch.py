"""Starting the processes of one run, and which of them this one is; without torch.

Each process is this command again, with its place in the environment. They end together: when one
fails, the others are stopped, and what they have not saved is done again by the next attempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from clbench.errors import TrainingError
from clbench.signals import SIGNALS, STATUS

RENDEZVOUS = "CLBENCH_RENDEZVOUS"
"""Environment of a process started here: URL of the file by which they meet."""
GRACE_S = 60
"""How long the others may take to end once one has failed; then they are killed."""
ASKED = (STATUS, *(-number for number in SIGNALS))
"""How a process ends that was asked to: by the signal itself before it listens."""
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when the one that started it has died."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of several processes this is, by its environment."""

    rank: int
    """Number of the process, from 0."""
    local: int
    """The same among those of this machine: the number of its GPU."""
    size: int
    """Processes."""
    url: str
    """Where they meet; see `torch.distributed.init_process_group`."""


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Which process of several this is; None: it was started neither by torchrun nor here."""
    if RENDEZVOUS not in environment and "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return Place(
        rank=int(environment["RANK"]),
        local=int(environment["LOCAL_RANK"]),
        size=int(environment["WORLD_SIZE"]),
        url=environment.get(RENDEZVOUS, "env://"),
    )


def launch(words: Sequence[str], count: int) -> int:
    """Start the processes of a run, and wait until all have ended.

    Signals that ask a run to stop are passed on to all of them. What the first one prints is seen;
    of another one the last lines, where it failed.

    Args:
        words: of the command line, without the program.
        count: processes.

    Returns:
        Exit status: 0, `clbench.signals.STATUS` where the run was stopped and can go on.

    Raises:
        TrainingError: a process was killed, or another one than the first failed.
    """
    command = [sys.executable, "-m", "clbench", *words]
    with tempfile.TemporaryDirectory(prefix="clbench_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        said = [stack.enter_context((folder / f"{r}.err").open("wb")) for r in range(count)]
        # those that this process may use, as `clbench.reproducibility.cores` says with torch
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        threads = str(max(1, cores // count))
        children = [
            subprocess.Popen(  # noqa: S603  # this very command
                command,
                env={
                    "OMP_NUM_THREADS": threads,
                    **os.environ,
                    RENDEZVOUS: (folder / "meeting").as_uri(),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                },
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else said[rank],
                start_new_session=True,  # Ctrl-C is passed on once, and not twice
                preexec_fn=_end_with_parent,  # one thread
            )
            for rank in range(count)
        ]
        first_failed = _wait(children)
        if first_failed is None:
            stopped = any(child.returncode in ASKED for child in children)
            return STATUS if stopped else 0
        status = children[first_failed].returncode
        if first_failed == 0 and status > 0:  # it has said why
            return status
        lines = (folder / f"{first_failed}.err").read_text(errors="replace").splitlines()
        raise TrainingError(
            "a process of this run failed, and the others were stopped",
            where=f"rank {first_failed} of {count}",
            got=f"killed by {signal.Signals(-status).name}"
            if status < 0
            else "\n".join([f"exit status {status}; its last lines:", *lines[-12:]]),
            next_step="mend that, or where nothing is to be mended run the same command again: it "
            "goes on at the last saved place",
        )


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the rank of the first one that failed, or None."""

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        for child in children:
            if child.returncode is None:
                os.kill(child.pid, number)  # `send_signal` would reap it

    def kill(number: int, frame: FrameType | None) -> None:
        pass_on(signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, kill)
    failed: int | None = None
    ranks = {child.pid: rank for rank, child in enumerate(children)}
    try:
        while ranks:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            if ended is None or ended.si_pid not in ranks:
                break  # a child of somebody else: wait for ours in order
            rank = ranks.pop(ended.si_pid)
            status = children[rank].wait()
            if status not in (0, *ASKED) and failed is None:
                failed = rank
                signal.alarm(GRACE_S)
            if status != 0:
                pass_on(signal.SIGTERM)
        for child in children:
            child.wait()
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def _end_with_parent() -> None:
    """In a process just started: be asked to stop when this one dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
