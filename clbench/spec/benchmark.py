"""What is taught, in what order, from which data: Source, Preprocessing, Step, Benchmark.

These types are the parsed form of a benchmark's TOML file
(`clbench.spec.toml` reads it). They are frozen and validate themselves, so whoever holds one may
trust it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Predicate
from pydantic import AliasChoices, Field

from clbench.errors import SpecError, did_you_mean
from clbench.spec.names import need_case, need_name, ordered_name, split_order
from clbench.spec.splits import NOT_AT_HAND, Cases
from clbench.spec.splits import Draw as Draw
from clbench.spec.splits import Split as Split
from clbench.spec.taxonomy import Structure, structure
from clbench.spec.validation import Names, checked

MAX_LABEL = (1 << 16) - 1
"""Largest label value: a table of all values is looked up voxel by voxel."""
# a whole number stays one: 2 and 2.0 have two hashes, so the file's own way to write it is kept
Number = int | float
Length = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
ADDED = ("external_tests", "order", "among", "again")
"""Fields of a course that `Benchmark.digest` leaves out where they are empty."""


@checked(SpecError)
class Partial:
    """Cases of a source that annotate fewer structures than the rest."""

    cases: Cases
    """Case ids."""
    annotates: Names
    """The structures these cases annotate."""
    why: str = ""
    """Where the fact comes from."""


@checked(SpecError)
class Rescale:
    """How stored values become HU, where the files' own headers do not say it."""

    slope: Annotated[Number, Predicate(lambda slope: slope != 0)] = 1
    """HU per stored unit."""
    intercept: Number = 0
    """HU of a stored 0."""


@checked(SpecError)
class Source:
    """A data set: how it lies on disk, what its label values mean, what each case annotates."""

    name: str
    """Name in `--data name=PATH` and in every table."""
    title: str
    """Name for readers."""
    layout: str
    """Folder layout (`clbench.data.layouts`)."""
    labels: Annotated[
        Mapping[int, str],
        Field(
            description="a table, a whole number = one structure; for a pair under one value use "
            "`sides`"
        ),
    ] = field(default_factory=dict)
    """Raw label value → structure; a structure also holds the values of those inside it."""
    masks: Annotated[Mapping[str, str], Field(description="a table, file stem = one structure")] = (
        field(default_factory=dict)
    )
    """For layouts with a mask per structure: file stem → structure; several stems may stand for
    one structure (two generations of names)."""
    sides: Annotated[
        Mapping[int, tuple[str, str]],
        Field(description="a table, a whole number = the left and the right structure of a pair"),
    ] = field(default_factory=dict)
    """Raw label value that holds both of a pair → (left, right) structure."""
    ignored: Annotated[tuple[int, ...], Field(description="a list of label values")] = ()
    """Further label values that occur and count as background."""
    partial: tuple[Partial, ...] = ()
    """Cases that annotate fewer structures."""
    patient: str = "(.+)"
    """Regular expression whose one group is the patient within a case id; no patient stands in
    train and in test."""
    rescale: Annotated[
        Rescale | None, Field(description="a table {slope = 1, intercept = -1024}")
    ] = None
    """HU = slope * value + intercept, for images stored otherwise; None: the values are HU."""
    licence: str = ""
    """Licence of the data, as its owner states it."""
    url: str = ""
    """Where to get it."""

    def __post_init__(self) -> None:
        """Check that every named structure exists and is in the labels."""
        where = f"source {self.name!r}"
        wrong = partial(SpecError, where=where)
        need_name(self.name, where)
        if bool(self.labels or self.sides) == bool(self.masks):
            raise wrong(
                "a source needs label values, or names of mask files",
                expected="either [source.labels] or [source.masks]",
                got="both" if self.masks else "neither",
            )
        if self.masks and self.ignored:
            raise wrong(
                "`ignored` lists label values, and the source has masks",
                expected="no `ignored`: a mask that [source.masks] does not name is not read",
                got=list(self.ignored),
                next_step="take it out",
            )
        for name in (*self.labels.values(), *self.masks.values()):
            structure(name, where)
        for name in (*self.masks, *(c for p in self.partial for c in p.cases)):
            need_case(name, where)
        for value, pair in self.sides.items():
            backwards = pair[0].startswith("right") or pair[1].startswith("left")
            if structure(pair[0], where).mirror != pair[1] or backwards:
                raise wrong(
                    "sides needs the left and the right structure of a pair",
                    expected=f'{value} = ["left_…", "right_…"]',
                    got=f"{value} = {list(pair)}",
                )
        for value in (*self.labels, *self.sides, *self.ignored):
            if value <= 0:
                raise wrong("label values start at 1; 0 is background", got=value)
            if value > MAX_LABEL:
                raise wrong("a label value is too large", expected=f"≤ {MAX_LABEL}", got=value)
        used = [*self.labels, *self.sides, *self.ignored]
        if len(set(used)) < len(used):
            raise wrong(
                "a label value is listed twice",
                expected="each in one of labels, sides and ignored",
                got=sorted(v for v in set(used) if used.count(v) > 1),
            )
        try:
            groups = re.compile(self.patient).groups
        except re.error as err:
            raise wrong("patient is no regular expression", got=self.patient) from err
        if groups != 1:
            raise wrong("patient needs exactly one group", got=self.patient)
        seen: set[str] = set()
        for part in self.partial:
            for name in part.annotates:
                if name not in self.structures:
                    raise wrong(
                        f"partial cases annotate {name!r}, which the source does not have",
                        expected=f"one of {', '.join(sorted(self.structures))}",
                    )
            if twice := seen & set(part.cases):
                raise wrong("a case stands in two partial lists", got=sorted(twice))
            seen |= set(part.cases)

    @property
    def structures(self) -> tuple[str, ...]:
        """Every structure labels or masks name, in the order of the values, each once."""
        by_value = {**{v: (n,) for v, n in self.labels.items()}, **self.sides}
        names = [n for v in sorted(by_value) for n in by_value[v]]
        return tuple(dict.fromkeys([*names, *self.masks.values()]))

    def annotated(self, case: str) -> tuple[str, ...]:
        """The structures that case `case` annotates, in the order of `structures`.

        Where masks may be missing, see `CaseFiles.annotated`.
        """
        for part in self.partial:
            if case in part.cases:
                return tuple(s for s in self.structures if s in part.annotates)
        return self.structures

    def patient_of(self, case: str) -> str:
        """The patient behind a case id.

        Raises:
            SpecError: the id does not match `patient`.
        """
        match = re.match(self.patient, case)
        if match is None or not match[1]:
            raise SpecError(
                "a case id does not match the source's `patient`",
                where=f"source {self.name!r}",
                expected=self.patient,
                got=case,
            )
        return match[1]


