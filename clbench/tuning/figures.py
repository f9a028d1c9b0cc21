"""Figures of a tuning: best so far against budget, and scores along the range of every setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench.report.figures import style
from clbench.report.figures.wrapping import wrapped
from clbench.store import files
from clbench.strategy.search_space import Choice, Range
from clbench.tuning.rules import RULES
from clbench.tuning.search import word
from clbench.tuning.study import TunedStrategy, TuneSettings
from clbench.tuning.summary import curve

ACROSS = 4
"""Panels side by side."""


def write_figures(
    tuned: Sequence[TunedStrategy], settings: TuneSettings, folder: Path
) -> list[Path]:
    """Draw the trials, as PDF (vectors) and PNG.

    Args:
        tuned: the strategies.
        settings: how they were tuned.
        folder: where to.

    Returns:
        The files.

    Raises:
        StoreError: the folder cannot be written.
    """
    files.make_folder(folder)
    written = []
    with style.look():
        figures = {"curve": curve_figure(tuned, settings)}
        for one in tuned:
            figures[f"settings_{one.folder.parent.name}"] = settings_figure(one, settings)
        for name, figure in figures.items():
            for kind in ("pdf", "png"):
                written.append(folder / f"{name}.{kind}")
                files.write_bytes(written[-1], style.to_bytes(figure, kind))
    return written


def _small_print(settings: TuneSettings) -> str:
    rule = RULES[settings.rule]
    return (
        f"Rule {rule.label}: {rule.summary}. One seed ({settings.base.seed}); no test case was "
        "opened, no trial stopped early."
    )


def curve_figure(tuned: Sequence[TunedStrategy], settings: TuneSettings) -> Any:
    """Best score so far against the budget spent; single trials as points.

    Args:
        tuned: the strategies.
        settings: how they were tuned.
    """
    figure = style.new(style.COLUMN_IN, 2.4)
    ax = figure.subplots()
    pens = style.pens([one.name for one in tuned])
    for one in tuned:
        pen, rows = pens[one.name], [r for r in curve(one) if r.best is not None]
        spent = [r.spent_updates if settings.unit == "updates" else r.spent_seconds for r in rows]
        best = [r.best for r in rows if r.best is not None]
        ax.step(
            [*spent, settings.budget],
            [*best, best[-1]],
            where="post",
            color=pen.color,
            linestyle=pen.dash,
        )
        scored = [(x, r.score) for x, r in zip(spent, rows, strict=True) if r.score is not None]
        ax.plot(
            *zip(*scored, strict=True),
            linestyle="none",
            marker=pen.marker,
            markersize=3.5,
            markerfacecolor="none",
            markeredgewidth=0.7,
            color=pen.color,
        )
        first = rows[0]
        if first.trial == 1 and first.score is not None:  # the defaults
            ax.plot(
                spent[:1],
                [first.score],
                linestyle="none",
                marker=pen.marker,
                markersize=4.5,
                color=pen.color,
            )
    ax.set_xlabel(f"{settings.unit} spent, of {settings.budget:,g} for each strategy")
    ax.set_ylabel("mean validation Dice")
    ax.set_xlim(left=0)
    style.grid(ax, "y")
    small = "Line: best so far. Filled: the defaults, the first trial. Open: other settings.\n"
    bench = tuned[0].facts["identity"]["bench"]
    style.frame(
        figure,
        not tuned[0].patients,
        f"{bench}: tuning, best so far",
        small + _small_print(settings),
        style.key(pens, lines=True),
    )
    return figure


def settings_figure(one: TunedStrategy, settings: TuneSettings) -> Any:
    """A panel per setting: the score of every trial along its range.

    Args:
        one: the strategy.
        settings: how it was tuned.
    """
    count = len(one.space)
    across = min(ACROSS, count)
    width = style.COLUMN_IN if count < 3 else style.PAGE_IN
    figure = style.new(width, 0.2 + 1.9 * -(-count // across))
    _, places = style.panels(figure, count, across, sharey=True)
    scored = [(t, t.score) for t in one.trials if t.score is not None]
    for (ax, leftmost, _), (name, span) in zip(places, one.space.items(), strict=True):
        values = [t.settings.get(name, one.defaults[name]) for t, _ in scored]
        at = [_place(span, value) for value in values]
        ax.plot(
            at,
            [score for _, score in scored],
            linestyle="none",
            marker="o",
            markersize=3.5,
            markerfacecolor="none",
            color=style.GRAY,
        )
        for trial, marker, color in ((one.trials[0], "s", "#000000"), (one.best, "*", "#D55E00")):
            if trial.score is not None:
                value = trial.settings.get(name, one.defaults[name])
                ax.plot(
                    [_place(span, value)],
                    [trial.score],
                    linestyle="none",
                    marker=marker,
                    color=color,
                    markersize=7 if marker == "*" else 4,
                )
        if not isinstance(span, Choice):
            low, high = span.bounds(name)
            log = span.log and high >= 10 * low
            if log:
                ax.set_xscale("log")
            part = 0.05
            ends = (low - part * (high - low), high + part * (high - low))
            if log:
                ends = (low * (low / high) ** part, high * (high / low) ** part)
            ax.set_xlim(*ends)
        ax.set_title(wrapped(name.removeprefix("strategy."), width / across - 0.6, style.TITLE_PT))
        if leftmost:
            ax.set_ylabel("mean validation Dice")
        style.grid(ax, "y")
    bench = one.facts["identity"]["bench"]
    small = "Square: the defaults. Star: chosen. Circles: other trials."
    if without := [
        n for n, s in one.space.items() if isinstance(s, Range) and one.defaults[n] is None
    ]:
        names = ", ".join(n.removeprefix("strategy.") for n in without)
        small += f" The defaults have no {names}, so they are not drawn there."
    small += "\n" + _small_print(settings)
    style.frame(figure, not one.patients, f"{bench}, {one.name}: score along each setting", small)
    return figure


def _place(span: Range | Choice, value: Any) -> Any:
    """Where a value lies along its axis; nan, which is not drawn, for none among numbers."""
    if isinstance(span, Choice):
        return word(value)
    return math.nan if value is None else value
