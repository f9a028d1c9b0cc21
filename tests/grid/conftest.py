"""A study whose runs are made by a small script, so that processes are tried in no time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_runs import Method, make_runs

from clbench.grid import local
from clbench.grid.jobs import Job
from clbench.grid.study_file import Cell

SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
word = dict(zip(sys.argv[1::2], sys.argv[2::2]))
home = Path(word["--out"]) / "tumor_ext"
name, seed = word["--strategy"], word["--seed"]
folder = home / name / seed
shared = home / "_shared" / ("own" if name == "own" else seed)
own = home / "_shared" / f"{name}-{seed}"
print(name, seed, word["--threads"], flush=True)
for place in (folder, shared):
    place.mkdir(parents=True, exist_ok=True)
if not (shared / "step1.pt").exists():  # whoever is to wait for it must not be started yet
    print(name, seed, file=(home / "untaught.txt").open("a"), flush=True)
from clbench.store import files  # takes long enough for others to look, too
with files.locked(folder / ".lock"):
    trace = (home / "trace.txt").open("a")
    with files.locked(shared / ".lock"):  # an error where two teach one step
        if not (shared / "step1.pt").exists():
            if name == "bad":
                sys.exit("boom")
            print("teaches", name, seed, file=trace, flush=True)
            (shared / "step1.pt").touch()
    if name == "importing":  # listens to no signal yet
        (home / f"importing{seed}.txt").touch()
        signal.pause()
    if name == "endless":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (home / f"endless{seed}.txt").touch()
        signal.pause()
    if name == "stopped":  # twice
        count = home / f"stopped{seed}.txt"
        times = len(count.read_text()) if count.exists() else 0
        count.write_text("x" * (times + 1))
        if times < 2:
            sys.exit(75)
    if name == "held":  # the first time, until whoever started it is killed
        told = home / f"held{seed}.txt"
        if not told.exists():
            told.write_text(str(os.getppid()))
            signal.pause()
    if name == "killed":
        signal.raise_signal(signal.SIGKILL)
    own.mkdir(exist_ok=True)
    (own / "step2.pt").touch()
    shutil.copy(Path(word["--cache"]) / "run.json", folder / "run.json")
"""


@pytest.fixture
def finished_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of a finished run."""
    (run,) = make_runs(tmp_path_factory.mktemp("record"), {"lwf": Method(seeds=(0,))})
    return run


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Job]:
    """(strategy, seed) → a job that the script makes."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(local, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(local, "POLL_S", 0.01)

    def make(strategy: str, seed: int = 0) -> Job:
        home = tmp_path / "results" / "tumor_ext"
        shared = "own" if strategy == "own" else str(seed)
        return Job(
            cell=Cell(
                bench="tumor_ext",
                strategy=strategy,
                seed=seed,
                profile=None,
                settings="",
                overrides=(),
                data=None,
                splits=(),
                out=tmp_path / "results",
            ),
            bench="tumor_ext",
            folder=home / strategy / str(seed),
            step_folders=(home / "_shared" / shared, home / "_shared" / f"{strategy}-{seed}"),
            profile="quick",
        )

    return make
