"""Stability against plasticity: what is kept against what is learned."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import KEPT, NEW, hole, interval
from clbench.statistics.intervals import Interval

NEAR = 0.1
"""Change of the old structures, Dice, up to which a strategy stands in the second panel."""


def plane(study: Analysis) -> Figure:
    """Backward transfer (x) against Dice of new structures at their own step (y).

    Both with intervals over patients and seeds. Up and right is better. Where a few strategies lose
    much and most do not, a second panel shows the latter alone.
    """
    e, p = study.dice, study.protocol
    study.need(e.last > 1, "a course of one step keeps nothing", "name another benchmark")
    study.need(
        any(step > 1 for step in e.learned_at.values()),
        "no later step teaches a new structure",
        "name another benchmark; `clbench table domains` shows what is taught again",
    )
    pens = style.pens([m.label for m in e.strategies])
    missing = [m.label for m in e.strategies if hole(e, m, KEPT) or hole(e, m, NEW)]
    points = {
        m.label: (interval(e, m, KEPT, p.level), interval(e, m, NEW, p.level))
        for m in e.strategies
        if m.label not in missing
    }
    near = {name: at for name, at in points.items() if abs(at[0].estimate) < NEAR}
    zoomed = 2 < len(near) < len(points)
    figure = style.new(style.PAGE_IN if zoomed else style.COLUMN_IN, 2.9)
    axes = figure.subplots(1, 1 + zoomed, squeeze=False)[0]
    for ax, shown in zip(axes, (points, near), strict=False):
        _points(ax, shown, pens)
        ax.axvline(0, color=style.GRAY, linewidth=0.5, linestyle=(0, (3, 2)))
        ax.set_xlabel("change of old structures, backward transfer (kept →)")
        style.grid(ax, "both")
    axes[0].set_ylabel("Dice of new structures, own step (learned →)")
    drawn_of = [m for m in e.strategies if m.label in points]
    caption = f"Bars: {p.percent} over {style.over(drawn_of)} (t). Up and right is better."
    if zoomed:
        axes[0].set_title("all")
        axes[1].set_title(f"those that change by less than {NEAR:g}")
        style.letters(axes)
    if missing:
        caption += f" Not shown, because scores are missing: {', '.join(missing)}."
    drawn = {name: pen for name, pen in pens.items() if name not in missing}
    style.frame(figure, e.phantom, f"{e.bench}: stability against plasticity", caption,
                style.key(drawn, lines=False))  # fmt: skip
    return figure


def _points(
    ax: Axes, points: Mapping[str, tuple[Interval, Interval]], pens: Mapping[str, style.Pen]
) -> None:
    """Draw the strategies.

    Args:
        ax: the panel.
        points: strategy → change of its old structures, Dice of its new ones.
        pens: color, marker and filling of each.
    """
    if not points:
        return
    kept, new = zip(*points.values(), strict=True)
    at = [(x.estimate, y.estimate) for x, y in points.values()]
    style.error_bars(ax, at, [pens[name].color for name in points], x=kept, y=new, alpha=0.6)
    for name, (x, y) in zip(points, at, strict=True):
        ax.plot(x, y, **pens[name].point(), markersize=5, zorder=4)
