"""Teaching one step of a planned course, or going on where an attempt at it was stopped.

Leaves `step<t>.pt`, `step<t>.json` (what the step took, all attempts together)
and the step's lines in `events.jsonl`. The loop over updates itself is `clbench.training.loop`.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clbench import reproducibility, signals
from clbench.evaluation.cost.meter import Meter
from clbench.evaluation.scoring import mean_dice
from clbench.evaluation.trace import Tracer
from clbench.nets.output import count_parameters
from clbench.run.models import blank, predictor, windows_fit
from clbench.run.plan import Plan
from clbench.store import checkpoint, files, run_folder
from clbench.strategy.contract import Lesson, Memory, Strategy
from clbench.training import past_data
from clbench.training.batches import CaseKey, Material
from clbench.training.gpu_memory import enough_memory, try_update
from clbench.training.loop import Validate, teach
from clbench.training.monitors import StepWatch, constant_labels, refuse_constant_labels
from clbench.training.pseudo_labelling import Prepared, prepare
from clbench.training.resume import Keeper, Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a step begins with."""

    model: nn.Module | None
    """The model after the previous step; it grows, and is taught. None before step 1."""
    teacher: nn.Module | None
    """As it was served after the previous step."""
    memory: Memory
    """The strategy's; changes."""
    ledger: Mapping[str, Any]
    """Step → purpose → cases opened so far, of the run's record."""


def teach_step(
    plan: Plan, strategy: Strategy, lesson: Lesson, path: Path, start: Start, watch: Watch
) -> nn.Module:
    """Teach a step and write its checkpoint.

    Args:
        plan: the run.
        strategy: the method (in step 1 the one it names by `first_step`).
        lesson: the step.
        path: the checkpoint to be written.
        start: what the step begins with.
        watch: hears of every update.

    Returns:
        The model taught.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; what is saved beside `path` goes on from there.
    """
    attempt = _Attempt(plan, strategy, lesson, path, start, watch)
    same_threads = attempt.hosts and plan.settings.threads is None
    with reproducibility.threads(attempt.hosts[-1]["threads"] if same_threads else None):
        return attempt.go()


