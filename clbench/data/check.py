"""`clbench data check`: read every case of a folder and say what is there, and every problem.

It reads with the readers of a run, so what passes here can be trained on; unlike a run
it does not stop at the first problem. With a benchmark it says what each case annotates; with the
bare name of a layout, which label values or masks there are, to write a benchmark from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clbench.data.cache import structures_of, with_ancestors
from clbench.data.checks.case_notes import CaseNote, notes_of, odd_cases, source_problems
from clbench.data.checks.course_splits import (
    cases_of,
    chosen,
    content_problems,
    course_problems,
    settle,
    unmatched,
)
from clbench.data.checks.rounding import Range, range_of_fractions, rounding_problems
from clbench.data.external_masks import same_meaning
from clbench.data.labels import RawCase, digest_of, read_case, read_unnamed
from clbench.data.layouts import (
    CaseFiles,
    cases_in,
    find_cases,
    find_layout,
    inner_folders,
    label_names,
    named_folders,
    natural,
    other_formats,
    passed_over_lines,
    resolve_data,
)
from clbench.data.nifti import spacing_of
from clbench.errors import ClbenchError, DataError, UnknownName
from clbench.spec.benchmark import Benchmark, Preprocessing, Source
from clbench.spec.splits import PARTS, Split
from clbench.spec.taxonomy import canonical


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseReport:
    """What one case holds."""

    case: str
    """Case id."""
    line: str
    """Shape, spacing, orientation, HU range, voxels per structure."""
    problems: tuple[str, ...] = ()
    """What keeps it from being used."""
    remarks: tuple[str, ...] = ()
    """What is unusual, but allowed."""


@dataclass(kw_only=True)
class FolderReport:
    """What a data folder holds."""

    folder: Path
    """The folder."""
    cases: dict[str, list[CaseReport]] = field(default_factory=dict)
    """Source → its cases."""
    problems: list[str] = field(default_factory=list)
    """Every problem, with its case."""
    remarks: list[str] = field(default_factory=list)
    """What holds for the whole folder."""
    files: dict[str, dict[str, CaseFiles]] = field(default_factory=dict)
    """Source → case → files."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Source → its folder."""
    images: dict[tuple[str, str], str] = field(default_factory=dict)
    """(source, case) → digest of its image, of every case that can be read."""
    holds: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """(source, case) → structures of which it holds a voxel, of every case that can be read."""
    fractions: dict[tuple[str, str], Range] = field(default_factory=dict)
    """(source, case) → range of an image of fractions, of every case that can be read."""
    notes: list[CaseNote] = field(default_factory=list)
    """What is odd about single cases."""

    def add(self, other: FolderReport) -> None:
        """Take in what another folder holds."""
        self.cases |= other.cases
        self.files |= other.files
        self.folders |= other.folders
        self.images |= other.images
        self.holds |= other.holds
        self.fractions |= other.fractions
        self.notes += other.notes
        self.problems += other.problems
        self.remarks += other.remarks

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        for source, cases in self.cases.items():
            yield f"{source}: {len(cases)} case(s)"
            for case in cases:
                yield f"  {case.case:>6}  {case.line}"
                for remark in case.remarks:
                    yield f"          note: {remark}"
                for problem in case.problems:
                    yield from (f"          {x}" for x in f"PROBLEM: {problem}".splitlines())
        yield from self.remarks
        if self.problems:
            yield f"{len(self.problems)} problem(s):"
            for problem in self.problems:
                yield from (f"  {x}" for x in problem.splitlines())
        else:
            yield "no problems"


