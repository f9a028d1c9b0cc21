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
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from clbench import checkpoint, past, store
from clbench.costfile import write_costs
from clbench.data.pseudo import PseudoMap, write_pseudo
from clbench.data.reading import spacing_of
from clbench.data.volumes import Volume
from clbench.errors import StoreError
from clbench.examine import ScoreContext, Server, mean_dice, score_case, write_prediction
from clbench.metrics.meter import Meter
from clbench.metrics.overlap import Bits
from clbench.opened import Opened
from clbench.plan import Plan, RunSettings, make_plan, new_record
from clbench.pruning import count_parameters
from clbench.seal import seal
from clbench.store import Score
from clbench.strategy import Lesson, Memory, Predictor, Strategy
from clbench.tracing import Tracer
from clbench.train import CaseKey, Material, Validate, teach
from clbench.watches import (
    StepWatch,
    constant_labels,
    enough_memory,
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
    """
    store.make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise StoreError(
            "another process is working on this very run",
            where=folder,
            next_step="wait for it to end; nothing was changed",
        ) from None
    try:
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
    return run_plan(make_plan(settings), watch)


def run_plan(plan: Plan, watch: Watch = lambda event: None) -> Path:
    """Run what was planned; return the run folder.

    Raises:
        ClbenchError: anything the user can act on.
    """
    settings = plan.settings
    watch({"event": "plan", "plan": plan})
    record = store.read_record(plan.folder) if (plan.folder / "run.json").exists() else None
    if record is not None and record["status"] == "finished" and not settings.fresh:
        watch({"event": "already finished", "folder": plan.folder})
        return plan.folder
    with alone(plan.folder, wait=False):
        if settings.fresh:
            for item in plan.folder.iterdir():
                if item.name != ".lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            record = None
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
        store.write_record(plan.folder, self.record)
        for number in range(1, len(plan.benchmark.steps) + 1):
            plan.catalog.step = number
            lesson = plan.lesson(number)
            self.watch({"event": "step", "lesson": lesson, "of": len(plan.benchmark.steps)})
            with self._enough_memory(f"teaching step {number}"), past.closed(self.files):
                self._learn(lesson)
            assert self.model is not None  # noqa: S101  # set by _learn; tells the type checker
            served = plan.strategy.serve(self.model, self.memory)
            if int(self.record["steps_done"]) < number:
                self._examine(lesson, served)
            self.teacher = copy.deepcopy(served).eval().requires_grad_(False)
        write_costs(plan, self.record)
        self.record["status"] = "finished"
        self._save(sealed=True)
        self.watch({"event": "finished", "folder": plan.folder})

    def _enough_memory(self, doing: str) -> AbstractContextManager[None]:
        return enough_memory(doing, self.plan.profile, self.plan.catalog.preprocessing.patch_vox)

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
        plan, meter = self.plan, Meter(self.plan.device)
        start = time.monotonic()
        lesson = replace(lesson, voxels=plan.catalog.voxels(lesson.number))
        past.refuse_undeclared(strategy, lesson, self.memory)
        if lesson.number == 1 or strategy.starts_from == "scratch":
            model = self._blank(strategy, lesson)
        else:
            assert self.model is not None  # noqa: S101  # step 1 went before
            model = self.model
            strategy.grow(model, plan.kit, lesson)
        model.to(plan.device)
        refuse_constant_labels(
            lesson, [plan.catalog.open(lesson.number, c, "train") for c in lesson.cases]
        )
        pseudo = self._prepare(strategy, lesson)
        keys: dict[CaseKey, float] = {
            (lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases
        }
        extra = strategy.extra_cases(lesson, self.memory)
        past.refuse_lost_cases(plan.catalog, lesson, extra, self.record["ledger"])
        keys.update(extra)
        volumes = {key: plan.catalog.open(key[0], key[1], "train") for key in keys}
        prepared_s = time.monotonic() - start
        # lines of an attempt at this step that was broken off go; those of earlier steps stay
        log = store.EventLog(
            path.parent / "events.jsonl", keep=lambda e: int(e["step"]) < lesson.number
        )
        with log as events:
            earlier = [e for e in store.read_events(log.path) if e["step"] == lesson.number]
            guard = StepWatch(lesson, clips=plan.profile.train.clip_norm is not None, past=earlier)

            tracer = self._tracer(strategy, lesson, model, earlier)

            def watch(event: dict[str, Any]) -> None:
                events.write(event)
                self.watch(event)
                for each in guard.see(event):
                    watch(each)
                tracer.see(event)

            for event in constant_labels(lesson, list(volumes.values())):
                if event not in earlier:
                    watch(event)
            teach(
                strategy,
                model,
                copy.deepcopy(self.teacher) if strategy.takes_teacher(lesson) else None,
                lesson,
                self.memory,
                Material(
                    volumes=volumes,
                    weights=keys,
                    pseudo=pseudo,
                    patch_vox=plan.catalog.preprocessing.patch_vox,
                    data=plan.profile.data,
                ),
                train=plan.profile.train,
                seed=plan.settings.seed,
                device=plan.device,
                workers=plan.settings.workers,
                watch=watch,
                validate=self._validate(strategy, lesson),
            )
            tracer.end()
            for event in guard.end(volumes.values()):
                watch(event)
        self.model = model
        every, nonzero = count_parameters(model)
        cost = {
            "prepare_s": prepared_s,
            "train_s": time.monotonic() - start - prepared_s,
            "parameters": every,
            "nonzero_parameters": nonzero,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **meter.peaks(),
            "pseudo_bytes": sum(m.nbytes for m in pseudo.values()),
            "opened": plan.catalog.opened().get(str(lesson.number), {}),
        }
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

    def _validate(self, strategy: Strategy, lesson: Lesson) -> Validate | None:
        """Measures a model on this step's validation cases, opened when first asked for."""
        catalog = self.plan.catalog

        def validate(served: nn.Module) -> float:
            server = self._predictor(strategy, served, lesson.structures)
            volumes = (catalog.open(lesson.number, c, "validation") for c in lesson.validation)
            return mean_dice(server, volumes, lesson.learns)

        return validate if lesson.validation else None

    def _prepare(self, strategy: Strategy, lesson: Lesson) -> dict[CaseKey, PseudoMap]:
        """Offline work on each training case with the old model; finished ones are kept."""
        if not strategy.prepares(lesson):
            strategy.prepare(lesson, {}, self.memory)
            return {}
        old, mark = None, "none"
        if self.teacher is not None:
            old = self._predictor(strategy, self.teacher, lesson.old)
            mark = checkpoint.digest(self.teacher)
        folder = self.plan.folder / "pseudo" / f"step{lesson.number}"
        found: dict[CaseKey, PseudoMap] = {}
        rest: dict[str, Mapping[str, Tensor]] = {}
        for done, case in enumerate(lesson.cases, 1):
            target, other = folder / case, folder / f"{case}.pt"
            volume = self.plan.catalog.open(lesson.number, case, "pseudo")
            if not other.exists():
                with self._enough_memory(f"preparing step {lesson.number}, case {case}"):
                    made = dict(strategy.prepare_case(lesson, volume, old))
                maps = made.pop("pseudo", None)
                if maps is not None:
                    write_pseudo(target, lesson.old, maps.numpy())
                # last: its presence says that all is there
                checkpoint.save(other, {"made": made, "model": mark})
            kept = checkpoint.load(other)
            if kept["model"] != mark:
                raise StoreError(
                    "pseudo labels that another model made",
                    where=target,
                    expected=f"by the model after step {lesson.number - 1}, {mark}",
                    got=kept["model"],
                    next_step=f"delete {folder} and run the same command again",
                )
            rest[case] = kept["made"]
            if target.exists():
                found[lesson.number, case] = PseudoMap.open(target)
            self.watch({"event": "pseudo", "done": done, "of": len(lesson.cases), "case": case})
        strategy.prepare(lesson, rest, self.memory)
        return found

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

    def _examine(self, lesson: Lesson, served: nn.Module) -> None:
        plan, start, meter = self.plan, time.monotonic(), Meter(self.plan.device)
        server = self._predictor(plan.strategy, served, lesson.structures)
        exams = [
            (number, case)
            for number, split in enumerate(plan.catalog.splits, 1)
            for case in split.test
        ]
        seen: set[tuple[str, str]] = set()
        for done, (number, case) in enumerate(exams, 1):
            source = plan.catalog.source(number).name
            if (source, case) in seen:
                continue  # two steps share a source and its test cases
            seen.add((source, case))
            bits, rows = self._score(server, lesson, number, case, meter)
            self.rows += rows
            if plan.settings.keep_predictions:
                write_prediction(
                    plan.folder / "predictions" / f"step{lesson.number}" / f"{source}_{case}.npz",
                    bits,
                    lesson.structures,
                    plan.catalog.open(number, case, "test").affine,
                    source=source,
                    case=case,
                )
            self.watch({"event": "exam", "done": done, "of": len(exams), "case": case})
        self._reexamine(lesson)
        store.write_scores(plan.folder / "scores.csv", self.rows)
        cost = self.record["cost"].setdefault(str(lesson.number), {})
        cost.update(meter.inference(), examine_s=time.monotonic() - start)
        self.record["steps_done"] = lesson.number
        self._save()

    def _score(
        self, server: Server, lesson: Lesson, number: int, case: str, meter: Meter
    ) -> tuple[Bits, list[Score]]:
        """Prediction and scores of a test case of step `number`, after `lesson`."""
        plan = self.plan
        volume = plan.catalog.open(number, case, "test")
        with self._enough_memory(f"examining after step {lesson.number}, case {case}"):
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
