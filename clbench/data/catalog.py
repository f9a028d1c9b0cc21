"""The cases of one course: found on disk or made as the phantom, opened one by one, and booked.

Every volume a run opens passes through `Catalog.open`, which writes the ledger and holds the two
rules of the game: no test case in training (validation is part of training), and nothing of earlier
steps beyond what the strategy declares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clbench import signals
from clbench.data.cache import Looks, VolumeCache
from clbench.data.checks.case_notes import NOT_HU, CaseNote, odd_cases, source_problems
from clbench.data.checks.course_splits import (
    Course,
    Files,
    asked_first,
    cases_of,
    chosen,
    content_problems,
    course_problems,
    drawn_from,
    phantom_split,
    settle,
    unmatched,
)
from clbench.data.checks.rounding import rounding_problems
from clbench.data.external_masks import same_meaning
from clbench.data.layouts import CaseFiles, find_cases, find_layout, passed_over_lines, resolve_data
from clbench.data.phantom.generate import fingerprint, make_phantom
from clbench.data.volume import Volume
from clbench.errors import ClbenchError, DataError, SettingError, TrainingError
from clbench.spec.benchmark import Benchmark, ExternalTest, Preprocessing, Source, Step
from clbench.spec.settings import PhantomSettings
from clbench.spec.splits import Split

SIDES_RULE = "each piece on its side of the midline"
"""How a pair under one label value is read; part of the fingerprint of data that hold one."""
Look = Callable[[VolumeCache, Sequence[tuple[int, Source, CaseFiles]], Looks], None]
"""Looks at cases, each with a step that names its source, see `VolumeCache.look`."""
Purpose = Literal["train", "pseudo", "validation", "trace", "diagnosis", "tuning", "test"]

_case_being_read: ContextVar[tuple[int, str] | None] = ContextVar("case_being_read", default=None)


@contextmanager
def reading(step: int, case: str) -> Iterator[None]:
    """Say that files opened inside are read for the benchmark itself, and of which case.

    Entered by `Catalog.open` and by the examination; file access control
    (`clbench.training.past_data`) asks `case_being_read` and reports every other reader. The mark
    belongs to the context it is set in: a thread started meanwhile does not have it.

    Args:
        step: 1-based step whose source holds the case.
        case: its id.
    """
    token = _case_being_read.set((step, case))
    try:
        yield
    finally:
        _case_being_read.reset(token)


def case_being_read() -> tuple[int, str] | None:
    """(step, case) that the benchmark itself is reading here, or None."""
    return _case_being_read.get()


@dataclass(kw_only=True)
class Catalog:
    """All data of a course."""

    benchmark: Benchmark
    preprocessing: Preprocessing
    splits: tuple[Split, ...]
    """One per step."""
    external_splits: tuple[Split, ...] = ()
    """One per external test set, test cases alone."""
    files: Files
    """Where every case lies."""
    patients: bool
    """False for the phantom."""
    fingerprint: str
    """Changes when any file's content, or the phantom's version or settings, changes."""
    cache: VolumeCache
    notes: tuple[CaseNote, ...] = ()
    """What is odd about cases of the splits."""
    passed_over: tuple[str, ...] = ()
    """What lies in the folders and is no part of a case, counted by kind; ids that name no case."""
    drawn: tuple[str, ...] = ()
    """Of each split that a rule drew from the cases at hand, what it was drawn from."""
    content: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(source, case) → checksum of its files when the run began; empty for the phantom."""
    past: str = "nothing"
    """What the strategy declares to need of earlier steps."""
    step: int = 1
    """The step being taught."""
    tuning_steps: int = 0
    """While settings are tuned: the steps, from the first, whose cases the rule may see. No test
    case is opened then, for whatever purpose. 0: nothing is tuned."""
    ledger: dict[int, dict[str, set[str]]] = field(default_factory=dict)
    """Step → purpose → "source/case" opened."""
    _open: dict[tuple[int, str, str], Volume] = field(default_factory=dict)
    """(step, source, case) → volume; step 0 = with everything its files annotate."""

    def warnings(self) -> list[dict[str, object]]:
        """What is odd about folders and cases, as items of the warnings of `run.json`.

        Step 0 comes before all teaching.
        """
        return [
            *({"step": 0, "kind": "passed over", "message": said} for said in self.passed_over),
            *({"step": 0, "kind": "drawn split", "message": said} for said in self.drawn),
            *({"step": 0, "kind": note.kind, "message": note.message} for note in self.notes),
        ]

    def source(self, place: int) -> Source:
        """The source of a 1-based step, as the course reads it.

        Numbers after that of the last step stand for the external test sets, in order.
        """
        return self.benchmark.reads(self.benchmark.with_cases[place - 1].source)

    @property
    def test_cases(self) -> set[tuple[str, str]]:
        """(source, case) of every test case of the course, external ones included."""
        return {(source, case) for _, source, case in exam_cases(self)}

    def enter(self, step: int, case: str, purpose: Purpose) -> None:
        """Note in the ledger that a case was opened, by this process or by one that works with it.

        Args:
            step: 1-based step whose source holds the case.
            case: case id within that source.
            purpose: what it was opened for.
        """
        opened = self.ledger.setdefault(self.step, {}).setdefault(purpose, set())
        opened.add(f"{self.source(step).name}/{case}")

    def open(self, step: int, case: str, purpose: Purpose) -> Volume:
        """A case of the source of `step`, entered in the ledger.

        While teaching it shows the annotation that `step` shows; to be measured on (`test`;
        `trace`: validation cases looked at during a step; `tuning`: validation cases that settings
        are chosen by), all it has.

        Args:
            step: 1-based step whose source holds the case; for test cases also the number of an
                external test set, see `source`.
            case: case id within that source.
            purpose: what it is opened for; decides whether it may be, and what is annotated.
                `diagnosis`: a training case of `step` looked at after the run, for no training.

        Raises:
            TrainingError: a test case for training or tuning, a case that the tuning rule may not
                see, or an image of an earlier step that the strategy did not declare.
        """
        name = self.source(step).name
        if purpose != "test" or self.tuning_steps:
            self._guard(step, name, case, purpose)
        self._refuse_changed(name, case)
        self.enter(step, case, purpose)
        whole, view = (0, name, case), (step, name, case)
        if whole not in self._open:
            with reading(step, case):
                self._open[whole] = self.cache.get(
                    self.files[name][case], self.source(step), self.preprocessing
                )
        if purpose in ("test", "trace", "tuning"):
            return self._open[whole]
        if view not in self._open:
            self._open[view] = self._open[whole].showing(self.benchmark.shown(step))
        return self._open[view]

    def _refuse_changed(self, name: str, case: str) -> None:
        """Refuse a case whose files are others than when the run began: its scores would be mixed.

        Raises:
            DataError: they are.
        """
        then, files = self.content.get((name, case)), self.files[name].get(case)
        if then is None or files is None or then == (now := self.cache.content_hash(files)):
            return
        raise DataError(
            "a file of the data was changed since the run began",
            where=f"{name} case {case}: " + ", ".join(map(str, files.files)),
            expected=f"content {then[:16]}",
            got=now[:16],
            next_step="put it back as it was and repeat the command, which goes on; with the new "
            "file it is another run",
        )

    def volume_digest(self, step: int, case: str) -> str:
        """Names the preprocessed voxels of a case, see `VolumeCache.volume_digest`.

        Args:
            step: 1-based step whose source holds the case.
            case: case id within that source.
        """
        source = self.source(step)
        files = self.files[source.name][case]
        return self.cache.volume_digest(files, source, self.preprocessing)

    def voxels(self, step: int) -> int:
        """Voxels of the training cases of a step together, model grid; they are opened."""
        total = 0
        for case in self.splits[step - 1].train:
            total += self.open(step, case, "train").image.size  # preprocessed where it is not yet
            signals.check(f"preprocessing for step {step}, case {case}")
        return total

    def _guard(self, step: int, name: str, case: str, purpose: Purpose) -> None:
        if (name, case) in self.test_cases:
            raise TrainingError(
                f"a test case was asked for in {'tuning' if self.tuning_steps else 'training'}",
                where=f"step {self.step}, {name} case {case}",
                next_step="report this to the author of the strategy; the run was stopped",
            )
        if purpose == "tuning" or step > self.tuning_steps > 0:
            self._guard_tuning(step, name, case)
            return
        if purpose == "trace":
            if step > self.step or case not in self.splits[step - 1].validation:
                raise TrainingError(
                    "a case was to be traced that is no validation case of this or an earlier step",
                    where=f"step {self.step}, {name} case {case} of step {step}",
                )
            return
        split = self.splits[self.step - 1]
        allowed = split.validation if purpose == "validation" else split.train
        own = (name, case) in {(self.source(self.step).name, c) for c in allowed}
        if not own and self.past not in ("images", "cases"):
            raise TrainingError(
                "a strategy opened an image of an earlier step without declaring it",
                where=f"step {self.step}, {name} case {case} of step {step}, for {purpose}",
                expected=f"past = 'images' or 'cases', declared: {self.past!r}",
                next_step="declare it in the strategy, or do not open it",
            )

    def _guard_tuning(self, step: int, name: str, case: str) -> None:
        """Settings are chosen by validation cases of the steps that the rule may see, once taught.

        Raises:
            TrainingError: another case.
        """
        seen = min(self.step, self.tuning_steps)
        if step > seen or case not in self.splits[step - 1].validation:
            raise TrainingError(
                "a case was asked for that the tuning rule may not see",
                where=f"step {self.step}, {name} case {case} of step {step}",
                expected=f"a validation case of steps 1 to {seen}"
                if seen
                else "none: no rule tunes settings here",
            )

    def opened(self) -> dict[str, dict[str, list[str]]]:
        """The ledger as JSON-ready lists."""
        return {
            str(step): {purpose: sorted(cases) for purpose, cases in by_purpose.items()}
            for step, by_purpose in self.ledger.items()
        }


