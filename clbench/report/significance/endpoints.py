"""Endpoints: the few questions a report tests, fixed here before any run is looked at.

Adding, dropping or redefining one is a change of the protocol: it belongs
in the change log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clbench.report.scores import Scores, StrategyScores
from clbench.statistics.class_macro import strata
from clbench.statistics.intervals import Interval
from clbench.statistics.macro_estimate import macro_interval
from clbench.types import Floats

Which = Literal["final", "kept", "new"]


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
    at, minus = _steps(scores, endpoint)
    values = method.table(at, seeds, with_empty=with_empty)
    if not minus:
        return values
    less = method.table(minus, seeds, with_empty=with_empty)
    return {name: values[name] - less[name] for name in values} if less else {}


def interval(scores: Scores, method: StrategyScores, endpoint: Endpoint, level: float) -> Interval:
    """Mean of a strategy's endpoint with its interval over patients and seeds; nan in a hole.

    Args:
        scores: the runs.
        method: the strategy.
        endpoint: the question.
        level: confidence.
    """
    values = table(scores, method, endpoint, method.seeds)
    bounds = None if endpoint is KEPT else (0.0, 1.0)
    return macro_interval(values, level=level, bounds=bounds) if values else Interval()


def tested_patients(scores: Scores) -> str:
    """Test cases of each eval set, and how many patients count after the last step, in words.

    Args:
        scores: the runs.
    """
    said = []
    tables = [table(scores, m, FINAL, m.seeds) for m in scores.strategies]
    for source in scores.homes:
        listed = scores.patients[source]
        tested = [part.n for t in tables for part in strata(t) if part.name == source]
        counted = max(tested, default=len(listed))
        text = f"{scores.scans[source]} {source}"
        if scores.scans[source] != len(listed):
            text += f" of {len(listed)} patients"
        if counted < len(listed):
            text += f", of which {counted} hold a structure that counts there"
        said.append(text)
    return "; ".join(said)


def structures_of(scores: Scores, endpoint: Endpoint) -> list[str]:
    """The structures that take part in an endpoint."""
    return list(_steps(scores, endpoint)[0])


def asked(scores: Scores, endpoints: Sequence[Endpoint] = ENDPOINTS) -> tuple[Endpoint, ...]:
    """The endpoints that a course has: all have structures, and of one step there is the first.

    A course whose later steps only teach again has no new structures to ask for.

    Args:
        scores: the runs.
        endpoints: which questions, the one after the last step first.
    """
    first, *others = endpoints
    more = (e for e in others if scores.last > 1 and _steps(scores, e)[0])
    return (first, *more)


def _steps(scores: Scores, endpoint: Endpoint) -> tuple[dict[str, int], dict[str, int]]:
    """Structure → step after which its Dice counts, and the same of what is taken off."""
    learned_at, last = scores.learned_at, scores.last
    old = {c: step for c, step in learned_at.items() if step < last}
    return {
        "final": (dict.fromkeys(learned_at, last), {}),
        "kept": (dict.fromkeys(old, last), old),
        "new": ({c: step for c, step in learned_at.items() if step >= 2}, {}),
    }[endpoint.name]


def hole(scores: Scores, method: StrategyScores, endpoint: Endpoint) -> str:
    """Why a strategy has no such number, in words; empty = it has one.

    Args:
        scores: the runs of a benchmark.
        method: one strategy of it.
        endpoint: the question.
    """
    at, minus = _steps(scores, endpoint)
    why = method.hole((c, sides[c]) for c in at for sides in (at, minus) if c in sides)
    return f"{method.label}: {why}" if why else ""


def shared_first(a: StrategyScores, b: StrategyScores, seeds: tuple[int, ...]) -> bool:
    """Whether two strategies have one and the same first step, at every seed.

    Args:
        a: one strategy.
        b: the other.
        seeds: seeds that both have.
    """
    return bool(seeds) and all(a.first_step(s) == b.first_step(s) for s in seeds)


def torn_first(a: StrategyScores, b: StrategyScores, seeds: tuple[int, ...]) -> list[int]:
    """Seeds at which two strategies name one first step, and score differently after it.

    Args:
        a: one strategy.
        b: the other.
        seeds: seeds that both have.
    """
    firsts = {s: (a.first_step(s), b.first_step(s)) for s in seeds}
    return [s for s, (x, y) in firsts.items() if x.name == y.name and x != y]
