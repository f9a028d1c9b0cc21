"""`clbench data check`: read every case of a folder and say what is there, and every problem.

Room: row 2. It reads with the readers of a run, so what passes here can be trained on; unlike a run
it does not stop at the first problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clbench.data.layouts import CaseFiles, find_cases
from clbench.data.volumes import read_case, spacing_of
from clbench.errors import ClbenchError, DataError
from clbench.spec import Source


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
        if self.problems:
            yield f"{len(self.problems)} problem(s):"
            for problem in self.problems:
                yield from (f"  {x}" for x in problem.splitlines())
        else:
            yield "no problems"


def check_folder(folder: Path, sources: Sequence[Source]) -> FolderReport:
    """Read a folder that holds one source, or one sub-folder per source.

    Args:
        folder: what a user would name after `--data`.
        sources: the sources of a benchmark; those found are checked.

    Returns:
        The report; `problems` is empty where everything can be used.
    """
    report = FolderReport(folder=folder)
    if not folder.is_dir():
        report.problems.append(f"{folder}: the data folder does not exist")
        return report
    inside = {p.name.casefold(): p for p in folder.iterdir() if p.is_dir()}
    named = [(s, inside[s.name.casefold()]) for s in sources if s.name.casefold() in inside]
    failed: list[DataError] = []
    for source, place in named or [(s, folder) for s in sources]:
        try:
            found = find_cases(place, source)
        except DataError as err:
            failed.append(err)
            continue
        report.cases[source.name] = [_check(files, source) for files in found.values()]
        report.problems += [
            f"{source.name} case {c.case}: {p}"
            for c in report.cases[source.name]
            for p in c.problems
        ]
    if named or not report.cases:  # an unnamed folder needs to hold one of the sources only
        report.problems += [str(err) for err in failed]
    else:
        pairing = [e for e in failed if "case(s) have" in e.what]
        report.problems += [str(err) for err in pairing]
    return report


def _check(files: CaseFiles, source: Source) -> CaseReport:
    try:
        raw = read_case(files, source)
    except ClbenchError as err:
        return CaseReport(case=files.case, line="cannot be read", problems=(str(err),))
    low, high = float(raw.image.min()), float(raw.image.max())
    annotated = files.annotated(source)
    kind = raw.bits.dtype.type
    vox = {
        name: int(np.count_nonzero(raw.bits & kind(1 << source.structures.index(name))))
        for name in source.structures
    }
    remarks = []
    if absent := [n for n in annotated if not vox[n]]:
        remarks.append(f"annotated, but without a voxel: {', '.join(absent)}")
    if extra := [n for n in source.structures if vox[n] and n not in annotated]:
        remarks.append(f"labelled, but not counted as annotated: {', '.join(extra)}")
    problems = []
    if high <= -175:
        problems.append(f"no voxel above -175 HU (highest {high:g}); is this a CT in HU?")
    elif low >= -175:
        remarks.append(f"lowest value {low:g}: no air; is this a CT in HU?")
    size = "x".join(map(str, raw.image.shape))
    spacing = " x ".join(f"{s:.3g}" for s in spacing_of(raw.affine))
    found = ", ".join(f"{n} {vox[n]}" for n in annotated if vox[n]) or "no structure"
    return CaseReport(
        case=files.case,
        line=f"{size} vox, {spacing} mm (RAS order), file {raw.file_axes}, HU {low:g} to {high:g}; "
        f"annotates {len(annotated)}; voxels: {found}",
        problems=tuple(problems),
        remarks=tuple(remarks),
    )
