"""A whole course: build, teach each step, examine, record; go on where a stopped run left off.

Room: row 4. What a run leaves in `<out>/<bench>/<strategy>/<run id>/`: `run.json` (settings,
versions, splits, cost, ledger), `scores.csv` (one row per case and structure), `events.jsonl` (loss
terms), `step<t>.pt` (checkpoints) and `predictions/` (packed bits).
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from clbench import checkpoint, past, resume, stop, store
from clbench.costfile import write_costs
from clbench.data.reading import spacing_of
from clbench.data.volumes import Volume
from clbench.errors import StoreError
from clbench.examine import ScoreContext, Server, mean_dice, score_case, write_prediction
from clbench.headroom import enough_memory, try_update, try_windows
from clbench.metrics.meter import Meter
from clbench.metrics.overlap import Bits
from clbench.opened import Opened
from clbench.plan import Plan, RunSettings, make_plan, new_record
from clbench.prepare import Prepared, prepare
from clbench.pruning import count_parameters
from clbench.resume import Keeper
from clbench.seal import seal
from clbench.store import Score
from clbench.strategy import Lesson, Memory, Predictor, Strategy
from clbench.tracing import Tracer
from clbench.train import CaseKey, Material, Validate, teach
from clbench.watches import (
    StepWatch,
    constant_labels,
    refuse_constant_labels,
    same_scores,
    slack_of,
    warnings_of,
)

Watch = Callable[[dict[str, Any]], None]


@contextmanager
def alone(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        StoreError: it cannot be written, or another process works in it.
        Stopped: while waiting.
    """
    store.make_folder(folder)
    lock = FileLock(folder / ".lock")
    while True:
        try:
            lock.acquire(timeout=1 if wait else 0)
            break
        except Timeout:
            if not wait:
                raise StoreError(
                    "another process is working on this very run",
                    where=folder,
                    next_step="wait for it to end; nothing was changed",
                ) from None
            stop.check(f"waiting for {folder}")
    try:
        store.sweep(folder)
        yield
    finally:
        lock.release()