def build_catalog(
    benchmark: Benchmark,
    preprocessing: Preprocessing,
    *,
    data: str | None,
    cache_root: Path,
    phantom: PhantomSettings,
    splits: Mapping[str, Split] | None = None,
    expect_hu: bool | None = True,
    look: Look | None = None,
) -> Catalog:
    """Find real data, or make the phantom when `data` is None, and check it against the splits.

    Args:
        benchmark: the course.
        preprocessing: how volumes are prepared.
        data: `name=PATH,…` or one folder; None for the phantom, which is read in HU whatever
            `rescale` a source has.
        cache_root: where preprocessed volumes and the phantom are kept.
        phantom: size of the phantom.
        splits: source or step → split that replaces the benchmark's.
        expect_hu: whether to refuse a source whose images are no CTs in HU; None: look at no case,
            as for data that a run was made on.
        look: looks at cases before they are asked about, and keeps what it sees in the cache; None:
            each is looked at when it is asked about.

    Raises:
        UnknownName: a source of an unknown layout.
        DataError: missing folders or cases, or a case or patient in train and test.
    """
    for source in benchmark.sources:
        find_layout(source.layout, f"source {source.name!r}")
    cache, look = VolumeCache(cache_root / "volumes"), look or _look_at_none
    named = chosen(benchmark, splits or {})
    if data is None:
        benchmark, expect_hu = _in_hu(benchmark), None
        asked, folders, mark = _phantom(benchmark, named, phantom, cache_root)
    else:
        steps = benchmark.with_cases
        asked = [(step, split or step.split) for step, split in zip(steps, named, strict=True)]
        used = {step.source for step in steps if step.given is None or step.split.cases}
        folders = resolve_data(data, [s for s in benchmark.sources if s.name in used])
    files = {name: find_cases(folder, benchmark.reads(name)) for name, folder in folders.items()}
    for name, folder in folders.items():
        same_meaning(folder, benchmark.reads(name))

    def looked_at(keys: Iterable[tuple[str, str]]) -> list[tuple[int, Source, CaseFiles]]:
        return [(1, benchmark.reads(name), files[name][case]) for name, case in keys]

    if data is not None:
        look(cache, looked_at(asked_first(asked, benchmark, files)), "values")
    course, problems = settle(
        asked,
        benchmark,
        files,
        folders,
        holds=lambda name, case: cache.holds(files[name][case], benchmark.reads(name)),
    )
    _raise_first(problems)
    _raise_first(course_problems(course, benchmark, files, patients=data is not None))
    passed_over: list[str] = []
    hashes: dict[tuple[str, str], str] = {}
    if data is not None:
        keys = [(name, case) for name, of_source in cases_of(course).items() for case in of_source]
        look(cache, looked_at(keys), "images" if expect_hu is None else "notes")
        hashes = {(name, case): cache.content_hash(files[name][case]) for name, case in keys}
        mark = _data_fingerprint(course, benchmark, files, cache, hashes)
        passed_over += unmatched(course, files, [split for _, split in asked])
        for name, folder in folders.items():
            passed_over += passed_over_lines(folder, benchmark.reads(name), files[name])
    notes = []
    if expect_hu is not None:
        notes = _notes(
            course, benchmark, files, cache, preprocessing.window_hu, expect_hu=expect_hu
        )
    return Catalog(
        benchmark=benchmark,
        preprocessing=preprocessing,
        splits=tuple(split for _, split in course[: len(benchmark.steps)]),
        external_splits=tuple(split for _, split in course[len(benchmark.steps) :]),
        files=files,
        patients=data is not None,
        fingerprint=mark,
        cache=cache,
        notes=tuple(notes),
        passed_over=tuple(passed_over),
        drawn=tuple(drawn_from(asked, benchmark, files)) if data is not None else (),
        content=hashes,
    )


