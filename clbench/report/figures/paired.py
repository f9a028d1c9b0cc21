"""Every patient as a line: old structures at their own step and after the last."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, wrapped
from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.analysis import Analysis

ACROSS = 5


def per_patient(e: Scores, method: StrategyScores) -> dict[str, np.ndarray]:
    """Eval set → (patients, 2): mean over the old structures a patient has, own step and last."""
    found: dict[str, list[list[np.ndarray]]] = {}
    for c, s in e.learned_at.items():
        if s == e.last:
            continue
        pair = [method.cells.get((t, e.home(c), c)) for t in (s, e.last)]
        if any(p is None or p.hole for p in pair):
            return {}
        found.setdefault(e.home(c), []).append([p.values.mean(axis=0) for p in pair if p])
    means = {}
    for name, values in found.items():
        stack = np.array(values)  # (structures, 2, patients)
        have = ~np.isnan(stack)
        count = have.sum(axis=0)
        total = np.where(have, stack, 0.0).sum(axis=0)
        means[name] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0).T
    return means


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
    axes = figure.subplots(down, across, squeeze=False, sharey=True, sharex=True)
    sets = [s for s in dict.fromkeys(e.sources) if any(
        e.home(c) == s and at < e.last for c, at in e.learned_at.items())]  # fmt: skip
    look = dict(zip(sets, list(style.pens(["", *sets]).values())[1:], strict=True))
    for i, ax in enumerate(axes.flat):
        if i >= len(e.strategies):
            ax.set_axis_off()
            continue
        m = e.strategies[i]
        data = per_patient(e, m)
        if not data:
            ax.text(0.5, 0.5, "hole:\nscores missing", ha="center", va="center", color=style.GRAY)
        pooled = []
        for name, values in data.items():
            pooled.append(values)
            pen = look[name]
            for own, last in values:
                ax.plot([0, 1], [own, last], color=pen.color, linewidth=0.6, alpha=0.65,
                        marker=pen.marker, markersize=2.2, markeredgewidth=0)  # fmt: skip
        if pooled:
            both = np.concatenate(pooled)
            both = both[~np.isnan(both).any(axis=1)]
            if len(both):
                middle = np.median(both, axis=0)
                ax.plot([0, 1], middle, color="black", linewidth=1.8, marker="o", markersize=3.5,
                        zorder=5)  # fmt: skip
                worse = int((both[:, 1] < both[:, 0]).sum())
                ax.text(0.5, 0.02, f"{worse} of {len(both)} lose", ha="center", va="bottom",
                        fontsize=6, transform=ax.transAxes)  # fmt: skip
        ax.set_title(titles[i])
        ax.set_xlim(-0.2, 1.2)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks([0, 1], ["own step", f"step {e.last}"])
        ax.yaxis.grid(True, linewidth=0.3, color="#d9d9d9")
        ax.set_axisbelow(True)
        ax.tick_params(labelbottom=i + across >= len(e.strategies))
        if i % across == 0:
            ax.set_ylabel("Dice, mean of old structures")
    words = "Each line: one patient, seeds averaged, mean of the old structures it has. "
    words += "Black: medians over patients."
    key = style.key({s: look[s] for s in sets}, lines=False) if len(sets) > 1 else ()
    style.frame(figure, e, f"{e.bench}: forgetting, patient by patient", words, key)
    return figure
