"""A whole course: build, teach each step, examine, record; go on where a stopped run left off.

What a run leaves in `<out>/<bench>/<strategy>/<run id>/`: `run.json` (settings,
versions, splits, cost, ledger), `scores.csv` (one row per case and structure), `events.jsonl` (loss
terms), `step<t>.pt` (checkpoints) and `predictions/` (packed bits).
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clbench import reproducibility, signals
from clbench.errors import SettingError, StoreError
from clbench.evaluation.cost.allocator import freed_memory
from clbench.nets.conv3d_faults import conv3d_faults
from clbench.run.cost_table import write_costs
from clbench.run.examine import Examined, examine_step
from clbench.run.models import loaded
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.run.prepare import prepare
from clbench.run.record import groups_of, keep_course, new_record
from clbench.run.teach import Start, refuse_course, teach_step
from clbench.store import checkpoint, run_folder
from clbench.store import files as store_files
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score
from clbench.store.shared_steps import adopt_step, continues, run_name, take_back, take_step
from clbench.strategy.contract import Lesson, Memory, Strategy
from clbench.training import past_data
from clbench.training.monitors import warnings_of
from clbench.training.past_data import FileAccessMonitor
from clbench.training.resume import Watch
from clbench.training.update import divide


@contextmanager
def alone(folder: Path, *, wait: bool, next_step: str = store_files.OTHER_OUT) -> Iterator[None]:
    """Hold the folder for this process.

    Args:
        folder: of a run; made when it is not there.
        wait: for another process that works in it, in place of an error.
        next_step: ends the error where it cannot be written.

    Raises:
        StoreError: it cannot be written, or another process works in it.
        Stopped: while waiting.
    """
    store_files.make_folder(folder, next_step=next_step)
    waiting = partial(signals.check, f"waiting for {folder}") if wait else None
    with store_files.locked(folder / ".lock", waiting=waiting):
        store_files.sweep(folder)
        yield


def run_course(settings: RunSettings, watch: Watch = lambda event: None) -> Path:
    """Run one seed of one strategy on one benchmark; return its run folder.

    Raises:
        ClbenchError: anything the user can act on.
    """
    return run_plan(resolve(settings).open(), watch)


def run_plan(
    plan: Plan, watch: Watch = lambda event: None, *, course: type[Course] | None = None
) -> Path:
    """Run what was planned; return the run folder.

    Args:
        plan: the run.
        watch: hears of what is done.
        course: what to do with it; None: `Course`, all steps taught and examined.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; the same command goes on.
    """
    settings = plan.settings
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        reproducibility.deterministic()
    divide(plan.profile.train, plan.ranks)  # refused now, and not when training begins
    freed_memory()  # so is what its switch cannot hold
    amp = plan.profile.train.amp
    reproducibility.refuse_fp16_on_cpu(amp, plan.device)
    refuse_course(plan)
    watch({"event": "plan", "plan": plan})
    for noted in plan.catalog.warnings():
        watch({"event": "note", "what": noted["message"]})
    for note in bf16_notes(amp, plan.device):
        watch({"event": "note", "what": note})
    if plan.strategy.declaration.resumes == "step":
        watch({"event": "note", "what": f"{plan.strategy_name} cannot go on in the middle of a "
               "step: stopped there, it starts that step anew"})  # fmt: skip
    record = None if settings.fresh else plan.ranks.by_first(lambda: _recorded(plan))
    if record is not None:
        begun = record
        record = plan.ranks.by_first(lambda: _regrouped(plan, begun, watch))
    if record is not None and (said := _traced_otherwise(plan, record)) is not None:
        if record.status != "finished":
            raise said
        watch({"event": "note", "what": f"{said.what}: {said.next_step}"})
    if record is not None and record.status == "finished":
        if course is None:  # others leave files of their own
            plan.ranks.by_first(lambda: _whole(plan, record, watch))
        watch({"event": "already finished", "folder": plan.folder})
        return plan.folder
    with signals.listening(), _held(plan, plan.folder, wait=False):
        if settings.fresh:
            plan.ranks.by_first(lambda: empty_run(plan.folder))
        count = None
        same = record is not None and (record.host or {}).get("processes", 1) == plan.ranks.size
        if record is not None and same and settings.threads is None:
            count = record.threads  # equal bits need as many
        plan.ranks.by_first(lambda: prepare(plan.catalog, watch=watch))
        with reproducibility.threads(count):
            (course or Course)(plan, record, watch).go()
    return plan.folder


def bf16_notes(amp: str, device: torch.device) -> list[str]:
    """What is known to go wrong in bfloat16 on the device: emulated, slow, or silently wrong.

    Args:
        amp: `train.amp`.
        device: where the run computes.
    """
    slow = reproducibility.slow_bf16(amp, device)
    faults: list[str] = []
    if amp == "bf16" and device.type == "cuda":
        faults = conv3d_faults(torch.__version__, torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # torch
    return [*([slow] if slow else []), *faults]


def _recorded(plan: Plan) -> RunRecord | None:
    """The record of a run that was begun."""
    if not (plan.folder / "run.json").exists():
        return None
    record = RunRecord.read(plan.folder)
    if plan.tuned is None or record.tuned is not None:
        return record
    with alone(plan.folder, wait=False):  # whoever works on it writes the record, too
        record = RunRecord.read(plan.folder)
        record.tuned = plan.tuned  # an untuned run of the settings that tuning chose: the same run
        record.reseal(plan.folder)
        record.write(plan.folder)
    return record


def _regrouped(plan: Plan, record: RunRecord, watch: Watch) -> RunRecord:
    """The record with the groups that the course has now: tables alone read them, no number does.

    Args:
        plan: the run.
        record: of a run that was begun.
        watch: hears where they are others.
    """
    groups = groups_of(plan.benchmark)
    if record.course.groups == groups:
        return record
    said = "the groups of the course were changed since the run began, and "
    try:
        with alone(plan.folder, wait=False):
            record = RunRecord.read(plan.folder)
            record.course = dataclasses.replace(record.course, groups=groups)
            keep_course(plan.folder, plan.settings.bench)
            record.reseal(plan.folder, below="course/")
    except StoreError as err:  # a folder that may only be read
        watch({"event": "note", "what": f"{said}its tables keep the earlier ones: {err.what}"})
    else:
        watch({"event": "note", "what": f"{said}its tables have the new ones"})
    return record


def _whole(plan: Plan, record: RunRecord, watch: Watch) -> None:
    """See whether a finished run still has its files; checkpoints come back where runs share them.

    Raises:
        StoreError: it has no scores.
    """
    folder = plan.folder
    if not (folder / "scores.csv").is_file():
        raise StoreError(
            "the run is finished, but its scores are missing",
            where=folder / "scores.csv",
            next_step="take the file back from a copy, or repeat the command with --fresh, which "
            "teaches and examines all anew",
        )
    if record.excerpt:
        return
    lost = []
    for number in range(1, record.steps_done + 1):
        if run_folder.checkpoint_path(folder, number, record.shared_step1).is_file():
            continue
        name = f"step{number}.pt"
        try:
            found = take_back(plan.step_folder(number) / name, folder)
        except StoreError:  # a folder that may only be read, or no room: scores need none
            found = False
        lost += [] if found else [name]
    if lost:
        there = "is not there" if len(lost) == 1 else "are not there"
        watch({"event": "note", "what": f"{', '.join(lost)} {there} any more; scores need no "
               "checkpoint, and --fresh teaches all anew"})  # fmt: skip


def _traced_otherwise(plan: Plan, record: RunRecord) -> SettingError | None:
    """What to say where a run is asked for a trace that it was not begun with.

    The trace is no part of the run's id, for no score depends on it; but it is written while a step
    is taught, so steps with and without one are not shared, nor gone on with.
    """
    if record.with_defaults is None:
        return None
    then = record.with_defaults["profile"]["examine"].get("trace_every", 0)
    now = plan.profile.examine.trace_every
    if then == now:
        return None
    return SettingError(
        "the run was begun with another examine.trace_every",
        where=plan.folder,
        expected=f"{then}, as in run.json",
        got=now,
        next_step=f"--set examine.trace_every={then}, or --fresh to teach all anew",
    )


@contextmanager
def _held(plan: Plan, folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder for all processes of a run, until all are done with it; see `alone`.

    Args:
        plan: the run.
        folder: of a run, or of a step that runs share.
        wait: for another run that works in it, in place of an error.
    """
    with ExitStack() as stack:
        plan.ranks.by_first(lambda: _hold(stack, folder, wait=wait))
        yield
        plan.ranks.gather(None)


