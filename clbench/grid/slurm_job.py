"""What happens within a job of a cluster; every job loads it first, so it imports little."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench.grid.stops import stopped

TRIES = 3
"""How often a cluster is asked to let a job begin."""


class RunInJob:
    """Makes one run within a job; what submitit calls, and asks to save itself.

    Args:
        command: the words of the process.
        threads: CPU threads.
        tickets: folder of the files that name the jobs of the study's runs.
        look_s: seconds after which it looks again whether others need to wait for it no longer.
    """

    def __init__(self, command: Sequence[str], threads: int, tickets: Path, look_s: float) -> None:
        self.command, self.threads, self.tickets = list(command), threads, tickets
        self.look_s, self.asked = look_s, dict[str, int]()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: the run failed; its last lines stand above in the job's log.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        self._process = subprocess.Popen(self.command, env=environment)  # noqa: S603  # no shell
        while True:
            try:
                status = self._process.wait(timeout=self.look_s)
                break
            except subprocess.TimeoutExpired:
                self._let_go()
        if stopped(status) and _runs_on():
            # the cluster told every process, but submitit heeds its own signal alone
            os.kill(os.getpid(), getattr(signal, f"SIG{_signal()}"))
        if status:
            raise RuntimeError(f"the run ended with status {status}")

    def _let_go(self) -> None:
        """Let begin what waits for this job because of steps that are taught by now.

        Where the cluster does not take that, those jobs begin when this one ends.
        """
        own = _own_number()
        for path in sorted(self.tickets.glob("*.slurm.json")) if own is not None else ():
            try:
                ticket = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # it is being written, or was removed
                continue
            number, tries = ticket["job"], self.asked.get(ticket["job"], 0)
            waits = ticket.get("after") == own and Path(ticket["until"]).exists()
            if not waits or tries == TRIES:
                continue
            told = _told("scontrol", "update", f"JobId={number}", "Dependency=")
            self.asked[number] = tries + 1 if told is None else TRIES

    def checkpoint(self) -> Any:
        """Let the run save and end, then say what the queued job shall do: go on."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()  # saves at the next update; a second signal changes nothing
            with contextlib.suppress(ChildProcessError):
                # this is called by a signal's handler, while `Popen.wait` holds its lock
                os.waitpid(self._process.pid, 0)
        return DelayedSubmission(RunInJob(self.command, self.threads, self.tickets, self.look_s))


def _own_number() -> str | None:
    """The cluster's number of the job that this process is in."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"


def _signal() -> str:
    """Name of the signal at which submitit asks for `checkpoint` and queues the job again."""
    return os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def _runs_on() -> bool:
    """Whether this process is in a job that nobody has cancelled: one that is to be preempted runs.

    A job that its user cancelled gets the same signal, and must not come back.
    """
    if (number := _own_number()) is None:
        return False
    return _told("squeue", "-j", number, "-h", "-o", "%T") == "RUNNING"


def _told(*command: str) -> str | None:
    """What one of SLURM's commands says; None: it failed."""
    try:
        told = subprocess.run(  # noqa: S603  # words are no shell's
            command, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
