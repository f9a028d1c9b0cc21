"""Runs on Ray: lost workers, what no node can hold, a head that is gone; and a real cluster."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clbench.errors import SettingError, TrainingError
from clbench.grid import local, ray_cluster
from clbench.grid.jobs import Job, State, states
from clbench.grid.ray_cluster import RayCluster, work_off
from clbench.store.files import write_bytes

MakeJob = Callable[..., Job]


class RayError(Exception):
    """As Ray's own: a worker or a node is lost."""


class RayTaskError(RayError):
    """As Ray's own: the task raised."""

    cause = FileNotFoundError("no such folder on this node")


class FakeRay:
    """Tasks that end at once as they were told to: with a status, or an error that is raised.

    Args:
        ends: of each task in turn; called where it is a function.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *ends: Any) -> None:
        self.ends = list(ends)

    def remote(self, **options: Any) -> Any:
        assert options == {"num_cpus": 1, "num_gpus": 0, "max_retries": 0}
        return lambda function: SimpleNamespace(remote=lambda *words: f"task {len(self.ends)}")

    def wait(self, tasks: list[str], **_: Any) -> tuple[list[str], list[str]]:
        return tasks[:1], tasks[1:]

    def get(self, task: str) -> int:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return int(end() if callable(end) else end)

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, dead]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="head:6379")


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRay], None]:
    """Let a fake stand in for Ray."""

    def connect(ray: FakeRay) -> None:
        @contextmanager
        def connected(cluster: RayCluster) -> Iterator[FakeRay]:
            yield ray

        monkeypatch.setattr(ray_cluster, "_connected", connected)
        monkeypatch.setattr(ray_cluster, "_refuse_lost_head", lambda ray: None)

    return connect


def test_a_lost_run_is_handed_out_again_and_not_for_ever(
    make_job: MakeJob,
    finished_record: Path,
    connect: Callable[[FakeRay], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, bad = make_job("lwf", 0), make_job("own", 1)
    seen: list[str] = []

    def finish() -> int:
        write_bytes(job.folder / "run.json", (finished_record / "run.json").read_bytes())
        return 0

    def watch(event: Mapping[str, Any]) -> None:
        seen.append(event["event"])

    connect(FakeRay(RayError(), RayError(), finish))
    assert work_off([job], RayCluster(), watch=watch) == []
    assert seen == ["started", "lost", "started", "lost", "started", "ended"]
    assert states([job]) == [State.FINISHED]
    job.folder.joinpath("run.json").unlink()
    connect(FakeRay(-15, finish))  # told to stop by its node, before it could listen
    assert work_off([job], RayCluster()) == []
    assert states([job]) == [State.FINISHED]
    monkeypatch.setattr(ray_cluster, "MOST_LOSSES", 1)
    connect(FakeRay(RayError(), RayError()))
    assert work_off([job, bad], RayCluster()) == [bad]
    assert "lost 1 workers" in (bad.failed() or {})["status"]
    connect(FakeRay(RayTaskError()))
    assert work_off([bad], RayCluster()) == [bad]
    assert "no such folder" in (bad.failed() or {})["status"]
    connect(FakeRay(-9))
    assert work_off([bad], RayCluster()) == [bad]
    assert (bad.failed() or {})["signal"] == "SIGKILL"


def test_a_worker_gets_paths_that_hold_in_every_folder(
    make_job: MakeJob,
    connect: Callable[[FakeRay], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It was started where `ray start` was typed, and not in the folder of the study."""
    monkeypatch.chdir(tmp_path)
    job = make_job("lwf", 0)
    job = replace(job, cell=replace(job.cell, out=Path("results")))
    handed: list[tuple[Any, ...]] = []

    class Told(FakeRay):
        def remote(self, **options: Any) -> Any:
            def take(*words: Any) -> str:
                handed.append(words)
                return "task"

            return lambda function: SimpleNamespace(remote=take)

    connect(Told(0, 1))
    monkeypatch.setenv("CLBENCH_KEEP_MEMORY", "0")
    work_off([job], RayCluster())
    words, folder, log, environment = handed[0]
    assert environment == {"OMP_NUM_THREADS": "1", "CLBENCH_KEEP_MEMORY": "0"}
    assert Path(log) == tmp_path / job.log
    assert folder == str(tmp_path)
    assert words[words.index("--run-id") + 1] == job.folder.name


