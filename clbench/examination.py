"""The examination after a step: every test case of the course scored, one of them twice.

Room: row 4 (torch). Cases that a stopped attempt finished are kept; what is found goes to the run,
which alone writes the run folder's scores and record.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clbench import checkpoint, resume, stop, store
from clbench.examine import ScoreContext, Server, score_case, write_prediction
from clbench.metrics.meter import Meter
from clbench.metrics.overlap import Bits
from clbench.models import loaded, predictor, windows_fit
from clbench.plan import Plan
from clbench.resume import Watch
from clbench.store import Score
from clbench.strategy import Lesson, Memory
from clbench.watches import same_scores, slack_of


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
    kept: resume.Exams
    """To close once scores and record are written."""


def examine_step(
    plan: Plan, lesson: Lesson, served: nn.Module, memory: Memory, path: Path, watch: Watch
) -> Examined:
    """Score every test case of the course, then one again with the model as `path` holds it.

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
    catalog, meter, spent_s = plan.catalog, Meter(plan.device), 0.0
    rows: list[Score] = []
    opened: list[str] = []
    server = predictor(plan, plan.strategy, served, lesson.structures, memory)
    kept = resume.Exams(
        plan.folder / "exam" / f"step{lesson.number}",
        checkpoint.digest(served),
        resume.host(plan.device),
    )
    elsewhere = False
    # two steps may share a source and its test cases
    exams = {
        (catalog.source(number).name, case): number
        for number, split in reversed(list(enumerate(catalog.splits, 1)))
        for case in split.test
    }
    for done, ((source, case), number) in enumerate(sorted(exams.items()), 1):
        name = f"{source}_{case}"
        drawn = plan.folder / "predictions" / f"step{lesson.number}" / f"{name}.npz"
        found = kept.get(name) if drawn.exists() or not plan.settings.keep_predictions else None
        if found is None:
            start = time.monotonic()
            bits, own = _score(plan, server, lesson, number, case, meter)
            if plan.settings.keep_predictions:
                affine = catalog.open(number, case, "test").affine
                write_prediction(drawn, bits, lesson.structures, affine, source=source, case=case)
            found = resume.Exam(own, time.monotonic() - start, meter.laps_s[-1])
            kept.put(name, found)
        else:
            meter.laps_s.append(found.predict_s)
            opened.append(f"{source}/{case}")
            elsewhere |= not found.here
        rows += found.rows
        spent_s += found.seconds
        watch({"event": "exam", "done": done, "of": len(exams), "case": case})
        stop.check(f"examination after step {lesson.number}, {source} case {case}")
    start = time.monotonic()
    reexamined = _again(plan, lesson, path, rows, server if elsewhere else None)
    spent_s += time.monotonic() - start
    return Examined(
        rows=rows,
        cost={**meter.inference(), "examine_s": spent_s},
        opened=opened,
        reexamined=reexamined,
        kept=kept,
    )


def _score(
    plan: Plan, server: Server, lesson: Lesson, number: int, case: str, meter: Meter
) -> tuple[Bits, list[Score]]:
    """Prediction and scores of a test case of step `number`, after `lesson`."""
    volume = plan.catalog.open(number, case, "test")
    with windows_fit(plan, f"examining after step {lesson.number}, case {case}", server):
        bits = meter.timed(server.predict, volume, postprocess=plan.profile.examine.postprocess)
    context = ScoreContext(
        bench=plan.benchmark.name,
        bench_version=plan.benchmark.version,
        strategy=plan.strategy_name,
        seed=plan.settings.seed,
        step=lesson.number,
        learned_at={s: plan.benchmark.learned_at(s) for s in lesson.structures},
    )
    return bits, score_case(
        bits, lesson.structures, volume, scorings=store.SCORINGS, context=context
    )


def _again(
    plan: Plan, lesson: Lesson, path: Path, rows: Sequence[Score], taught: Server | None
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
    source, case = plan.catalog.source(number).name, plan.catalog.splits[number - 1].test[0]
    _, again = _score(plan, server, lesson, number, case, Meter(plan.device))
    before = [r for r in rows if (r.step, r.eval_set, r.case) == (number, source, case)]
    if taught is not None:
        _, before = _score(plan, taught, lesson, number, case, Meter(plan.device))
    gap = same_scores(
        before, again, where=f"{path}, {source} case {case}", slack=slack_of(plan.device)
    )
    return {"case": f"{source}/{case}", "largest_difference": gap}
