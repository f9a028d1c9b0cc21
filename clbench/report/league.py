"""League: the runs of many people on one course, in tie groups, on one static page.

Every run is verified first: computed again from its stored predictions where it keeps them, held
against its own record where it does not. What differs is refused, with the first difference. Nobody
is ranked above a method that the test of all pairs cannot tell apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clbench.errors import ClbenchError, SettingError, StoreError
from clbench.report.page.matrix import HEADS, Cell, pairs_text, ranks_text
from clbench.report.past_images import past_card
from clbench.report.scores import Run, Scores, StrategyScores, read_frame, scores_of, title_of
from clbench.report.significance.endpoints import (
    FINAL,
    Which,
    asked,
    hole,
    interval,
    table,
    tested_patients,
)
from clbench.report.significance.ranking import ties_of
from clbench.report.study import Protocol
from clbench.report.tables.render import EMPTY, Table, long_table
from clbench.statistics.ranking import Ties
from clbench.store import files, run_folder
from clbench.store.record import refuse_mixture
from clbench.types import Floats

if TYPE_CHECKING:
    import pandas as pd

RECOMPUTED, AS_SUBMITTED = "recomputed", "as submitted"
"""Whether the scores were computed again from stored predictions and the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """The finished runs of one person or group, in which no difference was found."""

    name: str
    """Name of the folder."""
    runs: tuple[Run, ...]
    """In order of path."""
    recomputed: frozenset[Path]
    """Folders of the runs whose scores were computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A submission that does not take part."""

    name: str
    """Name of the folder."""
    error: ClbenchError
    """The first difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One method of one submission."""

    submission: str
    """Whose."""
    label: str
    """Method."""
    checked: str
    """`RECOMPUTED` where that holds for each of its runs."""
    seeds: int
    """Training runs."""
    past: str
    """Images of earlier steps that it opened."""
    cells: Mapping[Which, Cell]
    """Endpoint → Dice with its interval over patients and seeds."""
    groups: str = ""
    """Letters of its tie groups; empty = it could not be ranked."""
    ranks: tuple[int, int] | None = None
    """Best and worst rank that the tests leave open."""
    apart: bool = False
    """It has no group in common with the entry above."""
    hole: str = ""
    """Why it could not be ranked."""

    @property
    def ranks_text(self) -> str:
        """`1–4`."""
        return ranks_text(self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class League:
    """All methods of all submissions on one course."""

    title: str
    """Course and version; says PHANTOM where it must."""
    phantom: bool
    """Made-up anatomy, not patients."""
    entries: tuple[Entry, ...]
    """By tie groups."""
    refused: tuple[Refusal, ...]
    """What does not take part."""
    notes: tuple[str, ...]
    """What the numbers are."""

    @property
    def holes(self) -> tuple[str, ...]:
        """Who is not ranked, and which further numbers are missing, each with its reason."""
        lines = []
        for e in self.entries:
            lines += [f"not ranked: {e.hole} ({e.submission})"] if e.hole else []
            lines += [
                f"no number of {HEADS[name]}: {cell.why} ({e.submission})"
                for name, cell in e.cells.items()
                if cell.why and cell.why != e.hole
            ]
        return tuple(lines)

    def table(self) -> Table:
        """For terminals and files."""
        return Table(
            title=self.title,
            columns=("group", "rank", "method", "of", *HEADS.values(), "seeds", "scores"),
            rows=tuple(
                (
                    e.groups or EMPTY, e.ranks_text, e.label, e.submission,
                    *(e.cells[name].text if name in e.cells else EMPTY for name in HEADS),
                    str(e.seeds), e.checked,
                )
                for e in self.entries
            ),
            notes=(*self.notes, *self.holes),
            keys=4,
            long=self._long(),
        )  # fmt: skip

    def _long(self) -> Table:
        return long_table(
            "submission method groups rank_best rank_worst checked seeds past measure value low "
            "high why",
            [
                (
                    e.submission, e.label, e.groups, *(e.ranks or (None, None)), e.checked, e.seeds,
                    e.past, name, cell.value, cell.low, cell.high, cell.why,
                )
                for e in self.entries
                for name, cell in e.cells.items()
            ],
        )  # fmt: skip


def read_submission(
    folder: Path, bench: str, *, data: str | None = None, cache: Path | None = None
) -> Submission:
    """Read and verify somebody's runs.

    Args:
        folder: results folder of runs, or of excerpts of them.
        bench: the course.
        data: where the data lies now, as in `clbench run --data`; None: where the runs found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the runs kept them.

    Raises:
        StoreError: no finished run of the course, or the first difference that was found in one.
        DataError: data was named that cannot be read.
    """
    from clbench.run.verify import verify_run

    runs = [Run.read(path) for path in run_folder.find_runs(folder, bench=bench)]
    finished = tuple(run for run in runs if run.record.status == "finished")
    if not finished:
        raise StoreError(
            "a submission has no finished run of this course",
            where=folder,
            expected=f"{bench}/STRATEGY/RUN/run.json and scores.csv, as `clbench excerpt` writes",
            got=f"{len(runs)} unfinished run(s)" if runs else "none",
            next_step="name the folder that holds the course's folder",
        )
    recomputed = set()
    for run in finished:
        verified = verify_run(run.folder, data=data, cache=cache)
        if verified.predictions:
            recomputed.add(run.folder)
    return Submission(name=folder.name, runs=finished, recomputed=frozenset(recomputed))


def league_of(
    submissions: Iterable[Submission | Refusal], *, scoring: str, protocol: Protocol
) -> League:
    """Compare all methods of all submissions.

    Args:
        submissions: the first one that was not refused decides what is compared: course, version,
            data, splits, profile.
        scoring: `strict` or `paper`.
        protocol: level, correction and sign patterns.

    Raises:
        StoreError: no submission takes part.
    """
    accepted: list[Submission] = []
    refused: list[Refusal] = []
    for submission in submissions:
        if isinstance(submission, Refusal):
            refused.append(submission)
            continue
        try:
            _belongs(submission, accepted)
        except ClbenchError as err:
            refused.append(Refusal(name=submission.name, error=err))
        else:
            accepted.append(submission)
    accepted, copies, only_copies = _shown_once(accepted, scoring)
    refused += only_copies
    if not accepted:
        raise StoreError(
            "no submission takes part",
            where=", ".join(r.name for r in refused) or "the folders named",
            got="; ".join(r.error.brief for r in refused) or "no folder",
            next_step="mend what is named, or ask for the files again",
        )
    scores = [scores_of(read_frame(s.runs), s.runs, scoring=scoring) for s in accepted]
    methods = [
        (submission, of, method)
        for submission, of in zip(accepted, scores, strict=True)
        for method in of.strategies
    ]
    whole = [k for k, (_, of, method) in enumerate(methods) if not hole(of, method, FINAL)]
    ties = ties_of([_averaged(*methods[k][1:]) for k in whole], protocol)
    entries = [_entry(*each, protocol) for each in methods]
    ranked = [
        replace(
            entries[whole[k]],
            groups=ties.letters(place),
            ranks=ties.ranks[place],
            apart=place > 0 and not ties.together(place - 1, place),
        )
        for place, k in enumerate(ties.order)
    ]
    record = accepted[0].runs[0].record
    return League(
        title=f"{title_of(record)}: league of {len(entries)} method{'s'[: len(entries) > 1]}",
        phantom=not record.patients,
        entries=(*ranked, *(e for k, e in enumerate(entries) if k not in whole)),
        refused=tuple(refused),
        notes=(*_notes(scores[0], protocol, ties), *copies),
    )


def write_league(league: League, out: Path) -> list[Path]:
    """Write the page and the table as CSV; the page first.

    Args:
        league: see `league_of`.
        out: folder to write to; files of the same names are replaced.

    Raises:
        StoreError: the folder cannot be written.
    """
    from clbench.report.page.page import fill
    from clbench.report.tables.render import render

    files.make_folder(out)
    content = {
        "index.html": fill("league.html.j2", league=league, heads=HEADS, empty=EMPTY),
        "league.csv": render(league.table(), "csv") + "\n",
    }
    for name, text in content.items():
        files.write_bytes(out / name, text.encode())
    return [out / name for name in content]


def _belongs(submission: Submission, accepted: Sequence[Submission]) -> None:
    """Refuse another question, a name or a run that is there already.

    Raises:
        SettingError: two folders of one name.
        StoreError: what differs.
    """
    if any(other.name == submission.name for other in accepted):
        raise SettingError(
            "two submissions have one name",
            where=submission.name,
            expected="a folder name of its own for each",
            next_step="rename one of the folders",
        )
    refuse_mixture([run.record for s in (*accepted, submission) for run in s.runs])
    first = (accepted[0] if accepted else submission).runs[0].record.course
    for run in submission.runs:
        for part in ("steps", "groups", "test", "patient_of"):
            if getattr(run.record.course, part) != getattr(first, part):
                raise StoreError(
                    "two runs of one league have not the same course",
                    where=f"{run.folder / 'run.json'}, course.{part}",
                    expected=getattr(first, part),
                    got=getattr(run.record.course, part),
                    next_step="take the record from a copy",
                )
    frame = read_frame(submission.runs)
    scores_of(frame, submission.runs, scoring="strict")  # refuses a seed that is there twice
    if accepted:
        _same_truth(read_frame(accepted[0].runs), frame, accepted[0], submission)


def _same_truth(
    known: pd.DataFrame, frame: pd.DataFrame, first: Submission, submission: Submission
) -> None:
    """Refuse scores of other masks than those that the first submission was scored with.

    Args:
        known: rows of the first submission.
        frame: rows of the one that is looked at.
        first: the first submission.
        submission: the one that is looked at.

    Raises:
        StoreError: a structure of a test case has another number of voxels.
    """
    key = ["eval_set", "case", "structure", "scoring"]

    def voxels(of: pd.DataFrame) -> pd.DataFrame:
        return of[of["metric"] == "dice"].dropna(subset=["gt_vox"])

    both = voxels(frame).merge(voxels(known)[[*key, "gt_vox"]].drop_duplicates(), "left", key)
    other = both[both["gt_vox_y"].notna() & (both["gt_vox_x"] != both["gt_vox_y"])]
    if len(other):
        row = other.iloc[0]
        raise StoreError(
            "a case was scored with another mask than the same case of another submission",
            where=f"{submission.runs[int(row['run'])].folder / 'scores.csv'}, step {row['step']}, "
            f"{row['eval_set']}/{row['case']}, {row['structure']}, {row['scoring']}",
            expected=f"gt_vox {row['gt_vox_y']:.0f}, as in {first.name}",
            got=f"{row['gt_vox_x']:.0f}",
            next_step="see whether cases were exchanged, or whose data differs",
        )


def _shown_once(
    accepted: Sequence[Submission], scoring: str
) -> tuple[list[Submission], list[str], list[Refusal]]:
    """Leave out runs whose scores are those of another run, whatever they are called.

    Equal runs on one machine give equal scores, so an equal run is no fraud; but it is no further
    evidence either. The one that was computed again is kept, else the first.

    Args:
        accepted: the submissions.
        scoring: what is ranked.

    Returns:
        Submissions with what is left of each, a note for each run that is not shown, and the
        submissions of which nothing is left.
    """
    equal: dict[str, list[tuple[Submission, Run]]] = {}
    for submission in accepted:
        for run in submission.runs:
            equal.setdefault(_content(run, scoring), []).append((submission, run))
    shown: dict[tuple[str, Path], tuple[Submission, Run]] = {}
    for same in equal.values():
        again = (each for each in same if each[1].folder in each[0].recomputed)
        kept = next(again, same[0])
        shown |= {(of.name, run.folder): kept for of, run in same}
    left, notes, gone = [], [], []
    for submission in accepted:
        own, said = [], []
        for run in submission.runs:
            other, instead = shown[submission.name, run.folder]
            if other is submission and instead is run:
                own.append(run)
            else:
                said.append(f"{_named(submission, run)} has the scores of {_named(other, instead)}")
        if own:
            left.append(replace(submission, runs=tuple(own)))
            notes += [f"shown once: {line}." for line in said]
        else:
            error = StoreError(
                "every run is a copy of another submission's",
                where=submission.name,
                expected="scores of one's own",
                got="; ".join(said),
                next_step="leave the copies out",
            )
            gone.append(Refusal(name=submission.name, error=error))
    return left, notes, gone


def _named(submission: Submission, run: Run) -> str:
    return f"{submission.name}: {run.record.strategy}, seed {run.record.seed}"


def _content(run: Run, scoring: str) -> str:
    """A checksum of the scores that rank a run; of a run without any, one of its own.

    Rows of other metrics, scorings and test sets can be left out or added without a run ranking
    otherwise, so they tell no copy from its original; nor do the names of strategy and seed.
    """
    steps = run.record.course.steps
    ranked = [
        (row.step, row.eval_set, row.case, row.structure, row.value, row.status)
        for row in run_folder.read_scores(run.folder / "scores.csv")
        if row.metric == "dice"
        and row.scoring == scoring
        and row.status != "not_annotated"
        and row.eval_set == steps[row.learned_at - 1].source
    ]
    text = repr(sorted(ranked, key=repr)) if ranked else str(run.folder)
    return hashlib.sha256(text.encode()).hexdigest()


def _averaged(scores: Scores, method: StrategyScores) -> dict[str, Floats]:
    """The final endpoint, averaged over seeds: those of different people are not paired."""
    by_set = table(scores, method, FINAL, method.seeds)
    return {name: np.mean(values, axis=0, keepdims=True) for name, values in by_set.items()}


def _entry(
    submission: Submission, scores: Scores, method: StrategyScores, protocol: Protocol
) -> Entry:
    """A method without its group."""
    cells = {}
    for endpoint in asked(scores):
        mean = interval(scores, method, endpoint, protocol.level)
        why = hole(scores, method, endpoint) if math.isnan(mean.estimate) else ""
        cells[endpoint.name] = Cell(value=mean.estimate, low=mean.low, high=mean.high, why=why)
    again = all(run.folder in submission.recomputed for run in method.runs)
    cards = dict.fromkeys(past_card(record) for record in method.records)
    return Entry(
        submission=submission.name,
        label=method.label,
        checked=RECOMPUTED if again else AS_SUBMITTED,
        seeds=len(method.seeds),
        # Scores can be computed again; which images training opened is in the record alone.
        past="; ".join(cards).replace("enforced", "says its own record"),
        cells=cells,
        hole=hole(scores, method, FINAL),
    )


def _notes(scores: Scores, protocol: Protocol, ties: Ties) -> Iterable[str]:
    """What a reader must know."""
    yield (
        f"Dice, {scores.scoring} scoring, means over structures, test cases: "
        f"{tested_patients(scores)}; [{protocol.percent} interval over patients and seeds]."
    )
    if ties.m:
        yield (
            "group: methods with a letter in common are not told apart by the test of "
            f"{pairs_text(ties.m)} ({protocol.adjusted_by}, {ties.patients} patients, seeds "
            "averaged); rank: the ranks it leaves open. Among equals nobody is first. It holds for "
            "these training runs."
        )
    yield (
        f"{RECOMPUTED}: every score was computed again from stored predictions and the data; "
        f"{AS_SUBMITTED}: the files agree with themselves, and no more can be known."
    )
