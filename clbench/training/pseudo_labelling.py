"""Offline work on cases before a step, such as pseudo labels: case by case, each kept.

A case counts as finished when its small checkpoint is there and its map is the one
that checkpoint names; a run that was stopped makes the others only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clbench import signals
from clbench.data.catalog import Catalog
from clbench.data.pseudo_labels import PseudoMap, digest, write_pseudo
from clbench.errors import StoreError
from clbench.store import checkpoint
from clbench.strategy.contract import Lesson, Memory, Predictor, Strategy


@dataclass
class Prepared:
    """What was made of the training cases."""

    maps: dict[tuple[int, str], PseudoMap] = field(default_factory=dict)
    """(step, case) → pseudo labels, where there are any."""
    kept_s: float = 0.0
    """Seconds that stopped attempts took for the cases they finished."""


def prepare(
    strategy: Strategy,
    lesson: Lesson,
    memory: Memory,
    catalog: Catalog,
    *,
    old: Predictor | None,
    mark: str,
    folder: Path,
    watch: Callable[[dict[str, Any]], None],
    stored: Sequence[tuple[int, str]] = (),
) -> Prepared:
    """Have every training case prepared, and those it stores; tell the strategy what came of it.

    Args:
        strategy: the method; changes `memory` by its fold over the cases.
        lesson: the step.
        memory: the strategy's memory.
        catalog: opens the cases.
        old: the model served after the previous step.
        mark: its digest.
        folder: where finished cases are kept.
        watch: is told of every case.
        stored: (earlier step, case) that the strategy stores and has prepared.

    Raises:
        StoreError: finished cases of another model, or no room on the disk.
        Stopped: asked to, between two cases.
    """
    done = Prepared()
    rest: dict[str, Mapping[str, Tensor]] = {}
    own = [(lesson.number, case) for case in lesson.cases] if strategy.prepares(lesson) else []
    todo = [*own, *stored]
    for number, (step, case) in enumerate(todo, 1):
        start = time.monotonic()
        past = step != lesson.number
        place = folder.with_name(f"{folder.name}_stored{step}") if past else folder
        target, other = place / case, place / f"{case}.pt"
        volume = catalog.open(step, case, "pseudo")
        finished = _finished(target, other)
        if finished is not None:
            done.kept_s += finished["seconds"]
        else:
            if past:
                assert old is not None  # noqa: S101  # a step went before; tells the type checker
                prepared = dict(strategy.prepare_stored(lesson, volume, old))
            else:
                prepared = dict(strategy.prepare_case(lesson, volume, old))
            maps = None if past else prepared.pop("pseudo", None)
            if maps is not None:
                write_pseudo(target, lesson.old, maps.numpy())
            finished = {
                "made": prepared,
                "model": mark,
                "map": None if maps is None else digest(target),
                "seconds": time.monotonic() - start,
            }
            checkpoint.save(other, finished)  # last: its presence says that all is there
        if finished["model"] != mark:
            raise StoreError(
                "pseudo labels that another model made",
                where=target,
                expected=f"by the model after step {lesson.number - 1}, {mark}",
                got=finished["model"],
                next_step=f"delete {folder} and run the same command again",
            )
        rest[f"{step}/{case}" if past else case] = finished["made"]
        if finished["map"] is not None:
            done.maps[lesson.number, case] = PseudoMap.open(target)
        watch({"event": "pseudo", "done": number, "of": len(todo), "case": case})
        signals.check(f"step {lesson.number}, pseudo labels, case {case}")
    strategy.prepare(lesson, rest, memory)
    return done


def _finished(target: Path, other: Path) -> dict[str, Any] | None:
    """What was kept of a case; None where it is absent, damaged or altered."""
    try:
        finished = checkpoint.load(other)
        if finished["map"] is None or finished["map"] == digest(target):
            return finished
    except (StoreError, KeyError):
        pass
    return None
