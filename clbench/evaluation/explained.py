"""Rows of `clbench explain` in a run folder: where the lost Dice went, and head or body; by case.

`lost_dice.csv` holds the parts of `clbench.evaluation.metrics.lost_dice`, `head_body.csv` the Dice
of models put together from two steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.evaluation.metrics.continual import mean
from clbench.evaluation.metrics.lost_dice import CAUSES, MENDED, MISSED, PARTS, Attribution
from clbench.store import files
from clbench.store.csv_rows import read_rows, rows_bytes

FILE = "lost_dice.csv"
"""Name of the file of parts in a run folder."""
HEAD_BODY_FILE = "head_body.csv"
"""Name of the file of exchanged heads and bodies."""
FIGURES = "explain"
"""Folder of the figures in a run folder; no part of the run, `clbench verify` passes it over."""
TOTAL = "total"
"""The row of a case that the parts add up to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRow:
    """One structure of one test case, after one later step."""

    step: int
    """1-based step after which the model was examined; later than `learned_at`."""
    eval_set: str
    """Source of the test case: that of the step which taught the structure."""
    case: str
    """Case id."""
    structure: str
    """Canonical name."""
    learned_at: int
    """1-based step that taught it; the prediction after it is the one compared with."""

    def patient(self, patient_of: Mapping[str, str]) -> str:
        """Who is behind the case.

        Args:
            patient_of: "source/case" → patient; a case that is absent is a patient of its own id.
        """
        who = patient_of.get(f"{self.eval_set}/{self.case}", self.case)
        return f"{self.eval_set}/{who}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LostDiceRow(CaseRow):
    """One part of what one structure of one test case lost, after one later step."""

    part: str
    """One of `PARTS`, or `TOTAL`: the sum of them, which every case has."""
    other: str
    """The structure that the voxels went to or were taken from; `background`."""
    truth_vox: int
    """Voxels of the truth, above 0."""
    voxels: int
    """Change in wrong voxels; mended ones below 0."""
    dice: float
    """Dice lost by it; below 0: gained."""


COLUMNS = tuple(f.name for f in dataclasses.fields(LostDiceRow))
_CELL = attrgetter("step", "eval_set", "case", "structure")


def rows_of(
    attribution: Attribution, *, step: int, eval_set: str, case: str, name: str, learned_at: int
) -> list[LostDiceRow]:
    """The rows of an attribution, the total last.

    Args:
        attribution: of one structure in one case.
        step: the later step.
        eval_set: source of the case.
        case: its id.
        name: the structure.
        learned_at: step that taught it.
    """
    before, after = attribution.dice
    change = (
        attribution.after.missed_vox
        + attribution.after.false_vox
        - attribution.before.missed_vox
        - attribution.before.false_vox
    )
    dice_of = attribution.lost_dice()
    shares = {key: (voxels, dice_of[key]) for key, voxels in attribution.voxels.items()}
    return [
        LostDiceRow(
            step=step,
            eval_set=eval_set,
            case=case,
            structure=name,
            learned_at=learned_at,
            part=part,
            other=other,
            truth_vox=attribution.truth_vox,
            voxels=voxels,
            dice=dice,
        )
        for (part, other), (voxels, dice) in {
            **shares,
            (TOTAL, ""): (change, before - after),
        }.items()
    ]


def write_lost_dice(path: Path, rows: Iterable[LostDiceRow]) -> None:
    """Write `lost_dice.csv`: sorted; equal rows give equal bytes.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    order = (*PARTS, TOTAL)

    def key(row: LostDiceRow) -> tuple[Any, ...]:
        return (
            row.step, row.eval_set, row.case, row.learned_at, row.structure,
            order.index(row.part), row.other,
        )  # fmt: skip

    files.write_bytes(path, rows_bytes(COLUMNS, sorted(rows, key=key)))


def read_lost_dice(path: Path) -> list[LostDiceRow]:
    """Read `lost_dice.csv`.

    Raises:
        StoreError: missing, damaged, or parts that do not add up to their total.
    """
    again = "make it with `clbench explain RUN`"
    rows = read_rows(
        path,
        LostDiceRow,
        what="the parts of the lost Dice",
        next_step=again,
        allowed={"part": (*PARTS, TOTAL)},
    )
    parts: dict[Any, list[LostDiceRow]] = defaultdict(list)
    for row in rows:
        parts[_CELL(row)].append(row)
    for cell, own in parts.items():
        total = [r for r in own if r.part == TOTAL]
        rest = [r for r in own if r.part != TOTAL]
        voxels, dice = sum(r.voxels for r in rest), math.fsum(r.dice for r in rest)
        if (
            len(total) != 1
            or total[0].voxels != voxels
            or not math.isclose(total[0].dice, dice, abs_tol=1e-9)
        ):
            raise StoreError(
                "the parts of a case do not add up to its total",
                where=f"{path}, step {cell[0]}, {cell[1]}/{cell[2]}, {cell[3]}",
                expected=f"{voxels} voxels, Dice {dice!r}",
                got=", ".join(f"{r.voxels} voxels, Dice {r.dice!r}" for r in total) or "no total",
                next_step=again,
            )
    return rows


# ------------------------------------------------------------------------------------- summaries


def main_of(causes: Mapping[str, float]) -> str:
    """The cause with the largest share; "" where none is above 0."""
    name = max(causes, key=lambda cause: causes[cause])
    return name if causes[name] > 0 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureLoss:
    """One structure and one later step."""

    step: int
    """The later step."""
    structure: str
    """Canonical name."""
    learned_at: int
    """1-based step that taught it."""
    cases: int
    """Test cases that hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LostDice(StructureLoss):
    """What one structure lost by one later step: means over patients."""

    lost: float
    """Dice before − after, as in every table of scores."""
    parts: Mapping[str, float]
    """Part → its share of `lost`; all of `PARTS`."""
    truth_vox: int
    """Voxels of the truth, all cases together."""
    to: Mapping[str, int]
    """Other → voxels of the truth that were right and are now predicted as it."""

    def causes(self) -> dict[str, float]:
        """Each of `CAUSES` → its share of `lost`."""
        return {
            name: math.fsum(self.parts[part] for part in parts) for name, parts in CAUSES.items()
        }


