"""Whole runs by two processes, as a user starts them: `--processes`, torchrun, and a killed one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from locations import ROOT

from clbench.evaluation.cost.allocator import environment, in_use
from clbench.store import run_folder

SMALL = ("train.batch=2", "train.iterations=2", "train.epochs=2")


def words(cache: Path, out: Path) -> list[str]:
    given = ["run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke"]
    given += [w for setting in SMALL for w in ("--set", setting)]
    return [*given, "--threads", "1", "--cache", str(cache), "--out", str(out)]


def done(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.mark.usefixtures("smoke_run")
def test_a_run_of_two_processes_is_one_run(cache_root: Path, tmp_path: Path) -> None:
    """Started by clbench or by torchrun: one record, each update and test case once, equal bits."""
    started = {
        "clbench": [sys.executable, "-m", "clbench"],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "clbench",
        ],
    }  # fmt: skip
    scores = {}
    for name, launcher in started.items():
        asked = [*launcher, *words(cache_root, tmp_path / name)]
        done([*asked, "--processes", "2"] if name == "clbench" else asked)
        (folder,) = run_folder.find_runs(tmp_path / name)
        record = run_folder.read_record(folder)
        assert (record["status"], record["host"]["processes"]) == ("finished", 2)
        assert record["allocator"] == ("jemalloc" if environment(os.environ) else in_use())
        log = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        updates = [e for e in map(json.loads, log) if e["event"] == "update"]
        places = [(e["step"], e["epoch"], e["iteration"]) for e in updates]
        assert places == [(s, e, i) for s in (1, 2) for e in (0, 1) for i in (0, 1)]
        assert all(len(e["cases"]) == 2 for e in updates)  # those of both
        scores[name] = (folder / "scores.csv").read_text(encoding="utf-8")
    assert scores["clbench"] == scores["torchrun"]
    rows = list(csv.DictReader(scores["clbench"].splitlines()))
    key = ("step", "eval_set", "case", "structure", "scoring", "metric")
    assert set(Counter(tuple(r[k] for k in key) for r in rows).values()) == {1}
    tested = {(r["eval_set"], r["case"]) for r in rows}
    assert len(tested) == sum(map(len, record["course"]["test"]))


def test_a_plugin_of_avalanche_is_taught_by_two_processes(cache_root: Path, tmp_path: Path) -> None:
    """Avalanche is imported late, when there is a process group, and makes a logger then."""
    asked = [w if w != "universal" else "ewc" for w in words(cache_root, tmp_path)]
    done([sys.executable, "-m", "clbench", *asked, "--processes", "2"])
    (folder,) = run_folder.find_runs(tmp_path)
    assert run_folder.read_record(folder)["status"] == "finished"


def test_a_run_of_which_a_process_was_killed_ends_as_one_that_was_not(cache_root: Path) -> None:
    script = ROOT / "tests" / "rank_kills.py"
    more = ["--kills", "1", "--strategies", "decoder_growth", "--grace", "1"]
    done([sys.executable, str(script), *more, "--cache", str(cache_root)])