@checked(SpecError)
class Preprocessing:
    """How a volume becomes what a network sees."""

    orientation: Literal["RAS"] = "RAS"
    """Axis codes after reorientation; axis 0 grows to the patient's right, 1 to the front, 2 up."""
    spacing_mm: Annotated[
        tuple[Length, Length, Length], Field(description="three positive numbers")
    ] = (1.5, 1.5, 1.5)
    """Voxel size after resampling (image linear, label nearest)."""
    window_hu: Annotated[
        tuple[Number, Number],
        Predicate(lambda window: window[0] < window[1]),
        Field(description="two numbers: the lower end, then the upper"),
    ] = (-175.0, 250.0)
    """HU range that is mapped to [0, 1]; values outside are clipped."""
    patch_vox: Annotated[
        tuple[Size, Size, Size], Field(description="three positive whole numbers")
    ] = (96, 96, 96)
    """Training patch and sliding window, in voxels."""


def _need_list(split: Split, where: str) -> None:
    """Refuse a rule for the phantom, whose cases are made for the split: nothing is drawn there.

    Raises:
        SpecError: a rule.
    """
    if split.draw is not None:
        raise SpecError(
            "cases of the phantom are listed, not drawn",
            where=where,
            expected="case ids under `train`, `validation` and `test`",
            got="draw",
            next_step='list them, as train = ["1..16"], or leave phantom_split out: the settings '
            "phantom.train, phantom.validation and phantom.test say how many there are",
        )


@checked(SpecError)
class Step:
    """One lesson: which structures are learned, from which source."""

    name: str
    """Short name for tables."""
    source: str
    """Name of the source."""
    learns: Names
    """Structures first learned here, in channel order; none where all are taught `again`."""
    again: Names = ()
    """Structures of earlier steps that this step teaches again, from another source: another
    scanner, phase or population."""
    split: Annotated[Split, Field(description="a file or a table")]
    """Cases on real data; of a step that is `given` test cases or none, with the origin
    `NOT_AT_HAND`."""
    phantom_split: Annotated[Split | None, Field(description="a file or a table")] = None
    """Cases on the embedded phantom; None: as many as the profile asks for, numbered by step."""
    shows: Names | None = None
    """Structures whose annotation this step's cases show while teaching. None: all the source
    annotates, but not what other steps learn from the same source: in a source that several steps
    share, each sees its own lesson."""
    given: str | None = None
    """Checksum of the model that learned this step elsewhere: the step is not taught, no case it
    learned from is at hand, and its checkpoint must be there (`clbench extend`). None: a step that
    is taught."""

    def __post_init__(self) -> None:
        """Check that a step that is taught has cases, and one that is given none to learn from."""
        split = self.split
        if self.given is None and split.origin != NOT_AT_HAND:
            split.need_training()
        if self.phantom_split is not None:
            _need_list(self.phantom_split, f"step {self.name!r}, phantom_split")
            self.phantom_split.need_training()
        none = split.origin == NOT_AT_HAND and not (split.train or split.validation or split.draw)
        if (self.given is not None) != none:
            raise SpecError(
                "a step that is taught needs cases, and one whose model is given learns from none",
                where=f"step {self.name!r}",
                expected="a split with cases"
                if none
                else f'split = {{origin = "{NOT_AT_HAND}"}} beside `given`',
                got=f"{len(self.split.cases)} cases",
            )


