"""The examination after a step: every test case of the course scored, one of them twice.

Cases that a stopped attempt finished are kept; what is found goes to the run,
which alone writes the run folder's scores and record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clbench import signals
from clbench.data.catalog import exam_cases, reading
from clbench.errors import StoreError, TrainingError
from clbench.evaluation.cost.meter import Meter
from clbench.evaluation.predictions import write_prediction
from clbench.evaluation.scoring import ScoreContext, score_case
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.run.models import loaded, predictor, windows_fit
from clbench.run.plan import Plan
from clbench.store import checkpoint, files, run_folder
from clbench.store.run_folder import Score
from clbench.strategy.contract import Lesson, Memory
from clbench.training.resume import Watch
from clbench.types import Bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """What an examination found."""

    rows: list[Score]
    """One per case, structure, scoring and metric."""
    cost: dict[str, Any]
    """Seconds and peak memory, all attempts together."""
    opened: list[str]
    """`source/case` of the cases kept from a stopped attempt, which nobody opened now."""
    reexamined: dict[str, Any]
    """Which case was examined again from the checkpoint, and the largest difference of a score."""
    exams: Exams
    """To close once scores and record are written."""


def examine_step(
    plan: Plan, lesson: Lesson, served: nn.Module, memory: Memory, path: Path, watch: Watch
) -> Examined | None:
    """Score every test case of the course, then one again with the model as `path` holds it.

    Of several processes each scores its part of the cases, and keeps them; then the first one
    takes them all. The others return None.

    Args:
        plan: the run.
        lesson: the step just taught.
        served: the model to examine.
        memory: the strategy's, after the step.
        path: the step's checkpoint.
        watch: hears of every case.

    Raises:
        ClbenchError: a case cannot be read or predicted, or scores differ the second time.
        Stopped: by a signal; finished cases are kept.
    """
    meter = Meter(plan.device)
    server = predictor(plan, plan.strategy, served, lesson.structures, memory)
    stored = Exams(
        plan.folder / "exam" / f"step{lesson.number}",
        checkpoint.digest(served),
        plan.host(),
    )
    # two steps may share a source and its test cases
    cases = {(source, case): number for number, source, case in exam_cases(plan.catalog)}
    exams, ranks = sorted(cases.items()), plan.ranks
    if ranks.size > 1:
        own, every = exams[ranks.rank :: ranks.size], watch

        def share(event: dict[str, Any]) -> None:
            done = min(event["done"] * ranks.size, len(exams))  # the others are about as far
            every({**event, "done": done, "of": len(exams)})

        ranks.each(lambda: _examine(plan, lesson, server, stored, own, Meter(plan.device), share))
        if not ranks.first:
            return None
        watch = lambda event: None  # noqa: E731  # all are examined, and taken together here
    found = _examine(plan, lesson, server, stored, exams, meter, watch)
    start = time.monotonic()
    reexamined = _again(plan, lesson, path, found.rows, server if found.elsewhere else None)
    spent_s = found.spent_s + time.monotonic() - start
    return Examined(
        rows=found.rows,
        cost={**meter.inference(), "examine_s": spent_s},
        opened=found.opened,
        reexamined=reexamined,
        exams=stored,
    )


@dataclass(kw_only=True)
class _Cases:
    """What the examination of some cases found."""

    rows: list[Score] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    """`source/case` of those that were finished before."""
    spent_s: float = 0.0
    """Seconds, of whoever finished them."""
    elsewhere: bool = False
    """Whether one was finished on another machine."""


def _examine(
    plan: Plan,
    lesson: Lesson,
    server: VolumePredictor,
    stored: Exams,
    exams: Sequence[tuple[tuple[str, str], int]],
    meter: Meter,
    watch: Watch,
) -> _Cases:
    """Score test cases, and keep each.

    Args:
        plan: the run.
        lesson: the step just taught.
        server: the model to examine.
        stored: cases that are finished; gets the others.
        exams: ((source, case), step) of each.
        meter: times predictions.
        watch: hears of every case.
    """
    catalog, found = plan.catalog, _Cases()
    for done, ((source, case), number) in enumerate(exams, 1):
        drawn = run_folder.prediction_path(plan.folder, lesson.number, source, case)
        kept = drawn.exists() or not plan.settings.keep_predictions
        exam = stored.get(source, case) if kept else None
        if exam is None:
            start = time.monotonic()
            bits, own = _score(plan, server, lesson, number, case, meter)
            if plan.settings.keep_predictions:
                affine = catalog.open(number, case, "test").affine
                write_prediction(drawn, bits, lesson.structures, affine, source=source, case=case)
            exam = Exam(own, time.monotonic() - start, meter.laps_s[-1])
            stored.put(source, case, exam)
        else:
            meter.laps_s.append(exam.predict_s)
            found.opened.append(f"{source}/{case}")
            found.elsewhere |= not exam.here
        found.rows += exam.rows
        found.spent_s += exam.seconds
        watch({"event": "exam", "done": done, "of": len(exams), "case": case})
        signals.check(f"examination after step {lesson.number}, {source} case {case}")
    return found


def _score(
    plan: Plan, server: VolumePredictor, lesson: Lesson, number: int, case: str, meter: Meter
) -> tuple[Bits, list[Score]]:
    """Prediction and scores of a test case of step `number`, after `lesson`."""
    volume = plan.catalog.open(number, case, "test")
    with windows_fit(plan, f"examining after step {lesson.number}, case {case}"):
        bits = meter.timed(server.predict, volume, postprocess=plan.profile.examine.postprocess)
    context = ScoreContext(
        benchmark=plan.benchmark,
        strategy=plan.strategy_name,
        seed=plan.settings.seed,
        step=lesson.number,
    )
    with reading(number, case):  # no hook of the strategy is called inside
        return bits, score_case(bits, lesson.structures, volume, context)


def _again(
    plan: Plan, lesson: Lesson, path: Path, rows: Sequence[Score], taught: VolumePredictor | None
) -> dict[str, Any]:
    """Examine a case again with the model as its checkpoint holds it: scores must be equal.

    Args:
        plan: the run.
        lesson: the step just taught.
        path: the step's checkpoint.
        rows: of the examination.
        taught: the examined model, where rows come from another processor or thread count, whose
            bits may differ; then it is asked here, too. None: the rows are from here.
    """
    number = lesson.number
    strategy = plan.strategy.first_step() if number == 1 else plan.strategy
    model, memory = loaded(plan, strategy, lesson, path)
    served = plan.strategy.serve(model, memory)
    server = predictor(plan, plan.strategy, served, lesson.structures, memory)
    at, case = next(
        (i, split.test[0])
        for i, split in [
            (number, plan.catalog.splits[number - 1]),
            *enumerate(plan.catalog.splits, 1),
        ]
        if split.test  # a step whose model is given has no cases
    )
    source = plan.catalog.source(at).name
    _, again = _score(plan, server, lesson, at, case, Meter(plan.device))
    before = [r for r in rows if (r.step, r.eval_set, r.case) == (number, source, case)]
    if taught is not None:
        _, before = _score(plan, taught, lesson, at, case, Meter(plan.device))
    gap = same_scores(
        before, again, where=f"{path}, {source} case {case}", slack=slack_of(plan.device)
    )
    return {"case": f"{source}/{case}", "largest_difference": gap}


@dataclass(frozen=True)
class Exam:
    """An examined case."""

    rows: Sequence[run_folder.Score]
    seconds: float
    """All of it."""
    predict_s: float
    """Of them, inference."""
    here: bool = True
    """Examined on the same processor, with the same versions and thread count: equal bits."""


class Exams:
    """The finished cases of an examination, kept until the scores of the step are written.

    Args:
        folder: where; of this step, and this step alone.
        mark: the model that is examined; cases that another one answered are not taken.
        host: see `reproducibility.host`; cases examined elsewhere are taken, and say so.
    """

    def __init__(self, folder: Path, mark: str, host: Mapping[str, Any]) -> None:
        self.folder, self.mark, self.host = folder, mark, dict(host)

    def get(self, source: str, case: str) -> Exam | None:
        """A finished case; None where it is to be examined.

        Args:
            source: of the case.
            case: its id.
        """
        try:
            content = files.read_json(self._path(source, case))
            if content["model"] != self.mark or content["sha256"] != _sealed(content["rows"]):
                return None
            rows = [run_folder.Score(**row) for row in content["rows"]]
            if any((row.eval_set, row.case) != (source, case) for row in rows):
                return None
            return Exam(
                rows,
                float(content["seconds"]),
                float(content["predict_s"]),
                content.get("host") == self.host,
            )
        except (StoreError, KeyError, TypeError, ValueError):
            return None

    def put(self, source: str, case: str, exam: Exam) -> None:
        """Keep a finished case.

        Args:
            source: of the case.
            case: its id.
            exam: what was found.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(row) for row in exam.rows]
        content = {
            "model": self.mark,
            "host": self.host,
            "seconds": exam.seconds,
            "predict_s": exam.predict_s,
            "rows": rows,
            "sha256": _sealed(rows),
        }
        files.write_json(self._path(source, case), content)

    def _path(self, source: str, case: str) -> Path:
        return self.folder / f"{run_folder.case_name(source, case)}.json"

    def close(self) -> None:
        """The scores are written: remove what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sealed(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------- of the saved model


def slack_of(device: torch.device) -> float:
    """How far a score may be off when a case is examined again.

    0 (equal bits) on the CPU and with deterministic algorithms; else 0.001, for CUDA may choose
    other kernels for the same layer, and a voxel on the threshold may fall on the other side.
    """
    exact = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return 0.0 if exact else 1e-3


def same_scores(
    examined: Sequence[Score], again: Sequence[Score], *, where: str, slack: float
) -> float:
    """Compare one case's scores with those of the model loaded from its checkpoint.

    Args:
        examined: rows of the model as it was taught.
        again: rows of the same case from the saved model.
        where: checkpoint and case.
        slack: largest difference of a value that passes; 0 asks for equal bits.

    Returns:
        The largest difference of a value.

    Raises:
        TrainingError: a score differs by more, or rows are missing.
    """
    one, two = ({(r.scoring, r.metric, r.structure): r for r in rows} for rows in (examined, again))
    largest = 0.0
    for at in sorted(one.keys() | two.keys()):
        a, b = one.get(at), two.get(at)
        if a is not None and b is not None:
            gap = 0.0 if repr(a.value) == repr(b.value) else abs(a.value - b.value)
            if repr(a) == repr(b) or gap <= slack:  # a nan is beyond every slack
                largest = max(largest, gap)
                continue
        raise TrainingError(
            "the saved model does not score as the taught one",
            where=f"{where}, {', '.join(at)}",
            expected="no such row" if a is None else f"{a.value!r}, {a.pred_vox} voxels",
            got="no such row" if b is None else f"{b.value!r}, {b.pred_vox} voxels",
            next_step="what a model needs must stand in its state dict or the strategy's memory "
            "(`clbench check strategy NAME`); if it does, check this machine's memory and disk",
        )
    return largest
