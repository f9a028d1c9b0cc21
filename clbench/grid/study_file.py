"""The file of a study: courses, strategies, seeds, profiles and settings; each combination a run.

    courses = ["tumor_ext", "my_course.toml"]
    strategies = ["universal", "lwf"]
    seeds = [0, 1, 2]
    orders = [[1, 2, 3], [3, 1, 2]]     # absent: the steps of each course as listed

    [data]                       # absent: the phantom
    tumor_ext = "btcv=/data/BTCV,lits=/data/LiTS"

    [settings]                   # absent: the defaults alone
    slow = ["train.lr=0.0001"]

Names, paths and words are those of `clbench run`; paths are seen from the working folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from clbench.errors import SpecError
from clbench.spec import registry
from clbench.spec.names import ordered_name, split_order
from clbench.spec.settings import LARGEST_SEED
from clbench.spec.toml import read_toml
from clbench.spec.validation import Names, checked, from_toml

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Some = Annotated[tuple[str, ...], Field(min_length=1, description="a list of at least one name")]


@checked(SpecError)
class StudyFile:
    """Runs to be made: the product of courses, profiles, settings, strategies and seeds."""

    courses: Some
    """Names, or paths of course files."""
    strategies: Some
    """Names, or `module:Class`."""
    seeds: Annotated[
        tuple[Seed, ...],
        Field(min_length=1, description=f"a list of whole numbers from 0 to {LARGEST_SEED}"),
    ] = (0,)
    """Training runs of each strategy."""
    orders: Annotated[
        tuple[tuple[int, ...], ...],
        Field(description="a list of orders of the steps, such as [[1, 2, 3], [3, 1, 2]]"),
    ] = ()
    """Orders in which the steps of every course are taught; empty: as listed."""
    profiles: Names = ()
    """Empty: `quick` on the phantom, `paper` on real data."""
    settings: Annotated[
        Mapping[str, Names],
        Field(description='a table of lists, such as slow = ["train.lr=0.0001"]'),
    ] = field(default_factory=dict)
    """Name → `group.name=value` words; empty: the defaults alone."""
    data: Annotated[
        Mapping[str, str], Field(description='a table such as tumor_ext = "btcv=PATH,lits=PATH"')
    ] = field(default_factory=dict)
    """Course → `--data` of its runs; absent: the phantom."""
    splits: Annotated[
        Mapping[str, Names], Field(description='a table such as tumor_ext = ["btcv=FILE.toml"]')
    ] = field(default_factory=dict)
    """Course → `--split` words of its runs."""
    tuned: Annotated[
        Mapping[str, str], Field(description='a table such as tumor_ext = "tuned.toml"')
    ] = field(default_factory=dict)
    """Course → settings file of `clbench tune`, which holds every strategy; absent: not tuned."""
    out: Annotated[str, Field(min_length=1, description="a folder")] = "results"
    """Where run folders go."""

    def __post_init__(self) -> None:
        """Check that the steps of a course are given one order."""
        ordered = [course for course in self.courses if split_order(course)[1]]
        if self.orders and ordered:
            raise SpecError(
                "two orders of the steps are given",
                where="courses and orders of a study",
                expected="courses as listed beside `orders`, or their order in their names alone",
                got=", ".join(ordered),
                next_step=f"name the course {split_order(ordered[0])[0]}, or take `orders` out",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of a study, in the words of `clbench run`."""

    bench: str
    """Name or path of the course."""
    strategy: str
    """Its name."""
    seed: int
    """Of the training."""
    profile: str | None
    """None: the default of its data."""
    settings: str
    """Name of its settings; empty for the defaults."""
    overrides: tuple[str, ...]
    """What these are."""
    data: str | None
    """None: the phantom."""
    splits: tuple[str, ...]
    """`SOURCE=FILE.toml` words."""
    tuned: str | None = None
    """Settings file of `clbench tune`."""
    out: Path
    """Where run folders go."""

    @property
    def name(self) -> str:
        """Tells it from every other one of the study."""
        parts = (self.bench, self.profile, self.settings, self.strategy, f"seed {self.seed}")
        return ", ".join(p for p in parts if p)

    def arguments(self) -> list[str]:
        """The arguments of `clbench run` that make it."""
        arguments = ["--bench", self.bench, "--strategy", self.strategy, "--seed", str(self.seed)]
        single = (("--profile", self.profile), ("--data", self.data), ("--tuned", self.tuned))
        for option, value in single:
            arguments += [option, value] if value is not None else []
        for option, values in (("--split", self.splits), ("--set", self.overrides)):
            arguments += [word for value in values for word in (option, value)]
        return [*arguments, "--out", str(self.out)]


def read_study(path: Path) -> StudyFile:
    """Read a study file.

    Raises:
        SpecError: no TOML, an unknown field, an empty list, or settings of a course not in it.
    """
    study = from_toml(StudyFile, read_toml(path), raised=SpecError, where=path)
    for key, table in (("data", study.data), ("splits", study.splits), ("tuned", study.tuned)):
        if strange := sorted(set(table) - set(study.courses)):
            raise SpecError(
                f"{key} of a course that the study does not have",
                where=path,
                expected=", ".join(study.courses),
                got=", ".join(strange),
            )
    return study


def part_of(study: StudyFile, lists: Mapping[str, Any]) -> StudyFile:
    """The study with some of its lists replaced, as for a part of its runs or a folder elsewhere.

    Args:
        study: what a file says.
        lists: field → value; what the study says of courses that are not among them is left out.
    """
    courses = lists.get("courses", study.courses)
    tables: dict[str, Any] = {
        name: {course: of for course, of in getattr(study, name).items() if course in courses}
        for name in ("data", "splits", "tuned")
    }
    return replace(study, **lists, **tables)


def refuse_other_orders(study: StudyFile) -> None:
    """Refuse orders that are none of all steps of a course: 1 alone would be taken as "as listed".

    Raises:
        SpecError: names the course and its steps.
    """
    for course, order in itertools.product(study.courses, study.orders):
        registry.benchmark(course).in_order(order)


def cells(study: StudyFile) -> Iterator[Cell]:
    """Every run of a study: courses outermost, then orders, seeds innermost."""
    product = itertools.product(
        dict.fromkeys(study.courses),
        dict.fromkeys(study.orders) or ((),),
        dict.fromkeys(study.profiles) or (None,),
        (study.settings or {"": ()}).items(),
        dict.fromkeys(study.strategies),
        dict.fromkeys(study.seeds),
    )
    for course, order, profile, (settings, overrides), strategy, seed in product:
        yield Cell(
            bench=ordered_name(course, order),
            strategy=strategy,
            seed=seed,
            profile=profile,
            settings=settings,
            overrides=overrides,
            data=study.data.get(course),
            splits=study.splits.get(course, ()),
            tuned=study.tuned.get(course),
            out=Path(study.out).expanduser(),
        )
