"""Working off jobs on a Ray cluster: an existing one, or one of this machine alone.

A task is one process of `clbench run`. When its worker or its node is lost, the process is told to
save and end, and the run is handed out again once nobody works on it. So a run may move between
nodes, if they share the folders of results, cache and data, and have clbench installed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench import signals
from clbench.errors import SettingError, TrainingError
from clbench.evaluation.cost.allocator import SWITCH
from clbench.grid.jobs import Job
from clbench.grid.local import COMMAND, end_with_parent, next_job
from clbench.grid.stops import stopped
from clbench.store import files

POLL_S = 0.5
"""Seconds between two looks at the tasks."""
MOST_LOSSES = 20
"""So often a run is handed out again after its worker was lost; one that kills every worker, by
its memory say, must not do so for ever."""
SILENT_LOOKS = 5
"""Looks at the cluster's head without an answer, a second apart, before it counts as gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayCluster:
    """What a run asks a Ray cluster for."""

    address: str | None = None
    """`auto`, or host:port of the head; None: a cluster of this machine alone."""
    threads: int = 1
    """CPU cores, and threads of the run."""
    gpus: int = 0
    """0: the run computes on the CPU; more than 1 is refused."""
    at_once: int | None = None
    """Runs at a time; None: as many as the cluster has room for."""

    def __post_init__(self) -> None:
        if self.gpus > 1:
            raise SettingError(
                "a run computes on one GPU", where="--gpus", expected="0 or 1", got=self.gpus
            )