def _hold(stack: ExitStack, folder: Path, *, wait: bool) -> None:
    stack.enter_context(alone(folder, wait=wait))


def empty_run(folder: Path) -> None:
    """Remove what a run folder holds, but its lock.

    Raises:
        StoreError: something cannot be removed.
    """
    try:
        for item in folder.iterdir():
            if not item.name.startswith((".lock", ".nfs")):  # NFS: files still open elsewhere
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    except OSError as err:
        raise StoreError(
            "the earlier run cannot be removed",
            where=err.filename or folder,
            got=err.strerror,
            next_step="close what uses it, or choose another folder with --out",
        ) from err


class Course:
    """The state of a running course.

    Args:
        plan: the run.
        record: of a run that was begun; None: it begins now.
        watch: hears of what is done.
    """

    def __init__(self, plan: Plan, record: RunRecord | None, watch: Watch) -> None:
        self.plan, self.watch = plan, watch
        self.record = record or new_record(plan)
        self.rows = self._scored(self.record.steps_done)
        self.memory: Memory = {}
        self.model: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self.files = FileAccessMonitor(plan.catalog)

    def _scored(self, done: int) -> list[Score]:
        """The scores of the steps that are done.

        Args:
            done: how many are; a later one may have left scores before it was stopped.

        Raises:
            StoreError: they cannot be read.
        """
        if not done:
            return []
        scores = run_folder.read_scores(self.plan.folder / "scores.csv")
        return [row for row in scores if row.step <= done]

    @property
    def last(self) -> int:
        """The last step that is taught."""
        return len(self.plan.benchmark.steps)

    def go(self) -> None:
        """Teach and examine every step that is not done."""
        plan = self.plan
        here = plan.host()
        if self.record.host is None:
            self.record.host = here
        self._mark(self.record.steps_done + 1, here)
        self.record.starts = (self.record.starts or 0) + 1
        plan.ranks.by_first(self._begin)
        for number in range(1, self.last + 1):
            plan.catalog.step = number
            # by which all processes judge what this step may open
            self.record.ledger = plan.ranks.gather(self.record.ledger)[0]
            lesson = plan.lesson(number)
            self.watch({"event": "step", "lesson": lesson, "of": self.last})
            with past_data.refuse_unrecorded_reads(self.files):
                self._learn(lesson)
                assert self.model is not None  # noqa: S101  # set by _learn; tells the type checker
                served = plan.strategy.serve(self.model, self.memory)
                if self.record.steps_done < number:
                    self.examine(lesson, served)
            self.teacher = copy.deepcopy(served).eval().requires_grad_(False)
        plan.ranks.by_first(self._finish)
        self.watch({"event": "finished", "folder": plan.folder})

    def _begin(self) -> None:
        keep_course(self.plan.folder, self.plan.settings.bench)
        self.record.write(self.plan.folder)

    def _finish(self) -> None:
        self.close()
        self.record.status = "finished"
        for left in ("resume", "pseudo", "exam"):  # as above; until 0.2 all three lay here
            shutil.rmtree(self.plan.folder / left, ignore_errors=True)
        self.save(sealed=True)

    def close(self) -> None:
        """What is left to do once the last step is examined."""
        write_costs(self.plan, self.record)

    def _mark(self, step: int, host: Mapping[str, Any]) -> None:
        """Say in the record that a step was worked on elsewhere than where the run began."""
        differs = reproducibility.differences(self.record.host or host, host)
        if self.record.resumed_elsewhere is None:
            self.record.resumed_elsewhere = []
        marks = self.record.resumed_elsewhere
        if differs and (mark := {"step": step, "differs": differs}) not in marks:
            marks.append(mark)

    def _opened(self, opened: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Enter step → purpose → cases into the ledger of the record."""
        ledger = self.record.ledger
        for step, by_purpose in opened.items():
            for purpose, cases in by_purpose.items():
                have = ledger.setdefault(step, {}).setdefault(purpose, [])
                ledger[step][purpose] = sorted({*have, *cases})

    def save(self, *, sealed: bool = False) -> None:
        """Write the record; with `sealed` also the checksum of every file."""
        self._opened(self.plan.catalog.opened())
        if sealed:
            self.record.seal(self.plan.folder)
        self.record.write(self.plan.folder)

    # ------------------------------------------------------------------------------- learning

    def _learn(self, lesson: Lesson) -> None:
        """Make `model` and `memory` those after the step: from a checkpoint, or by teaching."""
        plan, number = self.plan, lesson.number
        strategy = plan.strategy.first_step() if number == 1 else plan.strategy
        path = plan.folder / f"step{number}.pt"
        if plan.benchmark.steps[number - 1].given is not None:
            path = run_folder.checkpoint_path(plan.folder, number, self.record.shared_step1)
            self._take_given(strategy, lesson, path)
        elif plan.ranks.by_first(path.exists):
            plan.ranks.by_first(lambda: self._refuse_other_past(path))
            self.model, self.memory = loaded(plan, strategy, lesson, path)
        else:
            self._share(strategy, lesson)
        plan.ranks.by_first(lambda: self._take_record(number, path))

    def _refuse_other_past(self, path: Path) -> None:
        """Refuse a step of this run that was taught from another model than the one before it.

        A run that lost the checkpoint of an earlier step has that step again, which another machine
        may have taught to other bits.
        """
        origin = store_files.read_json(path.with_suffix(".json")).get("origin")
        if self.model is None or origin is None:  # until 0.2 nothing was said of it
            return
        state = {"model": self.model.state_dict(), "memory": self.memory}
        if origin["before"] != checkpoint.state_digest(state):
            raise StoreError(
                "a step was taught from another model than the step before it has now",
                where=path,
                expected="the checkpoint of the step before as it was, or all steps taught anew",
                got="a step before that was taught again, to other weights",
                next_step="put that checkpoint back, or repeat the command with --fresh",
            )

    def _take_record(self, number: int, path: Path) -> None:
        """What a step took, and what its monitors remarked, into the record of the run."""
        plan = self.plan
        cost = store_files.read_json(path.with_suffix(".json"))
        self._opened({str(number): cost.pop("opened")})
        for host in cost.pop("hosts", ()):
            self._mark(number, host)
        origin = cost.pop("origin", None)
        if origin is not None:
            origins = self.record.step_origins or {}
            self.record.step_origins = {**origins, str(number): origin}
        shared = number == 1 or (origin is not None and origin["run"] != run_name(plan.folder))
        self.record.cost.setdefault(str(number), {})["train"] = {**cost, "shared": shared}
        log = plan.folder / "events.jsonl"
        if not log.exists():  # of a given step, made before 0.2
            store_files.write_bytes(log, (path.parent / log.name).read_bytes())
        self.record.warnings = [
            *plan.catalog.warnings(),
            *warnings_of(run_folder.read_events(log)),
        ]

    def _share(self, strategy: Strategy, lesson: Lesson) -> None:
        """Teach the step where all runs find it that share it, or take it as one of them did."""
        plan, number = self.plan, lesson.number
        path = plan.step_folder(number) / f"step{number}.pt"
        before = None
        if self.model is not None:
            state = {"model": self.model.state_dict(), "memory": self.memory}
            before = checkpoint.state_digest(state)
        if plan.ranks.first and store_files.is_locked(path.parent / ".lock"):
            said = f"waiting for another run to teach step {number}, which this one shares"
            if (held := store_files.stand_in(path.parent / ".lock")) is not None:
                said += f"; if none does any more, remove {held}"
            self.watch({"event": "note", "what": said})
        with _held(plan, path.parent, wait=True):

            def to_teach() -> bool:
                """Whether the step is to be taught; makes its folder ready for that."""
                old = run_folder.checkpoint_path(plan.folder, number, self.record.shared_step1)
                trusted = self.record.steps_done or "code" not in plan.steps[0]
                begun = path.exists() or (path.parent / "resume").exists()
                if number == 1 and trusted and old.exists() and not begun:
                    adopt_step(old, path)
                taken = not plan.settings.fresh and continues(path, before)
                if taken or plan.settings.fresh:
                    for left in ("resume", "pseudo"):  # by a process killed after its last use
                        shutil.rmtree(path.parent / left, ignore_errors=True)
                if taken:
                    return False
                # one that was taught from another model stays with the runs that took it; left
                # here, it would stand for the step whenever this attempt at it is stopped
                for former in (path, path.with_suffix(".json")):
                    former.unlink(missing_ok=True)
                store_files.write_json(path.parent / "identity.json", plan.steps[number - 1])
                return True

            if plan.ranks.by_first(to_teach):
                self._teach(strategy, lesson, path, before)
            else:
                self.model, self.memory = loaded(plan, strategy, lesson, path)
                self.watch({"event": "shared", "path": path})
            plan.ranks.by_first(lambda: take_step(path, plan.folder))

    def _take_given(self, strategy: Strategy, lesson: Lesson, path: Path) -> None:
        """The model of a step that was learned elsewhere; never taught here."""
        given = self.plan.benchmark.steps[lesson.number - 1].given
        if not path.is_file() or checkpoint.state_digest(checkpoint.load(path)) != given:
            raise StoreError(
                "the model of a step that was learned elsewhere is not there",
                where=path,
                expected=f"the checkpoint with the state {given}",
                got="another one" if path.is_file() else "no such file",
                next_step="repeat the `clbench extend` that made this course; `clbench run` has no "
                "data to teach the step with",
            )
        self.model, self.memory = loaded(self.plan, strategy, lesson, path)
        self.watch({"event": "note", "what": f"step {lesson.number} was learned elsewhere"})

    def _teach(self, strategy: Strategy, lesson: Lesson, path: Path, before: str | None) -> None:
        start = Start(
            model=self.model,
            teacher=self.teacher,
            memory=self.memory,
            ledger=self.record.ledger,
            before=before,
        )
        self.model = teach_step(self.plan, strategy, lesson, path, start, self.watch)
        if not self.plan.ranks.first:
            # weights are the same in all processes; what hooks computed may differ on GPUs
            self.model, self.memory = loaded(self.plan, strategy, lesson, path)

    def examine(self, lesson: Lesson, served: nn.Module) -> None:
        """Score every test case of the course; the step is done once this is written."""
        number = lesson.number
        path = run_folder.checkpoint_path(self.plan.folder, number, self.record.shared_step1)
        examined = examine_step(self.plan, lesson, served, self.memory, path, self.watch)
        self.record.steps_done = number
        if examined is not None:
            self._enter(number, examined)
        self.plan.ranks.gather(None)

    def _enter(self, number: int, examined: Examined) -> None:
        """What an examination found, into the run folder."""
        self.rows += examined.rows
        self._opened({str(number): {"test": examined.opened}})
        run_folder.write_scores(self.plan.folder / "scores.csv", self.rows)
        self.record.cost.setdefault(str(number), {}).update(examined.cost)
        self.record.reexamined = {
            **(self.record.reexamined or {}),
            str(number): examined.reexamined,
        }
        self.save()
        examined.exams.close()
