"""Runs as forks of a process that has imported torch: what they do, and how they end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from clbench import signals
from clbench.evaluation.cost import allocator
from clbench.grid import forks, local
from clbench.store.record import RunRecord

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
STARTS = [
    *("--bench", "tumor_ext", "--strategy", "finetune", "--profile", "smoke"),
    *("--device", "cpu", "--threads", "1", "--checkpoint-every", "0"),
]


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    """One process to fork for all tests of this file, as for all runs of a grid."""
    assert forks.are_ready(ENVIRONMENT)
    yield
    stop: Any = forkserver._forkserver
    psutil.Process(stop._forkserver_pid).kill()
    stop._stop()


def until_update(log: Path, folder: Path) -> None:
    """Wait until a run trains."""
    waiting = threading.Event()
    while not any(b'"update"' in e.read_bytes() for e in folder.rglob("events.jsonl")):
        assert "clbench:" not in (log.read_text(encoding="utf-8") if log.exists() else "")
        waiting.wait(0.02)


def test_a_fork_is_the_run_that_a_program_of_its_own_is(tmp_path: Path, cache_root: Path) -> None:
    words, log = [*STARTS, "--cache", str(cache_root), "--set", "train.epochs=1"], tmp_path / "log"
    log.write_text("before\n", encoding="utf-8")
    fork = forks.start([*words, "--out", str(tmp_path / "fork")], log, {"OF_THE_SLOT": "1"})
    assert psutil.Process(fork.pid).ppid() != os.getpid()
    assert fork.wait() == fork.poll() == fork.returncode == 0
    fork.send_signal(signal.SIGTERM)  # it has ended: nothing happens
    program = local.as_program([*words, "--out", str(tmp_path / "own")], tmp_path / "2", {})
    assert program.wait() == 0
    (one,) = (tmp_path / "fork").glob("tumor_ext/finetune/*")
    other = tmp_path / "own" / one.relative_to(tmp_path / "fork")
    assert (one / "scores.csv").read_bytes() == (other / "scores.csv").read_bytes()
    records = [RunRecord.read(at) for at in (one, other)]
    assert records[0].threads == records[1].threads == 1
    assert records[0].identity == records[1].identity
    assert records[0].host == records[1].host
    said = log.read_text(encoding="utf-8")
    assert said.startswith("before\nData: the embedded PHANTOM")
    assert f"Results: {one}" in said


def test_a_fork_that_fails_says_why_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    assert forks.start([*STARTS, "--set", "train.lr=no"], log, {}).wait() == 1
    assert log.read_text(encoding="utf-8").splitlines()[-1].startswith("  ")
    assert "clbench: " in log.read_text(encoding="utf-8")
    assert forks.start(["--nothing"], log, {}).wait() == 2  # of the command line
    assert "No such option: --nothing" in log.read_text(encoding="utf-8")


def test_a_fork_that_is_asked_to_stop_saves_and_a_killed_one_is_known(
    tmp_path: Path, cache_root: Path
) -> None:
    words = [*STARTS, "--cache", str(cache_root), "--set", "train.epochs=500"]
    logs = []
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, signals.STATUS)):
        logs.append(log := tmp_path / f"{number}.log")
        log.touch()
        fork = forks.start([*words, "--out", str(tmp_path / str(number))], log, {})
        until_update(log, tmp_path / str(number))
        assert fork.poll() is None
        assert os.getsid(fork.pid) == fork.pid  # Ctrl-C reaches the grid alone
        fork.send_signal(number)
        assert fork.wait() == status
    killed, stopped = (log.read_text(encoding="utf-8") for log in logs)
    assert "SIGTERM" not in killed
    assert "SIGTERM: stopping after this update" in stopped


def test_forks_end_when_the_grid_is_killed(tmp_path: Path, cache_root: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "results"
    log.touch()
    words = [*STARTS, "--cache", str(cache_root), "--out", str(out), "--set", "train.epochs=500"]
    script = (
        "import pickle, sys; from pathlib import Path; from clbench.grid import forks\n"
        f"assert forks.are_ready({ENVIRONMENT})\n"
        f"words, log = pickle.loads({pickle.dumps((words, log))!r})\n"
        "fork = forks.start(words, log, {})\n"
        "print(fork.pid, psutil.Process(fork.pid).ppid(), flush=True)\n"
        "fork.wait()\n"
    )
    grid = subprocess.Popen(
        [sys.executable, "-c", f"import psutil; {script}"], stdout=subprocess.PIPE, text=True
    )
    assert grid.stdout is not None
    run, server = (psutil.Process(int(number)) for number in grid.stdout.readline().split())
    until_update(log, out)
    grid.kill()
    grid.communicate()
    for process in (run, server):
        process.wait(timeout=60)
    assert "SIGTERM: stopping after this update" in log.read_text(encoding="utf-8")
    assert list(out.rglob("resume/**/*.pt")), "what it had done is saved"


def test_a_signal_to_the_process_that_is_forked_stops_no_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    server = psutil.Process(psutil.Process(forks.start(["--help"], log, {}).pid).ppid())
    for number in signals.SIGNALS:
        server.send_signal(number)
    fork = forks.start(["--help"], log, {})
    assert psutil.Process(fork.pid).ppid() == server.pid
    assert fork.wait() == 0
    assert "Usage: clbench run" in log.read_text(encoding="utf-8")


def test_the_process_that_is_forked_has_one_thread_and_the_runs_allocator(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    server = psutil.Process(psutil.Process(forks.start(["--help"], log, {}).pid).ppid())
    assert server.num_threads() == 1  # a fork has no other one's locks
    wanted = {**allocator.environment(os.environ), **ENVIRONMENT}
    assert {name: server.environ().get(name) for name in wanted} == wanted


def test_without_a_socket_runs_are_programs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(forks.forkserver, "ensure_running", refuse)
    assert not forks.are_ready({})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not forks.are_ready(ENVIRONMENT)
