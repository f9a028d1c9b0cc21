"""Tumor detection in the layout of the paper's Table 6, and distances beside Dice.

Made from the rows that `clbench score` adds to a run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from clbench.evaluation.metrics import continual
from clbench.report.paper.printed import published, published_table
from clbench.report.scores import Scores, count_patients, on_phantom, rows_of, test_cases
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, Table, long_table, number
from clbench.report.tables.rescored import cases_missing
from clbench.spec.taxonomy import structure
from clbench.statistics.intervals import wilson

if TYPE_CHECKING:
    import pandas as pd

TUMORS = ("liver", "kidney", "pancreas")
_PRINTED = ("sensitivity", "specificity", "harmonic_reported")
"""Printed numbers, as the columns of the file are called."""
NOT_SCORED = "not scored"
SCORE_FIRST = "not scored yet: clbench score RUN adds the rows to a finished run"


def table6(study: Study, *, source: str) -> Table:
    """Sensitivity, specificity and their harmonic mean, in percent.

    Args:
        study: the runs; not looked at for `printed`.
        source: `printed`, `measured` or `both`.

    Raises:
        StoreError: the measured runs do not belong in one table.
    """
    printed, measured = source != "measured", source != "printed"
    scores = study.scores(scoring="strict") if measured else None
    rows = _printed_rows() if printed else []
    notes, long = [], published_table(6)
    if printed:
        notes += [
            "p: printed in the paper, not measured; n is not printed",
            "n implied, with / without tumor: liver 36 / 20, kidney 96 / 20, pancreas 83 / 80",
        ]
    if measured:
        lines: list[tuple[object, ...]] = []
        holes: list[str] = []
        own = _measured_rows(study, scores, lines, holes, both=printed) if scores else []
        rows += own
        notes += [
            (
                "m: measured after the last step; percent, (k/n, k averaged over seeds), "
                f"[Wilson {study.protocol.percent}]"
            ),
            "positive: any predicted voxels of tumor; choose it on validation cases",
            "harmonic: 2 Sen Spec / (Sen + Spec)",
            *(() if own else ("no finished run",)),
            *(
                (SCORE_FIRST,)
                if own and all(h.endswith(NOT_SCORED) for h in holes) and not lines
                else holes
            ),
            *(scores.without_row() if scores else ()),
        ]
        counts = "method tumor seed true_positive with_tumor true_negative without_tumor"
        long = (
            long_table(
                f"origin {counts} {' '.join(_PRINTED)}",
                [
                    *(
                        ("printed", c["method"], c["tumor"], *("",) * 5, *(c[k] for k in _PRINTED))
                        for c in published(6)
                    ),
                    *(("measured", *line, *("",) * len(_PRINTED)) for line in lines),
                ],
            )
            if printed
            else long_table(counts, lines)
        )
    origin = {"printed": "printed in the paper", "both": "printed (patients) and measured"}
    return Table(
        title=f"Table 6, tumor detection: {origin.get(source, source)}{on_phantom(scores)}",
        columns=("method", "seeds", *("Sen.", "Spec.", "Harm.") * 3),
        over=("", "", *(f"{t.capitalize()} tumor" for t in TUMORS for _ in range(3))),
        rows=tuple(rows),
        keys=2,
        narrow=3,
        notes=tuple(notes),
        long=long,
    )


def _printed_rows() -> list[tuple[str, ...]]:
    texts: dict[str, dict[str, list[str]]] = {}
    for cell in published(6):
        texts.setdefault(cell["method"], {})[cell["tumor"]] = [
            f"{cell[k]} p" if cell[k] else EMPTY for k in _PRINTED
        ]
    return [(m, "", *(x for tumor in TUMORS for x in row[tumor])) for m, row in texts.items()]


def _measured_rows(
    study: Study,
    scores: Scores,
    long: list[tuple[object, ...]],
    holes: list[str],
    *,
    both: bool,
) -> list[tuple[str, ...]]:
    """A row per strategy.

    Args:
        study: the runs.
        scores: their Dice.
        long: a line per tumor and seed is added to it.
        holes: a line per seed in which test cases were not called is added to it.
        both: printed rows stand in the same table.
    """
    calls = rows_of(study.frame, scoring="strict", metric="patient_positive")
    home = calls["structure"].map(scores.reference.home)
    calls = calls[(calls["step"] == scores.last) & (calls["eval_set"] == home)]
    counts = count_patients(calls[calls["gt_vox"].notna()], ["run", "structure"])
    place = {run.folder: i for i, run in enumerate(study.finished)}
    rows = []
    for s in scores.strategies:
        label = s.label + (" (PHANTOM)" if both and not s.records[0].patients else "")
        row = [label, str(len(s.runs))]
        for tumor in TUMORS:
            name = f"{tumor}_tumor"
            each = [(place[run.folder], name) for run in s.runs]
            missing = [_missing(study, scores, calls, i, name) for i, _ in each]
            if lacking := [
                f"seed {n}: {why}" for n, why in zip(s.seeds, missing, strict=True) if why
            ]:
                holes += [f"hole: {label}, {tumor} tumor, {line}" for line in lacking]
            if lacking or not set(each) <= set(counts.index):
                row += [EMPTY] * 3
                continue
            own = counts.loc[each]
            for seed, line in zip(s.seeds, own.to_numpy(), strict=True):
                long.append((label, tumor, seed, *line))
            row += _rates(own.mean(), study)
        rows.append(tuple(row))
    return rows


def _missing(study: Study, scores: Scores, calls: pd.DataFrame, run: int, tumor: str) -> str:
    """Which test cases of a run have no call; empty = all have one, or none is to have one.

    A case that does not annotate the tumor is not due: its row of Dice says so.

    Args:
        study: the runs.
        scores: their Dice.
        calls: rows of `patient_positive` after the last step.
        run: position of the run.
        tumor: the structure.
    """
    if tumor not in scores.learned_at:
        return ""
    home = scores.home(tumor)
    own = calls[(calls["run"] == run) & (calls["structure"] == tumor)]
    if own.empty:
        return NOT_SCORED
    dice = rows_of(study.frame, scoring="strict", metric="dice")
    dice = dice[
        (dice["run"] == run)
        & (dice["structure"] == tumor)
        & (dice["step"] == scores.last)
        & (dice["eval_set"] == home)
    ]
    known = {*own["case"], *dice.loc[dice["status"] == "not_annotated", "case"]}
    return cases_missing(test_cases(study.finished[run].record)[home], known, home)


def _rates(mean: pd.Series[float], study: Study) -> list[str]:
    """Sensitivity, specificity and their harmonic mean, from counts averaged over seeds."""
    texts, shares = [], []
    for right, of in (("true_positive", "with_tumor"), ("true_negative", "without_tumor")):
        k, n = float(mean[right]), round(mean[of])
        i = wilson(k, n, level=study.protocol.level)
        count = f"{k:g}" if k == round(k) else f"{k:.1f}"
        ends = f"{100 * i.low:.1f}–{100 * i.high:.1f}"
        texts.append(f"{100 * i.estimate:.2f} m ({count}/{n}) [{ends}]" if n else EMPTY)
        shares.append(i.estimate)
    harmonic = continual.harmonic(*shares)
    return [*texts, EMPTY if math.isnan(harmonic) else f"{100 * harmonic:.2f} m"]


def _distance_notes(nsd: Scores | None, hd95: Scores | None) -> list[str]:
    """What is missing of either metric; a hole of one of them alone names it."""
    if nsd is None or hd95 is None:
        return ["no finished run"]
    of_nsd, of_hd95 = nsd.notes(), hd95.notes()
    lines = [line if line in of_hd95 else _of_metric("NSD", line) for line in of_nsd]
    return lines + [_of_metric("HD95", line) for line in of_hd95 if line not in of_nsd]


def _of_metric(metric: str, line: str) -> str:
    """`hole: HD95 of mib, …` from `hole: mib, …`."""
    return line.replace("hole: ", f"hole: {metric} of ", 1)


def distances(study: Study) -> Table:
    """Surface Dice and HD95 after the last step, per strategy and group, with counts of misses.

    Raises:
        StoreError: the runs do not belong in one table.
    """
    nsd, hd95 = (study.scores(scoring="strict", metric=m) for m in ("nsd", "hd95_mm"))
    rows, long = [], []
    names = nsd.means if nsd else {}
    for one, other in zip(
        nsd.strategies if nsd else (), hd95.strategies if hd95 else (), strict=True
    ):
        last, texts = len(one.runs[0].record.course.steps), []
        for group, members in names.items():
            of_members = [other.cells[last, other.home[c], c] for c in members]
            missed = sum(int(x.missed.sum()) for x in of_members)
            cases = sum(int(x.cases.sum()) for x in of_members)
            distance = other.over_seeds(last, members)[0]
            texts += [
                number(one.over_seeds(last, members)[0]),
                number(distance, 1),
                EMPTY if math.isnan(distance) else f"{missed}/{cases}",
            ]
            for i, seed in enumerate(one.seeds):
                means = (
                    continual.mean(each.r[i].get((last, c), math.nan) for c in members)
                    for each in (one, other)
                )
                counts = (sum(int(n[i]) for n in of) for of in (
                    [x.missed for x in of_members], [x.cases for x in of_members]))  # fmt: skip
                long.append((one.label, group, seed, *means, *counts))
        rows.append((one.label, str(len(one.runs)), *texts))
    empty = nsd is not None and all(c == EMPTY for row in rows for c in row[2:])
    tolerances = sorted({structure(c).tolerance_mm for m in names.values() for c in m})
    return Table(
        title=f"{study.bench}: distances after the last step" + on_phantom(nsd),
        columns=("strategy", "seeds", *("NSD", "HD95 mm", "missed") * len(names)),
        over=("", "", *(f"{n} ({len(m)})" for n, m in names.items() for _ in range(3))),
        rows=tuple(rows),
        keys=2,
        narrow=6,
        notes=(
            "strict scoring (native grid); mean over seeds of means over structures, over cases",
            f"NSD: surface Dice at {' or '.join(f'{t:g}' for t in tolerances)} mm; a miss counts 0",
            "HD95: a miss is the diagonal of the image; missed: k of n cases, all seeds",
            *((SCORE_FIRST,) if empty else ()),
            *(() if empty else _distance_notes(nsd, hd95)),
        ),
        long=long_table("strategy group seed nsd hd95_mm missed cases", long),
    )
