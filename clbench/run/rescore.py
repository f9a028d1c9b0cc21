"""More metrics for a finished run, from its stored predictions; nothing is trained or predicted.

Every prediction must first give the Dice that was recorded, so that files of another
run, or data that changed since, are found out before any number is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench.data.catalog import exam_cases
from clbench.errors import StoreError
from clbench.evaluation.metrics.case import DEFAULT, CaseScores, implementations
from clbench.evaluation.predictions import prediction_of
from clbench.evaluation.scoring import context_of, measure_on_file, metric_rows
from clbench.run.course import alone
from clbench.run.record import catalog_of
from clbench.store import run_folder
from clbench.store.files import COPY_RUN
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score
from clbench.training.resume import Watch


def score_run(
    folder: Path,
    *,
    metrics: Sequence[str] = DEFAULT,
    data: str | None = None,
    cache: Path | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Add rows of further metrics to `scores.csv`; those that are there already are made anew.

    Args:
        folder: a finished run with predictions.
        metrics: metrics, see `clbench.evaluation.metrics.case.parse_metrics`.
        data: where the data lies now, as in `clbench run --data`; None: where the run found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.
        watch: told about every case.

    Returns:
        The folder. The same call twice leaves the same bytes.

    Raises:
        StoreError: an unfinished run, a missing or foreign prediction, other data.
        DataError: data that cannot be read.
    """
    record = RunRecord.read(folder)
    record.need_finished(folder)
    if record.external:
        raise StoreError(
            "the run holds predictions made elsewhere, of which no copy is kept",
            where=folder,
            next_step="score them again: `clbench score --bench BENCH --step 1 --predictions "
            "DIR --name METHOD`",
        )
    catalog = catalog_of(record, data=data, cache=cache)
    benchmark, last = catalog.benchmark, len(catalog.benchmark.steps)
    with alone(folder, wait=False, next_step=COPY_RUN):
        record = RunRecord.read(folder)  # another process may have written it meanwhile
        rows = run_folder.read_scores(folder / "scores.csv")
        known = {
            (r.step, r.eval_set, r.case, r.structure): r
            for r in rows
            if r.scoring == "strict" and r.metric == "dice"
        }
        cases = list(exam_cases(catalog))
        files = {
            (t, s, c): run_folder.prediction_path(folder, t, s, c)
            for _, s, c in cases
            for t in range(1, last + 1)
        }
        _all_there(folder, list(files.values()))
        new_rows: list[Score] = []
        for done, (number, source, case) in enumerate(cases, 1):
            volume = catalog.open(number, case, "test")
            truth = volume.native_bits()
            for step in range(1, last + 1):
                structures = benchmark.structures(step)
                pred = prediction_of(files[step, source, case], volume, structures)
                scores = measure_on_file(pred.bits, structures, volume, truth, ("dice", *metrics))
                _as_recorded(scores, known, (step, source, case), files[step, source, case])
                context = context_of(record, benchmark, step)
                new_rows += metric_rows(scores, structures, volume, metrics, context)
            watch({"event": "exam", "done": done, "of": len(cases), "case": case})
        new = {r.metric for r in new_rows} - {"dice"}
        rows = [r for r in rows if r.scoring != "strict" or r.metric not in new]
        rows += [r for r in new_rows if r.metric in new]
        run_folder.write_scores(folder / "scores.csv", rows)
        record.metrics = {**record.metrics, **implementations(("dice", *metrics))}
        record.reseal(folder)
    return folder


# ------------------------------------------------------------------------------------------ checks


def _all_there(folder: Path, files: Sequence[Path]) -> None:
    absent = [f for f in files if not f.is_file()]
    if absent:
        raise StoreError(
            f"{len(absent)} of {len(files)} predictions of the run are missing",
            where=folder / "predictions",
            expected="one file per step and test case",
            got="missing: "
            + ", ".join(str(f.relative_to(folder / "predictions")) for f in absent[:5])
            + (", …" if len(absent) > 5 else ""),
            next_step="repeat the run's command with --fresh --keep-predictions test",
        )


def _as_recorded(
    scores: Mapping[str, CaseScores],
    known: Mapping[tuple[int, str, str, str], Score],
    key: tuple[int, str, str],
    path: Path,
) -> None:
    """The prediction must give the Dice and the volumes that were recorded."""
    for name, new in scores.items():
        old = known.get((*key, name))
        value, counts = new.values["dice"], new.counts
        there = None if old is None else (repr(old.value), old.gt_vox, old.pred_vox)
        if there != (repr(value), counts.gt_vox, counts.pred_vox):
            raise StoreError(
                "a stored prediction does not give the recorded Dice",
                where=f"{path}, {name}",
                expected="no such row" if old is None else f"{old.value!r}, {old.pred_vox} voxels",
                got=f"{value!r}, {counts.pred_vox} voxels",
                next_step="the file or scores.csv was changed; run again with --fresh",
            )
