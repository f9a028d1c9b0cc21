"""One trial: the steps a rule looks at, taught with its settings, scored on validation cases.

A trial is taught by the code that teaches a run: the same first step, which it shares with trials
and runs of equal settings, the same crops, the same resuming. It examines no test case; the catalog
refuses to open one.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from clbench import signals
from clbench.data.catalog import Catalog
from clbench.errors import AvalancheError, DataError, DivergedError, TrainingError
from clbench.evaluation.scoring import structure_dice
from clbench.run.course import Course, run_plan
from clbench.run.models import predictor, windows_fit
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.store import files, run_folder
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score
from clbench.store.shared_steps import run_name
from clbench.strategy.contract import Lesson, Memory
from clbench.training.loop import phase_length
from clbench.training.resume import Watch

FILE = "trial.json"
"""What a finished trial says of itself, in its folder."""
_VALIDATION = "validation.json"
ANEW = "delete the folder that the file lies in and repeat the command: the trial is made again"
"""What to do where a file of a trial is damaged."""


@dataclass(kw_only=True)
class TrialPlan(Plan):
    """A run that stops after the steps a rule looks at, in a folder of its own."""

    home: Path
    """Its folder."""
    tuning_steps: int
    """Steps taught."""

    @cached_property
    def folder(self) -> Path:
        """Where the trial's files go."""
        return self.home

    @cached_property
    def catalog(self) -> Catalog:
        """The data, with the cases that the rule may see."""
        catalog = super().catalog
        catalog.tuning_steps = self.tuning_steps
        return catalog


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of a trial."""

    number: int
    """1-based; the first has the strategy's defaults."""
    settings: Mapping[str, Any]
    """`group.name` → value; what is absent is as the strategy and the profile have it."""
    score: float | None
    """Mean over structures of their mean Dice over validation cases; None: training failed."""
    dice: Mapping[str, float]
    """Structure → its mean Dice over the validation cases that hold it."""
    updates: int
    """Updates of all its steps, a shared first step counted in full."""
    seconds: float
    """Of preparing, teaching and scoring, a shared first step counted in full."""
    first_step: str
    """Folder of its first step; trials that share it have equal ones."""
    opened: Mapping[str, Sequence[str]]
    """Purpose → `source/case` opened."""
    failure: str | None = None
    """Why there is no score."""
    fault: bool = False
    """Whether it failed with an error of the strategy; False: it has a score, or diverged."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `trial.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Trial | None:
        """The trial of a folder; None: it is not finished.

        Raises:
            StoreError: what it left is damaged.
        """
        path = folder / FILE
        return cls(**files.read_json(path, next_step=ANEW)) if path.exists() else None


class _TrialCourse(Course):
    """A course up to the last step of the rule, scored once, on validation cases."""

    @property
    def last(self) -> int:
        """The last step that the rule looks at."""
        return self.plan.catalog.tuning_steps

    def _scored(self, done: int) -> list[Score]:
        """None: the steps of a trial are not examined on test cases."""
        return []

    def go(self) -> None:
        """Teach and score what is left; of a trial that was scored, only its closing."""
        scored = (self.plan.folder / _VALIDATION).exists()
        if scored and self.record.steps_done >= self.last:  # its checkpoints may be gone
            self._finish()
            self.watch({"event": "finished", "folder": self.plan.folder})
        else:
            super().go()

    def examine(self, lesson: Lesson, served: nn.Module) -> None:
        """Score the validation cases after the last step; earlier steps are done without."""
        if lesson.number == self.last:
            begun = time.monotonic()
            dice = validation_dice(self.plan, lesson, served, self.memory, self.watch)
            taken = {"dice": dice, "seconds": time.monotonic() - begun}
            files.write_json(self.plan.folder / _VALIDATION, taken)
        self.record.steps_done = lesson.number
        self.save()

    def close(self) -> None:
        """Nothing of a trial but its score is needed: the chosen setting is taught anew."""
        remove_steps(self.plan.folder, self.plan.step_folder, self.last)


def remove_steps(home: Path, step_folder: Callable[[int], Path], last: int) -> None:
    """Remove the checkpoints of a trial, and from the shared steps what this trial taught.

    The first step stays, for trials that share it. A later one stays where another run taught it,
    or holds it at the moment.

    Args:
        home: folder of the trial.
        step_folder: number of a step → the folder in which it is shared.
        last: the last step that the trial taught.
    """
    for path in home.glob("step*.pt"):
        path.unlink()
    for number in range(2, last + 1):
        folder = step_folder(number)
        note = folder / f"step{number}.json"
        origin = files.read_json(note).get("origin") if note.exists() else None
        foreign = origin is not None and origin["run"] != run_name(home)
        if not foreign and not files.is_locked(folder / ".lock"):
            shutil.rmtree(folder, ignore_errors=True)


def validation_dice(
    plan: Plan, lesson: Lesson, served: nn.Module, memory: Memory, watch: Watch
) -> dict[str, float]:
    """Structure → mean Dice over the validation cases of the steps that taught it, first or again.

    Args:
        plan: of the trial.
        lesson: the step just taught, the last that the rule looks at.
        served: the model to score.
        memory: the strategy's, after the step.
        watch: hears of every case.

    Raises:
        DataError: no validation case holds any structure.
        Stopped: by a signal, between two cases.
    """
    catalog = plan.catalog
    server = predictor(plan, plan.strategy, served, lesson.structures, memory)
    todo = [
        (number, case)
        for number in range(1, lesson.number + 1)
        for case in catalog.splits[number - 1].validation
    ]
    values: dict[str, list[float]] = {}
    for done, (number, case) in enumerate(todo, 1):
        step = plan.benchmark.steps[number - 1]
        with windows_fit(plan, f"scoring validation case {case}"):
            of_case = structure_dice(
                server,
                [catalog.open(number, case, "tuning")],
                (*step.learns, *step.again),
                postprocess=plan.profile.examine.postprocess,
            )
        for name, dice in of_case.items():
            values.setdefault(name, []).extend(dice)
        watch({"event": "validated", "done": done, "of": len(todo), "case": case})
        signals.check(f"scoring after step {lesson.number}, case {case}")
    if not values:
        raise DataError(
            "no validation case holds a structure that was taught",
            where=f"steps 1 to {lesson.number}",
            next_step="name validation cases with --split SOURCE=FILE.toml",
        )
    return {name: float(np.mean(dice)) for name, dice in values.items()}


def plan_trial(settings: RunSettings, home: Path, steps: int) -> TrialPlan:
    """Resolve a trial; nothing is opened or written.

    Args:
        settings: of the run it begins, with the trial's settings among `overrides`.
        home: its folder.
        steps: that the rule looks at.

    Raises:
        ClbenchError: as `clbench.run.plan.resolve`.
    """
    plan = resolve(settings)
    given = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return TrialPlan(**given, home=home, tuning_steps=steps)


def run_trial(plan: TrialPlan, number: int, settings: Mapping[str, Any], watch: Watch) -> Trial:
    """Teach and score a trial, or go on where it was stopped.

    Training that diverges, or that its strategy cannot go on with at these settings, ends the trial
    without a score; every other error is raised.

    Args:
        plan: of the trial.
        number: 1-based.
        settings: `group.name` → value, for its record.
        watch: hears of every update and case.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; the same command goes on.
    """
    begun, failure, fault = [time.monotonic()], None, False

    def timed(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            begun.append(time.monotonic())
        watch(event)

    plan.open()
    try:
        run_plan(plan, timed, course=_TrialCourse)
    except (TrainingError, AvalancheError) as err:
        if not (plan.folder / "run.json").exists():  # nothing was begun: no matter of its settings
            raise
        failure, fault = err.brief, not isinstance(err, DivergedError)
        shutil.rmtree(plan.step_folder(1) / "resume", ignore_errors=True)
    record = RunRecord.read(plan.folder)
    taken = {} if failure else files.read_json(plan.folder / _VALIDATION, next_step=ANEW)
    dice = taken.get("dice", {})
    trial = Trial(
        number=number,
        settings=dict(settings),
        score=None if failure else float(np.mean(list(dice.values()))),
        dice=dice,
        updates=_updates(plan, failed=failure is not None),
        # of one that failed the step that did is in no record
        seconds=_seconds(record) + (time.monotonic() - begun[-1] if failure else taken["seconds"]),
        first_step=plan.step_folder(1).name,
        opened=_opened(record, plan.catalog),
        failure=failure,
        fault=fault,
    )
    files.write_json(plan.folder / FILE, trial.to_json())
    if failure:  # its later steps were of use up to here: their logs count the updates
        remove_steps(plan.folder, plan.step_folder, plan.tuning_steps)
    return trial


def least_updates(plan: TrialPlan) -> int:
    """Updates of a trial, as far as they are known before it: of the first phase of each step.

    Args:
        plan: of a trial.
    """
    total, train = 0, plan.profile.train
    for number in range(1, plan.tuning_steps + 1):
        lesson = plan.lesson(number)
        strategy = plan.strategy.first_step() if number == 1 else plan.strategy
        if (phase := strategy.next_phase(lesson, {}, ())) is not None:
            epochs = train.epochs if phase.epochs is None else phase.epochs
            total += epochs * phase_length(phase, lesson, train)
    return total


def _updates(plan: TrialPlan, *, failed: bool) -> int:
    """Updates of all steps, those of a shared first step as well.

    Args:
        plan: of the trial.
        failed: the log of the step in which that happened is not among the run's.
    """
    logs = [plan.folder / "events.jsonl"]
    steps = range(1, plan.tuning_steps + 1) if failed else ()
    taught = (plan.folder / f"step{step}.pt" for step in steps)
    if step := next((i for i, path in enumerate(taught, 1) if not path.exists()), 0):
        logs.append(plan.step_folder(step) / "events.jsonl")
    events = [e for log in logs if log.exists() for e in run_folder.read_events(log)]
    return sum(e["event"] == "update" for e in events)


def _seconds(record: RunRecord) -> float:
    return sum(float(c["train"][k]) for c in record.cost.values() for k in ("prepare_s", "train_s"))


def _opened(record: RunRecord, catalog: Catalog) -> dict[str, list[str]]:
    """What the record knows of, and what was opened since it was last written."""
    opened: dict[str, set[str]] = {}
    for by_purpose in [*record.ledger.values(), *catalog.opened().values()]:
        for purpose, cases in by_purpose.items():
            opened.setdefault(purpose, set()).update(cases)
    return {purpose: sorted(cases) for purpose, cases in sorted(opened.items())}
