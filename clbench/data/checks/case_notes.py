"""What is odd about a case, and can be used all the same: noted, never corrected.

`clbench data check` prints the notes; a run and the scoring of predictions write them into the
warnings of `run.json`, from where they reach the report. What looks for them stands in `LOOKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clbench.data.anatomy.position import anatomy_notes
from clbench.data.checks.hounsfield import hounsfield_notes
from clbench.data.checks.rounding import SLOPE
from clbench.data.labels import RawCase
from clbench.data.nifti import header_notes, spacing_of
from clbench.errors import DataError
from clbench.spec.benchmark import Source

NOT_HU = "not HU"
"""Kind of the notes on images that are no CT in HU."""
MOST_NOT_HU = 0.9
"""Share of a source's cases from which on the source is refused."""
VERSION = 3
"""Raised by any change in what is looked at or said: notes are kept in the cache."""

LOOKS: dict[str, Callable[[RawCase, Source | None], Iterable[str]]] = {
    NOT_HU: lambda raw, source: hounsfield_notes(raw.image),
    "header": lambda raw, source: header_notes(raw.files.image),
    "anatomy": lambda raw, source: anatomy_notes(
        raw.image, raw.bits, source.structures if source else (), spacing_of(raw.affine)
    ),
}
"""Kind of note → what looks for it: a case as it was read and its source in (None where nobody says
what its labels mean; then the case has no bits), sentences out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseNote:
    """One sentence about one case."""

    source: str
    """Its source."""
    case: str
    """Its id."""
    kind: str
    """A key of `LOOKS`."""
    text: str
    """What is odd."""

    @property
    def message(self) -> str:
        """The sentence, with the case in front."""
        return f"{self.source}/{self.case}: {self.text}"


def notes_of(raw: RawCase, source: Source | None) -> list[tuple[str, str]]:
    """Kind and text of every note on a case."""
    return [(kind, text) for kind, look in LOOKS.items() for text in look(raw, source)]


def odd_cases(notes: Iterable[CaseNote]) -> set[tuple[str, str]]:
    """(source, case) of the images that look like no CT in HU."""
    return {(note.source, note.case) for note in notes if note.kind == NOT_HU}


def source_problems(
    notes: Iterable[CaseNote], cases: Mapping[str, Sequence[str]]
) -> Iterator[DataError]:
    """Sources of which (nearly) no case is a CT in HU: a wrong conversion, not an odd case.

    Args:
        notes: of these cases, and perhaps of others.
        cases: source → the cases that are used.
    """
    odd: dict[str, list[CaseNote]] = {}
    for note in notes:
        if note.kind == NOT_HU and note.case in cases.get(note.source, ()):
            odd.setdefault(note.source, []).append(note)
    for name, of_source in odd.items():
        if len(of_source) >= MOST_NOT_HU * len(cases[name]):
            yield DataError(
                "the images of a source are no CTs in HU",
                where=f"source {name!r}, {len(of_source)} of {len(cases[name])} case(s)",
                expected="air near -1000, fat near -100, soft tissue from 0 to 300",
                got=of_source[0].message,
                next_step=f"say rescale = {{slope = …, intercept = …}} in the [[source]] "
                f"{name!r} of the course file (HU = slope x value + intercept), or train on "
                "the values as they are with --set data.expect_hu=false: rounded to whole numbers, "
                f"so that 0 to 1 and z-scores need rescale = {{slope = {SLOPE}}} and a "
                "--set data.window_hu=… to match",
            )