def check_layout(folder: Path, layout: str) -> FolderReport:
    """Read a folder of a layout, without a benchmark that says what its labels mean.

    Raises:
        UnknownName: there is no such layout.
    """
    report = FolderReport(folder=folder)
    try:
        cases_by_id = cases_in(folder, layout, "--layout")
    except DataError as err:
        report.problems.append(str(err))
        return report
    cases, seen = [], Counter[str]()
    for files in cases_by_id.values():
        try:
            raw, names = read_unnamed(files)
        except ClbenchError as err:
            cases.append(CaseReport(case=files.case, line="cannot be read", problems=(str(err),)))
            continue
        seen.update(names.keys())
        what = "masks" if isinstance(files.label, tuple) else "label values"
        listed = ", ".join(f"{n} ({vox} voxels)" for n, vox in names.items()) or "none"
        odd = [text for _, text in notes_of(raw, None)]
        cases.append(_describe(raw, f"{what}: {listed}", odd))
    report.cases[layout] = cases
    meanings = label_names(folder if folder.is_dir() else folder.parent)
    report.remarks += [
        f"case {case} {said}" for case, said in find_layout(layout).unpaired(folder).items()
    ]
    report.remarks += other_formats(folder) if folder.is_dir() else []
    report.problems += [f"{c.case}: {p}" for c in cases for p in c.problems]
    for name in sorted(seen, key=natural):
        try:
            known = "" if name.isdecimal() else f"; clbench calls it {canonical(name)!r}"
        except UnknownName:
            known = "; not in clbench's taxonomy"
        what = "label value" if name.isdecimal() else "mask"
        if name in meanings:
            known = f" ({meanings[name]!r} in dataset.json)"
        report.remarks.append(f"{what} {name}: in {seen[name]} of {len(cases)} case(s){known}")
    return report


def check_course(
    benchmark: Benchmark,
    report: FolderReport,
    splits: Mapping[str, Split] | None = None,
    *,
    expect_hu: bool = True,
) -> None:
    """Hold a course against the cases of a folder, by the functions that a run calls.

    What a run would refuse becomes a problem of the report; steps whose source was not looked at
    are named in a remark.

    Args:
        benchmark: the course.
        report: of a folder; is added to.
        splits: source or step → split that replaces the benchmark's.
        expect_hu: whether a source whose images are no CTs in HU is a problem.

    Raises:
        SettingError: a split for what is neither a source nor a step.
    """
    asked = [
        (step, split or step.split)
        for step, split in zip(benchmark.with_cases, chosen(benchmark, splits or {}), strict=True)
    ]
    course, problems = settle(
        [(step, split) for step, split in asked if step.source in report.files],
        benchmark,
        report.files,
        report.folders,
        holds=lambda name, case: report.holds.get((name, case), frozenset()),
    )
    problems += course_problems(course, benchmark, report.files, patients=True)
    problems += content_problems(
        course, lambda name, case: report.images.get((name, case), f"{name}/{case}, not read")
    )
    if expect_hu:
        every = {name: list(files) for name, files in report.files.items()}
        problems += source_problems(report.notes, every | cases_of(course))
    problems += rounding_problems(
        cases_of(course),
        benchmark.reads,
        lambda name, case: report.fractions.get((name, case)),
        benchmark.preprocessing.window_hu,
        set() if expect_hu else odd_cases(report.notes),
    )
    report.problems += [str(err) for err in problems]
    drawn = {id(step): split for step, split in asked}
    rules = [drawn[id(step)] for step, _ in course]
    report.remarks += unmatched(course, report.files, rules)
    for step, split in course:
        count = ", ".join(f"{len(getattr(split, part))} {part}" for part in PARTS)
        report.remarks.append(
            f"step {step.name!r}, its split of {step.source}: every case is here ({count})"
        )
    if absent := sorted({step.source for step, _ in asked} - report.files.keys()):
        report.remarks.append(f"not looked at, and needed by a run: {', '.join(absent)}")


def check_data(text: str, sources: Sequence[Source]) -> FolderReport:
    """Read what a user would name after `--data`: `name=PATH,…` or one folder.

    Raises:
        DataError: `text` names a source the benchmark does not have.
    """
    named_places = named_folders(text, [s.name for s in sources])
    if named_places is None:
        return check_folder(Path(text).expanduser(), sources)
    named = [s for s in sources if s.name in named_places]
    report = FolderReport(folder=Path(text))
    for name, place in resolve_data(text, named or sources).items():
        report.add(check_folder(place, [s for s in named if s.name == name]))
    return report


