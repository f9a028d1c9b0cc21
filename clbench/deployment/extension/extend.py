"""One more step for a trained model: a course of the steps it knows and a new one, taught as a run.

The known steps are `given`: their checkpoints are copied into the new run, and none of their cases
is needed. The model is examined after each of them and after the new step on the test cases of the
new data, so the run says what the old structures lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.data.cache import VolumeCache, default_root
from clbench.deployment.extension.agreement import write_agreement
from clbench.deployment.extension.elsewhere import learned_elsewhere
from clbench.deployment.extension.learned import LearnedModel, learned_by_run
from clbench.deployment.extension.own_data import (
    OldData,
    OwnData,
    new_structures,
    read_old_data,
    read_own_data,
    source_name,
)
from clbench.errors import SettingError
from clbench.nets.text_encodings import encoded
from clbench.run.course import alone, empty_run, run_plan
from clbench.run.models import blank, save_step
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark, Source, Step
from clbench.spec.names import LONGEST, need_name
from clbench.spec.settings import (
    Profile,
    apply_overrides,
    load_profile,
    refuse_idle,
    split_overrides,
)
from clbench.spec.splits import NOT_AT_HAND, Split
from clbench.spec.taxonomy import STRUCTURES, Structure
from clbench.spec.toml import benchmark_text
from clbench.store import files as store_files
from clbench.training.resume import Watch


@dataclass(frozen=True, kw_only=True)
class ExtendSettings:
    """What the command line asks for."""

    model: Path
    """Folder of a run, one of its checkpoints, or weights from elsewhere."""
    learn: tuple[str, ...]
    """Structures to learn."""
    data: Path
    """Folder of annotated CTs."""
    old_data: Path | None = None
    """Folder of CTs that annotate structures the model knows: test cases of its steps."""
    step: int | None = None
    """1-based step of the run; None: its last."""
    structures: tuple[str, ...] = ()
    """Of weights from elsewhere: names of the output channels, without background."""
    profile: str | None = None
    """Of weights from elsewhere: settings to teach with; None: `paper`."""
    strategy: str | None = None
    """What teaches the new step; None: the run's own."""
    kind: str | None = None
    """Kind of structures clbench does not have."""
    inside: str | None = None
    """What contains them."""
    layout: str | None = None
    """How the data is laid out; None: as its names say."""
    labels: Path | None = None
    """File of label values."""
    patient: str = "(.+)"
    """Regular expression of the patient within a case id."""
    split: Split | None = None
    """Cases that train, validate and test; None: drawn."""
    seed: int | None = None
    """Seed of the new step; None: the run's."""
    out: Path = Path("results")
    """Where run folders go."""
    overrides: tuple[str, ...] = ()
    """`group.name=value` words."""
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    fresh: bool = False
    cache: Path | None = None
    checkpoint_s: float = 300.0
    """These six: see `RunSettings`."""


def extend(settings: ExtendSettings, watch: Watch = lambda event: None) -> Path:
    """Teach a trained model further structures; the same call goes on where it was stopped.

    Everything is checked before a file is written, and the old model's files are only read.

    Returns:
        The folder of the run.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; the same call goes on.
    """
    learned = _learned(settings)
    names, declared = new_structures(settings.learn, kind=settings.kind, inside=settings.inside)
    _refuse_known(names, learned, settings.model)
    own = read_own_data(
        settings.data.expanduser(),
        learn=names,
        name=source_name(settings.data, [s.name for s in learned.sources]),
        cache=VolumeCache((settings.cache or default_root()) / "volumes"),
        layout=settings.layout,
        labels=settings.labels,
        patient=settings.patient,
        split=settings.split,
        seed=learned.seed if settings.seed is None else settings.seed,
    )
    old = _old_data(settings, learned, own)
    course = extended_course(learned, own, names, declared, old)
    plan = _plan(settings, learned, course, own, old)
    _refuse_misfit(plan, learned)
    for note in (*learned.notes, *own.notes, *(() if old is None else old.notes)):
        watch({"event": "note", "what": note})
    _install(plan, learned, course, fresh=settings.fresh)
    run_plan(plan, watch)
    write_agreement(
        plan.folder,
        plan.catalog,
        before=len(learned.steps),
        device=str(plan.device),
        watch=watch,
    )
    return plan.folder


