"""What is extended: a model, the steps it has learned, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.deployment.trained import checkpoint_path, finished_step, plan_without_data
from clbench.errors import StoreError
from clbench.run.identity import sparse
from clbench.run.models import loaded
from clbench.run.plan import Plan, load_strategy
from clbench.run.record import strategy_of
from clbench.spec.benchmark import Benchmark, Preprocessing, Source, Step
from clbench.spec.settings import Profile, change, split_overrides
from clbench.spec.splits import NOT_AT_HAND, Split
from clbench.spec.taxonomy import Structure
from clbench.store import checkpoint, files
from clbench.store.record import RunRecord
from clbench.strategy.contract import Strategy


@dataclass(frozen=True, kw_only=True)
class LearnedModel:
    """A model to extend; its steps are `given`, and none of their cases is needed."""

    name: str
    """Of the course it learned; new courses are called after it."""
    title: str
    """What it learned, for readers."""
    sources: tuple[Source, ...]
    """Data sets it learned from."""
    steps: tuple[Step, ...]
    """What it learned, in order; all `given`."""
    states: tuple[Mapping[str, Any], ...]
    """Per step: `model` and `memory` of its checkpoint, and `strategy`, who taught it."""
    costs: tuple[Mapping[str, Any], ...]
    """Per step: what it took, as far as that is known."""
    preprocessing: Preprocessing
    """Of the course."""
    groups: Mapping[str, tuple[str, ...]]
    """Table groups."""
    declares: tuple[Structure, ...]
    """Structures that it added to the taxonomy."""
    profile: Profile
    """Settings it was made with."""
    strategy: Strategy
    """What teaches the new step."""
    strategy_name: str
    """Its name."""
    overrides: tuple[str, ...]
    """`strategy.…=…` words it was made with."""
    seed: int
    """Of the run it comes from."""
    origin: Mapping[str, Any]
    """Where it comes from, for the record."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it was read."""

    @property
    def structures(self) -> tuple[str, ...]:
        """Every structure it knows, in channel order."""
        return tuple(name for step in self.steps for name in step.learns)


def given_step(step: Step, state: Mapping[str, Any]) -> Step:
    """A step of a course as one that was learned elsewhere.

    Args:
        step: as the old course has it.
        state: `model` and `memory` after it.
    """
    return replace(
        step,
        split=Split(name="none", origin=NOT_AT_HAND),
        phantom_split=None,
        given=checkpoint.state_digest(state),
    )


def learned_by_run(
    folder: Path,
    *,
    step: int | None = None,
    strategy: str | None = None,
    overrides: Sequence[str] = (),
) -> LearnedModel:
    """The model of a run after a step.

    With the run's own strategy the steps stay as they were; where checkpoints of earlier steps are
    not there (an imported model holds the last alone), they become one step of all structures.
    Another strategy takes what the run serves as one step, without the memory, which is the first
    strategy's alone.

    Args:
        folder: the run; it need not be finished, and its data need not be at hand.
        step: 1-based; None: the last one that is taught and examined.
        strategy: what teaches the new step; None: the run's own.
        overrides: `strategy.…=…` words of the command line.

    Raises:
        StoreError: no run, no checkpoint, or one of another course.
        SettingError: a step the course does not have, or a strategy that needs old images.
    """
    record = RunRecord.read(folder)
    number = finished_step(record, folder, step)
    plan = plan_without_data(record, folder, device="cpu")
    name = record.settings["strategy"] if strategy is None else strategy
    own = name == record.settings["strategy"]
    same = own and not overrides
    changed = split_overrides(list(overrides)).get("strategy", {})
    method = (
        change(_own_strategy(record, folder), changed, "strategy")
        if own
        else load_strategy(name, changed)
    )
    last = checkpoint_path(folder, record, number)
    earlier = _earlier_checkpoints(folder, record, number) if same else None
    content = _content(last, plan, number)
    taught = plan.benchmark.steps[:number]
    sources = tuple(
        replace(s, partial=())
        for s in plan.benchmark.sources
        if s.name in {t.source for t in taught}
    )
    if earlier is not None:
        contents = [*(_content(path, plan, t) for t, path in enumerate(earlier, 1)), content]
        states = tuple({k: c[k] for k in ("model", "memory", "strategy")} for c in contents)
        steps = tuple(given_step(s, state) for s, state in zip(taught, states, strict=True))
        costs = tuple(_cost(path) for path in (*earlier, last))
    else:
        state = (
            {k: content[k] for k in ("model", "memory", "strategy")}
            if same
            else _served(plan, number, last) | {"strategy": content["strategy"]}
        )
        titles = dict.fromkeys(plan.benchmark.source(s.source).title for s in taught)
        merged, source = one_given_step(
            plan.benchmark.name,
            title=" and ".join(titles),
            step=f"{plan.benchmark.name}, {number} step(s)",
            structures=plan.benchmark.structures(number),
            state=state,
        )
        states, steps, sources, costs = (state,), (merged,), (source,), (_cost(last),)
    return LearnedModel(
        name=plan.benchmark.name,
        title=plan.benchmark.title,
        sources=sources,
        steps=steps,
        states=states,
        costs=costs,
        preprocessing=plan.benchmark.preprocessing,
        groups=_groups(plan.benchmark, number),
        declares=plan.benchmark.declares,
        profile=_profile(plan),
        strategy=method,
        strategy_name=name,
        overrides=_words(method, overrides),
        seed=record.seed,
        origin={
            "run": str(folder.absolute()),
            "run_id": record.run_id,
            "bench": record.identity.bench,
            "strategy": record.strategy,
            "step": number,
            "state": checkpoint.state_digest(content),
        },
    )


