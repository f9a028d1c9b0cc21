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
from clbench.data.volume import Volume
from clbench.errors import StoreError
from clbench.store import checkpoint
from clbench.strategy.contract import Lesson, Memory, Predictor, Strategy
from clbench.training.ranks import Ranks


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
    ranks: Ranks | None = None,
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
        ranks: the processes, which divide the cases among themselves, and then read them all.

    Raises:
        StoreError: finished cases of another model, or no room on the disk.
        Stopped: asked to, between two cases.
    """
    ranks = ranks or Ranks()
    own = [(lesson.number, case) for case in lesson.cases] if strategy.prepares(lesson) else []
    todo = [*own, *stored]

    def work(cases: Sequence[tuple[int, str]]) -> tuple[Prepared, dict[str, Mapping[str, Tensor]]]:
        done = Prepared()
        rest: dict[str, Mapping[str, Tensor]] = {}
        for number, (step, case) in enumerate(cases, 1):
            past = step != lesson.number
            place = folder.with_name(f"{folder.name}_stored{step}") if past else folder
            volume = catalog.open(step, case, "pseudo")
            finished = _finished(place / case, place / f"{case}.pt")
            if finished is not None:
                done.kept_s += finished["seconds"]
            else:
                finished = _prepare_case(strategy, lesson, volume, old, place / case, mark)
            if finished["model"] != mark:
                raise StoreError(
                    "pseudo labels that another model made",
                    where=place / case,
                    expected=f"by the model after step {lesson.number - 1}, {mark}",
                    got=finished["model"],
                    next_step=f"delete {place} and run the same command again",
                )
            rest[f"{step}/{case}" if past else case] = finished["made"]
            if finished["map"] is not None:
                done.maps[lesson.number, case] = PseudoMap.open(place / case)
            watch({"event": "pseudo", "done": number, "of": len(cases), "case": case})
            signals.check(f"step {lesson.number}, pseudo labels, case {case}")
        return done, rest

    kept_s = 0.0
    if ranks.size > 1 and todo:
        kept_s = max(ranks.each(lambda: work(todo[ranks.rank :: ranks.size])[0].kept_s))
    done, rest = work(todo)
    if ranks.size > 1:
        done.kept_s = kept_s  # what this attempt made is no earlier one's
    strategy.prepare(lesson, rest, memory)
    return done


def _prepare_case(
    strategy: Strategy,
    lesson: Lesson,
    volume: Volume,
    old: Predictor | None,
    target: Path,
    mark: str,
) -> dict[str, Any]:
    """Have a case prepared, and keep what came of it.

    Args:
        strategy: the method.
        lesson: the step.
        volume: the case; of an earlier step, where that is not how `target` lies.
        old: the model served after the previous step.
        target: where its map goes; what else was prepared lies beside it.
        mark: digest of the old model.
    """
    start = time.monotonic()
    past = "_stored" in target.parent.name
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
    # last: its presence says that all is there
    checkpoint.save(target.with_name(f"{target.name}.pt"), finished)
    return finished


def _finished(target: Path, other: Path) -> dict[str, Any] | None:
    """What was kept of a case; None where it is absent, damaged or altered."""
    try:
        finished = checkpoint.load(other)
        if finished["map"] is None or finished["map"] == digest(target):
            return finished
    except (StoreError, KeyError):
        pass
    return None
