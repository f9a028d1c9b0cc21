"""The matrix that a report answers with: strategies by what they end with, keep, learn and cost.

Each cell has a value, its difference from the reference with the interval that goes with the test,
and a sign for the verdict; rows are ordered by tie groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypedDict

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.report.paper.marks import DIGITS
from clbench.report.scores import StrategyScores
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import HOLE, Comparison, Tested
from clbench.report.significance.endpoints import (
    FINAL,
    Endpoint,
    Which,
    asked,
    hole,
    interval,
    tested_patients,
)
from clbench.report.significance.sentences import end_text
from clbench.report.study import Protocol
from clbench.report.tables.costs import read_costs
from clbench.report.tables.render import EMPTY, Table, long_table, number
from clbench.statistics.class_macro import macro_mean
from clbench.statistics.max_t import SEEDS_TO_GENERALIZE, FamilyComparison
from clbench.statistics.verdicts import LESS, Verdict

SYMBOLS: Mapping[str, str] = {
    "better": "▲", "worse": "▼", "equivalent": "≈", "undecided": "?", "not testable": "∅",
    "shared": "=", "hole": "○", "forgets": "▼", "gains": "▲", "keeps": "≈",
}  # fmt: skip
"""One sign per word, so that no meaning hangs on a color."""
SMALL: Mapping[str, str] = {"better": "△", "worse": "▽", "forgets": "▽"}
"""The sign where the difference is shown to be smaller than the margin."""
OWN = "own forgetting"
COST = "training, min"
HEADS: Mapping[Which, str] = {"final": "final", "kept": "kept", "new": "learned"}
"""Endpoint → header."""
LISTED = 6
"""So many strategies are named in a sentence."""
FEW = 4
"""As many with one word are named beside their number."""
RUNS_ALONE = "‡"
"""Beside the sign of a verdict that holds for these training runs alone."""
_MIRRORED = {"better": "worse", "worse": "better"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number of one strategy."""

    value: float = math.nan
    """Dice, change in Dice, or minutes."""
    sd: float = math.nan
    """Of the minutes, over seeds."""
    difference: float = math.nan
    """Strategy minus reference; of the strategy's own forgetting, the change itself."""
    low: float = math.nan
    """Lower end of the simultaneous interval of the difference, or of the reference's own value."""
    high: float = math.nan
    """Upper end."""
    open_ends: tuple[bool, bool] = (False, False)
    """Whether each end is a mark (0 or a margin) that is excluded itself."""
    word: str = ""
    """The verdict seen from the strategy; empty = there is no test."""
    small: bool = False
    """A difference or change that is shown, and shown to be smaller than the margin."""
    scope: str = ""
    """`for these training runs`, of the word or of how small it is; or nothing."""
    why: str = ""
    """Why there is no number."""
    margin: float = 0.0
    """Of equivalence; ends of intervals are written so that they stay apart from it."""
    seeds: int = 0
    """Training runs it rests on: of a difference, those that both strategies have."""

    @property
    def symbol(self) -> str:
        """The verdict as one sign, with `‡` where it holds for these training runs alone."""
        sign = SMALL[self.word] if self.small else SYMBOLS.get(self.word, "")
        return sign + RUNS_ALONE * (bool(self.scope) and self.word != "undecided")

    @property
    def value_text(self) -> str:
        """`0.783`."""
        return number(self.value).replace("-", "−")

    @property
    def interval_text(self) -> str:
        """`−0.035 [−0.060, −0.011]`; `[−0.008, 0)` where the end itself is excluded."""
        signed = not math.isnan(self.difference)
        parts = [f"{self.difference:+.3f}"] * signed
        if not math.isnan(self.low):
            low, high = (
                f"{end:g}" if is_open else end_text(end, self.margin, signed=signed)
                for end, is_open in zip((self.low, self.high), self.open_ends, strict=True)
            )
            left, right = "[("[self.open_ends[0]], "])"[self.open_ends[1]]
            parts.append(f"{left}{low}, {high}{right}")
        return " ".join(parts).replace("-", "−")

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " ".join(t for t in (self.value_text, self.symbol, self.interval_text) if t)