def summarize(rows: Iterable[LostDiceRow], patient_of: Mapping[str, str] = {}) -> list[LostDice]:
    """What each structure lost by each later step, in order of steps.

    Args:
        rows: of one run.
        patient_of: "source/case" → patient; a case that is absent is a patient. A patient with
            several cases counts once, with their mean.
    """
    groups: dict[tuple[int, int, str], list[LostDiceRow]] = defaultdict(list)
    for row in rows:
        groups[row.step, row.learned_at, row.structure].append(row)
    losses = []
    for (step, learned_at, name), own in groups.items():
        totals = [r for r in own if r.part == TOTAL]
        patients: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for row in totals:
            patients[row.patient(patient_of)].append((row.eval_set, row.case))
        sums: dict[tuple[tuple[str, str], str], float] = defaultdict(float)
        to: dict[str, int] = defaultdict(int)
        for row in own:
            sums[(row.eval_set, row.case), row.part] += row.dice
            if row.part in MISSED and row.part not in MENDED:
                to[row.other] += row.voxels
        means = {
            part: mean(mean(sums[at, part] for at in cases) for cases in patients.values())
            for part in (*PARTS, TOTAL)
        }
        losses.append(
            LostDice(
                step=step,
                structure=name,
                learned_at=learned_at,
                cases=len(totals),
                lost=means.pop(TOTAL),
                parts=means,
                truth_vox=sum(r.truth_vox for r in totals),
                to=dict(sorted(to.items(), key=lambda item: (-item[1], item[0]))),
            )
        )
    return sorted(losses, key=attrgetter("step", "learned_at"))


# ---------------------------------------------------------------------------------- head and body


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBodyRow(CaseRow):
    """Dice of one structure of one test case under models put together from two steps.

    Old is the model after the step that taught the structure, new the one after the later step. Nan
    where a model could not be put together.
    """

    old: float
    """Old head on old body: the model after `learned_at`."""
    new: float
    """New head on new body: the model after `step`."""
    old_head_new_body: float
    """The old head reads the new body."""
    new_head_old_body: float
    """The new head reads the old body."""
    probe_old_body: float
    """A linear probe of the old body."""
    probe_new_body: float
    """A linear probe of the new body."""


HEAD_BODY_COLUMNS = tuple(f.name for f in dataclasses.fields(HeadBodyRow))
DICES = HEAD_BODY_COLUMNS[5:]
"""Columns that are Dice."""


def write_head_body(path: Path, rows: Iterable[HeadBodyRow]) -> None:
    """Write `head_body.csv`: sorted; equal rows give equal bytes.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    key = attrgetter("step", "eval_set", "case", "learned_at", "structure")
    files.write_bytes(path, rows_bytes(HEAD_BODY_COLUMNS, sorted(rows, key=key)))


def read_head_body(path: Path) -> list[HeadBodyRow]:
    """Read `head_body.csv`.

    Raises:
        StoreError: missing or damaged.
    """
    return read_rows(
        path,
        HeadBodyRow,
        what="the Dice of exchanged heads and bodies",
        next_step="make it with `clbench explain RUN`",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBody(StructureLoss):
    """What of a loss is due to the head and what to the body; means over patients.

    The loss old − new is divided by the Shapley value of two players, head and body, of which each
    is exchanged first once:

        body = ½ [(old − old_head_new_body) + (new_head_old_body − new)]
        head = ½ [(old − new_head_old_body) + (old_head_new_body − new)]

    so head + body = lost. A head that only works on the body it was trained with makes both
    mixtures bad; then both get their half.
    """

    dice: Mapping[str, float]
    """Each of `DICES`."""

    @property
    def lost(self) -> float:
        """Dice old − new."""
        return self.dice["old"] - self.dice["new"]

    @property
    def body(self) -> float:
        """The body's share of it; nan where head and body cannot be exchanged."""
        d = self.dice
        return ((d["old"] - d["old_head_new_body"]) + (d["new_head_old_body"] - d["new"])) / 2

    @property
    def head(self) -> float:
        """The head's share of it."""
        d = self.dice
        return ((d["old"] - d["new_head_old_body"]) + (d["old_head_new_body"] - d["new"])) / 2

    @property
    def probe_lost(self) -> float:
        """What a linear probe loses from the old to the new body; nan where there is none."""
        return self.dice["probe_old_body"] - self.dice["probe_new_body"]


def summarize_head_body(
    rows: Iterable[HeadBodyRow], patient_of: Mapping[str, str] = {}
) -> list[HeadBody]:
    """Means over patients, in order of steps.

    Args:
        rows: of one run.
        patient_of: as for `summarize`.
    """
    groups: dict[tuple[int, int, str], dict[str, list[HeadBodyRow]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        groups[row.step, row.learned_at, row.structure][row.patient(patient_of)].append(row)
    return [
        HeadBody(
            step=step,
            structure=name,
            learned_at=learned_at,
            cases=sum(map(len, patients.values())),
            dice={
                kind: mean(mean(getattr(r, kind) for r in own) for own in patients.values())
                for kind in DICES
            },
        )
        for (step, learned_at, name), patients in sorted(
            groups.items(), key=lambda item: item[0][:2]
        )
    ]
