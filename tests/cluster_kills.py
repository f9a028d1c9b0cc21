"""The kill benchmark of clusters: a study is worked off while its workers and nodes are killed.

Every run must end finished, with the scores of one that nobody disturbed; no run may ever be made
by two processes at a time; and no process may be left. On Ray: a cluster of two nodes on this
machine, whose workers and nodes are killed (SIGKILL). On SLURM: one that the script starts, whose
jobs are killed, told to go (as pre-emption tells them), run into a time limit of a minute, and
whose node is killed. Prints what it did, and a line of JSON.

    python tests/cluster_kills.py ray --kills 6
    python tests/cluster_kills.py slurm --kills 4
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clbench.store import run_folder

STRATEGIES, SEEDS = ("universal", "finetune"), "0-1"
WAIT_S = 3000
"""Longest time a study may take."""


def words(out: Path, cache: Path, epochs: int) -> list[str]:
    """`clbench grid` of the study."""
    asked = [w for name in STRATEGIES for w in ("--strategy", name)]
    small = ("phantom.train=2", "phantom.test=1", f"train.epochs={epochs}")
    settings = [w for word in small for w in ("--set", word)]
    return [
        *(sys.executable, "-m", "clbench", "grid", "--bench", "tumor_ext", "--profile", "smoke"),
        *(*asked, "--seeds", SEEDS, *settings, "--out", str(out), "--cache", str(cache)),
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


def parent(process: int) -> int:
    """The process that started it."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1])


class Watch(threading.Thread):
    """Looks all the time how many processes make each run."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.most, self.ended = out, Counter[str](), threading.Event()

    def run(self) -> None:
        """Until the study has ended."""
        while not self.ended.wait(0.05):
            for run, count in Counter(makers(self.out).values()).items():
                self.most[run] = max(self.most[run], count)


def study(command: list[str], disturb: Callable[[], str | None], pause_s: float) -> list[str]:
    """Work a study off while it is disturbed; returns what was done to it.

    Args:
        command: `clbench grid` of the study, which stays until it is done.
        disturb: does something to it and says what; None: there was nothing to disturb.
        pause_s: mean time between two disturbances.
    """
    done: list[str] = []
    grid = subprocess.Popen(command)
    began = time.monotonic()
    while grid.poll() is None:
        time.sleep(random.uniform(0.5, 1.5) * pause_s)
        if grid.poll() is None and (what := disturb()) is not None:
            done.append(what)
            print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)
        if time.monotonic() - began > WAIT_S:
            grid.terminate()
            sys.exit("the study did not end")
    if grid.returncode:
        sys.exit(f"the study ended with status {grid.returncode}")
    return done


@contextmanager
def on_ray(args: argparse.Namespace) -> Iterator[tuple[list[str], Callable[[Path], str | None]]]:
    """A cluster of two nodes: the options of `clbench grid`, and what disturbs it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def disturb(out: Path) -> str | None:
        running = sorted(makers(out))
        if args.kills <= 0 or not running:
            return None
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


def check(out: Path, alone: Path) -> dict[str, object]:
    """What must hold afterwards."""
    runs = {f.relative_to(out): f for f in run_folder.find_runs(out)}
    twins = {f.relative_to(alone): f for f in run_folder.find_runs(alone)}
    records = [run_folder.read_record(f) for f in runs.values()]
    return {
        "runs": len(runs),
        "finished": sum(r["status"] == "finished" for r in records),
        "equal_bits": runs.keys() == twins.keys()
        and all(
            (runs[name] / "scores.csv").read_bytes() == (twins[name] / "scores.csv").read_bytes()
            for name in runs
        ),
        "starts": [r["starts"] for r in records],
        "left_processes": len(makers(out)),
    }


def main() -> None:
    """Disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("on", choices=["ray"])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pause", type=float, default=20, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        out, alone, cache = (Path(folder, name) for name in ("out", "alone", "cache"))
        subprocess.run(words(alone, cache, args.epochs), check=True, stdout=subprocess.DEVNULL)
        watch = Watch(out)
        watch.start()
        with on_ray(args) as (options, disturb):
            done = study(
                [*words(out, cache, args.epochs), *options], lambda: disturb(out), args.pause
            )
        watch.ended.set()
        found = check(out, alone)
    measured = {**found, "disturbed": Counter(done), "most_at_once": max(watch.most.values())}
    print(json.dumps(measured))
    ends_well = found["finished"] == found["runs"] and found["equal_bits"]
    sys.exit(
        0 if ends_well and not found["left_processes"] and max(watch.most.values()) == 1 else 1
    )


if __name__ == "__main__":
    main()