class Extent(TypedDict):
    """The fields of a cell that say how far its word reaches."""

    small: bool
    scope: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One strategy."""

    label: str
    """Strategy."""
    groups: str
    """Letters of its tie groups; empty = it could not be ranked."""
    ranks: tuple[int, int] | None
    """Best and worst rank that the tests leave open."""
    cells: Mapping[str, Cell]
    """Endpoint or `OWN` → number."""
    cost: Cell
    """Minutes of training."""
    cost_ratio: float
    """The same as a multiple of the reference's."""
    reference: bool
    """Whether the others are compared with it."""
    seeds: int
    """Training runs; a difference may rest on fewer."""
    apart: bool = False
    """Told apart from the row above: they have no group in common."""

    @property
    def ranks_text(self) -> str:
        """`1–4`."""
        return ranks_text(self.ranks)

    @property
    def seeds_text(self) -> str:
        """`3`; `2 of 3` where the reference lacks one, so that a difference rests on fewer."""
        fewest = min((c.seeds for c in self.cells.values() if c.seeds), default=self.seeds)
        return str(self.seeds) if fewest == self.seeds else f"{fewest} of {self.seeds}"

    @property
    def cost_text(self) -> str:
        """`12.3 ±0.4, 1.04×`."""
        if math.isnan(self.cost.value):
            return EMPTY
        sd = "" if math.isnan(self.cost.sd) else f" ±{self.cost.sd:.1f}"
        return f"{self.cost.value:.1f}{sd}" + (
            "" if math.isnan(self.cost_ratio) else f", {self.cost_ratio:.2f}×"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Strategies by endpoints."""

    title: str
    """One line."""
    heads: Mapping[str, str]
    """Endpoint or `OWN` → header."""
    rows: tuple[Row, ...]
    """The strategies, by tie groups."""
    summary: tuple[str, ...]
    """What it says, in at most three sentences."""
    notes: tuple[str, ...]
    """What the numbers are."""

    def table(self) -> Table:
        """For terminals and files."""
        last = ("seeds", COST)
        rows = (
            (
                row.label + " (reference)" * row.reference, row.groups or EMPTY, row.ranks_text,
                *(row.cells[name].text for name in self.heads), row.seeds_text, row.cost_text,
            )
            for row in self.rows
        )  # fmt: skip
        return Table(
            title=self.title,
            columns=("strategy", "group", "rank", *self.heads.values(), *last),
            rows=tuple(rows),
            notes=self.notes,
            keys=3,
            narrow=2,
            tail=len(last),
            long=self._long(),
        )

    def _long(self) -> Table:
        lines = []
        for row in self.rows:
            best, worst = row.ranks or (None, None)
            for name, cell in {**row.cells, "train_min": row.cost}.items():
                lines.append(
                    (
                        row.label, row.groups, best, worst, row.reference,
                        cell.seeds or row.seeds, name,
                        cell.value, cell.sd, cell.difference, cell.low, cell.high, *cell.open_ends,
                        cell.word, cell.small, cell.scope, cell.why,
                    )
                )  # fmt: skip
        return long_table(
            "strategy groups rank_best rank_worst reference seeds measure value sd difference low "
            "high low_open high_open verdict small scope why",
            lines,
        )


def ranks_text(ranks: tuple[int, int] | None) -> str:
    """Ranks that the tests leave open: `1–4`, `3`; the dash where there are none."""
    return EMPTY if ranks is None else "–".join(map(str, dict.fromkeys(ranks)))


def pairs_text(count: int) -> str:
    """Pairs of a family in words: `the one pair`, `all 6 pairs`."""
    return "the one pair" if count == 1 else f"all {count} pairs"


def matrix_of(a: Analysis) -> Matrix:
    """Build the matrix of a report.

    Raises:
        StoreError: see `clbench.report.study.Study.dice`.
    """
    protocol, dice = a.protocol, a.dice
    endpoints = asked(dice)
    compared = {(c.endpoint.name, c.b): c for c in a.comparisons}
    own = {o.method: o for o in a.own}
    costs = {m.label: _minutes(m) for m in dice.strategies}
    base = costs[dice.reference.label].value
    rows = []
    for m in dice.strategies:
        reference = m is dice.reference
        cells: dict[str, Cell] = {
            e.name: _endpoint_cell(a, m, e, compared.get((e.name, m.label))) for e in endpoints
        }
        if own:
            cells[OWN] = _own_cell(own[m.label], protocol)
        cells |= _external_cells(a, m.label)
        ratio = costs[m.label].value / base if base > 0 and not reference else math.nan
        rows.append(
            Row(
                label=m.label, groups=a.tied.groups(m.label), ranks=a.tied.ranks(m.label),
                cells=cells, cost=costs[m.label], cost_ratio=ratio, reference=reference,
                seeds=len(m.seeds),
            )
        )  # fmt: skip
    place = {label: k for k, label in enumerate(a.tied.labels)}
    rows.sort(key=lambda row: place.get(row.label, len(place)))
    rows[1:] = [
        replace(row, apart=not a.tied.together(above.label, row.label))
        for above, row in pairwise(rows)
    ]
    return Matrix(
        title=f"{dice.title()}: what each strategy ends with, keeps, learns and costs",
        heads={e.name: HEADS[e.name] for e in endpoints}
        | ({OWN: OWN} if own else {})
        | {_on(name): _on(name) for name in a.external},
        rows=tuple(rows),
        summary=tuple(_summary(a, rows)),
        notes=tuple(_notes(a, protocol, rows)),
    )


def _endpoint_cell(
    a: Analysis, m: StrategyScores, endpoint: Endpoint, compared: Comparison | None
) -> Cell:
    """A strategy's number: a hole of the reference hides no number of the others.

    Args:
        a: the analysis, on the test set that is looked at.
        m: one of its strategies.
        endpoint: the question.
        compared: the reference against it; None: it is the reference.
    """
    cell = _reference_cell(a, endpoint) if compared is None else _cell(compared, a.protocol)
    if cell.word != HOLE:
        return cell
    value = interval(a.dice, m, endpoint, a.protocol.level).estimate
    return replace(cell, value=value, seeds=len(m.seeds))


def _cell(c: Comparison, protocol: Protocol) -> Cell:
    """A comparison seen from the other strategy: its value, minus the reference's."""
    r = c.result
    if r is None:
        return Cell(word=HOLE, why=c.hole)
    return Cell(
        seeds=len(c.seeds),
        value=c.mean_b,
        margin=protocol.margin,
        difference=0.0 - r.mean.estimate,
        low=0.0 - r.high,
        high=0.0 - r.low,
        open_ends=(r.high_open, r.low_open),
        word=_MIRRORED.get(r.verdict.word, r.verdict.word),
        **_extent(r.verdict),
    )


def _extent(v: Verdict) -> Extent:
    """Whether it is shown to be small, and for which runs the sign holds."""
    small = v.word in SMALL and v.detail in (LESS, LESS.removeprefix("by "))
    return {"small": small, "scope": v.scope or (v.detail_scope if small else "")}


def _on(name: str) -> str:
    """Header of the column of an external test set."""
    return f"final, {name}"


def _external_cells(a: Analysis, label: str) -> dict[str, Cell]:
    """A strategy after the last step, on each external test set."""
    cells = {}
    for name, other in a.external.items():
        compared = {c.b: c for c in other.at_the_end}
        (m,) = (m for m in other.dice.strategies if m.label == label)
        cells[_on(name)] = _endpoint_cell(other, m, FINAL, compared.get(label))
    return cells


def _own_cell(o: Tested, protocol: Protocol) -> Cell:
    """A strategy's change of its old structures."""
    r: FamilyComparison | None = o.result
    if r is None:
        return Cell(word=HOLE, why=o.hole)
    return Cell(
        value=r.mean.estimate,
        margin=protocol.margin,
        low=r.low,
        high=r.high,
        open_ends=(r.low_open, r.high_open),
        word=r.verdict.word,
        **_extent(r.verdict),
    )


def _reference_cell(a: Analysis, endpoint: Endpoint) -> Cell:
    """The reference's own value, with its interval over patients and seeds."""
    i = interval(a.dice, a.dice.reference, endpoint, a.protocol.level)
    if math.isnan(i.estimate):
        return Cell(word=HOLE, why=hole(a.dice, a.dice.reference, endpoint))
    return Cell(value=i.estimate, low=i.low, high=i.high)


def _minutes(m: StrategyScores) -> Cell:
    """Training of a whole course, what it prepares included, in minutes."""
    totals = []
    for run in m.runs:
        try:
            by_step = read_costs(run).values()
        except StoreError as err:
            return Cell(why=err.brief)
        seconds = [c.get("train_s", math.nan) + c.get("prepare_s", 0.0) for c in by_step]
        totals.append(sum(seconds) / 60 if seconds else math.nan)
    return Cell(
        value=continual.mean(totals),
        sd=continual.spread(totals),
        why="no cost is recorded" if any(map(math.isnan, totals)) else "",
    )


def _summary(a: Analysis, rows: Sequence[Row]) -> Iterable[str]:
    """The best group, the reference against the others, forgetting; one per external test set."""
    reference = a.dice.reference.label
    ties = a.tied.ties
    if ties is not None and len(ties.order) > 1:
        yield _leaders(a, ties.m)
    verdicts = Counter(r.cells["final"].word for r in rows if not r.reference)
    if verdicts:
        sides = {"worse": "worse", "equivalent": "equivalent", "better": "better",
                 "undecided": "undecided", "not testable": "not testable", "shared": "the same",
                 HOLE: "without a number"}  # fmt: skip
        others = [r.cells["final"] for r in rows if not r.reference]
        counts = ", ".join(
            f"{verdicts[w]} {text}{_beside(others, w, a.protocol)}"
            for w, text in sides.items()
            if verdicts[w]
        )
        of = f"{verdicts.total()} other strateg{'y' if verdicts.total() == 1 else 'ies'}"
        yield f"Against {reference}, of {of} after the last step: {counts}."
    if a.own:
        named: dict[str, list[str]] = {}
        for row in rows:
            named.setdefault(row.cells[OWN].word, []).append(row.label)
        said = {"forgets": "shown to forget", "keeps": "shown to keep", "gains": "shown to gain",
                "undecided": "undecided", "not testable": "not testable",
                HOLE: "without a number"}  # fmt: skip
        parts = [
            f"{len(named[word])} {text}"
            + _beside([row.cells[OWN] for row in rows], word, a.protocol, named[word])
            for word, text in said.items()
            if word in named
        ]
        of = f"{len(rows)} strateg{'y' if len(rows) == 1 else 'ies'}"
        yield f"Old structures, of {of}: {'; '.join(parts)}."
    for one in a.external_rankings:
        if pairs := len(one.reversals.pairs):
            shown = [one.in_order(pair) for pair in one.shown(a.protocol.alpha)]
            few = "; ".join(f"{first} over {second}" for first, second in shown[:3])
            yield (
                f"On {one.eval_set}, {len(one.turned)} of {pairs} pairs of strategies stand in "
                f"another order than internally (Kendall's tau {one.reversals.kendall_tau:+.2f}); "
                f"shown to be reversed: {len(shown)}{f' ({few})' if few else ''}."
            )


def _leaders(a: Analysis, m: int) -> str:
    """The strategy with the largest mean after the last step, and who is not told from it.

    Args:
        a: the analysis; at least two strategies can be ranked.
        m: pairs that are tested together; 0 = too few patients.
    """
    if not m:
        return "With so few patients no strategy can be told from another one."
    first, *rest = a.tied.labels
    equal = [first, *_equally_good(a)]
    others = [label for label in rest if a.tied.together(first, label)]
    left_out = [m.label for m in a.dice.strategies if m.label not in a.tied.labels]
    left_out += [f"{name} (no finished run)" for name in a.dice.never_finished]
    pairs = f"{m} pair{'s' if m > 1 else ''} tested together, for these training runs"
    last = f"; not ranked: {', '.join(left_out)}" if left_out else ""
    last += _own_start(a, first)
    if not others:
        n = len(a.tied.labels) - 1
        than = "every other strategy"
        if left_out:
            than = f"the {f'{n} others' if n > 1 else 'one other'} that could be ranked"
        return f"{first} is better than {than} after the last step ({pairs}{last})."
    named = ", ".join(
        f"{label} (rank {ranks_text(a.tied.ranks(label))})" for label in others[:LISTED]
    ) + (f" and {len(others) - LISTED} more" if len(others) > LISTED else "")
    has = f"{first} has the largest mean, and is"
    if len(equal) > 1:
        has = f"{_joined(equal)} share the largest mean; {first} is"
    return f"After the last step {has} not told apart from {named} ({pairs}{last})."


def _equally_good(a: Analysis) -> list[str]:
    """The strategies whose mean is that of the first one, as far as sums of numbers can tell."""
    ties = a.tied.ties
    if ties is None:
        return []
    first, *rest = (round(mean, DIGITS) for mean in ties.means)
    return [label for label, mean in zip(a.tied.labels[1:], rest, strict=True) if mean == first]


def _joined(names: Sequence[str]) -> str:
    """Names in a sentence: at most a few, then their number."""
    if len(names) > LISTED:
        return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _own_start(a: Analysis, label: str) -> str:
    """What a strategy and the reference had after step 1, where each has one of its own."""
    compared = {c.b: c for c in a.comparisons if c.endpoint is FINAL}
    reference = a.dice.reference
    if label == reference.label or a.dice.last == 1:
        return ""
    if compared[label].hole or compared[label].first_shared:
        return ""
    learned = {c: 1 for c, step in a.dice.learned_at.items() if step == 1}
    (other,) = (m for m in a.dice.strategies if m.label == label)
    own, its = (macro_mean(m.table(learned, m.seeds)) for m in (other, reference))
    if math.isnan(own) or math.isnan(its):  # a hole of step 1 alone
        return ""
    return f"; after step 1 it had {own:.3f}, {reference.label} {its:.3f}"


def _beside(cells: Sequence[Cell], word: str, protocol: Protocol, names: Sequence[str] = ()) -> str:
    """Of the cells with a word: who they are, where few, and how many are shown to be small."""
    count = sum(cell.small for cell in cells if cell.word == word)
    said = [", ".join(names)] if 0 < len(names) <= FEW else []
    said += [f"{count} by less than {protocol.margin:g}"] if count else []
    return f" ({'; '.join(said)})" if said else ""


def _notes(a: Analysis, protocol: Protocol, rows: Sequence[Row]) -> Iterable[str]:
    """What a reader must know to read the matrix."""
    reference = a.dice.reference.label
    own = f"; {OWN}: the same change, tested by itself" if a.own else ""
    meaning_of: Mapping[Which, str] = {
        "final": "Dice of all structures after the last step",
        "kept": "change of the old structures",
        "new": "new structures right after their own step",
    }
    columns = "; ".join(f"{HEADS[e.name]}: {meaning_of[e.name]}" for e in asked(a.dice))
    yield (
        f"{columns}{own}. {a.dice.scoring} scoring, means over structures, test cases: "
        f"{tested_patients(a.dice)}."
    )
    for name, other in a.external.items():
        yield (
            f"{_on(name)}: the same on the external test set {name} ({len(other.dice.learned_at)} "
            f"structures, {other.dice.scans[name]} test cases), a family of its own."
        )
    yield (
        f"beside a value: its difference from {reference} with the simultaneous {protocol.percent} "
        f"interval of the test ({protocol.adjusted_by}); {reference}'s own row: the interval of "
        "the value over patients and seeds. A round bracket: the end itself is excluded."
    )
    shown = [c for r in rows for c in r.cells.values()]
    used = dict.fromkeys(c.word for c in shown if c.word and not c.small)
    less = f"by less than {protocol.margin:g}"
    meaning = {
        "better": "better", "worse": "worse",
        "equivalent": f"equivalent (within {protocol.margin:g})", "undecided": "undecided",
        "not testable": "not testable", "shared": "the same checkpoint", HOLE: "no number",
        "forgets": "forgets", "gains": "gains",
        "keeps": f"keeps (a loss of {protocol.margin:g} is ruled out)",
    }  # fmt: skip
    by_sign: dict[str, list[str]] = {}
    for word in meaning:
        if word in used:
            by_sign.setdefault(SYMBOLS[word], []).append(meaning[word])
    small = {c.word for c in shown if c.small}
    for sign in dict.fromkeys(SMALL.values()):
        words = [meaning[word] for word in SMALL if word in small and SMALL[word] == sign]
        if words:
            by_sign[sign] = [f"{' or '.join(words)} {less}"]
    if by_sign:
        yield "; ".join(f"{sign} {' or '.join(texts)}" for sign, texts in by_sign.items()) + "."
    ties = a.tied.ties
    if ties is not None and ties.m:
        seeds = ", ".join(map(str, a.tied.seeds))
        fewer = (
            f"Signs come from the comparisons with {reference} alone, which are fewer: one that "
            "shares its letter may be told from it."
        )
        yield (
            "group: strategies with a letter in common are not told apart by the test of "
            f"{pairs_text(ties.m)} ({protocol.adjusted_by}, {ties.patients} patients, the seeds "
            f"that all have: {seeds}); rank: the ranks it leaves open."
            + f" {fewer}"
            * (ties.m > len(a.dice.others))
        )
    if any(RUNS_ALONE in c.symbol for c in shown):
        yield (
            f"{RUNS_ALONE} for these training runs alone: there are fewer than "
            f"{SEEDS_TO_GENERALIZE} of them, or the interval over new ones, at the family's level, "
            "does not agree."
        )
    if not a.dice.same_seeds:
        seeds = ", ".join(map(str, a.tied.seeds)) or "none"
        yield (
            "strategies do not have the same seeds: a difference rests on those that it and "
            f"{reference} both have, groups and order on those that all have ({seeds}), so one row "
            "cannot be subtracted from another."
        )
    devices = {r.device for m in a.dice.strategies for r in m.records}
    if len(devices) > 1:
        named = ", ".join(sorted(devices))
        yield f"{COST}: times from different devices are not comparable ({named})."
    for row in rows:
        whys = dict.fromkeys(c.why for c in row.cells.values() if c.why)
        if whys:
            named = "; ".join(why.removeprefix(f"{row.label}: ") for why in whys)
            yield f"{SYMBOLS[HOLE]} {row.label}: {named}."
    for name, count in a.dice.never_finished.items():
        yield f"{name} has no row: it has no finished run ({count} unfinished)."
