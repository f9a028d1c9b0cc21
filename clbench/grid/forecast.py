"""Forecast of a run: time, memory and disk, from a short trial of the real network on this device.

The trial is the run itself with a few updates and a few cases, in folders of its own that are
removed afterwards. What it measures per update and per case is carried on to the whole course.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.data.catalog import Catalog
from clbench.errors import StoreError
from clbench.evaluation.trace import trace_cases
from clbench.run.course import run_plan
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.spec.benchmark import Step
from clbench.spec.splits import Split
from clbench.statistics.sample_size import detectable_difference
from clbench.store import checkpoint
from clbench.store.record import RunRecord

EPOCHS, UPDATES, WARM_UP = 2, 4, 2
"""Epochs of a trial's phases, updates of each, and updates that are not counted: the first ones
allocate memory."""
CASES = 2
"""Training cases of a trial's steps."""
STAGES = {
    "prepared": "prepare",
    "opened": "prepare",
    "pseudo": "pseudo labels",
    "exam": "examine",
}
"""Event of one case → what is done with it."""
VALIDATE = "validate"
"""The stage of what is measured on validation cases while a step is taught."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepForecast:
    """One step of the whole run."""

    updates: int
    """Of all phases."""
    cases: int
    """Training cases."""
    tests: int
    """Test cases that are examined after it."""
    seconds: Mapping[str, float]
    """`train`, `VALIDATE` and the stages of `STAGES` → seconds."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What the whole run will take."""

    steps: tuple[StepForecast, ...]
    """In order."""
    peak_bytes: int
    """Largest resident memory of the process in the trial; on a GPU what torch allocated there."""
    host_bytes: int
    """Largest resident memory of the process in the trial, wherever it computed."""
    device: str
    """Where the trial computed."""
    cache_bytes: float
    """Prepared volumes of all cases; shared by all runs on this grid."""
    run_bytes: float
    """What a finished run leaves: checkpoints, predictions, tables."""
    running_bytes: float
    """What it holds while it runs: the same, and the optimizer's state beside the weights."""
    measured_s: tuple[float, ...] = ()
    """Seconds of finished runs of the same settings, other seeds included."""
    measured_bytes: tuple[int, ...] = ()
    """Largest memory of each of them, counted as `peak_bytes`."""
    trial_s: float
    """Seconds that the trial took."""

    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return sum(step.total_s for step in self.steps)

    @property
    def error(self) -> float:
        """Forecast divided by the mean of measured runs, minus 1; nan = none was measured."""
        if not self.measured_s:
            return math.nan
        return self.total_s / statistics.fmean(self.measured_s) - 1

    @property
    def memory_error(self) -> float:
        """Memory of the trial divided by the mean of measured runs, minus 1; nan: see `error`."""
        if not self.measured_bytes:
            return math.nan
        return self.peak_bytes / statistics.fmean(self.measured_bytes) - 1


def forecast(plan: Plan) -> Forecast:
    """Try a run for a few updates per phase, and carry on what was measured.

    Args:
        plan: the run; nothing is written below the folder of its results.

    Raises:
        ClbenchError: what would stop the run itself.
    """
    whole = plan.catalog
    measured = _measured(plan)
    began = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="clbench-trial-"))
    try:
        watch = _Watch()
        trial = resolve(_shortened(plan, home))
        folder = run_plan(trial.open(), watch.see)
        record = RunRecord.read(folder)
        kept, kept_in_trial = _stored_cases(plan), _stored_cases(trial)
        held = [
            kept[step].held / kept_in_trial[step].held if kept_in_trial[step].held else 1.0
            for step in range(1, len(whole.splits) + 1)
        ]
        sizes = _sizes(trial, record, home / "cache", folder, held)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    tests = len(whole.test_cases)
    cases = sum(len(split.cases) for split in (*whole.splits, *whole.external_splits))
    trained = max(
        cost.get("train", {}).get("trainable_parameters", 0) for cost in record.cost.values()
    )
    checkpoints = sum(sizes.checkpoints)
    run_bytes = checkpoints + sizes.prediction * tests * len(whole.splits)
    return Forecast(
        steps=tuple(
            _step(plan, trial, number, watch, tests, (kept[number], kept_in_trial[number]))
            for number in range(1, len(whole.splits) + 1)
        ),
        peak_bytes=_peak(record, plan.device.type),
        host_bytes=_peak(record, "cpu"),
        device=record.device,
        cache_bytes=sizes.volume * cases,
        run_bytes=run_bytes,
        running_bytes=run_bytes + max(sizes.checkpoints) + 8 * trained,  # two moments, float32
        measured_s=tuple(seconds for seconds, _ in measured),
        measured_bytes=tuple(peak for _, peak in measured if peak),
        trial_s=time.monotonic() - began,
    )  # fmt: skip


