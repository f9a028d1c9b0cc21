"""The cases of one course: found on disk or made as the phantom, opened one by one, and booked.

Every volume a run opens passes through `Catalog.open`, which writes the ledger and holds the two
rules of the game: no test case in training (validation is part of training), and nothing of earlier
steps beyond what the strategy declares.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clbench import signals
from clbench.data.cache import VolumeCache
from clbench.data.layouts import CaseFiles, find_cases, find_layout, resolve_data
from clbench.data.phantom.generate import fingerprint, make_phantom
from clbench.data.volume import Volume
from clbench.errors import DataError, SettingError, TrainingError
from clbench.spec.benchmark import Benchmark, Preprocessing, Source, Step
from clbench.spec.settings import PhantomSettings
from clbench.spec.splits import PARTS, Split

SIDES_RULE = "each piece on its side of the midline"
"""How a pair under one label value is read; part of the fingerprint of data that hold one."""
Purpose = Literal["train", "pseudo", "validation", "trace", "test"]

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
    files: Files
    """Where every case lies."""
    patients: bool
    """False for the phantom."""
    fingerprint: str
    """Changes when any file's content, or the phantom's version or settings, changes."""
    cache: VolumeCache
    past: str = "nothing"
    """What the strategy declares to need of earlier steps."""
    step: int = 1
    """The step being taught."""
    ledger: dict[int, dict[str, set[str]]] = field(default_factory=dict)
    """Step → purpose → "source/case" opened."""
    _open: dict[tuple[int, str, str], Volume] = field(default_factory=dict)
    """(step, source, case) → volume; step 0 = with everything its files annotate."""

    def source(self, step: int) -> Source:
        """The source of a 1-based step, as the course reads it."""
        return self.benchmark.reads(self.benchmark.steps[step - 1].source)

    def open(self, step: int, case: str, purpose: Purpose) -> Volume:
        """A case of the source of `step`, entered in the ledger.

        While teaching it shows the annotation that `step` shows; to be measured on (`test`, and
        `trace`: validation cases looked at during a step), all it has.

        Args:
            step: 1-based step whose source holds the case.
            case: case id within that source.
            purpose: what it is opened for; decides whether it may be, and what is annotated.

        Raises:
            TrainingError: a test case for training, or an image of an earlier step that the
                strategy did not declare.
        """
        name = self.source(step).name
        if purpose != "test":
            self._guard(step, name, case, purpose)
        self.ledger.setdefault(self.step, {}).setdefault(purpose, set()).add(f"{name}/{case}")
        whole, view = (0, name, case), (step, name, case)
        if whole not in self._open:
            with reading(step, case):
                self._open[whole] = self.cache.get(
                    self.files[name][case], self.source(step), self.preprocessing
                )
        if purpose in ("test", "trace"):
            return self._open[whole]
        if view not in self._open:
            self._open[view] = self._open[whole].showing(self.benchmark.shown(step))
        return self._open[view]

    def voxels(self, step: int) -> int:
        """Voxels of the training cases of a step together, model grid; they are opened."""
        total = 0
        for case in self.splits[step - 1].train:
            total += self.open(step, case, "train").image.size  # preprocessed where it is not yet
            signals.check(f"preprocessing for step {step}, case {case}")
        return total

    def _guard(self, step: int, name: str, case: str, purpose: Purpose) -> None:
        tests = {(self.source(i).name, c) for i, s in enumerate(self.splits, 1) for c in s.test}
        if (name, case) in tests:
            raise TrainingError(
                "a test case was asked for in training",
                where=f"step {self.step}, {name} case {case}",
                next_step="report this to the author of the strategy; the run was stopped",
            )
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

    def opened(self) -> dict[str, dict[str, list[str]]]:
        """The ledger as JSON-ready lists."""
        return {
            str(step): {purpose: sorted(cases) for purpose, cases in by_purpose.items()}
            for step, by_purpose in self.ledger.items()
        }


def _folders(data: str, benchmark: Benchmark) -> dict[str, Path]:
    used = [s for s in benchmark.sources if any(step.source == s.name for step in benchmark.steps)]
    return resolve_data(data, used)


def build_catalog(
    benchmark: Benchmark,
    preprocessing: Preprocessing,
    *,
    data: str | None,
    cache_root: Path,
    phantom: PhantomSettings,
    splits: Mapping[str, Split] | None = None,
) -> Catalog:
    """Find real data, or make the phantom when `data` is None, and check it against the splits.

    Args:
        benchmark: the course.
        preprocessing: how volumes are prepared.
        data: `name=PATH,…` or one folder; None for the phantom.
        cache_root: where preprocessed volumes and the phantom are kept.
        phantom: size of the phantom.
        splits: source or step → split that replaces the benchmark's.

    Raises:
        UnknownName: a source of an unknown layout.
        DataError: missing folders or cases, or a case or patient in train and test.
    """
    for source in benchmark.sources:
        find_layout(source.layout, f"source {source.name!r}")
    cache = VolumeCache(cache_root / "volumes")
    named = chosen(benchmark, splits or {})
    if data is None:
        if drawn := [s.name for s in named if s is not None and s.draw is not None]:
            raise SettingError(
                "a split drawn by rule needs data to draw from",
                where="--split",
                got=", ".join(drawn),
                next_step="name the data with --data, or list the phantom's cases in the split",
            )
        used = [
            split or phantom_split(step, number, phantom)
            for number, (step, split) in enumerate(zip(benchmark.steps, named, strict=True), 1)
        ]
        cases = {
            s.name: tuple(
                dict.fromkeys(
                    c
                    for step, split in zip(benchmark.steps, used, strict=True)
                    if step.source == s.name
                    for c in split.cases
                )
            )
            for s in benchmark.sources
        }
        folders = make_phantom(
            cache_root / "phantom",
            benchmark.sources,
            cases,
            phantom,
            needed=benchmark.structures(len(benchmark.steps)),
        )
        mark = fingerprint(benchmark.sources, cases, phantom)
    else:
        folders = _folders(data, benchmark)
        used = [split or step.split for step, split in zip(benchmark.steps, named, strict=True)]
        mark = ""
    files = {name: find_cases(folder, benchmark.reads(name)) for name, folder in folders.items()}
    used = [
        resolve(split, benchmark.reads(step.source), files[step.source], cache)
        for step, split in zip(benchmark.steps, used, strict=True)
    ]
    for step, split in zip(benchmark.steps, used, strict=True):
        missing(split, benchmark.source(step.source), files[step.source], folders[step.source])
    taught(benchmark, used, files)
    same_patient(benchmark, used, patients=data is not None)
    if data is not None:
        hashes = {
            (step.source, case): cache.content_hash(files[step.source][case])
            for step, split in zip(benchmark.steps, used, strict=True)
            for case in split.cases
        }
        images = {
            (step.source, case): cache.image_hash(files[step.source][case])
            for step, split in zip(benchmark.steps, used, strict=True)
            for case in split.cases
        }
        same_content(benchmark, used, images)
        listing = json.dumps(sorted([*key, value] for key, value in hashes.items()))
        if any(benchmark.reads(step.source).sides for step in benchmark.steps):
            listing += SIDES_RULE
        mark = "data-" + hashlib.sha256(listing.encode()).hexdigest()[:16]
    return Catalog(
        benchmark=benchmark,
        preprocessing=preprocessing,
        splits=tuple(used),
        files=files,
        patients=data is not None,
        fingerprint=mark,
        cache=cache,
    )


# --------------------------------------------------------------------------------------------------
# Which cases a course uses: its splits chosen, drawn, and checked against what is there.
# Every refusal here comes before anything is trained.


Files = Mapping[str, Mapping[str, CaseFiles]]
"""Source → case → files."""


def phantom_split(step: Step, number: int, settings: PhantomSettings) -> Split:
    """The cases of a step on the phantom: its own list, or new subjects for every step.

    Args:
        step: the step.
        number: its 1-based place in the course; keeps the subjects of two steps apart.
        settings: numbers of training, validation and test subjects.
    """
    if step.phantom_split is not None:
        return _shorten(step.phantom_split, settings)
    sizes = (settings.train, settings.validation, settings.test)
    ids = iter(range(1000 * number, 1000 * number + sum(sizes)))
    train, validation, test = (tuple(str(next(ids)) for _ in range(n)) for n in sizes)
    return Split(
        name=f"phantom, step {number}",
        train=train,
        validation=validation,
        test=test,
        origin="clbench phantom",
    )


def chosen(benchmark: Benchmark, replaced: Mapping[str, Split]) -> list[Split | None]:
    """Per step the split the user named, by step or by source.

    A drawn split of a source that several steps use deals each of them its own block.
    """
    known = {*(s.name for s in benchmark.sources), *(s.name for s in benchmark.steps)}
    for name in replaced:
        if name not in known:
            raise SettingError(
                f"--split names neither a source nor a step of the benchmark: {name!r}",
                expected=", ".join(sorted(known)),
            )
    found: list[Split | None] = []
    for i, step in enumerate(benchmark.steps):
        split = replaced.get(step.name) or replaced.get(step.source)
        if split is not None and split.draw is not None and step.name not in replaced:
            block = 1 + sum(s.source == step.source for s in benchmark.steps[:i])
            split = replace(split, draw=replace(split.draw, part=block))
        found.append(split)
    return found


def _shorten(split: Split, settings: PhantomSettings) -> Split:
    """The first cases of each part, as many as the settings ask for."""
    parts = {}
    for part in ("train", "validation", "test"):
        have, want = getattr(split, part), getattr(settings, part)
        if not (0 if part == "validation" else 1) <= want <= len(have):
            raise SettingError(
                f"the phantom split cannot give {want} {part} cases",
                where=f"phantom.{part}",
                expected=f"1 to {len(have)}",
                got=want,
            )
        parts[part] = have[:want]
    return replace(split, **parts)


def resolve(
    split: Split, source: Source, files: Mapping[str, CaseFiles], cache: VolumeCache
) -> Split:
    """A split by rule becomes lists.

    Args:
        split: lists of case ids, or a rule.
        source: the data set; must have the structures that the rule needs.
        files: case id → files of the case.
        cache: reads annotations where the rule asks for cases that hold a structure.
    """
    needs = set(split.draw.needs) if split.draw is not None else set()
    if wrong := needs - set(source.structures):
        raise SettingError(
            "a drawn split needs structures its source does not have",
            where=f"split {split.name!r}, draw.needs",
            expected=", ".join(source.structures),
            got=", ".join(sorted(wrong)),
        )
    return split.resolve(
        files,
        patient=source.patient_of,
        fits=lambda case: not needs or needs <= cache.holds(files[case], source),
    )


def missing(split: Split, source: Source, have: Mapping[str, CaseFiles], folder: Path) -> None:
    """Refuse a split that names cases the folder does not hold.

    Args:
        split: lists of case ids.
        source: the data set, named in the advice.
        have: case id → files at hand.
        folder: where they were looked for.
    """
    if absent := [c for c in split.cases if c not in have]:
        raise DataError(
            f"the split names {len(absent)} cases that the data folder does not hold",
            where=folder,
            expected=f"all cases of {split.name}",
            got=f"missing: {', '.join(absent[:20])}{' …' if len(absent) > 20 else ''}",
            next_step=_ranges(absent)
            + f"add the files, or choose yours with --split {source.name}=FILE.toml"
            + (" (btcv_public: the 30 public volumes)" if source.name == "btcv" else ""),
        )


def _ranges(absent: Sequence[str]) -> str:
    """Advice for ids that clbench 0.1.0 took for ranges."""
    old = [c for c in absent if re.fullmatch(r"\d+-\d+", c)]
    return f"for a range of cases write {old[0].replace('-', '..')!r}; else " if old else ""


def taught(benchmark: Benchmark, splits: Sequence[Split], files: Files) -> None:
    """Refuse a step that learns what none of its training cases annotates.

    Args:
        benchmark: the course.
        splits: one split per step, in order.
        files: source → case id → files.
    """
    for step, split in zip(benchmark.steps, splits, strict=True):
        source = benchmark.reads(step.source)
        have = {n for c in split.train for n in files[step.source][c].annotated(source)}
        if absent := [n for n in step.learns if n not in have]:
            raise DataError(
                f"no training case of the step annotates {', '.join(absent)}",
                where=f"step {step.name!r}, split {split.name!r}",
                expected="each structure a step learns in one training case at least",
                got=f"annotated: {', '.join(n for n in source.structures if n in have)}",
                next_step="choose other training cases, or take it out of `learns`",
            )


USED = {"train": "trained on", "validation": "chosen by"}
"""What teaching does with the cases of a part: validation steers it, so it is no test either."""


def same_patient(benchmark: Benchmark, splits: Sequence[Split], *, patients: bool) -> None:
    """Refuse a patient of a source who is taught from in one step and tested in any.

    On the phantom (`patients` false) every case is a subject of its own.

    Args:
        benchmark: the course; its sources say which cases are of one patient.
        splits: one split per step, in order.
        patients: whether cases are scans of patients; False on the phantom.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for part in PARTS:
        for step, split in zip(benchmark.steps, splits, strict=True):
            source = benchmark.source(step.source)
            for case in getattr(split, part):
                key = (source.name, source.patient_of(case) if patients else case)
                if part in USED:
                    seen.setdefault(key, (part, f"{case} of step {step.name!r}"))
                elif key in seen:
                    other, where = seen[key]
                    raise DataError(
                        f"the same patient is in {other} and in test",
                        where=f"{source.name} case {case}, test of step {step.name!r}",
                        expected="no patient of a test case in train or validation of any step",
                        got=f"patient {key[1]} is {USED[other]} as case {where}",
                        next_step="remove one of the two from its split",
                    )


def same_content(
    benchmark: Benchmark,
    splits: Sequence[Split],
    hashes: Mapping[tuple[str, str], str],
) -> None:
    """Refuse a test case whose image is also taught from, in any step and under any name.

    Args:
        benchmark: the course.
        splits: one split per step, in order.
        hashes: (source, case id) → digest of the image.
    """
    seen: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for step, split in zip(benchmark.steps, splits, strict=True):
            for case in getattr(split, part):
                image = hashes[step.source, case]
                if part in USED:
                    seen.setdefault(image, (part, f"{step.source} case {case}"))
                elif image in seen:
                    other, twin = seen[image]
                    raise DataError(
                        f"the same case is in {other} and in test",
                        where=f"{step.source} case {case}",
                        expected="no test case in train or validation of any step",
                        got=f"its image is that of {twin}",
                        next_step="remove one of the two from its split file",
                    )


def exam_cases(catalog: Catalog) -> Iterator[tuple[int, str, str]]:
    """(step whose split names it, source, case) of every test case, each once."""
    seen = set()
    for number, split in enumerate(catalog.splits, 1):
        source = catalog.source(number).name
        for case in split.test:
            if (source, case) not in seen:
                seen.add((source, case))
                yield number, source, case
