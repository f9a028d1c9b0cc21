"""What happens within a job of a cluster; every job loads it first, so it imports little."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from typing import Any


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
        if status := self._process.wait():
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