def _own_strategy(record: RunRecord, folder: Path) -> Strategy:
    """What taught the run, to teach a further step as it would have.

    Raises:
        StoreError: another version of it, which the one of today cannot repeat.
    """
    strategy, version = strategy_of(record), record.strategy_options["version"]
    if type(strategy).defaults_of(version) is not None:
        return strategy
    raise StoreError(
        f"{record.strategy} teaches otherwise today than it taught this run",
        where=folder,
        expected=f"a run of version {strategy.version} of {record.strategy}",
        got=f"version {version}",
        next_step="teach the run's course anew and extend that run, name another strategy that "
        "builds the same network with --strategy, or use the clbench that made the run",
    )


def _words(strategy: Strategy, typed: Sequence[str]) -> tuple[str, ...]:
    """`strategy.…=…` words that make a strategy: those typed, one per other changed option."""
    named = split_overrides(list(typed)).get("strategy", {})
    others = {name: value for name, value in sparse(strategy).items() if name not in named}
    return (
        *typed,
        *(
            f"strategy.{name}={','.join(value) if isinstance(value, tuple) else value}"
            for name, value in others.items()
        ),
    )


def _earlier_checkpoints(folder: Path, record: RunRecord, number: int) -> list[Path] | None:
    """The checkpoints before a step; None where one is not there."""
    try:
        return [checkpoint_path(folder, record, t) for t in range(1, number)]
    except StoreError:
        return None


def _content(path: Path, plan: Plan, number: int) -> dict[str, Any]:
    """What a checkpoint holds, which must be that of the step."""
    content = checkpoint.load(path)
    bench = plan.benchmark
    expected = (bench.name, bench.version, number, list(bench.structures(number)))
    got = tuple(content.get(k) for k in ("bench", "bench_version", "step", "structures"))
    if got != expected:
        said = "{} version {}, step {}: {}"
        raise StoreError(
            "a checkpoint of another course, version or step",
            where=path,
            expected=said.format(*expected),
            got=said.format(*got),
            next_step="put the run's own checkpoint back, or extend the run this one is of",
        )
    return content


def _served(plan: Plan, number: int, path: Path) -> dict[str, Any]:
    """The model as the run examines it after a step, and no memory."""
    strategy = plan.strategy.first_step() if number == 1 else plan.strategy
    model, memory = loaded(plan, strategy, plan.lesson(number), path)
    return {"model": plan.strategy.serve(model, memory).state_dict(), "memory": {}}


def one_given_step(
    source: str, *, title: str, step: str, structures: tuple[str, ...], state: Mapping[str, Any]
) -> tuple[Step, Source]:
    """All that a model learned elsewhere as one step, from a source that annotates all of it.

    Args:
        source: name of the source.
        title: its title.
        step: name of the step.
        structures: in channel order.
        state: `model` and `memory` of the model.
    """
    labels = dict(enumerate(structures, 1))
    split = Split(name="none", origin=NOT_AT_HAND)
    given = checkpoint.state_digest(state)
    return (
        Step(name=step, source=source, learns=structures, split=split, given=given),
        Source(name=source, title=title, layout="nnunet", labels=labels),
    )


def _cost(path: Path) -> dict[str, Any]:
    """What a step took; what it opened, where, and whose it is stand in the record it is from."""
    cost_file = path.with_suffix(".json")
    cost = files.read_json(cost_file) if cost_file.is_file() else {}
    return {k: v for k, v in cost.items() if k not in ("opened", "hosts", "origin")}


def _groups(benchmark: Benchmark, number: int) -> dict[str, tuple[str, ...]]:
    """The groups whose structures are all learned by then."""
    learned = set(benchmark.structures(number))
    return {title: names for title, names in benchmark.groups.items() if set(names) <= learned}


def _profile(plan: Plan) -> Profile:
    """The run's settings; weights the first step started from are no longer needed."""
    return replace(plan.profile, backbone=replace(plan.profile.backbone, weights=None))
