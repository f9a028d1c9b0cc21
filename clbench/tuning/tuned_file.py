"""The settings file: what tuning chose for each strategy and on what, as `--tuned FILE` takes it.

The file is TOML and may be read, not edited: its checksum goes into the record of every run that
uses it. Such a run is refused where its numbers would not be what they claim: a strategy the file
does not hold, another course, other data or other settings than its rule allows, a seed that the
trials had, or a test case that a trial opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from clbench.errors import SettingError, StoreError, unknown_name
from clbench.run.plan import Plan, RunSettings, resolve, resolve_profile
from clbench.spec.names import split_order
from clbench.spec.settings import GROUPS, split_overrides
from clbench.spec.toml import inline, read_toml
from clbench.spec.validation import Names, checked, from_toml
from clbench.store import files
from clbench.tuning.rules import RULES, Rule
from clbench.tuning.search import word, words
from clbench.tuning.study import TunedStrategy, TuneSettings

SCHEMA = 1
"""Version of the file's layout."""


@checked(StoreError)
class ChosenSettings:
    """What tuning chose for one strategy."""

    settings: Names
    """`group.name=value` words, as `--set` takes them; none: the defaults were the best."""
    score: float
    """Of the chosen trial: mean validation Dice over structures."""
    default_score: Annotated[float | None, Field(description="a number")] = None
    """The same of the defaults; absent: their training failed."""
    trials: Annotated[int, Field(ge=1)]
    """Made."""
    diverged: Annotated[int, Field(ge=0)] = 0
    """Of them, trials without a score."""
    updates: Annotated[int, Field(ge=0)]
    """Of all trials together."""
    seconds: Annotated[float, Field(ge=0)]
    """Of all trials together."""
    space: Mapping[str, str]
    """Setting → its range."""
    version: Annotated[int, Field(ge=1)] = 1
    """Of the strategy."""
    opened: Mapping[str, Names]
    """Purpose → `source/case` that a trial opened."""
    fixed: Names | None = None
    """`group.name=value` words of what all trials had, was not chosen and is no default of clbench;
    absent: the file was written before it stood there."""


@checked(StoreError)
class TunedFile:
    """The content of a settings file."""

    schema: int
    """Version of its layout."""
    clbench: str
    """Version that wrote it."""
    rule: str
    """What the trials were judged by."""
    steps: Annotated[int, Field(ge=2)]
    """Steps a trial was taught."""
    bench: str
    """Course of the trials."""
    bench_version: int
    """Its version."""
    course: str | None = None
    """Digest of a course named by its file."""
    data_fingerprint: str
    """Checksum of its data."""
    patients: bool
    """False: tuned on the phantom."""
    profile: str
    """Name of the profile of the trials."""
    budget: Annotated[float, Field(gt=0)]
    """For each strategy."""
    unit: str
    """What it counts: updates or seconds."""
    search: str
    """How trials were chosen."""
    seed: Annotated[int, Field(ge=0)]
    """Of every trial and of the search."""
    strategies: Mapping[str, ChosenSettings]
    """Name → what was chosen."""

    @property
    def label(self) -> str:
        """The rule, that it is unrealistic where it is, and what cannot be compared with a run."""
        rule = RULES[self.rule]
        unknown = rule.same_course and any(s.fixed is None for s in self.strategies.values())
        return rule.label + (
            "; the file does not say what else its trials were made with, so that is not compared"
            * unknown
        )


def write_tuned(path: Path, tuned: Sequence[TunedStrategy], settings: TuneSettings) -> None:
    """Write the settings file.

    Args:
        path: the file; one that is there is replaced.
        tuned: the strategies.
        settings: how they were tuned.

    Raises:
        StoreError: it cannot be written.
        SettingError: no trial of a strategy has a score.
    """
    import clbench

    facts = tuned[0].facts
    identity, rule = facts["identity"], RULES[settings.rule]
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "clbench": clbench.__version__,
        "rule": rule.name,
        "steps": facts["steps"],
        "bench": identity["bench"],
        "bench_version": identity["bench_version"],
        **({"course": identity["course"]} if identity.get("course") else {}),
        "data_fingerprint": identity["data_fingerprint"],
        "patients": tuned[0].patients,
        "profile": identity["profile"]["name"],
        "budget": float(settings.budget),
        "unit": settings.unit,
        "search": settings.search,
        "seed": settings.base.seed,
    }
    lines = [
        "# Written by `clbench tune`, read with --tuned by `clbench run`. Not to be edited: runs",
        f"# record its checksum. Rule {rule.label}: {rule.summary}.",
        *(f"{name} = {inline(value)}" for name, value in head.items()),
    ]
    for one in tuned:
        lines += ["", f"[strategies.{json.dumps(one.name)}]"]
        lines += [f"{name} = {inline(value)}" for name, value in _chosen(one).items()]
    files.make_folder(path.parent)
    files.write_bytes(path, "\n".join([*lines, ""]).encode())


