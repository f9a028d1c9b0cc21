"""What a scored run knows beside Dice: distances in mm, volumes, and whether tumors were found.

Computed from the rows that `clbench score` added; a metric that was not
scored has no column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.evaluation.metrics import continual
from clbench.report.scores import Run, read_frame, title_of
from clbench.report.tables.render import EMPTY, Table, number

if TYPE_CHECKING:
    import pandas as pd

    from clbench.statistics.intervals import Interval

DETECTION = ("lesion_", "patient_positive")
"""How the names of metrics begin that count lesions and patients."""

ASSD_NOTE = (
    "assd: average symmetric surface distance, pooled; a missed structure has none, so its mean is "
    "over the cases that are not missed."
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
    tables = [_distances(title, rows, list(home), [step.source for step in steps])]
    counted = rows[rows["metric"].str.startswith(DETECTION)]
    lesions = [c for c in home if (counted["structure"] == c).any()]
    if lesions:
        tables.append(_detection(title, counted, lesions))
    return tables


def _distances(
    title: str, rows: pd.DataFrame, names: Sequence[str], sources: Sequence[str]
) -> Table:
    rows = rows[~rows["metric"].str.startswith((*DETECTION, "dice_ceiling"))]
    metrics = sorted(rows["metric"].unique())
    by_patient = rows.groupby(["structure", "metric", "patient"], sort=False)["value"].mean()
    plain = rows[rows["metric"] == "dice"]
    lines = []
    for name in names:
        means = [
            continual.mean(by_patient.get((name, metric), by_patient.iloc[:0]).dropna())
            for metric in metrics
        ]
        own = plain[plain["structure"] == name]
        lines.append(
            (
                name,
                str(int(own["value"].notna().sum())),
                str(int((own["status"] == "fn_only").sum())),
                *(
                    number(value, 3 if metric.startswith(("dice", "nsd")) else 1)
                    for metric, value in zip(metrics, means, strict=True)
                ),
            )
        )
    return Table(
        title=f"{title}: means over patients that hold the structure (strict)",
        columns=("structure", "cases", "missed", *metrics),
        rows=tuple(lines),
        notes=(
            (
                "nsd: surface Dice at the named tolerance. hd95: larger of the two directed 95th "
                "percentiles; a missed structure counts with the diagonal of its image."
            ),
            *((ASSD_NOTE,) if "assd_mm" in metrics else ()),
            (
                "volume_error: predicted minus true. Each structure on test cases of the source "
                f"that taught it ({', '.join(dict.fromkeys(sources))})."
            ),
        ),
    )


def _detection(title: str, rows: pd.DataFrame, names: Sequence[str]) -> Table:
    from clbench.evaluation.metrics import detection
    from clbench.evaluation.metrics.detection import CONNECTIVITY, MATCH

    rows = rows[rows["status"] != "not_annotated"]
    lines = []
    for name in names:
        mine = rows[rows["structure"] == name]
        by_metric = {str(metric): own for metric, own in mine.groupby("metric")}
        values = {metric: own["value"] for metric, own in by_metric.items()}
        counts = {
            k: int(values[f"lesion_{k}"].sum()) if f"lesion_{k}" in values else 0
            for k in ("truth", "found", "pred", "false")
        }
        pooled = detection.Lesions(**counts, largest_pred_vox=0)
        cases = len(values.get("lesion_false", ()))
        lesion_cells = (
            _share(counts["found"], counts["truth"]),
            _share(counts["pred"] - counts["false"], counts["pred"]),
            number(pooled.f1),
            number(counts["false"] / cases if cases else math.nan, 2),
        )
        sizes = sorted(m for m in by_metric if m.startswith("patient_positive"))
        for metric in sizes or [""]:
            own = by_metric.get(metric, rows.iloc[:0])
            calls = zip(own["patient"], own["gt_vox"] > 0, own["value"] > 0, strict=True)
            seen = detection.patient_level(detection.by_patient(calls))
            lines.append(
                (
                    name,
                    metric.removeprefix("patient_positive").strip("_") or "any voxel",
                    _rate(seen.sensitivity),
                    _rate(seen.specificity),
                    number(seen.harmonic),
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
        ),
    )  # fmt: skip


def _share(k: int, n: int) -> str:
    return f"{k}/{n} = {k / n:.3f}" if n else f"0/0 = {EMPTY}"


def _rate(rate: Interval) -> str:
    if rate.n == 0:
        return f"0/0 = {EMPTY}"
    k = round(rate.estimate * rate.n)
    return f"{k}/{rate.n} = {rate.estimate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
