"""What a scored run knows beside Dice: distances in mm, volumes, and whether tumors were found.

Computed from the rows that `clbench score` added; a metric that was not
scored has no column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.evaluation.metrics import continual
from clbench.report.results import PHANTOM, StoredRun
from clbench.report.tables.render import EMPTY, Table, number
from clbench.store.run_folder import Score

ASSD_NOTE = (
    "assd: average symmetric surface distance, pooled; a missed structure has none, so its mean is "
    "over the cases that are not missed."
)


def score_report(folder: Path) -> list[Table]:
    """Two tables of one run, after its last scored step: distances, and detection.

    Raises:
        StoreError: missing or damaged files.
    """
    stored = StoredRun.read(folder)
    record = stored.record
    rows = [r for r in stored.rows if r.scoring == "strict"]
    last = max((r.step for r in rows), default=0)
    steps = record["course"]["steps"]
    sources = [s["source"] for s in steps]
    home = [r for r in rows if r.step == last and r.eval_set == sources[r.learned_at - 1]]
    title = (
        f"{record['identity']['bench']} v{record['identity']['bench_version']}"
        + ("" if record["patients"] else f" on the {PHANTOM}")
        + f": {record['strategy']}, seed {record['identity']['seed']}, after step {last}"
    )
    names = [c for s in steps[:last] for c in s["learns"]]
    patient_of = record["course"].get("patient_of", {})
    found = [_distances(title, home, names, sources, patient_of)]
    lesions = [c for c in names if any(r.structure == c and _detects(r) for r in home)]
    if lesions:
        found.append(_detection(title, home, lesions, patient_of))
    return found


def _detects(row: Score) -> bool:
    return row.metric.startswith(("lesion_", "patient_positive"))


def _distances(
    title: str,
    rows: Sequence[Score],
    names: Sequence[str],
    sources: Sequence[str],
    patient_of: Mapping[str, str],
) -> Table:
    skip = {"dice_ceiling"}
    metrics = sorted({r.metric for r in rows if not _detects(r)} - skip)
    lines = []
    for name in names:
        own = [r for r in rows if r.structure == name]
        home = own[0].eval_set if own else ""
        values = []
        for metric in metrics:
            mine = continual.per_patient(
                {r.case: r.value for r in own if r.metric == metric}, home, patient_of
            )
            counted = [v for v in mine.values() if not math.isnan(v)]
            values.append(number(continual.mean(counted), 3 if _is_share(metric) else 1))
        plain = [r for r in own if r.metric == "dice"]
        cases = sum(not math.isnan(r.value) for r in plain)
        missed = sum(r.status == "fn_only" for r in plain)
        lines.append((name, str(cases), str(missed), *values))
    return Table(
        title=f"{title}: means over test cases that hold the structure (strict)",
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


def _is_share(metric: str) -> bool:
    return metric.startswith(("dice", "nsd"))


def _detection(
    title: str, rows: Sequence[Score], names: Sequence[str], patient_of: Mapping[str, str]
) -> Table:
    from clbench.evaluation.metrics import detection
    from clbench.evaluation.metrics.detection import CONNECTIVITY, MATCH

    lines = []
    for name in names:
        own = [r for r in rows if r.structure == name and r.status != "not_annotated"]
        by_metric: dict[str, list[Score]] = {}
        for r in own:
            by_metric.setdefault(r.metric, []).append(r)
        counts = {
            k: int(sum(r.value for r in by_metric.get(f"lesion_{k}", ())))
            for k in ("truth", "found", "pred", "false")
        }
        pooled = detection.Lesions(**counts, largest_pred_vox=0)
        per_case = len(by_metric.get("lesion_false", ()))
        lesion_cells = (
            _share(counts["found"], counts["truth"]),
            _share(counts["pred"] - counts["false"], counts["pred"]),
            number(pooled.f1),
            number(counts["false"] / per_case if per_case else math.nan, 2),
        )
        sizes = sorted(m for m in by_metric if m.startswith("patient_positive"))
        for metric in sizes or [""]:
            seen = detection.patient_level(
                detection.by_patient(
                    (
                        patient_of.get(f"{r.eval_set}/{r.case}", r.case),
                        (r.gt_vox or 0) > 0,
                        r.value > 0,
                    )
                    for r in by_metric.get(metric, ())
                )
            )
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


def _rate(found: Any) -> str:
    if found.n == 0:
        return f"0/0 = {EMPTY}"
    k = round(found.estimate * found.n)
    return f"{k}/{found.n} = {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"