def _chosen(one: TunedStrategy) -> dict[str, Any]:
    best, first = one.best, one.trials[0]
    opened: dict[str, set[str]] = {}
    for trial in one.trials:
        for purpose, cases in trial.opened.items():
            opened.setdefault(purpose, set()).update(cases)
    return {
        "settings": list(words(best.settings)),
        "score": best.score,
        **({"default_score": first.score} if first.score is not None else {}),
        "trials": len(one.trials),
        "diverged": sum(t.score is None for t in one.trials),
        "updates": int(one.spent("updates")),
        "seconds": one.spent("seconds"),
        "space": {name: str(span) for name, span in one.space.items()},
        "version": one.facts["identity"]["strategy"].get("version", 1),
        "opened": {purpose: sorted(cases) for purpose, cases in opened.items()},
        "fixed": [
            f"{name}={value}"
            for name, value in _settings_of(one.facts["identity"], best.settings).items()
        ],
    }


def read_tuned(path: Path) -> TunedFile:
    """Read a settings file.

    Raises:
        SpecError: missing, or no TOML.
        StoreError: not written by `clbench tune`, or by another version.
    """
    try:
        tuned = from_toml(TunedFile, read_toml(path), raised=StoreError, where=path)
    except StoreError as err:
        err.next_step = err.next_step or "name a settings file that `clbench tune` wrote"
        raise
    if tuned.schema != SCHEMA or tuned.rule not in RULES:
        raise StoreError(
            "a settings file of another version",
            where=path,
            expected=f"schema {SCHEMA}, a rule of {', '.join(RULES)}",
            got=f"schema {tuned.schema}, rule {tuned.rule}",
            next_step="run the `clbench tune` command again; its trials are kept",
        )
    return tuned


def plan_tuned(settings: RunSettings, path: Path) -> Plan:
    """The plan of a run with tuned settings, its data opened.

    Args:
        settings: of the run, without the tuned settings.
        path: the settings file.

    Raises:
        ClbenchError: the file is not for this run; or as `clbench.run.plan.resolve`.
    """
    tuned = read_tuned(path)
    if (chosen := tuned.strategies.get(settings.strategy)) is None:
        raise unknown_name("tuned strategy", settings.strategy, tuned.strategies, f"--tuned {path}")
    refuse_used_seeds(tuned, [settings.seed], path)
    untuned = split_overrides(list(settings.overrides))
    searched = dict.fromkeys([*(w.partition("=")[0] for w in chosen.settings), *chosen.space])
    both = [n for n in searched if n.partition(".")[2] in untuned.get(n.partition(".")[0], {})]
    if both:
        raise SettingError(
            "a tuned setting is given by --set as well",
            where=f"--tuned {path}",
            got=", ".join(both),
            next_step="leave it out of --set, or run without --tuned",
        )
    plain = resolve_profile(settings.profile, untuned, data=settings.data)
    plan = resolve(
        dataclasses.replace(settings, overrides=(*settings.overrides, *chosen.settings))
    ).open()
    _refuse_other_use(tuned, chosen, plan, path)
    content = {
        **{k: v for k, v in dataclasses.asdict(tuned).items() if k != "strategies"},
        **{k: v for k, v in dataclasses.asdict(chosen).items() if k != "fixed"},
        "realistic": RULES[tuned.rule].realistic,
        "file": files.sha256(path),
        "profile_before": plan.profile_settings(plain),
    }
    plan.tuned = json.loads(json.dumps(content))  # as it will be read back
    return plan


def refuse_used_seeds(tuned: TunedFile, seeds: Sequence[int], path: Path) -> None:
    """Runs with tuned settings take seeds that no trial had.

    Args:
        tuned: the settings file.
        seeds: of the runs.
        path: of the file, for the error.

    Raises:
        SettingError: one was used.
    """
    if tuned.seed in seeds:
        raise SettingError(
            "this seed was used in tuning",
            where=f"--tuned {path}",
            expected="a fresh seed: on this one the setting is the best partly by luck",
            got=tuned.seed,
            next_step="--seeds 0-2" if tuned.seed > 2 else "--seeds 100-102",
        )