def smallest_difference(patients: int, *, alpha: float = 0.05, comparisons: int = 1) -> float:
    """Smallest mean difference that a paired test finds with power 0.8, in sd of the differences.

    Args:
        patients: test patients.
        alpha: level of the family.
        comparisons: in the family; Bonferroni, as before any data nothing better is known.

    Example:
        >>> from clbench.grid.forecast import smallest_difference
        >>> round(smallest_difference(16), 3), round(smallest_difference(16, comparisons=13), 3)
        (0.749, 1.07)
    """
    return detectable_difference(
        standard_error=1 / math.sqrt(patients), df=patients - 1, level=alpha / comparisons
    )


@dataclass(kw_only=True)
class _Measured:
    """What the events of one step of the trial say."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    """Phase → seconds of each update."""
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Phase → its updates, and those of one of its epochs."""
    stages: dict[str, list[float]] = field(default_factory=dict)
    """Stage → seconds of each case."""
    counts: dict[str, int] = field(default_factory=dict)
    """Stage → cases."""
    validations: dict[str, tuple[int, list[float]]] = field(default_factory=dict)
    """Phase → its last epochs that are validated, and seconds of each validation."""


class _Watch:
    """Times between the events of a run."""

    def __init__(self) -> None:
        self.steps: dict[int, _Measured] = {}
        self.number, self.last_s = 0, time.monotonic()

    def of_step(self, number: int) -> _Measured:
        """Of a 1-based step; empty where it was not taught."""
        return self.steps.setdefault(number, _Measured())

    def see(self, event: Mapping[str, Any]) -> None:
        """Take the time since the event before."""
        now = time.monotonic()
        seconds, self.last_s = now - self.last_s, now
        kind = event["event"]
        if kind == "step":
            self.number = event["lesson"].number
        step = self.of_step(self.number)
        if kind == "update":
            phase = event["phase"]
            step.phases.setdefault(phase, []).append(seconds)
            _, per_epoch = step.lengths.get(phase, (0, 0))
            step.lengths[phase] = (event["of"], max(per_epoch, event["iteration"] + 1))
        elif kind == "validation":
            _, all_s = step.validations.setdefault(event["phase"], (event["last_epochs"], []))
            all_s.append(seconds)
        elif kind in STAGES:
            step.stages.setdefault(STAGES[kind], []).append(seconds)
            step.counts[STAGES[kind]] = event["of"]


def _shortened(plan: Plan, home: Path) -> RunSettings:
    """The settings of the trial: few cases, few updates, folders of its own."""
    settings = plan.settings
    few = [f"train.epochs={EPOCHS}", f"train.iterations={UPDATES}", "train.warmup=1"]
    splits: dict[str, Split] = {}
    if settings.data is None:
        few += ["phantom.test=1"]
        few += [f"phantom.train={min(CASES, plan.profile.phantom.train)}"]
        few += [f"phantom.validation={min(1, plan.profile.phantom.validation)}"]
    else:
        for step, split in zip(plan.benchmark.steps, plan.catalog.splits, strict=True):
            splits[step.name] = dataclasses.replace(
                split,
                train=_with_all(step, split.train, plan.catalog),
                validation=split.validation[:1],
                test=split.test[:1],
            )
        externals = zip(plan.benchmark.external_tests, plan.catalog.external_splits, strict=True)
        for external, split in externals:
            splits[external.source] = dataclasses.replace(split, test=split.test[:1])
    set_here = {word.partition("=")[0] for word in few}
    kept = [word for word in settings.overrides if word.partition("=")[0].strip() not in set_here]
    return dataclasses.replace(
        settings, out=home / "results", cache=home / "cache", splits=splits, fresh=False,
        overrides=(*kept, *few), keep_predictions=True, checkpoint_s=math.inf,
    )  # fmt: skip