def _learned(settings: ExtendSettings) -> LearnedModel:
    """What is to be extended.

    Raises:
        SettingError: options that do not go together, or a strategy that needs old images.
        ClbenchError: the model cannot be read.
    """
    path, step = settings.model.expanduser(), settings.step
    options = tuple(w for w in settings.overrides if w.startswith("strategy."))
    folder = path
    if path.is_file() and (path.parent / "run.json").is_file():
        folder, step = path.parent, _named_step(path, step)
    if (folder / "run.json").is_file():
        if settings.structures or settings.profile:
            raise SettingError(
                "a run says itself what it knows, and how it was made",
                where="--structures" if settings.structures else "--profile",
                next_step="leave the option out; --set changes single settings",
            )
        learned = learned_by_run(folder, step=step, strategy=settings.strategy, overrides=options)
    elif step is not None:
        raise SettingError("weights from elsewhere have no steps", where="--step", got=step)
    else:
        learned = learned_elsewhere(
            path,
            structures=settings.structures,
            profile=load_profile(settings.profile or "paper"),
            overrides=settings.overrides,
            strategy=settings.strategy,
            seed=settings.seed or 0,
        )
    past = learned.strategy.declaration.past
    if past in ("cases", "images"):
        raise SettingError(
            f"{learned.strategy_name} needs images of earlier steps, and an extension has none",
            where="--strategy",
            expected="a strategy that declares nothing, weights or predictions of the past",
            got=f"past = {past!r}",
            next_step="choose another one of `clbench list` with --strategy, such as frozen for a "
            "model with the Universal Model's heads, frozen_softmax for one with a softmax",
        )
    return learned


def _named_step(path: Path, step: int | None) -> int:
    """The step of a checkpoint of a run."""
    number = path.stem.removeprefix("step")
    if not number.isdecimal() or step not in (None, int(number)):
        raise SettingError(
            "the file is not the checkpoint of the step asked for",
            where=path,
            expected="step1.pt, step2.pt, …, and no --step beside it",
            got=path.name + ("" if step is None else f" and --step {step}"),
        )
    return int(number)


def _refuse_known(names: Sequence[str], learned: LearnedModel, where: Path) -> None:
    if both := [name for name in names if name in learned.structures]:
        raise SettingError(
            f"the model has learned {', '.join(both)} already",
            where=f"--learn, {where}",
            expected="structures it does not know",
            got=f"it knows {', '.join(learned.structures)}",
            next_step="leave it out; to teach a structure anew, "
            + (
                "extend an earlier step (--step)"
                if "run" in learned.origin
                else "give it another name, in --learn and in the labels of the data"
            ),
        )


def _old_data(settings: ExtendSettings, learned: LearnedModel, own: OwnData) -> OldData | None:
    """Annotated cases of the structures the model knows, if there are any."""
    if settings.old_data is None:
        return None
    if settings.old_data.expanduser().resolve() == settings.data.expanduser().resolve():
        raise SettingError(
            "the new data is named as old data too",
            where="--old-data",
            expected="the folder of other cases, which the new step does not learn from",
            got=settings.old_data,
            next_step="leave it out: test cases of --data that annotate old structures are scored "
            "before and after without it",
        )
    return read_old_data(
        settings.old_data.expanduser(),
        known=learned.structures,
        name=source_name(settings.old_data, [own.source.name, *(s.name for s in learned.sources)]),
        patient=settings.patient,
    )


def extended_course(
    learned: LearnedModel,
    own: OwnData,
    names: tuple[str, ...],
    declared: Sequence[Structure],
    old: OldData | None = None,
) -> Benchmark:
    """The course of the old steps and the new one.

    Args:
        learned: the model to extend.
        own: the new data.
        names: structures to learn.
        declared: those clbench does not have.
        old: cases that annotate structures of the model; they test the steps that learned these.

    Raises:
        SettingError: the name of the new course is taken.
    """
    name = "_".join((learned.name, *names))
    if len(name) > LONGEST // 2:
        name = f"{learned.name}_{names[0]}_and_{len(own.source.structures)}"[:LONGEST]
    need_name(name, "--learn")
    if name in registry.entries("benchmark"):
        raise SettingError("the name of the new course is taken", where="--learn", got=name)
    before = {s.name for s in learned.declares}
    steps, sources = (learned.steps, learned.sources) if old is None else _tested(learned, old)
    return Benchmark(
        name=name,
        version=1,
        title=f"{learned.title}; then {', '.join(n.replace('_', ' ') for n in names)}",
        sources=(*sources, own.source),
        steps=(
            *steps,
            Step(name=" and ".join(names), source=own.source.name, learns=names, split=own.split),
        ),
        preprocessing=learned.preprocessing,
        groups=learned.groups,
        declares=(*learned.declares, *(s for s in declared if s.name not in before)),
    )


def _tested(learned: LearnedModel, old: OldData) -> tuple[tuple[Step, ...], tuple[Source, ...]]:
    """The given steps with the old data's cases for test, and the sources these need."""
    split = Split(name=f"{old.source.name}, all", origin=NOT_AT_HAND, test=old.cases)
    steps = tuple(
        replace(step, source=old.source.name, split=split)
        if set(step.learns) & set(old.annotated)
        else step
        for step in learned.steps
    )
    tested = [n for step in steps if step.split.test for n in step.learns]
    rest = {step.source for step in steps}
    sources = (*(s for s in learned.sources if s.name in rest), old.source_of(tested))
    return steps, sources


