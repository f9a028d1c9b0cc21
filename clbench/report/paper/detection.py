"""Tumor detection in the layout of the paper's Table 6, and distances beside Dice.

Made from the rows that `clbench score` adds to a run.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from importlib import resources

from clbench.evaluation.metrics import continual
from clbench.evaluation.metrics.detection import by_patient
from clbench.report.scores import Scores, StrategyScores, on_phantom, rows_of
from clbench.report.study import Protocol, Study
from clbench.report.tables.render import EMPTY, Table, number
from clbench.spec.taxonomy import structure
from clbench.statistics.intervals import wilson

TUMORS = ("liver", "kidney", "pancreas")
SCORE_FIRST = "not scored yet: clbench score RUN adds the rows to a finished run"


def printed6() -> list[dict[str, str]]:
    """The cells of Table 6 in the order of the file."""
    text = resources.files("clbench.published").joinpath("table6.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def table6(study: Study, *, source: str, voxels: int = 0) -> Table:
    """Sensitivity, specificity and their harmonic mean, in percent.

    Args:
        study: the runs; not looked at for `printed`.
        source: `printed`, `measured` or `both`.
        voxels: smallest predicted tumor that counts as a call; 0 = any voxel.

    Raises:
        StoreError: the measured runs do not belong in one table.
    """
    cells = printed6()
    rows: list[tuple[str, ...]] = []
    long: list[tuple[str, ...]] = []
    notes: list[str] = []
    if source != "measured":
        for method in dict.fromkeys(c["method"] for c in cells):
            by = {c["tumor"]: c for c in cells if c["method"] == method}
            texts = [
                f"{by[t][k]} p" if by[t][k] else EMPTY
                for t in TUMORS
                for k in ("sensitivity", "specificity", "harmonic_reported")
            ]
            rows.append((method, "", *texts))
        notes += [
            "p: printed in the paper, not measured; n is not printed",
            "n implied, with / without tumor: liver 36 / 20, kidney 96 / 20, pancreas 83 / 80",
        ]
    scores = None if source == "printed" else study.scores(scoring="strict")
    if source != "printed":
        metric = "patient_positive" + (f"_{voxels}vox" if voxels else "")
        counts = {} if scores is None else _counts(study, scores, metric)
        groups = scores.strategies if scores else ()
        rows += [
            _row(g, counts, long, both=source == "both", protocol=study.protocol) for g in groups
        ]
        notes += [
            (
                "m: measured after the last step; percent, (k/n, k averaged over seeds), "
                f"[Wilson {study.protocol.percent}]"
            ),
            f"positive: {voxels or 'any'} predicted voxels of tumor; choose it on validation cases",
            "harmonic: 2 Sen Spec / (Sen + Spec)",
            *([] if groups else ["no finished run"]),
        ]
        if groups and all(c == EMPTY for row in rows[-len(groups) :] for c in row[2:]):
            notes.append(SCORE_FIRST)
    title = {"printed": "printed in the paper"}.get(
        source, ("printed (patients) and " if source == "both" else "") + "measured"
    )
    return Table(
        title=f"Table 6, tumor detection: {title}" + on_phantom(scores),
        columns=("method", "seeds", *("Sen.", "Spec.", "Harm.") * 3),
        over=("", "", *(f"{t.capitalize()} tumor" for t in TUMORS for _ in range(3))),
        rows=tuple(rows),
        keys=2,
        narrow=3,
        notes=tuple(notes),
        long=_printed_long(cells) if source == "printed" else Table(
            title="",
            columns=("method", "tumor", "seed", "true_positive", "with_tumor", "true_negative",
                     "without_tumor"),
            rows=tuple(long),
        ),
    )  # fmt: skip


def _printed_long(cells: Sequence[dict[str, str]]) -> Table:
    return Table(title="", columns=tuple(cells[0]), rows=tuple(tuple(c.values()) for c in cells))


Counts = tuple[int, int, int, int]
"""True positives, patients with, true negatives, patients without."""


def _row(
    s: StrategyScores,
    counts: Mapping[tuple[str, str], Counts],
    long: list[tuple[str, ...]],
    *,
    both: bool,
    protocol: Protocol,
) -> tuple[str, ...]:
    label = s.label + (" (PHANTOM)" if both and not s.records[0].patients else "")
    texts: list[str] = []
    for tumor in TUMORS:
        each = [counts.get((run.record.run_id, f"{tumor}_tumor")) for run in s.runs]
        scored = [c for c in each if c is not None]
        if len(scored) < len(each):
            texts += [EMPTY] * 3
            continue
        for seed, c in zip(s.seeds, scored, strict=True):
            long.append((label, tumor, str(seed), *map(str, c)))
        tp, p, tn, n = (continual.mean(c[i] for c in scored) for i in range(4))
        sen, spec = _share(tp, round(p), protocol), _share(tn, round(n), protocol)
        texts += [sen[1], spec[1]]
        h = math.nan if math.isnan(sen[0] + spec[0]) else continual.harmonic(sen[0], spec[0])
        texts.append(EMPTY if math.isnan(h) else f"{100 * h:.2f} m")
    return (label, str(len(s.runs)), *texts)


def _counts(study: Study, scores: Scores, metric: str) -> dict[tuple[str, str], Counts]:
    """(run id, tumor) → counts over patients after the last step; scored runs alone."""
    rows = rows_of(study.frame, scoring="strict", metric=metric)
    rows = rows[
        (rows["step"] == scores.last)
        & (rows["eval_set"] == rows["structure"].map(scores.reference.home))
        & rows["gt_vox"].notna()
    ]
    counts = {}
    for (i, name), own in rows.groupby(["run", "structure"]):
        calls = by_patient(zip(own["patient"], own["gt_vox"] > 0, own["value"] > 0, strict=True))
        have = [called for truth, called in calls if truth]
        lack = [called for truth, called in calls if not truth]
        run_id = scores.runs[int(str(i))].record.run_id
        counts[run_id, str(name)] = sum(have), len(have), len(lack) - sum(lack), len(lack)
    return counts


def _share(k: float, n: int, protocol: Protocol) -> tuple[float, str]:
    i = wilson(k, n, level=protocol.level)
    if n == 0:
        return math.nan, EMPTY
    count = f"{k:g}" if k == round(k) else f"{k:.1f}"
    ends = f"{100 * i.low:.1f}–{100 * i.high:.1f}"
    return k / n, f"{100 * i.estimate:.2f} m ({count}/{n}) [{ends}]"


def distances(study: Study) -> Table:
    """Surface Dice and HD95 after the last step, per strategy and group, with counts of misses.

    Raises:
        StoreError: the runs do not belong in one table.
    """
    nsd, hd95 = (study.scores(scoring="strict", metric=m) for m in ("nsd", "hd95_mm"))
    rows = []
    names = nsd.means if nsd else {}
    for one, other in zip(
        nsd.strategies if nsd else (), hd95.strategies if hd95 else (), strict=True
    ):
        last, texts = len(one.runs[0].record.course.steps), []
        for members in names.values():
            of_members = [other.cells[last, other.home[c], c] for c in members]
            missed = sum(int(x.missed.sum()) for x in of_members)
            cases = sum(int(x.cases.sum()) for x in of_members)
            distance = other.over_seeds(last, members)[0]
            texts += [
                number(one.over_seeds(last, members)[0]),
                number(distance, 1),
                EMPTY if math.isnan(distance) else f"{missed}/{cases}",
            ]
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
            *(("no finished run",) if nsd is None else () if empty else nsd.notes()),
        ),
    )