class _Attempt:
    """One attempt at a step, and what it knows of those before it."""

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        lesson: Lesson,
        path: Path,
        start: Start,
        watch: Watch,
    ) -> None:
        self.plan, self.strategy, self.path, self.start = plan, strategy, path, start
        self.lesson, self.watch = lesson, watch
        self.catalog, self.memory = plan.catalog, start.memory
        self.log = path.parent / "events.jsonl"
        self.meter = Meter(plan.device)
        self.taught_by = "none" if start.teacher is None else checkpoint.digest(start.teacher)
        self.keeper = Keeper(path, every_s=plan.settings.checkpoint_s, watch=watch)
        found = self.keeper.found
        if found and not (self.log.exists() and self.log.stat().st_size >= found["events"]):
            self.keeper.forget("its event log was cut short")
        elif found and found["teacher"] != self.taught_by:
            self.keeper.forget("the model it started from is another one now")
        self.before = self.keeper.found or {}
        self.hosts = list(self.before.get("hosts", ()))

    def go(self) -> nn.Module:
        """Prepare, teach, write."""
        begun = time.monotonic()
        model = self._begin()
        prepared = self._prepare()
        material = self._material(prepared)
        taught = time.monotonic()

        def facts() -> dict[str, Any]:
            """What the step took so far, all attempts together."""
            now, before = time.monotonic(), self.before
            return {
                "prepare_s": before.get("prepare_s", prepared.kept_s) + taught - begun,
                "train_s": before.get("train_s", 0.0) + now - taught,
                **{k: max(before.get(k, 0), v) for k, v in self.meter.peaks().items()},
                "opened": self.catalog.opened().get(str(self.lesson.number), {}),
                "hosts": self.hosts,
            }

        # lines of an attempt that was broken off go: those of the step, or after its last place
        with run_folder.EventLog(
            self.log,
            keep=lambda e: int(e["step"]) < self.lesson.number,
            size=self.before.get("events"),
        ) as events:
            here = {"teacher": self.taught_by}
            self.keeper.facts = lambda: {**facts(), **here, "events": events.flushed()}
            self._teach(model, material, events)
            cost = facts()
        self._write(model, prepared, cost)
        return model

    def _begin(self) -> nn.Module:
        """The model as the step finds it; refuses what cannot be taught."""
        plan, strategy, catalog = self.plan, self.strategy, self.catalog
        lesson = replace(self.lesson, voxels=catalog.voxels(self.lesson.number))
        self.lesson = lesson
        past_data.refuse_undeclared(strategy, lesson, self.memory)
        for purpose, cases in self.before.get("opened", {}).items():
            opened = catalog.ledger.setdefault(lesson.number, {})
            opened.setdefault(purpose, set()).update(cases)
        if (here := reproducibility.host(plan.device)) not in self.hosts:
            self.hosts.append(here)
        if lesson.number == 1 or strategy.declaration.starts_from == "scratch":
            model = blank(plan, strategy, lesson)
        else:
            assert self.start.model is not None  # noqa: S101  # step 1 went before
            model = self.start.model
            strategy.grow(model, plan.kit, lesson)
        model.to(plan.device)
        refuse_constant_labels(
            lesson, [catalog.open(lesson.number, c, "train") for c in lesson.cases]
        )
        return model

    def _prepare(self) -> Prepared:
        """Pseudo labels and the like, with the model served after the previous step."""
        plan, lesson, teacher = self.plan, self.lesson, self.start.teacher
        old, mark = None, "none"
        if teacher is not None and self.strategy.prepares(lesson):
            old = predictor(plan, self.strategy, teacher, lesson.old, self.memory)
            mark = self.taught_by
        with windows_fit(plan, f"preparing step {lesson.number}", old):
            return prepare(
                self.strategy,
                lesson,
                self.memory,
                self.catalog,
                old=old,
                mark=mark,
                folder=plan.folder / "pseudo" / f"step{lesson.number}",
                watch=self.watch,
            )

    def _material(self, prepared: Prepared) -> Material:
        """Volumes and weights of all cases the step may draw."""
        catalog, lesson = self.catalog, self.lesson
        keys: dict[CaseKey, float] = {
            (lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases
        }
        extra = self.strategy.extra_cases(lesson, self.memory)
        past_data.refuse_lost_cases(catalog, lesson, extra, self.start.ledger)
        keys.update(extra)
        volumes = {}
        for key in keys:
            volumes[key] = catalog.open(key[0], key[1], "train")
            signals.check(f"step {lesson.number}, opening case {key[1]}")
        return Material(
            volumes=volumes,
            weights=keys,
            pseudo=prepared.maps,
            patch_vox=catalog.preprocessing.patch_vox,
            data=self.plan.profile.data,
            validation=lambda case: catalog.open(lesson.number, case, "validation"),
        )

    def _teach(self, model: nn.Module, material: Material, events: run_folder.EventLog) -> None:
        """Every update, watched."""
        plan, strategy, lesson = self.plan, self.strategy, self.lesson
        earlier = [e for e in run_folder.read_events(self.log) if e["step"] == lesson.number]
        guard = StepWatch(lesson, clips=plan.profile.train.clip_norm is not None, past=earlier)
        tracer = self._tracer(model, earlier)

        def watch(event: dict[str, Any]) -> None:
            events.write(event)
            self.watch(event)
            for each in guard.see(event):
                watch(each)
            tracer.see(event)

        for event in constant_labels(lesson, list(material.volumes.values())):
            if event not in earlier:
                watch(event)
        teacher = copy.deepcopy(self.start.teacher) if strategy.takes_teacher(lesson) else None
        profile, patch = plan.profile, self.catalog.preprocessing.patch_vox
        update = partial(try_update, strategy, model, teacher, lesson, self.memory, profile, patch)
        with enough_memory(f"teaching step {lesson.number}", profile, patch, attempt=update):
            teach(
                strategy,
                model,
                teacher,
                lesson,
                self.memory,
                material,
                train=profile.train,
                seed=plan.settings.seed,
                device=plan.device,
                workers=plan.settings.workers,
                watch=watch,
                validate=self._validate(),
                keeper=self.keeper,
            )
        tracer.end()
        for event in guard.end(material.volumes.values()):
            watch(event)

    def _tracer(self, model: nn.Module, earlier: Sequence[dict[str, Any]]) -> Tracer:
        """Looks on while `model` is taught."""
        plan, strategy, examine = self.plan, self.strategy, self.plan.profile.examine
        return Tracer(
            self.lesson,
            every=examine.trace_every,
            folder=plan.folder,
            catalog=self.catalog,
            served=lambda: predictor(
                plan,
                strategy,
                strategy.serve(model, self.memory),
                self.lesson.structures,
                self.memory,
            ),
            scratch=strategy.declaration.starts_from == "scratch",
            past=earlier,
            postprocess=examine.postprocess,
        )

    def _validate(self) -> Validate | None:
        """Measures a model on this step's validation cases, opened when first asked for."""
        catalog, lesson = self.catalog, self.lesson

        def validate(served: nn.Module) -> float:
            server = predictor(self.plan, self.strategy, served, lesson.structures, self.memory)
            volumes = (catalog.open(lesson.number, c, "validation") for c in lesson.validation)
            return mean_dice(server, volumes, lesson.learns)

        return validate if lesson.validation else None

    def _write(self, model: nn.Module, prepared: Prepared, cost: dict[str, Any]) -> None:
        """What the step took, then its checkpoint; the places on the way go."""
        cost["parameters"], cost["nonzero_parameters"] = count_parameters(model)
        cost["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cost["pseudo_bytes"] = sum(m.nbytes for m in prepared.maps.values())
        files.write_json(self.path.with_suffix(".json"), cost)
        checkpoint.save(
            self.path,
            {
                "model": model.state_dict(),
                "memory": self.memory,
                "step": self.lesson.number,
                "structures": list(self.lesson.structures),
                "bench": self.plan.benchmark.name,
                "bench_version": self.plan.benchmark.version,
                "strategy": type(self.strategy).__name__,
            },
        )
        self.keeper.close()
        shutil.rmtree(self.plan.folder / "pseudo", ignore_errors=True)