def test_what_no_node_can_hold_and_a_head_that_is_gone(
    make_job: MakeJob, connect: Callable[[FakeRay], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("lwf", 0)
    with pytest.raises(SettingError, match="one GPU"):
        RayCluster(gpus=2)
    looks = ray_cluster._refuse_lost_head
    connect(FakeRay())
    for asked, says in ((RayCluster(gpus=1), "GPU"), (RayCluster(threads=3), "CPU")):
        with pytest.raises(SettingError, match=f"as many {says}s as") as err:
            work_off([job], asked)
        assert "1 node(s)" in str(err.value.expected)
    slept: list[float] = []

    def silent(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(ray_cluster.time, "sleep", slept.append)
    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(TrainingError, match="head of the Ray cluster is gone"):
        looks(FakeRay())
    assert len(slept) == ray_cluster.SILENT_LOOKS
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match="needs Ray"):
        work_off([job], RayCluster())
    assert job.failed() is None


def test_runs_end_on_a_real_cluster(make_job: MakeJob, finished_record: Path) -> None:
    """In a process of its own: Ray starts servers, and this one may open no connection."""
    pytest.importorskip("ray", reason="Ray is not installed here: pip install 'clbench[ray]'")
    jobs = [make_job("lwf", 0), make_job("mib", 0)]
    script = (
        "import pickle, sys\n"
        "from clbench.grid import local, ray_cluster\n"
        f"ray_cluster.COMMAND = {local.COMMAND!r}\n"
        f"jobs = pickle.loads({pickle.dumps(jobs)!r})\n"
        f"more = ['--cache', {str(finished_record)!r}]\n"
        "sys.exit(len(ray_cluster.work_off(jobs, ray_cluster.RayCluster(), more=more)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(states(jobs)) == {State.FINISHED}
    trace = (jobs[0].folder.parent.parent / "trace.txt").read_text(encoding="utf-8")
    assert len(trace.splitlines()) == 1


DISTURBED = """
import json, os, pickle, signal, sys, threading, time
from pathlib import Path
os.environ["RAY_worker_niceness"] = "0"  # on a busy machine 15, as Ray has it, is for ever
from ray.cluster_utils import Cluster
from clbench.grid import ray_cluster
command, jobs, more = pickle.loads(bytes.fromhex(sys.argv[1]))
ray_cluster.COMMAND = command
home = jobs[0].folder.parents[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

def held(seed):
    told = home / f"held{seed}.txt"
    while not (told.exists() and told.read_text()):
        time.sleep(0.05)
    return int(told.read_text())

def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])

def disturb():
    one, other = held(0), held(1)
    node = next(n for n in nodes if n.all_processes["raylet"][0].process.pid == parent(other))
    os.kill(one, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)

threading.Thread(target=disturb, daemon=True).start()
seen = []
asked = ray_cluster.RayCluster(address=cluster.address)
failed = ray_cluster.work_off(jobs, asked, more=more, watch=lambda e: seen.append(e["event"]))
cluster.shutdown()
print(json.dumps([seen, len(failed)]))
"""


def test_a_killed_worker_and_a_killed_node_cost_no_run(
    make_job: MakeJob, finished_record: Path
) -> None:
    """A real cluster of a head and two nodes on this machine, whose parts are killed."""
    pytest.importorskip("ray", reason="Ray is not installed here: pip install 'clbench[ray]'")
    jobs = [make_job("held", 0), make_job("held", 1), make_job("lwf", 0)]
    asked = pickle.dumps((local.COMMAND, jobs, ["--cache", str(finished_record)]))
    done = subprocess.run(
        [sys.executable, "-c", DISTURBED, asked.hex()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen, failed = json.loads(done.stdout.splitlines()[-1])
    assert failed == 0
    assert set(states(jobs)) == {State.FINISHED}
    assert seen.count("lost") == 2
    assert seen.count("started") == 5
    # a step that was taught before its run was lost is not taught again
    trace = (jobs[0].folder.parents[1] / "trace.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split()[-1] for line in trace) == ["0", "1"]