def _look_at_none(cache: VolumeCache, cases: Sequence[object], what: Looks) -> None:
    """Look at nothing ahead of the questions."""


def _phantom(
    benchmark: Benchmark,
    named: Sequence[Split | None],
    phantom: PhantomSettings,
    cache_root: Path,
) -> tuple[list[tuple[Step | ExternalTest, Split]], dict[str, Path], str]:
    """Make the phantom of a course.

    Args:
        benchmark: as it reads the phantom.
        named: split per step and external test set that replaces the benchmark's, or None.
        phantom: its size.
        cache_root: where it is kept.

    Returns:
        Steps with their splits, source → folder, and what the phantom depends on.
    """
    _refuse_drawn(named)
    asked = [
        (step, split or phantom_split(step, number, phantom))
        for number, step, split in zip(benchmark.listed, benchmark.with_cases, named, strict=True)
    ]
    by_place = sorted(zip(benchmark.listed, asked, strict=True), key=lambda x: x[0])
    cases = cases_of([one for _, one in by_place])  # one phantom for all orders
    needed = benchmark.structures(len(benchmark.steps))
    folders = make_phantom(cache_root / "phantom", benchmark.sources, cases, phantom, needed=needed)
    return asked, folders, fingerprint(benchmark.sources, cases, phantom)