def work_off(
    jobs: Sequence[Job],
    cluster: RayCluster,
    *,
    more: Sequence[str] = (),
    watch: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> list[Job]:
    """Make every run that is not finished; return those that failed.

    Args:
        jobs: of the study.
        cluster: where they compute, and what each asks for.
        more: further words of `clbench run` for each, such as `--cache DIR`.
        watch: is told of `started`, `ended`, `lost` and `elsewhere`, each with the job.

    Raises:
        SettingError: Ray is not installed, its head does not answer, or no node can hold a run.
        TrainingError: the head is gone.
        Stopped: by a signal; the same command goes on.
    """
    todo = [job for job in jobs if not job.is_finished()]
    if not todo:
        return []
    with _connected(cluster) as ray, signals.listening():
        _refuse_no_room(ray, cluster)
        return _Tasks(ray, cluster, more, watch).go(todo)


class _Tasks:
    """The tasks of a study on a cluster."""

    def __init__(
        self,
        ray: Any,
        cluster: RayCluster,
        more: Sequence[str],
        watch: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.ray, self.cluster, self.more, self.watch = ray, cluster, tuple(more), watch
        # a lost task is handed out by us, for the process it left may still be saving
        self.task = ray.remote(num_cpus=cluster.threads, num_gpus=cluster.gpus, max_retries=0)(
            make_run
        )
        self.started: dict[Any, Job] = {}
        self.losses: Counter[str] = Counter()
        self.failed: list[Job] = []

    def go(self, todo: list[Job]) -> list[Job]:
        """Until nothing is left; returns the jobs that failed."""
        try:
            while (todo or self.started) and not signals.asked():
                _refuse_lost_head(self.ray)
                while len(self.started) < self._room() and self._hand_out(todo):
                    pass
                if not self.started:
                    time.sleep(POLL_S)
                    continue
                done, _ = self.ray.wait([*self.started], num_returns=1, timeout=POLL_S)
                for task in done:
                    self._end(task, todo)
        finally:
            self._stop()
        signals.check(f"{len(todo)} runs left")
        return self.failed

    def _room(self) -> int:
        """Runs that the nodes which are there now can hold."""
        cluster = self.cluster
        count = sum(
            min(
                int(node.get("CPU", 0)) // cluster.threads,
                int(node.get("GPU", 0)) if cluster.gpus else sys.maxsize,
            )
            for node in _nodes(self.ray)
        )
        return count if cluster.at_once is None else min(count, cluster.at_once)

    def _hand_out(self, todo: list[Job]) -> bool:
        """Start the next job that need not wait; returns whether there was one."""
        ready = [job for job in todo if not (self.losses[job.cell.name] and job.is_running())]
        job = next_job(ready, [*self.started.values()])
        if job is None:
            return False
        todo.remove(job)
        if job.is_running():
            self.watch({"event": "elsewhere", "job": job})
            return True
        files.make_folder(job.log.parent)
        for told_before in (job.failure, job.ticket):
            told_before.unlink(missing_ok=True)
        device = "cuda" if self.cluster.gpus else "cpu"
        words = [*COMMAND[1:], *job.arguments(), "--device", device]
        words += ["--threads", str(self.cluster.threads), *self.more]
        log = str(job.log.absolute())  # the worker is elsewhere until it starts the run
        own = {"OMP_NUM_THREADS": str(self.cluster.threads)}
        if SWITCH in os.environ:  # a worker has the environment of `ray start`, and not this one
            own[SWITCH] = os.environ[SWITCH]
        task = self.task.remote(words, str(Path.cwd()), log, own)
        self.started[task] = job
        self.watch({"event": "started", "job": job})
        return True

    def _end(self, task: Any, todo: list[Job]) -> None:
        """Note what became of a task."""
        job = self.started.pop(task)
        name = job.cell.name
        try:
            status = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as err:  # the process could not be started
            job.note_failure(job.log, status=str(err.cause))
            self.failed.append(job)
        except self.ray.exceptions.RayError as err:  # its worker or its node is lost
            self.losses[name] += 1
            if self.losses[name] <= MOST_LOSSES:
                self.watch({"event": "lost", "job": job})
                todo.append(job)
                return
            job.note_failure(job.log, status=f"lost {MOST_LOSSES} workers: {type(err).__name__}")
            self.failed.append(job)
        else:
            if status != 0 and not stopped(status):
                killer = signal.Signals(-status).name if status < 0 else None
                if job.is_elsewhere():  # another grid was faster by less than a start takes
                    self.watch({"event": "elsewhere", "job": job})
                    return
                job.note_failure(job.log, status=status, signal=killer)
                self.failed.append(job)
            elif not job.is_finished() and not signals.asked():  # its node told it to stop
                todo.append(job)
        self.watch({"event": "ended", "job": job})

    def _stop(self) -> None:
        """Ask the tasks to save and end, and wait for them."""
        for task in self.started:
            self.ray.cancel(task, force=False)
        for task in self.started:
            self.ray.wait([task], timeout=None)
        self.started.clear()


def make_run(words: Sequence[str], folder: str, log: str, environment: Mapping[str, str]) -> int:
    """The task: one process of this node's Python; returns its exit status.

    Args:
        words: for Python.
        folder: that paths are seen from.
        log: where the output goes.
        environment: what its process gets beside the worker's.
    """
    with open(log, "ab") as output:  # noqa: PTH123  # a path of another machine, as it was written
        process = subprocess.Popen(  # noqa: S603  # words are no shell's
            [sys.executable, *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:  # a task is cancelled between two lines of Python
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


@contextmanager
def _connected(cluster: RayCluster) -> Iterator[Any]:
    """Ray, connected to the cluster.

    Raises:
        SettingError: Ray is not installed, or does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as err:
        raise SettingError("--on ray needs Ray", next_step='pip install "clbench[ray]"') from err
    here = {} if cluster.address else {"include_dashboard": False}
    try:
        ray.init(address=cluster.address or "local", log_to_driver=False, **here)
    except (ConnectionError, RuntimeError, ValueError, OSError) as err:
        raise SettingError(
            "the Ray cluster does not answer",
            where=f"--address {cluster.address}"
            if cluster.address
            else "a cluster of this machine",
            expected="the head of a cluster that runs, as `ray start --head` names it",
            got=str(err).strip().partition("\n")[0],
            next_step="`ray status` shows whether it does; without --address, one is started here",
        ) from err
    try:
        yield ray
    finally:
        ray.shutdown()


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    """Resources of every node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _refuse_no_room(ray: Any, cluster: RayCluster) -> None:
    """A run that no node can hold would wait for ever.

    Raises:
        SettingError: no node has so many cores, or a GPU.
    """
    nodes = _nodes(ray)
    for what, option, asked in (
        ("CPU", "--threads", cluster.threads),
        ("GPU", "--gpus", cluster.gpus),
    ):
        most = int(max((node.get(what, 0) for node in nodes), default=0))
        if asked > most:
            raise SettingError(
                f"no node of the Ray cluster has as many {what}s as a run asks for",
                where=option,
                expected=f"at most {most}, of {len(nodes)} node(s)",
                got=asked,
                next_step="ask for less, or start nodes that have them (`ray start --num-gpus …`)",
            )


def _refuse_lost_head(ray: Any) -> None:
    """Ray ends a process whose head stays silent for a minute, without a word; so look ourselves.

    Raises:
        TrainingError: it does not answer.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    for _ in range(SILENT_LOOKS):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as err:
            last = err
            time.sleep(1)
    raise TrainingError(
        "the head of the Ray cluster is gone",
        where=f"{host}:{port}",
        got=last,
        next_step="start it again and run the same command: runs go on where they were saved",
    )
