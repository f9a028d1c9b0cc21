"""Every patient as a line: old structures at their own step and after the last."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, wrapped
from clbench.report.scores import Scores, StrategyScores, mean_over_have
from clbench.report.significance.analysis import Analysis
from clbench.types import Floats

ACROSS = 5


def per_patient(e: Scores, method: StrategyScores) -> dict[str, Floats]:
    """Eval set → (patients, 2): mean over the old structures a patient has, own step and last."""
    old = {c: s for c, s in e.learned_at.items() if s < e.last}
    own, last = method.table(old), method.table(dict.fromkeys(old, e.last))
    if not (own and last):
        return {}
    return {
        name: mean_over_have(np.stack([own[name], last[name]], axis=-1).mean(axis=0), axis=1)
        for name in own
    }


def patients(study: Analysis) -> Figure:
    """One panel per strategy; each line is one patient, the thick one the median patient."""
    e = study.dice
    study.need(e.last > 1, "a course of one step forgets nothing", "name another benchmark")
    across = min(ACROSS, len(e.strategies))
    down = math.ceil(len(e.strategies) / across)
    width = max(style.COLUMN_IN, style.PAGE_IN * across / ACROSS)
    panel_in = (width - 0.5) / across - 0.12
    titles = [wrapped(m.label, panel_in, style.TITLE_PT) for m in e.strategies]
    figure = style.new(width, 0.5 + down * (1.75 + more_lines_in(titles, style.TITLE_PT)))
    _, panels = style.panels(figure, len(e.strategies), across, sharey=True, sharex=True)
    sets = [s for s in dict.fromkeys(e.sources) if any(
        e.home(c) == s and at < e.last for c, at in e.learned_at.items())]  # fmt: skip
    look = dict(zip(sets, list(style.pens(["", *sets]).values())[1:], strict=True))
    for (ax, first, lowest), m, title in zip(panels, e.strategies, titles, strict=True):
        data = per_patient(e, m)
        if not data:
            ax.text(0.5, 0.5, "hole:\nscores missing", ha="center", va="center", color=style.GRAY)
        for name, values in data.items():
            pen = look[name]
            ends = np.stack(np.broadcast_arrays([0.0, 1.0], values), axis=-1)
            ax.add_artist(LineCollection(list(ends), colors=pen.color, linewidths=0.6, alpha=0.65))
            x, y = ends.reshape(-1, 2).T
            small = {**pen.point(), "markeredgewidth": 0.4 * (len(sets) > 1)}
            ax.plot(x, y, **small, alpha=0.65, markersize=2.2)
        if data:
            both = np.concatenate(list(data.values()))
            both = both[~np.isnan(both).any(axis=1)]
            if len(both):
                middle = np.median(both, axis=0)
                ax.plot([0, 1], middle, color="black", linewidth=1.8, marker="o", markersize=3.5,
                        zorder=5)  # fmt: skip
                worse = int((both[:, 1] < both[:, 0]).sum())
                ax.text(0.5, 0.02, f"{worse} of {len(both)} lose", ha="center", va="bottom",
                        fontsize=6, transform=ax.transAxes)  # fmt: skip
        ax.set_title(title)
        ax.set_xlim(-0.2, 1.2)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks([0, 1], ["own step", f"step {e.last}"])
        style.grid(ax, "y")
        ax.tick_params(labelbottom=lowest)
        if first:
            ax.set_ylabel("Dice, mean of old structures")
    caption = f"Each line: one patient, {style.averaged(e.strategies)}, mean of the old structures "
    caption += "it has. "
    caption += "Black: medians over patients."
    key = style.key({s: look[s] for s in sets}, lines=False) if len(sets) > 1 else ()
    style.frame(figure, e.phantom, f"{e.bench}: forgetting, patient by patient", caption, key)
    return figure
