"""Forgetting over the steps: the structures of each step, followed to the end."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, wrapped
from clbench.report.significance.analysis import Analysis
from clbench.statistics.bootstrap import seed_means
from clbench.statistics.macro_estimate import macro_interval
from clbench.types import Floats

ACROSS = 4
"""Panels side by side."""
TICK_IN = 0.36
"""Width of `step 10`, with a gap."""
LETTER_IN = 0.15
"""Width of the letter before a title."""


def forgetting(study: Analysis) -> Figure:
    """A panel per step whose structures can be forgotten: mean Dice from there to the last step."""
    e, p = study.dice, study.protocol
    study.need(e.last > 1, "a course of one step forgets nothing", "name another benchmark")
    pens = style.pens([m.label for m in e.strategies])
    taught = {
        k: names
        for k in range(1, e.last)
        if (names := [c for c, s in e.learned_at.items() if s == k])
    }
    study.need(taught, "no structure counts here before the last step", "name another test set")
    panels = len(taught)
    across = min(ACROSS, panels)
    down = math.ceil(panels / across)
    width = style.COLUMN_IN if panels == 1 else style.PAGE_IN
    panel_in = (width - 0.5) / across - 0.12
    titles = [
        wrapped(
            f"{len(names)} structure{'s' if len(names) != 1 else ''} of step {k}",
            panel_in - LETTER_IN, style.TITLE_PT,
        )
        for k, names in taught.items()
    ]  # fmt: skip
    figure = style.new(width, 0.4 + down * (2.2 + more_lines_in(titles, style.TITLE_PT)))
    _, places = style.panels(figure, panels, across, sharey=True)
    axes = [ax for ax, _, _ in places]
    shown: dict[str, style.Pen] = {}
    for ax, (k, names), title in zip(axes, taught.items(), titles, strict=True):
        steps = range(k, e.last + 1)
        for i, m in enumerate(e.strategies):
            tables = [m.table(dict.fromkeys(names, t)) for t in steps]
            if all(tables):
                shift = 0.05 * (i - (len(e.strategies) - 1) / 2) / max(1, len(e.strategies) / 4)
                pen = shown[m.label] = pens[m.label]
                _curve(ax, np.array(steps) + shift, tables, p.level, pen, front=i == 0)
        if panel_in / len(steps) >= TICK_IN:
            ax.set_xticks(steps, [f"after\nstep {t}" for t in steps])
        else:
            ax.set_xticks(steps, [str(t) for t in steps])
            ax.set_xlabel("after step")
        ax.set_xlim(k - 0.25, e.last + 0.25)
        ax.set_title(title)
        ax.set_ylim(-0.03, 1.03)
        style.grid(ax, "y")
    for ax in axes[::across]:
        ax.set_ylabel(f"mean Dice ({e.scoring})")
    if panels > 1:
        style.letters(axes)
    missing = [m.label for m in e.strategies if m.label not in shown]
    drawn = [m for m in e.strategies if m.label in shown]
    caption = f"Bars: {p.percent} over {style.over(drawn)} (t)."
    if any(len(m.seeds) > 1 for m in drawn):
        caption += " Thin lines: single seeds."
    if missing:
        caption += f"\nNot shown, because scores are missing: {', '.join(missing)}."
    style.frame(
        figure,
        e.phantom,
        f"{e.heading}: what becomes of old structures",
        caption,
        style.key(shown, lines=True),
    )
    return figure


def _curve(
    ax: Axes,
    x: Floats,
    tables: list[dict[str, Floats]],
    level: float,
    pen: style.Pen,
    *,
    front: bool,
) -> None:
    """Draw one strategy: its mean with bars, and thin lines of its seeds.

    Args:
        ax: the panel.
        x: (steps,) where.
        tables: scores after each step.
        level: of the intervals.
        pen: of the strategy.
        front: drawn above the others.
    """
    seeds = np.array([seed_means(t) for t in tables])
    intervals = [macro_interval(t, level=level, bounds=(0.0, 1.0)) for t in tables]
    if seeds.shape[1] > 1:
        ax.plot(x, seeds, color=pen.color, linewidth=0.4, alpha=0.45, linestyle=pen.dash)
    ax.errorbar(
        x, [i.estimate for i in intervals], yerr=np.hstack([style.reach(i) for i in intervals]),
        **pen.line(), markersize=3.6, elinewidth=0.8, capsize=1.5, capthick=0.6,
        zorder=3 + 2 * front,
    )  # fmt: skip