def _plan(
    settings: ExtendSettings,
    learned: LearnedModel,
    course: Benchmark,
    own: OwnData,
    old: OldData | None,
) -> Plan:
    """The run that teaches the new step, its data opened and checked."""
    data = {own.source.name: own.folder, **({} if old is None else {old.source.name: old.folder})}
    changes = split_overrides(list(settings.overrides))
    profile = apply_overrides(learned.profile, changes)
    refuse_idle(changes, profile)
    profile = _with_vectors(profile, course)
    others = tuple(w for w in settings.overrides if not w.startswith("strategy."))
    plan = resolve(
        RunSettings(
            bench=f"{course.name}.toml",
            strategy=learned.strategy_name,
            seed=learned.seed if settings.seed is None else settings.seed,
            profile=profile.name,
            data=",".join(f"{name}={folder}" for name, folder in data.items()),
            out=settings.out,
            overrides=(*learned.overrides, *others),
            device=settings.device,
            workers=settings.workers,
            threads=settings.threads,
            cache=settings.cache,
            checkpoint_s=settings.checkpoint_s,
        ),
        benchmark=course,
        strategy=learned.strategy,
        profile=profile,
    )
    plan.open()
    plan.settings = replace(plan.settings, bench=str(_course_file(plan).absolute()))
    plan.extends = dict(learned.origin)
    return plan


def _with_vectors(profile: Profile, course: Benchmark) -> Profile:
    """The settings, with drawn vectors for new structures where the encoding has none for them."""
    structures = course.structures(len(course.steps))
    try:
        encoded(structures, profile.text)
    except SettingError:
        if all(name in STRUCTURES for name in structures):
            raise
        return replace(profile, text=replace(profile.text, declared="random"))
    return profile


def _course_file(plan: Plan) -> Path:
    return plan.folder / "course" / f"{plan.benchmark.name}.toml"


def _refuse_misfit(plan: Plan, learned: LearnedModel) -> None:
    """The strategy must build models that the old weights fit, tensor by tensor.

    Raises:
        SettingError: names the first tensors that do not.
    """
    for number, state in enumerate(learned.states, 1):
        strategy = plan.strategy.first_step() if number == 1 else plan.strategy
        own = blank(plan, strategy, plan.lesson(number)).state_dict()
        theirs: Mapping[str, Any] = state["model"]
        shapes = {n: tuple(t.shape) for n, t in own.items()}
        got = {n: tuple(t.shape) for n, t in theirs.items()}
        if shapes == got:
            continue
        absent = [f"{n} {s}" for n, s in shapes.items() if got.get(n) != s]
        further = [f"{n} {s}" for n, s in got.items() if shapes.get(n) != s]
        raise SettingError(
            f"{plan.strategy_name} cannot go on with this model: its weights do not fit",
            where=f"--strategy {plan.strategy_name}, step {number}",
            expected=", ".join(absent[:3]) + (", …" if absent[3:] else "") or "none of these",
            got=", ".join(further[:3]) + (", …" if further[3:] else "") or "no such tensors",
            next_step="choose a strategy of the same family with --strategy, or none for the "
            "model's own, and no --set that changes the network",
        )


def _install(plan: Plan, learned: LearnedModel, course: Benchmark, *, fresh: bool) -> None:
    """Put course and checkpoints where the run looks for them; what is there already stays.

    Raises:
        StoreError: no space left, or another process works in the folder.
    """
    with alone(plan.folder, wait=False):
        if fresh:
            empty_run(plan.folder)
        _course_file(plan).parent.mkdir(parents=True, exist_ok=True)
        store_files.write_bytes(_course_file(plan), benchmark_text(course).encode())
        for number, state in enumerate(learned.states, 1):
            _write_state(plan, plan.folder / f"step{number}.pt", number, state, learned)
        if not (log := plan.folder / "events.jsonl").exists():
            store_files.write_bytes(log, b"")


def _write_state(
    plan: Plan, path: Path, number: int, state: Mapping[str, Any], learned: LearnedModel
) -> None:
    """Write the checkpoint of a given step, and what it took."""
    if path.is_file() and path.with_suffix(".json").is_file():
        return
    cost = {**learned.costs[number - 1], "opened": {}, "hosts": []}
    cost.pop("origin", None)  # of a run of another course, which `extends` names
    store_files.write_json(path.with_suffix(".json"), cost)
    save_step(plan, number, path, **{k: state[k] for k in ("model", "memory", "strategy")})
