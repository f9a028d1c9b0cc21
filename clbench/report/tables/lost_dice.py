"""Where the lost Dice went, as tables: by cause, and by the structure that is predicted instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

from clbench.evaluation.explained import (
    COLUMNS,
    DICES,
    FILE,
    HEAD_BODY_COLUMNS,
    HEAD_BODY_FILE,
    HeadBody,
    HeadBodyRow,
    LostDice,
    LostDiceRow,
    main_of,
    read_head_body,
    read_lost_dice,
    summarize,
    summarize_head_body,
)
from clbench.evaluation.metrics.continual import mean
from clbench.evaluation.metrics.lost_dice import CAUSES
from clbench.report.scores import Run, title_of
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, Table, long_table, number
from clbench.store.record import RunRecord

NAMED = 3
"""So many structures are named that voxels went to."""
NOTES = (
    (
        "lost: Dice after the structure's own step minus Dice after the later step, mean over the "
        "test cases that hold it (strict). The causes add up to it."
    ),
    (
        "missed whole: nothing of the structure is predicted any more. background: predicted as "
        "nothing else, beyond the border. border: a thin layer lost or added. confused: called "
        "another structure, or another one called it. false alarm: predicted where no structure "
        "is. mended: earlier errors that are gone."
    ),
    (
        "border: at most the tolerance of surface Dice, or one voxel's diagonal of the model's "
        "grid if that is more. Definitions: `clbench/evaluation/metrics/lost_dice.py`."
    ),
)
"""What the numbers are."""
MODEL_NOTES = (
    (
        "Dice on the test cases that hold the structure (strict). Old: after the structure's own "
        "step; new: after the later one. lost = by the head + by the body (Shapley value of "
        "exchanging each of them)."
    ),
    (
        "probe: a linear classifier of the body's last feature map, fitted on training cases of "
        "the structure's own step; a diagnosis, no part of any training. Where it keeps its Dice "
        "on the new body, the body still tells the structure apart."
    ),
)
"""What the numbers of heads and bodies are."""


HEAD_BODY = (
    "by the head",
    "by the body",
    "old head, new body",
    "new head, old body",
    "probe, old body",
    "probe, new body",
)
LOST_BY = (*HEAD_BODY[:2], "lost by a probe")
Result = TypeVar("Result", LostDice, HeadBody)


def lost_dice_tables(
    record: RunRecord, rows: Sequence[LostDiceRow], model_rows: Sequence[HeadBodyRow] = ()
) -> list[Table]:
    """Causes, what the voxels are called instead, and head or body, of one run.

    Args:
        record: of the run.
        rows: its `lost_dice.csv`.
        model_rows: its `head_body.csv`; no table without.
    """
    order = record.course.structures.index
    losses = summarize(rows, record.course.patient_of)
    losses.sort(key=lambda one: (one.step, order(one.structure)))
    title = f"{title_of(record)}: {record.strategy}, seed {record.seed}"
    causes = Table(
        title=f"{title}: where the lost Dice went",
        columns=("structure", "after step", "cases", "lost", *CAUSES, "main cause"),
        rows=tuple(_causes(losses)),
        notes=NOTES,
        keys=2,
        long=_whole(COLUMNS, rows),
    )
    instead = Table(
        title=f"{title}: what lost voxels are called instead",
        columns=("structure", "after step", "voxels lost", "of the truth", "called"),
        rows=tuple(map(_instead, losses)),
        notes=(
            (
                "Voxels of the file's grid that were right after the structure's own step and are "
                f"missed now, all test cases together; the {NAMED} largest shares."
            ),
        ),
        keys=2,
    )
    if not model_rows:
        return [causes, instead]
    parts = summarize_head_body(model_rows, record.course.patient_of)
    parts.sort(key=lambda one: (one.step, order(one.structure)))
    models = Table(
        title=f"{title}: head or body",
        columns=("structure", "after step", "lost", *HEAD_BODY),
        rows=tuple(
            (name, step, *map(number, values)) for name, step, _, values in _lines(parts, _model)
        ),
        notes=MODEL_NOTES,
        keys=2,
        long=_whole(HEAD_BODY_COLUMNS, model_rows),
    )
    return [causes, instead, models]


def _whole(columns: Sequence[str], rows: Iterable[object]) -> Table:
    """The rows as their file holds them."""
    lines = tuple(tuple(str(getattr(row, name)) for name in columns) for row in rows)
    return Table(title="", columns=tuple(columns), rows=lines)


def _lines(
    results: Iterable[Result], numbers: Callable[[Result], Sequence[float]]
) -> Iterator[tuple[str, str, Sequence[Result], Sequence[float]]]:
    """Numbers of each structure and step, and the class means of each teaching step.

    Args:
        results: of one step after the other, in the order of the course.
        numbers: those of a structure.

    Returns:
        Name, step, the structures it is of, the numbers.
    """
    for (step, learned_at), group in groupby(results, attrgetter("step", "learned_at")):
        members = list(group)
        values = [numbers(one) for one in members]
        for one, own in zip(members, values, strict=True):
            yield one.structure, str(step), [one], own
        if len(members) > 1:
            means = [mean(column) for column in zip(*values, strict=True)]
            yield f"mean of step {learned_at}", str(step), members, means


def _causes(losses: Iterable[LostDice]) -> Iterator[tuple[str, ...]]:
    """A line per structure and step, and the class mean of the structures of each teaching step."""
    values_of = _lines(losses, lambda one: [one.lost, *one.causes().values()])
    for name, step, members, values in values_of:
        cases = str(members[0].cases) if len(members) == 1 else EMPTY
        main = main_of(dict(zip(CAUSES, values[1:], strict=True)))
        yield (name, step, cases, *map(number, values), main or EMPTY)


def _model(one: HeadBody) -> list[float]:
    return [one.lost, one.head, one.body, *(one.dice[kind] for kind in DICES[2:])]


def explained_runs(study: Study) -> list[tuple[str, Run]]:
    """(label, run) of the finished runs that `clbench explain` was called for."""
    return [
        (method.label, run)
        for method in study.dice.strategies
        for run in method.runs
        if (run.folder / FILE).is_file()
    ]


def lost_dice_table(study: Study) -> Table:
    """Causes, and head or body, of every strategy that was explained: after the last step.

    Raises:
        StoreError: no run was explained, or a file of one is damaged.
    """
    e, runs = study.dice, explained_runs(study)
    study.need(runs, "no run was explained", "call `clbench explain RUN` first")
    explained: list[str] = []
    lost: dict[tuple[str, str], dict[int, LostDice]] = {}
    parts: dict[tuple[str, str], dict[int, HeadBody]] = {}
    for label, run in runs:
        explained += [label] * (label not in explained)
        patient_of = run.record.course.patient_of
        for one in summarize(read_lost_dice(run.folder / FILE), patient_of):
            if one.step == e.last:
                lost.setdefault((label, one.structure), {})[run.record.seed] = one
        if (run.folder / HEAD_BODY_FILE).is_file():
            model_rows = read_head_body(run.folder / HEAD_BODY_FILE)
            for part in summarize_head_body(model_rows, patient_of):
                if part.step == e.last:
                    parts.setdefault((label, part.structure), {})[run.record.seed] = part
    rows = []
    long: list[tuple[object, ...]] = []
    fewer: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for label in explained:
        for name in e.learned_at:
            if own := lost.get((label, name)):
                causes = {cause: mean(o.causes()[cause] for o in own.values()) for cause in CAUSES}
                models = parts.get((label, name), {})
                if models and models.keys() != own.keys():
                    fewer.setdefault((label, tuple(models)), []).append(name)
                by_part = (
                    mean(getattr(p, kind) for p in models.values())
                    for kind in ("head", "body", "probe_lost")
                )
                numbers = map(number, [mean(o.lost for o in own.values()), *causes.values()])
                for seed, one in own.items():
                    of_seed = {"lost": one.lost, **one.causes()}
                    if (model := models.get(seed)) is not None:
                        of_parts = (model.head, model.body, model.probe_lost)
                        of_seed |= dict(zip(LOST_BY, of_parts, strict=True))
                    long += [(label, name, seed, what, value) for what, value in of_seed.items()]
                named = (label, name, _listed(own))
                rows.append((*named, *numbers, main_of(causes) or EMPTY, *map(number, by_part)))
    absent = [m.label for m in e.strategies if m.label not in explained]
    return Table(
        title=f"{e.title()}: where the lost Dice went, after step {e.last}",
        columns=("strategy", "structure", "seeds", "lost", *CAUSES, "main cause", *LOST_BY),
        rows=tuple(rows),
        notes=(
            *NOTES,
            *MODEL_NOTES,
            "Means over the seeds that are named, of runs that `clbench explain` was called for"
            + (f"; it was not for {', '.join(absent)}." if absent else "."),
            *(
                f"{label}, {', '.join(names)}: by the head, by the body and lost by a probe are of "
                f"seed {_listed(having)} alone; the others have no {HEAD_BODY_FILE}."
                for (label, having), names in fewer.items()
            ),
        ),
        keys=2,
        long=long_table("strategy structure seed measure value", long),
    )


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _instead(one: LostDice) -> tuple[str, ...]:
    lost = sum(one.to.values())
    named = [f"{other} {voxels / lost:.0%}" for other, voxels in list(one.to.items())[:NAMED]]
    more = len(one.to) - NAMED
    return (
        one.structure,
        str(one.step),
        f"{lost:,}",
        f"{lost / one.truth_vox:.1%}",
        (", ".join(named) + (f", {more} more" if more > 0 else "")) or EMPTY,
    )