def _in_hu(benchmark: Benchmark) -> Benchmark:
    """The course as it reads the phantom, which is written in HU whatever its sources hold."""
    if all(source.rescale is None for source in benchmark.sources):
        return benchmark
    return replace(benchmark, sources=tuple(replace(s, rescale=None) for s in benchmark.sources))


def _refuse_drawn(splits: Sequence[Split | None]) -> None:
    if drawn := [s.name for s in splits if s is not None and s.draw is not None]:
        raise SettingError(
            "a split drawn by rule needs data to draw from",
            where="--split",
            got=", ".join(drawn),
            next_step="name the data with --data, or list the phantom's cases in the split",
        )


def _data_fingerprint(
    course: Course,
    benchmark: Benchmark,
    files: Files,
    cache: VolumeCache,
    hashes: Mapping[tuple[str, str], str],
) -> str:
    """A mark of the content of every file of the splits.

    Args:
        course: the steps with their splits.
        benchmark: the course they belong to.
        files: source → case → files.
        cache: knows images it has seen.
        hashes: (source, case) → content of its files.

    Raises:
        DataError: one image under two names.
    """

    def image_hash(name: str, case: str) -> str:
        return cache.image_hash(files[name][case], benchmark.reads(name))

    _raise_first(content_problems(course, image_hash))
    listing = json.dumps(sorted([*key, value] for key, value in hashes.items()))
    if any(benchmark.reads(step.source).sides for step in benchmark.with_cases):
        listing += SIDES_RULE
    return "data-" + hashlib.sha256(listing.encode()).hexdigest()[:16]


def _notes(
    course: Course,
    benchmark: Benchmark,
    files: Files,
    cache: VolumeCache,
    window_hu: tuple[float, float],
    *,
    expect_hu: bool,
) -> list[CaseNote]:
    """What is odd about the cases of the splits, each looked at once.

    Args:
        course: the steps with their splits.
        benchmark: the course they belong to.
        files: source → case → files.
        cache: remembers what it saw.
        window_hu: what the network sees of the values.
        expect_hu: whether images are to be CTs in HU; else nothing is said where they are none.

    Raises:
        DataError: a source without CTs, or images that rounding would ruin.
    """
    cases = cases_of(course)
    notes: list[CaseNote] = []
    for name, of_source in cases.items():
        for case in of_source:
            notes += cache.notes(files[name][case], benchmark.reads(name))
            signals.check(f"looking at the images, {name} case {case}")
    if expect_hu:
        _raise_first(source_problems(notes, cases))
    _raise_first(
        rounding_problems(
            cases,
            benchmark.reads,
            lambda name, case: cache.range_of_fractions(files[name][case], benchmark.reads(name)),
            window_hu,
            set() if expect_hu else odd_cases(notes),
        )
    )
    return notes if expect_hu else [note for note in notes if note.kind != NOT_HU]


def _raise_first(problems: Iterable[ClbenchError]) -> None:
    for problem in problems:
        raise problem


def exam_cases(catalog: Catalog) -> Iterator[tuple[int, str, str]]:
    """(step whose split names it, source, case) of every test case, each once.

    External test sets come last, numbered after the steps (`Catalog.source`).
    """
    seen = set()
    for number, split in enumerate((*catalog.splits, *catalog.external_splits), 1):
        source = catalog.source(number).name
        for case in split.test:
            if (source, case) not in seen:
                seen.add((source, case))
                yield number, source, case