def run_course(settings: RunSettings, watch: Watch = lambda event: None) -> Path:
    """Run one seed of one strategy on one benchmark; return its run folder.

    Raises:
        ClbenchError: anything the user can act on.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        resume.deterministic()
    return run_plan(make_plan(settings), watch)


def run_plan(plan: Plan, watch: Watch = lambda event: None) -> Path:
    """Run what was planned; return the run folder.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; the same command goes on.
    """
    settings = plan.settings
    watch({"event": "plan", "plan": plan})
    if plan.strategy.resumes == "step":
        watch({"event": "note", "what": f"{plan.strategy_name} cannot go on in the middle of a "
               "step: stopped there, it starts that step anew"})  # fmt: skip
    record = store.read_record(plan.folder) if (plan.folder / "run.json").exists() else None
    if record is not None and record["status"] == "finished" and not settings.fresh:
        watch({"event": "already finished", "folder": plan.folder})
        return plan.folder
    with stop.listening(), alone(plan.folder, wait=False):
        if settings.fresh:
            for item in plan.folder.iterdir():
                if item.name != ".lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            record = None
        count = None
        if record is not None and settings.threads is None:
            count = record["threads"]  # equal bits need as many
        with resume.threads(count):
            _Course(plan, record, watch).go()
    return plan.folder


class _Course:
    """The state of a running course."""

    def __init__(self, plan: Plan, record: dict[str, Any] | None, watch: Watch) -> None:
        self.plan, self.watch = plan, watch
        self.record = record or new_record(plan)
        self.rows: list[Score] = []
        self.memory: Memory = {}
        self.model: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self.files = Opened(plan.catalog)
        done = int(self.record["steps_done"])
        if done:
            self.rows = [r for r in store.read_scores(plan.folder / "scores.csv") if r.step <= done]

    def go(self) -> None:
        plan = self.plan
        here = resume.host(plan.device)
        self.record.setdefault("host", here)
        self._mark(int(self.record["steps_done"]) + 1, here)
        self.record["starts"] = self.record.get("starts", 0) + 1
        store.write_record(plan.folder, self.record)
        for number in range(1, len(plan.benchmark.steps) + 1):
            plan.catalog.step = number
            lesson = plan.lesson(number)
            self.watch({"event": "step", "lesson": lesson, "of": len(plan.benchmark.steps)})
            with past.closed(self.files):
                self._learn(lesson)
                assert self.model is not None  # noqa: S101  # set by _learn; tells the type checker
                served = plan.strategy.serve(self.model, self.memory)
                if int(self.record["steps_done"]) < number:
                    self._examine(lesson, served)
            self.teacher = copy.deepcopy(served).eval().requires_grad_(False)
        write_costs(plan, self.record)
        self.record["status"] = "finished"
        for left in ("resume", "pseudo", "exam"):  # by a process killed after its last use
            shutil.rmtree(plan.folder / left, ignore_errors=True)
        self._save(sealed=True)
        self.watch({"event": "finished", "folder": plan.folder})

    def _mark(self, step: int, host: Mapping[str, Any]) -> None:
        """Say in the record that a step was worked on elsewhere than where the run began."""
        differs = resume.differences(self.record["host"], host)
        marks = self.record.setdefault("resumed_elsewhere", [])
        if differs and (mark := {"step": step, "differs": differs}) not in marks:
            marks.append(mark)

    def _opened(self, opened: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Enter step → purpose → cases into the ledger of the record."""
        ledger: dict[str, Any] = self.record["ledger"]
        for step, by_purpose in opened.items():
            for purpose, cases in by_purpose.items():
                have = ledger.setdefault(step, {}).setdefault(purpose, [])
                ledger[step][purpose] = sorted({*have, *cases})

    def _save(self, *, sealed: bool = False) -> None:
        self._opened(self.plan.catalog.opened())
        if sealed:
            seal(self.plan.folder, self.record)
        store.write_record(self.plan.folder, self.record)

    # ------------------------------------------------------------------------------- learning

    def _learn(self, lesson: Lesson) -> None:
        """Make `model` and `memory` those after the step: from a checkpoint, or by teaching."""
        plan, first = self.plan, lesson.number == 1
        strategy = plan.strategy.first_step() if first else plan.strategy
        home = self._home(lesson.number)
        path = home / f"step{lesson.number}.pt"
        if first:
            with alone(plan.shared, wait=True):
                if plan.settings.fresh or path.exists():
                    shutil.rmtree(plan.shared / "resume", ignore_errors=True)
                if plan.settings.fresh or not path.exists():
                    self._teach(strategy, lesson, path)
                else:
                    self._load(strategy, lesson, path)
                    self.watch({"event": "shared", "path": path})
        elif path.exists():
            self._load(strategy, lesson, path)
        else:
            self._teach(strategy, lesson, path)
        cost = store.read_json(path.with_suffix(".json"))
        self._opened({str(lesson.number): cost.pop("opened")})
        for host in cost.pop("hosts", ()):
            self._mark(lesson.number, host)
        self.record["cost"].setdefault(str(lesson.number), {})["train"] = {**cost, "shared": first}
        own = plan.folder / "events.jsonl"
        if first and not own.exists():  # the record of a run is whole in its own folder
            store.write_bytes(own, (home / "events.jsonl").read_bytes())
        self.record["warnings"] = warnings_of(store.read_events(own))

    def _home(self, number: int) -> Path:
        """Where a step's checkpoint lies."""
        return self.plan.shared if number == 1 else self.plan.folder

    def _blank(self, strategy: Strategy, lesson: Lesson) -> nn.Module:
        """A model with the shape it has in `lesson`, fresh weights."""
        model = strategy.build(self.plan.kit, self.plan.lesson(1))
        for number in range(2, lesson.number + 1):
            strategy.grow(model, self.plan.kit, self.plan.lesson(number))
        return model

    def _load(self, strategy: Strategy, lesson: Lesson, path: Path) -> None:
        self.model, self.memory = self._loaded(strategy, lesson, path)

    def _loaded(self, strategy: Strategy, lesson: Lesson, path: Path) -> tuple[nn.Module, Memory]:
        """A new model and memory as a checkpoint holds them."""
        content = checkpoint.load(path)
        bench = self.plan.benchmark
        expected = (bench.name, bench.version, list(lesson.structures))
        got = (content["bench"], content["bench_version"], content["structures"])
        if got != expected:
            raise StoreError(
                "a checkpoint of another benchmark, version or step",
                where=path,
                expected="{} version {}: {}".format(*expected),
                got="{} version {}: {}".format(*got),
                next_step="run again with --fresh",
            )
        model = self._blank(strategy, lesson)
        model.load_state_dict(content["model"])
        return model.to(self.plan.device), content["memory"]

    def _teach(self, strategy: Strategy, lesson: Lesson, path: Path) -> None:
        """Teach a step, or go on where an attempt at it was stopped."""
        plan, catalog, meter = self.plan, self.plan.catalog, Meter(self.plan.device)
        log = path.parent / "events.jsonl"
        keeper = Keeper(path, every_s=plan.settings.checkpoint_s, watch=self.watch)
        if keeper.found and not (log.exists() and log.stat().st_size >= keeper.found["events"]):
            keeper.forget("its event log was cut short")
        taught_by = "none" if self.teacher is None else checkpoint.digest(self.teacher)
        if keeper.found and keeper.found["teacher"] != taught_by:
            keeper.forget("the model it started from is another one now")
        before = keeper.found or {}
        hosts = list(before.get("hosts", ()))
        same_threads = hosts and plan.settings.threads is None
        with resume.threads(hosts[-1]["threads"] if same_threads else None):
            begun = time.monotonic()
            lesson = replace(lesson, voxels=catalog.voxels(lesson.number))
            past.refuse_undeclared(strategy, lesson, self.memory)
            for purpose, cases in before.get("opened", {}).items():
                catalog.ledger.setdefault(lesson.number, {}).setdefault(purpose, set()).update(
                    cases
                )
            if (here := resume.host(plan.device)) not in hosts:
                hosts.append(here)
            if lesson.number == 1 or strategy.starts_from == "scratch":
                model = self._blank(strategy, lesson)
            else:
                assert self.model is not None  # noqa: S101  # step 1 went before
                model = self.model
                strategy.grow(model, plan.kit, lesson)
            model.to(plan.device)
            refuse_constant_labels(
                lesson, [catalog.open(lesson.number, c, "train") for c in lesson.cases]
            )
            prepared = self._prepare(strategy, lesson)
            material = self._material(strategy, lesson, prepared)
            taught = time.monotonic()

            def facts() -> dict[str, Any]:
                """What the step took so far, all attempts together; and where its log ends."""
                now = time.monotonic()
                return {
                    "prepare_s": before.get("prepare_s", prepared.kept_s) + taught - begun,
                    "train_s": before.get("train_s", 0.0) + now - taught,
                    **{k: max(before.get(k, 0), v) for k, v in meter.peaks().items()},
                    "opened": catalog.opened().get(str(lesson.number), {}),
                    "hosts": hosts,
                    "teacher": taught_by,
                    "events": events.flushed(),
                }

            def watch(event: dict[str, Any]) -> None:
                events.write(event)
                self.watch(event)
                for each in guard.see(event):
                    watch(each)
                tracer.see(event)

            keeper.facts = facts
            # lines of an attempt that was broken off go: those of the step, or after its last place
            with store.EventLog(
                log, keep=lambda e: int(e["step"]) < lesson.number, size=before.get("events")
            ) as events:
                earlier = [e for e in store.read_events(log) if e["step"] == lesson.number]
                guard = StepWatch(
                    lesson, clips=plan.profile.train.clip_norm is not None, past=earlier
                )
                tracer = self._tracer(strategy, lesson, model, earlier)
                for event in constant_labels(lesson, list(material.volumes.values())):
                    if event not in earlier:
                        watch(event)
                teacher = copy.deepcopy(self.teacher) if strategy.takes_teacher(lesson) else None
                profile, patch = plan.profile, catalog.preprocessing.patch_vox
                update = partial(
                    try_update, strategy, model, teacher, lesson, self.memory, profile, patch
                )
                with enough_memory(
                    f"teaching step {lesson.number}", profile, patch, attempt=update
                ):
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
                        validate=self._validate(strategy, lesson),
                        keeper=keeper,
                    )
                tracer.end()
                for event in guard.end(material.volumes.values()):
                    watch(event)
                cost = facts()
        self.model = model
        del cost["events"], cost["teacher"]
        cost["parameters"], cost["nonzero_parameters"] = count_parameters(model)
        cost["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cost["pseudo_bytes"] = sum(m.nbytes for m in prepared.maps.values())
        store.write_json(path.with_suffix(".json"), cost)
        checkpoint.save(
            path,
            {
                "model": model.state_dict(),
                "memory": self.memory,
                "step": lesson.number,
                "structures": list(lesson.structures),
                "bench": plan.benchmark.name,
                "bench_version": plan.benchmark.version,
                "strategy": type(strategy).__name__,
            },
        )
        keeper.close()
        shutil.rmtree(plan.folder / "pseudo", ignore_errors=True)

    def _tracer(
        self, strategy: Strategy, lesson: Lesson, model: nn.Module, earlier: list[dict[str, Any]]
    ) -> Tracer:
        """Looks on while `model` is taught."""
        examine = self.plan.profile.examine
        return Tracer(
            lesson,
            every=examine.trace_every,
            folder=self.plan.folder,
            catalog=self.plan.catalog,
            served=lambda: self._predictor(
                strategy, strategy.serve(model, self.memory), lesson.structures
            ),
            scratch=strategy.starts_from == "scratch",
            past=earlier,
            postprocess=examine.postprocess,
        )

    def _prepare(self, strategy: Strategy, lesson: Lesson) -> Prepared:
        old, mark = None, "none"
        if self.teacher is not None and strategy.prepares(lesson):
            old = self._predictor(strategy, self.teacher, lesson.old)
            mark = checkpoint.digest(self.teacher)
        with self._windows_fit(f"preparing step {lesson.number}", old):
            return prepare(
                strategy,
                lesson,
                self.memory,
                self.plan.catalog,
                old=old,
                mark=mark,
                folder=self.plan.folder / "pseudo" / f"step{lesson.number}",
                watch=self.watch,
            )

    def _material(self, strategy: Strategy, lesson: Lesson, prepared: Prepared) -> Material:
        """Volumes and weights of all cases the step may draw."""
        catalog = self.plan.catalog
        keys: dict[CaseKey, float] = {
            (lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases
        }
        extra = strategy.extra_cases(lesson, self.memory)
        past.refuse_lost_cases(catalog, lesson, extra, self.record["ledger"])
        keys.update(extra)
        volumes = {}
        for key in keys:
            volumes[key] = catalog.open(key[0], key[1], "train")
            stop.check(f"step {lesson.number}, opening case {key[1]}")
        return Material(
            volumes=volumes,
            weights=keys,
            pseudo=prepared.maps,
            patch_vox=catalog.preprocessing.patch_vox,
            data=self.plan.profile.data,
            validation=lambda case: catalog.open(lesson.number, case, "validation"),
        )

    def _validate(self, strategy: Strategy, lesson: Lesson) -> Validate | None:
        """Measures a model on this step's validation cases, opened when first asked for."""
        catalog = self.plan.catalog

        def validate(served: nn.Module) -> float:
            server = self._predictor(strategy, served, lesson.structures)
            volumes = (catalog.open(lesson.number, c, "validation") for c in lesson.validation)
            return mean_dice(server, volumes, lesson.learns)

        return validate if lesson.validation else None

    # ----------------------------------------------------------------------------- examination

    def _predictor(
        self, strategy: Strategy, model: nn.Module, structures: tuple[str, ...]
    ) -> Server:
        plan = self.plan

        def ranges(volume: Volume) -> Mapping[str, tuple[int, int]]:
            x, y, z = map(float, spacing_of(volume.affine))
            return strategy.axial_ranges(volume.image, (x, y, z), structures, self.memory)

        return Server(
            model,
            strategy.decode,
            structures,
            patch_vox=plan.catalog.preprocessing.patch_vox,
            overlap=plan.profile.examine.overlap,
            windows=plan.profile.examine.windows,
            device=plan.device,
            ranges=ranges,
        )

    def _windows_fit(self, doing: str, server: Server | None) -> AbstractContextManager[None]:
        """An error where sliding windows need more memory than there is."""
        profile, patch = self.plan.profile, self.plan.catalog.preprocessing.patch_vox
        attempt = None if server is None else partial(try_windows, server.model, profile, patch)
        return enough_memory(doing, profile, patch, teaching=False, attempt=attempt)

    def _examine(self, lesson: Lesson, served: nn.Module) -> None:
        """Score every test case of the course; cases a stopped attempt finished are kept."""
        plan, catalog, spent_s = self.plan, self.plan.catalog, 0.0
        meter = Meter(plan.device)
        server = self._predictor(plan.strategy, served, lesson.structures)
        kept = resume.Exams(
            plan.folder / "exam" / f"step{lesson.number}", checkpoint.digest(served)
        )
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
                bits, rows = self._score(server, lesson, number, case, meter)
                if plan.settings.keep_predictions:
                    affine = catalog.open(number, case, "test").affine
                    write_prediction(
                        drawn, bits, lesson.structures, affine, source=source, case=case
                    )
                found = resume.Exam(rows, time.monotonic() - start, meter.laps_s[-1])
                kept.put(name, found)
            else:
                meter.laps_s.append(found.predict_s)
                self._opened({str(lesson.number): {"test": [f"{source}/{case}"]}})
            self.rows += found.rows
            spent_s += found.seconds
            self.watch({"event": "exam", "done": done, "of": len(exams), "case": case})
            stop.check(f"examination after step {lesson.number}, {source} case {case}")
        start = time.monotonic()
        self._reexamine(lesson)
        spent_s += time.monotonic() - start
        store.write_scores(plan.folder / "scores.csv", self.rows)
        cost = self.record["cost"].setdefault(str(lesson.number), {})
        cost.update(meter.inference(), examine_s=spent_s)
        self.record["steps_done"] = lesson.number
        self._save()
        kept.close()

    def _score(
        self, server: Server, lesson: Lesson, number: int, case: str, meter: Meter
    ) -> tuple[Bits, list[Score]]:
        """Prediction and scores of a test case of step `number`, after `lesson`."""
        plan = self.plan
        volume = plan.catalog.open(number, case, "test")
        with self._windows_fit(f"examining after step {lesson.number}, case {case}", server):
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

    def _reexamine(self, lesson: Lesson) -> None:
        """Examine a case again with the model as its checkpoint holds it: scores must be equal."""
        plan, number = self.plan, lesson.number
        path = self._home(number) / f"step{number}.pt"
        strategy = plan.strategy.first_step() if number == 1 else plan.strategy
        model, memory = self._loaded(strategy, lesson, path)
        server = self._predictor(
            plan.strategy, plan.strategy.serve(model, memory), lesson.structures
        )
        source, case = plan.catalog.source(number).name, plan.catalog.splits[number - 1].test[0]
        _, again = self._score(server, lesson, number, case, Meter(plan.device))
        before = [r for r in self.rows if (r.step, r.eval_set, r.case) == (number, source, case)]
        gap = same_scores(
            before,
            again,
            where=f"{path}, {source} case {case}",
            slack=slack_of(plan.device),
        )
        found = {"case": f"{source}/{case}", "largest_difference": gap}
        self.record.setdefault("reexamined", {})[str(number)] = found


def _is_predictor(server: Server) -> Predictor:
    """A static check that `Server` keeps the promise strategies rely on."""
    return server
