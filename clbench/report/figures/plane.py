"""Stability against plasticity: what is kept against what is learned."""

from __future__ import annotations

from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import KEPT, NEW, hole, table
from clbench.statistics.macro_estimate import macro_interval


def plane(study: Analysis) -> Figure:
    """Backward transfer (x) against Dice of new structures at their own step (y).

    Both with intervals over patients and seeds. Up and right is better.
    """
    e, p = study.dice, study.protocol
    study.need(e.last > 1, "a course of one step keeps nothing", "name another benchmark")
    pens = style.pens([m.label for m in e.strategies])
    figure = style.new(style.COLUMN_IN, 2.9)
    ax = figure.subplots()
    missing = []
    for m in e.strategies:
        why = hole(e, m, KEPT) or hole(e, m, NEW)
        if why:
            missing.append(m.label)
            continue
        kept, new = (
            macro_interval(table(e, m, which, m.seeds), level=p.level, bounds=bounds)
            for which, bounds in ((KEPT, None), (NEW, (0.0, 1.0)))
        )
        pen = pens[m.label]
        ax.errorbar(
            kept.estimate, new.estimate, xerr=style.reach(kept), yerr=style.reach(new),
            color=pen.color, marker=pen.marker, markersize=5, elinewidth=0.8, capsize=1.5,
            linestyle="none", markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    ax.axvline(0, color=style.GRAY, linewidth=0.5, linestyle=(0, (3, 2)))
    ax.set_xlabel("change of old structures, backward transfer (kept →)")
    ax.set_ylabel("Dice of new structures, own step (learned →)")
    style.grid(ax, "both")
    caption = f"Bars: {p.percent} over patients and seeds (t). Up and right is better."
    if missing:
        caption += f" Not shown, because scores are missing: {', '.join(missing)}."
    shown = {name: pen for name, pen in pens.items() if name not in missing}
    style.frame(figure, e, f"{e.bench}: stability against plasticity", caption,
                style.key(shown, lines=False))  # fmt: skip
    return figure
