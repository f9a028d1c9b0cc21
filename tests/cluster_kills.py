"""The kill benchmark of clusters: a study is worked off while its workers and nodes are killed.

Every run must end finished, with the scores of one that nobody disturbed; no run may ever be made
by two processes at a time; and no process may be left. On Ray: a cluster of two nodes on this
machine, whose workers and nodes are killed (SIGKILL). On SLURM: one that the script starts, whose
jobs are killed, told to go (as pre-emption tells them), requeued, run into a short time limit, and
whose node is killed. Prints what it did, and a line of JSON.

    python tests/cluster_kills.py ray --kills 6
    python tests/cluster_kills.py slurm --kills 4
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurm_cluster import cluster

from clbench.grid.slurm import queue
from clbench.store import run_folder

STRATEGIES = ("universal", "finetune")
RECORDED = ("runs", "finished", "equal_bits", "most_at_once", "left_processes")
WAIT_S = 3000
"""Longest time a study may take."""


def words(out: Path, cache: Path, args: argparse.Namespace) -> list[str]:
    """`clbench grid` of the study."""
    asked = [w for name in STRATEGIES for w in ("--strategy", name)]
    small = ("phantom.train=2", "phantom.test=1", f"train.epochs={args.epochs}")
    settings = [w for word in small for w in ("--set", word)]
    return [
        *(sys.executable, "-m", "clbench", "grid", "--bench", "tumor_ext", "--profile", "smoke"),
        *(*asked, "--seeds", args.seeds, *settings, "--out", str(out), "--cache", str(cache)),
    ]


def makers(out: Path) -> dict[int, str]:
    """Process → run, of every `clbench run` into a folder."""
    there = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "run" in line[:5] and "clbench" in line and str(out) in line:
                run = " ".join(line[line.index(w) + 1] for w in ("--strategy", "--seed"))
                there[int(entry.name)] = run
    return there


def at_work(out: Path) -> dict[int, str]:
    """Those of them that hold a lock below the folder: others begin, or end, and write nothing."""
    there = {}
    for process, run in makers(out).items():
        try:
            opened = [str(fd.readlink()) for fd in Path(f"/proc/{process}/fd").iterdir()]
        except OSError:  # it has ended
            continue
        if any(name.startswith(str(out)) and name.endswith("/.lock") for name in opened):
            there[process] = run
    return there


def parent(process: int) -> int:
    """The process that started it."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1])


