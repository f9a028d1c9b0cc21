"""What trials say: the best score so far against budget, and how much each setting matters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from clbench.report.tables.render import Table, number
from clbench.store import files
from clbench.store.csv_rows import rows_bytes
from clbench.strategy.search_space import Choice, Range
from clbench.tuning.rules import RULES
from clbench.tuning.search import word, words
from clbench.tuning.study import TunedStrategy, TuneSettings

PARTS = 3
"""Parts of a range whose scores are compared."""
FEWEST = 6
"""Trials with a score below which nothing is said of sensitivity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveRow:
    """A trial in the order made; a line of `curve.csv`."""

    strategy: str
    """Name."""
    trial: int
    """1-based; the first has the defaults."""
    updates: int
    """Of this trial."""
    seconds: float
    """Of this trial."""
    spent_updates: int
    """Of this trial and all before."""
    spent_seconds: float
    """Of this trial and all before."""
    score: float | None
    """Mean validation Dice; empty: training failed."""
    best: float | None
    """Best score so far."""
    settings: str
    """`group.name=value` words."""
    first_step: str
    """Folder of its first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How much one setting matters; a line of `sensitivity.csv`."""

    strategy: str
    """Name."""
    setting: str
    """`group.name`."""
    range: str
    """Its search space."""
    default: str
    """Without tuning."""
    best: str
    """Of the best trial."""
    trials: int
    """With a score."""
    share: float
    """Share of the variance of the score that the thirds of the range (the options of a choice)
    explain; nan with fewer than six trials, or where all scores are equal."""
    by_chance: float
    """What that share is expected to be of a setting that does nothing."""


def curve(tuned: TunedStrategy) -> list[CurveRow]:
    """Best so far against budget."""
    rows: list[CurveRow] = []
    updates, seconds, best = 0, 0.0, None
    for t in tuned.trials:
        updates, seconds = updates + t.updates, seconds + t.seconds
        if t.score is not None:
            best = t.score if best is None else max(best, t.score)
        rows.append(
            CurveRow(
                strategy=tuned.name,
                trial=t.number,
                updates=t.updates,
                seconds=t.seconds,
                spent_updates=updates,
                spent_seconds=seconds,
                score=t.score,
                best=best,
                settings=" ".join(words(t.settings)),
                first_step=t.first_step,
            )
        )
    return rows


def sensitivities(tuned: TunedStrategy) -> list[Sensitivity]:
    """One per setting.

    Source: first-order indices from given data (Plischke, Borgonovo and Smith, *Global sensitivity
    measures from given data*, EJOR 2013): variance between parts of the range over all variance.
    Differs: three parts, for trials are few; what chance alone gives stands beside it.
    """
    scored = [t for t in tuned.trials if t.score is not None]
    scores = [float(t.score or 0.0) for t in scored]
    rows = []
    for name, span in tuned.space.items():
        values = [t.settings.get(name, tuned.defaults[name]) for t in scored]
        parts = [_part(span, v) for v in values]
        best = tuned.best.settings.get(name, tuned.defaults[name])
        rows.append(
            Sensitivity(
                strategy=tuned.name,
                setting=name,
                range=str(span),
                default=word(tuned.defaults[name]),
                best=word(best),
                trials=len(scored),
                share=explained(parts, scores),
                by_chance=(len({*parts}) - 1) / (len(scores) - 1) if len(scores) > 1 else math.nan,
            )
        )
    return rows


def explained(parts: Sequence[Hashable], scores: Sequence[float]) -> float:
    """Share of the variance of scores that lies between parts.

    Args:
        parts: of each score.
        scores: as many.

    Returns:
        In [0, 1]; nan for fewer than six scores, or where all are equal.
    """
    if len(scores) < FEWEST or min(scores) == max(scores):
        return math.nan
    values, mean = np.array(scores), float(np.mean(scores))
    between = 0.0
    for part in {*parts}:
        own = values[[p == part for p in parts]]
        between += len(own) * (float(own.mean()) - mean) ** 2
    return between / float(((values - mean) ** 2).sum())


def _part(span: Range | Choice, value: object) -> Hashable:
    """The third of a range that a value lies in, or the option; "none" is a part of its own."""
    if isinstance(span, Choice) or value is None:
        return word(value)
    low, high = span.bounds("search space")
    at = float(str(value))
    if span.log:
        low, high, at = math.log(low), math.log(high), math.log(max(at, low))
    return min(PARTS - 1, max(0, int(PARTS * (at - low) / (high - low))))


def tables(tuned: Sequence[TunedStrategy], settings: TuneSettings) -> Iterator[Table]:
    """What is printed: what was chosen at which cost, and how much each setting matters.

    Args:
        tuned: the strategies.
        settings: how they were tuned.
    """
    rule, unit = RULES[settings.rule], settings.unit
    rows = []
    for one in tuned:
        best, first = one.best, one.trials[0]
        rows.append(
            (
                one.name,
                " ".join(words(best.settings)) or "the defaults",
                number(best.score or 0.0),
                number(math.nan if first.score is None else first.score),
                str(len(one.trials)),
                str(sum(t.score is None for t in one.trials)),
                f"{one.spent(unit):,.0f}",
                f"{one.spent('seconds') / 60:.1f}",
                f"{len({t.first_step for t in one.trials})} of {len(one.trials)}",
            )
        )
    yield Table(
        title=f"Chosen by rule {rule.label}, budget {settings.budget:,g} {unit} each",
        columns=(
            "strategy",
            "settings",
            "score",
            "defaults",
            "trials",
            "failed",
            unit + " spent",
            "minutes",
            "different first steps",
        ),
        rows=tuple(rows),
        notes=(
            f"rule {rule.name}: {rule.summary}.",
            (
                "score: mean validation Dice over structures, of one seed, the best of its trials: "
                "higher than fresh seeds will give. No test case was opened."
            ),
            "spent: a first step that trials share counts in each, so that sharing favors nobody.",
            "no trial was stopped early: small organs are learned late.",
        ),
    )
    lines = [row for one in tuned for row in sensitivities(one)]
    yield Table(
        title="How much each setting matters",
        columns=(
            "strategy",
            "setting",
            "range",
            "default",
            "chosen",
            "trials",
            "share",
            "by chance",
        ),
        rows=tuple(
            (
                r.strategy,
                r.setting,
                r.range,
                r.default,
                r.best,
                str(r.trials),
                number(r.share),
                number(r.by_chance),
            )
            for r in lines
        ),
        keys=2,
        notes=(
            (
                "share: of the variance of the score, what the thirds of the range explain; "
                f"said of {FEWEST} trials or more."
            ),
            "by chance: expected of a setting that does nothing.",
        ),
    )


def write_csv(tuned: Sequence[TunedStrategy], folder: Path) -> list[Path]:
    """`curve.csv` and `sensitivity.csv`.

    Args:
        tuned: the strategies.
        folder: where to.

    Returns:
        The files.
    """
    files.make_folder(folder)
    tables_: dict[str, tuple[type[Any], list[Any]]] = {
        "curve.csv": (CurveRow, [row for one in tuned for row in curve(one)]),
        "sensitivity.csv": (Sensitivity, [row for one in tuned for row in sensitivities(one)]),
    }
    written = []
    for name, (kind, rows) in tables_.items():
        written.append(folder / name)
        files.write_bytes(written[-1], rows_bytes([f.name for f in fields(kind)], rows))
    return written