@checked(SpecError)
class ExternalTest:
    """A source that is tested on after every step, and never learned from or chosen by."""

    source: str
    """Name of the source; no step uses it."""
    split: Annotated[Split, Field(description="a file or a table")]
    """Its test cases on real data."""
    phantom_split: Annotated[Split | None, Field(description="a file or a table")] = None
    """Its test cases on the embedded phantom; None: as many as the profile asks for."""

    def __post_init__(self) -> None:
        """Check that nothing is to be learned from it."""
        for split in (self.split, self.phantom_split):
            if split is not None:
                self.need_no_training(split)
        if self.phantom_split is not None:
            _need_list(self.phantom_split, f"external source {self.source!r}, phantom_split")

    def need_no_training(self, split: Split) -> None:
        """Refuse a split that would open an external source in teaching.

        Raises:
            SpecError: training or validation cases.
        """
        if split.teaches:
            raise SpecError(
                "an external source has cases to learn from",
                where=f"external source {self.source!r}, split {split.name!r}",
                expected="test cases alone: `test`, or `draw` with `test` and without `train` and "
                "`validation`",
                got=f"{len(split.train)} train, {len(split.validation)} validation"
                if split.draw is None
                else f"draw: {split.draw.train} train, {split.draw.validation} validation",
                next_step="take them out; to learn from the source, write a [[step]] in place of "
                "[[external]]",
            )

    @property
    def name(self) -> str:
        """As messages call it, beside the names of steps."""
        return f"external test on {self.source}"

    @property
    def learns(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def again(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def given(self) -> None:
        """No model comes with it."""
        return None


def _tables(table: str, field_name: str) -> Any:
    """A field that a course file writes as tables of another name: `[[source]]`."""
    return Field(validation_alias=AliasChoices(table, field_name))


@checked(SpecError)
class Benchmark:
    """A course: sources, steps and how to read the result."""

    name: str
    """Name for `--bench`."""
    version: int
    """Raised by any change that moves a number; results of two versions never share a table."""
    title: str
    """One line for `clbench list`."""
    sources: Annotated[tuple[Source, ...], _tables("source", "sources")]
    """The data sets."""
    steps: Annotated[tuple[Step, ...], _tables("step", "steps")]
    """The lessons, in order."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """Common to all steps."""
    groups: Annotated[
        Mapping[str, Names], Field(description="a table, printed name = a list of names, each once")
    ] = field(default_factory=dict)
    """Table groups: printed name → structures whose plain mean it is."""
    citation: str = ""
    """What to cite."""
    declares: Annotated[tuple[Structure, ...], _tables("structure", "declares")] = ()
    """Structures this course adds to the taxonomy."""
    external_tests: Annotated[tuple[ExternalTest, ...], _tables("external", "external_tests")] = ()
    """Sources that are only tested on, after every step."""
    order: tuple[int, ...] = ()
    """1-based places of `steps` in the course file, where they are taught in another order; empty:
    as listed."""

    def __post_init__(self) -> None:
        """Check that steps, sources and groups fit together."""
        where = f"benchmark {self.name!r}"
        need_name(self.name, where)
        if split_order(self.name)[1] and not self.order:
            raise SpecError(
                "a course has the name of another one in an order of its steps",
                where=where,
                expected="a name that does not end like .order2-1",
                got=self.name,
                next_step="change `name` in the file; an order is asked for with --order",
            )
        if not self.steps:
            raise SpecError("a benchmark needs at least one step", where=where)
        for what, given in (
            ("source", [s.name for s in self.sources]),
            ("step", [s.name for s in self.steps]),
        ):
            if twice := [n for n, times in Counter(given).items() if times > 1]:
                raise SpecError(f"two {what}s have one name", where=where, got=", ".join(twice))
        known = {s.name: s for s in self.sources}
        learned: dict[str, str] = {}
        for step in self.steps:
            here = f"{where}, step {step.name!r}"
            wrong = partial(SpecError, where=here)
            if step.source not in known:
                raise wrong(
                    f"the step's source {step.source!r} is not defined",
                    expected=f"one of {', '.join(known)}",
                    next_step=did_you_mean(step.source, known),
                )
            if not step.learns and not step.again:
                raise wrong("a step must learn at least one structure")
            self._check_again(step, known[step.source], learned, wrong)
            for name in step.learns:
                structure(name, here)
                if name in learned:
                    raise wrong(
                        f"{name!r} is learned twice",
                        expected="each structure learned in one step",
                        got=f"steps {learned[name]!r} and {step.name!r}",
                        next_step="remove it from one of the two `learns` lists",
                    )
                if name not in known[step.source].structures:
                    raise wrong(
                        f"the step learns {name!r}, which its source does not annotate",
                        expected=f"one of {', '.join(known[step.source].structures)}",
                        got=name,
                        next_step=f"take it from `learns`, or give source {step.source!r} its "
                        "label value or mask",
                    )
                learned[name] = step.name
            if step.shows is not None:
                have = known[step.source].structures
                strange = [n for n in step.shows if n not in have]
                taught = (*step.learns, *step.again)
                if strange or not set(taught) <= set(step.shows):
                    raise wrong(
                        "`shows` must hold what the step learns and nothing its source lacks",
                        expected=f"{', '.join(taught)}, and any of {', '.join(have)}",
                        got=", ".join(step.shows),
                    )
        for group, names in self.groups.items():
            for name in names:
                if name not in learned:
                    raise SpecError(
                        f"group {group!r} names {name!r}, which no step learns", where=where
                    )
        self._check_step_names(where)
        self._check_external(where, known, learned)

    def _check_step_names(self, where: str) -> None:
        """Check that a name given with `--split` means one step, or all steps of one source.

        A step whose model is given takes no split, whatever it is called.

        Args:
            where: the benchmark, for the message.
        """
        names = {source.name for source in self.sources}
        for step in self.steps:
            readers = [other.name for other in self.steps if other.source == step.name]
            if step.given is None and step.name in names and readers != [step.name]:
                raise SpecError(
                    "a step is named like a source that it does not have for itself",
                    where=f"{where}, step {step.name!r}",
                    expected="a name of its own: --split takes names of steps and of sources",
                    got=f"steps of source {step.name!r}: {', '.join(readers) or 'none'}",
                    next_step="rename the step, or the source",
                )

    def _check_again(
        self,
        step: Step,
        source: Source,
        learned: Mapping[str, str],
        wrong: Callable[..., SpecError],
    ) -> None:
        """Check that what a step teaches again was learned before, and from another source.

        Args:
            step: the step.
            source: its source.
            learned: structure → name of the earlier step that learned it.
            wrong: makes the error.
        """
        sources = {other.name: other.source for other in self.steps}
        for name in step.again:
            if name not in learned or name in step.learns:
                raise wrong(
                    f"{name!r} is taught again, but no earlier step learns it",
                    expected=f"one of {', '.join(learned) or 'the structures of earlier steps'}",
                    got="nothing" if not learned else f"{name}, of none of them",
                    next_step="name it in `learns` of the first step that teaches it"
                    if split_order(self.name)[1] == ()
                    else "take an order in which the step that learns it comes before this one",
                )
            if name not in source.structures:
                raise wrong(
                    f"{name!r} is taught again, which the step's source does not annotate",
                    expected=f"one of {', '.join(source.structures)}",
                )
            if sources[learned[name]] == step.source:
                raise wrong(
                    f"{name!r} is taught again from the source it was learned from",
                    expected=f"another source than {step.source!r}",
                    got=f"step {learned[name]!r} learns it from there",
                    next_step="take it out of `again`; a domain is a source of its own",
                )

    def _check_external(
        self, where: str, known: Mapping[str, Source], learned: Mapping[str, str]
    ) -> None:
        """Check that external sources are there, apart from the steps, and annotate what is taught.

        Args:
            where: the benchmark, for the message.
            known: source by name.
            learned: structure → name of the step that teaches it.
        """
        taught_from = {step.source: step.name for step in self.steps}
        seen: set[str] = set()
        for external in self.external_tests:
            name = external.source
            wrong = partial(SpecError, where=f"{where}, external source {name!r}")
            if name not in known:
                raise wrong(
                    "the external source is not defined",
                    expected=f"one of {', '.join(known)}",
                    next_step=did_you_mean(name, known),
                )
            if name in taught_from:
                raise wrong(
                    "an external source has training cases",
                    expected="a source that no step learns from",
                    got=f"step {taught_from[name]!r} learns from it",
                    next_step="for other cases of the same folder, write a second [[source]] of "
                    "another name, and give --data the folder under both names",
                )
            if name in seen:
                raise wrong("an external source is named twice", next_step="remove one of the two")
            seen.add(name)
            if not set(known[name].structures) & set(learned):
                raise wrong(
                    "the external source annotates nothing that the course teaches",
                    expected=f"one of {', '.join(learned)}",
                    got=", ".join(known[name].structures),
                )

    @property
    def with_cases(self) -> tuple[Step | ExternalTest, ...]:
        """All that has a split: the steps in order, then the external test sets."""
        return (*self.steps, *self.external_tests)

    @property
    def listed(self) -> tuple[int, ...]:
        """The place of each step in the course file, and of the external test sets after them.

        What is drawn for a step (subjects of the phantom, blocks of a split) goes by this place, so
        that it is the same in every order.
        """
        steps = self.order or tuple(range(1, len(self.steps) + 1))
        return (*steps, *range(len(self.steps) + 1, len(self.with_cases) + 1))

    def in_order(self, order: Sequence[int]) -> Benchmark:
        """The same course with its listed steps taught in another order, under a name of its own.

        Args:
            order: 1-based numbers of the steps, as the course lists them.

        Raises:
            SpecError: no permutation of the steps.
        """
        count = len(self.steps)
        if sorted(order) != list(range(1, count + 1)):
            raise SpecError(
                "the order is no permutation of the course's steps",
                where=f"benchmark {self.name!r}",
                expected=f"each of {', '.join(map(str, range(1, count + 1)))} once; the steps are "
                + "; ".join(f"{i} {step.name}" for i, step in enumerate(self.steps, 1)),
                got=",".join(map(str, order)),
                next_step="name every step once: "
                + ",".join(map(str, range(count, 0, -1)))
                + ", for example",
            )
        name = ordered_name(self.name, order)
        if name == self.name:
            return self
        return replace(
            self,
            name=name,
            title=f"{self.title}; steps in the order {', '.join(map(str, order))}",
            steps=tuple(self.steps[i - 1] for i in order),
            order=tuple(order),
        )

    def source(self, name: str) -> Source:
        """The source called `name`."""
        return next(s for s in self.sources if s.name == name)

    def structures(self, step: int) -> tuple[str, ...]:
        """Every structure learned in steps 1 to `step` (1-based), in channel order."""
        return tuple(name for s in self.steps[:step] for name in s.learns)

    def learned_at(self, name: str) -> int:
        """The 1-based step that first teaches `name`."""
        return next(i for i, s in enumerate(self.steps, 1) if name in s.learns)

    def shown(self, step: int) -> frozenset[str]:
        """The structures whose annotation the cases of a 1-based step show while teaching."""
        this = self.steps[step - 1]
        if this.shows is not None:
            return frozenset(this.shows)
        elsewhere = {
            name
            for other in self.steps
            if other is not this and other.source == this.source
            for name in other.learns
        }
        return frozenset(self.source(this.source).structures) - elsewhere | set(this.again)

    def reads(self, name: str) -> Source:
        """The source `name` as this course reads it.

        A value for both sides of a pair that no step learns is background, not split: a body with
        one adrenal gland does not stop a course that teaches none.
        """
        source = self.source(name)
        taught = set(self.structures(len(self.steps)))
        idle = {value: pair for value, pair in source.sides.items() if not taught & set(pair)}
        if not idle:
            return source
        lost = {n for pair in idle.values() for n in pair} - set(source.labels.values())
        return replace(
            source,
            sides={v: pair for v, pair in source.sides.items() if v not in idle},
            ignored=(*source.ignored, *idle),
            partial=tuple(
                replace(p, annotates=tuple(n for n in p.annotates if n not in lost))
                for p in source.partial
            ),
        )

    def digest(self) -> str:
        """A hash over everything that moves a number, for courses without a guarded version."""
        left_out = ("title", "licence", "url", "citation", "why", "origin", "groups")

        def bare(value: object) -> object:
            if isinstance(value, Mapping):  # a field added later leaves courses without it alone
                return [
                    [str(k), bare(v)]
                    for k, v in value.items()
                    if k not in left_out
                    and not (k in ("rescale", "given") and v is None)
                    and not (k in ADDED and v == ())
                ]
            return [bare(v) for v in value] if isinstance(value, tuple | list) else value

        text = json.dumps(bare(asdict(self)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
