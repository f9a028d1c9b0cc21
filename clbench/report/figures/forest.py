"""Paired differences from the reference after the last step, structure by structure."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, width_in, wrapped
from clbench.report.scores import Scores
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import Comparison
from clbench.report.significance.endpoints import FINAL
from clbench.statistics.intervals import Interval

ACROSS = 3


def forest(study: Analysis) -> Figure:
    """Hodges-Lehmann pseudomedian with its exact interval per structure.

    The diamond is the mean of all structures with its simultaneous interval, the band the
    equivalence margin.
    """
    e = study.dice
    study.need(e.others, "one strategy alone has no difference", "run a second strategy")
    structures = sorted(e.learned_at, key=lambda c: e.learned_at[c])
    across = min(ACROSS, len(e.others))
    down = math.ceil(len(e.others) / across)
    width = {1: style.COLUMN_IN, 2: 5.4}.get(across, style.PAGE_IN)
    names = [*(style.name_of(c) for c in structures), "Mean of all"]
    names_in = max(width_in(name, style.TICK_PT) for name in names) + 0.15
    panel_in = max(0.6, (width - names_in) / across - 0.12)
    titles = [wrapped(_title(study, m.label), panel_in, style.TITLE_PT) for m in e.others]
    label = wrapped(f"Dice, {e.reference.label} minus the other", panel_in, style.LABEL_PT)
    height = (
        0.5
        + down * ((len(structures) + 1.6) * 0.145 + 0.5 + more_lines_in(titles, style.TITLE_PT))
        + more_lines_in([label], style.LABEL_PT)
    )
    figure = style.new(width, height)
    _, panels = style.panels(figure, len(e.others), across)
    for (ax, first, lowest), m, title in zip(panels, e.others, titles, strict=True):
        _panel(study, ax, e, m.label, structures)
        ax.set_title(title)
        ax.set_yticks([])
        if first:
            ax.set_yticks([*range(len(structures)), len(structures) + 0.6], names)
        if lowest:
            ax.set_xlabel(label)
    style.frame(
        figure,
        e.phantom,
        f"{e.bench}: paired differences after the last step, reference {e.reference.label}",
        f"Dots: Hodges-Lehmann over patients, {style.averaged(e.strategies)}, with exact "
        f"{study.protocol.percent} interval (open: none "
        "exists at this n). Diamond: mean of all structures, simultaneous interval. Gray band: "
        f"±{study.protocol.margin:g}, the equivalence margin. Titles: verdict of the confirmatory "
        "test of that mean. Every panel has its own scale.",
    )
    return figure


def _whole(study: Analysis, other: str) -> Comparison:
    (whole,) = [c for c in study.comparisons if c.b == other and c.endpoint == FINAL]
    return whole


def _mean_of_all(whole: Comparison) -> list[Interval]:
    """The mean of all structures with its simultaneous interval; none where there is a hole."""
    r = whole.result
    return [] if r is None else [Interval(estimate=r.mean.estimate, low=r.low, high=r.high)]


def _title(study: Analysis, other: str) -> str:
    return f"against {other}: {_whole(study, other).word}"


def _panel(study: Analysis, ax: Axes, e: Scores, other: str, structures: list[str]) -> None:
    rows = {
        r.structure: r
        for r in study.classes
        if r.b == other and r.step == e.last and r.eval_set == e.home(r.structure)
    }
    whole = _whole(study, other)
    reach = [
        abs(v)
        for h in (*(r.pseudomedian for r in rows.values()), *_mean_of_all(whole))
        for v in (h.estimate, h.low, h.high)
        if not math.isnan(v)
    ]
    widest = max([0.05, *reach])
    limit = max(widest, min(1.0, widest * 1.12))
    ax.axvspan(-study.protocol.margin, study.protocol.margin, color="#e4e4e4", linewidth=0)
    ax.axvline(0, color="black", linewidth=0.6)
    dots: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    spans: list[tuple[float, float, int]] = []
    for y, c in enumerate(structures):
        r = rows.get(c)
        if r is None or r.hole or math.isnan(r.pseudomedian.estimate):
            why = "hole" if r is None or r.hole else "no patients"
            ax.text(0, y, why, ha="center", va="center", fontsize=5.5, style="italic")
            continue
        estimate, low, high = r.pseudomedian.estimate, r.pseudomedian.low, r.pseudomedian.high
        known = not math.isnan(low)
        dots[known].append((estimate, y))
        if known:
            spans.append((max(low, -limit), min(high, limit), y))
    if spans:
        low_ends, high_ends, ys = zip(*spans, strict=True)
        ax.hlines(ys, low_ends, high_ends, color="black", linewidth=0.9)
    for known, face in ((True, "black"), (False, "white")):
        if dots[known]:
            ax.plot(*zip(*dots[known], strict=True), "o", color="black", markersize=3.4,
                    markerfacecolor=face, markeredgewidth=0.8)  # fmt: skip
    foot = len(structures) + 0.6
    ax.axhline(len(structures) - 0.2, color=style.GRAY, linewidth=0.4)
    for mean in _mean_of_all(whole):
        middle = mean.estimate
        low, high = (middle, middle) if math.isnan(mean.low) else (mean.low, mean.high)
        ax.add_patch(
            Polygon(
                [(low, foot), (middle, foot - 0.38), (high, foot), (middle, foot + 0.38)],
                facecolor="#0072B2", edgecolor="#0072B2", linewidth=0.6,
            )
        )  # fmt: skip
    if whole.result is None:
        ax.text(0, foot, "hole", ha="center", va="center", fontsize=5.5, style="italic")
    ax.set_xlim(-limit, limit)
    ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))  # more would run into each other
    ax.set_ylim(len(structures) + 1.2, -0.6)
    ax.tick_params(axis="y", length=0)
    style.rules_between_steps(
        ax, structures, e.learned_at, color=style.GRAY, linewidth=0.3, linestyle=(0, (2, 2))
    )
