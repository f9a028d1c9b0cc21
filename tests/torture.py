"""The kill benchmark: runs of the tiny course are killed (SIGKILL) at random moments, and go on.

Every run must end as the one nobody disturbs (weights, memory, scores, events), and after every
kill each file under its final name must be whole. Kills are aimed at the phase that has had the
fewest, and counted by the phase they landed in. Each attempt is forked from this process, which has
imported everything and computes nothing.

    python tests/torture.py --minutes 30 --out results/calibration/torture.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench import reproducibility
from clbench.evaluation.predictions import read_prediction
from clbench.run import course, examine
from clbench.spec import registry
from clbench.store import checkpoint, files, run_folder
from clbench.strategies.decoder_growth.method import DecoderGrowth
from clbench.strategy.contract import Lesson, Memory, Phase, PhaseResult, Strategy
from clbench.testing.harness import StrategyHarness
from clbench.training import loop, pseudo_labelling

PHASES = ("start", "train", "prune", "pseudo", "examine", "write")
AIMED = PHASES[1:]
PRUNED = "decoder_growth.pruned"
OURS = [
    name
    for name, entry in registry.entries("strategy").items()
    if entry.value.startswith("clbench.strategies.")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned(DecoderGrowth):
    """Two levels that nobody judges: on the tiny grid no validation case shows a tumor."""

    ema: float = 0.9
    body_range: bool = True

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        prune = [Phase(name=f"prune {n}.0", epochs=1, constant=True, validations=1) for n in (0, 1)]
        return [Phase(validations=1), *prune, Phase(name="recover"), None][len(history)]


def made(name: str) -> Strategy:
    """The strategy that a name of `OURS`, or `PRUNED`, stands for."""
    strategy: Strategy = Pruned() if name == PRUNED else registry.load("strategy", name)()
    return strategy


class Board:
    """What a child is doing, readable after its death: phase, entries and seconds per phase."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, 8 * (1 + 2 * len(PHASES)))).cast("d")

    def clear(self) -> None:
        self.memory[:] = memoryview(bytes(8 * len(self.memory))).cast("d")

    @property
    def phase(self) -> str:
        return PHASES[int(self.memory[0])]

    def entries(self, phase: str) -> int:
        return int(self.memory[1 + PHASES.index(phase)])

    def seconds(self, phase: str) -> float:
        return self.memory[1 + len(PHASES) + PHASES.index(phase)]

    @contextmanager
    def station(self, phase: str) -> Iterator[None]:
        number, before, start = PHASES.index(phase), self.memory[0], time.monotonic()
        self.memory[1 + number] += 1
        self.memory[0] = number
        try:
            yield
        finally:
            self.memory[0] = before
            self.memory[1 + len(PHASES) + number] += time.monotonic() - start


BOARD = Board()


def watched(
    function: Callable[..., Any], phase_of: Callable[..., str | None]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **more: Any) -> Any:
        phase = phase_of(*args)
        with nullcontext() if phase is None else BOARD.station(phase):
            return function(*args, **more)

    return call


def put_up_boards() -> None:
    """Let the rooms of a run tell the board where they are."""

    def always(phase: str) -> Callable[..., str]:
        return lambda *args: phase

    for owner, name in (
        (checkpoint, "save"), (files, "write_bytes"), (examine, "write_prediction"),
        (pseudo_labelling, "write_pseudo"),
    ):  # fmt: skip
        setattr(owner, name, watched(getattr(owner, name), always("write")))
    course.Course.examine = watched(course.Course.examine, always("examine"))  # type: ignore[method-assign]
    pseudo_labelling.prepare = watched(
        pseudo_labelling.prepare,
        lambda strategy, lesson, *_: "pseudo" if strategy.prepares(lesson) else None,
    )  # type: ignore[assignment]
    # an update begins when its crops are put on the device
    taught = loop._teach_phase
    loop._teach_phase = watched(
        taught, lambda *a: "train" if a[1].phase.name == "train" else "prune"
    )  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A strategy, and how its runs are loaded."""

    name: str
    workers: int

    def attempt(self, folder: Path, cache: Path) -> int:
        """Fork a process that runs, or goes on; its id."""
        BOARD.clear()
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        try:
            torch.set_num_threads(1)
            harness = StrategyHarness(made(self.name), name=self.name, folder=folder, cache=cache)
            plan = harness.plan_run("out")
            plan.settings = dataclasses.replace(
                plan.settings, checkpoint_s=0, workers=self.workers, threads=1
            )
            course.run_plan(plan)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def whole(folder: Path) -> list[str]:
    """Files under a final name that cannot be read to the end."""
    found = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") or any(p.name.startswith(".") for p in path.parents):
            continue
        try:
            if path.suffix == ".pt":
                checkpoint.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "scores.csv":
                run_folder.read_scores(path)
            elif path.suffix == ".csv" and not path.read_bytes().endswith(b"\n"):
                raise ValueError("cut short")
            elif path.suffix == ".npz":
                read_prediction(path)
            elif path.suffix == ".npy":
                np.load(path, allow_pickle=False)
            elif path.suffix == ".jsonl":  # written line by line: the last one may be cut
                lines = path.read_text(encoding="utf-8").splitlines()
                if len(run_folder.read_events(path)) < len(lines) - 1:
                    raise ValueError("damaged before its last line")
        except Exception as err:
            found.append(f"{path.relative_to(folder)}: {err}")
    return found


def outcome(folder: Path) -> dict[str, str]:
    """What a finished run left: checksums of weights and memory, scores and events."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            found[str(path.relative_to(folder))] = content["sha256"]
        elif path.name in ("scores.csv", "events.jsonl") or path.suffix == ".npz":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name.endswith(".part"):
            found[str(path.relative_to(folder))] = "left behind"
    return found


