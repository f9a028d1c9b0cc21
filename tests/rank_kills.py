"""Runs of the tiny course by two processes, of which a random one is killed at a random moment.

The other one ends by itself, or is killed where it waits for one that never comes, as the parent of
`clbench run --gpus` does. Called again, the run must end as the one nobody disturbs: weights,
memory, scores, events and predictions to the bit. Processes are forked from this one.

    python tests/rank_kills.py --kills 20 --strategies universal,replay,decoder_growth
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torture import made, outcome, whole

from clbench.avalanche.lazy_import import load
from clbench.run import course
from clbench.testing.harness import StrategyHarness
from clbench.training.launch import Place
from clbench.training.ranks import join

RANKS = 2
PATIENCE_S = 500
"""A process that does not end within it hangs."""


def start(name: str, folder: Path, cache: Path) -> list[int]:
    """Fork the processes of an attempt; their ids by rank."""
    meeting = Path(tempfile.mkdtemp(dir=folder.parent)) / "meeting"
    children = []
    for rank in range(RANKS):
        sys.stdout.flush()
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(PATIENCE_S)
            try:
                torch.set_num_threads(1)
                harness = StrategyHarness(
                    made(name), name=name, folder=folder, cache=cache, overrides=["train.batch=2"]
                )
                plan = harness.plan_run("out")
                plan.settings = dataclasses.replace(plan.settings, checkpoint_s=0, threads=1)
                here = Place(rank=rank, local=rank, size=RANKS, url=meeting.as_uri())
                plan.ranks = join(here, plan.device)
                course.run_plan(plan)
                os._exit(0)
            except BaseException:
                if os.environ.get("LOUD"):
                    traceback.print_exc()
                os._exit(1)
    return children


def ends(children: list[int]) -> list[int]:
    """Exit statuses by rank, once all have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def torment(
    name: str, folder: Path, cache: Path, kills: int, dice: random.Random, grace_s: float
) -> list[str]:
    """What went wrong with one strategy.

    Args:
        name: the strategy.
        folder: an empty one.
        cache: where the phantom is kept.
        kills: how often a process is killed, at the most.
        dice: chooses rank and moment.
        grace_s: seconds in which the other process may end by itself.
    """
    calm, torn, wrong = folder / "calm", folder / "torn", list[str]()
    began = time.monotonic()
    if any(ends(start(name, calm, cache))):
        return [f"{name}: the undisturbed run failed"]
    usual_s = time.monotonic() - began
    for _ in range(kills):
        children = start(name, torn, cache)
        rank, delay_s = dice.randrange(RANKS), (0.3 + 0.7 * dice.random()) * usual_s
        signal.sigtimedwait([signal.SIGCHLD], delay_s)
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
        left = children[1 - rank]
        signal.sigtimedwait([signal.SIGCHLD], 0)  # of the one just waited for
        signal.sigtimedwait([signal.SIGCHLD], grace_s)
        os.kill(left, signal.SIGKILL)
        status = ends([left])[0]
        how = "was killed, too" if status < 0 else "ended by itself"
        print(f"{name}: rank {rank} killed after {delay_s:.1f} s; the other {how}", flush=True)
        wrong += [f"{name}: half written: {found}" for found in whole(torn)]
    if any(ends(start(name, torn, cache))):
        wrong.append(f"{name}: going on failed")
    one, other = outcome(calm), outcome(torn)
    if one != other or not one:
        wrong.append(f"{name}: differs: {sorted(k for k in one if one[k] != other.get(k))}")
    return wrong


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--kills", type=int, default=4, help="of each strategy's run")
    words.add_argument("--strategies", default="universal,replay,decoder_growth,der")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--grace", type=float, default=20, help="seconds the other may end in")
    words.add_argument("--record", type=Path, help="CSV to add the counts to")
    words.add_argument("--cache", type=Path, default=None)
    asked = words.parse_args()
    names, dice, wrong = asked.strategies.split(","), random.Random(asked.seed), list[str]()
    for name in names:
        made(name)
    load("avalanche.training.templates")
    importlib.import_module("monai.inferers")  # what examination imports when it begins
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            place = Path(folder) / name
            place.mkdir()
            cache = asked.cache or Path(folder) / "cache"
            found = torment(name, place, cache, asked.kills, dice, asked.grace)
            if asked.record is not None:
                with asked.record.open("a", newline="", encoding="utf-8") as file:
                    csv.writer(file, lineterminator="\n").writerow([name, asked.kills, len(found)])
            wrong += found
            shutil.rmtree(place)
    print(f"{len(names)} runs, {asked.kills} kills each: {wrong or 'all as undisturbed'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
