"""Agreement: what runs of one table must say alike, beside their settings: patients, and step 1.

Room: row 5 (no torch). Who is behind a test case is recorded by the run. Two runs that name one
checkpoint of step 1 are believed only where they also score alike after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.errors import StoreError
from clbench.store import Score

if TYPE_CHECKING:
    from clbench.report.runs import Group


def patients_of(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Who is behind each test case that is no patient by itself: "source/case" → patient.

    Records of earlier versions do not say; they take what the others say about the same cases.

    Raises:
        StoreError: two runs name different patients for one case.
    """
    found: dict[str, str] = {}
    for record in records:
        for case, patient in record["course"].get("patient_of", {}).items():
            if found.setdefault(case, patient) != patient:
                raise StoreError(
                    "two runs name different patients for one test case",
                    where=f"{record['strategy']}/{record['run_id']}, {case}",
                    expected=found[case],
                    got=patient,
                    next_step="keep them in different results folders (--out, --results)",
                )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """Where a run starts from; equal ones are one and the same training."""

    name: str
    """Of the checkpoint, which strategies may share."""
    scores: str
    """Checksum of all scores after step 1."""


def first_step(rows: Iterable[Score], name: str, scoring: str) -> FirstStep:
    """The first step of a run, from its checkpoint's name and what it scored."""
    seen = sorted(
        f"{r.eval_set}/{r.case} {r.structure} {r.value!r} {r.status}"
        for r in rows
        if r.step == 1 and r.scoring == scoring and r.measures("dice")
    )
    return FirstStep(name=name, scores=hashlib.sha256("\n".join(seen).encode()).hexdigest())


def torn(a: Sequence[FirstStep | None], b: Sequence[FirstStep | None]) -> list[int]:
    """Places at which two runs name one checkpoint of step 1, and score differently after it."""
    return [
        i
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if x is not None and y is not None and x.name == y.name and x != y
    ]


def torn_notes(groups: Sequence[Group]) -> list[str]:
    """One line per seed and checkpoint of step 1 whose runs do not score alike after it."""
    by_name: dict[tuple[int, str], dict[str, list[str]]] = {}
    for g in groups:
        for seed, first in zip(g.seeds, g.first_step, strict=True):
            by_name.setdefault((seed, first.name), {}).setdefault(first.scores, []).append(g.label)
    return [
        f"not shared: {' and '.join(', '.join(labels) for labels in by_scores.values())} name one "
        f"checkpoint of step 1 (seed {seed}) but score differently after it: step 1 counts as "
        "theirs alone; run them again with --fresh"
        for (seed, _), by_scores in by_name.items()
        if len(by_scores) > 1
    ]