def check_folder(folder: Path, sources: Sequence[Source]) -> FolderReport:
    """Read a folder that holds one source, or one sub-folder per source.

    Args:
        folder: what a user would name after `--data`.
        sources: the sources of a benchmark; those found are checked.

    Returns:
        The report; `problems` is empty where everything can be used.
    """
    report = FolderReport(folder=folder)
    if not folder.exists():
        report.problems.append(f"{folder}: the data folder does not exist")
        return report
    try:
        inside = inner_folders(folder, [s.name for s in sources])
    except DataError as err:
        report.problems.append(str(err))
        return report
    named = [(s, inside[s.name]) for s in sources if s.name in inside]
    failed: list[DataError] = []
    for source, place in named or [(s, folder) for s in sources]:
        try:
            of_source = find_cases(place, source)
        except DataError as err:
            failed.append(err)
            continue
        report.files[source.name], report.folders[source.name] = of_source, place
        report.cases[source.name] = [_check(files, source, report) for files in of_source.values()]
        try:
            same_meaning(place, source)
        except DataError as err:
            report.problems.append(str(err))
        report.remarks += passed_over_lines(place, source, of_source)
        report.remarks += [
            f"{source.name}: a [[source.partial]] names no case that is here ({p.cases[0]}, …)"
            for p in source.partial
            if p.cases and not set(p.cases) & set(of_source)
        ]
        report.problems += [
            f"{source.name} case {c.case}: {p}"
            for c in report.cases[source.name]
            for p in c.problems
        ]
    if not named and len(report.files) > 1:
        report.problems.append(
            f"{folder} may be any of {', '.join(report.files)}: write which, as "
            f"{next(iter(report.files))}={folder}"
        )
    every = named or not report.cases  # an unnamed folder needs to hold one of the sources only
    report.problems += [str(err) for err in failed if every or "case(s) have" in err.what]
    return report


def _check(files: CaseFiles, source: Source, report: FolderReport) -> CaseReport:
    try:
        raw = read_case(files, source)
    except ClbenchError as err:
        return CaseReport(case=files.case, line="cannot be read", problems=(str(err),))
    annotated = files.annotated(source)
    kind = raw.bits.dtype.type
    vox = {
        name: int(np.count_nonzero(raw.bits & kind(1 << source.structures.index(name))))
        for name in source.structures
    }
    report.images[source.name, files.case] = digest_of(raw.image)
    report.fractions[source.name, files.case] = range_of_fractions(raw.image)
    report.holds[source.name, files.case] = (  # as a run asks, which reads values alone
        structures_of([v for v, n in raw.counts.items() if v and n], source)
        if isinstance(files.label, Path)
        else with_ancestors(n for n in vox if vox[n])
    )
    odd = notes_of(raw, source)
    report.notes += [
        CaseNote(source=source.name, case=files.case, kind=kind, text=text) for kind, text in odd
    ]
    remarks = [text for _, text in odd]
    if absent := [n for n in annotated if not vox[n]]:
        remarks.append(f"annotated, but without a voxel: {', '.join(absent)}")
    if extra := [n for n in source.structures if vox[n] and n not in annotated]:
        remarks.append(f"labelled, but not counted as annotated: {', '.join(extra)}")
    if not annotated:
        remarks.append("annotates no structure of the source")
    held = ", ".join(f"{n} {vox[n]}" for n in annotated if vox[n]) or "no structure"
    return _describe(raw, f"annotates {len(annotated)}; voxels: {held}", remarks)


def _describe(raw: RawCase, labels: str, remarks: Sequence[str]) -> CaseReport:
    """Shape, spacing, orientation and HU range, labels and remarks."""
    low, high = float(raw.image.min()), float(raw.image.max())
    window_low = Preprocessing().window_hu[0]
    below = f"no voxel above {window_low:g} HU (highest {high:g})"
    size = "x".join(map(str, raw.image.shape))
    spacing = " x ".join(f"{s:.3g}" for s in spacing_of(raw.affine))
    return CaseReport(
        case=raw.files.case,
        line=f"{size} vox, {spacing} mm (RAS order), file {raw.file_axes}, HU {low:g} to {high:g}; "
        f"{labels}",
        problems=(below,) if high <= window_low else (),
        remarks=tuple(remarks),
    )