def _with_all(step: Step, cases: Sequence[str], catalog: Catalog) -> tuple[str, ...]:
    """The first training cases of a step, and those it takes to show all that it teaches.

    Args:
        step: of the course.
        cases: its training cases.
        catalog: where they are; labels are read until each structure was found.
    """
    source = catalog.benchmark.reads(step.source)
    taken, lacking = list[str](), set(step.learns)
    for case in cases:
        held = catalog.cache.holds(catalog.files[source.name][case], source)
        if len(taken) < CASES or lacking & held:
            taken.append(case)
            lacking -= held
        if len(taken) >= CASES and not lacking:
            break
    return tuple(taken)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Bytes on disk."""

    volume: float
    """Prepared volume of a case."""
    prediction: float
    """Stored prediction of a case after a step."""
    checkpoints: tuple[float, ...]
    """Of each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """Earlier cases that a strategy stores, in one step."""

    prepared: int = 0
    """Stored, and so prepared, when the step begins."""
    held: int = 0
    """All that it has while the step is taught."""


def _stored_cases(plan: Plan) -> dict[int, _Stored]:
    """1-based step → the earlier cases that a strategy stores, as it says itself.

    Asked without any training: a strategy whose choice leans on an entry that training left in
    memory lacks it here, and is taken to store nothing from that step on.
    """
    memory: dict[str, Any] = {}
    stored = {number: _Stored() for number in range(1, len(plan.benchmark.steps) + 1)}
    for number in list(stored)[1:]:
        lesson = plan.lesson(number)
        try:
            prepared = plan.strategy.store_cases(lesson, plan.kit, memory)
            held = plan.strategy.extra_cases(lesson, memory) if memory else {}
        except KeyError:
            break
        stored[number] = _Stored(prepared=len(prepared), held=len(held))
    return stored


def _sizes(
    trial: Plan, record: RunRecord, cache: Path, folder: Path, held: Sequence[float]
) -> _Sizes:
    """What the trial left on the disk.

    Args:
        trial: its plan.
        record: its record.
        cache: its cache.
        folder: its run.
        held: per step, how many times as many stored cases the whole run has in its memory.
    """
    opened = {
        (number, case)
        for number, by_purpose in record.ledger.items()
        for cases in by_purpose.values()
        for case in cases
    }
    phantom = cache / "phantom"
    prepared = _bytes(cache) - (_bytes(phantom) if phantom.is_dir() else 0)
    stored = [p.stat().st_size for p in (folder / "predictions").rglob("*.npz")]
    steps = len(trial.benchmark.steps)
    paths = [folder / f"step{k}.pt" for k in range(1, steps + 1)]
    return _Sizes(
        volume=prepared / max(1, len({case for _, case in opened})),
        prediction=statistics.fmean(stored) if stored else 0.0,
        checkpoints=tuple(
            _checkpoint_bytes(p, times) if p.is_file() else 0.0
            for p, times in zip(paths, held, strict=True)
        ),
    )