class Watch(threading.Thread):
    """Looks all the time how many processes are at work on each run."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.most, self.ended = out, Counter[str](), threading.Event()

    def run(self) -> None:
        """Until the study has ended."""
        while not self.ended.wait(0.05):
            for run, count in Counter(at_work(self.out).values()).items():
                self.most[run] = max(self.most[run], count)


def study(
    command: list[str],
    disturb: Callable[[], str | None],
    ended: Callable[[], bool],
    pause_s: float,
) -> list[str]:
    """Work a study off while it is disturbed; returns what was done to it.

    Args:
        command: `clbench grid` of the study; given again where it ends before the study does.
        disturb: does something to it and says what; None: there was nothing to disturb.
        ended: whether every run is finished.
        pause_s: mean time between two disturbances.
    """
    done: list[str] = []
    grid = subprocess.Popen(command)
    began = time.monotonic()
    while grid.poll() is None or not ended():
        if grid.poll() is not None:  # on SLURM it returns when all is submitted
            grid = subprocess.Popen(command)
        time.sleep(random.uniform(0.5, 1.5) * pause_s)
        if (what := disturb()) is not None:
            done.append(what)
            print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)
        if time.monotonic() - began > WAIT_S:
            grid.terminate()
            sys.exit("the study did not end")
    return done


@contextmanager
def on_ray(args: argparse.Namespace) -> Iterator[tuple[list[str], Callable[[Path], str | None]]]:
    """A cluster of two nodes: the options of `clbench grid`, and what disturbs it."""
    # on a busy machine 15, as Ray has it, is for ever
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # the name of one of its settings
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def disturb(out: Path) -> str | None:
        running = sorted(makers(out))
        if args.kills <= 0 or not running or not run_folder.find_runs(out):
            return None  # before a run has begun there is nothing to lose
        args.kills -= 1
        if args.kills % 3 == 0:
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
            return "a node killed, another one added"
        os.kill(parent(random.choice(running)), signal.SIGKILL)
        return "a worker killed"

    try:
        yield ["--on", "ray", "--address", cluster.address], disturb
    finally:
        cluster.shutdown()


@contextmanager
def on_slurm(args: argparse.Namespace) -> Iterator[tuple[list[str], Callable[[Path], str | None]]]:
    """A cluster of one node, jobs of a minute: the options of `clbench grid`, and what disturbs it.

    The disturber also submits again what has left the queue unfinished, as a user would.
    """
    home = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    kinds = ["killed", "told to go", "requeued", "node"]

    def sbatch(*command: str) -> None:
        subprocess.run(command, check=False, capture_output=True, timeout=60)

    def disturb(out: Path) -> str | None:
        for number in queue():  # SLURM lets a job that is queued again wait for two minutes
            sbatch("scontrol", "update", f"JobId={number}", "StartTime=now")
        running = sorted(number for number, state in queue().items() if state == "RUNNING")
        if args.kills <= 0 or not running or not (makers(out) and run_folder.find_runs(out)):
            return None
        args.kills -= 1
        kind, number = kinds[args.kills % len(kinds)], random.choice(running)
        if kind == "killed":
            os.kill(random.choice(sorted(makers(out))), signal.SIGKILL)
            return "a run's process killed"
        if kind == "told to go":
            sbatch("scancel", "--signal=USR2", number)
            return "a job told to go, as before pre-emption"
        if kind == "requeued":
            sbatch("scontrol", "requeue", number)
            return "a job requeued"
        slurm.kill_node()
        return "the node killed and started again"

    with cluster(home) as slurm:
        limit = ["--minutes", str(args.minutes)]
        yield ["--on", "slurm", *limit, "--memory-gb", "1"], disturb
    shutil.rmtree(home, ignore_errors=True)


def finished(out: Path) -> int:
    """Finished runs of a folder of results."""
    records = map(run_folder.read_record, run_folder.find_runs(out))
    return sum(record["status"] == "finished" for record in records)


def check(out: Path, alone: Path) -> dict[str, object]:
    """What must hold afterwards."""
    runs = {f.relative_to(out): f for f in run_folder.find_runs(out)}
    twins = {f.relative_to(alone): f for f in run_folder.find_runs(alone)}
    records = [run_folder.read_record(f) for f in runs.values()]
    return {
        "runs": len(runs),
        "finished": finished(out),
        "equal_bits": runs.keys() == twins.keys()
        and all(
            (runs[name] / "scores.csv").read_bytes() == (twins[name] / "scores.csv").read_bytes()
            for name in runs
        ),
        "starts": [r["starts"] for r in records],
        "left_processes": len(makers(out)),
    }


def write(path: Path, on: str, measured: dict[str, Any]) -> None:
    """Add a line to a table, with a head where it begins.

    Args:
        path: the CSV.
        on: `ray` or `slurm`.
        measured: what `main` prints.
    """
    line = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "on": on,
        "disturbed": "; ".join(
            f"{count} x {what}" for what, count in measured["disturbed"].items()
        ),
        "starts": sum(measured["starts"]),
        **{name: measured[name] for name in RECORDED},
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, line, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(line)


def main() -> None:
    """Disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("on", choices=["ray", "slurm"])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--minutes", type=int, default=2, help="time limit of a job on SLURM")
    parser.add_argument("--seeds", default="0-1", help="of the study")
    parser.add_argument("--pause", type=float, default=20, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="CSV to add what happened to")
    args = parser.parse_args()
    random.seed(args.seed)
    # told to stop, it still ends the cluster and what runs on it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        out, alone, cache = (Path(folder, name) for name in ("out", "alone", "cache"))
        subprocess.run(words(alone, cache, args), check=True, stdout=subprocess.DEVNULL)
        watch = Watch(out)
        watch.start()
        with {"ray": on_ray, "slurm": on_slurm}[args.on](args) as (options, disturb):
            command = [*words(out, cache, args), *options]
            done = study(
                command,
                disturb=lambda: disturb(out),
                ended=lambda: finished(out) == len(run_folder.find_runs(alone)),
                pause_s=args.pause,
            )
        watch.ended.set()
        found = check(out, alone)
    measured = {**found, "disturbed": Counter(done), "most_at_once": max(watch.most.values())}
    print(json.dumps(measured))
    if args.record is not None:
        write(args.record, args.on, measured)
    ends_well = found["finished"] == found["runs"] and found["equal_bits"]
    sys.exit(
        0 if ends_well and not found["left_processes"] and max(watch.most.values()) == 1 else 1
    )


if __name__ == "__main__":
    main()
