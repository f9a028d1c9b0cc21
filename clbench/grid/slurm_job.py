"""What happens within a job of a cluster; every job loads it first, so it imports little."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from clbench.grid.stops import stopped


class RunInJob:
    """Makes one run within a job; what submitit calls, and asks to save itself.

    Args:
        command: the words of the process.
        threads: CPU threads.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.command, self.threads = list(command), threads
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: the run failed; its last lines stand above in the job's log.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        self._process = subprocess.Popen(self.command, env=environment)  # noqa: S603  # no shell
        status = self._process.wait()
        if stopped(status) and _runs_on():
            # the cluster told every process, but submitit heeds its own signal alone
            os.kill(os.getpid(), getattr(signal, f"SIG{_signal()}"))
        if status:
            raise RuntimeError(f"the run ended with status {status}")

    def checkpoint(self) -> Any:
        """Let the run save and end, then say what the queued job shall do: go on."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()  # saves at the next update; a second signal changes nothing
            with contextlib.suppress(ChildProcessError):
                # this is called by a signal's handler, while `Popen.wait` holds its lock
                os.waitpid(self._process.pid, 0)
        return DelayedSubmission(RunInJob(self.command, self.threads))


def _signal() -> str:
    """Name of the signal at which submitit asks for `checkpoint` and queues the job again."""
    return os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def _runs_on() -> bool:
    """Whether this process is in a job that nobody has cancelled: one that is to be preempted runs.

    A job that its user cancelled gets the same signal, and must not come back.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    number = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"
    if number is None:
        return False
    command = ["squeue", "-j", number, "-h", "-o", "%T"]
    try:
        told = subprocess.run(  # noqa: S603  # words are no shell's
            command, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return told.stdout.strip() == "RUNNING"
