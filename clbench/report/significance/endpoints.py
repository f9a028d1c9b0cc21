"""Endpoints: the few questions a report tests, fixed here before any run is looked at.

Adding, dropping or redefining one is a change of the protocol: it belongs
in the change log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clbench.report.scores import FirstStep, Scores, StrategyScores, first_steps_differ
from clbench.types import Floats

Which = Literal["final", "kept", "new"]
Terms = Mapping[str, tuple[tuple[int, float], ...]]
"""Structure → (step, factor) to add up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """One question about a pair of strategies."""

    name: Which
    """Short name in files."""
    title: str
    """Heading."""
    what: str
    """What is averaged, as a clause."""


FINAL = Endpoint(
    name="final",
    title="After the last step",
    what="Dice of all structures after the last step",
)
KEPT = Endpoint(
    name="kept",
    title="Kept (backward transfer)",
    what="change in Dice of the old structures from their own step to the last",
)
NEW = Endpoint(
    name="new",
    title="Learned (new structures)",
    what="Dice of the structures of step 2 and later, each right after its own step",
)
ENDPOINTS = (FINAL, KEPT, NEW)
"""The confirmatory endpoints; each is a family of its own with one test per other strategy."""


def terms(endpoint: Endpoint, learned_at: Mapping[str, int], last: int) -> Terms:
    """What an endpoint adds up for each structure that takes part.

    Args:
        endpoint: the question.
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.
    """
    if endpoint.name == "final":
        return dict.fromkeys(learned_at, ((last, 1.0),))
    if endpoint.name == "kept":
        return {c: ((last, 1.0), (at, -1.0)) for c, at in learned_at.items() if at < last}
    return {c: ((at, 1.0),) for c, at in learned_at.items() if at >= 2}


def table(
    scores: Scores,
    method: StrategyScores,
    endpoint: Endpoint,
    seeds: tuple[int, ...],
    *,
    with_empty: bool = False,
) -> dict[str, Floats]:
    """A strategy's endpoint: eval set → (seeds, patients, structures), nan = no such cell.

    Args:
        scores: the runs.
        method: the strategy.
        endpoint: the question.
        seeds: which of its seeds, in this order.
        with_empty: score an empty truth 1 or 0 instead of leaving it out.
    """
    pick = [method.seeds.index(s) for s in seeds]
    found: dict[str, list[Floats]] = {}
    for c, parts in terms(endpoint, scores.learned_at, scores.last).items():
        home, total = scores.home(c), np.zeros(())
        for step, factor in parts:
            cells = method.cells[step, home, c]
            values = cells.with_empty if with_empty else cells.values
            total = total + factor * values[pick]
        found.setdefault(home, []).append(total)
    return {home: np.stack(columns, axis=-1) for home, columns in found.items()}


def hole(scores: Scores, method: StrategyScores, endpoint: Endpoint) -> str:
    """Why a strategy has no such number, in words; empty = it has one.

    Args:
        scores: the runs of a benchmark.
        method: one strategy of it.
        endpoint: the question.
    """
    words = [
        method.cells[step, scores.home(c), c].hole
        for c, parts in terms(endpoint, scores.learned_at, scores.last).items()
        for step, _ in parts
    ]
    words = [w for w in words if w]
    return f"{method.label}: {words[0]}" if words else ""


def shared_first(a: StrategyScores, b: StrategyScores, seeds: tuple[int, ...]) -> bool:
    """Whether two strategies have one and the same first step, at every seed.

    Args:
        a: one strategy.
        b: the other.
        seeds: seeds that both have.
    """
    firsts = _firsts(a, b, seeds)
    return bool(firsts) and all(x == y for x, y in firsts)


def torn_first(a: StrategyScores, b: StrategyScores, seeds: tuple[int, ...]) -> list[int]:
    """Seeds at which two strategies name one first step, and score differently after it.

    Args:
        a: one strategy.
        b: the other.
        seeds: seeds that both have.
    """
    firsts = _firsts(a, b, seeds)
    return [seeds[i] for i in first_steps_differ([x for x, _ in firsts], [y for _, y in firsts])]


def _firsts(
    a: StrategyScores, b: StrategyScores, seeds: tuple[int, ...]
) -> list[tuple[FirstStep, FirstStep]]:
    return [(a.first_steps[a.seeds.index(s)], b.first_steps[b.seeds.index(s)]) for s in seeds]