def _settings_of(identity: Mapping[str, Any], chosen: Collection[str]) -> dict[str, str]:
    """`group.name` → value of what a run's identity holds, as `--set` takes it.

    Args:
        identity: of a run or of trials, as in JSON; what is as clbench's defaults is not in it.
        chosen: names that are left out.
    """
    groups = {"strategy": identity["strategy"], **identity["profile"]}
    return {
        f"{group}.{name}": word(value)
        for group, values in groups.items()
        if isinstance(values, Mapping)  # the name of a profile is none
        for name, value in values.items()
        if f"{group}.{name}" not in {*chosen, "strategy.class", "strategy.version"}
    }


def _refuse_other_settings(chosen: ChosenSettings, plan: Plan, where: str) -> None:
    """Hold a run to the settings that its trials had beside the tuned ones.

    Raises:
        SettingError: it has others.
    """
    if chosen.fixed is None:
        return
    then = dict(w.split("=", 1) for w in chosen.fixed)
    now = _settings_of(plan.identity.to_json(), {w.partition("=")[0] for w in chosen.settings})
    differs = [n for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
    if differs:
        as_trials = [f"{n}={then[n] if n in then else _default(n, plan)}" for n in differs]
        raise SettingError(
            "the settings were tuned beside other settings than this run has",
            where=where,
            expected=", ".join(as_trials),
            got=", ".join(f"{n}={now[n] if n in now else _default(n, plan)}" for n in differs),
            next_step="give the run the profile of the trials, and what differs from it: "
            + " ".join(f"--set {w}" for w in as_trials)
            + "; or tune with what this run has",
        )


def _default(name: str, plan: Plan) -> str:
    """What a setting is by clbench's defaults, as `--set` takes it."""
    group, _, field = name.partition(".")
    kind = type(plan.strategy) if group == "strategy" else GROUPS[group]
    return word({f.name: f.default for f in dataclasses.fields(kind)}.get(field))


def _refuse_other_use(tuned: TunedFile, chosen: ChosenSettings, plan: Plan, path: Path) -> None:
    """Hold a run to what the rule of its settings allows.

    Raises:
        SettingError: another course, other data, other settings, or a test case that was seen in
            tuning.
    """
    rule, identity = RULES[tuned.rule], plan.identity
    same = tuned.bench == identity.bench and tuned.course == identity.course
    if not rule.same_course and tuned.bench != identity.bench:
        # in another order it is the same course, which was seen whole
        same = split_order(tuned.bench)[0] == split_order(identity.bench)[0]
    if same != rule.same_course:
        raise SettingError(
            "settings of this rule are for another course"
            if same
            else "the settings were tuned on another course",
            where=f"--tuned {path}, rule {rule.name}",
            expected=_meant_for(rule, tuned.bench),
            got=f"the course {identity.bench}" + " itself" * same,
            next_step="tune on this course with --rule first_step"
            if same
            else "tune on this course, or tune on the other one with --rule transfer",
        )
    differs = {
        "version of the course": (tuned.bench_version, identity.bench_version),
        "data": (tuned.data_fingerprint, identity.data_fingerprint),
        "version of the strategy": (chosen.version, plan.strategy.version),
    }
    if not rule.same_course:
        differs = {k: v for k, v in differs.items() if k == "version of the strategy"}
    for what, (then, now) in differs.items():
        if then != now:
            raise SettingError(
                f"the settings were tuned on another {what}".replace("another data", "other data"),
                where=f"--tuned {path}, rule {rule.name}",
                expected=now,
                got=then,
                next_step="run the `clbench tune` command on what this run is made on"
                + (", or use --rule transfer" if rule.same_course and what == "data" else ""),
            )
    if rule.same_course:
        _refuse_other_settings(chosen, plan, f"--tuned {path}, rule {rule.name}")
    seen = {case for cases in chosen.opened.values() for case in cases}
    tests = {f"{source}/{case}" for source, case in plan.catalog.test_cases}
    if both := sorted(seen & tests):
        raise SettingError(
            "test cases of this course were seen in tuning",
            where=f"--tuned {path}",
            expected="none",
            got=", ".join(both[:10]) + f" and {len(both) - 10} more" * (len(both) > 10),
            next_step="tune on a course whose cases are not tested here",
        )


def _meant_for(rule: Rule, bench: str) -> str:
    return f"the course {bench}" if rule.same_course else f"any course but {bench}"