@dataclasses.dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    by_strategy: Counter[str] = dataclasses.field(default_factory=Counter)
    runs: int = 0
    different: list[str] = dataclasses.field(default_factory=list)
    half_written: list[str] = dataclasses.field(default_factory=list)

    def reached(self, kills: int, each: int) -> bool:
        return sum(self.kills.values()) >= kills and all(self.kills[p] >= each for p in AIMED)

    @property
    def clean(self) -> bool:
        return not (self.different or self.half_written)


def torment(
    subject: Subject, folder: Path, cache: Path, tally: Tally, dice: random.Random, most: int,
    enough: Callable[[], bool],
) -> None:  # fmt: skip
    """One undisturbed run, and one that is killed at most `most` times."""
    calm, torn = folder / "calm", folder / "torn"
    _, status = os.waitpid(subject.attempt(calm, cache), 0)
    if status:
        raise SystemExit(f"{subject}: the undisturbed run failed")
    usual = {p: (BOARD.entries(p), BOARD.seconds(p)) for p in AIMED if BOARD.entries(p)}
    killed = 0
    while True:
        child = subject.attempt(torn, cache)
        if killed < most and not enough():
            target = min(usual, key=lambda p: (tally.kills[p], dice.random()))
            entries, seconds = usual[target]
            if _kill(
                child,
                target,
                dice.randrange(max(1, entries // 2)),
                dice.random() * seconds / entries,
            ):
                killed += 1
                tally.kills[BOARD.phase] += 1
                tally.by_strategy[subject.name] += 1
                tally.half_written += [f"{subject.name}: {x}" for x in whole(torn)]
                continue
        else:
            _, status = os.waitpid(child, 0)
            if status:
                tally.different.append(f"{subject.name}: going on failed")
                return
        break
    tally.runs += 1
    one, other = outcome(calm), outcome(torn)
    if one != other:
        names = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))
        tally.different.append(f"{subject.name}: {', '.join(names)}")


def _kill(child: int, target: str, skip: int, delay_s: float) -> bool:
    """Kill the child `delay_s` into a stay at the target; False where it ended before."""
    aimed_at: float | None = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit("an attempt failed; see above")
            return False
        now = time.monotonic()
        if aimed_at is None and BOARD.phase == target and BOARD.entries(target) > skip:
            aimed_at = now + delay_s
        if aimed_at is not None and now >= aimed_at:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.002)


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, object]]:
    """(of, name, value): kills per phase and strategy, what came out, where."""
    for name in ("killed", "runs", "seed", "minutes"):
        yield "all", name, found[name]
    for name in ("different", "half_written"):
        yield "all", name, len(found[name])
    for of, group in (("phase", "kills"), ("strategy", "by_strategy"), ("host", "host")):
        for name, value in found[group].items():
            yield of, name, value


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--minutes", type=float, default=30.0)
    words.add_argument("--kills", type=int, default=100)
    words.add_argument("--each", type=int, default=10, help="kills in each phase, at least")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--strategies", default=None, help="names, separated by semicolons")
    words.add_argument("--cache", type=Path, default=None)
    words.add_argument("--out", type=Path, default=None, help="CSV of the counts")
    asked = words.parse_args()
    start, dice, tally = time.monotonic(), random.Random(asked.seed), Tally()
    names = asked.strategies.split(";") if asked.strategies else [PRUNED, *OURS]
    for name in names:  # import everything a child needs, and compute nothing
        made(name)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    put_up_boards()

    def enough() -> bool:
        late = time.monotonic() - start > 60 * asked.minutes
        return late or tally.reached(asked.kills, asked.each)

    most = max(1, -(-asked.kills // len(names)))
    turn = 0
    with tempfile.TemporaryDirectory() as folder:
        cache = asked.cache or Path(folder) / "cache"
        while not enough() or (turn < len(names) and time.monotonic() - start < 60 * asked.minutes):
            subject = Subject(names[turn % len(names)], workers=2 * (turn % 3 == 2))
            torment(subject, Path(folder) / str(turn), cache, tally, dice, most, enough)
            turn += 1
    found = {
        "kills": {p: tally.kills[p] for p in PHASES},
        "killed": sum(tally.kills.values()),
        "by_strategy": dict(sorted(tally.by_strategy.items())),
        "runs": tally.runs,
        "different": tally.different,
        "half_written": tally.half_written,
        "seed": asked.seed,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "host": reproducibility.host(torch.device("cpu")),
    }
    print(json.dumps(found, indent=1))
    if asked.out:
        with asked.out.open("w", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(("of", "name", "value"))
            lines.writerows(rows(found))
    if not tally.clean:
        return 1
    return 0 if tally.reached(asked.kills, asked.each) else 2


if __name__ == "__main__":
    sys.exit(main())