def _checkpoint_bytes(path: Path, times: float) -> float:
    """Size of a checkpoint with so many times the strategy's memory."""
    size = float(path.stat().st_size)
    if times == 1:
        return size
    memory = checkpoint.load(path)["memory"]
    return size + (times - 1) * sum(getattr(v, "nbytes", 0) for v in memory.values())


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _step(
    plan: Plan,
    trial: Plan,
    number: int,
    watch: _Watch,
    tests: int,
    stored: tuple[_Stored, _Stored],
) -> StepForecast:
    """A step of the whole run.

    Args:
        plan: of the whole run.
        trial: of the trial.
        number: of the step.
        watch: what the trial measured; what was prepared ahead of all steps is that of step 0.
        tests: test cases of the course.
        stored: cases that the strategy stores, in the whole run and in the trial.
    """
    split, train, seen = plan.catalog.splits[number - 1], plan.profile.train, watch.of_step(number)
    one = train.iterations or math.ceil(len(split.train) / train.crops)
    updates, train_s, validate_s = 0, 0.0, 0.0
    for phase, seconds in seen.phases.items():
        of, per_epoch = seen.lengths[phase]
        own = of // per_epoch  # a phase may have epochs of its own
        epochs = train.epochs if own == EPOCHS else own
        count = epochs * max(1, round(one * per_epoch / UPDATES))
        updates += count
        train_s += count * statistics.median(seconds[WARM_UP:] or seconds)
        if phase in seen.validations:
            last_epochs, spent = seen.validations[phase]
            validate_s += min(last_epochs, epochs) * statistics.median(spent[1:] or spent)
    validate_s *= len(split.validation) / max(1, len(trial.catalog.splits[number - 1].validation))
    scale = len(split.train) / max(1, len(trial.catalog.splits[number - 1].train))
    per_case = {stage: _per_case(seen.stages.get(stage, ())) for stage in STAGES.values()}
    per_case["prepare"] += _per_case(watch.of_step(0).stages.get("prepare", ()))
    whole, tried = stored
    own = seen.counts.get("pseudo labels", 0) - tried.prepared
    counts = {"prepare": seen.counts.get("prepare", 0) * scale,
              "pseudo labels": own * scale + whole.prepared,
              "examine": tests}  # fmt: skip
    every = plan.profile.examine.trace_every
    if every and number > 1:  # before the first update, after every so many, and after the last
        looks = 2 + updates // every - (plan.strategy.declaration.starts_from == "scratch")
        validate_s += looks * len(trace_cases(plan.catalog, number)) * per_case["examine"]
    return StepForecast(
        updates=updates,
        cases=len(split.train),
        tests=tests,
        seconds={
            "train": train_s,
            VALIDATE: validate_s,
            **{stage: counts[stage] * seconds for stage, seconds in per_case.items()},
        },
    )


def _per_case(seconds: Sequence[float]) -> float:
    """The first case also waits for what comes before it, so the median of the others counts."""
    return statistics.median(seconds[1:] or seconds) if seconds else 0.0


def _peak(record: RunRecord, device: str) -> int:
    """Largest memory in any phase of a run; 0 where it was not measured on such a device.

    Args:
        record: of the run.
        device: `cpu`: memory of the process counts; another one: memory of the GPU.
    """
    peaks = ("peak_cuda_bytes", "examine_peak_cuda_bytes")
    if device == "cpu":
        peaks = ("peak_rss_bytes", "examine_peak_rss_bytes")
    of_step = [{**cost, **cost.get("train", {})} for cost in record.cost.values()]
    return int(max((cost.get(peak, 0) for cost in of_step for peak in peaks), default=0))


def _measured(plan: Plan) -> list[tuple[float, int]]:
    """Seconds and largest memory of finished runs of these settings, of any seed."""
    home = plan.settings.out / plan.benchmark.name / plan.strategy_name
    own = dataclasses.replace(plan.identity, seed=0).run_id
    found = []
    for path in sorted(home.glob("*/run.json")):
        try:
            record = RunRecord.read(path.parent)
        except StoreError:  # damaged, or of another clbench: it says nothing, and stops nobody
            continue
        if record.status != "finished" or record.external:
            continue
        if dataclasses.replace(record.identity, seed=0).run_id != own:
            continue
        seconds = 0.0
        for cost in record.cost.values():
            teach = cost.get("train", {})
            seconds += teach.get("train_s", 0.0) + teach.get("prepare_s", 0.0)
            seconds += cost.get("examine_s", 0.0)
        found.append((seconds, _peak(record, plan.device.type)))
    return found
