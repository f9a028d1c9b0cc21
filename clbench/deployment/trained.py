"""The model of a run's step, loaded without the run's data and ready to predict.

`clbench.run.models` builds and loads it as the run did, so that equal images give equal bits.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from clbench.data.cache import VolumeCache
from clbench.data.catalog import Catalog
from clbench.errors import SettingError, StoreError, first_line
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.text_encodings import Vectors
from clbench.run.models import loaded, predictor, windows_fit
from clbench.run.plan import Plan, RunSettings, pick_device
from clbench.run.record import benchmark_of, profile_of, recorded_split, strategy_of
from clbench.spec.benchmark import Preprocessing, Source
from clbench.store import checkpoint, run_folder
from clbench.store.record import RunRecord

VECTORS = "vectors.safetensors"
"""In the folder of an imported run: structure → its text vector."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a run has learned after a step."""

    record: RunRecord
    """`run.json` of the run."""
    step: int
    """1-based step after which it is taken."""
    structures: tuple[str, ...]
    """Every structure learned so far, in the order of the course."""
    server: VolumePredictor
    """Predicts whole volumes."""
    digest: str
    """Names the exact weights, see `clbench.store.checkpoint.digest`."""
    plan: Plan
    """Of the run, without its data: no case can be opened."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Spacing and HU window of the model's images."""
        return self.plan.catalog.preprocessing

    @property
    def source(self) -> Source:
        """A data set of the course; a new image is of none, and no label of it is read."""
        return self.plan.catalog.source(self.step)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the course's data sets."""
        return tuple(dict.fromkeys(step.source for step in self.plan.benchmark.steps))

    def read_as(self, source: str) -> Source:
        """A data set of the course, as the course reads it.

        Raises:
            SettingError: it has none of this name.
        """
        if source not in self.sources:
            raise SettingError(
                "the run's course has no such source",
                where="--source",
                expected=", ".join(self.sources),
                got=source,
            )
        return self.plan.benchmark.reads(source)

    @property
    def postprocess(self) -> bool:
        """Whether the run's examination applies the rules of `clbench.data.postprocess`."""
        return self.plan.profile.examine.postprocess

    def enough_memory(self, case: str) -> AbstractContextManager[None]:
        """An error that names smaller settings where predicting a case needs too much memory."""
        return windows_fit(self.plan, f"predicting case {case}")


def checkpoint_path(folder: Path, record: RunRecord, step: int) -> Path:
    """The checkpoint after a step.

    Args:
        folder: the run.
        record: its record.
        step: 1-based.

    Raises:
        StoreError: there is none.
    """
    path = run_folder.checkpoint_path(folder, step, record.shared_step1)
    if path.is_file():
        return path
    there = sorted(p.name for p in folder.glob("step*.pt"))
    raise StoreError(
        f"the run has no checkpoint of step {step}",
        where=path,
        expected=f"step{step}.pt",
        got=", ".join(there) or "no checkpoint (a published copy of a run holds none)",
        next_step="repeat the run's command (with --fresh, if it says that the run is finished), "
        "or name another step with --step; a run made before 0.2 has step 1 in the folder _shared "
        "beside it, which must be copied along",
    )


def load_trained(folder: Path, *, step: int | None = None, device: str = "auto") -> TrainedModel:
    """The model of a run after a step.

    Args:
        folder: the run; it need not be finished.
        step: 1-based; None: the last one that is taught and examined.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …

    Raises:
        StoreError: no run, no checkpoint of that step, or one that this version cannot read.
        SettingError: a step the course does not have, or a device that is not there.
    """
    record = RunRecord.read(folder)
    number = finished_step(record, folder, step)
    path = checkpoint_path(folder, record, number)
    plan = plan_without_data(record, folder, device=device)
    lesson = plan.lesson(number)
    strategy = plan.strategy.first_step() if number == 1 else plan.strategy
    model, memory = loaded(plan, strategy, lesson, path)
    served = plan.strategy.serve(model, memory)
    return TrainedModel(
        record=record,
        step=number,
        structures=lesson.structures,
        server=predictor(plan, plan.strategy, served, lesson.structures, memory),
        digest=checkpoint.digest(served),
        plan=plan,
    )


