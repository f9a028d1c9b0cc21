"""What a scored run knows beside Dice: distances in mm, volumes, and whether tumors were found.

Computed from the rows that `clbench score` added; a metric that was not
scored has no column. A number of which test cases are missing is a hole, never one of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.evaluation.metrics import continual
from clbench.report.scores import Run, count_patients, read_frame, test_cases, title_of
from clbench.report.tables.render import EMPTY, Table, number
from clbench.statistics.intervals import Interval, wilson

if TYPE_CHECKING:
    import pandas as pd

DETECTION = ("lesion_", "patient_positive")
"""How the names of metrics begin that count lesions and patients."""

ASSD_NOTE = (
    "assd: average symmetric surface distance, pooled; a missed structure has none, so its mean is "
    "over the cases that are not missed."
)


ASD_BSP_NOTE = (
    "asd_bsp: BSP's average surface distance, for its tables alone, in voxels of the model's grid "
    "(1.5 mm there), not in mm; cases in which the structure is missed are dropped."
)


def score_report(folder: Path) -> list[Table]:
    """Two tables of one run, after its last scored step: distances, and detection.

    Raises:
        StoreError: missing or damaged files.
    """
    run = Run.read(folder)
    frame = read_frame([run])
    rows = frame[frame["scoring"] == "strict"]
    last = int(rows["step"].max()) if len(rows) else 0
    steps = run.record.course.steps
    home = {c: step.source for step in steps[:last] for c in step.learns}
    rows = rows[(rows["step"] == last) & (rows["eval_set"] == rows["structure"].map(home))]
    title = (
        f"{title_of(run.record)}: {run.record.strategy}, seed {run.record.seed}, after step {last}"
    )
    missing = _missing(rows, home, test_cases(run.record))
    sources = [step.source for step in steps]
    tables = [_distances(title, rows, list(home), sources, missing)]
    counted = rows[rows["metric"].str.startswith(DETECTION)]
    lesions = [c for c in home if (counted["structure"] == c).any()]
    if lesions:
        tables.append(_detection(title, counted, lesions, missing))
    return tables


def _missing(
    rows: pd.DataFrame, home: Mapping[str, str], tests: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], str]:
    """(structure, metric) → which test cases have no score of it, in words.

    Args:
        rows: after the step that is looked at, each structure on its own eval set.
        home: structure → eval set.
        tests: eval set → test cases.
    """
    dice = rows[rows["metric"] == "dice"]
    missing = {}
    for name, eval_set in home.items():
        own = rows[rows["structure"] == name]
        unlabeled = dice.loc[
            (dice["structure"] == name) & (dice["status"] == "not_annotated"), "case"
        ]
        for metric in dict.fromkeys(("dice", *own["metric"])):
            of_metric = own[own["metric"] == metric]
            lost = (of_metric["status"] == "ok") & of_metric["value"].isna()
            known = {*of_metric.loc[~lost, "case"], *unlabeled}
            if why := cases_missing(tests[eval_set], known, eval_set):
                missing[name, metric] = why
    return missing


def cases_missing(due: Sequence[str], known: Container[str], eval_set: str) -> str:
    """`2 of 12 test cases missing (btcv/103, …)`; empty = none is.

    Args:
        due: cases that should have a score, in order.
        known: those that have one, or need none.
        eval_set: whose cases.
    """
    lacking = [case for case in due if case not in known]
    if not lacking:
        return ""
    more = ", …" if len(lacking) > 1 else ""
    return f"{len(lacking)} of {len(due)} test cases missing ({eval_set}/{lacking[0]}{more})"


def _holes(missing: Mapping[tuple[str, str], str]) -> list[str]:
    """One line per structure and reason: which metrics are holes.

    Args:
        missing: see `_missing`.
    """
    metrics: dict[tuple[str, str], list[str]] = {}
    for (name, metric), why in missing.items():
        metrics.setdefault((name, why), []).append(metric)
    return [f"hole: {name}, {', '.join(sorted(of))}: {why}" for (name, why), of in metrics.items()]


def _distances(
    title: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    sources: Sequence[str],
    missing: Mapping[tuple[str, str], str],
) -> Table:
    """Means of every metric but those of detection; a column each.

    Args:
        title: of the run.
        rows: see `_missing`.
        names: structures.
        sources: of the steps.
        missing: see `_missing`.
    """
    rows = rows[~rows["metric"].str.startswith((*DETECTION, "dice_ceiling"))]
    metrics = sorted(rows["metric"].unique())
    by_patient = rows.groupby(["structure", "metric", "patient"])["value"].mean()
    means = by_patient.groupby(level=["structure", "metric"]).mean()
    dice = rows[rows["metric"] == "dice"]
    cases = dice["value"].notna().groupby(dice["structure"]).sum()
    missed = dice["status"].eq("fn_only").groupby(dice["structure"]).sum()
    return Table(
        title=f"{title}: means over patients that hold the structure (strict)",
        columns=("structure", "cases", "missed", *metrics),
        rows=tuple(
            (
                name,
                *(str(int(count.get(name, 0))) for count in (cases, missed)),
                *(
                    number(
                        math.nan
                        if (name, metric) in missing
                        else means.get((name, metric), math.nan),
                        3 if metric.startswith(("dice", "nsd")) else 1,
                    )
                    for metric in metrics
                ),
            )
            for name in names
        ),
        notes=(
            (
                "nsd: surface Dice at the named tolerance. hd95: larger of the two directed 95th "
                "percentiles; a missed structure counts with the diagonal of its image."
            ),
            *((ASSD_NOTE,) if "assd_mm" in metrics else ()),
            *((ASD_BSP_NOTE,) if "asd_bsp" in metrics else ()),
            (
                "volume_error: predicted minus true. Each structure on test cases of the source "
                f"that taught it ({', '.join(dict.fromkeys(sources))})."
            ),
            *_holes({key: why for key, why in missing.items() if key[1] in {"dice", *metrics}}),
        ),
    )


def _detection(
    title: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    missing: Mapping[tuple[str, str], str],
) -> Table:
    """Whether tumors were found: a line per structure and smallest size of a positive patient.

    Args:
        title: of the run.
        rows: of metrics of detection, see `_missing`.
        names: structures that have any.
        missing: see `_missing`.
    """
    from clbench.evaluation.metrics.detection import CONNECTIVITY, MATCH, Lesions

    rows = rows[rows["status"] != "not_annotated"]
    of_lesions = rows.groupby(["structure", "metric"])["value"].agg(["sum", "size"])
    of_patients = count_patients(rows, ["structure", "metric"])
    lines = []
    for name in names:
        total, cases = (
            {k: int(of_lesions[what].get((name, f"lesion_{k}"), 0))
             for k in ("truth", "found", "pred", "false")}
            for what in ("sum", "size")
        )  # fmt: skip
        holes = {metric for of, metric in missing if of == name}
        no_lesions = any(metric.startswith("lesion_") for metric in holes)
        lesion_cells = (EMPTY,) * 4 if no_lesions else (
            _share(total["found"], total["truth"]),
            _share(total["pred"] - total["false"], total["pred"]),
            number(Lesions(**total, largest_pred_vox=0).f1),
            number(total["false"] / cases["false"] if cases["false"] else math.nan, 2),
        )  # fmt: skip
        counts = of_patients.query("structure == @name").droplevel("structure")
        sizes = [m for m in counts.index if m.startswith("patient_positive")]
        for metric in sizes or [""]:
            tp, tumors, tn, clear = counts.loc[metric] if metric else (0, 0, 0, 0)
            rates = ((tp, tumors, wilson(tp, tumors)), (tn, clear, wilson(tn, clear)))
            lines.append(
                (
                    name,
                    metric.removeprefix("patient_positive").strip("_") or "any voxel",
                    *((EMPTY,) * 3 if metric in holes else _patient_cells(rates)),
                    *lesion_cells,
                )
            )
    return Table(
        title=f"{title}: detection",
        columns=(
            "structure", "positive from", "patients: sensitivity", "specificity", "harmonic mean",
            "lesions: sensitivity", "PPV", "F1", "false per case",
        ),
        rows=tuple(lines),
        keys=2,
        notes=(
            ("patients: positive when a predicted lesion has the size named; Wilson 95 % "
            "intervals; harmonic mean of the two as in the paper's Table 6."),
            (f"lesions: {CONNECTIVITY}-connected, matched by {MATCH}, pooled over cases; "
            "specificity is not defined for lesions."),
            *_holes({key: why for key, why in missing.items() if key[1].startswith(DETECTION)}),
        ),
    )  # fmt: skip


def _patient_cells(rates: Sequence[tuple[int, int, Interval]]) -> tuple[str, ...]:
    """Sensitivity and specificity with their intervals, and their harmonic mean.

    Args:
        rates: patients that were told right, patients, their share; with a tumor, then without.
    """
    shares = (_share(k, n) + (f" [{r.low:.3f}, {r.high:.3f}]" if n else "") for k, n, r in rates)
    return (*shares, number(continual.harmonic(*(r.estimate for _, _, r in rates))))


def _share(k: int, n: int) -> str:
    return f"{k}/{n} = {k / n:.3f}" if n else f"0/0 = {EMPTY}"
