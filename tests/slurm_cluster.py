"""A SLURM of one node on this machine, without systemd, cgroups or accounting; needs root.

Debian's packages `slurm-wlm` and `munge` hold the programs. All files lie in one folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={port2}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobRequeue=1
SlurmdParameters=config_overrides
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def need_slurm() -> None:
    """Skip the test where no SLURM can be started."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed here: no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("a SLURM of the tests' own can be started by root alone")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def wait_until(true: object, seconds: float = 120) -> None:
    """Wait for a condition that other processes bring about.

    Args:
        true: called until it returns something true.
        seconds: after which the test fails.
    """
    pause = threading.Event()
    for _ in range(int(seconds * 5)):
        if true():  # type: ignore[operator]
            return
        pause.wait(0.2)
    pytest.fail(f"nothing came of it within {seconds} s")


class Node:
    """The one node of a cluster.

    Args:
        command: what starts its daemon.
        home: folder of the cluster.
    """

    def __init__(self, command: Sequence[str], home: Path) -> None:
        self.command, self.home, self.out = command, home, home / "slurmd.out"
        self.start()

    def start(self) -> None:
        """Start the daemon."""
        with self.out.open("ab") as out:
            self.daemon = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)

    def kill_node(self) -> None:
        """Let the node lose its power, with all that runs on it; it is there again at once."""
        self.daemon.kill()
        self.daemon.wait()
        for process in reversed(_jobs(self.home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.start()


def _jobs(home: Path) -> list[int]:
    """Processes of the steps of a cluster's jobs, and all that they started."""
    parents, steps = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            stat = (entry / "stat").read_text(encoding="utf-8")
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            of_this_cluster = str(home).encode() in (entry / "environ").read_bytes()
            if "slurmstepd" in stat and of_this_cluster:
                steps.add(int(entry.name))
    tree = sorted(steps)
    while more := [p for p, parent in parents.items() if parent in tree and p not in tree]:
        tree += more
    return tree


@contextmanager
def cluster(home: Path) -> Iterator[Node]:
    """Start it, point this process's commands at it, and end it with all its jobs.

    Args:
        home: an empty folder with a short path: sockets lie in it.
    """
    need_slurm()
    host = socket.gethostname().split(".")[0]
    port, port2 = _free_ports()
    for name in ("state", "spool"):
        (home / name).mkdir()
    home.chmod(0o755)
    conf = home / "slurm.conf"
    conf.write_text(CONF.format(host=host, home=home, port=port, port2=port2), encoding="utf-8")
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = [f"--{name}={home}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file")]
    munge += [f"--key-file={key}", f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed"]
    daemons = []
    node: Node | None = None
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-f", str(conf)],
        ):
            with (home / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
            if command[0] == "munged":
                wait_until((home / "munge.socket").exists, 20)
        node = Node(["slurmd", "-D", "-f", str(conf), "-N", host], home)
        wait_until(_is_idle, 60)
        yield node
    finally:
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True, timeout=30)
        daemons += [node.daemon] if node else []
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _is_idle() -> bool:
    told = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
    return "idle" in told.stdout