def finished_step(record: RunRecord, folder: Path, step: int | None) -> int:
    """The 1-based step whose model is meant.

    Args:
        record: of the run.
        folder: of the run, for errors.
        step: as asked for; None: the last one that is taught and examined.

    Raises:
        StoreError: the run has no model, or no step of it is finished.
        SettingError: a step the course does not have.
    """
    if record.external:
        raise StoreError(
            "the run holds predictions made elsewhere, and no model",
            where=folder,
            next_step="use the tool that made them",
        )
    steps = len(record.course.steps)
    number = step if step is not None else record.steps_done
    if step is None and number == 0:
        raise StoreError(
            "no step of the run is finished yet",
            where=folder,
            next_step="repeat the run's command; it goes on where it stopped",
        )
    if not 1 <= number <= steps:
        raise SettingError(
            "the course does not have this step",
            where="--step",
            expected=f"1 to {steps}",
            got=number,
        )
    return number


def plan_without_data(record: RunRecord, folder: Path, *, device: str = "auto") -> Plan:
    """What a run was planned as, to build its models from; its cases are named, not found.

    Args:
        record: of the run.
        folder: of the run.
        device: where its models compute.

    Raises:
        StoreError: the benchmark, the strategy or the text vectors are others today.
    """
    benchmark, profile, strategy = benchmark_of(record), profile_of(record), strategy_of(record)
    recorded = record.identity.strategy.get("version", 1)
    if not strategy.serves(recorded):
        raise StoreError(
            "the run was made by another version of the strategy",
            where=folder,
            expected=f"version {strategy.version} of {record.strategy}",
            got=f"version {recorded}",
            next_step="use the clbench that made the run, or run it again",
        )
    plan = Plan(
        settings=RunSettings(
            bench=record.settings["bench"],
            strategy=record.settings["strategy"],
            seed=record.seed,
        ),
        benchmark=benchmark,
        profile=replace(profile, backbone=replace(profile.backbone, weights=None)),  # see `loaded`
        strategy=strategy,
        strategy_name=record.strategy,
        device=pick_device(device),
    )
    plan.vectors = _vectors(plan, record, folder)
    if (got := hashlib.sha256(plan.vectors.array.tobytes()).hexdigest()) != record.identity.vectors:
        raise StoreError(
            "the text vectors of the structures are not those of the run",
            where=profile.text.path or f"encoding {profile.text.encoding}, or {VECTORS} of the run",
            expected=record.identity.vectors,
            got=got,
            next_step="put the file of vectors back that the run was made with",
        )
    plan.catalog = Catalog(
        benchmark=benchmark,
        preprocessing=profile.preprocessing(benchmark.preprocessing),
        splits=tuple(recorded_split(raw) for raw in record.identity.splits),
        external_splits=tuple(recorded_split(raw) for raw in record.identity.external_tests),
        files={},
        patients=record.patients,
        fingerprint=record.data_fingerprint,
        cache=VolumeCache(folder),  # nothing is opened, hence nothing is written there
    )
    plan.identity, plan.folder = record.identity, folder
    return plan


def _vectors(plan: Plan, record: RunRecord, folder: Path) -> Vectors:
    """A vector per structure: the copy in the folder of an imported run, or encoded anew."""
    path = folder / VECTORS
    if not path.is_file():
        return plan.vectors
    names = plan.benchmark.structures(len(plan.benchmark.steps))
    try:
        rows = load_arrays(path.read_bytes())
        array = np.stack([rows[name] for name in names])
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise StoreError(
            "the text vectors of a run cannot be read",
            where=path,
            expected=", ".join(names),
            got=first_line(err),
            next_step="import the model again",
        ) from err
    return Vectors(names=names, array=array, record=record.text_encoding)
