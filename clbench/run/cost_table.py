"""`cost.csv` of a run: what each step took, held and counts, one row per step.

Seconds, memory and bytes come from the run's record, operations are counted on models
that are built anew; what is not known is an empty cell.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from clbench.errors import CostError, StoreError
from clbench.evaluation.cost.course import blank_kit
from clbench.evaluation.cost.model import PARTS, forward_macs, grown, lessons_of
from clbench.run.plan import Plan
from clbench.run.record import benchmark_of, profile_of, strategy_of
from clbench.store import files, run_folder
from clbench.store.record import RunRecord
from clbench.strategy.contract import Lesson

RECORDED = (
    "parameters", "trainable_parameters", "nonzero_parameters", "prepare_s", "train_s",
    "predict_s", "predict_case_s", "examine_s", "peak_rss_bytes", "peak_cuda_bytes",
    "examine_peak_rss_bytes", "examine_peak_cuda_bytes", "pseudo_bytes",
)  # fmt: skip
"""What `run.json` holds per step."""
COLUMNS = (
    "step", *RECORDED[:3], "forward_macs", *(f"{p}_macs" for p in PARTS), *RECORDED[3:],
    "teacher_bytes", "checkpoint_bytes",
)  # fmt: skip


def write_costs(plan: Plan, record: RunRecord) -> None:
    """Write `cost.csv` of a run that has done all its steps.

    A network that cannot be counted costs the run nothing but its MACs: the cells stay empty, and
    `record.uncounted` says why.
    """
    lessons = [plan.lesson(i) for i in range(1, len(plan.benchmark.steps) + 1)]
    models = grown(plan.strategy, plan.kit, lessons)
    try:
        counted = _counted(models, plan.catalog.preprocessing.patch_vox)
    except CostError as err:
        record.uncounted, counted = str(err), {}
    else:
        record.uncounted = None
    _write(plan.folder, record, counted)


def recount(folder: Path) -> Path:
    """Write `cost.csv` of a finished run anew, from its record; return its path.

    What is counted are the models of the settings the run recorded.

    Raises:
        StoreError: no finished run, another benchmark version, or predictions made elsewhere.
        CostError: an operator cannot be counted.
    """
    record = RunRecord.read(folder)
    if record.external:
        raise StoreError(
            "the predictions of this run were made elsewhere: there is no model to count",
            where=folder,
            next_step="count a method of clbench: `clbench cost --bench BENCH --strategy STRATEGY`",
        )
    record.need_finished(folder)
    files.make_folder(folder, next_step=files.COPY_RUN)
    benchmark, profile = benchmark_of(record), profile_of(record)
    models = grown(strategy_of(record), blank_kit(profile), lessons_of(benchmark))
    counted = _counted(models, profile.preprocessing(benchmark.preprocessing).patch_vox)
    with files.locked(folder / ".lock", next_step=files.COPY_RUN):
        record = RunRecord.read(folder)  # another process may have written it meanwhile
        _write(folder, record, counted)
        record.reseal(folder)
    return folder / "cost.csv"


def _counted(
    models: Iterable[tuple[Lesson, nn.Module, int]], patch_vox: tuple[int, int, int]
) -> dict[int, dict[str, int]]:
    """Step → column → number."""
    counted = {}
    for lesson, model, stored in models:
        macs = forward_macs(model, patch_vox)
        counted[lesson.number] = {
            "forward_macs": sum(macs.values()),
            **{f"{part}_macs": n for part, n in macs.items()},
            "teacher_bytes": stored,
        }
    return counted


def _write(folder: Path, record: RunRecord, counted: Mapping[int, Mapping[str, int]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for step, cost in sorted(record.cost.items(), key=lambda item: int(item[0])):
        flat = {**cost, **cost.get("train", {})}
        row = {name: repr(flat[name]) for name in RECORDED if name in flat}
        row["step"] = step
        row.update({name: str(n) for name, n in counted.get(int(step), {}).items()})
        if (size := _checkpoint(folder, record, int(step))) is not None:
            row["checkpoint_bytes"] = str(size)
        writer.writerow(row)
    files.write_bytes(folder / "cost.csv", text.getvalue().encode())


def _checkpoint(folder: Path, record: RunRecord, step: int) -> int | None:
    """Bytes of the step's checkpoint; None: not there."""
    path = run_folder.checkpoint_path(folder, step, record.shared_step1)
    return path.stat().st_size if path.is_file() else None
