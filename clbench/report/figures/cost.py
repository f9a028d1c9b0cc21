"""Operations against score, bubbles for parameters: what a method costs for what it reaches.

Reads what the runs recorded; counts nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.evaluation.metrics import continual
from clbench.report.figures import style
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import FINAL, hole, interval
from clbench.report.tables.costs import Cost, read_costs

VISIBLE = 1.02
"""Growth of operations from which on an arrow can be seen."""
LARGEST_PT = 26
"""Diameter of the largest bubble."""


def cost(study: Analysis) -> Figure:
    """MACs of one forward patch (x, logarithmic) against mean Dice after the last step (y).

    The area of a bubble is the number of parameters; the line leads from the cost after step 1 to
    that after the last step, at the final score.

    Source: the form of the paper's Fig. 7, with intervals and MACs instead of one counter's FLOPs.
    """
    e, p = study.dice, study.protocol
    costs = {m.label: _counted([read_costs(run) for run in m.runs]) for m in e.strategies}
    shown = [m for m in e.strategies if e.last in costs[m.label] and not hole(e, m, FINAL)]
    whole = {m.label for m in shown}
    missing = [m.label for m in e.strategies if m.label not in whole]
    study.need(
        any(e.last in c for c in costs.values()),
        "no run has recorded its operations",
        "count them without training: `clbench cost RUN`, for each run; then draw again",
    )
    study.need(shown, "no strategy has both scores and operations", "finish the runs")
    pens = style.pens([m.label for m in e.strategies])
    sizes = [costs[m.label][e.last]["parameters"] for m in shown]
    smallest, largest = min(sizes), max(sizes)
    figure = style.new(style.COLUMN_IN, 3.0)
    ax = figure.subplots()
    means = [interval(e, m, FINAL, p.level) for m in shown]
    at = [
        (costs[m.label][e.last]["forward_macs"] / 1e9, mean.estimate)
        for m, mean in zip(shown, means, strict=True)
    ]
    colors = [pens[m.label].color for m in shown]
    style.error_bars(ax, at, colors, y=means)
    areas = [LARGEST_PT**2 * size / largest for size in sizes]  # square points
    xs, ys = zip(*at, strict=True)
    ax.scatter(xs, ys, s=areas, c=colors, alpha=0.3, linewidth=0)
    ax.scatter(xs, ys, s=areas, facecolors="none", edgecolors=colors, linewidth=0.8)
    for m, (x, y) in zip(shown, at, strict=True):
        _growth(ax, x, y, costs[m.label], pens[m.label])
        ax.plot(x, y, **pens[m.label].point(), markersize=4.6)
    ax.set_xscale("log")
    ends = [costs[m.label].get(t, costs[m.label][e.last]) for m in shown for t in (1, e.last)]
    low, high = _limits([cost["forward_macs"] / 1e9 for cost in ends])
    ax.set_xlim(low, high)
    ax.set_xticks(_ticks(low, high))
    ax.xaxis.set_major_formatter(lambda v, at: f"{v:g}")
    ax.xaxis.set_minor_formatter(lambda v, at: "")
    ax.margins(y=0.18)
    ax.set_xlabel("operations of one forward patch, 10⁹ MACs")
    ax.set_ylabel(f"mean Dice after step {e.last} ({e.scoring})")
    style.grid(ax, "both")
    of_seeds = ", means over seeds" if any(len(m.seeds) > 1 for m in shown) else ""
    millions = dict.fromkeys(f"{n / 1e6:.3g}" for n in (smallest, largest))
    caption = (
        f"MACs: multiply-adds, counted once each, after step {e.last}. Arrows: growth since "
        f"step 1, where it is above {VISIBLE - 1:.0%}. Area of a bubble: parameters, "
        f"{' to '.join(millions)} million{of_seeds}. Bars: {p.percent} over "
        f"{style.over(shown)} (t)."
    ).replace("%.", " %.")
    if missing:
        caption += " Not shown, because scores or operations are missing: "
        caption += ", ".join(missing) + "."
    entries = style.key({m.label: pens[m.label] for m in shown}, lines=False)
    style.frame(
        figure, e.phantom, f"{e.bench}: what a method costs for what it reaches", caption, entries
    )
    return figure


def _growth(ax: Axes, x: float, y: float, steps: dict[int, Cost], pen: style.Pen) -> None:
    """An arrow from the cost after step 1, where it is visible.

    Args:
        ax: the panel.
        x: operations after the last step, 10⁹ MACs.
        y: the final score.
        steps: its cost after each step.
        pen: of the strategy.
    """
    before = steps[1]["forward_macs"] / 1e9 if 1 in steps else x
    if x > VISIBLE * before:
        ax.annotate(
            "", xy=(x, y), xytext=(before, y),
            arrowprops={"arrowstyle": "-|>", "color": pen.color, "linewidth": 0.8,
                        "linestyle": (0, (2, 1.5)), "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def _counted(runs: Sequence[Mapping[int, Cost]]) -> dict[int, Cost]:
    """Means over seeds, of the steps whose operations and parameters are known of each.

    Args:
        runs: step → cost, of each seed.
    """
    return {
        step: {
            name: continual.mean(run[step][name] for run in runs)
            for name in ("forward_macs", "parameters")
        }
        for step in runs[0]
        if all({"forward_macs", "parameters"} <= set(run.get(step, ())) for run in runs)
    }


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis: room for the bubbles, and never less than a factor of 8."""
    low, high = min(values), max(values)
    room = max(1.5, math.sqrt(8 * low / high))
    return low / room, high * room


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade in between."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]
